"""Offline scoring: from a working folder and the user's own tables to top-K lists, scored candidates, or vectors.

Users are scored a part at a time, each part a file that is complete or absent. What a part holds depends on the request alone, so an
interrupted request goes on with the parts that are missing, and any number of processes may share them: each takes one of the next missing
parts and scores it with its own devices, and they go on together, so that all learn of a signal or an error within a part.
"""

import dataclasses
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import jax
import numpy as np
import polars as pl
from jax.sharding import AxisType
from tqdm import tqdm

from iam_jax.config import FREE_FIELDS, Config, check_same_run, flatten
from iam_jax.data.histories import Users, read_candidates, read_users
from iam_jax.data.stored import add_items, read_stored
from iam_jax.devices import distributed
from iam_jax.devices.mesh import make_mesh
from iam_jax.devices.signals import Signals
from iam_jax.errors import InputError
from iam_jax.model import Model, Params, make_model, pretrained
from iam_jax.model.parameters import abstract, frozen_names, join, select
from iam_jax.runs.checkpoint import Checkpoints
from iam_jax.serving.scorer import Scorer
from iam_jax.storage.files import check_writable, make_folder, to_path, write_atomically
from iam_jax.storage.remote import is_remote

_NAME = "part-{:05}-of-{:05}.parquet"
_REQUEST = "request.json"
_DEFAULT_K = 100
_PAIRS = 1 << 21  # given candidates scored at one time, at least one user's


@dataclasses.dataclass(frozen=True)
class Request:
    """The flags of the command line."""

    output: str
    users: str = ""
    items: str = ""
    candidates: str = ""
    top_k: int | None = None
    vectors: bool = False
    step: str = "best"

    def check(self, config: Config) -> None:
        """Raises InputError for flags that do not go together or with the model, and for a folder that cannot be filled."""
        by_item = config.eval.ranking == "item"
        wrong = {
            "--output=DIR is missing": not self.output,
            "--users=TABLE is missing (or --vectors, for the items' vectors)": not (self.users or self.vectors),
            "--candidates=TABLE needs --users=TABLE": self.candidates and not self.users,
            "--vectors goes with neither --candidates nor --top_k": self.vectors and (self.candidates or self.top_k is not None),
            f"--top_k={self.top_k}: must be 1 or more": self.top_k is not None and self.top_k < 1,
            "--vectors: there are none with config.eval.ranking = 'likelihood'": self.vectors and not by_item,
            "--items: the model does not read the items' text (config.objective.vectors = 'table')": self.items
            and by_item
            and not config.uses_text,
        }
        for message, holds in wrong.items():
            if holds:
                raise InputError(message)
        output = to_path(self.output)
        check_writable(output, "output")
        if output.is_dir() and not (output / _REQUEST).exists() and any(not path.name.startswith(".") for path in output.iterdir()):
            raise InputError(f"--output={output} is not empty and holds no {_REQUEST}: not a folder of scores")


def score(workdir: Path, config: Config, request: Request, saved: bool, signals: Signals | None = None) -> None:
    """Writes the parts of a request that are not there yet. saved: the config is the working folder's own. Raises InputError for whatever
    is wrong with the request, the tables, or the working folder, before any part is written. signals: of a job of several processes."""
    signals = signals or Signals()
    request.check(config)
    config = _pretrained(workdir, config, saved)
    check_same_run(workdir, config)
    stored, notes = read_stored(workdir, config.data), []
    if request.items:
        stored, notes = add_items(stored, config.data, request.items)
    catalogue, users = stored.catalogue, None
    longest = int(catalogue.item_lengths.max())
    if (needed := catalogue.frame_tokens + 2 * longest) > config.data.row_tokens:
        raise InputError(f"{request.items}: config.data.row_tokens = {config.data.row_tokens}, and two of the longest items need {needed}")
    if request.users:
        users, more = read_users(request.users, stored.item_ids, config.data.untitled == "drop" or config.data.k_core > 0)
        notes += more
        if request.candidates:
            users = read_candidates(request.candidates, users, stored.item_ids)
    distributed.agree({"--workdir": str(workdir), **{f"--{name}": value for name, value in vars(request).items()}}, signals)
    checkpoints = Checkpoints(workdir, config.train.keep, config.selection, read_only=True)
    model = make_model(config, catalogue.vocabulary, stored.known, int(catalogue.lengths.max()))
    mesh = _mesh(config)
    with jax.set_mesh(mesh):  # before the folder is claimed: a damaged checkpoint has another stand in for it
        step, params = _restore(checkpoints, request.step, config, model, mesh)
    output, rows = to_path(request.output), len(stored.item_ids) if users is None else len(users)
    parts = math.ceil(rows / config.score.part_users)
    identity = _identity(workdir, config, request, step, checkpoints.progress(step))
    distributed.agree(identity, signals)
    with distributed.fail_together(signals):
        if distributed.is_first():
            _claim(output, identity)
    with distributed.fail_together(signals):
        if not (output / _REQUEST).exists():
            raise InputError(f"--output={output}: this process does not see what the first one wrote; all need the same disk")
    for note in notes:
        print(note)

    names = [_NAME.format(part, parts) for part in range(parts)]
    sizes = [min(config.score.part_users, rows - part * config.score.part_users) for part in range(parts)]
    missing = distributed.gather([part for part in range(parts) if not (output / names[part]).exists()])[0]
    print(f"step {step:,}; {parts:,} parts" + (f", {parts - len(missing):,} are there" if parts > len(missing) else ""), flush=True)
    if not missing:
        print(f"wrote {output}")
        return
    with jax.set_mesh(mesh):
        tokens = 0 if users is None else int(catalogue.lengths[users.events.item].sum())
        unit, begun = "item" if users is None else "user", time.monotonic()
        interval = 0.2 if sys.stderr.isatty() else 10
        interval = {"mininterval": interval, "maxinterval": interval}
        total, done, processes = rows, rows - sum(sizes[part] for part in missing), jax.process_count()
        shown = config.log.progress and distributed.is_first()
        with tqdm(total=total, initial=done, desc="scoring", unit=unit, disable=not shown, **interval) as bar:
            scorer = Scorer(config, stored, model, params, mesh, tokens, report=bar.update)
            for first in range(0, len(missing), processes):
                next_parts = missing[first : first + processes]
                with distributed.fail_together(signals):
                    for part in next_parts[jax.process_index() :][:1]:
                        begin = part * config.score.part_users
                        frame = _part(scorer, users, begin, begin + sizes[part], request)
                        for left in [] if is_remote(output) else output.glob(f".{names[part]}-*"):  # of a process that was killed
                            left.unlink()
                        write_atomically(output / names[part], frame.write_parquet)
                done_now = sum(sizes[part] for part in missing[: first + processes])
                bar.update(done + done_now - bar.n)  # what is not reported: items, and users of other processes
    seconds = time.monotonic() - begun
    print(f"wrote {output}: {total - done:,} {unit}s in {seconds:.1f} s, {(total - done) / seconds:,.0f} {unit}s/s")


def _part(scorer: Scorer, users: Users | None, begin: int, end: int, request: Request) -> pl.DataFrame:
    item_ids = scorer.stored.item_ids
    if users is None:
        return pl.DataFrame([item_ids[begin:end].rename("item"), pl.Series("vector", np.asarray(scorer.item_vectors[begin:end]))])
    users = users.part(begin, end)
    if request.vectors:
        h_nE = scorer.user_vectors(users.events.last(scorer.config.data.last_n))
        return pl.DataFrame([users.ids.rename("user"), pl.Series("vector", h_nE)])
    if users.candidates is None:
        return _lists(item_ids, users, *scorer.top(users, min(request.top_k or _DEFAULT_K, len(item_ids))))
    k = request.top_k or len(item_ids)
    return pl.concat([_lists(item_ids, some, *scorer.given(some, k)) for some in users.pieces(_PAIRS)])


def _lists(item_ids: pl.Series, users: Users, item: np.ndarray, score: np.ndarray) -> pl.DataFrame:
    user, place = np.nonzero(score > -np.inf)
    ids = users.ids.gather(user).rename("user"), item_ids.gather(item[user, place]).rename("item")
    return pl.DataFrame([*ids, pl.Series("rank", place + 1, dtype=pl.Int32), pl.Series("score", score[user, place])])


# ---- the working folder, the output folder


def _freezes(config: Config) -> bool:
    """Whether parameters of the model folder are in no checkpoint."""
    unread = bool(config.model.pretrained) and not config.objective.token and not config.model.tie_tokens
    return config.freezes or unread


def _pretrained(workdir: Path, config: Config, saved: bool) -> Config:
    """The config with the model folder's shape. The folder is needed only for parameters that are in no checkpoint, since a saved config
    holds the shape. Raises InputError for another model."""
    if not config.model.pretrained or (saved and not _freezes(config)):
        return config
    config = pretrained.configure(config)
    known = _data(workdir).get("pretrained_sha256")
    if known != (found := pretrained.fingerprint(config)):
        raise InputError(f"{workdir} was made from another pretrained model: its pretrained_sha256 is {known}, not {found}")
    return config


def _data(workdir: Path) -> dict:
    try:
        return dict(json.loads((workdir / "data.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{workdir / 'data.json'}: cannot be read ({error})") from error


def _mesh(config: Config) -> jax.sharding.Mesh:
    """Of this process alone: processes share parts, not arrays."""
    if jax.process_count() == 1:
        return make_mesh(config.mesh)
    devices = jax.local_devices()
    return jax.make_mesh((len(devices), 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def _restore(checkpoints: Checkpoints, step: str, config: Config, model: Model, mesh: jax.sharding.Mesh) -> tuple[int, Params]:
    shapes = model.shapes()
    names = frozen_names(config, shapes) if _freezes(config) else set()
    found, params = checkpoints.load_params(step, abstract(mesh, select(shapes, lambda name: name not in names)))
    if names:
        frozen = select(shapes, lambda name: name in names)
        params = join(params, pretrained.load(config, abstract(mesh, frozen, config.model.frozen_dtype)))
    return found, params


def _identity(workdir: Path, config: Config, request: Request, step: int, progress: dict) -> dict:
    """What the parts depend on, besides the machine's rounding."""
    known = {name: value for name, value in flatten(dataclasses.asdict(config)).items() if not name.startswith(FREE_FIELDS)}
    known.pop("train.steps")
    run = json.dumps([known, _data(workdir), progress], sort_keys=True, default=str)
    what = {"run": hashlib.sha256(run.encode()).hexdigest(), "step": step}
    for name in ("users", "items", "candidates"):
        if path := getattr(request, name):
            with open(path, "rb") as file:
                what[name] = hashlib.file_digest(file, "sha256").hexdigest()
    what |= {"top_k": request.top_k or (None if request.candidates else _DEFAULT_K), "vectors": request.vectors}
    fields = [f"eval.{name}" for name in ("ranking", "length_normalized", "filter_seen", "chunk_items", "item_states_gib")]
    every = flatten(dataclasses.asdict(config))
    return what | {name: every[name] for name in (*fields, "score.part_users", "score.batch_rows")}


def _claim(output: Path, identity: dict) -> None:
    """Makes the folder for this request, or refuses it where it is another's."""
    path = output / _REQUEST
    try:
        if not path.exists():
            make_folder(output)
            write_atomically(path, lambda temporary: temporary.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8"))
            return
        there = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(name for name in identity.keys() | dict(there).keys() if identity.get(name) != there.get(name))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read or written ({error})") from error
    if differing:
        raise InputError(f"{output} holds the scores of another request ({', '.join(differing)} differ); choose another --output")

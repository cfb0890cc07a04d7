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
import polars as pl
from tqdm import tqdm

from iam_jax.config import FREE_FIELDS, Config, flatten
from iam_jax.data.histories import Users, read_candidates, read_users
from iam_jax.data.stored import add_items, read_stored
from iam_jax.devices import distributed
from iam_jax.devices.signals import Signals
from iam_jax.errors import InputError
from iam_jax.ranking.core import Report
from iam_jax.runs.checkpoint import Checkpoints
from iam_jax.serving.loading import data_facts, model_of, restore, serving_mesh, shape_from_folder
from iam_jax.serving.recommender import Recommender
from iam_jax.storage.files import check_writable, make_folder, to_path, write_atomically
from iam_jax.storage.remote import is_remote

_NAME = "part-{:05}-of-{:05}.parquet"
_REQUEST = "request.json"
_DEFAULT_K = 100
_PAIRS = 1 << 21  # given candidates scored at one time, at least one user's


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
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


def score(workdir: Path, config: Config, request: ScoreRequest, saved: bool, signals: Signals | None = None) -> None:
    """Writes the parts of a request that are not there yet. saved: the config is the working folder's own. Raises InputError for whatever
    is wrong with the request, the tables, or the working folder, before any part is written. signals: of a job of several processes."""
    signals = signals or Signals()
    request.check(config)
    config = shape_from_folder(workdir, config, saved)
    stored, notes = read_stored(workdir, config.data), []
    if request.items:
        stored, notes = add_items(stored, config.data, request.items)
    catalogue, users = stored.catalogue, None
    longest = int(catalogue.item_lengths.max())
    if (needed := catalogue.frame_tokens + 2 * longest) > config.data.row_tokens:
        raise InputError(f"{request.items}: config.data.row_tokens = {config.data.row_tokens}, and two of the longest items need {needed}")
    if request.users:
        users, more = read_users(request.users, stored.item_ids, config.data.untitled == "drop" or config.data.k_core > 0)
        notes += [*more, f"{len(users):,} users, {len(users.events.item):,} events, {len(stored.item_ids):,} items"]
        if request.candidates:
            users = read_candidates(request.candidates, users, stored.item_ids)
    distributed.agree({"--workdir": str(workdir), **{f"--{name}": value for name, value in vars(request).items()}}, signals)
    checkpoints = Checkpoints(workdir, config.train.keep, config.selection, read_only=True)
    model, mesh = model_of(config, stored), serving_mesh(config)
    with jax.set_mesh(mesh):  # before the folder is claimed: a damaged checkpoint has another in its place
        step, params = restore(checkpoints, request.step, config, model, mesh)
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
    tokens = 0 if users is None else int(catalogue.lengths[users.events.item].sum())
    unit, begun = "item" if users is None else "user", time.monotonic()
    interval = 0.2 if sys.stderr.isatty() else 10.0
    total, done, processes = rows, rows - sum(sizes[part] for part in missing), jax.process_count()
    shown = config.log.progress and distributed.is_first()
    with tqdm(total=total, initial=done, desc="scoring", unit=unit, disable=not shown, mininterval=interval, maxinterval=interval) as bar:
        recommender = Recommender(config, stored, model, params, mesh, step)

        def report(users_done: int) -> None:
            distributed.report_progress("a batch of histories")
            bar.update(users_done)

        for first in range(0, len(missing), processes):
            next_parts = missing[first : first + processes]
            with distributed.fail_together(signals):
                for part in next_parts[jax.process_index() :][:1]:
                    begin = part * config.score.part_users
                    frame = _part(recommender, users, begin, begin + sizes[part], request, tokens, report)
                    for left in [] if is_remote(output) else output.glob(f".{names[part]}-*"):  # of a process that was killed
                        left.unlink()
                    write_atomically(output / names[part], frame.write_parquet)
            done_now = sum(sizes[part] for part in missing[: first + processes])
            bar.update(done + done_now - bar.n)  # what is not reported: items, and users of other processes
    seconds = time.monotonic() - begun
    print(f"wrote {output}: {total - done:,} {unit}s in {seconds:.1f} s, {(total - done) / seconds:,.0f} {unit}s/s")


def _part(
    recommender: Recommender, users: Users | None, begin: int, end: int, request: ScoreRequest, tokens: int, report: Report
) -> pl.DataFrame:
    if users is None:
        ids = recommender.item_ids[begin:end].rename("item")
        return pl.DataFrame([ids, pl.Series("vector", recommender.vectors_of(slice(begin, end)))])
    users = users.part(begin, end)
    if request.vectors:
        return pl.DataFrame([users.ids.rename("user"), pl.Series("vector", recommender.history_vectors(users, tokens, report))])
    if users.candidates is None:
        found = recommender.top(users, request.top_k or _DEFAULT_K, recommender.config.eval.filter_seen, tokens, report)
        return recommender.table(users, *found)
    k = request.top_k or int(users.candidates.lengths.max())
    return pl.concat([recommender.table(piece, *recommender.given(piece, k, tokens, report)) for piece in users.pieces(_PAIRS)])


# ---- the output folder


def _identity(workdir: Path, config: Config, request: ScoreRequest, step: int, progress: dict) -> dict:
    """What the parts depend on, besides the machine's rounding."""
    known = {name: value for name, value in flatten(dataclasses.asdict(config)).items() if not name.startswith(FREE_FIELDS)}
    known.pop("train.steps")
    run = json.dumps([known, data_facts(workdir), progress], sort_keys=True, default=str)
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

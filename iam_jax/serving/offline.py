"""Offline scoring: writes top-K lists, scored candidates or vectors of a model or a baseline, from a working folder and tables of users.

Users are scored in parts. Each part is a file that is either complete or absent. The content of a part depends only on the request. So an
interrupted request continues with the missing parts, and any number of processes can share them. Each process scores one of the next
missing parts with its own devices, and then all continue together. Thus all processes notice a signal or an error after at most one part.
"""

import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import polars as pl
from tqdm import tqdm

from iam_jax.config import Config, flatten, run_fields
from iam_jax.data.catalogue import Catalogue
from iam_jax.data.histories import Users, read_candidates, read_users
from iam_jax.data.stored import Stored, add_items, read_stored
from iam_jax.devices import distributed
from iam_jax.devices.signals import Signals
from iam_jax.errors import InputError
from iam_jax.ranking.core import Report
from iam_jax.runs.checkpoint import Checkpoints
from iam_jax.serving.counted import CountedLists
from iam_jax.serving.loading import data_facts, fusion_of, model_of, restore, serving_mesh, shape_from_folder, tower_of
from iam_jax.serving.recommender import Recommender
from iam_jax.storage.files import check_writable, make_folder, to_path, write_atomically
from iam_jax.storage.remote import is_remote

_NAME = "part-{:05}-of-{:05}.parquet"
_REQUEST = "request.json"
_DEFAULT_K = 100
_PAIRS = 1 << 21  # given candidates that are scored at the same time, of at least one user


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
    """The flags of --mode=score."""

    output: str
    users: str = ""
    items: str = ""
    candidates: str = ""
    top_k: int | None = None
    vectors: bool = False
    step: str = "best"
    baseline: str = ""  # instead of the model

    def check(self, config: Config) -> None:
        """Raises InputError if the flags contradict each other or the model, or if the output folder cannot be written."""
        by_item = config.eval.ranking == "item"
        problems = {
            "--output=DIR is missing": not self.output,
            "--users=TABLE is missing (or --vectors, for item vectors)": not (self.users or self.vectors),
            "--candidates=TABLE needs --users=TABLE": self.candidates and not self.users,
            "--vectors cannot be combined with --candidates or --top_k": self.vectors and (self.candidates or self.top_k is not None),
            "--baseline cannot be combined with --items or --vectors: it has no score of new items, and no vectors": self.baseline
            and (self.items or self.vectors),
            f"--top_k={self.top_k}: must be 1 or more": self.top_k is not None and self.top_k < 1,
            "--vectors: a model with config.eval.ranking = 'likelihood' has no vectors": self.vectors and not by_item,
            "--items: the model's item vectors do not come from text (config.objective.vectors = 'table')": self.items
            and by_item
            and not config.uses_text,
        }
        for message, applies in problems.items():
            if applies:
                raise InputError(message)
        output = to_path(self.output)
        check_writable(output, "output")
        if output.is_dir() and not (output / _REQUEST).exists() and any(not path.name.startswith(".") for path in output.iterdir()):
            raise InputError(f"--output={output} is not empty and has no {_REQUEST}: not a folder of scores")


def score(workdir: Path, config: Config, request: ScoreRequest, saved: bool, signals: Signals | None = None) -> None:
    """Writes the missing parts of a request.

    Args:
      workdir: the working folder of the model.
      config: the run's config.
      request: the flags.
      saved: whether the config is the working folder's own.
      signals: the process's signal handlers, in a job of several processes.

    Raises:
      InputError: if the request, the tables or the working folder are invalid. No part is written then.
      FloatingPointError: for a score or a vector that is not finite. Its part is not written.
    """
    signals = signals or Signals()
    request.check(config)
    config = shape_from_folder(workdir, config, saved)
    stored, notes = read_stored(workdir, config.data), []
    if request.items:
        stored, notes = add_items(stored, config.data, request.items)
    catalogue, users = stored.catalogue, None
    _check_rows(config, catalogue, request)
    if request.users:
        users, user_notes = read_users(request.users, stored.item_ids, config.data)
        notes += [*user_notes, f"{len(users):,} users, {len(users.events.item):,} events, {len(stored.item_ids):,} items"]
        if request.candidates:
            users = read_candidates(request.candidates, users, stored.item_ids)
    distributed.agree({"--workdir": str(workdir), **{f"--{name}": value for name, value in vars(request).items()}}, signals)
    scorer = _baseline(workdir, config, request, stored) if request.baseline else _model(workdir, config, request, stored)
    output, rows = to_path(request.output), len(stored.item_ids) if users is None else len(users)
    parts = math.ceil(rows / config.score.part_users)
    identity = _identity(workdir, config, request, scorer)
    distributed.agree(identity, signals)
    with distributed.fail_together(signals):
        if distributed.is_first():
            _claim(output, identity)
    with distributed.fail_together(signals):
        if not (output / _REQUEST).exists():
            raise InputError(f"--output={output}: this process does not see the files of the first process; all need the same disk")
    for note in notes:
        print(note)

    names = [_NAME.format(part, parts) for part in range(parts)]
    sizes = [min(config.score.part_users, rows - part * config.score.part_users) for part in range(parts)]
    missing = distributed.gather([part for part in range(parts) if not (output / names[part]).exists()])[0]
    print(f"{scorer.name}; {parts:,} parts" + (f", {parts - len(missing):,} exist already" if parts > len(missing) else ""), flush=True)
    if not missing:
        print(f"wrote {output}")
        return
    recommender = scorer.load()
    tokens = 0 if users is None else int(catalogue.lengths[users.events.item].sum())
    unit, start = "item" if users is None else "user", time.monotonic()
    interval = 0.2 if sys.stderr.isatty() else 10.0
    total, done, processes = rows, rows - sum(sizes[part] for part in missing), jax.process_count()
    shown = config.log.progress and distributed.is_first()
    with tqdm(total=total, initial=done, desc="scoring", unit=unit, disable=not shown, mininterval=interval, maxinterval=interval) as bar:

        def report(users_done: int) -> None:
            distributed.report_progress("a batch of histories")
            bar.update(users_done)

        for first in range(0, len(missing), processes):
            next_parts = missing[first : first + processes]
            with distributed.fail_together(signals):
                for part in next_parts[jax.process_index() :][:1]:
                    begin = part * config.score.part_users
                    frame = _part(recommender, users, begin, begin + sizes[part], request, config.eval.filter_seen, tokens, report)
                    for unfinished in [] if is_remote(output) else output.glob(f".{names[part]}-*"):  # from a process that was killed
                        unfinished.unlink()
                    write_atomically(output / names[part], frame.write_parquet)
            done_now = sum(sizes[part] for part in missing[: first + processes])
            bar.update(done + done_now - bar.n)  # items, and users of other processes, are not reported
    seconds = time.monotonic() - start
    print(f"wrote {output}: {total - done:,} {unit}s in {seconds:.1f} s, {(total - done) / seconds:,.0f} {unit}s/s")


def _part(
    recommender: Recommender | CountedLists,
    users: Users | None,
    begin: int,
    end: int,
    request: ScoreRequest,
    filter_seen: bool,
    tokens: int,
    report: Report,
) -> pl.DataFrame:
    """The rows of users begin:end, or of items begin:end if there are no users. tokens: of all histories of the request."""
    if request.vectors:
        assert isinstance(recommender, Recommender)
        return _vectors(recommender, users, begin, end, tokens, report)
    assert users is not None
    users = users.part(begin, end)
    if users.candidates is None:
        item_nK, score_nK = recommender.top(users, request.top_k or _DEFAULT_K, filter_seen, tokens, report)
        return recommender.table(users, item_nK, score_nK)
    k = request.top_k or int(users.candidates.lengths.max())
    return pl.concat([recommender.table(piece, *recommender.score_candidates(piece, k, tokens, report)) for piece in users.pieces(_PAIRS)])


def _vectors(recommender: Recommender, users: Users | None, begin: int, end: int, tokens: int, report: Report) -> pl.DataFrame:
    """The vectors of users begin:end, or of items begin:end if there are no users."""
    if users is None:
        ids = recommender.item_ids[begin:end].rename("item")
        return pl.DataFrame([ids, pl.Series("vector", recommender.vectors_of(slice(begin, end)))])
    users = users.part(begin, end)
    return pl.DataFrame([users.ids.rename("user"), pl.Series("vector", recommender.history_vectors(users, tokens, report))])


def _check_rows(config: Config, catalogue: Catalogue, request: ScoreRequest) -> None:
    """Raises InputError if the added items are too long for the model's rows."""
    longest = int(catalogue.item_lengths.max())
    needed, what = (
        (longest, "the longest item") if config.item_level else (catalogue.frame_tokens + 2 * longest, "two of the longest items")
    )
    if needed > config.data.row_tokens:
        row_tokens = f"config.data.row_tokens = {config.data.row_tokens}"
        raise InputError(f"{request.items}: {needed} tokens are needed for {what}, but {row_tokens}")


# ---- the scorer: a checkpoint of the model, or a baseline


@dataclasses.dataclass(frozen=True)
class _Scorer:
    name: str  # printed
    identity: dict  # fields of request.json: which scorer this is
    state: dict  # JSON values that the scores depend on, too
    load: Callable[[], Recommender | CountedLists]


def _model(workdir: Path, config: Config, request: ScoreRequest, stored: Stored) -> _Scorer:
    checkpoints = Checkpoints(workdir, config.train.keep, config.selection, read_only=True)
    model, mesh = model_of(config, stored), serving_mesh(config)
    with jax.set_mesh(mesh):  # first, because another checkpoint replaces a damaged one, and the request depends on it
        step, params = restore(checkpoints, request.step, config, model, mesh)

    fusion, identity, state, name = fusion_of(workdir, config, stored, step), {"step": step}, checkpoints.progress(step), f"step {step:,}"
    if fusion:
        record = {"baseline": config.eval.fusion, "weight": fusion.weight}
        identity, name = identity | {"fusion": record}, f"{name} with fusion"
        state = state | {"fusion": fusion.settings}

    def load() -> Recommender:
        with jax.set_mesh(mesh):
            tower_XD = tower_of(workdir, config, stored, model, params, mesh)
        return Recommender(config, stored, model, params, mesh, step, tower_XD, fusion)

    return _Scorer(name, identity, state, load)


def _baseline(workdir: Path, config: Config, request: ScoreRequest, stored: Stored) -> _Scorer:
    lists = CountedLists(request.baseline, workdir, config, stored)
    return _Scorer(lists.description, {"baseline": request.baseline}, lists.record["settings"], lambda: lists)


# ---- the output folder


def _identity(workdir: Path, config: Config, request: ScoreRequest, scorer: _Scorer) -> dict:
    """Everything that the parts depend on, apart from rounding: the content of request.json."""
    fields = flatten(dataclasses.asdict(config))
    run = json.dumps([run_fields(fields), data_facts(workdir), scorer.state], sort_keys=True, default=str)
    identity = {"run": hashlib.sha256(run.encode()).hexdigest(), **scorer.identity}
    for name in ("users", "items", "candidates"):
        if path := getattr(request, name):
            with open(path, "rb") as file:
                identity[name] = hashlib.file_digest(file, "sha256").hexdigest()
    identity |= {"top_k": request.top_k or (None if request.candidates else _DEFAULT_K), "vectors": request.vectors}
    names = [f"eval.{name}" for name in ("ranking", "length_normalized", "filter_seen", "chunk_items", "item_states_gib")]
    return identity | {name: fields[name] for name in (*names, "score.part_users", "score.batch_rows")}


def _claim(output: Path, identity: dict) -> None:
    """Creates the folder for this request. Raises InputError if the folder belongs to another request, or cannot be written."""
    path = output / _REQUEST
    try:
        if not path.exists():
            make_folder(output)
            write_atomically(path, lambda temporary: temporary.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8"))
            return
        saved = dict(json.loads(path.read_text(encoding="utf-8")))
        differing = sorted(name for name in identity.keys() | saved.keys() if identity.get(name) != saved.get(name))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read or written ({error})") from error
    if differing:
        raise InputError(f"{output} contains the scores of another request ({', '.join(differing)} differ); choose another --output")

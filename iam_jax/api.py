"""Runs as functions: train, evaluate, compare. The command line (`iam_jax/main.py`) is built on them.

Heavy imports happen inside the functions, after the cheap checks.
"""

import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_collections

from iam_jax import config_files
from iam_jax.config import CONFIG_FILE, Config, flatten, get_config, override, resolve, to_json
from iam_jax.devices import distributed
from iam_jax.devices.signals import Signals
from iam_jax.errors import InputError
from iam_jax.registry import SOURCES
from iam_jax.runs.workdir import check_workdir, lock_workdir, open_workdir
from iam_jax.storage.files import to_path, write_atomically

if TYPE_CHECKING:
    from iam_jax.model import Params
    from iam_jax.ranking.evaluate import Evaluator
    from iam_jax.runs.checkpoint import Checkpoints
    from iam_jax.training.run import Run

AnyConfig = str | Path | ml_collections.ConfigDict | Config


def train(config: AnyConfig, workdir: str | Path, overrides: Mapping[str, Any] | None = None) -> dict:
    """Trains a run, or continues it where its newest checkpoint is, then evaluates its best checkpoint.

    Args:
      config: path of a config file, name of one of the project's (`"demo"`), with `:variant` where it has variants; or a `ConfigDict`
        that starts from `default_config()`; or a `Config`.
      workdir: the run's folder: a local path, gs:// or s3://. It is made, or continued if the same config made it.
      overrides: fields by dotted name, `{"train.steps": 200}`.

    Returns:
      The evaluation, as in the folder's `evaluation.json`: `{"results": {"model": {"test": {"ndcg@10": …}}}, …}`.

    Raises:
      InputError: bad data, config or folder.
      NonFiniteError: more steps with a non-finite loss or gradient than `train.skip_limit`.
      KeyboardInterrupt: Ctrl-C or SIGTERM, with everything saved; the same call continues.
    """
    with _own_signals() as signals:
        return train_run(_resolved(config, overrides), to_path(str(workdir)), signals)


def evaluate(workdir: str | Path, step: str | int = "best", overrides: Mapping[str, Any] | None = None) -> dict:
    """Evaluates a checkpoint of a run and writes `evaluation.json`, `ranks.parquet` and `baselines.parquet` into its folder.

    Args:
      workdir: the folder of a trained run. Its data must still be where its config says, or where `overrides` says (`data.path`).
      step: "best" by validation, "last", or the number of a step.
      overrides: fields that may change between two runs of one folder, by dotted name: `{"eval.filter_seen": False}`.

    Returns:
      The evaluation, as `train` does.

    Raises:
      InputError: no run there, no such checkpoint, other data than the run's.
    """
    folder = to_path(str(workdir))
    with _own_signals() as signals:
        return evaluate_run(_resolved(get_config(str(folder)), overrides), folder, str(step), signals)


def compare(runs: Sequence[str | Path]) -> "Comparison":
    """Compares evaluated runs: the first with every other, by paired differences with intervals.

    Args:
      runs: working folders; their runs must share data, split and protocol.

    Raises:
      InputError: fewer than two folders, a folder without an evaluation, runs that cannot be compared.
      TypeError: not a list of folders.
    """
    from iam_jax.runs import compare as compare_lib

    if isinstance(runs, str | Path):
        raise TypeError(f"runs is {str(runs)!r}: give a list of working folders")

    comparison = compare_lib.collect(compare_lib.named([str(run) for run in runs]))
    return Comparison(comparison)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The comparison of several runs; `str(comparison)` is its table.

    Attributes:
      values: everything that was compared, as plain JSON values.
    """

    values: dict

    def __str__(self) -> str:
        from iam_jax.runs import compare as compare_lib

        return compare_lib.format_text(self.values)

    def write(self, folder: str | Path) -> None:
        """Writes `comparison.txt`, `comparison.md` and `comparison.json` into a folder."""
        from iam_jax.runs import compare as compare_lib

        compare_lib.write(self.values, to_path(str(folder)))


# ---- the same with resolved configs and a job's signals, as the command line calls it


def train_run(
    config: Config, workdir: Path, signals: Signals, flags: Mapping[str, object] | None = None, start: float | None = None
) -> dict:
    """See `train`. flags: what must be the same in all processes of a job, besides the config; start: `time.time()` at the start of the
    program, to be reported."""
    from iam_jax.training.loop import train as train_loop

    with opened(config, workdir, signals, create=True, flags=flags, start=start) as session:
        checkpoints = train_loop(session.run, workdir, session.evaluator, signals)
        return session.evaluate(checkpoints, "best")


def evaluate_run(
    config: Config, workdir: Path, step: str, signals: Signals, flags: Mapping[str, object] | None = None, start: float | None = None
) -> dict:
    """See `evaluate` and `train_run`."""
    with opened(config, workdir, signals, flags=flags, start=start) as session:
        return session.evaluate(session.checkpoints(), step)


def export_run(
    config: Config, workdir: Path, step: str, output: Path, form: str, signals: Signals, start: float | None = None
) -> list[str]:
    """Writes a checkpoint as a folder for others, and returns notes for the user. form: "huggingface" or "stablehlo". Raises InputError for
    a model or a folder that cannot be exported."""
    from iam_jax.model.pretrained import check_output

    alone = form == "stablehlo"
    if not (alone or config.model.pretrained):
        raise InputError("--mode=export makes a Hugging Face folder: it needs a model that began as one (config.model.pretrained)")
    check_output(output)
    if alone:
        from iam_jax.serving import artefact

        artefact.check(config)
    with opened(config, workdir, signals, start=start) as session:
        found, params, _ = session.restored(session.checkpoints(), step)
        if alone:
            notes = artefact.export(session.evaluator.ranker, params, session.run.prepared, found, output)
        else:
            from iam_jax.model import pretrained
            from iam_jax.model.lora import merge

            config = session.run.config
            notes = pretrained.export(config, merge(params, config.model.lora), output)
    return [*notes, f"wrote {output}, from step {found:,}"]


@dataclasses.dataclass(frozen=True)
class Session:
    """A working folder with its data and its model, opened for training, evaluation or export."""

    run: "Run"
    evaluator: "Evaluator"
    workdir: Path
    signals: Signals

    def checkpoints(self) -> "Checkpoints":
        """The folder's checkpoints, to be read."""
        from iam_jax.runs.checkpoint import Checkpoints

        config = self.run.config
        return Checkpoints(self.workdir, config.train.keep, config.selection, read_only=True)

    def restored(self, checkpoints: "Checkpoints", step: str) -> tuple[int, "Params", dict]:
        """The step that "best", "last" or a number names, all parameters, and what the run cost. Closes the checkpoints."""
        from iam_jax.model.parameters import join

        found, params = checkpoints.load_params(step, self.run.abstract_trained)
        params, cost = join(params, self.run.frozen), self.run.cost(checkpoints.last_progress())
        checkpoints.close()
        return found, params, cost

    def evaluate(self, checkpoints: "Checkpoints", step: str) -> dict:
        """Evaluates a checkpoint and writes the files of the evaluation."""
        from iam_jax.ranking.evaluate import evaluate_all

        found, params, cost = self.restored(checkpoints, step)
        data = self.run.config.data
        oracle = SOURCES[data.source].oracle(data)
        evaluation = evaluate_all(self.evaluator, params, found, self.workdir, oracle, self.signals.poll)
        with distributed.fail_together(self.signals):
            if distributed.is_first():
                write_atomically(self.workdir / "run.json", lambda path: path.write_text(json.dumps(cost, indent=2) + "\n"))
        print(f"wrote {self.workdir / 'evaluation.json'}")
        return evaluation


@contextlib.contextmanager
def opened(
    config: Config,
    workdir: Path,
    signals: Signals,
    *,
    create: bool = False,
    flags: Mapping[str, object] | None = None,
    start: float | None = None,
) -> Iterator[Session]:
    """Reads the data, checks the folder (or makes it, with `create`), builds the model, and sets its mesh. With `create` the folder is
    locked meanwhile. Raises InputError before anything is written."""
    start = time.time() if start is None else start
    if not create and not (workdir / CONFIG_FILE).exists():
        raise InputError(f"{workdir}: no run there")
    vocabulary = fingerprint = None
    if config.model.pretrained:
        from iam_jax.model import pretrained

        config = pretrained.configure(config)
        vocabulary, fingerprint = pretrained.vocabulary(config), pretrained.fingerprint(config)
    check_workdir(workdir, config)

    from iam_jax.data.prepare import prepare

    prepared = prepare(config.data, vocabulary)
    for note in prepared.split.notes:
        print(note)
    print(f"split {prepared.split.sha256}")
    if prepared.catalogue.truncated:
        print(f"{prepared.catalogue.truncated:,} items have more than {config.data.item_tokens} text tokens and are truncated")
    print(f"data ready in {time.time() - start:.1f} s", flush=True)
    facts = {"--workdir": str(workdir), **(flags or {}), "split_sha256": prepared.split.sha256, "pretrained_sha256": fingerprint}
    distributed.agree(_shared_facts(config) | facts, signals)

    import jax

    from iam_jax.ranking.evaluate import Evaluator
    from iam_jax.training.run import make_run

    run = make_run(config, prepared)
    lock: contextlib.AbstractContextManager = contextlib.nullcontext()
    with distributed.fail_together(signals), signals.deferred():  # a folder with a part of its files would be refused afterwards
        if distributed.is_first():
            lock = lock_workdir(workdir) if create else lock
            open_workdir(workdir, config, prepared, fingerprint, create=create)
    with distributed.fail_together(signals):
        if not distributed.is_first():
            open_workdir(workdir, config, prepared, fingerprint, shared=True)
    signals.poll()
    with lock, jax.set_mesh(run.mesh):
        yield Session(run, Evaluator(run.model, config, prepared, run.mesh), workdir, signals)


def _shared_facts(config: Config) -> dict[str, object]:
    """What must be the same in all processes of a job: the config without the fields that belong to one host, and the version of JAX."""
    import jax

    own = "data.path", "data.cache", "model.pretrained", "log."
    fields = flatten(json.loads(to_json(config)))
    facts: dict[str, object] = {f"config.{name}": value for name, value in fields.items() if not name.startswith(own)}
    return facts | {"the version of JAX": jax.__version__}


def _resolved(config: AnyConfig, overrides: Mapping[str, Any] | None) -> Config:
    """Raises InputError for a file that is no config, an unknown field and a value out of range; TypeError for anything else."""
    if isinstance(config, str | Path):
        config = config_files.load(str(config))
    elif isinstance(config, Config):
        config = ml_collections.ConfigDict(dataclasses.asdict(config))
    elif not isinstance(config, ml_collections.ConfigDict):
        raise TypeError(f"config is a {type(config).__name__}: give the path or name of a config file, a ConfigDict or a Config")
    return resolve(override(config, overrides))


@contextlib.contextmanager
def _own_signals() -> Iterator[Signals]:
    """Signals that save a run's state while the call lasts, where Python allows handlers: in the main thread."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signals.install()
    try:
        yield signals
    finally:
        for number, handler in before.items():
            if handler is not None:  # a handler that was not installed from Python cannot be installed again
                signal.signal(number, handler)

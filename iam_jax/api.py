"""Runs as functions: train, evaluate, compare. The command line (`iam_jax/main.py`) calls them, too.

The functions import the heavy libraries themselves, after the cheap checks.
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
from iam_jax.devices.memory import keep_freed_memory
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
    """Trains a run, or continues it from its newest checkpoint, and then evaluates its best checkpoint.

    Args:
      config: the path of a config file, or the name of one of the project's (`"demo"`), with `:variant` if it has variants; or a
        `ConfigDict` that starts from `default_config()`; or a `Config`.
      workdir: the working folder of the run: a local path, gs:// or s3://. It is created if it does not exist.
      overrides: values of single fields by dotted name: `{"train.steps": 200}`.

    Returns:
      The evaluation, as in the folder's `evaluation.json`: `{"results": {"model": {"test": {"ndcg@10": …}}}, …}`.

    Raises:
      InputError: if the data or the config is invalid, or the folder belongs to a run with another config.
      NonFiniteError: if more steps than `train.skip_limit` have a non-finite loss or gradient.
      KeyboardInterrupt: after Ctrl-C or SIGTERM. Everything is saved, and the same call continues the run.
      TypeError: if config is of another type.
    """
    with _own_signals() as signals:
        return train_run(_resolved(config, overrides), to_path(str(workdir)), signals)


def evaluate(workdir: str | Path, step: str | int = "best", overrides: Mapping[str, Any] | None = None) -> dict:
    """Evaluates a checkpoint of a run and writes `evaluation.json`, `ranks.parquet` and `baselines.parquet` to its folder.

    Args:
      workdir: the working folder of a trained run. Evaluation needs the run's data; if they have moved, override `data.path`.
      step: "best" (by validation), "last", or a step number.
      overrides: values of single fields by dotted name: `{"eval.filter_seen": False}`. Fields that change the model or the data cannot be
        overridden.

    Returns:
      The evaluation, as `train` returns it.

    Raises:
      InputError: if the folder has no run or no such checkpoint, or if the data are not the run's.
    """
    folder = to_path(str(workdir))
    with _own_signals() as signals:
        return evaluate_run(_resolved(get_config(str(folder)), overrides), folder, str(step), signals)


def compare(runs: Sequence[str | Path]) -> "Comparison":
    """Compares the first of several evaluated runs with every other, by paired differences with confidence intervals.

    Args:
      runs: working folders. Their runs must have the same data, split and protocol.

    Raises:
      InputError: if there are fewer than two folders, if a folder has no evaluation, or if the runs cannot be compared.
      TypeError: if `runs` is not a list of folders.
    """
    from iam_jax.runs import compare as compare_lib

    if isinstance(runs, str | Path):
        raise TypeError(f"runs is {str(runs)!r}: give a list of working folders")

    comparison = compare_lib.collect(compare_lib.named([str(run) for run in runs]))
    return Comparison(comparison)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The comparison of several runs. `str(comparison)` is its table.

    Attributes:
      values: all compared values, as JSON values.
    """

    values: dict

    def __str__(self) -> str:
        from iam_jax.runs import compare as compare_lib

        return compare_lib.format_text(self.values)

    def write(self, folder: str | Path) -> None:
        """Writes `comparison.txt`, `comparison.md` and `comparison.json` to a folder, which is created if it does not exist."""
        from iam_jax.runs import compare as compare_lib

        compare_lib.write(self.values, to_path(str(folder)))


# ---- the same for resolved configs and with the job's signal handlers, as the command line needs them


def train_run(
    config: Config, workdir: Path, signals: Signals, flags: Mapping[str, object] | None = None, start: float | None = None
) -> dict:
    """Trains and evaluates a run; see `train`.

    Args:
      config, workdir: as resolved by the caller.
      signals: this process's signal handlers.
      flags: names and values of flags that must be the same in all processes of a job.
      start: `time.time()` at the start of the program. The time until the data are ready is printed.
    """
    from iam_jax.training.loop import train as train_loop

    with opened(config, workdir, signals, create=True, flags=flags, start=start) as session:
        checkpoints = train_loop(session.run, workdir, session.evaluator, signals)
        return session.evaluate(checkpoints, "best")


def evaluate_run(
    config: Config, workdir: Path, step: str, signals: Signals, flags: Mapping[str, object] | None = None, start: float | None = None
) -> dict:
    """Evaluates a checkpoint of a run; see `evaluate`, and `train_run` for the arguments."""
    with opened(config, workdir, signals, flags=flags, start=start) as session:
        return session.evaluate(session.checkpoints(), step)


def export_run(
    config: Config, workdir: Path, step: str, output: Path, form: str, signals: Signals, start: float | None = None
) -> list[str]:
    """Writes a checkpoint as a folder for other programs, and returns notes for the user.

    Args:
      config, workdir, signals, start: as in `train_run`.
      step: "best", "last", or a step number.
      output: the folder, which must be empty or not exist.
      form: "huggingface" or "stablehlo".

    Raises:
      InputError: if the model cannot be exported in this form, or the folder cannot be written.
    """
    from iam_jax.model.pretrained import check_output

    if config.eval.fusion:
        raise InputError(
            f"--mode=export exports the model alone, without counts: config.eval.fusion = {config.eval.fusion!r} must be empty"
        )
    if form != "stablehlo" and not config.model.pretrained:
        raise InputError("--format=huggingface exports pretrained models only: config.model.pretrained is empty")
    check_output(output)
    if form == "stablehlo":
        from iam_jax.serving import artefact

        artefact.check(config)
    with opened(config, workdir, signals, start=start) as session:
        number, params, _ = session.restored(session.checkpoints(), step)
        if form == "stablehlo":
            from iam_jax.serving import artefact

            notes = artefact.export(session.evaluator.ranker, params, session.run.prepared, number, output)
        else:
            from iam_jax.model import pretrained
            from iam_jax.model.lora import merge

            config = session.run.config
            notes = pretrained.export(config, merge(params, config.model.lora), output)
    return [*notes, f"wrote {output}, from step {number:,}"]


@dataclasses.dataclass(frozen=True)
class Session:
    """An open working folder, with its data and its model, for training, evaluation or export."""

    run: "Run"
    evaluator: "Evaluator"
    workdir: Path
    signals: Signals

    def checkpoints(self) -> "Checkpoints":
        """Returns the folder's checkpoints, read-only."""
        from iam_jax.runs.checkpoint import Checkpoints

        config = self.run.config
        return Checkpoints(self.workdir, config.train.keep, config.selection, read_only=True)

    def restored(self, checkpoints: "Checkpoints", step: str) -> tuple[int, "Params", dict]:
        """Restores a checkpoint and closes the checkpoints. step: "best", "last", or a step number.

        Returns the step number, all parameters, and the cost of the run (the content of run.json).
        """
        from iam_jax.model.parameters import join

        number, params = checkpoints.load_params(step, self.run.abstract_trained)
        params, cost = join(params, self.run.frozen), self.run.cost(checkpoints.last_progress())
        checkpoints.close()
        return number, params, cost

    def evaluate(self, checkpoints: "Checkpoints", step: str) -> dict:
        """Evaluates a checkpoint, writes the files of the evaluation and returns the content of evaluation.json."""
        from iam_jax.ranking.evaluate import evaluate_all

        number, params, cost = self.restored(checkpoints, step)
        data = self.run.config.data
        oracle = SOURCES[data.source].oracle(data)
        evaluation = evaluate_all(self.evaluator, params, number, self.workdir, oracle, self.signals.poll)
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
    """Opens a working folder: checks it, reads the data, builds the model and sets its mesh.

    Args:
      config, workdir, signals, flags, start: as in `train_run`.
      create: creates the folder if it does not exist, and locks it until the end of the block.

    Raises:
      InputError: if the data, the config or the folder is invalid. Nothing is written then.
    """
    keep_freed_memory()
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
    facts["vectors_sha256"] = None if prepared.content is None else prepared.content.sha256
    distributed.agree(_shared_facts(config) | facts, signals)

    import jax

    from iam_jax.data.cache import cache_root
    from iam_jax.ranking.evaluate import Evaluator
    from iam_jax.ranking.tower import tower_states
    from iam_jax.training.run import make_run

    run = make_run(config, prepared)
    with contextlib.ExitStack() as stack:
        with distributed.fail_together(signals), signals.deferred():  # an incomplete folder would be refused later
            if distributed.is_first():
                if create:
                    stack.enter_context(lock_workdir(workdir))
                open_workdir(workdir, config, prepared, fingerprint, create=create)
        with distributed.fail_together(signals):
            if not distributed.is_first():
                open_workdir(workdir, config, prepared, fingerprint, shared=True)
        signals.poll()
        stack.enter_context(jax.set_mesh(run.mesh))
        if config.constant_tower:
            cache, model, mesh = cache_root(config.data.cache), run.model, run.mesh
            assert fingerprint is not None
            run = run.with_tower(
                tower_states(config, prepared.catalogue, model, mesh, lambda: run.frozen, fingerprint, cache, signals.poll)
            )
        yield Session(run, Evaluator(run.model, config, prepared, run.mesh, run.items.catalogue.tower_XD), workdir, signals)


def _shared_facts(config: Config) -> dict[str, object]:
    """Returns what must be the same in all processes of a job: the config, except for the fields of the own host, and the JAX version."""
    import jax

    host_fields = "data.path", "data.cache", "data.vectors", "model.pretrained", "log."
    fields = flatten(json.loads(to_json(config)))
    facts: dict[str, object] = {f"config.{name}": value for name, value in fields.items() if not name.startswith(host_fields)}
    return facts | {"the version of JAX": jax.__version__}


def _resolved(config: AnyConfig, overrides: Mapping[str, Any] | None) -> Config:
    """Returns the checked config. Raises what `train` raises for its config and overrides."""
    if isinstance(config, str | Path):
        config = config_files.load(str(config))
    elif isinstance(config, Config):
        config = ml_collections.ConfigDict(dataclasses.asdict(config))
    elif not isinstance(config, ml_collections.ConfigDict):
        raise TypeError(f"config must be the path or the name of a config file, a ConfigDict or a Config, not {type(config).__name__}")
    return resolve(override(config, overrides))


@contextlib.contextmanager
def _own_signals() -> Iterator[Signals]:
    """Installs signal handlers that stop a run with everything saved, and removes them at the end of the block.

    Outside the main thread, where Python does not allow handlers, it installs none.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signals.install()
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            if handler is not None:  # a handler that was not installed from Python cannot be installed again
                signal.signal(number, handler)

"""Checkpoints by Orbax: parameters, optimizer state, and the run's progress with its data position.

They are written in the background, during training. They are read without barriers, so that the processes of a job can agree on which of
them cannot be read.
"""

import contextlib
import functools
import gc
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from iam_jax.errors import DamagedError, InputError, os_error_reason, quote_first
from iam_jax.storage import remote as storage
from iam_jax.storage.files import write_atomically

_PROGRESS, _METRICS = "progress/metadata", "metrics/metrics"  # the paths of the two JSON items of a step in Orbax
_UNFINISHED = ".orbax-checkpoint-tmp"  # part of the names of unfinished checkpoints
_ASIDE = ".damaged"

T = TypeVar("T")


class Checkpoints:
    """The checkpoints of a working folder: the newest few and the best one by a validation metric.

    A checkpoint appears under its step when it is complete. A damaged one is reported and skipped. In training it is also set aside, as
    `STEP.damaged`.
    """

    def __init__(self, workdir: Path, keep: int, metric: str, read_only: bool = False):
        folder, self.metric = workdir / "checkpoints", metric
        self.folder = storage.patch_orbax_for_s3(folder) if storage.is_remote(folder) else folder.absolute()
        for name in ("absl", "asyncio"):  # Orbax logs every step of a save, and every error twice
            logging.getLogger(name).setLevel(logging.CRITICAL)
        _forget_closed_loops()
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is not a folder")
        if read_only and not self.folder.is_dir():
            raise InputError(f"{workdir}: no checkpoints there; train first")
        self._damaged: dict[int, str] = {}  # step -> reason
        self._unreported: list[str] = []  # reasons that are not printed yet
        self._metrics: dict[int, dict] = {}  # of the steps with a validation
        self._saving = -1  # the step of the save that started last
        self._manager: Any = None  # an ocp.CheckpointManager; None if nothing is written
        with self._as_input_error("cannot be read"):
            self._look()
            if not read_only:
                self._report_unfinished()
                self._manager = self._make_manager(keep)

    def _look(self) -> None:
        """Finds the steps and reads their metrics."""
        found = ocp.path.step.standard_name_format().find_all(epath.Path(self.folder)) if self.folder.is_dir() else ()
        self._steps = {found.step for found in found}
        for step in self._steps:
            try:
                if (self.folder / str(step) / _METRICS).exists():
                    self._metrics[step] = self._read_json(step, _METRICS)
            except DamagedError as error:
                self._damaged[step] = str(error)
                self._unreported.append(str(error))

    def _report_unfinished(self) -> None:
        """Prints which saves were interrupted, before the manager removes what they left. Object storage does not show them."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() and not storage.is_remote(self.folder) else []
        left = sorted({int(step) for step, mark, _ in (name.partition(_UNFINISHED) for name in names) if mark and step.isdecimal()})
        if left and jax.process_index() == 0:
            print(f"{self.folder}: a save was interrupted, its unfinished checkpoint of step {quote_first(left)} is removed", flush=True)

    def _make_manager(self, keep: int) -> ocp.CheckpointManager:
        quality: Any = self._quality  # Orbax sorts by it, and declares a float
        best = preservation_policy.BestN(get_metric_fn=quality, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(keep), best]),
            best_fn=quality,
            cleanup_tmp_directories=True,  # left by interrupted saves
            lightweight_initialize=bool(self._damaged),  # otherwise it reads all metrics, also damaged ones
        )
        return ocp.CheckpointManager(self.folder, options=options, item_names=("params", "rest", "progress"))

    # ---- writing

    def save(self, step: int, state: dict, progress: dict, metrics: dict | None) -> None:
        """Starts to write. `state` may be changed or donated as soon as this returns. An error of the previous save is raised here.

        If the step is already saved, only progress and metrics are written: its state is the same.

        state: a dict with `params`. Its other parts are stored separately, so that evaluation and scoring only read the parameters.
        metrics: of the validation at this step; None without one.
        """
        self.wait()
        metrics = None if metrics is None else {**metrics, "step": step}
        rest = {name: value for name, value in state.items() if name != "params"}
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state["params"]),
            rest=ocp.args.StandardSave(rest),
            progress=ocp.args.JsonSave(progress),
        )
        self._saving = step
        with self._as_input_error("cannot be saved"):
            if step in self._steps:
                self._amend(step, progress, metrics)
            else:
                self._manager.save(step, args=args, metrics=metrics, force=True)
        self._metrics |= {} if metrics is None else {step: metrics}
        self._steps = set(self._manager.all_steps())

    def _amend(self, step: int, progress: dict, metrics: dict | None) -> None:
        """Adds progress and metrics to a saved step. If the process is killed meanwhile, the step is still a complete checkpoint: without
        metrics, or with metrics whose validation will be repeated, because progress is written last."""
        if jax.process_index() == 0:
            for name, value in ((_METRICS, metrics), (_PROGRESS, progress)):
                if value is not None:
                    path = self.folder / str(step) / name
                    path.parent.mkdir(exist_ok=True)
                    write_atomically(path, lambda path, value=value: path.write_text(json.dumps(value)))
        multihost_utils.sync_global_devices("checkpoint amended")
        self._manager.reload()

    def wait(self) -> None:
        """Waits until the last save is complete. Raises InputError if it could not be written."""
        if self._manager is not None:
            try:
                with self._as_input_error("cannot be saved"):
                    self._manager.wait_until_finished()
            finally:
                self._steps = set(self._manager.all_steps())

    def close(self) -> None:
        if self._manager is not None:
            with self._as_input_error("cannot be saved"):
                self._manager.close()

    @contextlib.contextmanager
    def _as_input_error(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if (reason := os_error_reason(error)) is None:
                raise
            where = f"{self.folder}/{self._saving}" if self._saving >= 0 else self.folder
            raise InputError(f"{where} {what}: {reason}") from error

    # ---- steps

    def _quality(self, metrics: dict) -> tuple[float, int]:
        """Orders checkpoints from worst to best. The first one of equals is the best."""
        if self.metric not in metrics:
            raise InputError(f"config.eval.metric = {self.metric!r} was not measured when {self.folder} was written: {', '.join(metrics)}")
        return metrics[self.metric], -metrics["step"]

    def steps(self) -> list[int]:
        """The steps that are not known to be damaged."""
        return sorted(self._steps - self._damaged.keys())

    def resolve(self, step: str) -> int:
        """The step of "best", "last" or a number. Raises InputError if there is none."""
        return self._named(step)[0]

    def _named(self, step: str) -> list[int]:
        """The step of a name, followed by the steps to use if it cannot be read."""
        steps = self.steps()
        if not steps and not self._damaged:
            raise InputError(f"{self.folder}: no complete checkpoint")
        if not steps:
            raise InputError(self._none_readable())
        newest = steps[::-1]
        if step == "last":
            return newest
        if step == "best":
            measured = sorted((n for n in newest if n in self._metrics), key=lambda n: self._quality(self._metrics[n]), reverse=True)
            return measured + [n for n in newest if n not in self._metrics]
        if step.isdecimal() and int(step) in self._damaged:
            raise InputError(self._damaged[int(step)])
        if not step.isdecimal() or int(step) not in steps:
            raise InputError(f"--step={step}: {self.folder} has {', '.join(map(str, steps))} (or best, last)")
        return [int(step)]

    def best(self) -> tuple[int, float] | None:
        """The best step and its validation metric; None without a validation. Raises InputError if the metric was not measured."""
        measured = self._metrics.keys() & set(self.steps())
        if not measured:
            return None
        step = max(measured, key=lambda n: self._quality(self._metrics[n]))
        return step, self._metrics[step][self.metric]

    # ---- reading

    def progress(self, step: int) -> dict:
        return self._read_json(step, _PROGRESS)

    def last_progress(self) -> dict:
        return self._first_readable("last", self.progress)[1]

    def load_params(self, step: str, abstract: dict) -> tuple[int, dict]:
        """The step of "best", "last" or a number, and its parameters in the types and shardings of `abstract`.

        If the best or last step is damaged, it is the next best or the previous one. Raises InputError if none can be read.
        """
        return self._first_readable(step, lambda step: self.restore_params(step, abstract))

    def load(self, abstract: dict) -> tuple[int, dict, dict] | None:
        """The newest readable step with its state and progress, to continue training. None if nothing was ever saved.

        Newer steps, which are damaged, are set aside, so that they can be saved again. Raises InputError if no step can be read.
        """
        if not self._steps:
            there = self.folder.iterdir() if self.folder.is_dir() else ()  # object storage has no empty folders
            if aside := sorted(path.name for path in there if path.name.endswith(_ASIDE)):
                raise InputError(f"{self.folder}: all checkpoints are damaged; they were set aside as {quote_first(aside)}")
            return None
        step, (state, progress) = self._first_readable("last", lambda step: (self.restore(step, abstract), self.progress(step)))
        if self._damaged:
            if jax.process_index() == 0:
                for damaged in self._damaged:
                    aside = epath.Path(self.folder / f"{damaged}{_ASIDE}")
                    if aside.exists():
                        aside.rmtree()
                    epath.Path(self.folder / str(damaged)).rename(aside)
            multihost_utils.sync_global_devices("damaged checkpoints set aside")
            self._damaged = {}
            self._manager.reload()
            self._steps = set(self._manager.all_steps())
        return step, state, progress

    def restore_params(self, step: int, abstract: dict) -> dict:
        """The parameters saved at `step`, in the types and shardings of `abstract`. Raises InputError if their shapes differ,
        DamagedError if they cannot be read."""
        return self._restore(step, "params", abstract)

    def restore(self, step: int, abstract: dict) -> dict:
        """The whole state saved at `step`."""
        rest = {name: value for name, value in abstract.items() if name != "params"}
        return {"params": self._restore(step, "params", abstract["params"]), **self._restore(step, "rest", rest)}

    def _first_readable(self, step: str, read: Callable[[int], T]) -> tuple[int, T]:
        for candidate in self._named(step):
            result: Any = None
            error = None
            try:
                result = read(candidate)
            except DamagedError as caught:
                error = caught
            if not _anywhere(error is not None):
                if self._unreported and not jax.process_index():
                    print(f"{'; '.join(self._unreported)}; using step {candidate:,}", flush=True)
                self._unreported = []
                return candidate, result
            self._damaged[candidate] = str(error or f"{self.folder}/{candidate} is damaged: another process cannot read it")
            self._unreported.append(self._damaged[candidate])
        raise InputError(self._damaged[int(step)] if step.isdecimal() else self._none_readable())

    def _none_readable(self) -> str:
        return f"{self.folder}: no checkpoint can be read: {'; '.join(self._damaged[step] for step in sorted(self._damaged, reverse=True))}"

    def _read_json(self, step: int, name: str) -> dict:
        try:
            return dict(json.loads((self.folder / str(step) / name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise self._damage(step, name, error) from error

    def _restore(self, step: int, item: str, abstract: dict) -> dict:
        path = epath.Path(self.folder / str(step) / item)
        handler = ocp.StandardCheckpointHandler()
        here, there = _shapes(abstract), self._reading(step, item, lambda: _shapes(handler.metadata(path)))
        differing = [
            f"{name} is {there.get(name, 'absent')} there, {here.get(name, 'absent')} here"
            for name in sorted(there.keys() | here.keys())
            if there.get(name) != here.get(name)
        ]
        if differing:
            raise InputError(f"{self.folder}/{step}: does not fit the config's model: {quote_first(differing)}")
        return self._reading(step, item, lambda: handler.restore(path, args=ocp.args.StandardRestore(abstract)))

    def _reading(self, step: int, item: str, read: Callable[[], T]) -> T:
        with _quiet():
            try:
                return read()
            except jax.errors.JaxRuntimeError:  # from the devices' memory, not from the files
                raise
            except Exception as error:  # of any type: tensorstore raises ValueError, Orbax sometimes Exception itself
                damage = self._damage(step, item, error)
            gc.collect()
        raise damage  # not from the other error, whose frames hold the unfinished reads

    def _damage(self, step: int, name: str, error: BaseException) -> DamagedError:
        while type(error) is Exception and error.__cause__ is not None:
            error = error.__cause__  # Orbax's own error names the array, its cause the reason
        reason = os_error_reason(error) or " ".join(str(error).partition(" [tensorstore_spec=")[0].split())
        return DamagedError(f"{self.folder}/{step} is damaged ({name}: {reason[:160]}{'…' * (len(reason) > 160)})")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the messages of other reads that are unfinished when one fails."""
    hooks = sys.excepthook, sys.unraisablehook
    sys.excepthook = sys.unraisablehook = lambda *_: None
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        sys.excepthook, sys.unraisablehook = hooks


@functools.cache
def _forget_closed_loops() -> None:
    """Suppresses "Event loop is closed": when one of many reads or writes fails, the others end later, and each would report it."""

    def but_closed_loops(hook: Callable, error_of: Callable[..., BaseException | None]) -> Callable:
        return lambda *args: None if "Event loop is closed" in str(error_of(*args)) else hook(*args)

    sys.excepthook = but_closed_loops(sys.excepthook, lambda kind, error, traceback: error)
    sys.unraisablehook = but_closed_loops(sys.unraisablehook, lambda unraisable: unraisable.exc_value)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(x.shape) for path, x in leaves}


def _anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.int32(flag)).any())

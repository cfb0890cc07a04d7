"""Checkpoints by Orbax: parameters, optimizer state, and the run's progress with its data position."""

import logging
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from iam_jax import storage
from iam_jax.errors import InputError, some


class Checkpoints:
    """The checkpoints of a working folder: the newest few and the best by a validation metric. A checkpoint appears under its step only
    when it is complete."""

    def __init__(self, workdir: Path, keep: int, metric: str, read_only: bool = False):
        self.metric, folder = metric, workdir / "checkpoints"
        self.folder = storage.teach_orbax(folder) if storage.is_remote(folder) else folder.absolute()
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every step of a save
        if read_only and not self.folder.is_dir():
            raise InputError(f"{workdir}: no checkpoints there; train first")
        best = preservation_policy.BestN(get_metric_fn=self._quality, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(keep), best]),
            best_fn=self._quality,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=not read_only,  # what an interrupted save left
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("params", "rest", "progress"))

    def save(self, step: int, state: dict, progress: dict, metrics: dict | None) -> None:
        """state: a dict with `params`; what else it holds is stored apart, so that evaluation and scoring read the parameters alone.
        metrics: of the validation at this step, None without one."""
        rest = {name: value for name, value in state.items() if name != "params"}
        if step in self._manager.all_steps():
            self._manager.delete(step)
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state["params"]),
            rest=ocp.args.StandardSave(rest),
            progress=ocp.args.JsonSave(progress),
        )
        metrics = None if metrics is None else {**metrics, "step": step}
        self._manager.save(step, args=args, metrics=metrics, force=True)
        self._manager.wait_until_finished()

    def _quality(self, metrics: dict) -> tuple[float, int]:
        """Orders checkpoints from worst to best; of equals the first is the best."""
        if self.metric not in metrics:
            raise InputError(f"config.eval.metric = {self.metric!r} was not measured when {self.folder} was written: {', '.join(metrics)}")
        return metrics[self.metric], -metrics["step"]

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def resolve(self, step: str) -> int:
        """The step that "best", "last" or a number names. Raises InputError where there is none."""
        steps = self.steps()
        if not steps:
            raise InputError(f"{self.folder}: no complete checkpoint")
        if step == "last":
            return steps[-1]
        if step == "best":
            best = self.best()
            return steps[-1] if best is None else best[0]
        if not step.isdecimal() or int(step) not in steps:
            raise InputError(f"--step={step}: {self.folder} has {', '.join(map(str, steps))} (or best, last)")
        return int(step)

    def best(self) -> tuple[int, float] | None:
        """The best step and its validation metric; None without a validation. Raises InputError where validations lack the metric."""
        step = self._manager.best_step()
        return None if step is None else (step, self._manager.metrics(step)[self.metric])

    def progress(self, step: int) -> dict:
        return self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]

    def restore_params(self, step: int, abstract: dict) -> dict:
        """The parameters saved at `step`, in the types and shardings of `abstract`. Raises InputError where their shapes differ."""
        self._check_shapes(step, abstract)
        return self._restore(step, params=ocp.args.StandardRestore(abstract))["params"]

    def restore(self, step: int, abstract: dict) -> dict:
        """The whole state saved at `step`."""
        self._check_shapes(step, abstract["params"])
        rest = {name: value for name, value in abstract.items() if name != "params"}
        saved = self._restore(step, params=ocp.args.StandardRestore(abstract["params"]), rest=ocp.args.StandardRestore(rest))
        return {"params": saved["params"], **saved["rest"]}

    def _check_shapes(self, step: int, abstract: dict) -> None:
        saved = ocp.StandardCheckpointer().metadata(self.folder / str(step) / "params").item_metadata
        there, here = (
            {jax.tree_util.keystr(path, simple=True, separator="."): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}
            for tree in (saved, abstract)
        )
        differing = [
            f"{name} is {there.get(name, 'absent')} there, {here.get(name, 'absent')} here"
            for name in sorted(there.keys() | here.keys())
            if there.get(name) != here.get(name)
        ]
        if differing:
            raise InputError(f"{self.folder}/{step}: does not fit the config's model: {some(differing)}")

    def _restore(self, step: int, **items):
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InputError(f"{self.folder}/{step}: does not fit the config's model: {str(error).splitlines()[0]}") from error

    def close(self) -> None:
        self._manager.close()

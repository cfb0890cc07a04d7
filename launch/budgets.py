"""Budgets in epochs or minutes, converted into steps by short calibrations."""

import itertools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import commands
import models
import numpy as np
from models import ROUNDING, STRUCTURE, UNITS, VALIDATIONS, Budget, Plan, overrides

CALIBRATION, LINE = 40, 5  # steps per calibration, steps per line of metrics.jsonl
SEED = 0  # of calibrations and trials
FEW = ("--config.eval.test=false", "--config.eval.baselines=false", "--config.eval.resamples=1")  # for runs that only select a setting
# Fields that this launcher sets, beside those of the search spaces. A flag for them would make budgets unequal.
SET_HERE = (
    "train.steps", "train.seed", "train.eval_every", "train.save_every", "train.patience", "train.max_minutes", "optimizer.decay_steps",
    "optimizer.warmup_steps", "eval.test", "eval.metric", "eval.fusion",
)  # fmt: skip


class Measured(NamedTuple):
    """What calibrations measure of a model."""

    seconds: float  # of a step
    epoch: float  # steps (batches) of an epoch
    assumed: bool = False  # in a dry run: not measured

    def minutes(self, steps: float) -> float:
        return steps * self.seconds / 60


def command(
    plan: Plan, data: str, model: str, workdir: Path, setting: dict[str, Any], steps: int, seed: int, trial: bool
) -> tuple[Path, list[str]]:
    """Returns (working folder, flags) of a trial or a run."""
    file, changes = models.config_of(plan, data, model)
    fields = changes | setting | schedule(steps) | {"train.seed": seed}
    more = FEW if trial else (f"--config.eval.fusion={models.FUSION}",)
    return workdir, commands.command(workdir, file, [*overrides(fields), *more, *plan.rest])


def schedule(steps: int) -> dict[str, object]:
    """Returns the fields of a run of this many steps: a tenth of them are warm-up, the learning rate then decays to their end, and there
    are eight validations."""
    every = math.ceil(steps / VALIDATIONS)
    fields = {"train.steps": steps, "optimizer.decay_steps": steps, "optimizer.warmup_steps": steps // 10}
    return fields | {"train.eval_every": every, "train.save_every": every, "train.patience": 0, "train.max_minutes": 0.0}


def calibrations(plan: Plan, data: str, model: str, setting: dict[str, Any]) -> list[tuple[Path, list[str]]]:
    """Returns (working folder, flags) of the short runs that measure the time of a step. Settings of equal structure share them."""
    file, changes = models.config_of(plan, data, model)
    own = models.own_setting(plan, data, model)
    structure = {name: value for name, value in setting.items() if name in STRUCTURE}
    # After the user's flags, so that every command has them but a calibration keeps its length. Its validations are not used.
    last = schedule(CALIBRATION) | {"train.eval_every": CALIBRATION, "train.save_every": CALIBRATION, "train.seed": SEED, "log.every": LINE}
    flags = [*overrides(changes | own | structure), *FEW, *plan.rest, *overrides(last)]
    different = [str(value).replace("*", "x") for name, value in structure.items() if value != own[name]]
    folders = [plan.folder / data / model / "-".join([f"calibration{number}", *different]) for number in range(plan.calibrations)]
    return [(folder, commands.command(folder, file, flags)) for folder in folders]


def measured(plan: Plan, data: str, model: str, setting: dict[str, Any]) -> Measured | None:
    """Returns the steps of an epoch, and the seconds of a step: the smallest median of the calibrations, since other load only adds time.

    Returns None if a calibration is not finished, or if one diverged. In a dry run it assumes what is not measured.
    """
    medians, epoch = [], 0.0
    for workdir, flags in calibrations(plan, data, model, setting):
        if not commands.finished(workdir, flags):
            return Measured(1.0, 100.0, assumed=True) if plan.dry_run else None
        if commands.diverged(workdir):
            return None
        lines = [line for line in read_metrics(workdir) if "tokens_per_second" in line]
        seconds = [
            (line["tokens_seen"] - last["tokens_seen"]) / line["tokens_per_second"] / (line["step"] - last["step"])
            for last, line in itertools.pairwise(lines)
        ]
        medians.append(float(np.median(seconds)))  # without the first line, which includes the compilation
        epoch = lines[-1]["step"] / lines[-1]["epoch"]
    return Measured(min(medians), epoch)


def steps_of(budget: Budget, found: Measured) -> int:
    """Converts a budget into steps, a multiple of 8. Minutes give two significant digits, since a calibration is not more precise."""
    steps = budget.amount * found.epoch if budget.unit == UNITS[0] else float(f"{budget.amount * 60 / found.seconds:.2g}")
    return max(1, round(steps / ROUNDING)) * ROUNDING


def is_equal(budget: Budget, steps: int, found: Measured) -> bool:
    """Whether this many steps are the budget, up to what rounding changes. A run of few steps may differ by a tenth."""
    amount = budget.amount * found.epoch if budget.unit == UNITS[0] else budget.amount * 60 / found.seconds
    digits = 0.0 if budget.unit == UNITS[0] else 0.05 * amount
    return abs(steps - amount) <= min(ROUNDING / 2, amount / 10) + digits + 1e-6


def read_metrics(workdir: Path) -> list[dict]:
    """Returns the lines of metrics.jsonl, without an incomplete one."""
    lines = []
    if (workdir / "metrics.jsonl").exists():
        for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    return lines

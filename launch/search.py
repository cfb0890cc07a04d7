"""The search for a model's setting: the same for every model, on validation alone, and continued after an interruption.

Optuna proposes the settings, prunes bad trials and stores all of them in FOLDER/<data>/<model>/search-<budget>/journal.log. The sampler of
a parameter depends only on the number of the trial, the name of the parameter and the trials before it. So an interrupted search gives the
same trials as an uninterrupted one.
"""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import budgets
import commands
import models
from models import VALIDATIONS, Budget, LogUniform, Plan

from iam_jax.errors import InputError

METRIC = "ndcg@10"
SEED = 0  # of the sampler
RANDOM = 3  # trials before the sampler (TPE) uses the results; the first one is the setting of the config
# A trial is pruned if its best validation so far is below the median of the finished trials' at the same share of the run.
UNPRUNED, PATIENT = 2, 3  # finished trials before the first pruning; validations of a trial before it can be pruned
STUDY, FILE = "search", "journal.log"

# (working folder, flags, watch) -> code: commands.run with what the caller prints
Execute = Callable[[Path, list[str], Callable[[], bool]], int]


class Search:
    """The search of one model on one data set with one budget per trial."""

    def __init__(self, plan: Plan, data: str, model: str, budget: Budget):
        self.plan, self.data, self.model, self.budget = plan, data, model, budget
        self.space: dict[str, Any] = models.MODELS[model].space
        self.folder = plan.folder / data / model / f"search-{budget.name}"

    # ---- running

    def run(self, execute: Execute, calibrate: Callable[[dict], int]) -> int:
        """Runs the trials that are missing. Returns 0, or the exit code of the run that failed or was interrupted.

        execute: runs or continues a command. calibrate: measures a setting whose structure differs from the config's, and returns a code.
        """
        optuna, study = _optuna(), self._open(create=True)
        while True:
            states = study.get_trials(deepcopy=False)
            if sum(trial.state.is_finished() for trial in states) >= self.plan.trials:
                return 0
            running = [trial.number for trial in states if trial.state == optuna.trial.TrialState.RUNNING]
            trial = optuna.Trial(study, self._trial_id(running[0])) if running else study.ask()
            if code := self._finish(study, trial, execute, calibrate):
                return code

    def _finish(self, study: Any, trial: Any, execute: Execute, calibrate: Callable[[dict], int]) -> int:
        """Runs or continues a trial and stores its result. Returns 0, or the code of a run that failed or was interrupted."""
        states = _optuna().trial.TrialState
        setting = {name: self._suggest(study, trial, name) for name in self.space}
        if code := calibrate(setting):
            return code
        found = budgets.measured(self.plan, self.data, self.model, setting)
        if found is None:
            study.tell(trial, state=states.FAIL)
            return 0
        workdir, flags = self.command(trial.number, setting, found)
        if commands.finished(workdir, flags):
            code = commands.code_of(workdir)
        elif self._report(trial, workdir):  # the decision was made before an interruption
            code = commands.ENDED
        else:
            code = execute(workdir, flags, lambda: self._report(trial, workdir))
        if code == 0 and self._report(trial, workdir):  # the run ended before the decision was read
            code = commands.ENDED
        if code not in (0, commands.NON_FINITE, commands.ENDED):
            return code
        trial.set_user_attr("steps", max((line["step"] for line in budgets.read_metrics(workdir)), default=0))
        if code == 0:
            study.tell(trial, self._value(workdir))
        elif code == commands.NON_FINITE:
            study.tell(trial, state=states.FAIL)
        else:
            commands.mark(workdir, flags, commands.PRUNED)
            study.tell(trial, state=states.PRUNED)
        return 0

    def _suggest(self, study: Any, trial: Any, name: str) -> Any:
        sampler = _optuna().samplers.TPESampler
        study.sampler = sampler(n_startup_trials=RANDOM, seed=zlib.crc32(f"{SEED} {trial.number} {name}".encode()))
        values = self.space[name]
        if isinstance(values, LogUniform):
            return float(f"{trial.suggest_float(name, values.low, values.high, log=True):.3g}")
        return trial.suggest_categorical(name, values)

    def _report(self, trial: Any, workdir: Path) -> bool:
        """Reports the validations of the run so far, each once, and returns whether the trial is pruned. The last one cannot prune it."""
        reported = self._reported(trial)
        if reported and max(reported) < VALIDATIONS and trial.should_prune():
            return True
        for number, value in validations(workdir).items():
            if number not in reported:
                trial.report(value, number)
                if number < VALIDATIONS and trial.should_prune():
                    return True
        return False

    def _reported(self, trial: Any) -> dict[int, float]:
        return trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values

    @staticmethod
    def _value(workdir: Path) -> float:
        evaluation = json.loads((workdir / "evaluation.json").read_text(encoding="utf-8"))
        return evaluation["results"]["model"]["validation"][METRIC]

    # ---- storage

    def _open(self, create: bool = False) -> Any:
        """Opens the study. Returns None if there is none and it is not to be created."""
        optuna, path = _optuna(), self.folder / FILE
        if not create and not path.exists():
            return None
        if create:
            _repair(path)
        self._storage = storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
        pruner = optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED, n_warmup_steps=PATIENT)
        if not create and STUDY not in [one.study_name for one in storage.get_all_studies()]:
            return None
        study = optuna.create_study(storage=storage, pruner=pruner, study_name=STUDY, direction="maximize", load_if_exists=True)
        # Lists and tuples are both lists in JSON.
        space, own = json.loads(json.dumps(self.space)), models.own_setting(self.plan, self.data, self.model)
        if create and "space" not in study.user_attrs:
            study.set_user_attr("space", space)
        if study.user_attrs.get("space", space) != space:
            raise InputError(f"{self.folder}: this search was made over another space; choose another --folder")
        if create and not study.get_trials(deepcopy=False):
            study.enqueue_trial(own)
        return study

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._storage.get_study_id_from_name(STUDY), number)

    # ---- results

    def command(self, number: int, setting: dict[str, Any], found: budgets.Measured) -> tuple[Path, list[str]]:
        """Returns (working folder, flags) of a trial."""
        steps = budgets.steps_of(self.budget, found)
        return budgets.command(self.plan, self.data, self.model, self.folder / f"trial{number}", setting, steps, budgets.SEED, trial=True)

    def trials(self) -> list[dict]:
        """Returns the first --trials trials: setting, validations, validation metric (None unless it finished), state and cost.

        Raises InputError if a trial was run with other flags.
        """
        study = self._open()
        if study is None:
            return []
        rows = []
        for trial in study.get_trials(deepcopy=False)[: self.plan.trials]:
            state = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "diverged"}.get(trial.state.name, "unfinished")
            if len(trial.params) < len(self.space):
                continue  # nothing but its number is known
            setting = {
                name: float(f"{value:.3g}") if isinstance(self.space[name], LogUniform) else value
                for name, value in ((name, trial.params[name]) for name in self.space)
            }
            found = budgets.measured(self.plan, self.data, self.model, setting)
            row = {"trial": trial.number, "setting": setting, "state": state, "validations": list(trial.intermediate_values.values())}
            row[f"validation_{METRIC}"] = trial.value if state == "finished" else None
            row["steps"] = trial.user_attrs.get("steps", 0)
            if found and not found.assumed:
                workdir, flags = self.command(trial.number, setting, found)
                commands.finished(workdir, flags)
                planned = budgets.steps_of(self.budget, found)
                row |= {"planned_steps": planned, "equal_budget": budgets.is_equal(self.budget, planned, found)}
                row |= {"epochs": row["steps"] / found.epoch, "minutes": found.minutes(row["steps"])}
            rows.append(row)
        return rows

    def chosen(self, trials: list[dict] | None = None) -> dict | None:
        """Returns the best trial by validation, or None if trials are missing or none finished. trials: those of `trials()`."""
        trials = self.trials() if trials is None else trials
        done = [trial for trial in trials if trial["state"] == "finished"]
        if len(trials) < self.plan.trials or any(trial["state"] == "unfinished" for trial in trials) or not done:
            return None
        return max(done, key=lambda trial: trial[f"validation_{METRIC}"])


def validations(workdir: Path) -> dict[int, float]:
    """Returns {number of the validation, from 1 to 8: metric} of a run so far."""
    name = f"validation/{METRIC}"
    found = {line["step"]: line[name] for line in budgets.read_metrics(workdir) if name in line}
    every = min(found, default=1)  # the step of the first validation
    return {round(step / every): value for step, value in sorted(found.items())}


def _repair(path: Path) -> None:
    """Removes an incomplete last line, which an interruption may leave. Optuna would append to it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            text = path.read_bytes()
            if text and not text.endswith(b"\n"):
                with path.open("r+b") as file:
                    file.truncate(text.rfind(b"\n") + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def _optuna() -> Any:
    """Imports optuna, which is an extra."""
    try:
        import optuna
    except ImportError as error:
        raise InputError("launch/reproduce.py needs optuna: pip install 'iam_jax[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna

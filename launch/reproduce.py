"""The paper's comparison in one command: data sets x models x seeds, tuned alike, with one table of results.

    python launch/reproduce.py toys --epochs=12 --trials=6 --trial_epochs=8 --path toys=DIR        # equal epochs
    python launch/reproduce.py toys --epochs=12 --minutes=8 --trials=6 --path toys=DIR             # two comparisons, two sections
    python launch/reproduce.py toys ml1m --models ordinary iam sasrec --seeds 0 1 2 --minutes=60 --dry-run

Every model gets the same budget. First a search makes --trials trials of --trial_epochs or --trial_minutes with seed 0. It starts with the
setting of the config, and Optuna proposes the others from the space of the model (launch/models.py). Bad trials are pruned
(launch/search.py). Validation alone chooses; trials do not read the test events. The chosen setting is then trained with every seed, for
--epochs or --minutes. With both, the folder contains both comparisons. Without a budget for trials, a trial has a quarter of the run; with
one of the two, both comparisons use this search.

Epochs and minutes become steps by a calibration at the start, in which the models take turns. A run then has a fixed number of steps, also
on a busy machine. Minutes are training steps only, without compilation and validations. Warm-up, decay and eight validations are at the
same fractions of a run for every model. Text vectors are taken after the leading intra layers if the schedule has any, else after all
layers (`-- --config.objective.text_layers=all` makes all models over tokens alike). The best step by validation is evaluated, alone and
fused with smoothed transitions (eval.fusion). Baselines need no training; they are those of the first finished run.

After an interruption, or for other models, more seeds or more trials, run the command again: it keeps finished runs and trials and
continues the others. The table is written after every search and run, and by --table without running anything. It contains all data sets,
models and seeds in the folder that were run with this budget. Rows with fewer trials or seeds are marked. Flags after `--` are passed to
every training command. Writes FOLDER/<data>/<model>/ (working folders and searches) and FOLDER/reproduction.json and .md.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import budgets
import commands
import models
from models import DATASETS, MODELS, UNITS, Budget, Plan
from results import Results, seed_runs, write
from search import Search

from iam_jax.errors import InputError


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def main(argv: list[str]) -> int:
    plan, only_table = parse(argv)
    results = Results(plan)
    try:
        code = 0 if only_table else run_all(plan, results)
        if not plan.dry_run:
            print(write(plan, results), end="")
            print(f"wrote {plan.folder / 'reproduction.md'} and .json")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


def parse(argv: list[str]) -> tuple[Plan, bool]:
    """Returns the plan, and whether only the table is wanted. Exits with code 2 and one line for wrong flags."""
    own, rest = commands.split_rest(argv)
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+", choices=DATASETS)
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: all whose files are given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, help="epochs per run: the comparison at equal epochs")
    parser.add_argument("--minutes", type=float, help="minutes of training steps per run: the comparison at equal minutes")
    parser.add_argument("--trials", type=int, default=6, help="number of settings tried for every model")
    parser.add_argument("--trial_epochs", type=float, help="epochs per trial; default: a quarter of --epochs")
    parser.add_argument("--trial_minutes", type=float, help="minutes of training steps per trial; default: a quarter of --minutes")
    parser.add_argument("--path", nargs="*", default=[], help="DATA=DIR: --config.data.path of a data set")
    parser.add_argument("--vectors", nargs="*", default=[], help="DATA=FILE: content vectors for hybrid_minilm and hybrid_both")
    parser.add_argument("--pretrained", default="", help="the Hugging Face folder for hybrid_smollm")
    parser.add_argument("--folder", type=Path, default=Path("runs") / "reproduce", help="folder of all runs and of the table")
    parser.add_argument("--dry-run", action="store_true", help="print the commands without running them")
    parser.add_argument("--table", action="store_true", help="write the table of the finished runs without running anything")
    args = parser.parse_args(own)

    amounts = {name: value for name, value in vars(args).items() if name.removeprefix("trial_") in UNITS and value is not None}
    if wrong := [name for name, value in amounts.items() if not 0 < value < float("inf")]:
        parser.error(f"--{wrong[0]}={amounts[wrong[0]]:g}: must be above 0")
    runs = [Budget(unit, amounts[unit]) for unit in UNITS if unit in amounts]
    if not runs:
        parser.error("--epochs, --minutes or both are needed")
    if args.trials < 1:
        parser.error(f"--trials={args.trials}: must be at least 1")
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        parser.error(f"--seeds {' '.join(map(str, args.seeds))}: must be distinct and not negative")
    named = {}
    for flag in ("path", "vectors"):
        named[flag] = dict(value.partition("=")[::2] for value in getattr(args, flag))
        if unknown := [name for name, value in named[flag].items() if name not in args.data or not value]:
            parser.error(f"--{flag} {unknown[0]}: must be DATA=…, where DATA is one of {', '.join(args.data)}")
    trials = [Budget(unit, amounts[f"trial_{unit}"]) for unit in UNITS if f"trial_{unit}" in amounts]
    comparisons = {}
    for run in runs:
        same = [trial for trial in trials if trial.unit == run.unit]
        comparisons[run] = (same or trials or [Budget(run.unit, run.amount / 4)])[0]
    chosen = tuple(args.models or MODELS)
    plan = Plan(
        args.folder,
        data=tuple(args.data),
        models=chosen,
        seeds=tuple(args.seeds),
        trials=args.trials,
        comparisons=comparisons,
        paths=named["path"],
        vectors=named["vectors"],
        pretrained=args.pretrained,
        rest=tuple(rest),
        dry_run=args.dry_run,
    )
    for model in args.models or []:
        if not any(plan.available(data, model) for data in plan.data):
            parser.error(f"--models {model}: needs --{MODELS[model].needs}")
    tuned = {field for model in chosen for name in MODELS[model].space for field in name.split()}
    for flag in rest:
        field = flag.partition("=")[0].lstrip("-").removeprefix("config.")
        if field in budgets.SET_HERE or field in tuned:
            reason = "the search tries its values" if field in tuned else "it is part of the budgets"
            parser.error(f"--config.{field} cannot be set: {reason}")
    return plan, args.table


def run_all(plan: Plan, results: Results) -> int:
    """Runs everything, seed by seed, so that an early stop leaves complete rows. Returns 0, or the exit code of the run that failed."""
    rows = [(data, model) for data in plan.data for model in plan.models if plan.available(data, model)]
    searches = dict.fromkeys(plan.comparisons.values())
    parts = [f"{plan.trials} trials of {trial}" for trial in searches]
    parts += [f"{len(plan.seeds)} seeds of {run}" for run in plan.comparisons]
    print(f"budget: {len(rows)} x ({' + '.join(parts)})", flush=True)
    for number in range(plan.calibrations):
        for data, model in rows:
            if code := _calibrate(plan, data, model, models.own_setting(plan, data, model), number):
                return code
    _estimate(plan, rows)
    diverged = {row for row in rows if budgets.measured(plan, *row, models.own_setting(plan, *row)) is None}
    for budget, (data, model) in itertools.product(searches, rows):
        if (data, model) in diverged:
            print(f"== {data}, {model}: not run, a calibration diverged", flush=True)
        elif code := _search(plan, data, model, budget):
            return code
        elif not plan.dry_run:
            write(plan, results)
    for (run, trial_budget), seed, (data, model) in itertools.product(plan.comparisons.items(), plan.seeds, rows):
        if (data, model) in diverged:
            continue
        search = Search(plan, data, model, trial_budget)
        trial = search.chosen()
        if trial is None:
            if not plan.dry_run:
                print(f"== {data}, {model}, {run}, seed {seed}: not run, every trial diverged", flush=True)
                continue
            print(f"== {data}, {model}, {run}, seed {seed}: has the setting of the best trial; this line shows that of the config")
            trial = {"trial": 0, "setting": models.own_setting(plan, data, model)}
        workdir, flags = seed_runs(plan, data, model, run, trial, [seed])[seed]
        code = _execute(plan, workdir, flags)
        if code not in (0, commands.NON_FINITE):
            return code
        if not plan.dry_run:
            write(plan, results)
    return 0


def _search(plan: Plan, data: str, model: str, budget: Budget) -> int:
    """Runs the search of a model. Returns 0, or the exit code of the run that failed."""
    search = Search(plan, data, model, budget)
    if plan.dry_run:
        setting = models.own_setting(plan, data, model)
        found = budgets.measured(plan, data, model, setting)
        code = _execute(plan, *search.command(0, setting, found)) if found else 0
        if plan.trials > 1:
            print(f"== {data}, {model}: {plan.trials - 1} more trials of {budget}; their settings depend on the trials before", flush=True)
        return code

    def calibrate(setting: dict) -> int:
        for number in range(plan.calibrations):
            if code := _calibrate(plan, data, model, setting, number, quiet=True):
                return code
        return 0

    return search.run(lambda workdir, flags, watch: _execute(plan, workdir, flags, watch), calibrate)


def _calibrate(plan: Plan, data: str, model: str, setting: dict, number: int, quiet: bool = False) -> int:
    """Runs a calibration unless it has finished. Returns 0, or the exit code of a run that failed. Divergence is not a failure."""
    workdir, flags = budgets.calibrations(plan, data, model, setting)[number]
    if quiet and commands.finished(workdir, flags):
        return 0
    code = _execute(plan, workdir, flags)
    return 0 if code == commands.NON_FINITE else code


def _execute(plan: Plan, workdir: Path, flags: list[str], watch: Callable[[], bool] | None = None) -> int:
    """Runs a command unless it has finished. Returns its code (`commands.run`)."""
    if commands.finished(workdir, flags):
        print(f"== {workdir}: already finished", flush=True)
        return commands.code_of(workdir)
    print(f"== {commands.shell_line(flags)}", flush=True)
    return 0 if plan.dry_run else commands.run(workdir, flags, watch)


def _estimate(plan: Plan, rows: list[tuple[str, str]]) -> None:
    """Prints the hours of training steps of the whole plan, from the calibrations of the configs' settings."""
    minutes = 0.0
    for data, model in rows:
        found = budgets.measured(plan, data, model, models.own_setting(plan, data, model))
        if found is None:
            continue
        if found.assumed:
            print("without a calibration, a step is assumed to take one second, and an epoch to have 100 steps")
            return
        minutes += sum(len(plan.seeds) * found.minutes(budgets.steps_of(run, found)) for run in plan.comparisons)
        minutes += sum(plan.trials * found.minutes(budgets.steps_of(trial, found)) for trial in set(plan.comparisons.values()))
    print(f"about {minutes / 60:.1f} hours of training steps, less what pruning saves", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

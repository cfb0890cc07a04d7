"""The paper's comparison in one command: data sets x models x seeds, with one table of results.

    python launch/reproduce.py toys --minutes=12 --trials=3 --path toys=DIR
    python launch/reproduce.py toys ml1m --models ordinary iam sasrec --seeds 0 1 2 --minutes=60 --dry-run

Every model gets the same training time: --minutes of training steps per seed. Before that, --trials learning rates are tried (the one of
its config, and that one multiplied and divided by 3, 9, …), each for --trial_minutes with seed 0; validation alone selects one of them. A
calibration at the start, in which the models take turns, converts minutes into steps. A run then has a fixed number of steps, also on a
busy machine. Warm-up, decay and validations are at the same fractions of these steps for every model. Compilation and validations do not
count as training time. Text vectors are taken after the leading intra layers if the schedule has any, else after all layers. Steps of
ordinary attention and of "without intra" therefore cost more, and these models take fewer steps in the same time
(`-- --config.objective.text_layers=all` makes all models alike). The best step by validation is evaluated. The JSON file of the table
contains the calibrations and trials. Baselines need no training; they are evaluated with the first finished run.

After an interruption, or for other models or more seeds, run the command again: it keeps finished runs and continues the others. The table
is written after every run, and by --table without running anything. It contains all data sets, models and seeds in the folder that were
run with this budget; cells of other runs are empty. Flags after `--` are passed to every training command. Writes FOLDER/<data>/<model>/
(working folders) and FOLDER/reproduction.json and .md.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import commands
import numpy as np

from iam_jax.config import flatten
from iam_jax.errors import InputError
from iam_jax.runs import compare
from iam_jax.schedule import parse_schedule
from iam_jax.storage.files import write_atomically

# data set -> config of the models over text, number of repeats of "intra inter" in its schedule, data.row_tokens of SASRec
DATASETS = {
    "toys": ("amazon_toys.py", 1, 64),
    "arts": ("amazon_arts.py", 2, 64),
    "grocery": ("amazon_grocery.py", 2, 64),
    "cellphones": ("amazon_cellphones.py", 2, 64),
    "ml1m": ("ml1m.py", 2, 256),
    "demo": ("demo.py", 1, 64),
}
# Fields that SASRec takes from the config of a data set: the protocol, and the width and rows of the models over text.
SHARED = (
    *(f"data.{field}" for field in ("source", "category", "untitled", "k_core", "last_n", "split", "t1", "t2", "text", "context_items")),
    "model.width", "train.batch_rows", "eval.validation_users", "eval.batch_rows",
)  # fmt: skip
# The published dropout of SASRec, if it differs from that of its config.
SASREC = {"ml1m": {"model.dropout": 0.2}}
TRIAL_SEED = 0
CALIBRATION, CALIBRATIONS, LINE = 40, 2, 5  # steps per calibration, number of calibrations, steps per line of metrics.jsonl
FEW = ("--config.eval.test=false", "--config.eval.baselines=false", "--config.eval.resamples=1")  # for runs that only select a setting
# model -> its name in the table, and its schedule with n repeats; the other models are compared with the first
MODELS = {
    "ordinary": ("ordinary attention", lambda n: f"full*{2 * n}"),
    "iam": ("item-aware attention", lambda n: f"(intra inter)*{n}"),
    "no_intra": ("without intra", lambda n: f"(full inter)*{n}"),
    "no_inter": ("without inter", lambda n: f"(intra full)*{n}"),
    "hatllm": ("HatLLM's order", lambda n: "intra full inter" if n == 1 else f"intra*{n // 2} full*{2 * n - n // 2 * 2} inter*{n // 2}"),
    "sasrec": ("SASRec", None),
}
BASELINES = ("popularity", "last_item", "item_knn", "transitions", "rules")
METRICS = ("ndcg@10", "hr@10")
COST = ("parameters", "steps", "tokens_seen", "minutes")


def main(argv: list[str]) -> int:
    own, rest = commands.split_rest(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+", choices=DATASETS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, required=True, help="minutes of training steps per run")
    parser.add_argument("--trials", type=int, default=3, help="number of learning rates tried for every model")
    parser.add_argument("--trial_minutes", type=float, help="minutes of training steps per trial; default: a quarter of --minutes")
    parser.add_argument("--path", nargs="*", default=[], help="DATA=DIR: --config.data.path of a data set")
    parser.add_argument("--folder", type=Path, default=Path("runs") / "reproduce", help="folder of all runs and of the table")
    parser.add_argument("--dry-run", action="store_true", help="print the commands without running them")
    parser.add_argument("--table", action="store_true", help="write the table of the finished runs without running anything")
    args = parser.parse_args(own)
    args.rest, args.paths = rest, dict(path.partition("=")[::2] for path in args.path)
    args.trial_minutes = args.trial_minutes or args.minutes / 4
    if args.minutes <= 0 or args.trial_minutes <= 0 or args.trials < 1 or len(set(args.seeds)) < len(args.seeds):
        parser.error("--minutes and --trial_minutes must be above 0, --trials at least 1, --seeds distinct")
    if unknown := [name for name, path in args.paths.items() if name not in args.data or not path]:
        parser.error(f"--path {unknown[0]}: must be DATA=DIR, where DATA is one of {', '.join(args.data)}")
    if any(flag.startswith("--config.eval.test=") for flag in rest):
        parser.error("--config.eval.test cannot be set: trials do not use the test events, and runs do")
    try:
        code = 0 if args.table else run_all(args)
        if not args.dry_run:
            print(write_table(args), end="")
            print(f"wrote {args.folder / 'reproduction.md'} and .json")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


def learning_rates(base: float, trials: int) -> list[float]:
    """Returns the learning rates of the trials: the base, then 3 times the base, a third of it, 9 times the base, …"""
    powers = [(k + 1) // 2 * (1 if k % 2 else -1) for k in range(trials)]
    return [float(f"{base * 3.0**power:.3g}") for power in powers]


def model_flags(args: argparse.Namespace, data: str, model: str) -> tuple[str, list[str], float]:
    """Returns the config file, the overrides and the learning rate of the config, for a model on a data set."""
    file, repeats, row_tokens = DATASETS[data]
    schedule = MODELS[model][1]
    if schedule is None:
        own = flatten(_config(file).to_dict())
        changes = {name: own[name] for name in SHARED} | {"data.row_tokens": row_tokens, "model.mlp_width": own["model.width"]}
        changes |= SASREC.get(data, {})
        file = "amazon_toys_sasrec.py"
    else:
        relations = schedule(repeats)
        leading = parse_schedule(relations).leading_intra
        changes = {"model.schedule": relations, "objective.text_layers": "leading" if leading else "all"}
    if data in args.paths:
        changes["data.path"] = args.paths[data]
    return file, _overrides(changes), _config(file).optimizer.learning_rate


def _config(file: str):
    namespace: dict = {}
    exec(compile((commands.CONFIGS / file).read_text(encoding="utf-8"), file, "exec"), namespace)
    return namespace["get_config"]()


def calibrations(args: argparse.Namespace, data: str, model: str) -> list[tuple[Path, list[str]]]:
    """Returns (working folder, flags) of the short runs that measure the time of a step."""
    file, flags, rate = model_flags(args, data, model)
    overrides = _steps(CALIBRATION) | {"log.every": LINE, "optimizer.learning_rate": rate, "train.seed": TRIAL_SEED}
    overrides |= {"train.eval_every": CALIBRATION, "train.save_every": CALIBRATION}  # the validations are not used
    flags = [*flags, *FEW, *args.rest, *_overrides(overrides)]
    folders = [args.folder / data / model / f"calibration{number}" for number in range(CALIBRATIONS)]
    return [(folder, commands.command(folder, file, flags)) for folder in folders]


def step_seconds(args: argparse.Namespace, data: str, model: str) -> float | None:
    """Returns the seconds of a training step: the smallest median of the calibrations, since other load can only add time.

    Returns None if a calibration is not finished (in a dry run 1), or if one diverged.
    """
    medians = []
    for workdir, flags in calibrations(args, data, model):
        if not commands.finished(workdir, flags):
            return 1.0 if args.dry_run else None
        if commands.diverged(workdir):
            return None
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if "tokens_per_second" in line]
        seconds = [
            (line["tokens_seen"] - last["tokens_seen"]) / line["tokens_per_second"] / (line["step"] - last["step"])
            for last, line in itertools.pairwise(lines)
        ]
        medians.append(float(np.median(seconds)))  # without the first line, which includes the compilation
    return min(medians)


def steps_of(minutes: float, seconds: float) -> int:
    """Converts minutes into steps. The result has two significant digits, since a calibration is not more precise."""
    return max(2, int(float(f"{minutes * 60 / seconds:.2g}")))


def trial_runs(args: argparse.Namespace, data: str, model: str) -> dict[float, tuple[Path, list[str]]]:
    """Returns {learning rate: (working folder, flags)} of a model's trials, or {} before its calibration."""
    file, flags, base = model_flags(args, data, model)
    flags, rates = [*flags, *FEW], learning_rates(base, args.trials)
    seconds = step_seconds(args, data, model)
    if seconds is None:
        return {}
    return {rate: _run(args, data, model, file, flags, rate, TRIAL_SEED, args.trial_minutes, seconds, "trial-") for rate in rates}


def seed_runs(args: argparse.Namespace, data: str, model: str, rate: float, seeds: Iterable[int]) -> dict[int, tuple[Path, list[str]]]:
    """Returns {seed: (working folder, flags)} of a model's runs with the selected learning rate. The calibration must be finished."""
    file, flags, _ = model_flags(args, data, model)
    seconds = step_seconds(args, data, model)
    return {seed: _run(args, data, model, file, flags, rate, seed, args.minutes, seconds) for seed in seeds}


def all_seeds(args: argparse.Namespace, data: str, model: str, rate: float) -> list[int]:
    """Returns the seeds of args and those of the runs in the folder, sorted."""
    prefix = _name(args.minutes, rate, "")
    found = {path.name.removeprefix(prefix).removesuffix(".command") for path in (args.folder / data / model).glob(f"{prefix}*.command")}
    return sorted({*args.seeds, *(int(seed) for seed in found if seed.isdecimal())})


def _name(minutes: float, rate: float, seed: object) -> str:
    return f"{minutes:g}min-rate{rate:g}-seed{seed}"


def _run(args, data, model, file, flags, rate, seed, minutes, seconds, kind="") -> tuple[Path, list[str]]:
    workdir = args.folder / data / model / f"{kind}{_name(minutes, rate, seed)}"
    overrides = _steps(steps_of(minutes, seconds)) | {"optimizer.learning_rate": rate, "train.seed": seed}
    return workdir, commands.command(workdir, file, [*flags, *_overrides(overrides), *args.rest])


def _steps(steps: int) -> dict[str, object]:
    """Returns overrides for a run of this many steps: a tenth of them are warm-up, and there are eight validations."""
    every = math.ceil(steps / 8)
    schedule = {"train.steps": steps, "optimizer.decay_steps": steps, "optimizer.warmup_steps": steps // 10}
    return schedule | {"train.eval_every": every, "train.save_every": every, "train.patience": 0, "train.max_minutes": 0.0}


def _overrides(values: dict[str, object]) -> list[str]:
    return [f"--config.{name}={value}" for name, value in values.items()]


def trials(args: argparse.Namespace, data: str, model: str) -> list[dict]:
    """Returns the finished trials of a model: learning rate, validation metric (None if it diverged) and cost."""
    found = []
    for rate, (workdir, flags) in trial_runs(args, data, model).items():
        if commands.finished(workdir, flags):
            run = None if commands.diverged(workdir) else compare.read(workdir)
            value = run and run.evaluation["results"]["model"]["validation"][METRICS[0]]
            found.append({"learning_rate": rate, f"validation_{METRICS[0]}": value, "cost": run.cost if run else {}})
    return found


def chosen(args: argparse.Namespace, data: str, model: str) -> float | None:
    """Returns the learning rate of the best trial, or None if trials are unfinished or all diverged."""
    found = trials(args, data, model)
    good = [trial for trial in found if trial[f"validation_{METRICS[0]}"] is not None]
    if len(found) < args.trials or not good:
        return None
    return max(good, key=lambda trial: trial[f"validation_{METRICS[0]}"])["learning_rate"]


def run_all(args: argparse.Namespace) -> int:
    """Runs everything, seed by seed, so that an early stop leaves complete rows. Returns 0, or the exit code of the run that failed."""
    runs = [(data, model) for data in args.data for model in args.models]
    hours = len(runs) * (args.trials * args.trial_minutes + len(args.seeds) * args.minutes) / 60
    budget = f"{args.trials} trials of {args.trial_minutes:g} minutes + {len(args.seeds)} seeds of {args.minutes:g}"
    print(f"budget: {len(runs)} x ({budget}), at most {hours:.1f} hours of training", flush=True)
    if args.dry_run:
        print("steps are estimated from finished calibrations; without one, a step is assumed to take one second")
    for data, number, model in itertools.product(args.data, range(CALIBRATIONS), args.models):
        if code := _finish(args, *calibrations(args, data, model)[number]):
            return code
    for data, model in runs:
        for workdir, flags in trial_runs(args, data, model).values():
            if code := _finish(args, workdir, flags):
                return code
    for seed in args.seeds:
        for data, model in runs:
            rate = chosen(args, data, model)
            if rate is None:
                tried = trial_runs(args, data, model)
                if not (args.dry_run and tried):
                    print(f"== {data}, {model}, seed {seed}: not run, {'every trial' if tried else 'a calibration'} diverged", flush=True)
                    continue
                print(f"== {data}, {model}, seed {seed}: uses the learning rate of the best trial; this line shows the one of the config")
                rate = next(iter(tried))
            if code := _finish(args, *seed_runs(args, data, model, rate, [seed])[seed]):
                return code
    return 0


def _finish(args: argparse.Namespace, workdir: Path, flags: list[str]) -> int:
    """Runs a command unless it has finished. A run that diverges is recorded and is not an error. Returns the exit code."""
    if commands.finished(workdir, flags):
        print(f"== {workdir}: already finished", flush=True)
        return 0
    print(f"== {commands.shell_line(flags)}", flush=True)
    if args.dry_run:
        return 0
    code = commands.run(workdir, flags)
    if code in (0, commands.NON_FINITE):
        write_table(args)
        return 0
    return code


# ---- the table


def collect(args: argparse.Namespace) -> dict:
    """Collects the results of all data sets that are in args or in the folder.

    Returns:
      {data set: {"split_sha256", "protocol", "rows": {model or baseline: row}}}. The row of a model contains its trials, learning rate,
      seeds, diverged seeds, test metrics by seed, mean and sd over seeds, and the difference to the first model over their common seeds.
      The row is None if nothing has been run.
    """
    out = {}
    for data in (data for data in DATASETS if data in args.data or (args.folder / data).is_dir()):
        runs, diverged = {}, {}
        for model in MODELS:
            rate = chosen(args, data, model)
            planned = {} if rate is None else seed_runs(args, data, model, rate, all_seeds(args, data, model, rate))
            done = {seed: workdir for seed, (workdir, flags) in planned.items() if commands.finished(workdir, flags)}
            diverged[model] = [seed for seed, workdir in done.items() if commands.diverged(workdir)]
            runs[model] = {seed: compare.read(workdir) for seed, workdir in done.items() if seed not in diverged[model]}
        finished = [(model, seed, run) for model, by_seed in runs.items() for seed, run in by_seed.items()]
        first = finished[0][2] if finished else None
        for model, seed, run in finished:
            if difference := compare.differing(first, run, ("the first run", f"{model} with seed {seed}")):
                raise InputError(f"{args.folder / data}: runs that cannot be compared: {difference}")
        rows = {model: _row(args, data, model, runs, diverged[model]) for model in MODELS}
        with_baselines = next((run for _, _, run in finished if len(run.evaluation["results"]) > 1), None)
        for name in BASELINES:
            rows[name] = _baseline_row(name, with_baselines, runs[next(iter(MODELS))])
        identity = {name: first and first.evaluation[name] for name in ("split_sha256", "protocol")}
        out[data] = identity | {"rows": rows}
    return out


def _baseline_row(name: str, run: compare.Finished | None, base: dict[int, compare.Finished]) -> dict | None:
    """run: one that evaluated the baselines; base: the runs of the first model by seed."""
    if run is None or name not in run.evaluation["results"]:
        return None
    test, ranked = run.evaluation["results"][name]["test"], run.baseline(name)
    delta = compare.over_seeds(dict.fromkeys(base, ranked), base) if ranked and base else None
    return {"mean": {metric: test[metric] for metric in METRICS}, "test": test, "difference": delta}


def _row(args: argparse.Namespace, data: str, model: str, runs: dict, diverged: list[int]) -> dict | None:
    tried = trials(args, data, model)
    if not runs[model]:
        return {"trials": tried, "diverged": diverged} if tried else None
    by_seed = {seed: run.evaluation["results"]["model"]["test"] for seed, run in runs[model].items()}
    values = {metric: np.array([test[metric] for test in by_seed.values()]) for metric in METRICS}
    base = next(iter(MODELS))
    return {
        "trials": tried,
        "diverged": diverged,
        "seconds_per_step": step_seconds(args, data, model),
        "learning_rate": chosen(args, data, model),
        "seeds": list(by_seed),
        "test": by_seed,
        "mean": {metric: float(value.mean()) for metric, value in values.items()},
        "sd": {metric: float(value.std(ddof=1)) if len(value) > 1 else None for metric, value in values.items()},
        "difference": None if model == base else compare.over_seeds(runs[model], runs[base]),
        "cost": {seed: run.cost for seed, run in runs[model].items()},
    }


def format_markdown(args: argparse.Namespace, table: dict) -> str:
    head = ["", "learning rate", "seeds", *(f"{metric.upper()}, mean ± sd" for metric in METRICS)]
    head += [f"{METRICS[0].upper()} minus {MODELS[next(iter(MODELS))][0]} [95 % over users]", *(name.replace("_", " ") for name in COST)]
    lines = [
        f"Test metrics. Budget of every model: {args.trials} learning rates with {args.trial_minutes:g} minutes of training steps each, "
        f"selected on validation, then {args.minutes:g} minutes per seed. A calibration converted minutes into steps. Empty cells were not "
        "run. Intervals are for these seeds.",
    ]
    for data, result in table.items():
        split = f", split {result['split_sha256'][:8]}…" if result["split_sha256"] else ""
        lines += ["", f"**{data}**{split}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for name, row in result["rows"].items():
            cells = [MODELS[name][0] if name in MODELS else name, *_cells(row)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cells(row: dict | None) -> list[str]:
    lost = f"{', '.join(map(str, row['diverged']))} diverged" if row and row.get("diverged") else ""
    if row and row.get("trials") and all(trial[f"validation_{METRICS[0]}"] is None for trial in row["trials"]):
        lost = "every trial diverged"
    if not row or "mean" not in row:
        return ["", lost, *[""] * (1 + len(METRICS) + len(COST))]
    delta, between = row["difference"], ""
    if delta:
        low, high = delta[f"{METRICS[0]}_ci"]
        between = f"{delta[METRICS[0]]:+.4f} [{low:+.4f}, {high:+.4f}]"
    if "seeds" not in row:  # a baseline
        return ["", "", *(f"{row['mean'][metric]:.4f}" for metric in METRICS), between, *[""] * len(COST)]
    shown = [f"{row['mean'][m]:.4f}" + (f" ± {row['sd'][m]:.4f}" if row["sd"][m] is not None else "") for m in METRICS]
    cost = list(row["cost"].values())
    costs = [f"{np.mean([c[key] for c in cost]):{'.1f' if key == 'minutes' else ',.0f'}}" for key in COST]
    seeds = ", ".join(map(str, row["seeds"])) + f"; {lost}" * bool(lost)
    return [f"{row['learning_rate']:g}", seeds, *shown, between, *costs]


def write_table(args: argparse.Namespace) -> str:
    table = collect(args)
    budget = {name: getattr(args, name) for name in ("minutes", "trials", "trial_minutes", "seeds", "models", "rest")}
    markdown = format_markdown(args, table)
    texts = {"json": json.dumps({"budget": budget, "data": table}, indent=2) + "\n", "md": markdown}
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        for ending, text in texts.items():
            write_atomically(args.folder / f"reproduction.{ending}", lambda path, text=text: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--folder={args.folder}: cannot be written ({error.strerror})") from error
    return markdown


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

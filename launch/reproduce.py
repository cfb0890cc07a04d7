"""The paper's comparison in one command: data sets x models x seeds, one table.

    python launch/reproduce.py toys --minutes=12 --trials=3 --path toys=DIR
    python launch/reproduce.py toys ml1m --models ordinary iam sasrec --seeds 0 1 2 --minutes=60 --dry-run

Every model gets the same time: --minutes of training steps for every seed, and before that --trials learning rates (its config's, and
that times and divided by 3, 9, …), each for --trial_minutes with seed 0 and judged on validation alone. Minutes become steps by a
calibration at the start, in which the models take turns; from then on a run is a number of steps, the same on a busy machine, with the
learning rate's warm-up and decay, and the validations, at the same shares of it for every model. Compilation and validations do not count.
Text vectors come after the leading intra layers where a schedule has them, else after all layers: a step of ordinary attention and of
"without intra" costs more, and they take fewer in the same time (`-- --config.objective.text_layers=all` makes all models alike).
The best step by validation is evaluated. Calibration and trials are recorded in the table's JSON. Baselines need no training and come with
the first finished run.

Run again after an interruption, or with other models or more seeds: what is finished is kept, the rest goes on. The table is written
after every run and by --table alone: of all data sets, models and seeds in the folder that were run on this budget. What has not been run
is empty there. What stands behind `--` goes to every training command. Writes FOLDER/<data>/<model>/ (working folders) and
FOLDER/reproduction.json and .md.
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

# data set -> config of the models over text, how many times its schedule repeats "intra inter", and SASRec's data.row_tokens
DATASETS = {
    "toys": ("amazon_toys.py", 1, 64),
    "arts": ("amazon_arts.py", 2, 64),
    "grocery": ("amazon_grocery.py", 2, 64),
    "cellphones": ("amazon_cellphones.py", 2, 64),
    "ml1m": ("ml1m.py", 2, 256),
    "demo": ("demo.py", 1, 64),
}
# What SASRec takes over from the config of a data set: the protocol, and the width and rows that the models over text have.
SHARED = (
    *(f"data.{field}" for field in ("source", "category", "untitled", "k_core", "last_n", "split", "t1", "t2", "text", "context_items")),
    "model.width", "train.batch_rows", "eval.validation_users", "eval.batch_rows",
)  # fmt: skip
# SASRec's dropout where the published one is not the config's
SASREC = {"ml1m": {"model.dropout": 0.2}}
TRIAL_SEED = 0
CALIBRATION, CALIBRATIONS, LINE = 40, 2, 5  # steps of a calibration, how many there are, steps of a line of metrics.jsonl
FEW = ("--config.eval.test=false", "--config.eval.baselines=false", "--config.eval.resamples=1")  # of runs that only choose a setting
# model -> what it is called in the table, and its schedule over n repeats; the first is what the others are compared with
MODELS = {
    "ordinary": ("ordinary attention", lambda n: f"full*{2 * n}"),
    "iam": ("item-aware attention", lambda n: f"(intra inter)*{n}"),
    "no_intra": ("without intra", lambda n: f"(full inter)*{n}"),
    "no_inter": ("without inter", lambda n: f"(intra full)*{n}"),
    "hatllm": ("HatLLM's order", lambda n: "intra full inter" if n == 1 else f"intra*{n // 2} full*{2 * n - n // 2 * 2} inter*{n // 2}"),
    "sasrec": ("SASRec", None),
}
BASELINES = ("popularity", "last_item", "item_knn")
METRICS = ("ndcg@10", "hr@10")
COST = ("parameters", "steps", "tokens_seen", "minutes")


def main(argv: list[str]) -> int:
    own, rest = commands.split_rest(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+", choices=DATASETS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, required=True, help="minutes of training steps of a run")
    parser.add_argument("--trials", type=int, default=3, help="learning rates tried for every model")
    parser.add_argument("--trial_minutes", type=float, help="of a trial; a quarter of --minutes by default")
    parser.add_argument("--path", nargs="*", default=[], help="DATA=DIR: --config.data.path of a data set")
    parser.add_argument("--folder", type=Path, default=Path("runs") / "reproduce")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--table", action="store_true", help="write the table of what there is, run nothing")
    args = parser.parse_args(own)
    args.rest, args.paths = rest, dict(path.partition("=")[::2] for path in args.path)
    args.trial_minutes = args.trial_minutes or args.minutes / 4
    if args.minutes <= 0 or args.trial_minutes <= 0 or args.trials < 1 or len(set(args.seeds)) < len(args.seeds):
        parser.error("--minutes and --trial_minutes must be above 0, --trials 1 or more, --seeds different")
    if unknown := [name for name, path in args.paths.items() if name not in args.data or not path]:
        parser.error(f"--path {unknown[0]}: DATA=DIR, of {', '.join(args.data)}")
    if any(flag.startswith("--config.eval.test=") for flag in rest):
        parser.error("--config.eval.test: the trials leave the test events alone, the runs read them")
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
    """The config's own first, then times 3, divided by 3, times 9, …"""
    powers = [(k + 1) // 2 * (1 if k % 2 else -1) for k in range(trials)]
    return [float(f"{base * 3.0**power:.3g}") for power in powers]


def model_flags(args: argparse.Namespace, data: str, model: str) -> tuple[str, list[str], float]:
    """Config file, overrides and the config's own learning rate of a model on a data set."""
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
    space: dict = {}
    exec(compile((commands.CONFIGS / file).read_text(encoding="utf-8"), file, "exec"), space)
    return space["get_config"]()


def calibrations(args: argparse.Namespace, data: str, model: str) -> list[tuple[Path, list[str]]]:
    """(working folder, flags) of the short runs that tell how long a step takes."""
    file, flags, rate = model_flags(args, data, model)
    own = _steps(CALIBRATION) | {"log.every": LINE, "optimizer.learning_rate": rate, "train.seed": TRIAL_SEED}
    own |= {"train.eval_every": CALIBRATION, "train.save_every": CALIBRATION}  # nobody reads its validations
    flags = [*flags, *FEW, *args.rest, *_overrides(own)]
    folders = [args.folder / data / model / f"calibration{number}" for number in range(CALIBRATIONS)]
    return [(folder, commands.command(folder, file, flags)) for folder in folders]


def step_seconds(args: argparse.Namespace, data: str, model: str) -> float | None:
    """Seconds of a training step: of the calibrations' medians the least, since other work only adds; None before they are finished
    (in a dry run 1), and where one diverged."""
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
        medians.append(float(np.median(seconds)))  # the first line, with the compilation, is left out
    return min(medians)


def steps_of(minutes: float, seconds: float) -> int:
    """So many steps take the minutes; two digits, as a calibration tells no more."""
    return max(2, int(float(f"{minutes * 60 / seconds:.2g}")))


def trial_runs(args: argparse.Namespace, data: str, model: str) -> dict[float, tuple[Path, list[str]]]:
    """{learning rate: (working folder, flags)} of a model's trials; empty before its calibration."""
    file, flags, base = model_flags(args, data, model)
    flags, rates = [*flags, *FEW], learning_rates(base, args.trials)
    seconds = step_seconds(args, data, model)
    if seconds is None:
        return {}
    return {rate: _run(args, data, model, file, flags, rate, TRIAL_SEED, args.trial_minutes, seconds, "trial-") for rate in rates}


def seed_runs(args: argparse.Namespace, data: str, model: str, rate: float, seeds: Iterable[int]) -> dict[int, tuple[Path, list[str]]]:
    """{seed: (working folder, flags)} of a model's runs with its chosen learning rate, after its calibration."""
    file, flags, _ = model_flags(args, data, model)
    seconds = step_seconds(args, data, model)
    return {seed: _run(args, data, model, file, flags, rate, seed, args.minutes, seconds) for seed in seeds}


def seeds_there(args: argparse.Namespace, data: str, model: str, rate: float) -> list[int]:
    """The seeds of args and those that the folder holds, in order."""
    begin = _name(args.minutes, rate, "")
    there = {path.name.removeprefix(begin).removesuffix(".command") for path in (args.folder / data / model).glob(f"{begin}*.command")}
    return sorted({*args.seeds, *(int(seed) for seed in there if seed.isdecimal())})


def _name(minutes: float, rate: float, seed: object) -> str:
    return f"{minutes:g}min-rate{rate:g}-seed{seed}"


def _run(args, data, model, file, flags, rate, seed, minutes, seconds, kind="") -> tuple[Path, list[str]]:
    workdir = args.folder / data / model / f"{kind}{_name(minutes, rate, seed)}"
    own = _steps(steps_of(minutes, seconds)) | {"optimizer.learning_rate": rate, "train.seed": seed}
    return workdir, commands.command(workdir, file, [*flags, *_overrides(own), *args.rest])


def _steps(steps: int) -> dict[str, object]:
    """A run of so many steps, whatever its config says: a tenth of them warm-up, eight validations."""
    every = math.ceil(steps / 8)
    length = {"train.steps": steps, "optimizer.decay_steps": steps, "optimizer.warmup_steps": steps // 10}
    return length | {"train.eval_every": every, "train.save_every": every, "train.patience": 0, "train.max_minutes": 0.0}


def _overrides(values: dict[str, object]) -> list[str]:
    return [f"--config.{name}={value}" for name, value in values.items()]


def trials(args: argparse.Namespace, data: str, model: str) -> list[dict]:
    """What is known of a model's trials: learning rate, validation metric (None: diverged), minutes; those not run are left out."""
    found = []
    for rate, (workdir, flags) in trial_runs(args, data, model).items():
        if commands.finished(workdir, flags):
            run = None if commands.diverged(workdir) else compare.read(workdir)
            value = run and run.evaluation["results"]["model"]["validation"][METRICS[0]]
            found.append({"learning_rate": rate, f"validation_{METRICS[0]}": value, "cost": run.cost if run else {}})
    return found


def chosen(args: argparse.Namespace, data: str, model: str) -> float | None:
    """The best trial's learning rate; None before all trials are finished, or where all diverged."""
    found = trials(args, data, model)
    good = [trial for trial in found if trial[f"validation_{METRICS[0]}"] is not None]
    if len(found) < args.trials or not good:
        return None
    return max(good, key=lambda trial: trial[f"validation_{METRICS[0]}"])["learning_rate"]


def run_all(args: argparse.Namespace) -> int:
    """Seed by seed, so that an early stop leaves whole rows of the table. Returns the exit code of the run that ended it."""
    runs = [(data, model) for data in args.data for model in args.models]
    hours = len(runs) * (args.trials * args.trial_minutes + len(args.seeds) * args.minutes) / 60
    each = f"{args.trials} trials of {args.trial_minutes:g} minutes + {len(args.seeds)} seeds of {args.minutes:g}"
    print(f"budget: {len(runs)} x ({each}), {hours:.1f} hours of training at most", flush=True)
    if args.dry_run:
        print("steps: by the calibrations that are finished, of a second each where there are none")
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
                print(f"== {data}, {model}, seed {seed}: with the learning rate of the best trial, here the config's")
                rate = next(iter(tried))
            if code := _finish(args, *seed_runs(args, data, model, rate, [seed])[seed]):
                return code
    return 0


def _finish(args: argparse.Namespace, workdir: Path, flags: list[str]) -> int:
    """Runs a command to its end, unless it was; a run that diverges is noted and is no error."""
    if commands.finished(workdir, flags):
        print(f"== {workdir}: finished before", flush=True)
        return 0
    print(f"== {commands.told(flags)}", flush=True)
    if args.dry_run:
        return 0
    code = commands.run(workdir, flags)
    if code in (0, commands.NON_FINITE):
        write_table(args)
        return 0
    return code


# ---- the table


def collect(args: argparse.Namespace) -> dict:
    """{data set: {"split_sha256", "protocol", "rows": {model or baseline: row}}}, of all data sets that args or the folder name; a row of
    what has not been run is None. The row of a model: its trials, learning rate, seeds, those that diverged, test metrics by seed, mean and
    sd over seeds, difference to the first model over the seeds both have."""
    out = {}
    for data in (data for data in DATASETS if data in args.data or (args.folder / data).is_dir()):
        runs, diverged = {}, {}
        for model in MODELS:
            rate = chosen(args, data, model)
            of = {} if rate is None else seed_runs(args, data, model, rate, seeds_there(args, data, model, rate))
            done = {seed: workdir for seed, (workdir, flags) in of.items() if commands.finished(workdir, flags)}
            diverged[model] = [seed for seed, workdir in done.items() if commands.diverged(workdir)]
            runs[model] = {seed: compare.read(workdir) for seed, workdir in done.items() if seed not in diverged[model]}
        first = next((run for of in runs.values() for run in of.values()), None)
        for model, of in runs.items():
            for seed, run in of.items():
                if what := compare.differing(first, run, ("the first run", f"{model} with seed {seed}")):
                    raise InputError(f"{args.folder / data}: runs that cannot be compared: {what}")
        rows = {model: _row(args, data, model, runs, diverged[model]) for model in MODELS}
        known = next((run for of in runs.values() for run in of.values() if len(run.evaluation["results"]) > 1), None)
        for name in BASELINES:
            rows[name] = _baseline_row(name, known, runs[next(iter(MODELS))])
        identity = {name: first and first.evaluation[name] for name in ("split_sha256", "protocol")}
        out[data] = identity | {"rows": rows}
    return out


def _baseline_row(name: str, known: compare.Finished | None, base: dict[int, compare.Finished]) -> dict | None:
    """known: a run that ranked the baselines; base: the first model's runs by seed."""
    if known is None or name not in known.evaluation["results"]:
        return None
    test, ranked = known.evaluation["results"][name]["test"], known.baseline(name)
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
        f"Test metrics. Budget: {args.trials} learning rates of {args.trial_minutes:g} minutes of training steps each for every model, "
        f"chosen on validation; then {args.minutes:g} minutes for each seed. Minutes became steps by a calibration. Empty: not run. "
        "Intervals are for these seeds.",
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

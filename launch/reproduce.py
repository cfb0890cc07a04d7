"""The paper's comparison in one command: data sets x models x seeds, one table.

    python launch/reproduce.py toys --minutes=12 --trials=3 --path toys=DIR
    python launch/reproduce.py toys ml1m --models ordinary iam sasrec --seeds 0 1 2 --minutes=60 --dry-run

Every model gets the same: --trials learning rates (its config's, and that times and divided by 3, 9, …), each trained for
--trial_minutes with the first seed and judged on validation alone; then, with the best of them, --minutes of training for every seed. A
run may end earlier by its config's train.steps or train.patience. Every trial is recorded in the table's JSON. Baselines need no training
and come with the first finished run.

Run again after an interruption, or with other models or more seeds: what is finished is kept, the rest goes on. The table is written
after every run and by --table alone, of all models that were run on the same budget; what has not been run is empty there. What stands
behind `--` goes to every training command. Writes FOLDER/<data>/<model>/ (working folders) and FOLDER/reproduction.json and .md.
"""

import argparse
import json
import sys
from pathlib import Path

import commands
import numpy as np

from iam_jax import compare
from iam_jax.errors import InputError
from iam_jax.files import write_atomically

# data set -> config of the models over text, how many times its schedule repeats "intra inter", and SASRec's data.row_tokens
DATASETS = {
    "toys": ("amazon_toys.py", 1, 64),
    "arts": ("amazon_arts.py", 2, 64),
    "grocery": ("amazon_grocery.py", 2, 64),
    "cellphones": ("amazon_cellphones.py", 2, 64),
    "ml1m": ("ml1m.py", 2, 256),
    "demo": ("demo.py", 1, 64),
}
SHARED = ("source", "category", "untitled", "k_core", "last_n", "split", "t1", "t2", "text", "context_items")  # of config.data
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
COST = ("parameters", "tokens_seen", "minutes")
NON_FINITE = 4  # exit code of a run that diverged


def main(argv: list[str]) -> int:
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+", choices=DATASETS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, required=True, help="training minutes of a run, its validations included")
    parser.add_argument("--trials", type=int, default=3, help="learning rates tried for every model")
    parser.add_argument("--trial_minutes", type=float, help="training minutes of a trial; a quarter of --minutes by default")
    parser.add_argument("--path", nargs="*", default=[], help="DATA=DIR: --config.data.path of a data set")
    parser.add_argument("--folder", type=Path, default=Path("runs") / "reproduce")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--table", action="store_true", help="write the table of what there is, run nothing")
    args = parser.parse_args(argv[:cut])
    args.rest, args.paths = argv[cut + 1 :], dict(path.partition("=")[::2] for path in args.path)
    args.trial_minutes = args.trial_minutes or args.minutes / 4
    if args.minutes <= 0 or args.trial_minutes <= 0 or args.trials < 1 or len(set(args.seeds)) < len(args.seeds):
        parser.error("--minutes and --trial_minutes must be above 0, --trials 1 or more, --seeds different")
    if unknown := [name for name, path in args.paths.items() if name not in args.data or not path]:
        parser.error(f"--path {unknown[0]}: DATA=DIR, of {', '.join(args.data)}")
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
        changes = {f"data.{field}": _config(file).data[field] for field in SHARED} | {"data.row_tokens": row_tokens}
        file = "amazon_toys_sasrec.py"
    else:
        relations = schedule(repeats)
        leading = relations.lstrip("(").startswith("intra")
        changes = {"model.schedule": relations, "objective.text_layers": "leading" if leading else "all"}
    if data in args.paths:
        changes["data.path"] = args.paths[data]
    flags = [f"--config.{name}={value}" for name, value in changes.items()]
    return file, [*flags, *args.rest], _config(file).optimizer.learning_rate


def _config(file: str):
    space: dict = {}
    exec(compile((commands.CONFIGS / file).read_text(encoding="utf-8"), file, "exec"), space)
    return space["get_config"]()


def workdir_of(args: argparse.Namespace, data: str, model: str, rate: float, seed: int, trial: bool = False) -> Path:
    return args.folder / data / model / f"{'trial-' * trial}rate{rate:g}-seed{seed}"


def trial_runs(args: argparse.Namespace, data: str, model: str) -> dict[float, tuple[Path, list[str]]]:
    """{learning rate: (working folder, flags)} of a model's trials."""
    file, flags, base = model_flags(args, data, model)
    few = ["--config.eval.test=false", "--config.eval.baselines=false", "--config.eval.resamples=1"]
    rates = learning_rates(base, args.trials)
    return {rate: _run(args, data, model, file, flags, rate, args.seeds[0], args.trial_minutes, few) for rate in rates}


def seed_runs(args: argparse.Namespace, data: str, model: str, rate: float) -> dict[int, tuple[Path, list[str]]]:
    """{seed: (working folder, flags)} of a model's runs with its chosen learning rate."""
    file, flags, _ = model_flags(args, data, model)
    return {seed: _run(args, data, model, file, flags, rate, seed, args.minutes) for seed in args.seeds}


def _run(args, data, model, file, flags, rate, seed, minutes, trial=None) -> tuple[Path, list[str]]:
    workdir = workdir_of(args, data, model, rate, seed, trial is not None)
    own = {"optimizer.learning_rate": rate, "train.seed": seed, "train.max_minutes": minutes}
    return workdir, commands.command(workdir, file, [*flags, *(f"--config.{k}={v}" for k, v in own.items()), *(trial or [])])


def trials(args: argparse.Namespace, data: str, model: str) -> list[dict]:
    """What is known of a model's trials: learning rate, validation metric (None: diverged), minutes; those not run are left out."""
    found = []
    for rate, (workdir, flags) in trial_runs(args, data, model).items():
        if commands.finished(workdir, flags):
            run = compare.read(workdir)
            value = run.evaluation["results"]["model"]["validation"][METRICS[0]]
            found.append({"learning_rate": rate, f"validation_{METRICS[0]}": value, "cost": run.cost})
        elif commands.finished(workdir, [*flags, "diverged"]):
            found.append({"learning_rate": rate, f"validation_{METRICS[0]}": None, "cost": {}})
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
    for data, model in runs:
        for workdir, flags in trial_runs(args, data, model).values():
            if code := _finish(args, workdir, flags):
                return code
    for seed in args.seeds:
        for data, model in runs:
            rate = chosen(args, data, model)
            if rate is None:
                if not args.dry_run:
                    print(f"== {data}, {model}, seed {seed}: not run, every trial diverged")
                    continue
                print(f"== {data}, {model}, seed {seed}: with the learning rate of the best trial, here the config's")
                rate = next(iter(trial_runs(args, data, model)))
            if code := _finish(args, *seed_runs(args, data, model, rate)[seed]):
                return code
    return 0


def _finish(args: argparse.Namespace, workdir: Path, flags: list[str]) -> int:
    """Runs a command to its end, unless it was; a run that diverges is noted and is no error."""
    if commands.finished(workdir, flags) or commands.finished(workdir, [*flags, "diverged"]):
        print(f"== {workdir}: finished before", flush=True)
        return 0
    print(f"== {commands.told(flags)}", flush=True)
    if args.dry_run:
        return 0
    code = commands.run(workdir, flags)
    if code == NON_FINITE:
        commands.mark(workdir, [*flags, "diverged"])
    elif code:
        return code
    write_table(args)
    return 0


# ---- the table


def collect(args: argparse.Namespace) -> dict:
    """{data set: {"split_sha256", "rows": {model or baseline: row}}}; a row of what has not been run is None. The row of a model: its
    trials, learning rate, seeds, test metrics by seed, mean and sd over seeds, difference to the first model over the seeds both have."""
    out = {}
    for data in args.data:
        runs = {}
        for model in MODELS:
            rate = chosen(args, data, model)
            of = seed_runs(args, data, model, rate) if rate is not None else {}
            runs[model] = {seed: compare.read(workdir) for seed, (workdir, flags) in of.items() if commands.finished(workdir, flags)}
        first = next((run for of in runs.values() for run in of.values()), None)
        for model, of in runs.items():
            for seed, run in of.items():
                if run.identity != first.identity:
                    raise InputError(f"{data}: {model} with seed {seed} is of another split or protocol than the runs before it")
        rows = {model: _row(args, data, model, runs) for model in MODELS}
        known = next((r.evaluation["results"] for of in runs.values() for r in of.values() if len(r.evaluation["results"]) > 1), {})
        for name in BASELINES:
            test = known.get(name, {}).get("test")
            rows[name] = test and {"mean": {metric: test[metric] for metric in METRICS}, "test": test}
        identity = {name: first and first.evaluation[name] for name in ("split_sha256", "protocol")}
        out[data] = identity | {"rows": rows}
    return out


def _row(args: argparse.Namespace, data: str, model: str, runs: dict) -> dict | None:
    tried = trials(args, data, model)
    if not runs[model]:
        return {"trials": tried} if tried else None
    by_seed = {seed: run.evaluation["results"]["model"]["test"] for seed, run in runs[model].items()}
    values = {metric: np.array([test[metric] for test in by_seed.values()]) for metric in METRICS}
    base = next(iter(MODELS))
    return {
        "trials": tried,
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
    head += [f"{METRICS[0].upper()} minus {MODELS[next(iter(MODELS))][0]} [95 %]", *(name.replace("_", " ") for name in COST)]
    lines = [
        f"Test metrics. Budget: {args.trials} learning rates of {args.trial_minutes:g} minutes each for every model, chosen on validation; "
        f"then {args.minutes:g} minutes for each of {len(args.seeds)} seeds. Empty: not run.",
    ]
    for data, result in table.items():
        split = f", split {result['split_sha256'][:8]}…" if result["split_sha256"] else ""
        lines += ["", f"**{data}**{split}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for name, row in result["rows"].items():
            cells = [MODELS[name][0] if name in MODELS else name, *_cells(row)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cells(row: dict | None) -> list[str]:
    if not row or "mean" not in row:
        return [""] * (3 + len(METRICS) + len(COST))
    if "seeds" not in row:  # a baseline
        return ["", "", *(f"{row['mean'][metric]:.4f}" for metric in METRICS), "", "", "", ""]
    shown = [f"{row['mean'][m]:.4f}" + (f" ± {row['sd'][m]:.4f}" if row["sd"][m] is not None else "") for m in METRICS]
    delta, between = row["difference"], ""
    if delta:
        low, high = delta[f"{METRICS[0]}_ci"]
        between = f"{delta[METRICS[0]]:+.4f} [{low:+.4f}, {high:+.4f}]"
    cost = list(row["cost"].values())
    costs = [form.format(np.mean([c[key] for c in cost])) for key, form in zip(COST, ("{:,.0f}", "{:,.0f}", "{:.1f}"), strict=True)]
    return [f"{row['learning_rate']:g}", ", ".join(map(str, row["seeds"])), *shown, between, *costs]


def write_table(args: argparse.Namespace) -> str:
    table = collect(args)
    budget = {name: getattr(args, name) for name in ("minutes", "trials", "trial_minutes", "seeds", "models", "rest")}
    markdown = format_markdown(args, table)
    texts = {"json": json.dumps({"budget": budget, "data": table}, indent=2) + "\n", "md": markdown}
    args.folder.mkdir(parents=True, exist_ok=True)
    for ending, text in texts.items():
        write_atomically(args.folder / f"reproduction.{ending}", lambda path, text=text: path.write_text(text, encoding="utf-8"))
    return markdown


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

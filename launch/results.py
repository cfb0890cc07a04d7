"""The table of launch/reproduce.py: test metrics, paired differences, costs and trials of all finished runs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import budgets
import commands
import models
import numpy as np
from models import BASE, DATASETS, FUSION, MODELS, SASREC, VALIDATIONS, Budget, Plan
from search import METRIC, Search

from iam_jax.errors import InputError
from iam_jax.runs import compare
from iam_jax.storage.files import write_atomically

METRICS = ("ndcg@10", "hr@10")
COST = {  # name in the table -> format
    "parameters": ",.0f",
    "steps": ",.0f",
    "tokens seen": ",.0f",
    "epochs": ".1f",
    "minutes": ".1f",
    "minutes measured": ".1f",
    "s per step": ".3f",
}
FUSED = f" + {FUSION}"  # after the name of a model: its runs, fused with the baseline
ORACLE = "oracle"  # the best possible score of the synthetic shop, which is not a baseline
MARK = "†"  # of rows with another number of trials, seeds or steps than the budget says

Runs = Mapping[int, compare.Finished]  # by seed


def seed_runs(plan: Plan, data: str, model: str, budget: Budget, trial: dict, seeds: Any) -> dict[int, tuple[Path, list[str]]]:
    """Returns {seed: (working folder, flags)} of a model's runs with the setting of a trial, or {} before its calibration."""
    found = budgets.measured(plan, data, model, trial["setting"])
    if found is None:
        return {}
    steps = budgets.steps_of(budget, found)
    prefix = plan.folder / data / model / run_prefix(plan, budget, trial)
    folders = {seed: prefix.with_name(f"{prefix.name}{seed}") for seed in seeds}
    return {
        seed: budgets.command(plan, data, model, folder, trial["setting"], steps, seed, trial=False) for seed, folder in folders.items()
    }


def run_prefix(plan: Plan, budget: Budget, trial: dict) -> str:
    return f"{budget.name}-trial{trial['trial']}of{plan.comparisons[budget].name}-seed"


def all_seeds(plan: Plan, data: str, model: str, budget: Budget, trial: dict) -> list[int]:
    """Returns the seeds of the plan and those of the runs in the folder, sorted."""
    prefix = run_prefix(plan, budget, trial)
    found = {path.name.removeprefix(prefix).removesuffix(".command") for path in (plan.folder / data / model).glob(f"{prefix}*.command")}
    return sorted({*plan.seeds, *(int(seed) for seed in found if seed.isdecimal())})


# ---- collection


class Results:
    """Collects finished runs. It keeps what it has read and compared, so that a table after every run costs little."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._read: dict[tuple, compare.Finished] = {}
        self._compared: dict[tuple, dict | None] = {}

    def collect(self) -> dict:
        """Collects the results of all data sets that are in the plan or in the folder.

        Returns:
          {data set: {"split_sha256", "protocol", "best_baseline", "searches": {budget of a trial: {model: trials}},
          "comparisons": {budget of a run: {model or baseline: row}}}}. The row of a model contains its setting, seeds, diverged seeds, test
          metrics by seed, mean and sd over seeds, the paired differences over common seeds, its cost by seed, and reasons why its
          budget is not that of the comparison. The row is None if nothing has been run. The row of a model and FUSED has the metrics of its
          fused runs, and the difference to the model as well.
        """
        out = {}
        for data in (data for data in DATASETS if data in self.plan.data or (self.plan.folder / data).is_dir()):
            shown = [model for model in MODELS if self.plan.available(data, model)]
            searches = {
                budget: {model: Search(self.plan, data, model, budget).trials() for model in shown}
                for budget in dict.fromkeys(self.plan.comparisons.values())
            }
            parts = {budget: self._finished(data, budget, searches[trial]) for budget, trial in self.plan.comparisons.items()}
            named = [
                (f"{budget.name} of {model}, seed {seed}", run)
                for budget, part in parts.items()
                for model, (_, runs, _) in part.items()
                for seed, run in runs.items()
            ]
            for name, run in named[1:]:
                if difference := compare.differing(named[0][1], run, (named[0][0], name)):
                    raise InputError(f"{self.plan.folder / data}: runs that cannot be compared: {difference}")
            source = next((run for _, run in named if len(run.evaluation["results"]) > 1), None)
            best = best_baseline(source)
            out[data] = {name: named[0][1].evaluation[name] if named else None for name in ("split_sha256", "protocol")}
            out[data] |= {
                "best_baseline": best,
                "searches": {budget.name: {m: trials for m, trials in search.items() if trials} for budget, search in searches.items()},
                "comparisons": {
                    budget.name: self._rows(data, budget, part, searches[self.plan.comparisons[budget]], source, best)
                    for budget, part in parts.items()
                },
            }
        return out

    def _finished(self, data: str, budget: Budget, trials: dict[str, list[dict]]) -> dict[str, tuple[dict | None, dict, list[int]]]:
        """Returns {model: (chosen trial, {seed: run}, diverged seeds)}."""
        found = {}
        for model, tried in trials.items():
            trial = Search(self.plan, data, model, self.plan.comparisons[budget]).chosen(tried)
            seeds = all_seeds(self.plan, data, model, budget, trial) if trial else []
            planned = seed_runs(self.plan, data, model, budget, trial, seeds) if trial else {}
            done = {seed: workdir for seed, (workdir, flags) in planned.items() if commands.finished(workdir, flags)}
            diverged = [seed for seed, workdir in done.items() if commands.diverged(workdir)]
            found[model] = trial, {seed: self._open(workdir) for seed, workdir in done.items() if seed not in diverged}, diverged
        return found

    def _rows(self, data: str, budget: Budget, part: dict, trials: dict, source: compare.Finished | None, best: str | None) -> dict:
        runs = {model: runs for model, (_, runs, _) in part.items()}
        ranked = source.baseline(best) if source and best else None
        rows, against = {}, {BASE: runs.get(BASE, {}), "best_baseline": ranked, SASREC: runs.get(SASREC, {})}
        for model, (trial, finished, diverged) in part.items():
            rows[model] = None
            if trials[model] or finished:
                rows[model] = {"trials": len(trials[model]), "diverged": diverged}
            if finished:
                rows[model] |= self._row(data, model, trial, finished)
                rows[model]["difference"] = {
                    name: self._compare(finished, other) for name, other in against.items() if name != model and other
                }
        seeds = max((len(row["seeds"]) + len(row["diverged"]) for row in rows.values() if row and "seeds" in row), default=0)
        for model, row in rows.items():
            if row:
                found = part[model][0] and budgets.measured(self.plan, data, model, part[model][0]["setting"])
                row["unequal"] = unequal(self.plan, budget, row, trials[model], seeds, found)
        rows |= {f"{model}{FUSED}": row for model in MODELS if (row := self._fused_row(rows.get(model), runs.get(model, {}), against))}
        for name in [name for name in source.evaluation["results"] if name not in ("model", "fusion")] if source else []:
            test, own = source.evaluation["results"][name].get("test"), source.baseline(name)
            if test:
                differences = {
                    other: self._compare(dict.fromkeys(of, own) if isinstance(of, dict) else {0: own}, of)
                    for other, of in against.items()
                    if own and of and not (other == "best_baseline" and name == best)
                }
                rows[name] = {"mean": {metric: test[metric] for metric in METRICS}, "test": test, "difference": differences}
        return rows

    def _row(self, data: str, model: str, trial: dict, runs: dict[int, compare.Finished]) -> dict:
        found = budgets.measured(self.plan, data, model, trial["setting"])
        return {
            "chosen": trial["trial"],
            "setting": trial["setting"],
            **_metrics(runs, "model"),
            "cost": {
                seed: {
                    "parameters": run.cost["parameters"],
                    "steps": run.cost["steps"],
                    "tokens seen": run.cost["tokens_seen"],
                    "epochs": run.cost["steps"] / found.epoch,
                    "minutes": found.minutes(run.cost["steps"]),
                    "minutes measured": run.cost["minutes"],
                    "s per step": found.seconds,
                }
                for seed, run in runs.items()
            },
        }

    def _fused_row(self, own: dict | None, runs: Runs, against: dict[str, Any]) -> dict | None:
        """The row of a model's runs that are fused with a baseline; None without one. own: the row of the model."""
        fused = {seed: ranked for seed, run in runs.items() if (ranked := run.baseline("fusion"))}
        if not fused:
            return None
        difference = {name: self._compare(fused, other) for name, other in (against | {"model": runs}).items() if other}
        return _metrics(fused, "fusion") | {
            "diverged": (own or {}).get("diverged", []),
            "difference": difference,
            "unequal": (own or {}).get("unequal"),
        }

    def _open(self, workdir: Path) -> compare.Finished:
        key = workdir, (workdir / "evaluation.json").stat().st_mtime_ns
        if key not in self._read:
            self._read[key] = compare.read(workdir)
        return self._read[key]

    def _compare(self, one: Runs, other: Any) -> dict | None:
        """Paired difference one - other. other: runs by seed, or the ranks of a baseline, which are the same for all seeds."""
        other = other if isinstance(other, dict) else dict.fromkeys(one, other)
        key = tuple(tuple((seed, id(run.evaluation), _column(run)) for seed, run in runs.items()) for runs in (one, other))
        if key not in self._compared:
            self._compared[key] = compare.over_seeds(one, other)
        return self._compared[key]


def _metrics(runs: Runs, name: str) -> dict:
    """Seeds, test metrics by seed, and their mean and deviation. name: model | fusion."""
    by_seed = {seed: run.evaluation["results"][name]["test"] for seed, run in runs.items()}
    values = {metric: np.array([test[metric] for test in by_seed.values()]) for metric in METRICS}
    return {
        "seeds": list(by_seed),
        "test": by_seed,
        "mean": {metric: float(value.mean()) for metric, value in values.items()},
        "sd": {metric: float(value.std(ddof=1)) if len(value) > 1 else None for metric, value in values.items()},
    }


def _column(run: compare.Finished) -> int:
    """Distinguishes the ranks of a run from those of its baselines."""
    return int(run.ranks["rank"].hash().sum())


def best_baseline(source: compare.Finished | None) -> str | None:
    """Returns the baseline with the best validation metric, among those whose ranks are stored."""
    results = source.evaluation["results"] if source else {}
    values = {
        name: result["validation"][METRIC]
        for name, result in results.items()
        if name not in ("model", "fusion", ORACLE) and METRIC in result.get("validation", {}) and source and source.baseline(name)
    }
    return max(values, key=values.__getitem__) if values else None


def unequal(plan: Plan, budget: Budget, row: dict, trials: list[dict], seeds: int, found: budgets.Measured | None) -> list[str]:
    """Returns the reasons why a row has not had the budget of its comparison; an equal row has none.

    seeds: the number of seeds of the other rows. found: the calibration of its setting.
    """
    reasons, tried = [], [trial for trial in trials if trial["state"] != "unfinished"]
    if len(tried) != plan.trials:
        reasons.append(f"{len(tried)} of {plan.trials} trials")
    if uneven := [trial["trial"] for trial in tried if not trial.get("equal_budget", True)]:
        reasons.append(f"trials {', '.join(map(str, uneven))} are not of {plan.comparisons[budget]}")
    if short := [t["trial"] for t in tried if t["state"] == "finished" and t["steps"] != t.get("planned_steps", t["steps"])]:
        reasons.append(f"trials {', '.join(map(str, short))} ended early")
    if "seeds" in row and len(row["seeds"]) + len(row["diverged"]) != seeds:
        reasons.append(f"{len(row['seeds']) + len(row['diverged'])} of {seeds} seeds")
    for seed, cost in row.get("cost", {}).items():
        if found and not budgets.is_equal(budget, cost["steps"], found):
            reasons.append(f"seed {seed}: {cost['epochs']:.2f} epochs, {cost['minutes']:.2f} minutes instead of {budget}")
    return reasons


# ---- the table


def format_markdown(plan: Plan, table: dict) -> str:
    lines = [
        "Test metrics of the setting that is best on validation. Brackets are 95 % intervals over users, for these seeds. Minutes are "
        "training steps times the seconds of a step in the calibration; measured minutes contain validations and other load. Empty cells "
        "were not run."
    ]
    for data, result in table.items():
        split = f", split {result['split_sha256'][:8]}…" if result["split_sha256"] else ""
        lines += ["", f"## {data}{split}"]
        for budget, trial in plan.comparisons.items():
            title = f"Equal {budget.unit}: {plan.trials} trials of {trial} for every model, then {budget} per seed"
            lines += ["", f"### {title}", "", *_comparison(result["comparisons"][budget.name], result["best_baseline"])]
        for trial in dict.fromkeys(plan.comparisons.values()):
            lines += ["", f"### Trials of {trial}", "", *_trials(result, plan, trial)]
    return "\n".join(lines) + "\n"


def _comparison(rows: dict, best: str | None) -> list[str]:
    others = {BASE: MODELS[BASE].title, "best_baseline": f"{best or 'the best baseline'} (best baseline on validation)", SASREC: "SASRec"}
    head = ["", "setting", "seeds", *(f"{metric.upper()}, mean ± sd" for metric in METRICS)]
    head += [*(f"{METRIC.upper()} minus {other}" for other in others.values()), *COST]
    lines, notes = _table(head), []
    for name, row in rows.items():
        model, fused = name.removesuffix(FUSED), FUSED * name.endswith(FUSED)
        title = MODELS[model].title + fused if model in MODELS else name
        if row and row.get("unequal"):
            notes += [] if fused else [f"{title}: {'; '.join(row['unequal'])}."]
            title = f"{title} {MARK}"
        lines.append("| " + " | ".join([title, *_cells(row, others)]) + " |")
    if notes:
        lines += ["", f"{MARK} Rows that have not had the same budget:", "", *(f"- {note}" for note in notes)]
    return lines


def _cells(row: dict | None, others: dict) -> list[str]:
    row = row or {}
    lost = f"{', '.join(map(str, row['diverged']))} diverged" if row.get("diverged") else ""
    if "mean" not in row:
        return ["", lost, *[""] * (len(METRICS) + len(others) + len(COST))]
    between = []
    for other in others:
        delta, cell = row["difference"].get(other), ""
        if delta:
            low, high = delta[f"{METRIC}_ci"] or (np.nan, np.nan)
            cell = f"{delta[METRIC]:+.4f} [{low:+.4f}, {high:+.4f}]"
        between.append(cell)
    if "seeds" not in row:  # a baseline
        return ["", "", *(f"{row['mean'][metric]:.4f}" for metric in METRICS), *between, *[""] * len(COST)]
    shown = [f"{row['mean'][m]:.4f}" + (f" ± {row['sd'][m]:.4f}" if row["sd"][m] is not None else "") for m in METRICS]
    cost = list(row.get("cost", {}).values())
    costs = [format(float(np.mean([one[name] for one in cost])), form) if cost else "" for name, form in COST.items()]
    seeds = ", ".join(map(str, row["seeds"])) + f"; {lost}" * bool(lost)
    return [setting_text(row.get("setting", {})), seeds, *shown, *between, *costs]


def _trials(result: dict, plan: Plan, budget: Budget) -> list[str]:
    chosen = {
        model: row["chosen"]
        for run, trial in plan.comparisons.items()
        if trial == budget
        for model, row in result["comparisons"][run.name].items()
        if row and "chosen" in row
    }
    name = METRIC.upper()
    lines = _table(["", "trial", "setting", f"{name} at each validation", f"validation {name}", "state", "steps", *models.UNITS])
    for model, trials in result["searches"][budget.name].items():
        for trial in trials:
            value, count = trial[f"validation_{METRIC}"], len(trial["validations"])
            state = f"pruned after {count} of {VALIDATIONS}" if trial["state"] == "pruned" else trial["state"]
            cells = [MODELS[model].title, str(trial["trial"]), setting_text(trial["setting"])]
            cells += [" ".join(f"{value:.4f}" for value in trial["validations"]), "" if value is None else f"{value:.4f}"]
            cells += [state + ", chosen" * (chosen.get(model) == trial["trial"]), f"{trial['steps']:,}"]
            cells += [f"{trial[name]:.2f}" if name in trial else "" for name in models.UNITS]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _table(head: list[str]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]


def setting_text(setting: dict[str, Any]) -> str:
    """Returns a setting in words: the last parts of the fields' names, and their values."""
    return ", ".join(
        f"{name.split()[0].rpartition('.')[2].replace('_', ' ')} {value:g}"
        if isinstance(value, float)
        else f"{name.split()[0].rpartition('.')[2].replace('_', ' ')} {value}"
        for name, value in setting.items()
    )


def write(plan: Plan, results: Results) -> str:
    """Writes reproduction.json and reproduction.md and returns the latter."""
    table = results.collect()
    comparisons = {run.name: {"run": run._asdict(), "trial": trial._asdict()} for run, trial in plan.comparisons.items()}
    budget = {"comparisons": comparisons, "trials": plan.trials, "seeds": plan.seeds, "models": plan.models, "rest": plan.rest}
    markdown = format_markdown(plan, table)
    texts = {"json": json.dumps({"budget": budget, "data": table}, indent=2) + "\n", "md": markdown}
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        for ending, text in texts.items():
            write_atomically(plan.folder / f"reproduction.{ending}", lambda path, text=text: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--folder={plan.folder}: cannot be written ({error.strerror})") from error
    return markdown

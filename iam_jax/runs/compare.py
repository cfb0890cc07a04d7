"""Compares finished runs in one table: every metric with its interval, paired differences to the first run, and the cost of each run.

Runs can be compared if split hash, candidates and protocol are equal; others are refused. Differences are between the ranks of the same
target events (`ranks.parquet`, `baselines.parquet`), with the bootstrap over users of the first run. The table also has the baselines of
the first run.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from iam_jax.errors import InputError
from iam_jax.ranking import metrics
from iam_jax.storage.files import make_folder, parquet_source, to_path, write_atomically
from iam_jax.storage.remote import is_remote

_EVENT = ["split", "user", "timestamp", "target"]
_LOSSES = ("token_loss", "text_loss")  # of the validation, if a run has the token objective
_COST = {  # field of run.json -> its name in the table
    "step": "step evaluated",
    "parameters": "parameters",
    "trained": "of them trained",
    "steps": "steps trained",
    "tokens_seen": "tokens seen",
    "minutes": "training minutes",
}


@dataclasses.dataclass(frozen=True)
class Finished:
    """The results in the working folder of an evaluated run."""

    evaluation: dict
    ranks: pl.DataFrame
    cost: dict  # run.json; empty for a run of a version without it
    baselines: pl.DataFrame | None = None  # rank and ties of each baseline, in the order of `ranks`
    items_sha256: str | None = None  # of the candidates' ids

    @property
    def identity(self) -> dict:
        """What two runs must have in common (the candidates only if both have stored them)."""
        protocol = {"ties": "hash", "duplicates": "keep"} | self.evaluation["protocol"]  # of runs of a version without these settings
        protocol = {f"protocol.{name}": value for name, value in protocol.items()}
        return {"split_sha256": self.evaluation["split_sha256"], "items_sha256": self.items_sha256} | protocol

    @property
    def bootstrap(self) -> dict:
        return self.evaluation.get("bootstrap", {"resamples": 1000, "seed": 0})

    def baseline(self, name: str) -> "Finished | None":
        """The same events ranked by a baseline; None if its ranks are not stored."""
        own = None if self.baselines is None else self.baselines.filter(pl.col("name") == name)
        if own is None or len(own) != len(self.ranks):
            return None
        return dataclasses.replace(self, ranks=self.ranks.with_columns(own["rank"], own["ties"]), cost={})


def differing(one: Finished, other: Finished, names: tuple[str, str]) -> str:
    """The differences of two runs' identities, in words; empty if there is none."""
    here, there = one.identity, other.identity
    if None in (here["items_sha256"], there["items_sha256"]):
        here["items_sha256"] = there["items_sha256"] = None
    keys = [key for key in here | there if here.get(key) != there.get(key)]
    return "; ".join(f"{key} is {_short(here.get(key))} in {names[0]}, {_short(there.get(key))} in {names[1]}" for key in keys)


def read(folder: Path) -> Finished:
    """Reads the results of a run. Raises InputError if `folder` is not the working folder of an evaluated run."""
    for name in ("evaluation.json", "ranks.parquet"):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: no {name} there: not the working folder of an evaluated run")
    try:
        evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        _ = evaluation["split_sha256"], evaluation["protocol"]["ks"], evaluation["step"], evaluation["results"]["model"]
        optional = (folder / name for name in ("run.json", "data.json"))
        cost, data = (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {} for path in optional)
        ranks = pl.read_parquet(parquet_source(folder / "ranks.parquet"))
        ranks.select(*_EVENT, "rank", "ties")
        baselines = folder / "baselines.parquet"
        baselines = pl.read_parquet(parquet_source(baselines)) if baselines.exists() else None
        if baselines is not None:
            baselines.select("name", "rank", "ties")
        run = Finished(evaluation, ranks, cost, baselines, data.get("items_sha256"))
        test = evaluation["results"]["model"].get("test", {})
        of_ranks = {name: value.mean() for name, value in event_metrics(run, "test").items()} if test else {}
    except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
        raise InputError(f"{folder}: the results of its evaluation cannot be read ({type(error).__name__}: {error})") from error
    if any(abs(value - test[name]) > 1e-9 for name, value in of_ranks.items()):
        raise InputError(f"{folder}: ranks.parquet and evaluation.json are from two evaluations, one of them interrupted; evaluate again")
    return run


def named(folders: Sequence[str | Path]) -> dict[str, Path]:
    """The folders, named by the shortest ends of their paths that differ. Raises InputError for fewer than two folders and for repeats."""
    if len(folders) < 2:
        raise InputError(f"--runs={','.join(map(str, folders))}: a comparison needs two working folders or more")
    folders = [to_path(folder) for folder in folders]
    parts = [(folder if is_remote(folder) else Path(os.path.abspath(folder))).parts for folder in folders]
    if len(set(parts)) < len(parts):
        twice = next(folder for k, folder in enumerate(folders) if parts[k] in parts[:k])
        raise InputError(f"--runs: {twice} is given twice")
    length = next(n for n in range(1, max(map(len, parts)) + 1) if len({part[-n:] for part in parts}) == len(parts))
    return {"/".join(part[-length:]): folder for part, folder in zip(parts, folders, strict=True)}


def collect(runs: Mapping[str, Path]) -> dict:
    """Reads the runs, {name: working folder}, and compares them. The result is plain JSON:

      split_sha256, protocol, bootstrap: of all runs, of the first;
      runs: {name: {"step", "parameters", "trained", "steps", "tokens_seen", "minutes"}}, None for what a run has not stored;
      results: {"validation" and "test", where there are such events: {name, and the first run's baselines: summary}};
      difference: {split: {name: metrics.paired_difference to the first run}}.

    Raises InputError for a folder without an evaluation, and for runs with different splits, protocols or bootstraps; it names them.
    """
    finished = {name: read(to_path(folder)) for name, folder in runs.items()}
    first_name, first = next(iter(finished.items()))
    for name, run in finished.items():
        if what := differing(first, run, (first_name, name)):
            raise InputError(f"{runs[name]} cannot be compared with {runs[first_name]}: {what}")
        if run.bootstrap != first.bootstrap:  # one table, one kind of interval
            settings = f"{run.bootstrap} in {name}, {first.bootstrap} in {first_name}"
            raise InputError(
                f"{runs[name]}: the intervals have other settings ({settings}); evaluate both with the same eval.resamples and eval.seed"
            )
        if not run.ranks.select(_EVENT).equals(first.ranks.select(_EVENT)):
            raise InputError(f"{runs[name]}: ranks.parquet has other events than that of {runs[first_name]}; evaluate both again")
    # A run may have the name of a baseline.
    shown = {name: f"{name}'" if name in runs else name for name in first.evaluation["results"] if name != "model"}
    compared = finished | {shown[name]: run for name in shown if (run := first.baseline(name))}
    results, difference = {}, {}
    for split in [split for split in ("validation", "test") if split in first.evaluation["results"]["model"]]:
        results[split] = {name: run.evaluation["results"]["model"][split] for name, run in finished.items()}
        baselines = {name: first.evaluation["results"][name] for name in shown}
        results[split] |= {shown[name]: result[split] for name, result in baselines.items() if split in result}
        per_event = {name: event_metrics(run, split) for name, run in compared.items()}
        users = first.ranks.filter(pl.col("split") == split)["user"].to_numpy()
        difference[split] = {
            name: metrics.paired_difference(users, values, per_event[first_name], **first.bootstrap)
            for name, values in per_event.items()
            if name != first_name
        }
    return {
        "split_sha256": first.evaluation["split_sha256"],
        "protocol": first.evaluation["protocol"],
        "bootstrap": first.bootstrap,
        "runs": {name: {key: {"step": run.evaluation["step"], **run.cost}.get(key) for key in _COST} for name, run in finished.items()},
        "results": results,
        "difference": difference,
    }


def event_metrics(run: Finished, split: str) -> dict:
    """{metric: [n]} for the run's target events of one split."""
    ranks = run.ranks.filter(pl.col("split") == split)
    return metrics.ranking_metrics(ranks["rank"].to_numpy(), ranks["ties"].to_numpy(), run.evaluation["protocol"]["ks"])


def over_seeds(one: Mapping[int, Finished], other: Mapping[int, Finished], split: str = "test") -> dict | None:
    """Paired difference one - other over the seeds that both have; None without such a seed. one, other: {seed: run}.

    The bootstrap draws a user with the events of all seeds: the interval is over users, for these seeds.
    "by_seed": {seed: {metric: difference}}.
    """
    seeds = [seed for seed in one if seed in other]
    if not seeds:
        return None
    users, values = [], ([], [])
    for seed in seeds:
        parts = [run.ranks.filter(pl.col("split") == split) for run in (one[seed], other[seed])]
        if not parts[0].select("user", "timestamp", "target").equals(parts[1].select("user", "timestamp", "target")):
            raise InputError(f"seed {seed}: the two runs' ranks.parquet have different events; evaluate both again")
        users.append(parts[0]["user"].to_numpy())
        for run, per_event in zip((one[seed], other[seed]), values, strict=True):
            per_event.append(event_metrics(run, split))
    joined = [{name: np.concatenate([part[name] for part in parts]) for name in parts[0]} for parts in values]
    by_seed = {
        seed: {name: float(np.mean(a[name] - b[name])) for name in a} for seed, a, b in zip(seeds, *values, strict=True) if len(users[0])
    }
    here, there = joined
    difference = metrics.paired_difference(np.concatenate(users), here, there, **one[seeds[0]].bootstrap)
    return {"seeds": seeds, "by_seed": by_seed, **difference}


def table(comparison: dict) -> list[list[str]]:
    """Rows of cells, the first row is the header. There is a column for each run and baseline, and there are rows of metrics, differences
    and costs. Metrics are of the test events, or of the validation events if there are no test events."""
    split = "test" if "test" in comparison["results"] else "validation"
    results, difference = comparison["results"].get(split, {}), comparison["difference"].get(split, {})
    runs, columns = comparison["runs"], [*comparison["runs"], *(name for name in results if name not in comparison["runs"])]
    first = next(iter(runs))
    ks = comparison["protocol"]["ks"]
    rows = [[split, *columns]]
    for metric in [f"{name}@{k}" for name in ("ndcg", "hr", "mrr", "precision") for k in ks]:
        rows.append([metric.upper(), *(_cell(results.get(name, {}), metric, "{:.4f}") for name in columns)])
        rows.append([f"  minus {first}", *(_cell(difference.get(name, {}), metric, "{:+.4f}") for name in columns)])
    rows.append(["ties", *(_value(results.get(name, {}).get("tie_rate"), "{:.2%}") for name in columns)])
    for metric in [f"{name}@{k}" for name in ("ndcg", "hr") for k in ks if k in (10, ks[-1])]:
        for part, what in (("cold", "cold items"), ("new", "new targets"), ("repeated", "repeated targets")):
            summaries = [results.get(name, {}).get(part, {}) for name in columns]
            if part == "cold" or any(results.get(name, {}).get("repeated", {}).get("events") for name in columns):
                rows.append([f"{metric.upper()}, {what}", *(_value(summary.get(metric), "{:.4f}") for summary in summaries)])
    for loss in _LOSSES:
        of = [comparison["results"].get("validation", {}).get(name, {}).get(loss) for name in columns]
        if any(value is not None for value in of):
            rows.append([f"validation {loss}", *(_value(value, "{:.4f}") for value in of)])
    for key, what in _COST.items():
        form = "{:.1f}" if key == "minutes" else "{:,}"
        rows.append([what, *(_value(runs.get(name, {}).get(key), form) for name in columns)])
    return rows


def format_text(comparison: dict) -> str:
    """The table as plain text."""
    rows = table(comparison)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([_title(comparison), lines[0], "  ".join("-" * width for width in widths), *lines[1:]]) + "\n"


def format_markdown(comparison: dict) -> str:
    """The table in Markdown."""
    rows = [[cell.strip().replace("|", "\\|") for cell in row] for row in table(comparison)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([_title(comparison), "", lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def write(comparison: dict, folder: Path) -> None:
    """Writes comparison.json, comparison.md and comparison.txt. Raises InputError if the folder cannot be written."""
    texts = {"json": json.dumps(comparison, indent=2) + "\n", "md": format_markdown(comparison), "txt": format_text(comparison)}
    try:
        make_folder(folder)
        for ending, text in texts.items():
            write_atomically(folder / f"comparison.{ending}", lambda path, text=text: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--output={folder}: cannot be written ({error.strerror})") from error


def _title(comparison: dict) -> str:
    results = comparison["results"].get("test") or comparison["results"]["validation"]
    first, protocol = next(iter(results.values())), comparison["protocol"]
    sizes = f"{first['users']:,} users, {first['events']:,} events, {protocol['candidates']:,} candidates"
    resamples = comparison["bootstrap"]["resamples"]
    return f"split {comparison['split_sha256']}: {sizes}; [95 % intervals over users, {resamples:,} resamples]"


def _cell(summary: Mapping, metric: str, form: str) -> str:
    interval = summary.get(f"{metric}_ci")
    return _value(summary.get(metric), form) + (" [" + ", ".join(form.format(bound) for bound in interval) + "]" if interval else "")


def _value(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _short(value: object) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 16 else repr(value)

"""All baselines by name, and the choice of their settings on validation.

A baseline with settings has a grid. The search goes from coarse to fine, one setting at a time: first over every second value, then to the
neighbours of the best point, in two passes. Every evaluated point is recorded with its validation metric (`eval.metric`).

Counts are made of training events only, for the choice and for test. Histories include all events before the target, as those of models
do: for a test target, the validation event, too.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from iam_jax.config import Config
from iam_jax.data.splits import VALIDATION, Events, Split, subset_of_users
from iam_jax.ranking import baselines, metrics
from iam_jax.ranking.baselines import ScoreFunction
from iam_jax.ranking.transitions import PairCounts, rules, transitions
from iam_jax.registry import Registry
from iam_jax.storage.files import write_atomically

RECORDS_FILE = "baselines.json"
_USERS = 4000  # of the choice, if eval.validation_users is 0
_PASSES = 2  # of the fine search over all settings

Settings = dict[str, float]
Grid = Mapping[str, Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A scorer that is counted from training events.

    Attributes:
      name: in evaluations and of `--baseline`.
      make: returns, for all events, the function that makes a scorer from the settings. It may keep what several settings share.
      grid: the values of each setting, ascending; empty without settings.
      start: the point of the grid where the search starts; the settings if there is no validation event.
    """

    name: str
    make: Callable[[Events], Callable[..., ScoreFunction]]
    grid: Grid = dataclasses.field(default_factory=dict)
    start: Mapping[str, float] = dataclasses.field(default_factory=dict)


def _make_transitions(events: Events) -> Callable[..., ScoreFunction]:
    return functools.partial(transitions, events, PairCounts(events))


def _make_rules(events: Events) -> Callable[..., ScoreFunction]:
    return functools.partial(rules, events, PairCounts(events))


_OWN = (
    Baseline("popularity", lambda events: lambda: baselines.popularity(events)),
    Baseline("last_item", lambda events: lambda: baselines.last_item_transitions(events)),
    Baseline("item_knn", lambda events: lambda: baselines.item_knn(events)),
    Baseline(
        "transitions",
        _make_transitions,
        {
            "window": (1, 2, 5, 10, 20, 50),
            "power": (0.0, 0.5, 1.0, 2.0),
            "tau": (0.02, 0.1, 0.4, 1.0, 4.0, 20.0),
            "last": (1, 3, 7, 20, 50, 200),
            "decay": (0.4, 0.6, 0.75, 0.85, 0.95, 1.0),
            "share": (0.4, 0.6, 0.8, 0.9, 1.0),
            "popularity": (-0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.3),
        },
        {"window": 10, "power": 0.5, "tau": 1.0, "last": 20, "decay": 0.75, "share": 0.9, "popularity": 0.0},
    ),
    Baseline(
        "rules",
        _make_rules,
        {"window": (1, 2, 5, 10, 20, 50), "last": (1, 2, 3, 5, 10, 20, 50), "decay": (0.4, 0.6, 0.75, 0.85, 0.95, 1.0)},
        {"window": 10, "last": 3, "decay": 0.75},
    ),
)

BASELINES: Registry[Baseline] = Registry("baseline", {baseline.name: baseline for baseline in _OWN})


def search(grid: Grid, start: Settings, metric: Callable[[Settings], float]) -> list[tuple[Settings, float]]:
    """Looks for the point of a grid with the largest metric, one setting at a time.

    Args:
      grid: the values of each setting, ascending.
      start: a point of the grid.
      metric: is called once for each evaluated point.

    Returns:
      The evaluated points with their metrics, in the order of evaluation. Among equal metrics, the first is the best (`best`).
    """
    found: dict[tuple[int, ...], float] = {}
    names = list(grid)

    def value(point: tuple[int, ...]) -> float:
        if point not in found:
            found[point] = metric({name: grid[name][at] for name, at in zip(names, point, strict=True)})
        return found[point]

    def improved(point: tuple[int, ...], axis: int, places: Sequence[int]) -> tuple[int, ...]:
        for place in places:
            other = (*point[:axis], place, *point[axis + 1 :])
            if 0 <= place < len(grid[names[axis]]) and value(other) > value(point):
                point = other
        return point

    point = tuple(list(grid[name]).index(start[name]) for name in names)
    value(point)
    for axis, name in enumerate(names):
        point = improved(point, axis, range(point[axis] % 2, len(grid[name]), 2))
    for _ in range(_PASSES):
        for axis in range(len(names)):
            point = improved(point, axis, (point[axis] - 1, point[axis] + 1))
    return [({name: grid[name][at] for name, at in zip(names, place, strict=True)}, value) for place, value in found.items()]


def choose(baseline: Baseline, events: Events, config: Config, poll: Callable[[], object] = lambda: None) -> dict:
    """Chooses the settings of a baseline on validation, and returns the record of the choice as JSON values:

      conditions: what the choice depends on, apart from the events: the metric, the number of users of `eval.validation_users` (4,000 if
        that is 0 and there are more), filter_seen and the seed of the users;
      grid: the values of each setting;
      trials: [settings and "value", the metric on validation], in the order of the search;
      settings: the chosen ones; value: their metric, None without a validation event.

    poll: is called after each chunk of targets.
    """
    record = {"conditions": conditions(config), "grid": {name: list(values) for name, values in baseline.grid.items()}, "trials": []}
    targets = targets_of_choice(events, config)
    if not baseline.grid or not len(targets):
        return record | {"settings": dict(baseline.start), "value": None}
    make = baseline.make(events)
    name, _, k = config.eval.metric.partition("@")

    def metric(settings: Settings) -> float:
        ranks = baselines.evaluate(make(**settings), events, targets, config.eval.filter_seen, lambda _: poll())
        return float(np.mean(metrics.ranking_metrics(*ranks, [int(k)])[f"{name}@{k}"]))

    trials = search(baseline.grid, dict(baseline.start), metric)
    settings, value = max(trials, key=lambda trial: trial[1])
    return record | {"trials": [settings | {"value": value} for settings, value in trials], "settings": settings, "value": value}


def choose_or_read(baseline: Baseline, split: Split, config: Config, workdir: Path, poll: Callable[[], object] = lambda: None) -> dict:
    """`choose`, or its record of an earlier evaluation in the working folder, if that depends on the same split, conditions and grid."""
    record = read_records(split, workdir).get(baseline.name)
    grid = {name: list(values) for name, values in baseline.grid.items()}
    if isinstance(record, dict) and record.get("conditions") == conditions(config) and record.get("grid") == grid:
        return record
    return choose(baseline, split.events, config, poll)


def read_records(split: Split, workdir: Path) -> dict[str, dict]:
    """The records in a working folder, {name: record}; {} if there are none of this split."""
    try:
        saved = json.loads((workdir / RECORDS_FILE).read_text(encoding="utf-8"))
        return dict(saved["baselines"]) if saved["split_sha256"] == split.sha256 else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def write_records(records: Mapping[str, dict], split: Split, workdir: Path) -> None:
    """Writes the records of `choose` to the working folder."""
    text = json.dumps({"split_sha256": split.sha256, "baselines": records}, indent=2) + "\n"
    write_atomically(workdir / RECORDS_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def describe(name: str, record: dict) -> str:
    """The choice in one line."""
    settings = ", ".join(f"{setting} {value:g}" for setting, value in record["settings"].items())
    if record["value"] is None:
        return f"{name}: {settings} (not chosen: no validation event)"
    metric = f"validation {record['conditions']['metric']} {record['value']:.4f}"
    return f"{name}: {settings} ({metric}, the best of {len(record['trials'])} points)"


def targets_of_choice(events: Events, config: Config) -> np.ndarray:
    """The validation targets on which settings are chosen."""
    return subset_of_users(events, VALIDATION, config.eval.validation_users or _USERS, config.eval.seed)


def conditions(config: Config) -> dict:
    """What a choice on validation depends on, apart from the events (`choose`)."""
    evaluation = config.eval
    names = ("metric", "filter_seen", "validation_users", "seed")
    return {name: getattr(evaluation, name) for name in names}

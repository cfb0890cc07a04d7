"""Fusion of a trained model with a baseline: the score of item a after history h is s(h, a) + w · S(h, a).

s is the score of the item objective, and S that of the baseline (`eval.fusion`), with the settings that were chosen for the baseline alone
(choice.py). The weight w is chosen on validation after training. S is a dense block of scores of a few histories (`core.Bonus`), so
evaluation, scoring and the Python API rank fused scores by the same programs, with one more argument.

The weights of the grid are 0 and the powers of two around the ratio of the ranges of s and S (`range_ratio`). While the best weight is at
an end of the grid, the grid grows there. Only validation events are read. The record of the choice is `fusion.json` in the working folder.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from iam_jax.config import Config
from iam_jax.data.splits import Events, Split
from iam_jax.ranking.choice import conditions
from iam_jax.ranking.core import Bonus, Ranker
from iam_jax.ranking.transitions import HistorySums
from iam_jax.storage.files import write_atomically

FILE = "fusion.json"
_AROUND = 3  # powers of two on each side of the ratio, in the first grid
_MORE = 8  # weights by which the grid can grow
_SAMPLE = 256, 1024  # histories, and items of each, for the ranges

NOT_CHOSEN = {"ratio": None, "grid": [0.0], "trials": [], "weight": 0.0, "value": None}  # without a validation event


@dataclasses.dataclass(frozen=True)
class Fusion:
    """What is added to the model's scores."""

    sums: HistorySums
    weight: float  # w
    settings: dict = dataclasses.field(default_factory=dict)  # of the baseline

    def bonus(self, events: Events, targets: np.ndarray, items: int) -> Bonus | None:
        """w · S for the histories of the targets, as `Ranker` adds it; None if w is 0, so that the ranks are the model's.

        Args:
          events: all events; items of histories that the baseline has not counted are allowed.
          targets: [n] indices into the events.
          items: number of candidates. Those behind the baseline's items have S = 0, as a counted item without a training event has after
            a history without counts.
        """
        if not self.weight:
            return None
        scale, missing = self.weight * self.sums.unit, items - len(self.sums.base)

        def bonus(at: np.ndarray) -> np.ndarray:
            scores = (self.sums.dense(events, targets[at]) * scale).astype(np.float32)
            return np.pad(scores, ((0, 0), (0, missing)))

        return bonus


def choose(
    sums: HistorySums,
    ranker: Ranker,
    h_nE: np.ndarray,
    v_IE: jax.Array,
    events: Events,
    targets: np.ndarray,
    metric: Callable[[Bonus | None], float],
    seed: int,
) -> dict:
    """Chooses the weight, and returns {"ratio", "grid", "trials", "weight", "value"} as JSON values: `range_ratio`, the
    weights of the grid in ascending order, [{"weight", "value"}] in the order of the trials, and the best trial (among equal values,
    the smallest weight).

    Args:
      sums: S.
      ranker: of the model.
      h_nE, v_IE: vectors of the targets' histories and of the items.
      events: all events.
      targets: [n] indices of validation events, at least one.
      metric: the metric of the targets' ranks with a bonus.
      seed: of the sample for the ranges.
    """
    ratio = range_ratio(sums, ranker, h_nE, v_IE, events, targets, seed)
    items = ranker.catalogue.items
    trials = search(ratio, lambda weight: metric(Fusion(sums, weight).bonus(events, targets, items)))
    weight = best(trials)
    record = {"ratio": ratio, "grid": sorted(trials), "trials": [{"weight": w, "value": value} for w, value in trials.items()]}
    return record | {"weight": weight, "value": trials[weight]}


def search(ratio: float | None, metric: Callable[[float], float]) -> dict[float, float]:
    """Tries the weights of the grid. Returns {weight: metric} in the order of the trials.

    ratio: where the grid begins; None: the only weight is 0.
    """
    trials = {0.0: metric(0.0)}
    if ratio is None:
        return trials
    middle = round(math.log2(ratio))
    low, high = middle - _AROUND, middle + _AROUND
    for power in range(low, high + 1):
        trials[2.0**power] = metric(2.0**power)
    for _ in range(_MORE):
        if best(trials) == 2.0**high:
            high = power = high + 1
        elif best(trials) <= 2.0**low:
            low = power = low - 1
        else:
            break
        trials[2.0**power] = metric(2.0**power)
    return trials


def best(trials: dict[float, float]) -> float:
    """The weight with the largest metric; among equal ones, the smallest."""
    return max(trials, key=lambda weight: (trials[weight], -weight))


def range_ratio(
    sums: HistorySums, ranker: Ranker, h_nE: np.ndarray, v_IE: jax.Array, events: Events, targets: np.ndarray, seed: int
) -> float | None:
    """The range of s over that of S, each the mean over a sample of histories. 1 if s is constant; None if S is.

    The range is the difference between the best and the mean score of the catalogue. (A standard deviation would depend on how many items
    have a count.) The mean of s is that of a sample of items. Arguments: as in `choose`.
    """
    items, rng = ranker.catalogue.items, np.random.default_rng(seed)
    at = np.sort(rng.permutation(len(targets))[: _SAMPLE[0]])
    item = np.sort(rng.permutation(items)[: _SAMPLE[1]]).astype(np.int32)
    bonus = Fusion(sums, 1.0).bonus(events, targets, items)
    assert bonus is not None
    step, other = ranker.at_once_with_bonus, 0.0
    for begin in range(0, len(at), step):
        scores = bonus(at[begin : begin + step])
        other += float((scores.max(axis=1) - scores.mean(axis=1, dtype=np.float64)).sum())
    own = ranker.top(h_nE[at], v_IE, None, 1)[1][:, 0] - ranker.scores(h_nE[at], v_IE, np.tile(item, (len(at), 1))).mean(axis=1)
    ratio = float(own.sum(dtype=np.float64)) / other if other > 0 else None
    return 1.0 if ratio is not None and ratio <= 0 else ratio


# ---- the record in the working folder


def identity(config: Config, step: int, settings: dict) -> dict:
    """What a choice depends on, apart from the events.

    Args:
      config: the run's config.
      step: the step of the model's parameters.
      settings: of the baseline.
    """
    return {"baseline": config.eval.fusion, "settings": dict(settings), "step": step, "conditions": conditions(config)}


def read_record(split: Split, workdir: Path) -> dict | None:
    """The `identity` and the choice in a working folder; None if there is none of this split."""
    try:
        record = json.loads((workdir / FILE).read_text(encoding="utf-8"))
        _ = record["baseline"], record["settings"], record["step"], record["conditions"], record["value"], record["trials"]
        return record if record["split_sha256"] == split.sha256 and math.isfinite(record["weight"]) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_record(record: dict, split: Split, workdir: Path) -> None:
    """Writes the `identity` and the choice to the working folder."""
    text = json.dumps({"split_sha256": split.sha256} | record, indent=2) + "\n"
    write_atomically(workdir / FILE, lambda path: path.write_text(text, encoding="utf-8"))


def describe(record: dict) -> str:
    """The choice in one line."""
    name = f"fusion: model + {record['weight']:g} · {record['baseline']}"
    if record["value"] is None:
        return f"{name} (not chosen: no validation event)"
    metric = f"validation {record['conditions']['metric']} {record['value']:.4f}"
    return f"{name} ({metric}, the best of {len(record['trials'])} weights)"

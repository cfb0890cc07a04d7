"""What an objective is."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from iam_jax.config import Config


class States(NamedTuple):
    """What the network computes of a batch, once for all objectives."""

    x_BTD: jax.Array  # the states after the last layer and the final norm
    target_XE: jax.Array | None  # the targets' text vectors, where the leading intra layers run once per distinct item (data/item_rows.py)


@dataclasses.dataclass(frozen=True)
class Objective:
    """One term of the training loss: weight * loss / count.

    `loss(network, config, items, batch, states, keys, cache_IE)` returns a float32 sum over the batch's targets.
    network: `Network` with the parameters bound; items: `TrainingItems`; batch: arrays as in data/batches.py; states: `States`;
    keys: two random keys of its own, or two None where nothing is to be drawn; cache_IE: the cached text vectors, or None unless
    objective.softmax is "cached".
    """

    name: str  # of its loss in metrics.jsonl, `<name>_loss`
    meaning: str  # one line for the documentation
    loss: Callable[..., jax.Array]
    count: Callable[[dict[str, Any]], jax.Array]  # batch -> how many targets it has
    weight: Callable[[Config], float]  # 0: not computed
    check: Callable[[Config], None] = lambda config: None  # raises InputError; called when the run is made, unless the weight is 0
    whole_text: bool = False  # the targets' own tokens are part of the input

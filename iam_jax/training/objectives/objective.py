"""What an objective is."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from iam_jax.config import Config


class States(NamedTuple):
    """What the network computes of a micro-batch, once for all objectives."""

    x_BTD: jax.Array  # the states after the last layer and the final norm


class Shared(NamedTuple):
    """What an objective computes once per step, from the whole batch; the losses of all micro-batches use it."""

    learned: Any = None  # a tree of arrays that depend on parameters. The gradients of all micro-batches with respect to them add up.
    given: Any = None  # a tree of other arrays


@dataclasses.dataclass(frozen=True)
class Objective:
    """One term of the training loss: weight * loss / count.

    `loss(network, config, items, batch, states, keys, shared)` returns a float32 sum over the targets of a micro-batch.
    network: `Network` with the parameters bound; items: `TrainingItems`; batch: arrays as in data/batches.py; states: `States`;
    keys: two random keys of its own, or two None where nothing is to be drawn; shared: what the objective's `shared` returned.

    `shared(network, config, items, batch, leading_XD, keys, cache_IE)` returns a `Shared`. It gets the whole batch, so that what it returns
    does not depend on optimizer.accumulate. leading_XD: states of the batch's distinct items (data/item_rows.py), or None; cache_IE: the
    cached text vectors, or None unless objective.softmax is "cached".
    """

    name: str  # of its loss in metrics.jsonl, `<name>_loss`
    meaning: str  # one line for the documentation
    loss: Callable[..., jax.Array]
    count: Callable[[dict[str, Any]], jax.Array]  # batch -> how many targets it has
    weight: Callable[[Config], float]  # 0: not computed
    check: Callable[[Config], None] = lambda config: None  # raises InputError; called when the run is made, unless the weight is 0
    whole_text: bool = False  # the targets' own tokens are part of the input
    shared: Callable[..., Shared] = lambda *_: Shared()

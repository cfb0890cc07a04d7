"""The item objective: a softmax over items, of a history's projected state with the item vectors.

Axes: X targets, M targets of a row, C candidates, I items, E item vectors, D model, T token slots.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iam_jax.config import Config
from iam_jax.data.batches import Segments
from iam_jax.data.catalogue import Catalogue
from iam_jax.data.splits import Events
from iam_jax.model.items import Items, all_text_vectors, make_items
from iam_jax.model.network import Network
from iam_jax.model.softmax import cross_entropy, sampled_cross_entropy
from iam_jax.training.objectives.objective import Objective, States

_ARRAYS = ("catalogue", "target_share_I", "drawn_share_I", "drawn_until_I")  # of TrainingItems


@partial(jax.tree_util.register_dataclass, data_fields=_ARRAYS, meta_fields=())
@dataclasses.dataclass(frozen=True)
class TrainingItems:
    """The catalogue, and the distributions that negatives are sampled from."""

    catalogue: Items
    target_share_I: jax.Array  # float32: share of the training targets; it gives how often an item is expected among a batch's targets
    drawn_share_I: jax.Array  # float32: probability of the drawn negatives, over items with training events
    drawn_until_I: jax.Array  # uint32: its cumulative sum, in units of 2^-31


def make_training_items(catalogue: Catalogue, events: Events, segments: Segments, config: Config) -> TrainingItems:
    """The training items. segments: the training segments, whose targets are counted."""
    trained = events.train_counts
    is_target = np.zeros(len(events.item) + 1, np.int64)
    np.add.at(is_target, segments.first, 1)
    np.add.at(is_target, segments.last, -1)
    targets = np.bincount(events.item[np.cumsum(is_target[:-1]) > 0], minlength=catalogue.items)
    drawn = np.where(trained > 0, trained.astype(np.float64) ** config.objective.negatives_power, 0)
    return TrainingItems(
        make_items(catalogue, trained > 0),
        jnp.asarray(targets / max(targets.sum(), 1), jnp.float32),
        jnp.asarray(drawn / drawn.sum(), jnp.float32),
        jnp.asarray(summed_up(drawn)),
    )


def summed_up(weight_I: np.ndarray) -> np.ndarray:
    """The cumulative weights for `draw`, in units of 2^-31 of their sum, uint32. Item i is drawn in proportion to weight_I[i]."""
    # In integers: a float32 sum would give items without weight a probability (5e-5 together, of 300,000 items), and others a wrong one.
    total_I = np.cumsum(weight_I, dtype=np.float64)
    return np.rint(total_I / total_I[-1] * 2**31).astype(np.uint32)


def _loss(network: Network, config: Config, items: TrainingItems, batch: dict, states: States, keys, cache_IE) -> jax.Array:
    text_key, draw_key = keys
    x_BMD = jnp.take_along_axis(states.x_BTD, batch["target_at"][..., None], axis=1)
    h_XE = network.project(x_BMD.reshape(-1, x_BMD.shape[-1]))
    target_X = batch["target"].reshape(-1)
    if config.softmax == "sampled":
        return _sampled(network, config, items, h_XE, target_X, text_key, draw_key, states.target_XE)
    if config.softmax == "full":
        v_IE = all_text_vectors(network, items.catalogue, key=text_key) if config.uses_text else None
    else:
        v_IE = _with_fresh_targets(network, items.catalogue, target_X, text_key, states.target_XE, cache_IE)
    if config.objective.vectors != "text":
        table_IE = network.table(items.catalogue.trained_I)
        v_IE = table_IE if v_IE is None else v_IE + table_IE
    assert v_IE is not None  # from text, or from the table
    return cross_entropy(h_XE, v_IE, target_X, allowed_C=items.catalogue.trained_I, chunk=config.objective.chunk)


def _with_fresh_targets(network: Network, catalogue: Items, target_X, text_key, vt_XE, cache_IE) -> jax.Array:
    """v_IE: the cached text vectors, and fresh ones of the targets, as positives and as each other's negatives. The text learns from
    the fresh ones."""
    if vt_XE is None:
        safe_X = jnp.maximum(target_X, 0)
        vt_XE = network.text_vectors(catalogue.token_IT[safe_X], catalogue.length_I[safe_X], text_key)
    place_X = _first_places(target_X, len(cache_IE))
    return jax.lax.stop_gradient(cache_IE).at[place_X].set(vt_XE, mode="drop", unique_indices=True)


def _sampled(network: Network, config: Config, items: TrainingItems, h_XE, target_X, text_key, draw_key, vt_XE) -> jax.Array:
    objective, catalogue = config.objective, items.catalogue
    drawn_C = draw(draw_key, items.drawn_until_I, objective.negatives)
    candidate_C = jnp.concatenate([target_X, drawn_C])
    safe_C = jnp.maximum(candidate_C, 0)
    v_CE: Any = 0
    if config.uses_text:
        fresh_C = safe_C if vt_XE is None else safe_C[len(target_X) :]
        v_CE = network.text_vectors(catalogue.token_IT[fresh_C], catalogue.length_I[fresh_C], text_key)
        v_CE = v_CE if vt_XE is None else jnp.concatenate([vt_XE, v_CE])
    if objective.vectors != "text":
        v_CE = v_CE + network.table(catalogue.trained_I)[safe_C]
    others = jnp.maximum((target_X >= 0).sum() - 1, 0)  # a position's own target is not one of its negatives
    expected_I = others * items.target_share_I + objective.negatives * items.drawn_share_I
    log_expected_C = jnp.log(jnp.maximum(expected_I[safe_C], 1e-30))
    return sampled_cross_entropy(h_XE, target_X, candidate_C, v_CE, v_CE[: len(target_X)], log_expected_C, objective.chunk)


def _first_places(target_X: jax.Array, items: int) -> jax.Array:
    """The item of each target that occurs for the first time. Other targets, and -1, get distinct places from `items` on.

    A repeated item has another dropout mask, and the result of several writes to one row is undefined.
    """
    at_X = jnp.arange(len(target_X), dtype=jnp.int32)
    item_X = jnp.where(target_X >= 0, target_X, items)
    first_I = jnp.full(items + 1, len(target_X), jnp.int32).at[item_X].min(at_X)
    return jnp.where((target_X >= 0) & (first_I[item_X] == at_X), target_X, items + at_X)


def draw(key: jax.Array, until_I: jax.Array, count: int) -> jax.Array:
    """`count` items drawn with replacement, by the cumulative weights of `summed_up`. Items without weight are never drawn."""
    return jnp.searchsorted(until_I, jax.random.bits(key, (count,), jnp.uint32) >> 1, side="right").astype(jnp.int32)


ITEM = Objective(
    name="item",
    meaning="softmax over items",
    loss=_loss,
    count=lambda batch: (batch["target"] >= 0).sum(),
    weight=lambda config: config.objective.item,
)

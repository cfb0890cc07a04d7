"""The item objective: a softmax over items, of a history's projected state with the item vectors.

Axes: X targets, M targets of a row, C candidates, I items, E item vectors, D model, T token slots.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from iam_jax.config import Config
from iam_jax.data.batches import Segments
from iam_jax.data.catalogue import Catalogue
from iam_jax.data.splits import Events
from iam_jax.model.items import Items, all_text_vectors, make_items, text_vectors_in_chunks
from iam_jax.model.network import Network
from iam_jax.model.softmax import cached_cross_entropy, cross_entropy, sampled_cross_entropy
from iam_jax.training.objectives.objective import Objective, Shared, States

_ARRAYS = ("catalogue", "target_share_I", "drawn_share_I", "drawn_until_I")  # of TrainingItems


@partial(jax.tree_util.register_dataclass, data_fields=_ARRAYS, meta_fields=())
@dataclasses.dataclass(frozen=True)
class TrainingItems:
    """The catalogue, and the distributions that negatives are sampled from."""

    catalogue: Items
    target_share_I: jax.Array  # float32: share of the training targets; it gives how often an item is expected among a batch's targets
    drawn_share_I: jax.Array  # float32: probability of the drawn negatives, over items with training events
    drawn_until_I: jax.Array  # uint32: its cumulative sum, in units of 2^-31


def make_training_items(
    catalogue: Catalogue, events: Events, segments: Segments, config: Config, vector_IP: np.ndarray | None = None
) -> TrainingItems:
    """The training items. segments: the training segments, whose targets are counted. vector_IP: the items' given vectors."""
    trained = events.train_counts
    is_target = np.zeros(len(events.item) + 1, np.int64)
    np.add.at(is_target, segments.first, 1)
    np.add.at(is_target, segments.last, -1)
    targets = np.bincount(events.item[np.cumsum(is_target[:-1]) > 0], minlength=catalogue.items)
    drawn = np.where(trained > 0, trained.astype(np.float64) ** config.objective.negatives_power, 0)
    if config.softmax == "cached":  # half of the draws are uniform, so that no weight 1 / (n q_i) is above 2 I / n
        drawn = drawn / drawn.sum() + (trained > 0) / (trained > 0).sum()
    return TrainingItems(
        make_items(catalogue, trained > 0, vector_IP),
        jnp.asarray(targets / max(targets.sum(), 1), jnp.float32),
        jnp.asarray(drawn / drawn.sum(), jnp.float32),
        jnp.asarray(summed_up(drawn)),
    )


def summed_up(weight_I: np.ndarray) -> np.ndarray:
    """The cumulative weights for `draw`, in units of 2^-31 of their sum, uint32. Item i is drawn in proportion to weight_I[i]."""
    # In integers: a float32 sum would give items without weight a probability (5e-5 together, of 300,000 items), and others a wrong one.
    total_I = np.cumsum(weight_I, dtype=np.float64)
    return np.rint(total_I / total_I[-1] * 2**31).astype(np.uint32)


def _shared(network: Network, config: Config, items: TrainingItems, batch: dict, leading_XD, keys, cache_IE) -> Shared:
    """Text vectors of the candidates (None: no text) and, for sampled and cached softmax, the candidates and log E_c or the weight of each.

    The candidates of every softmax are those of the whole batch, drawn once per step."""
    text_key, draw_key = keys
    objective, catalogue = config.objective, items.catalogue
    if config.softmax == "full":
        return Shared(all_text_vectors(network, catalogue, key=text_key) if config.uses_text else None)
    target_X = batch["target"].reshape(-1)
    drawn_C = draw(draw_key, items.drawn_until_I, objective.negatives)
    candidate_C = jnp.concatenate([target_X, drawn_C])
    text_CE = _texts(network, config, catalogue, batch, candidate_C, leading_XD, text_key) if config.uses_text else None
    if config.softmax == "cached":
        return Shared(text_CE, (candidate_C, _weights(items, target_X, drawn_C), cache_IE))
    others = jnp.maximum((target_X >= 0).sum() - 1, 0)  # a position's own target is not one of its negatives
    expected_I = others * items.target_share_I + objective.negatives * items.drawn_share_I
    return Shared(text_CE, (candidate_C, jnp.log(jnp.maximum(expected_I[jnp.maximum(candidate_C, 0)], 1e-30)), None))


def _texts(network: Network, config: Config, catalogue: Items, batch: dict, candidate_C, leading_XD, key) -> jax.Array:
    """Text vectors of candidates, the targets first: from `leading_XD` where they are among its items, else from their tokens."""
    parts, targets, vector_IP = config.optimizer.accumulate, None, catalogue.vector_IP
    if leading_XD is not None and "target_slot" in batch and config.leading_vectors:
        slot_X = batch["target_slot"].reshape(-1)
        given = None if vector_IP is None else vector_IP[jnp.maximum(candidate_C[: len(slot_X)], 0)]
        targets = network.content(network.taken(leading_XD, slot_X), given)
        candidate_C = candidate_C[len(targets) :]
    safe_C = jnp.maximum(candidate_C, 0)
    if catalogue.tower_XD is not None:
        return network.content(catalogue.tower_XD[safe_C], None if vector_IP is None else vector_IP[safe_C])
    vector_CP = None if vector_IP is None else vector_IP[safe_C]
    token_CT, length_C = catalogue.token_IT[safe_C], catalogue.length_I[safe_C]
    if parts == 1:
        fresh = network.text_vectors(token_CT, length_C, key, vector_CP)
    else:  # at most as many at a time as if every micro-batch had its own
        fresh = text_vectors_in_chunks(network, token_CT, length_C, math.ceil(len(safe_C) / parts), key, vector_CP)
    return fresh if targets is None else jnp.concatenate([targets, fresh])


def _weights(items: TrainingItems, target_X: jax.Array, drawn_C: jax.Array) -> jax.Array:
    """The weights of the targets and of the drawn items in a sum over all items. Those of a target's occurrences add up to 1. A drawn item
    i has the weight 1 / (n q_i), or 0 if it is a target: n draws from q give every other item the expected weight 1."""
    # -1 is counted in an extra last place
    count_I = jnp.zeros(len(items.drawn_share_I) + 1, jnp.int32).at[target_X].add(1)
    of_target_X = jnp.where(target_X >= 0, 1 / jnp.maximum(count_I[target_X], 1), 0)
    of_drawn_C = jnp.where(count_I[drawn_C] > 0, 0, 1 / (len(drawn_C) * items.drawn_share_I[drawn_C]))
    return jnp.concatenate([of_target_X, of_drawn_C])


def _loss(network: Network, config: Config, items: TrainingItems, batch: dict, states: States, keys, shared: Shared) -> jax.Array:
    trained_I, content_I, chunk = items.catalogue.trained_I, items.catalogue.content_I, config.objective.chunk
    x_BMD = jnp.take_along_axis(states.x_BTD, batch["target_at"][..., None], axis=1)
    h_XE = network.project(x_BMD.reshape(-1, x_BMD.shape[-1]))
    target_X = batch["target"].reshape(-1)
    table_IE = network.table(items.catalogue.row_I) if config.objective.vectors != "text" else None
    if config.softmax == "full":
        return cross_entropy(h_XE, _sum(_present(shared.learned, content_I), table_IE), target_X, allowed_C=trained_I, chunk=chunk)
    candidate_C, about_C, cache_IE = shared.given
    safe_C = jnp.maximum(candidate_C, 0)
    content_CE = _present(shared.learned, None if content_I is None else content_I[safe_C])
    v_CE = _sum(content_CE, None if table_IE is None else table_IE[safe_C])
    # The targets are the first candidates.
    vt_XE = v_CE[batch["target_place"].reshape(-1)] if "target_place" in batch else v_CE[: len(target_X)]
    if config.softmax == "sampled":
        return sampled_cross_entropy(h_XE, target_X, candidate_C, v_CE, vt_XE, about_C, chunk)
    v_IE = _sum(_present(cache_IE, content_I), table_IE)
    return cached_cross_entropy(h_XE, target_X, v_IE, trained_I, v_CE, v_IE[safe_C], vt_XE, about_C, chunk)


def _present(content_CE: jax.Array | None, present_C: jax.Array | None) -> jax.Array | None:
    """Content vectors, zero where the content is left out in this step."""
    return content_CE if content_CE is None or present_C is None else jnp.where(present_C[:, None], content_CE, 0)


def _sum(text: jax.Array | None, table: jax.Array | None) -> jax.Array:
    """The vectors of candidates: from text, or from the table, or their sum."""
    if text is None or table is None:
        both = table if text is None else text
        assert both is not None
        return both
    return text + table


def draw(key: jax.Array, until_I: jax.Array, count: int) -> jax.Array:
    """`count` items drawn with replacement, by the cumulative weights of `summed_up`. Items without weight are never drawn."""
    return jnp.searchsorted(until_I, jax.random.bits(key, (count,), jnp.uint32) >> 1, side="right").astype(jnp.int32)


ITEM = Objective(
    name="item",
    meaning="softmax over items",
    loss=_loss,
    shared=_shared,
    count=lambda batch: (batch["target"] >= 0).sum(),
    weight=lambda config: config.objective.item,
)

"""What training minimises: the item objective (softmax over items) and the token objective (next token), as sums and counts.

Axes: X positions of any kind, M targets of a row, C candidates, I items, E item vectors, D model, V vocabulary, T token slots.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from iam_jax.config import Config
from iam_jax.data.batches import Segments
from iam_jax.data.catalogue import Catalogue
from iam_jax.data.item_rows import CHUNKS
from iam_jax.data.splits import Events
from iam_jax.model.items import Items, all_text_vectors, make_items
from iam_jax.model.network import Network
from iam_jax.model.softmax import cross_entropy, sampled_cross_entropy

_ARRAYS = ("catalogue", "target_share_I", "drawn_share_I", "drawn_until_I")  # of TrainingItems


@partial(jax.tree_util.register_dataclass, data_fields=_ARRAYS, meta_fields=())
@dataclasses.dataclass(frozen=True)
class TrainingItems:
    """The catalogue and the proposal distributions of sampled negatives."""

    catalogue: Items
    target_share_I: jax.Array  # float32: share of the training targets, the proposal that puts items into a batch as targets
    drawn_share_I: jax.Array  # float32: the proposal of the drawn negatives, over items with training events
    drawn_until_I: jax.Array  # uint32: its cumulative sum, in units of 2^-31


def make_training_items(catalogue: Catalogue, events: Events, segments: Segments, config: Config) -> TrainingItems:
    """segments: the training segments, whose targets are counted."""
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
    """uint32, what `draw` draws from: item i is drawn in proportion to weight_I[i]."""
    # In integers: a float32 sum gives items without weight a chance (5e-5 in all of 300,000 items), and others a wrong one.
    total_I = np.cumsum(weight_I, dtype=np.float64)
    return np.rint(total_I / total_I[-1] * 2**31).astype(np.uint32)


def losses(model: Network, config: Config, items: TrainingItems, batch: dict, key: jax.Array | None, cache_IE: jax.Array | None) -> dict:
    """Sums `item` and `token` of the two objectives over the batch's targets; divided by the `counts` they are nats. key: of
    dropout and of the drawn negatives; None for neither dropout nor draws (then the softmax must be full or cached)."""
    keys = (None,) * 3 if key is None else tuple(jax.random.split(key, 3))
    leading_XD = vt_XE = None
    if "leading" in batch:
        leading_XD = model.leading_states(batch["leading"], CHUNKS, None if key is None else jax.random.fold_in(keys[0], 0))
        if config.leading_vectors and config.objective.item:
            vt_XE = model.text_head(model.taken(leading_XD, batch["target_slot"].reshape(-1)))
    x_BTD = model.states(batch, keys[0], leading_XD)
    sums = {}
    if config.objective.item:
        x_BMD = jnp.take_along_axis(x_BTD, batch["target_at"][..., None], axis=1)
        h_XE = model.project(x_BMD.reshape(-1, x_BMD.shape[-1]))
        target_X = batch["target"].reshape(-1)
        sums["item"] = _item_loss(model, config, items, h_XE, target_X, keys[1], keys[2], cache_IE, vt_XE)
    if config.objective.token:
        x_XD, label_X = x_BTD.reshape(-1, x_BTD.shape[-1]), batch["label"].reshape(-1)
        sums["token"] = cross_entropy(x_XD, model.output_embedding(), label_X, chunk=config.objective.chunk)
    return sums


def counts(batch: dict) -> dict:
    """How many targets of each objective a batch holds."""
    return {"item": (batch["target"] >= 0).sum(), "token": (batch["label"] >= 0).sum()}


def _item_loss(model, config: Config, items: TrainingItems, h_XE, target_X, text_key, draw_key, cache_IE, vt_XE):
    """vt_XE: text vectors of the targets where they are known already."""
    objective, chunk = config.objective, config.objective.chunk
    with_table = objective.vectors != "text"
    if config.softmax == "full":
        if config.uses_text:
            v_IE = all_text_vectors(model, items.catalogue, key=text_key) + (model.table(items.catalogue.trained_I) if with_table else 0)
        else:
            v_IE = model.table(items.catalogue.trained_I)
        return cross_entropy(h_XE, v_IE, target_X, allowed_C=items.catalogue.trained_I, chunk=chunk)

    safe_X = jnp.maximum(target_X, 0)
    if config.softmax == "cached":
        # The targets' own vectors are fresh, as positives and as each other's negatives; so the text learns from them.
        fresh_XE = vt_XE
        if fresh_XE is None:
            fresh_XE = model.text_vectors(items.catalogue.token_IT[safe_X], items.catalogue.length_I[safe_X], text_key)
        place_X = _first_places(target_X, len(cache_IE))
        v_IE = jax.lax.stop_gradient(cache_IE).at[place_X].set(fresh_XE, mode="drop", unique_indices=True)
        if with_table:
            v_IE = v_IE + model.table(items.catalogue.trained_I)
        return cross_entropy(h_XE, v_IE, target_X, allowed_C=items.catalogue.trained_I, chunk=chunk)

    drawn_C = draw(draw_key, items.drawn_until_I, objective.negatives)
    candidate_C = jnp.concatenate([target_X, drawn_C])
    safe_C = jnp.maximum(candidate_C, 0)
    v_CE = 0
    if config.uses_text:
        fresh_C = safe_C if vt_XE is None else safe_C[len(target_X) :]
        v_CE = model.text_vectors(items.catalogue.token_IT[fresh_C], items.catalogue.length_I[fresh_C], text_key)
        v_CE = v_CE if vt_XE is None else jnp.concatenate([vt_XE, v_CE])
    if with_table:
        v_CE = v_CE + model.table(items.catalogue.trained_I)[safe_C]
    others = jnp.maximum((target_X >= 0).sum() - 1, 0)  # the position's own target is none of its negatives
    expected_I = others * items.target_share_I + objective.negatives * items.drawn_share_I
    log_expected_C = jnp.log(jnp.maximum(expected_I[safe_C], 1e-30))
    return sampled_cross_entropy(h_XE, target_X, candidate_C, v_CE, v_CE[: len(target_X)], log_expected_C, chunk)


def _first_places(target_X: jax.Array, items: int) -> jax.Array:
    """The items of the targets that come for the first time; for the others, and for no target (-1), places from `items` on,
    all different. (An item that comes again has another dropout mask; which of several writes to a row stays is undefined.)"""
    at_X = jnp.arange(len(target_X), dtype=jnp.int32)
    item_X = jnp.where(target_X >= 0, target_X, items)
    first_I = jnp.full(items + 1, len(target_X), jnp.int32).at[item_X].min(at_X)
    return jnp.where((target_X >= 0) & (first_I[item_X] == at_X), target_X, items + at_X)


def draw(key: jax.Array, until_I: jax.Array, count: int) -> jax.Array:
    """`count` items drawn with replacement, by the shares that `summed_up` summed up; never one without weight."""
    return jnp.searchsorted(until_I, jax.random.bits(key, (count,), jnp.uint32) >> 1, side="right").astype(jnp.int32)

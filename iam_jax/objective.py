"""What training minimises: the item objective (softmax over items) and the token objective (next token), as sums and counts.

Axes: X positions of any kind, M targets of a row, C candidates, I items, E item vectors, D model, V vocabulary, T token slots.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from iam_jax.config import Config
from iam_jax.data.batches import Segments
from iam_jax.data.catalogue import Catalogue
from iam_jax.data.item_rows import CHUNKS
from iam_jax.data.splits import Events
from iam_jax.model.heads import Recommender
from iam_jax.sharding import shards_here, split_rows

_ARRAYS = ("token_IT", "length_I", "trained_I", "target_share_I", "drawn_share_I", "drawn_until_I")  # of Items


@partial(jax.tree_util.register_dataclass, data_fields=_ARRAYS, meta_fields=())
@dataclasses.dataclass(frozen=True)
class Items:
    """What the objective knows of the catalogue, on the device."""

    token_IT: jax.Array  # int32 text tokens, padded
    length_I: jax.Array  # int32
    trained_I: jax.Array  # bool: has a training event; the others are no negatives, and their table rows count as zero
    target_share_I: jax.Array  # float32: share of the training targets, the proposal that puts items into a batch as targets
    drawn_share_I: jax.Array  # float32: the proposal of the drawn negatives, over items with training events
    drawn_until_I: jax.Array  # uint32: the same, summed up, in units of 2^-31


def make_items(catalogue: Catalogue, events: Events, segments: Segments, config: Config) -> Items:
    """segments: the training segments, whose targets are counted."""
    token, length = catalogue.padded()
    trained = events.train_counts
    is_target = np.zeros(len(events.item) + 1, np.int64)
    np.add.at(is_target, segments.first, 1)
    np.add.at(is_target, segments.last, -1)
    targets = np.bincount(events.item[np.cumsum(is_target[:-1]) > 0], minlength=catalogue.items)
    drawn = np.where(trained > 0, trained.astype(np.float64) ** config.objective.negatives_power, 0)
    return Items(
        jnp.asarray(token),
        jnp.asarray(length),
        jnp.asarray(trained > 0),
        jnp.asarray(targets / max(targets.sum(), 1), jnp.float32),
        jnp.asarray(drawn / drawn.sum(), jnp.float32),
        jnp.asarray(summed_up(drawn)),
    )


def summed_up(weight_I: np.ndarray) -> np.ndarray:
    """uint32, what `draw` draws from: item i is drawn in proportion to weight_I[i]."""
    # In integers: a float32 sum gives items without weight a chance (5e-5 in all of 300,000 items), and others a wrong one.
    total_I = np.cumsum(weight_I, dtype=np.float64)
    return np.rint(total_I / total_I[-1] * 2**31).astype(np.uint32)


def cross_entropy(
    h_XE: jax.Array,
    v_CE: jax.Array | tuple[jax.Array, ...],
    label_X: jax.Array,
    *,
    allowed_C: jax.Array | None = None,
    chunk: int = 2048,
) -> jax.Array:
    """Sum of -log softmax(h v^T)[label] over the positions with a label >= 0, in float32; as `label_log_probs`."""
    return -label_log_probs(h_XE, v_CE, label_X, allowed_C=allowed_C, chunk=chunk).sum()


def logits(h_XE: jax.Array, v_CE: jax.Array | tuple[jax.Array, ...]) -> jax.Array:
    """[X, C] float32: h v^T; v_CE may come in parts."""
    parts = v_CE if isinstance(v_CE, tuple) else (v_CE,)
    return jnp.concatenate([jnp.einsum("xE,CE->xC", h_XE, v, preferred_element_type=jnp.float32) for v in parts], axis=1)


def label_log_probs(
    h_XE: jax.Array,
    v_CE: jax.Array | tuple[jax.Array, ...],
    label_X: jax.Array,
    *,
    allowed_C: jax.Array | None = None,
    chunk: int = 2048,
) -> jax.Array:
    """[X] float32: log softmax(h v^T)[label], 0 where the label is below 0. At most `chunk` positions' logits exist at one time, in
    the backward pass too. v_CE: in parts, where it is several. allowed_C: candidates that take part."""

    parts = v_CE if isinstance(v_CE, tuple) else (v_CE,)
    allowed = (None,) * len(parts) if allowed_C is None else jnp.split(allowed_C, np.cumsum([len(v) for v in parts])[:-1])

    def part(label_x, h_xE):
        # Each part by itself: logits in one piece would be copied, and a sharded vocabulary moved between devices.
        start, picked_x, sums = 0, 0, []
        for v, may in zip(parts, allowed, strict=True):
            logits_xC = jnp.einsum("xE,CE->xC", h_xE, v, preferred_element_type=jnp.float32)
            if may is not None:
                logits_xC = jnp.where(may, logits_xC, -jnp.inf)
            inside_x = (label_x >= start) & (label_x < start + len(v))
            found_x = jnp.take_along_axis(logits_xC, jnp.clip(label_x - start, 0, len(v) - 1)[:, None], axis=1)[:, 0]
            picked_x = jnp.where(inside_x, found_x, picked_x)
            sums.append(jax.nn.logsumexp(logits_xC, axis=1))
            start += len(v)
        return jnp.where(label_x >= 0, picked_x - functools.reduce(jnp.logaddexp, sums), 0)

    return _over_chunks(part, chunk, label_X, h_XE)


def sampled_cross_entropy(
    h_XE: jax.Array,
    target_X: jax.Array,
    candidate_C: jax.Array,
    v_CE: jax.Array,
    vt_XE: jax.Array,
    log_expected_C: jax.Array,
    chunk: int = 2048,
) -> jax.Array:
    """Sum over the positions with a target >= 0 of -log(e^s_y / (e^s_y + sum over sampled c != y of e^s_c / E_c)).

    E_c is how often item c is expected among the candidates, so that the denominator's expectation is that of the full softmax
    (log-q correction, Bengio and Senécal 2008). Candidates that equal the target are left out; candidate_C is -1 for none.
    vt_XE: vectors of the targets."""

    def part(target_x, h_xE, vt_xE):
        positive_x = (h_xE * vt_xE).sum(-1)
        logits_xC = jnp.einsum("xE,CE->xC", h_xE, v_CE) - log_expected_C
        negative_xC = (candidate_C >= 0) & (candidate_C != target_x[:, None])
        logits_xC = jnp.where(negative_xC, logits_xC, -jnp.inf)
        total_x = jax.nn.logsumexp(jnp.concatenate([positive_x[:, None], logits_xC], axis=1), axis=1)
        return jnp.where(target_x >= 0, total_x - positive_x, 0)

    return _over_chunks(part, chunk, target_X, h_XE, vt_XE).sum()


def _over_chunks(part: Callable[..., jax.Array], chunk: int, label_X: jax.Array, *y_XE: jax.Array) -> jax.Array:
    """[X]: part(label, *y) of chunks of at most `chunk` positions, each computed again for the backward pass. What fills up the last
    chunk has the label -1."""
    part = jax.checkpoint(part)
    if len(label_X) <= chunk:
        return part(label_X, *y_XE)
    values = jax.lax.map(lambda xs: part(*xs), (_strided(label_X, chunk, -1), *(_strided(y, chunk) for y in y_XE)))
    return _unstrided(values, len(label_X))


def _strided(y: jax.Array, chunk: int, fill: int = 0) -> jax.Array:
    """[X, …] as [parts, size, …]: the fewest parts of about `chunk` rows, of the same size, filled up at the end. A part is every parts-th
    row, so that rows that are spread over devices stay where they are and every part is spread over all of them."""
    shards = shards_here()
    parts = math.ceil(len(y) / chunk)
    size = math.ceil(len(y) / parts / shards) * shards
    widths = ((0, parts * size - len(y)), *[(0, 0)] * (y.ndim - 1))
    y = jnp.pad(y, widths, constant_values=fill).reshape(size, parts, *y.shape[1:])
    return split_rows(y.swapaxes(0, 1), axis=1)


def _unstrided(y: jax.Array, rows: int) -> jax.Array:
    """[parts, size, …] as [rows, …]: `_strided` undone."""
    return y.swapaxes(0, 1).reshape(-1, *y.shape[2:])[:rows]


def all_text_vectors(model: Recommender, items: Items, chunk: int = 1024, key: jax.Array | None = None) -> jax.Array:
    """v_IE of every item's text, `chunk` items at a time."""
    token, length = _strided(items.token_IT, chunk), _strided(items.length_I, chunk, fill=1)
    keys = None if key is None else jax.random.split(key, len(token))
    vectors = jax.lax.map(jax.checkpoint(lambda xs: model.text_vectors(*xs)), (token, length, keys))
    return _unstrided(vectors, len(items.token_IT))


def item_vectors(model: Recommender, config: Config, items: Items, boundary_ID: jax.Array | None = None) -> jax.Array:
    """v_IE of the whole catalogue as ranking uses them: table, text or their sum. boundary_ID: the items' boundary states after the
    leading intra layers, where they are known."""
    if not config.uses_text:
        return model.table(items.trained_I)
    known = boundary_ID is not None and config.leading_vectors
    text_IE = model.text_head(boundary_ID) if known else all_text_vectors(model, items)
    return text_IE if config.objective.vectors == "text" else text_IE + model.table(items.trained_I)


def losses(model: Recommender, config: Config, items: Items, batch: dict, key: jax.Array | None, cache_IE: jax.Array | None) -> dict:
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


def _item_loss(model, config: Config, items: Items, h_XE, target_X, text_key, draw_key, cache_IE, vt_XE):
    """vt_XE: text vectors of the targets where they are known already."""
    objective, chunk = config.objective, config.objective.chunk
    with_table = objective.vectors != "text"
    if config.softmax == "full":
        if config.uses_text:
            v_IE = all_text_vectors(model, items, key=text_key) + (model.table(items.trained_I) if with_table else 0)
        else:
            v_IE = model.table(items.trained_I)
        return cross_entropy(h_XE, v_IE, target_X, allowed_C=items.trained_I, chunk=chunk)

    safe_X = jnp.maximum(target_X, 0)
    if config.softmax == "cached":
        # The targets' own vectors are fresh, as positives and as each other's negatives; so the text learns from them.
        fresh_XE = vt_XE if vt_XE is not None else model.text_vectors(items.token_IT[safe_X], items.length_I[safe_X], text_key)
        place_X = _first_places(target_X, len(cache_IE))
        v_IE = jax.lax.stop_gradient(cache_IE).at[place_X].set(fresh_XE, mode="drop", unique_indices=True)
        if with_table:
            v_IE = v_IE + model.table(items.trained_I)
        return cross_entropy(h_XE, v_IE, target_X, allowed_C=items.trained_I, chunk=chunk)

    drawn_C = draw(draw_key, items.drawn_until_I, objective.negatives)
    candidate_C = jnp.concatenate([target_X, drawn_C])
    safe_C = jnp.maximum(candidate_C, 0)
    v_CE = 0
    if config.uses_text:
        fresh_C = safe_C if vt_XE is None else safe_C[len(target_X) :]
        v_CE = model.text_vectors(items.token_IT[fresh_C], items.length_I[fresh_C], text_key)
        v_CE = v_CE if vt_XE is None else jnp.concatenate([vt_XE, v_CE])
    if with_table:
        v_CE = v_CE + model.table(items.trained_I)[safe_C]
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

"""Beam search for the most likely items of a catalogue by their text, restricted to the trie of the items' tokens.

The search returns exactly as many different items as requested. Every node of the trie leads to an item, so no hypothesis ends without
one. With a beam as wide as the catalogue, it equals exhaustive ranking by `likelihood.log_likelihoods`.

Axes: B users, W hypotheses, T slots of the histories, S slots of the cache, N nodes, E edges of a node, X extended hypotheses (W x E), D
model, V vocabulary, I items.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iam_jax.data.batches import Batch
from iam_jax.data.candidates import candidate_rows
from iam_jax.data.catalogue import Catalogue
from iam_jax.model import Model, Params
from iam_jax.model.attention import decode_ranges
from iam_jax.model.decoder import Cache
from iam_jax.model.network import Network
from iam_jax.model.softmax import logits
from iam_jax.ranking.likelihood import check_predicts

_ARRAYS = ("first_edge_N", "edge_token", "first_item_N", "item_I")  # the fields of Trie that are arrays


@partial(jax.tree_util.register_dataclass, data_fields=_ARRAYS, meta_fields=("depth", "degree", "sequences", "vocabulary"))
@dataclasses.dataclass(frozen=True)
class Trie:
    """The distinct token sequences of a catalogue, on the device.

    Nodes are numbered breadth first; 0 is the root. Siblings are sorted by token. Edge e leads to node e + 1.
    """

    first_edge_N: jax.Array  # [nodes + 1] int32: node n has the edges first_edge_N[n]:first_edge_N[n + 1], none if it completes an item
    edge_token: jax.Array  # [edges] int32
    first_item_N: jax.Array  # [nodes + 1] int32: node n has the items item_I[first_item_N[n]:first_item_N[n + 1]]
    item_I: jax.Array  # int32 rows of the catalogue; items with equal tokens are in the order of the catalogue
    depth: int  # tokens of the longest item
    degree: int  # largest number of edges of a node
    sequences: int  # number of distinct token sequences
    vocabulary: int  # all tokens are smaller


def make_trie(catalogue: Catalogue) -> Trie:
    """Makes the trie of a catalogue.

    Raises ValueError if there are no items, if an item has no tokens, or if the tokens of an item are a prefix of another item's. (Boundary
    tokens make a prefix impossible.)
    """
    if not catalogue.items or not catalogue.item_lengths.all():
        raise ValueError("a trie needs at least one item, and tokens for every item")
    token_IT, length_I = catalogue.padded()
    token_IT[np.arange(token_IT.shape[1]) >= length_I[:, None]] = -1
    order_I = np.lexsort(token_IT.T[::-1])  # stable: items with equal tokens stay in the order of the catalogue
    token_IT, length_I = token_IT[order_I], length_I[order_I]
    node_I = np.zeros(catalogue.items, np.int64)  # the node of each item's first t tokens
    differs_I = np.arange(catalogue.items) == 0  # whether these tokens differ from those of the previous item
    parents, tokens, nodes = [], [], 1
    for t in range(token_IT.shape[1]):
        token_I, longer_I = token_IT[:, t], length_I > t
        differs_I[1:] |= token_I[1:] != token_I[:-1]
        new_I = differs_I & longer_I
        parents.append(node_I[new_I])
        tokens.append(token_I[new_I])
        node_I = np.where(longer_I, nodes - 1 + np.cumsum(new_I), node_I)
        nodes += len(tokens[-1])
    first_edge_N = np.searchsorted(np.concatenate(parents), np.arange(nodes + 1))
    degree_N = np.diff(first_edge_N)
    if (inner_I := degree_N[node_I] > 0).any():
        raise ValueError(f"item {order_I[inner_I].min()}: its tokens are a prefix of another item's tokens")
    by_node_I = np.argsort(node_I, kind="stable")
    first_item_N = np.searchsorted(node_I[by_node_I], np.arange(nodes + 1))
    arrays = (first_edge_N, np.concatenate(tokens), first_item_N, order_I[by_node_I])
    first_edge, token, first_item, item = (jnp.asarray(x, jnp.int32) for x in arrays)
    meta = token_IT.shape[1], int(degree_N.max()), int((degree_N == 0).sum()), catalogue.vocabulary
    return Trie(first_edge, token, first_item, item, *meta)


def history_rows(catalogue: Catalogue, histories: Sequence[np.ndarray], max_tokens: int, row_tokens: int | None = None) -> Batch:
    """Makes one row per user with the prompt, the items of the history and the suffix, for `beam_search`.

    The rows are those of `candidate_rows` with the whole catalogue as candidates, so that max_tokens includes the longest item. Raises
    ValueError as `candidate_rows`, and if the longest item does not fit.
    """
    longest = int(catalogue.item_lengths.max())
    if max_tokens < longest + catalogue.frame_tokens:
        raise ValueError(f"the longest item, {longest} tokens, does not fit in {max_tokens} tokens beside prompt and suffix")
    no_candidates = [np.zeros(0, np.int64)] * len(histories)
    rows = candidate_rows(catalogue, histories, no_candidates, max_tokens - longest, row_tokens)
    return {name: rows[name] for name in ("token", "user", "group", "position")}


def beam_search(
    model: Model, params: Params, trie: Trie, batch: dict, beams: int, *, normalize: bool = False, chunk: int = 2048
) -> tuple[np.ndarray, np.ndarray]:
    """Compiles and calls `search`, and checks the result; returns NumPy arrays.

    Raises FloatingPointError for non-finite scores, and ValueError as `search`, for a row without tokens, and if the model has too few
    learned positions.
    """
    history_B = (np.asarray(batch["user"]) > 0).sum(1)
    if not history_B.all():
        raise ValueError(f"row {history_B.argmin()} has no tokens")
    needed, learned = int(history_B.max()) + trie.depth - 1, model.bind(params).decoder.position_PD
    if learned is not None and needed > learned[...].shape[0]:
        raise ValueError(f"the model has {learned[...].shape[0]} learned positions, but the longest history and item need {needed}")
    item_BW, score_BW = map(np.asarray, _search(model, params, trie, batch, beams, normalize, chunk))
    if not np.isfinite(score_BW).all():
        raise FloatingPointError(f"beam search: {(~np.isfinite(score_BW)).sum():,} of {score_BW.size:,} scores are not finite")
    return item_BW, score_BW


@partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _search(model: Model, params: Params, trie: Trie, batch: dict, beams: int, normalize: bool, chunk: int):
    return search(model.bind(params), trie, batch, beams, normalize=normalize, chunk=chunk)


class _Beam(NamedTuple):
    """Hypotheses [B, W], best first. A hypothesis at a node without edges is finished. Unused places have a sum of -inf."""

    sum_BW: jax.Array  # float32, log-probability of the tokens so far
    length_BW: jax.Array  # int32, number of tokens so far
    node_BW: jax.Array  # int32
    token_BW: jax.Array  # int32, the last token
    parent_BW: jax.Array  # int32, index of the hypothesis of the previous step that this one extends


def search(
    model: Network, trie: Trie, batch: dict, beams: int, *, normalize: bool = False, chunk: int = 2048
) -> tuple[jax.Array, jax.Array]:
    """Finds the most likely items for each user. Traceable by JAX.

    Items with equal tokens follow each other in the order of the catalogue. Among equal scores of different texts, the text that was ahead
    one token earlier comes first, then the text with the smaller token.

    Args:
      model: the network with its parameters.
      trie: of the catalogue.
      batch: from `history_rows`, one user per row.
      beams: the number of hypotheses per user, which is also the number of items in the result.
      normalize: whether scores are divided by the number of tokens; the search then keeps the hypotheses with the best such scores.
      chunk: number of hypotheses whose logits are computed at the same time, rounded up to whole users.

    Returns:
      Items [B, beams] int32, distinct and best first, and their scores [B, beams] float32: log p(text of item | history), as
      `log_likelihoods` computes it.

    Raises:
      ValueError: if beams is below 1 or above the number of items, if the batch has candidates, if a relation of the schedule sees later
        tokens, or if the model has no output embedding or another vocabulary.
    """
    check_predicts(model)
    self_key, relations = model.config.model.self_key, model.config.schedule.relations
    if not 1 <= beams <= len(trie.item_I):
        raise ValueError(f"beams = {beams}: must be between 1 and the number of items, {len(trie.item_I)}")
    if "candidate" in batch:
        raise ValueError("beam search needs histories without candidates")
    output = model.output_embedding()
    if trie.vocabulary != (rows := sum(map(len, output))):
        raise ValueError(f"the vocabulary of the trie is {trie.vocabulary}, that of the model {rows}")
    (B, T), W, steps = batch["token"].shape, min(beams, trie.sequences), trie.depth - 1  # the model need not read the last token
    history_B, group_B = (batch["user"] > 0).sum(1), batch["group"].max(1) + 1
    begin_W = T + steps * jnp.arange(W)
    extend_user = partial(_extend, trie, output, width=W, normalize=normalize)

    def extend(x_BWD: jax.Array, beam: _Beam) -> _Beam:
        users = -(-chunk // x_BWD.shape[1])
        if users >= B:
            return jax.vmap(extend_user)(x_BWD, beam)
        return jax.lax.map(lambda xs: extend_user(*xs), (x_BWD, beam), batch_size=users)

    def step(carry: tuple[jax.Array, _Beam, Cache]):
        t, beam, cache = carry
        cache = jax.tree.map(partial(_reorder_cache, beam.parent_BW, T), cache)
        token = {
            "token": beam.token_BW,
            "user": jnp.ones_like(beam.token_BW),
            "group": jnp.broadcast_to(group_B[:, None], (B, W)),
            "position": jnp.broadcast_to(history_B[:, None] + t, (B, W)),
        }
        slot_W = begin_W + t
        ranges = decode_ranges(batch["user"], batch["group"], begin_W, slot_W, self_key, relations)
        x_BWD, cache = model.cached_states(token, cache, jnp.broadcast_to(slot_W, (B, W)), ranges)
        return t + 1, extend(x_BWD, beam), cache

    def unfinished(carry: tuple[jax.Array, _Beam, Cache]) -> jax.Array:
        t, beam, _ = carry
        return (t < steps) & (~_finished(trie, beam.node_BW) & (beam.sum_BW > -jnp.inf)).any()

    slot_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    x_BTD, cache = model.cached_states(batch, model.decoder.cache(B, T + W * steps), slot_BT)
    root = jnp.zeros((B, 1), jnp.int32)
    beam = extend(x_BTD[jnp.arange(B), history_B - 1][:, None], _Beam(jnp.zeros((B, 1)), root, root, root, root))
    if steps:
        _, beam, _ = jax.lax.while_loop(unfinished, step, (jnp.int32(0), beam, cache))
    return jax.vmap(partial(_items, trie, beams=beams))(beam.node_BW, _scores(beam.sum_BW, beam.length_BW, normalize))


def _finished(trie: Trie, node: jax.Array) -> jax.Array:
    return trie.first_edge_N[node] == trie.first_edge_N[node + 1]


def _scores(sums: jax.Array, length: jax.Array, normalize: bool) -> jax.Array:
    return sums / jnp.maximum(length, 1) if normalize else sums


def _extend(trie: Trie, output: tuple[jax.Array, ...], x_WD: jax.Array, beam: _Beam, *, width: int, normalize: bool) -> _Beam:
    """Extends the hypotheses of one user by a token, except finished ones, and keeps the best `width`.

    x_WD: the state at the last token of each hypothesis.
    """
    logits_WV = logits(x_WD, output)
    node_W = beam.node_BW[:, None]
    edge_WE = trie.first_edge_N[node_W] + jnp.arange(trie.degree)
    exists_WE = edge_WE < trie.first_edge_N[node_W + 1]
    token_WE = trie.edge_token[jnp.where(exists_WE, edge_WE, 0)]
    log_prob_WE = jnp.take_along_axis(logits_WV, token_WE, axis=1) - jax.nn.logsumexp(logits_WV, axis=1, keepdims=True)
    # A finished hypothesis is kept unchanged, at the index of its first edge.
    finished_W = _finished(trie, node_W)
    sum_WE = beam.sum_BW[:, None] + jnp.where(exists_WE, log_prob_WE, -jnp.inf)
    sum_WE = jnp.where(finished_W & (jnp.arange(trie.degree) == 0), beam.sum_BW[:, None], sum_WE)
    length_W = beam.length_BW + ~finished_W[:, 0]
    score_X = _scores(sum_WE, length_W[:, None], normalize).reshape(-1)
    score_X = jnp.where(jnp.isnan(score_X).any(), jnp.nan, score_X)  # so that a NaN reaches the result, wherever top_k would sort it
    score_X = jnp.pad(score_X, (0, max(width - len(score_X), 0)), constant_values=-jnp.inf)
    score_W, best_W = jax.lax.top_k(score_X, width)  # among equal scores the first
    unused_W = score_W == -jnp.inf
    best_W = jnp.where(unused_W, 0, best_W)
    parent_W = best_W // trie.degree
    node_W = jnp.where(finished_W, node_W, edge_WE + 1).reshape(-1)[best_W]
    sum_W = jnp.where(unused_W, -jnp.inf, jnp.where(jnp.isnan(score_W), jnp.nan, sum_WE.reshape(-1)[best_W]))
    return _Beam(sum_W, length_W[parent_W], jnp.where(unused_W, 0, node_W), token_WE.reshape(-1)[best_W], parent_W)


def _reorder_cache(parent_BW: jax.Array, history: int, cache_RBSKH: jax.Array) -> jax.Array:
    """Copies the slots after the history from each hypothesis to those that extend it."""
    R, B, S, K, H = cache_RBSKH.shape
    W = parent_BW.shape[1]
    own = cache_RBSKH[:, :, history:].reshape(R, B, W, (S - history) // W, K, H)
    own = own[:, jnp.arange(B)[:, None], parent_BW].reshape(R, B, S - history, K, H)
    # Not cache.at[:, :, history:].set(own): XLA's CPU compiler fuses it into one loop that works in place and reads slots that it has
    # already overwritten (openxla/xla#49176), so that the scores of later tokens are wrong.
    return jnp.concatenate([cache_RBSKH[:, :, :history], own], axis=2)


def _items(trie: Trie, node_W: jax.Array, score_W: jax.Array, *, beams: int) -> tuple[jax.Array, jax.Array]:
    """Returns the first `beams` items of one user's finished hypotheses, and their scores."""
    first_W = trie.first_item_N[node_W]
    count_W = trie.first_item_N[node_W + 1] - first_W  # 0 for unused places, since the root has no items
    ends_W = jnp.cumsum(count_W)
    index = jnp.arange(beams)
    w = jnp.searchsorted(ends_W, index, side="right")
    return trie.item_I[(first_W - ends_W + count_W)[w] + index], jnp.where(index < ends_W[-1], score_W[w], -jnp.inf)

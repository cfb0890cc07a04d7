"""The likeliest items of a whole catalogue by their text: beam search that cannot leave the trie of the items' tokens.

What comes out are items, each at most once, and as many as were asked for: every node of the trie leads to an item, so no hypothesis
dies. With a beam as wide as the catalogue it is the exhaustive ranking by `likelihood.log_likelihoods`.

Axes: B users, W hypotheses, T slots of the histories, S slots of the cache, N nodes, D model, V vocabulary, I items.
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

_ARRAYS = ("first_edge_N", "edge_token", "first_item_N", "item_I")  # of Trie


@partial(jax.tree_util.register_dataclass, data_fields=_ARRAYS, meta_fields=("depth", "degree", "sequences", "vocabulary"))
@dataclasses.dataclass(frozen=True)
class Trie:
    """The different token sequences of a catalogue, on the device. Nodes are numbered breadth first, 0 is the root, and siblings stand
    in the order of their tokens: edge e leads to node e + 1."""

    first_edge_N: jax.Array  # [nodes + 1] int32: node n's edges are first_edge_N[n]:first_edge_N[n + 1]; none: a whole item
    edge_token: jax.Array  # [edges] int32
    first_item_N: jax.Array  # [nodes + 1] int32: node n's items are item_I[first_item_N[n]:first_item_N[n + 1]]
    item_I: jax.Array  # int32 rows of the catalogue; those with equal tokens in the catalogue's order
    depth: int  # tokens of the longest item
    degree: int  # edges of the node that has most
    sequences: int  # different ones
    vocabulary: int  # tokens are below it


def make_trie(catalogue: Catalogue) -> Trie:
    """Raises ValueError where there is no item, or one's tokens begin another's: boundary tokens make that impossible."""
    if not catalogue.items or not catalogue.item_lengths.all():
        raise ValueError("a trie needs items, and tokens of each")
    token_IT, length_I = catalogue.padded()
    token_IT[np.arange(token_IT.shape[1]) >= length_I[:, None]] = -1
    order_I = np.lexsort(token_IT.T[::-1])  # stable: equal ones stay in the catalogue's order
    token_IT, length_I = token_IT[order_I], length_I[order_I]
    node_I = np.zeros(catalogue.items, np.int64)  # where each item's tokens so far lead
    differs_I = np.arange(catalogue.items) == 0  # in its tokens so far, from the item before it
    parents, tokens, nodes = [], [], 1
    for t in range(token_IT.shape[1]):
        token_I, here_I = token_IT[:, t], length_I > t
        differs_I[1:] |= token_I[1:] != token_I[:-1]
        new_I = differs_I & here_I
        parents.append(node_I[new_I])
        tokens.append(token_I[new_I])
        node_I = np.where(here_I, nodes - 1 + np.cumsum(new_I), node_I)
        nodes += len(tokens[-1])
    first_edge_N = np.searchsorted(np.concatenate(parents), np.arange(nodes + 1))
    degree_N = np.diff(first_edge_N)
    if (inner_I := degree_N[node_I] > 0).any():
        raise ValueError(f"item {order_I[inner_I].min()}: its tokens are the first of another item's")
    by_node_I = np.argsort(node_I, kind="stable")
    first_item_N = np.searchsorted(node_I[by_node_I], np.arange(nodes + 1))
    arrays = (first_edge_N, np.concatenate(tokens), first_item_N, order_I[by_node_I])
    meta = token_IT.shape[1], int(degree_N.max()), int((degree_N == 0).sum()), catalogue.vocabulary
    return Trie(*(jnp.asarray(x, jnp.int32) for x in arrays), *meta)


def history_rows(catalogue: Catalogue, histories: Sequence[np.ndarray], max_tokens: int, row_tokens: int | None = None) -> Batch:
    """One row per user: the prompt, the items of the history, the suffix; as `candidate_rows` with the whole catalogue as candidates, so
    that max_tokens leave room for the longest item. Raises ValueError as it does."""
    longest = int(catalogue.item_lengths.max())
    if max_tokens < longest + catalogue.frame_tokens:
        raise ValueError(f"the longest item, {longest} tokens, does not fit in {max_tokens} tokens beside prompt and suffix")
    none = [np.zeros(0, np.int64)] * len(histories)
    rows = candidate_rows(catalogue, histories, none, max_tokens - longest, row_tokens)
    return {name: rows[name] for name in ("token", "user", "group", "position")}


def beam_search(
    model: Model, params: Params, trie: Trie, batch: dict, beams: int, *, normalize: bool = False, chunk: int = 2048
) -> tuple[np.ndarray, np.ndarray]:
    """`search` compiled, with its result checked: raises FloatingPointError for scores that are not finite, and ValueError for a row
    without a token and for learned positions that do not reach."""
    history_B = (np.asarray(batch["user"]) > 0).sum(1)
    if not history_B.all():
        raise ValueError(f"row {history_B.argmin()} has no token to start from")
    last, learned = int(history_B.max()) + trie.depth - 1, model.bind(params).decoder.position_PD
    if learned is not None and last > learned[...].shape[0]:
        raise ValueError(f"{learned[...].shape[0]} learned positions: the longest history and item need {last}")
    item_BW, score_BW = map(np.asarray, _search(model, params, trie, batch, beams, normalize, chunk))
    if not np.isfinite(score_BW).all():
        raise FloatingPointError(f"beam search: {(~np.isfinite(score_BW)).sum():,} of {score_BW.size:,} scores are not finite")
    return item_BW, score_BW


@partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _search(model: Model, params: Params, trie: Trie, batch: dict, beams: int, normalize: bool, chunk: int):
    return search(model.bind(params), trie, batch, beams, normalize=normalize, chunk=chunk)


class _Beam(NamedTuple):
    """Hypotheses [B, W], best first. Those at a node without edges are finished; a sum of -inf marks places that nobody has."""

    sum_BW: jax.Array  # float32: log-probability of the tokens so far
    length_BW: jax.Array  # int32: how many there are
    node_BW: jax.Array  # int32
    token_BW: jax.Array  # int32: the last
    parent_BW: jax.Array  # int32: place of the hypothesis that this one continues, a step before


def search(
    model: Network, trie: Trie, batch: dict, beams: int, *, normalize: bool = False, chunk: int = 2048
) -> tuple[jax.Array, jax.Array]:
    """Items [B, beams] int32, all different, best first, and their scores float32: log p(text of item | history) as by `log_likelihoods`;
    normalize: divided by the tokens, and the search keeps what is best by that. Traceable.

    batch: from `history_rows`, one user per row. Items with equal tokens follow one another in the catalogue's order; among equal scores
    of different texts the one comes first whose text was ahead a token earlier, then the one with the lower token. `chunk`: hypotheses
    whose logits exist at one time, rounded up to whole users. Raises ValueError for fewer than one beam or more than items, for candidates
    in the batch, a relation that sees later tokens, and a model without an output embedding or with another vocabulary."""
    check_predicts(model)
    self_key, relations = model.config.model.self_key, model.config.schedule.relations
    if not 1 <= beams <= len(trie.item_I):
        raise ValueError(f"beams = {beams}: must be between 1 and the number of items, {len(trie.item_I)}")
    if "candidate" in batch:
        raise ValueError("beam search takes histories without candidates")
    output = model.output_embedding()
    if trie.vocabulary != (rows := sum(map(len, output))):
        raise ValueError(f"the trie's vocabulary is {trie.vocabulary}, the model's {rows}")
    (B, T), W, more = batch["token"].shape, min(beams, trie.sequences), trie.depth - 1  # the last token need not be read again
    history_B, group_B = (batch["user"] > 0).sum(1), batch["group"].max(1) + 1
    begin_W = T + more * jnp.arange(W)
    of_user = partial(_extend, trie, output, width=W, normalize=normalize)

    def extend(x_BWD: jax.Array, beam: _Beam) -> _Beam:
        users = -(-chunk // x_BWD.shape[1])
        return jax.vmap(of_user)(x_BWD, beam) if users >= B else jax.lax.map(lambda xs: of_user(*xs), (x_BWD, beam), batch_size=users)

    def step(carry: tuple[jax.Array, _Beam, Cache]):
        place, beam, cache = carry
        cache = jax.tree.map(partial(_continued, beam.parent_BW, T), cache)
        token = {
            "token": beam.token_BW,
            "user": jnp.ones_like(beam.token_BW),
            "group": jnp.broadcast_to(group_B[:, None], (B, W)),
            "position": jnp.broadcast_to(history_B[:, None] + place, (B, W)),
        }
        slot_W = begin_W + place
        ranges = decode_ranges(batch["user"], batch["group"], begin_W, slot_W, self_key, relations)
        x_BWD, cache = model.cached_states(token, cache, jnp.broadcast_to(slot_W, (B, W)), ranges)
        return place + 1, extend(x_BWD, beam), cache

    def goes_on(carry: tuple[jax.Array, _Beam, Cache]) -> jax.Array:
        place, beam, _ = carry
        return (place < more) & (~_finished(trie, beam.node_BW) & (beam.sum_BW > -jnp.inf)).any()

    slot_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    x_BTD, cache = model.cached_states(batch, model.decoder.cache(B, T + W * more), slot_BT)
    root = jnp.zeros((B, 1), jnp.int32)
    beam = extend(x_BTD[jnp.arange(B), history_B - 1][:, None], _Beam(jnp.zeros((B, 1)), root, root, root, root))
    if more:
        _, beam, _ = jax.lax.while_loop(goes_on, step, (jnp.int32(0), beam, cache))
    return jax.vmap(partial(_items, trie, beams=beams))(beam.node_BW, _scores(beam.sum_BW, beam.length_BW, normalize))


def _finished(trie: Trie, node: jax.Array) -> jax.Array:
    return trie.first_edge_N[node] == trie.first_edge_N[node + 1]


def _scores(sums: jax.Array, length: jax.Array, normalize: bool) -> jax.Array:
    return sums / jnp.maximum(length, 1) if normalize else sums


def _extend(trie: Trie, output: tuple[jax.Array, ...], x_WD: jax.Array, beam: _Beam, *, width: int, normalize: bool) -> _Beam:
    """One user's best `width` hypotheses, each a token longer unless it was finished; x_WD: the state behind each one's last token."""
    logits_WV = logits(x_WD, output)
    node_W = beam.node_BW[:, None]
    edge_WE = trie.first_edge_N[node_W] + jnp.arange(trie.degree)
    there_WE = edge_WE < trie.first_edge_N[node_W + 1]
    token_WE = trie.edge_token[jnp.where(there_WE, edge_WE, 0)]
    log_prob_WE = jnp.take_along_axis(logits_WV, token_WE, axis=1) - jax.nn.logsumexp(logits_WV, axis=1, keepdims=True)
    # A finished one stays as it is, in the place of its first edge.
    stays_W = _finished(trie, node_W)
    sum_WE = beam.sum_BW[:, None] + jnp.where(there_WE, log_prob_WE, -jnp.inf)
    sum_WE = jnp.where(stays_W & (jnp.arange(trie.degree) == 0), beam.sum_BW[:, None], sum_WE)
    length_W = beam.length_BW + ~stays_W[:, 0]
    score_X = _scores(sum_WE, length_W[:, None], normalize).reshape(-1)
    score_X = jnp.where(jnp.isnan(score_X).any(), jnp.nan, score_X)  # not finite: to be seen at the end, wherever it would sort
    score_X = jnp.pad(score_X, (0, max(width - len(score_X), 0)), constant_values=-jnp.inf)
    score_W, best_W = jax.lax.top_k(score_X, width)  # of equal ones the first
    nobody_W = score_W == -jnp.inf
    best_W = jnp.where(nobody_W, 0, best_W)
    parent_W = best_W // trie.degree
    node_W = jnp.where(stays_W, node_W, edge_WE + 1).reshape(-1)[best_W]
    sum_W = jnp.where(nobody_W, -jnp.inf, jnp.where(jnp.isnan(score_W), jnp.nan, sum_WE.reshape(-1)[best_W]))
    return _Beam(sum_W, length_W[parent_W], jnp.where(nobody_W, 0, node_W), token_WE.reshape(-1)[best_W], parent_W)


def _continued(parent_BW: jax.Array, history: int, cache_RBSKH: jax.Array) -> jax.Array:
    """The cache with each hypothesis' slots, behind the history's, filled from those of the one it continues."""
    R, B, S, K, H = cache_RBSKH.shape
    W = parent_BW.shape[1]
    own = cache_RBSKH[:, :, history:].reshape(R, B, W, (S - history) // W, K, H)
    own = own[:, jnp.arange(B)[:, None], parent_BW].reshape(R, B, S - history, K, H)
    # Not cache.at[:, :, history:].set(own): XLA's CPU compiler makes one loop of that, in place, and reads what it has overwritten
    # (openxla/xla#49176; the scores of later tokens come out wrong).
    return jnp.concatenate([cache_RBSKH[:, :, :history], own], axis=2)


def _items(trie: Trie, node_W: jax.Array, score_W: jax.Array, *, beams: int) -> tuple[jax.Array, jax.Array]:
    """One user's first `beams` items of finished hypotheses, and each one's score."""
    first_W = trie.first_item_N[node_W]
    count_W = trie.first_item_N[node_W + 1] - first_W  # 0 where nobody is: the root has no items
    ends_W = jnp.cumsum(count_W)
    place = jnp.arange(beams)
    w = jnp.searchsorted(ends_W, place, side="right")
    return trie.item_I[(first_W - ends_W + count_W)[w] + place], jnp.where(place < ends_W[-1], score_W[w], -jnp.inf)

"""From segments to relations: the key range of every token, per relation (iam_jax/relations.py); and rotary positions."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from iam_jax.config import ModelConfig
from iam_jax.kernels.range_attention import Range
from iam_jax.relations import RELATIONS, Layout, Relation


class Ranges(NamedTuple):
    """The keys that each token may see in one relation: start and stop of one range, or of two disjoint ones."""

    first: Range
    second: Range | None = None


def group_starts(user_BT: jax.Array, group_BT: jax.Array, candidate_BT: jax.Array | None = None) -> jax.Array:
    """[B, T] int32: the first slot of each token's group."""
    return _last_true(_changes(user_BT) | _changes(group_BT) | (False if candidate_BT is None else _changes(candidate_BT)))


def history_ends(candidate_BT: jax.Array) -> jax.Array:
    """[B, T] int32: for the tokens of candidates, the slot after their history's last token; arbitrary for other tokens."""
    before_BT = jnp.pad(candidate_BT[:, :-1], ((0, 0), (1, 0)))
    return _last_true((candidate_BT > 0) & (before_BT == 0))


def key_ranges(
    user_BT: jax.Array, group_BT: jax.Array, candidate_BT: jax.Array | None = None, relations: Iterable[str] | None = None
) -> dict[str, Ranges]:
    """The key ranges of each relation, by name. relations: names; None: all that are registered. User 0 is padding: it sees nothing.
    candidate_BT: 1, 2, … for the candidates after a user's history (which needs at least one item or a prompt), 0 for the history. A
    candidate is an item of its own: it sees the history and itself."""
    T = user_BT.shape[1]
    t = jnp.broadcast_to(jnp.arange(T), user_BT.shape)
    item_start = group_starts(user_BT, group_BT, candidate_BT)
    last = jnp.pad(item_start[:, 1:] == t[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    item_stop = lax.cummin(jnp.where(last, t + 1, T), axis=1, reverse=True)
    real = user_BT > 0
    if candidate_BT is None:
        apart, before = None, item_start
    else:
        apart = real & (candidate_BT > 0)
        before = jnp.where(apart, history_ends(candidate_BT), item_start)
    layout = Layout(_last_true(_changes(user_BT)), before, item_start, item_stop, t, item_start)
    found = {name: _ranges(RELATIONS[name], layout, apart) for name in _names(relations)}
    return jax.tree.map(lambda bound: jnp.where(real, bound, 0), found)


def decode_ranges(
    user_BS: jax.Array,
    group_BS: jax.Array,
    begin_C: jax.Array,
    slot_C: jax.Array,
    self_key: bool,
    relations: Iterable[str] | None = None,
) -> dict[str, Ranges]:
    """The key ranges of one new token of each of C candidates after a history, in slots of a cache, by relation. user_BS, group_BS: of
    the histories, one user a row; their tokens lie in the cache's first slots. Candidate c's tokens lie in slots begin_C, …, slot_C, the
    new one last. self_key: whether inter layers include the token itself; the ranges then contain it. relations: names; None: all that do
    not see ahead. Raises ValueError for a relation that sees ahead."""
    shape = len(user_BS), len(slot_C)
    history, slot = (user_BS > 0).sum(1, dtype=jnp.int32)[:, None], jnp.broadcast_to(slot_C, shape)
    zero, begin = jnp.zeros(shape, jnp.int32), jnp.broadcast_to(begin_C, shape)
    layout = Layout(zero, jnp.broadcast_to(history, shape), begin, slot + 1, slot, group_starts(user_BS, group_BS))
    found = {}
    for name in [name for name in RELATIONS if not RELATIONS[name].sees_ahead] if relations is None else _names(relations):
        if RELATIONS[name].sees_ahead:
            raise ValueError(f"{name!r} cannot decode: it sees the tokens that are to be predicted")
        found[name] = _ranges(RELATIONS[name], layout, True)
        if self_key and RELATIONS[name].other_items_only:
            found[name] = Ranges(found[name].first, (slot, slot + 1))
    return found


def _names(relations: Iterable[str] | None) -> list[str]:
    return list(RELATIONS if relations is None else dict.fromkeys(relations))


def _ranges(relation: Relation, layout: Layout, apart: jax.Array | bool | None) -> Ranges:
    """apart: whether other tokens may lie between a token's earlier items and its own, as for candidates; None: nowhere."""
    own = layout.item_start, layout.item_stop if relation.sees_ahead else layout.slot + 1
    if relation.start is None:
        return Ranges(own)
    before = layout.before
    stop = before if relation.stop is None else jnp.clip(relation.stop(layout), layout.user_start, before)
    earlier = jnp.clip(relation.start(layout), layout.user_start, stop), stop
    if relation.other_items_only:
        return Ranges(earlier)
    if relation.stop is not None or apart is True:
        return Ranges(earlier, own)
    if apart is None:  # one range: the own item follows
        return Ranges((earlier[0], own[1]))
    return Ranges((earlier[0], jnp.where(apart, stop, own[1])), (jnp.where(apart, own[0], 0), jnp.where(apart, own[1], 0)))


def _changes(x_BT: jax.Array) -> jax.Array:
    """[B, T] bool: whether a slot differs from the one before it; true for the first slot."""
    return jnp.pad(x_BT[:, 1:] != x_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def _last_true(x_BT: jax.Array) -> jax.Array:
    """[B, T]: for each slot, the last slot up to it where x is true; 0 if there is none."""
    return lax.cummax(jnp.where(x_BT, jnp.arange(x_BT.shape[1]), 0), axis=1)


def frequencies(config: ModelConfig, half: int) -> jax.Array:
    """[half] float32: frequencies of rotary position embeddings in radians per position, scaled by `config.rope_scaling`."""
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling == "linear":
        return frequency / config.rope_factor
    if config.rope_scaling == "llama3":
        turns = frequency * config.rope_original / (2 * jnp.pi)
        kept = jnp.clip((turns - config.rope_low) / (config.rope_high - config.rope_low), 0, 1)
        return frequency * (kept + (1 - kept) / config.rope_factor)
    return frequency


def rotary(x_BTNH: jax.Array, position_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864). It pairs the two halves of a head, as LLaMA's public weights need; float32 angles."""
    angle = position_BT[..., None, None].astype(jnp.float32) * frequencies(config, x_BTNH.shape[-1] // 2)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)

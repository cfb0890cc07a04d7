"""From segments to relations: the key range of every token, per relation (README, "The mathematics")."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from iam_jax.config import ModelConfig
from iam_jax.kernels.range_attention import Range


class Ranges(NamedTuple):
    """The keys that each token may see in one relation: start and stop of one range, or of two."""

    first: Range
    second: Range | None = None


def group_starts(user_BT: jax.Array, group_BT: jax.Array, candidate_BT: jax.Array | None = None) -> jax.Array:
    """[B, T] int32: the first slot of each token's group."""
    return _last_true(_changes(user_BT) | _changes(group_BT) | (False if candidate_BT is None else _changes(candidate_BT)))


def history_ends(candidate_BT: jax.Array) -> jax.Array:
    """[B, T] int32: for the tokens of candidates, the slot behind their history's last token; otherwise anything."""
    before_BT = jnp.pad(candidate_BT[:, :-1], ((0, 0), (1, 0)))
    return _last_true((candidate_BT > 0) & (before_BT == 0))


def key_ranges(user_BT: jax.Array, group_BT: jax.Array, candidate_BT: jax.Array | None = None) -> dict[str, Ranges]:
    """The ranges of every relation. user 0 is padding: it sees nothing. candidate_BT: 1, 2, … for the candidates behind a user's
    history (there must be one, or a prompt), each an item of its own that sees the history and itself; 0 for the history."""
    T = user_BT.shape[1]
    t = jnp.broadcast_to(jnp.arange(T), user_BT.shape)
    user_start = _last_true(_changes(user_BT))
    item_start = group_starts(user_BT, group_BT, candidate_BT)
    last = jnp.pad(item_start[:, 1:] == t[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    item_end = lax.cummin(jnp.where(last, t + 1, T), axis=1, reverse=True)

    real = user_BT > 0

    def cut(start, stop, of=real):
        return jnp.where(of, start, 0), jnp.where(of, stop, 0)

    full, inter = Ranges(cut(user_start, t + 1)), Ranges(cut(user_start, item_start))
    if candidate_BT is not None:
        is_candidate = real & (candidate_BT > 0)
        history = cut(user_start, jnp.where(is_candidate, history_ends(candidate_BT), t + 1))
        full = Ranges(history, cut(item_start, t + 1, is_candidate))
        inter = Ranges(cut(user_start, jnp.where(is_candidate, history_ends(candidate_BT), item_start)))
    return {"full": full, "intra": Ranges(cut(item_start, t + 1)), "inter": inter, "intra_both": Ranges(cut(item_start, item_end))}


def decode_ranges(history_B: jax.Array, begin_C: jax.Array, slot_C: jax.Array, self_key: bool) -> dict[str, Ranges]:
    """The ranges of one new token of each of C candidates behind a history, in slots of a cache: the history is slots 0, …, history_B - 1,
    candidate c's tokens are slots begin_C, …, slot_C, the new one last."""
    shape = len(history_B), len(slot_C)
    zero, begin, slot = jnp.zeros(shape, jnp.int32), jnp.broadcast_to(begin_C, shape), jnp.broadcast_to(slot_C, shape)
    history, own = (zero, jnp.broadcast_to(history_B[:, None], shape)), (begin, slot + 1)
    return {
        "full": Ranges(history, own),
        "intra": Ranges(own),
        "inter": Ranges(history, (slot, slot + 1) if self_key else None),
    }


def _changes(x_BT: jax.Array) -> jax.Array:
    """Where a slot differs from the one before it, the first slot included."""
    return jnp.pad(x_BT[:, 1:] != x_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def _last_true(x_BT: jax.Array) -> jax.Array:
    """The last slot up to each one where x is true, 0 where there is none."""
    return lax.cummax(jnp.where(x_BT, jnp.arange(x_BT.shape[1]), 0), axis=1)


def frequencies(config: ModelConfig, half: int) -> jax.Array:
    """[half] float32, radians a position: of rotary position embeddings, scaled as LLaMA 3.1 does it or by one factor."""
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling == "linear":
        return frequency / config.rope_factor
    if config.rope_scaling == "llama3":
        turns = frequency * config.rope_original / (2 * jnp.pi)
        kept = jnp.clip((turns - config.rope_low) / (config.rope_high - config.rope_low), 0, 1)
        return frequency * (kept + (1 - kept) / config.rope_factor)
    return frequency


def rotary(x_BTNH: jax.Array, position_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864), halves paired as in LLaMA's public weights; angles in float32."""
    angle = position_BT[..., None, None].astype(jnp.float32) * frequencies(config, x_BTNH.shape[-1] // 2)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)

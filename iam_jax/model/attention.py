"""From segments to relations: the key range of every token, per relation (README, "The mathematics")."""

import jax
import jax.numpy as jnp
from jax import lax

Ranges = dict[str, tuple[jax.Array, jax.Array]]


def key_ranges(user_BT: jax.Array, group_BT: jax.Array) -> Ranges:
    """For each relation, the first key and the one after the last that a token may see. user 0 is padding: it sees nothing."""
    B, T = user_BT.shape
    t = jnp.broadcast_to(jnp.arange(T), (B, T))

    def changes(x_BT):
        return jnp.concatenate([jnp.ones((B, 1), bool), x_BT[:, 1:] != x_BT[:, :-1]], axis=1)

    new_user = changes(user_BT)
    new_item = new_user | changes(group_BT)
    user_start = lax.cummax(jnp.where(new_user, t, 0), axis=1)
    item_start = lax.cummax(jnp.where(new_item, t, 0), axis=1)
    last = jnp.concatenate([new_item[:, 1:], jnp.ones((B, 1), bool)], axis=1)
    item_end = lax.cummin(jnp.where(last, t + 1, T), axis=1, reverse=True)

    real = user_BT > 0
    ranges = {
        "full": (user_start, t + 1),
        "intra": (item_start, t + 1),
        "inter": (user_start, item_start),
        "intra_both": (item_start, item_end),
    }
    return {name: (jnp.where(real, start, 0), jnp.where(real, stop, 0)) for name, (start, stop) in ranges.items()}


def rotary(x_BTNH: jax.Array, position_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864), halves paired as in LLaMA's public weights; angles in float32."""
    half = x_BTNH.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position_BT[..., None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)

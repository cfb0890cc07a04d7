"""Attention where each query sees one contiguous range of keys: the operation behind every relation.

Axes: B batch, T query positions, S key positions, N heads, K key-value heads, H head size.
"""

import jax
import jax.numpy as jnp


def range_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    key_start_BT: jax.Array,
    key_stop_BT: jax.Array,
    *,
    include_self: bool = False,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over the keys `key_start <= s < key_stop`, and with `include_self` also s = t, counted once.

    A query without a key gets exactly zero, and gives exactly zero gradients. (`jax.nn.dot_product_attention` alone would give
    it the mean of *all* values: other users' and later ones too.) Logits and softmax are computed in float32. Returns o_BTNH in
    q's type.
    """
    s = jnp.arange(k_BSKH.shape[1])
    allowed_BTS = (s >= key_start_BT[..., None]) & (s < key_stop_BT[..., None])
    if include_self:
        allowed_BTS |= jnp.arange(q_BTNH.shape[1])[:, None] == s
    o_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=allowed_BTS[:, None], implementation="xla")
    return jnp.where(allowed_BTS.any(-1)[..., None, None], o_BTNH, 0)

"""The pairs of a query block and a key block that contain at least one allowed (query, key) pair: the pairs that a kernel must visit.

Axes: B batch, T query positions, S key positions, I query blocks, J key blocks.
"""

import jax
import jax.numpy as jnp


def needed_blocks(start_BT: jax.Array, stop_BT: jax.Array, keys: int, query_block: int, key_block: int) -> jax.Array:
    """Returns [B, I, J] bool: True if the range [start, stop) of any query in block I contains a key of block J. This is exact.

    Ranges are clipped to [0, keys). query_block and key_block are the numbers of positions in a block. The smallest start and the largest
    stop of a query block are not sufficient: if a block holds two users, many key blocks between their ranges may not be needed.
    """
    B, T = start_BT.shape
    I, J = -(-T // query_block), -(-keys // key_block)  # noqa: E741
    padding = ((0, 0), (0, I * query_block - T))
    start = jnp.pad(jnp.maximum(start_BT, 0), padding).reshape(B, I, query_block, 1)
    stop = jnp.pad(jnp.minimum(stop_BT, keys), padding).reshape(B, I, query_block, 1)
    first_J = jnp.arange(J) * key_block
    return ((start < stop) & (start < first_J + key_block) & (stop > first_J)).any(2)

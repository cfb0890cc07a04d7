"""Which pairs of a query block and a key block hold an allowed (query, key) pair: what a kernel must visit, and no more.

Axes: B batch, T query positions, S key positions, I query blocks, J key blocks.
"""

import jax
import jax.numpy as jnp


def needed_blocks(start_BT: jax.Array, stop_BT: jax.Array, keys: int, query_block: int, key_block: int) -> jax.Array:
    """[B, I, J] bool, exact: some query of block I has a key of block J in its range [start, stop), cut to [0, keys).

    The smallest start and the largest stop of a block would not do: between the ranges of two users in one block may lie many
    blocks that neither needs.
    """
    B, T = start_BT.shape
    I, J = -(-T // query_block), -(-keys // key_block)  # noqa: E741
    padding = ((0, 0), (0, I * query_block - T))
    start = jnp.pad(jnp.maximum(start_BT, 0), padding).reshape(B, I, query_block, 1)
    stop = jnp.pad(jnp.minimum(stop_BT, keys), padding).reshape(B, I, query_block, 1)
    first_J = jnp.arange(J) * key_block
    return ((start < stop) & (start < first_J + key_block) & (stop > first_J)).any(2)

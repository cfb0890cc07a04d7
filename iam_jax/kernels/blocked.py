"""Range attention in plain XLA that visits only the needed pairs of blocks, one after another. It is made for CPUs.

On a CPU this is faster than a dense mask: the logits of a pair stay in the cache, memory is linear in the length of the row, and blocks
outside all ranges are not computed. On an accelerator a loop of small operations would be slow; use the kernels there.

Axes: B batch, T query positions, S key positions, N heads, K key-value heads, G query heads per key-value head, H head size. Inside the
loop: Q queries and Y keys of a pair of blocks, I and J query and key blocks per row.
"""

import jax
import jax.numpy as jnp
from jax import lax

from iam_jax.kernels.blocks import needed_blocks

LOWEST = -1e30  # initial maximum; finite, so that queries without keys give no NaN


def unsupported_reason(q: jax.Array | jax.ShapeDtypeStruct, k: jax.Array | jax.ShapeDtypeStruct, reach: tuple[int, int] | None) -> str:
    """Returns why the backend does not support the inputs. This backend supports all, so the result is ""."""
    return ""


def block_size(T: int, S: int) -> int:
    """The number of queries, and of keys, in a block."""
    return min(128, max(T, S))


def forward(q_BTNH, k_BSKH, v_BSKH, start_BT, stop_BT, *, reach: tuple[int, int] | None, dtype) -> tuple[jax.Array, jax.Array]:
    """Returns o_BTNH in `dtype` and the log-sum-exp lse_BTN in float32. Queries without keys get 0 and -inf."""
    blocks = _Blocks(q_BTNH, k_BSKH, start_BT, stop_BT)
    q, k, v = blocks.split_queries(q_BTNH), blocks.split_keys(k_BSKH), blocks.split_keys(v_BSKH)

    def visit(n, state):
        o, top, total = state
        i, j = blocks.pair(n)
        inside, logits_KGQY = blocks.logits(i, j, q, k)
        old_top = blocks.get(top, i)
        new_top = jnp.maximum(old_top, logits_KGQY.max(-1))
        p = jnp.where(inside, jnp.exp(logits_KGQY - new_top[..., None]), 0)
        rescale = jnp.exp(old_top - new_top)
        product = blocks.product("KGQY,KYH->KGQH", p.astype(v.dtype), blocks.get(v, j))
        o = blocks.put(o, i, blocks.get(o, i) * rescale[..., None] + product)
        return o, blocks.put(top, i, new_top), blocks.put(total, i, blocks.get(total, i) * rescale + p.sum(-1))

    rows = q.shape[:-1]
    o, top, total = lax.fori_loop(0, blocks.count, visit, (jnp.zeros(q.shape), jnp.full(rows, LOWEST), jnp.zeros(rows)))
    empty = total == 0  # False for NaN, which must reach the output
    total = jnp.where(empty, 1, total)
    o = jnp.where(empty[..., None], 0, o / total[..., None])
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    return blocks.join_queries(o).astype(dtype), blocks.join_queries(lse[..., None])[..., 0]


def backward(q_BTNH, k_BSKH, v_BSKH, start_BT, stop_BT, do_BTNH, lse_BTN, delta_BTN, *, reach: tuple[int, int] | None):
    """Returns dq, dk and dv in float32, from the merged log-sum-exp and delta = sum_H do o."""
    blocks = _Blocks(q_BTNH, k_BSKH, start_BT, stop_BT)
    q, k, v = blocks.split_queries(q_BTNH), blocks.split_keys(k_BSKH), blocks.split_keys(v_BSKH)
    do = blocks.split_queries(do_BTNH.astype(q_BTNH.dtype))
    lse, delta = (blocks.split_queries(x[..., None]) for x in (jnp.maximum(lse_BTN, LOWEST), delta_BTN))

    def visit(n, state):
        dq, dk, dv = state
        i, j = blocks.pair(n)
        inside, logits_KGQY = blocks.logits(i, j, q, k)
        p = jnp.where(inside, jnp.exp(logits_KGQY - blocks.get(lse, i)), 0)
        dp = blocks.product("KGQH,KYH->KGQY", blocks.get(do, i), blocks.get(v, j))
        ds = (p * (dp - blocks.get(delta, i)) * blocks.scale).astype(q.dtype)
        p = p.astype(q.dtype)
        dq = blocks.put(dq, i, blocks.get(dq, i) + blocks.product("KGQY,KYH->KGQH", ds, blocks.get(k, j)))
        dk = blocks.put(dk, j, blocks.get(dk, j) + blocks.product("KGQY,KGQH->KYH", ds, blocks.get(q, i)))
        return dq, dk, blocks.put(dv, j, blocks.get(dv, j) + blocks.product("KGQY,KGQH->KYH", p, blocks.get(do, i)))

    dq, dk, dv = lax.fori_loop(0, blocks.count, visit, (jnp.zeros(q.shape), jnp.zeros(k.shape), jnp.zeros(v.shape)))
    return blocks.join_queries(dq), blocks.join_keys(dk), blocks.join_keys(dv)


class _Blocks:
    """Splits arrays into blocks, with the blocks of all rows on one leading axis, and lists the pairs of blocks to visit."""

    def __init__(self, q_BTNH, k_BSKH, start_BT, stop_BT):
        self.B, self.T, _, H = q_BTNH.shape
        self.S, self.K = k_BSKH.shape[1:3]
        self.block, self.scale = block_size(self.T, self.S), H**-0.5
        self.precision = "highest" if q_BTNH.dtype == jnp.float32 else None
        needed = needed_blocks(start_BT, stop_BT, self.S, self.block, self.block)
        _, self.I, self.J = needed.shape
        self.count = needed.sum(dtype=jnp.int32)
        (self.pairs,) = jnp.nonzero(needed.reshape(-1), size=needed.size, fill_value=0)
        self.start, self.stop = (self._split(x.astype(jnp.int32), self.I) for x in (start_BT, stop_BT))

    def _split(self, x, blocks: int):
        x = jnp.pad(x, ((0, 0), (0, blocks * self.block - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(x.shape[0] * blocks, self.block, *x.shape[2:])

    def split_queries(self, x_BTNH):
        """[B I, K, G, Q, H]"""
        x = self._split(x_BTNH, self.I)
        return jnp.moveaxis(x.reshape(*x.shape[:2], self.K, -1, x.shape[-1]), 1, 3)

    def split_keys(self, x_BSKH):
        """[B J, K, Y, H]"""
        return jnp.moveaxis(self._split(x_BSKH, self.J), 1, 2)

    def join_queries(self, x):
        """The inverse of `split_queries`."""
        x = jnp.moveaxis(x, 3, 1)
        return x.reshape(self.B, self.I * self.block, -1, x.shape[-1])[:, : self.T]

    def join_keys(self, x):
        """The inverse of `split_keys`."""
        return jnp.moveaxis(x, 2, 1).reshape(self.B, self.J * self.block, self.K, -1)[:, : self.S]

    def pair(self, n):
        """The indices of the query block and the key block of the n-th pair, on the leading axis of the split arrays."""
        b, within_row = jnp.divmod(self.pairs[n], self.I * self.J)
        i, j = jnp.divmod(within_row, self.J)
        return b * self.I + i, b * self.J + j

    def get(self, x, index):
        return lax.dynamic_index_in_dim(x, index, 0, keepdims=False)

    def put(self, x, index, value):
        return lax.dynamic_update_index_in_dim(x, value, index, 0)

    def product(self, axes: str, x, y):
        return jnp.einsum(axes, x, y, precision=self.precision, preferred_element_type=jnp.float32)

    def logits(self, i, j, q, k):
        """Returns whether each key is in each query's range, [Q, Y], and the logits [K, G, Q, Y] in float32, LOWEST outside the ranges."""
        s = j % self.J * self.block + jnp.arange(self.block)
        inside = (s >= self.get(self.start, i)[:, None]) & (s < self.get(self.stop, i)[:, None]) & (s < self.S)
        logits = self.product("KGQH,KYH->KGQY", self.get(q, i), self.get(k, j)) * self.scale
        return inside, jnp.where(inside, logits, LOWEST)

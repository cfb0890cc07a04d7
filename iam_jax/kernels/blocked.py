"""Range attention in plain XLA that visits the needed pairs of blocks, one after another: for CPUs, where that beats a dense mask.

A pair's logits stay in the cache, memory is linear in the row's length, and what no range touches is not computed. On accelerators a loop
of small operations would be slow: they have kernels.

Axes: B batch, T query positions, S key positions, N heads, K key-value heads, G query heads of a key-value head, H head size; in the
loop: Q, Y queries and keys of a pair.
"""

import jax
import jax.numpy as jnp
from jax import lax

from iam_jax.kernels.blocks import needed_blocks

LOWEST = -1e30  # a finite maximum for rows without a key


def refuses(q: jax.Array, k: jax.Array, reach: tuple[int, int] | None) -> str:
    return ""


def block_size(T: int, S: int) -> int:
    """Queries, and keys, of a block."""
    return min(128, max(T, S))


def forward(q_BTNH, k_BSKH, v_BSKH, start_BT, stop_BT, *, reach: tuple[int, int] | None, dtype) -> tuple[jax.Array, jax.Array]:
    """o_BTNH in `dtype` and the log-sum-exp lse_BTN, float32; 0 and -inf in rows without a key."""
    cut = _Cut(q_BTNH, k_BSKH, start_BT, stop_BT)
    q, k, v = cut.queries(q_BTNH), cut.keys(k_BSKH), cut.keys(v_BSKH)

    def visit(n, state):
        o, top, total = state
        at, j = cut.pair(n)
        inside, logits_KGQY = cut.logits(at, j, q, k)
        old = cut.of(top, at)
        new = jnp.maximum(old, logits_KGQY.max(-1))
        p = jnp.where(inside, jnp.exp(logits_KGQY - new[..., None]), 0)
        kept = jnp.exp(old - new)
        product = cut.product("KGQY,KYH->KGQH", p.astype(v.dtype), cut.of(v, j))
        o = cut.put(o, at, cut.of(o, at) * kept[..., None] + product)
        return o, cut.put(top, at, new), cut.put(total, at, cut.of(total, at) * kept + p.sum(-1))

    rows = q.shape[:-1]
    o, top, total = lax.fori_loop(0, cut.count, visit, (jnp.zeros(q.shape), jnp.full(rows, LOWEST), jnp.zeros(rows)))
    empty = total == 0  # not NaN, which must stay
    total = jnp.where(empty, 1, total)
    o = jnp.where(empty[..., None], 0, o / total[..., None])
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    return cut.of_queries(o).astype(dtype), cut.of_queries(lse[..., None])[..., 0]


def backward(q_BTNH, k_BSKH, v_BSKH, start_BT, stop_BT, do_BTNH, lse_BTN, delta_BTN, *, reach: tuple[int, int] | None):
    """dq, dk and dv, float32, by the merged log-sum-exp and delta = sum_H do o."""
    cut = _Cut(q_BTNH, k_BSKH, start_BT, stop_BT)
    q, k, v, do = cut.queries(q_BTNH), cut.keys(k_BSKH), cut.keys(v_BSKH), cut.queries(do_BTNH.astype(q_BTNH.dtype))
    lse, delta = (cut.queries(x[..., None]) for x in (jnp.maximum(lse_BTN, LOWEST), delta_BTN))

    def visit(n, state):
        dq, dk, dv = state
        at, j = cut.pair(n)
        inside, logits_KGQY = cut.logits(at, j, q, k)
        p = jnp.where(inside, jnp.exp(logits_KGQY - cut.of(lse, at)), 0)
        dp = cut.product("KGQH,KYH->KGQY", cut.of(do, at), cut.of(v, j))
        ds = (p * (dp - cut.of(delta, at)) * cut.scale).astype(q.dtype)
        p = p.astype(q.dtype)
        dq = cut.put(dq, at, cut.of(dq, at) + cut.product("KGQY,KYH->KGQH", ds, cut.of(k, j)))
        dk = cut.put(dk, j, cut.of(dk, j) + cut.product("KGQY,KGQH->KYH", ds, cut.of(q, at)))
        return dq, dk, cut.put(dv, j, cut.of(dv, j) + cut.product("KGQY,KGQH->KYH", p, cut.of(do, at)))

    dq, dk, dv = lax.fori_loop(0, cut.count, visit, (jnp.zeros(q.shape), jnp.zeros(k.shape), jnp.zeros(v.shape)))
    return cut.of_queries(dq), cut.of_keys(dk), cut.of_keys(dv)


class _Cut:
    """Arrays cut into blocks, all rows' blocks in one leading axis; the list of pairs to visit."""

    def __init__(self, q_BTNH, k_BSKH, start_BT, stop_BT):
        self.B, self.T, _, H = q_BTNH.shape
        self.S, self.K = k_BSKH.shape[1:3]
        self.block, self.scale = block_size(self.T, self.S), H**-0.5
        self.precision = "highest" if q_BTNH.dtype == jnp.float32 else None
        needed = needed_blocks(start_BT, stop_BT, self.S, self.block, self.block)
        _, self.I, self.J = needed.shape
        self.count = needed.sum(dtype=jnp.int32)
        (self.pairs,) = jnp.nonzero(needed.reshape(-1), size=needed.size, fill_value=0)
        self.start, self.stop = (self._cut(x.astype(jnp.int32), self.I) for x in (start_BT, stop_BT))

    def _cut(self, x, blocks: int):
        x = jnp.pad(x, ((0, 0), (0, blocks * self.block - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(x.shape[0] * blocks, self.block, *x.shape[2:])

    def queries(self, x_BTNH):
        """[B I, K, G, Q, H]"""
        x = self._cut(x_BTNH, self.I)
        return jnp.moveaxis(x.reshape(*x.shape[:2], self.K, -1, x.shape[-1]), 1, 3)

    def keys(self, x_BSKH):
        """[B J, K, Y, H]"""
        return jnp.moveaxis(self._cut(x_BSKH, self.J), 1, 2)

    def of_queries(self, x):
        x = jnp.moveaxis(x, 3, 1)
        return x.reshape(self.B, self.I * self.block, -1, x.shape[-1])[:, : self.T]

    def of_keys(self, x):
        return jnp.moveaxis(x, 2, 1).reshape(self.B, self.J * self.block, self.K, -1)[:, : self.S]

    def pair(self, n):
        """Places of the n-th pair's queries and keys."""
        b, rest = jnp.divmod(self.pairs[n], self.I * self.J)
        i, j = jnp.divmod(rest, self.J)
        return b * self.I + i, b * self.J + j

    def of(self, x, at):
        return lax.dynamic_index_in_dim(x, at, 0, keepdims=False)

    def put(self, x, at, value):
        return lax.dynamic_update_index_in_dim(x, value, at, 0)

    def product(self, axes: str, x, y):
        return jnp.einsum(axes, x, y, precision=self.precision, preferred_element_type=jnp.float32)

    def logits(self, at, j, q, k):
        """Which keys are in the ranges, [Q, Y], and the logits [K, G, Q, Y] float32, LOWEST where they are not."""
        s = j % self.J * self.block + jnp.arange(self.block)
        inside = (s >= self.of(self.start, at)[:, None]) & (s < self.of(self.stop, at)[:, None]) & (s < self.S)
        logits = self.product("KGQH,KYH->KGQY", self.of(q, at), self.of(k, j)) * self.scale
        return inside, jnp.where(inside, logits, LOWEST)

"""Range attention for ranges of bounded length, in plain XLA. Cost and memory are linear in the length of the row.

The row is split into blocks. Each block of queries attends to its own block of keys and to as many neighbouring blocks as `reach` needs.
On a CPU, long rows are processed in chunks of many blocks, so that intermediate arrays fit into the cache.

Axes: B batch, T positions, N heads, K key-value heads, G query heads per key-value head, H head size, I blocks per chunk, W positions per
block, Y keys that a block attends to, P query positions per chunk, S keys per chunk (its own positions and the neighbouring blocks).
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

_MIN_BLOCK = 16  # positions
_CHUNK = 2**12  # positions per chunk on a CPU, summed over rows and heads


def unsupported_reason(q: jax.Array | jax.ShapeDtypeStruct, k: jax.Array | jax.ShapeDtypeStruct, reach: tuple[int, int] | None) -> str:
    """Returns why the backend does not support the inputs, or "" if it does."""
    if reach is None:
        return "needs `reach`, the largest distance between a query and its keys"
    return "" if q.shape[1] == k.shape[1] else f"needs as many keys as queries, not {k.shape[1]} and {q.shape[1]}"


def forward(q_BTNH, k_BTKH, v_BTKH, start_BT, stop_BT, *, reach: tuple[int, int], dtype) -> tuple[jax.Array, jax.Array]:
    """Returns o_BTNH in `dtype` and the log-sum-exp lse_BTN in float32.

    Queries without keys get 0 and -inf. Queries whose range exceeds `reach` get NaN in o.
    """
    blocks = _Blocks(q_BTNH, k_BTKH, reach)

    def chunk(q_BPNH, start_BP, stop_BP, k_BSKH, v_BSKH):
        logits_BIKGWY = blocks.logits(q_BPNH, k_BSKH, start_BP, stop_BP)
        lse = jax.nn.logsumexp(logits_BIKGWY, axis=-1)
        weights = jnp.exp(logits_BIKGWY - jnp.where(lse > -jnp.inf, lse, 0)[..., None])
        o = blocks.product("BIKGWY,BIYKH->BIWKGH", weights.astype(v_BSKH.dtype), blocks.windows(v_BSKH))
        return o.reshape(q_BPNH.shape).astype(dtype), jnp.moveaxis(lse, -1, 2).reshape(q_BPNH.shape[:3])

    o, lse = blocks.map(chunk, (q_BTNH, start_BT, stop_BT), k_BTKH, v_BTKH, key_sums=False)
    t = jnp.arange(q_BTNH.shape[1])
    exceeds_BT = (start_BT < stop_BT) & ((start_BT < t - reach[0]) | (stop_BT > t + reach[1] + 1))
    return jnp.where(exceeds_BT[..., None, None], jnp.nan, o), lse


def backward(q_BTNH, k_BTKH, v_BTKH, start_BT, stop_BT, do_BTNH, lse_BTN, delta_BTN, *, reach: tuple[int, int]):
    """Returns dq, dk and dv in float32, from the merged log-sum-exp and delta = sum_H do o."""
    blocks = _Blocks(q_BTNH, k_BTKH, reach)

    def chunk(q_BPNH, start_BP, stop_BP, do_BPNH, lse_BPN, delta_BPN, k_BSKH, v_BSKH):
        lse, delta = (jnp.moveaxis(blocks.split(x[..., None])[..., 0], 2, -1)[..., None] for x in (lse_BPN, delta_BPN))
        p = jnp.exp(blocks.logits(q_BPNH, k_BSKH, start_BP, stop_BP) - jnp.where(lse > -jnp.inf, lse, 0))
        q, do, k, v = blocks.split(q_BPNH), blocks.split(do_BPNH), blocks.windows(k_BSKH), blocks.windows(v_BSKH)
        ds = p * (blocks.product("BIWKGH,BIYKH->BIKGWY", do, v) - delta) * q_BTNH.shape[-1] ** -0.5
        p, ds = p.astype(q.dtype), ds.astype(q.dtype)
        dq = blocks.product("BIKGWY,BIYKH->BIWKGH", ds, k).reshape(q_BPNH.shape)
        dk, dv = blocks.product("BIKGWY,BIWKGH->BIYKH", ds, q), blocks.product("BIKGWY,BIWKGH->BIYKH", p, do)
        return dq, blocks.sum_windows(dk), blocks.sum_windows(dv)

    return blocks.map(chunk, (q_BTNH, start_BT, stop_BT, do_BTNH, lse_BTN, delta_BTN), k_BTKH, v_BTKH, key_sums=True)


class _Blocks:
    """Splits rows into chunks and blocks, and joins the results."""

    def __init__(self, q_BTNH: jax.Array, k_BTKH: jax.Array, reach: tuple[int, int]):
        B, self.T, N, _ = q_BTNH.shape
        self.K = k_BTKH.shape[2]
        self.W = min(max(_MIN_BLOCK, max(reach)), self.T)
        self.before, self.after = (math.ceil(r / self.W) for r in reach)  # neighbouring blocks
        chunks = math.ceil(B * self.T * N / _CHUNK) if jax.default_backend() == "cpu" else 1
        self.P = math.ceil(self.T / chunks / self.W) * self.W
        self.chunks = math.ceil(self.T / self.P)
        self.precision = "highest" if q_BTNH.dtype == jnp.float32 else None

    def map(self, f, query_arrays: tuple[jax.Array, ...], k_BTKH: jax.Array, v_BTKH: jax.Array, key_sums: bool):
        """Calls f(*query_arrays, keys, values) with the slices of every chunk and joins the results.

        query_arrays: q, start, stop and further arrays [B, T, …]. f gets the starts and stops relative to the first key of the chunk. Its
        results [B, P, …] are concatenated. If key_sums is True, the last two results of f are float32 arrays over the keys of the chunk,
        [B, S, K, H], which are added, since chunks share neighbouring keys.
        """
        first, S = self.before * self.W, self.P + (self.before + self.after) * self.W
        padding = self.chunks * self.P - self.T

        def padded(x, before, after):
            return jnp.pad(x, ((0, 0), (before, after), *[(0, 0)] * (x.ndim - 2)))

        query_arrays = tuple(padded(x, 0, padding) for x in query_arrays)
        k, v = (padded(x, first, padding + self.after * self.W) for x in (k_BTKH, v_BTKH))

        def step(totals, chunk):
            at = chunk * self.P
            q, start, stop, *others = (lax.dynamic_slice_in_dim(x, at, self.P, 1) for x in query_arrays)
            bounds = (jnp.clip(x, 0, self.T) - at + first for x in (start, stop))
            results = f(q, *bounds, *others, *(lax.dynamic_slice_in_dim(x, at, S, 1) for x in (k, v)))
            joined = len(results) - len(totals)
            sums = [lax.dynamic_slice_in_dim(total, at, S, 1) + x for total, x in zip(totals, results[joined:], strict=True)]
            return [lax.dynamic_update_slice_in_dim(total, x, at, 1) for total, x in zip(totals, sums, strict=True)], results[:joined]

        totals = [jnp.zeros(x.shape, jnp.float32) for x in (k, v)] if key_sums else []
        if self.chunks == 1:
            totals, results = step(totals, 0)
        else:
            totals, results = lax.scan(step, totals, jnp.arange(self.chunks))
            results = [jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for x in results]
        return *(x[:, : self.T] for x in results), *(x[:, first : first + self.T] for x in totals)

    def product(self, axes: str, x, y) -> jax.Array:
        return jnp.einsum(axes, x, y, precision=self.precision, preferred_element_type=jnp.float32)

    def split(self, x_BPNH):
        """[B, I, W, K, G, H]"""
        return x_BPNH.reshape(x_BPNH.shape[0], -1, self.W, self.K, x_BPNH.shape[2] // self.K, x_BPNH.shape[3])

    def windows(self, x_BSKH):
        """[B, I, Y, K, H]: the keys that each block attends to."""
        x = x_BSKH.reshape(x_BSKH.shape[0], -1, self.W, *x_BSKH.shape[2:])
        neighbours = self.before + self.after
        return jnp.concatenate([x[:, i : x.shape[1] - neighbours + i] for i in range(neighbours + 1)], axis=2)

    def sum_windows(self, x_BIYKH):
        """[B, S, K, H]: the sum over blocks of their values for each key; the transpose of `windows`."""
        neighbours = self.before + self.after
        parts = jnp.split(x_BIYKH, neighbours + 1, axis=2)
        padded = (jnp.pad(part, ((0, 0), (i, neighbours - i), (0, 0), (0, 0), (0, 0))) for i, part in enumerate(parts))
        total = jnp.asarray(sum(padded))
        return total.reshape(total.shape[0], -1, *total.shape[3:])

    def logits(self, q_BPNH, k_BSKH, start_BP, stop_BP):
        """[B, I, K, G, W, Y] float32, -inf for keys outside the query's range."""
        logits = self.product("BIWKGH,BIYKH->BIKGWY", self.split(q_BPNH), self.windows(k_BSKH)) * q_BPNH.shape[-1] ** -0.5
        I, Y = logits.shape[1], logits.shape[-1]  # noqa: E741
        s_I1Y = (jnp.arange(I)[:, None] * self.W + jnp.arange(Y))[:, None]
        start, stop = (x.reshape(x.shape[0], I, self.W, 1) for x in (start_BP, stop_BP))
        inside_BIWY = (s_I1Y >= start) & (s_I1Y < stop)
        return jnp.where(inside_BIWY[:, :, None, None], logits, -jnp.inf)

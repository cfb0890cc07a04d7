"""Range attention for ranges of bounded length, in plain XLA: cost and memory are linear in the row's length.

The row is cut into blocks; each block of queries meets its own block of keys and as many neighbours as `reach` needs. On a
CPU, long rows are worked off in pieces of many blocks, so that what lies between fits its cache.

Axes: B batch, T positions, N heads, K key-value heads, G query heads of a key-value head, H head size, I blocks of a piece, W positions
of a block, Y keys that a block meets, P positions of a piece, S keys of a piece: those and the neighbours'.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

_LEAST = 16  # positions of a block at least
_PIECE = 2**12  # positions of a piece on a CPU, those of all rows and heads counted


def refuses(q: jax.Array, k: jax.Array, reach: tuple[int, int] | None) -> str:
    if reach is None:
        return "needs `reach`: how far the ranges may go"
    return "" if q.shape[1] == k.shape[1] else f"needs as many keys as queries, not {k.shape[1]} and {q.shape[1]}"


def forward(q_BTNH, k_BTKH, v_BTKH, start_BT, stop_BT, *, reach: tuple[int, int], dtype) -> tuple[jax.Array, jax.Array]:
    """o_BTNH in `dtype` and the log-sum-exp lse_BTN, float32; 0 and -inf in empty rows, NaN where a range goes beyond `reach`."""
    cut = _Cut(q_BTNH, k_BTKH, reach)

    def piece(q_BPNH, start_BP, stop_BP, k_BSKH, v_BSKH):
        logits_BIKGWY = cut.logits(q_BPNH, k_BSKH, start_BP, stop_BP)
        lse = jax.nn.logsumexp(logits_BIKGWY, axis=-1)
        weights = jnp.exp(logits_BIKGWY - jnp.where(lse > -jnp.inf, lse, 0)[..., None])
        o = cut.product("BIKGWY,BIYKH->BIWKGH", weights.astype(v_BSKH.dtype), cut.windows(v_BSKH))
        return o.reshape(q_BPNH.shape).astype(dtype), jnp.moveaxis(lse, -1, 2).reshape(q_BPNH.shape[:3])

    o, lse = cut.map(piece, (q_BTNH, start_BT, stop_BT), k_BTKH, v_BTKH, sums=False)
    t = jnp.arange(q_BTNH.shape[1])
    broken_BT = (start_BT < stop_BT) & ((start_BT < t - reach[0]) | (stop_BT > t + reach[1] + 1))
    return jnp.where(broken_BT[..., None, None], jnp.nan, o), lse


def backward(q_BTNH, k_BTKH, v_BTKH, start_BT, stop_BT, do_BTNH, lse_BTN, delta_BTN, *, reach: tuple[int, int]):
    """dq, dk and dv, float32, by the merged log-sum-exp and delta = sum_H do o."""
    cut = _Cut(q_BTNH, k_BTKH, reach)

    def piece(q_BPNH, start_BP, stop_BP, do_BPNH, lse_BPN, delta_BPN, k_BSKH, v_BSKH):
        lse, delta = (jnp.moveaxis(cut.blocks(x[..., None])[..., 0], 2, -1)[..., None] for x in (lse_BPN, delta_BPN))
        p = jnp.exp(cut.logits(q_BPNH, k_BSKH, start_BP, stop_BP) - jnp.where(lse > -jnp.inf, lse, 0))
        q, do, k, v = cut.blocks(q_BPNH), cut.blocks(do_BPNH), cut.windows(k_BSKH), cut.windows(v_BSKH)
        ds = p * (cut.product("BIWKGH,BIYKH->BIKGWY", do, v) - delta) * q_BTNH.shape[-1] ** -0.5
        p, ds = p.astype(q.dtype), ds.astype(q.dtype)
        dq = cut.product("BIKGWY,BIYKH->BIWKGH", ds, k).reshape(q_BPNH.shape)
        dk, dv = cut.product("BIKGWY,BIWKGH->BIYKH", ds, q), cut.product("BIKGWY,BIWKGH->BIYKH", p, do)
        return dq, cut.added(dk), cut.added(dv)

    return cut.map(piece, (q_BTNH, start_BT, stop_BT, do_BTNH, lse_BTN, delta_BTN), k_BTKH, v_BTKH, sums=True)


class _Cut:
    """Rows cut into pieces and blocks, and back."""

    def __init__(self, q_BTNH: jax.Array, k_BTKH: jax.Array, reach: tuple[int, int]):
        B, self.T, N, _ = q_BTNH.shape
        self.K = k_BTKH.shape[2]
        self.W = min(max(_LEAST, max(reach)), self.T)
        self.before, self.after = (math.ceil(r / self.W) for r in reach)
        pieces = math.ceil(B * self.T * N / _PIECE) if jax.default_backend() == "cpu" else 1
        self.P = math.ceil(self.T / pieces / self.W) * self.W
        self.pieces = math.ceil(self.T / self.P)
        self.precision = "highest" if q_BTNH.dtype == jnp.float32 else None

    def map(self, f, of_queries: tuple[jax.Array, ...], k_BTKH: jax.Array, v_BTKH: jax.Array, sums: bool):
        """f(those of a piece's queries, its keys, its values) for every piece. Its results [B, P, …] are put together; with `sums` the last
        two, float32 of a piece's keys [B, S, K, H], are added up. Ranges come to f counted from the piece's first key."""
        first, S = self.before * self.W, self.P + (self.before + self.after) * self.W
        beyond = self.pieces * self.P - self.T

        def padded(x, before, after):
            return jnp.pad(x, ((0, 0), (before, after), *[(0, 0)] * (x.ndim - 2)))

        of_queries = tuple(padded(x, 0, beyond) for x in of_queries)
        k, v = (padded(x, first, beyond + self.after * self.W) for x in (k_BTKH, v_BTKH))

        def piece(totals, number):
            at = number * self.P
            q, start, stop, *rest = (lax.dynamic_slice_in_dim(x, at, self.P, 1) for x in of_queries)
            bounds = (jnp.clip(x, 0, self.T) - at + first for x in (start, stop))
            results = f(q, *bounds, *rest, *(lax.dynamic_slice_in_dim(x, at, S, 1) for x in (k, v)))
            own = len(results) - len(totals)
            more = [lax.dynamic_slice_in_dim(total, at, S, 1) + x for total, x in zip(totals, results[own:], strict=True)]
            return [lax.dynamic_update_slice_in_dim(total, x, at, 1) for total, x in zip(totals, more, strict=True)], results[:own]

        totals = [jnp.zeros(x.shape, jnp.float32) for x in (k, v)] if sums else []
        if self.pieces == 1:
            totals, results = piece(totals, 0)
        else:
            totals, results = lax.scan(piece, totals, jnp.arange(self.pieces))
            results = [jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for x in results]
        return *(x[:, : self.T] for x in results), *(x[:, first : first + self.T] for x in totals)

    def product(self, axes: str, x, y) -> jax.Array:
        return jnp.einsum(axes, x, y, precision=self.precision, preferred_element_type=jnp.float32)

    def blocks(self, x_BPNH):
        """[B, I, W, K, G, H]"""
        return x_BPNH.reshape(x_BPNH.shape[0], -1, self.W, self.K, x_BPNH.shape[2] // self.K, x_BPNH.shape[3])

    def windows(self, x_BSKH):
        """[B, I, Y, K, H]: the keys that each block meets."""
        x = x_BSKH.reshape(x_BSKH.shape[0], -1, self.W, *x_BSKH.shape[2:])
        near = self.before + self.after
        return jnp.concatenate([x[:, i : x.shape[1] - near + i] for i in range(near + 1)], axis=2)

    def added(self, x_BIYKH):
        """[B, S, K, H]: what the blocks give to the keys they meet, added up; the transpose of `windows`."""
        near = self.before + self.after
        parts = jnp.split(x_BIYKH, near + 1, axis=2)
        total = sum(jnp.pad(part, ((0, 0), (i, near - i), (0, 0), (0, 0), (0, 0))) for i, part in enumerate(parts))
        return total.reshape(total.shape[0], -1, *total.shape[3:])

    def logits(self, q_BPNH, k_BSKH, start_BP, stop_BP):
        """[B, I, K, G, W, Y] float32, -inf where the key is not in the query's range."""
        logits = self.product("BIWKGH,BIYKH->BIKGWY", self.blocks(q_BPNH), self.windows(k_BSKH)) * q_BPNH.shape[-1] ** -0.5
        I, Y = logits.shape[1], logits.shape[-1]  # noqa: E741
        s_I1Y = (jnp.arange(I)[:, None] * self.W + jnp.arange(Y))[:, None]
        start, stop = (x.reshape(x.shape[0], I, self.W, 1) for x in (start_BP, stop_BP))
        inside_BIWY = (s_I1Y >= start) & (s_I1Y < stop)
        return jnp.where(inside_BIWY[:, :, None, None], logits, -jnp.inf)

"""Range attention for ranges of bounded length, in plain XLA: cost and memory are linear in the row's length.

The row is cut into blocks; each block of queries meets its own block of keys and as many neighbours as `reach` needs.

Axes: B batch, T positions, N heads, K key-value heads, G query heads of a key-value head, H head size, I blocks, W positions of a
block, Y keys that a block meets.
"""

import math

import jax
import jax.numpy as jnp

_LEAST = 16  # positions of a block at least


def refuses(q: jax.Array, k: jax.Array, reach: tuple[int, int] | None) -> str:
    if reach is None:
        return "needs `reach`: how far the ranges may go"
    return "" if q.shape[1] == k.shape[1] else f"needs as many keys as queries, not {k.shape[1]} and {q.shape[1]}"


def forward(q_BTNH, k_BTKH, v_BTKH, start_BT, stop_BT, *, reach: tuple[int, int], dtype) -> tuple[jax.Array, jax.Array]:
    """o_BTNH in `dtype` and the log-sum-exp lse_BTN, float32; 0 and -inf in empty rows, NaN where a range goes beyond `reach`."""
    cut = _Cut(q_BTNH, k_BTKH, reach)
    logits_BIKGWY, real = cut.logits(q_BTNH, k_BTKH, start_BT, stop_BT)
    lse = jax.nn.logsumexp(logits_BIKGWY, axis=-1)
    weights = jnp.exp(logits_BIKGWY - jnp.where(lse > -jnp.inf, lse, 0)[..., None])
    o = cut.product("BIKGWY,BIYKH->BIWKGH", weights.astype(v_BTKH.dtype), cut.keys(v_BTKH))
    broken_BT = (start_BT < stop_BT) & ((start_BT < real - reach[0]) | (stop_BT > real + reach[1] + 1))
    o = jnp.where(broken_BT[..., None, None], jnp.nan, cut.joined(o, cut.N))
    return o.astype(dtype), cut.joined(jnp.moveaxis(lse, -1, 2), cut.N)


def backward(q_BTNH, k_BTKH, v_BTKH, start_BT, stop_BT, do_BTNH, lse_BTN, delta_BTN, *, reach: tuple[int, int]):
    """dq, dk and dv, float32, by the merged log-sum-exp and delta = sum_H do o."""
    cut = _Cut(q_BTNH, k_BTKH, reach)
    logits_BIKGWY, _ = cut.logits(q_BTNH, k_BTKH, start_BT, stop_BT)
    lse, delta = (jnp.moveaxis(cut.queries(x[..., None])[..., 0], 2, -1)[..., None] for x in (lse_BTN, delta_BTN))
    p = jnp.exp(logits_BIKGWY - jnp.where(lse > -jnp.inf, lse, 0))
    do, dtype = cut.queries(do_BTNH), q_BTNH.dtype
    ds = p * (cut.product("BIWKGH,BIYKH->BIKGWY", do, cut.keys(v_BTKH)) - delta) * q_BTNH.shape[-1] ** -0.5
    dq = cut.product("BIKGWY,BIYKH->BIWKGH", ds.astype(dtype), cut.keys(k_BTKH))
    dk = cut.product("BIKGWY,BIWKGH->BIYKH", ds.astype(dtype), cut.queries(q_BTNH))
    dv = cut.product("BIKGWY,BIWKGH->BIYKH", p.astype(dtype), do)
    return cut.joined(dq, cut.N), cut.added(dk), cut.added(dv)


class _Cut:
    """Rows cut into blocks, and back."""

    def __init__(self, q_BTNH: jax.Array, k_BTKH: jax.Array, reach: tuple[int, int]):
        self.T, self.N, self.K = *q_BTNH.shape[1:3], k_BTKH.shape[2]
        self.W = min(max(_LEAST, max(reach)), self.T)
        self.I = math.ceil(self.T / self.W)
        self.before, self.after = (math.ceil(r / self.W) for r in reach)
        self.precision = "highest" if q_BTNH.dtype == jnp.float32 else None

    def product(self, axes: str, x, y) -> jax.Array:
        return jnp.einsum(axes, x, y, precision=self.precision, preferred_element_type=jnp.float32)

    def blocks(self, x_BT):
        x = jnp.pad(x_BT, ((0, 0), (0, self.I * self.W - self.T), *[(0, 0)] * (x_BT.ndim - 2)))
        return x.reshape(x.shape[0], self.I, self.W, *x.shape[2:])

    def queries(self, x_BTNH):
        """[B, I, W, K, G, H]"""
        x = self.blocks(x_BTNH)
        return x.reshape(*x.shape[:3], self.K, -1, x.shape[-1])

    def keys(self, x_BTKH):
        """[B, I, Y, K, H]: every block beside its neighbours, zeros beyond the ends."""
        x = self.blocks(x_BTKH)
        x = jnp.pad(x, ((0, 0), (self.before, self.after), (0, 0), (0, 0), (0, 0)))
        return jnp.concatenate([x[:, i : i + self.I] for i in range(self.before + 1 + self.after)], axis=2)

    def added(self, x_BIYKH):
        """[B, T, K, H]: what each block gives its neighbours, added up; the transpose of `keys`."""
        parts = jnp.split(x_BIYKH, self.before + 1 + self.after, axis=2)
        blocks = self.I + self.before + self.after
        total = sum(jnp.pad(part, ((0, 0), (i, blocks - self.I - i), (0, 0), (0, 0), (0, 0))) for i, part in enumerate(parts))
        return self.joined(total[:, self.before : self.before + self.I])

    def joined(self, x_BIW, heads: int = 0):
        """[B, T, …]; with `heads`, the axes K and G as one."""
        rest = x_BIW.shape[3:] if not heads else (heads, *x_BIW.shape[5:])
        return x_BIW.reshape(x_BIW.shape[0], self.I * self.W, *rest)[:, : self.T]

    def logits(self, q, k, start_BT, stop_BT):
        """[B, I, K, G, W, Y] float32, -inf where the key is not in the query's range; and the positions [T]."""
        logits = self.product("BIWKGH,BIYKH->BIKGWY", self.queries(q), self.keys(k)) * q.shape[-1] ** -0.5
        first = (jnp.arange(self.I) - self.before) * self.W
        s_IY = first[:, None] + jnp.arange((self.before + 1 + self.after) * self.W)
        start, stop = (self.blocks(x)[..., None] for x in (start_BT, stop_BT))  # [B, I, W, 1]
        s = s_IY[:, None]
        inside = (s >= start) & (s < stop) & (s >= 0) & (s < self.T)
        return jnp.where(inside[:, :, None, None], logits, -jnp.inf), jnp.arange(self.T)

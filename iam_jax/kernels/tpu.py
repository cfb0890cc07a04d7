"""Range attention as Pallas kernels for TPU that visit the needed pairs of a query block and a key block, and nothing else.

A list of the needed pairs goes to the scalar memory ahead of a kernel, whose grid is as long as the list. A pair takes its blocks of
queries and keys to the chip by the list; what is not in the list is neither loaded nor computed, and its share of a result, never
written, is set outside. Positions lie in the lanes, so that heads of any size fill them and a query's numbers are rows [1, Q] that
broadcast; logits are [S, Q] therefore. Lowered for another platform, the same kernels are interpreted.

Axes: B batch, T query positions, S key positions, N heads, K key-value heads, G query heads of a key-value head, H head size,
I query blocks, J key blocks, P pairs. In a kernel: Q, S queries and keys of the block.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from iam_jax.kernels.blocks import needed_blocks

BLOCK, LONG_BLOCK, LONG_ROW = 256, 512, 2048
MAX_PAIRS = 2**17  # of 4 bytes: half of the scalar memory
MAX_HEAD = 256
LOWEST, MASKED = -1e38, -2e38  # below every logit, and finite: exp(MASKED - LOWEST) is exactly 0, in rows without keys too


def refuses(q: jax.Array, k: jax.Array, reach: tuple[int, int] | None) -> str:
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 and bfloat16, not {q.dtype}"
    if q.shape[3] > MAX_HEAD:
        return f"takes head sizes up to {MAX_HEAD}, not {q.shape[3]}"
    if _pairs(1, q.shape[1], k.shape[1], block_size(1, q.shape[1], k.shape[1], reach)) > MAX_PAIRS:
        return f"takes rows of at most {MAX_PAIRS} pairs of blocks: {q.shape[1]} queries and {k.shape[1]} keys are too many"
    return ""


def block_size(B: int, T: int, S: int, reach: tuple[int, int] | None) -> int:
    """Queries, and keys, of a block: a multiple of 128, for the lanes.

    Smaller blocks skip more and cost more. Forward and backward, a pair of blocks of 128, 256 and 512 takes 1527, 2340 and 5817 cycles
    by the compiler's own schedule (libtpu 0.0.50 for v5e, head size 64, bfloat16; not measured on a TPU): 256 is never much worse than
    128, and 512 pays where ranges are long, so where rows are.
    """
    longest = max(T, S)
    block = LONG_BLOCK if longest >= LONG_ROW and reach is None else min(BLOCK, 128 * math.ceil(longest / 128))
    while block < LONG_BLOCK and _pairs(B, T, S, block) > MAX_PAIRS:
        block *= 2
    return block


def _pairs(B: int, T: int, S: int, block: int) -> int:
    return B * math.ceil(T / block) * math.ceil(S / block)


# ---- the list of pairs


def visits(start_BT: jax.Array, stop_BT: jax.Array, keys: int, block: int, by_keys: bool = False) -> tuple[jax.Array, jax.Array]:
    """What a kernel visits, in order: pairs_P int32, to be read by `unpack`, and how many of them count.

    Those are the needed pairs, by row, query block, key block, or with `by_keys` by row, key block, query block: what goes to one
    block of results is in sequence. Where none is needed, the very first pair is visited all the same.
    """
    needed = needed_blocks(start_BT, stop_BT, keys, block, block)
    count = jnp.sum(needed, dtype=jnp.int32)
    needed = needed.swapaxes(1, 2) if by_keys else needed
    b, outer, inner = (lax.broadcasted_iota(jnp.int32, needed.shape, axis) for axis in range(3))
    outer_bits, inner_bits = _bits(needed.shape[1]), _bits(needed.shape[2])
    code = ((b << outer_bits | outer) << inner_bits | inner) << 2
    pairs = jnp.sort(jnp.where(needed, code, jnp.iinfo(jnp.int32).max), axis=None)
    pairs = jnp.where((count > 0) | (jnp.arange(pairs.size) > 0), pairs, 0)
    target = pairs >> (inner_bits + 2)
    changes = jnp.concatenate([jnp.ones(1, bool), target[1:] != target[:-1], jnp.ones(1, bool)])
    flags = changes[:-1] | changes[1:].astype(jnp.int32) << 1
    return pairs & ~3 | flags, jnp.maximum(count, 1)


def unpack(pair: jax.Array, I: int, J: int, by_keys: bool = False) -> tuple[jax.Array, ...]:  # noqa: E741
    """Row, query block and key block; whether the pair is the first, and the last, of its block of results."""
    outer_bits, inner_bits = (_bits(J), _bits(I)) if by_keys else (_bits(I), _bits(J))
    code = pair >> 2
    inner, outer = code & (1 << inner_bits) - 1, code >> inner_bits & (1 << outer_bits) - 1
    i, j = (inner, outer) if by_keys else (outer, inner)
    return code >> (inner_bits + outer_bits), i, j, pair & 1 == 1, pair & 2 == 2


def _bits(n: int) -> int:
    return (n - 1).bit_length()


# ---- the backend's part


def forward(q_BTNH, k_BSKH, v_BSKH, start_BT, stop_BT, *, reach: tuple[int, int] | None, dtype) -> tuple[jax.Array, jax.Array]:
    """o_BTNH in `dtype` and the log-sum-exp lse_BTN, float32; exactly 0 and -inf in rows without a key."""
    return _in_parts(_forward, q_BTNH, k_BSKH, v_BSKH, start_BT, stop_BT, reach=reach, dtype=dtype)


def backward(q_BTNH, k_BSKH, v_BSKH, start_BT, stop_BT, do_BTNH, lse_BTN, delta_BTN, *, reach: tuple[int, int] | None):
    """dq, dk and dv, float32, by the merged log-sum-exp and delta = sum_H do o."""
    return _in_parts(_backward, q_BTNH, k_BSKH, v_BSKH, start_BT, stop_BT, do_BTNH, lse_BTN, delta_BTN, reach=reach)


def _in_parts(f, q, k, *rest, reach, **options) -> tuple[jax.Array, ...]:
    """f on as many rows at a time as the scalar memory has space for their pairs: all, but for large batches of long rows."""
    B, T, S = *q.shape[:2], k.shape[1]
    block = block_size(B, T, S, reach)
    step = max(1, MAX_PAIRS // _pairs(1, T, S, block))
    parts = [f(block, *(x[b : b + step] for x in (q, k, *rest)), **options) for b in range(0, B, step)]
    return tuple(jnp.concatenate(results) if len(results) > 1 else results[0] for results in zip(*parts, strict=True))


def _forward(block: int, q, k, v, start, stop, *, dtype):
    cut = _Cut(block, q, k, start, stop)
    H = q.shape[3]
    scratch = [pltpu.VMEM((rows, block), jnp.float32) for rows in (H, 1, 1)]
    inputs = [cut.queries(q), cut.keys(k), cut.keys(v)]
    o, lse = cut.call(_forward_kernel, [("q", H, dtype), ("q", 1, jnp.float32)], scratch, "qkk", *inputs)
    return cut.of_queries(o), cut.of_queries(lse, -jnp.inf)[..., 0]


def _backward(block: int, q, k, v, start, stop, do, lse, delta):
    cut = _Cut(block, q, k, start, stop)
    H = q.shape[3]
    of_queries = [cut.queries(do.astype(q.dtype)), cut.queries(jnp.stack([jnp.maximum(lse, LOWEST), delta], -1))]
    inputs = [cut.queries(q), cut.keys(k), cut.keys(v), *of_queries]
    (dq,) = cut.call(_dq_kernel, [("q", H, jnp.float32)], [], "qkkqq", *inputs)
    dk, dv = cut.call(_dkv_kernel, [("k", H, jnp.float32)] * 2, [], "qkkqq", *inputs, by_keys=True)
    return cut.of_queries(dq), cut.of_keys(dk), cut.of_keys(dv)


class _Cut:
    """Arrays cut into blocks, positions last; the calls of the kernels, and what comes back."""

    def __init__(self, block: int, q_BTNH: jax.Array, k_BSKH: jax.Array, start_BT: jax.Array, stop_BT: jax.Array):
        self.block, self.start, self.stop = block, start_BT.astype(jnp.int32), stop_BT.astype(jnp.int32)
        (self.B, self.T, self.N, H), (self.S, self.K) = q_BTNH.shape, k_BSKH.shape[1:3]
        self.I, self.J, self.G = math.ceil(self.T / block), math.ceil(self.S / block), self.N // self.K
        bounds = jnp.stack([jnp.maximum(self.start, 0), jnp.minimum(self.stop, self.S)], -1)[:, :, None]
        self.bounds_B12T = self.queries(bounds)  # zeros, which are empty, beyond the end
        self.options = {"scale": H**-0.5, "precision": lax.Precision.HIGHEST if q_BTNH.dtype == jnp.float32 else lax.Precision.DEFAULT}

    def queries(self, x_BTNH):
        """[B, N, H, I * block]"""
        return jnp.pad(x_BTNH.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), (0, self.I * self.block - self.T)))

    def keys(self, x_BSKH):
        """[B, K, H, J * block]"""
        return jnp.pad(x_BSKH.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), (0, self.J * self.block - self.S)))

    def of_queries(self, x_BNHT, empty: float = 0):
        has_key = self.start.clip(0) < self.stop.clip(max=self.S)
        return jnp.where(has_key[..., None, None], x_BNHT[..., : self.T].transpose(0, 3, 1, 2), empty)

    def of_keys(self, x_BKHS):
        visited_BJ = needed_blocks(self.start, self.stop, self.S, self.block, self.block).any(1)
        visited_BS = jnp.repeat(visited_BJ, self.block, axis=1)[:, : self.S]
        return jnp.where(visited_BS[..., None, None], x_BKHS[..., : self.S].transpose(0, 3, 1, 2), 0)

    def call(self, kernel, outputs, scratch, kinds: str, *inputs, by_keys: bool = False) -> list[jax.Array]:
        """outputs: (kind, H, dtype) each; kinds, of the inputs: q [B, N, H, T] or k [B, K, H, S]. The grid is K, G, P, where each pair
        meets its block of queries once in each head; with `by_keys` K, P, G, where all heads add to the same block of keys."""
        unpack_ = functools.partial(unpack, I=self.I, J=self.J, by_keys=by_keys)

        def spec(kind: str, H: int) -> pl.BlockSpec:
            def index(h, x, y, pairs_P):
                p, g = (x, y) if by_keys else (y, x)
                b, i, j, *_ = unpack_(pairs_P[p])
                return {"q": (b, h * self.G + g, 0, i), "k": (b, h, 0, j), "b": (b, 0, 0, i)}[kind]

            return pl.BlockSpec((None, None, H, self.block), index)

        def run(interpret: bool, count, *args):
            specs = {
                "grid": (self.K, count, self.G) if by_keys else (self.K, self.G, count),
                "in_specs": [spec("b", 2), *(spec(kind, x.shape[2]) for kind, x in zip(kinds, inputs, strict=True))],
                "out_specs": [spec(kind, H) for kind, H, _ in outputs],
                "scratch_shapes": scratch,
            }
            sizes = {"q": (self.N, self.I * self.block), "k": (self.K, self.J * self.block)}
            return pl.pallas_call(
                functools.partial(kernel, unpack=unpack_, **self.options),
                [jax.ShapeDtypeStruct((self.B, sizes[kind][0], H, sizes[kind][1]), dtype) for kind, H, dtype in outputs],
                grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, **specs),
                compiler_params=pltpu.CompilerParams(
                    dimension_semantics=("parallel", "arbitrary" if by_keys else "parallel", "arbitrary"),
                ),
                interpret=interpret,
                name=f"range_attention{kernel.__name__.removesuffix('_kernel')}",
            )(*args)

        pairs_P, count = visits(self.start, self.stop, self.S, self.block, by_keys)
        tpu, other = functools.partial(run, False), functools.partial(run, True)
        return lax.platform_dependent(count, pairs_P, self.bounds_B12T, *inputs, tpu=tpu, default=other)


# ---- the kernels


def _product(x, y, contracted: tuple[int, int], precision) -> jax.Array:
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _logits(j, bounds_2Q, q_HQ, k_HS, scale, precision):
    """[S, Q] float32, MASKED where the key is not in the query's range."""
    logits_SQ = _product(k_HS[...], q_HQ[...], (0, 0), precision) * scale
    s_SQ = lax.broadcasted_iota(jnp.int32, logits_SQ.shape, 0)
    first = j * logits_SQ.shape[0]
    return jnp.where((s_SQ >= bounds_2Q[0:1] - first) & (s_SQ < bounds_2Q[1:2] - first), logits_SQ, MASKED)


def _forward_kernel(pairs_P, bounds_2Q, q_HQ, k_HS, v_HS, o_HQ, lse_1Q, sum_HQ, top_1Q, total_1Q, *, unpack, scale, precision):
    _, _, j, first, last = unpack(pairs_P[pl.program_id(2)])

    @pl.when(first)
    def _():
        sum_HQ[...] = jnp.zeros_like(sum_HQ)
        top_1Q[...] = jnp.full_like(top_1Q, LOWEST)
        total_1Q[...] = jnp.zeros_like(total_1Q)

    logits_SQ = _logits(j, bounds_2Q, q_HQ, k_HS, scale, precision)
    old = top_1Q[...]
    top = jnp.maximum(old, logits_SQ.max(0, keepdims=True))
    weights_SQ = jnp.exp(logits_SQ - top)
    kept = jnp.exp(old - top)
    top_1Q[...] = top
    total_1Q[...] = total_1Q[...] * kept + weights_SQ.sum(0, keepdims=True)
    sum_HQ[...] = sum_HQ[...] * kept + _product(v_HS[...], weights_SQ.astype(v_HS.dtype), (1, 0), precision)

    @pl.when(last)
    def _():
        total = total_1Q[...]
        o_HQ[...] = (sum_HQ[...] / jnp.where(total > 0, total, 1)).astype(o_HQ.dtype)
        lse_1Q[...] = top_1Q[...] + jnp.log(total)


def _weights(j, bounds_2Q, q_HQ, k_HS, v_HS, do_HQ, lse_delta_2Q, scale, precision):
    """p and ds, [S, Q] float32: exactly 0 where the key is not in the query's range."""
    p_SQ = jnp.exp(_logits(j, bounds_2Q, q_HQ, k_HS, scale, precision) - lse_delta_2Q[0:1])
    dp_SQ = _product(v_HS[...], do_HQ[...], (0, 0), precision)
    return p_SQ, p_SQ * (dp_SQ - lse_delta_2Q[1:2]) * scale


def _dq_kernel(pairs_P, bounds_2Q, q_HQ, k_HS, v_HS, do_HQ, lse_delta_2Q, dq_HQ, *, unpack, scale, precision):
    _, _, j, first, _ = unpack(pairs_P[pl.program_id(2)])

    @pl.when(first)
    def _():
        dq_HQ[...] = jnp.zeros_like(dq_HQ)

    _, ds_SQ = _weights(j, bounds_2Q, q_HQ, k_HS, v_HS, do_HQ, lse_delta_2Q, scale, precision)
    dq_HQ[...] += _product(k_HS[...], ds_SQ.astype(k_HS.dtype), (1, 0), precision)


def _dkv_kernel(pairs_P, bounds_2Q, q_HQ, k_HS, v_HS, do_HQ, lse_delta_2Q, dk_HS, dv_HS, *, unpack, scale, precision):
    _, _, j, first, _ = unpack(pairs_P[pl.program_id(1)])

    @pl.when(first & (pl.program_id(2) == 0))
    def _():
        dk_HS[...] = jnp.zeros_like(dk_HS)
        dv_HS[...] = jnp.zeros_like(dv_HS)

    p_SQ, ds_SQ = _weights(j, bounds_2Q, q_HQ, k_HS, v_HS, do_HQ, lse_delta_2Q, scale, precision)
    dk_HS[...] += _product(q_HQ[...], ds_SQ.astype(q_HQ.dtype), (1, 1), precision)
    dv_HS[...] += _product(do_HQ[...], p_SQ.astype(do_HQ.dtype), (1, 1), precision)

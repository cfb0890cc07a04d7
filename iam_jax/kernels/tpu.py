"""Range attention for TPUs: Pallas kernels that load and compute only the needed pairs of a query block and a key block.

The list of needed pairs is copied to scalar memory before a kernel starts, and the grid is as long as the list. Each grid step loads the
query block and the key block of its pair. Pairs that are not in the list are neither loaded nor computed. Blocks of results that no pair
writes are filled in afterwards, outside the kernel. Positions are the last axis, in the lanes, so that heads of any size use full lanes and
per-query values are rows [1, Q] that broadcast; logits therefore have shape [S, Q]. On other platforms the same kernels are interpreted.

Axes: B batch, T query positions, S key positions, N heads, K key-value heads, G query heads per key-value head, H head size,
I query blocks, J key blocks, P pairs. Inside a kernel: Q and S are the queries and keys of a block.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from iam_jax.kernels.blocks import needed_blocks

BLOCK, LONG_BLOCK, LONG_ROW = 256, 512, 2048  # positions
MAX_PAIRS = 2**17  # at 4 bytes each, half of the scalar memory
MAX_HEAD = 256
LOWEST, MASKED = -1e38, -2e38  # below all logits, and finite: exp(MASKED - LOWEST) is exactly 0, also for queries without keys


def unsupported_reason(q: jax.Array | jax.ShapeDtypeStruct, k: jax.Array | jax.ShapeDtypeStruct, reach: tuple[int, int] | None) -> str:
    """Returns why the backend does not support the inputs, or "" if it does."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"supports float32 and bfloat16, not {q.dtype}"
    if q.shape[3] > MAX_HEAD:
        return f"supports head sizes up to {MAX_HEAD}, not {q.shape[3]}"
    if _max_pairs(1, q.shape[1], k.shape[1], block_size(1, q.shape[1], k.shape[1], reach)) > MAX_PAIRS:
        return f"supports rows of at most {MAX_PAIRS} pairs of blocks; {q.shape[1]} queries and {k.shape[1]} keys are too many"
    return ""


def block_size(B: int, T: int, S: int, reach: tuple[int, int] | None) -> int:
    """The number of queries, and of keys, in a block: a multiple of 128, the number of lanes.

    Smaller blocks skip more pairs but cost more per pair. Forward plus backward, a pair of blocks of 128, 256 and 512 positions takes 1527,
    2340 and 5817 cycles in the schedule of the compiler (libtpu 0.0.50 for v5e, head size 64, bfloat16; not measured on a TPU). So 256 is
    never much slower than 128, and 512 is faster for long ranges, which long rows usually have.
    """
    longest = max(T, S)
    block = LONG_BLOCK if longest >= LONG_ROW and reach is None else min(BLOCK, 128 * math.ceil(longest / 128))
    while block < LONG_BLOCK and _max_pairs(B, T, S, block) > MAX_PAIRS:
        block *= 2
    return block


def _max_pairs(B: int, T: int, S: int, block: int) -> int:
    return B * math.ceil(T / block) * math.ceil(S / block)


# ---- the list of pairs


def visited_pairs(start_BT: jax.Array, stop_BT: jax.Array, keys: int, block: int, by_keys: bool = False) -> tuple[jax.Array, jax.Array]:
    """Lists the pairs of blocks that a kernel visits: pairs_P int32, which `unpack_pair` decodes, and the number of valid entries.

    These are the needed pairs, ordered by row, query block and key block, or with `by_keys` by row, key block and query block. All pairs
    that contribute to one block of results are therefore adjacent. If no pair is needed, the list holds the first pair of all.
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


def unpack_pair(pair: jax.Array, I: int, J: int, by_keys: bool = False) -> tuple[jax.Array, ...]:  # noqa: E741
    """Returns row, query block and key block, and whether the pair is the first and the last one for its block of results."""
    outer_bits, inner_bits = (_bits(J), _bits(I)) if by_keys else (_bits(I), _bits(J))
    code = pair >> 2
    inner, outer = code & (1 << inner_bits) - 1, code >> inner_bits & (1 << outer_bits) - 1
    i, j = (inner, outer) if by_keys else (outer, inner)
    return code >> (inner_bits + outer_bits), i, j, pair & 1 == 1, pair & 2 == 2


def _bits(n: int) -> int:
    return (n - 1).bit_length()


# ---- forward and backward


def forward(q_BTNH, k_BSKH, v_BSKH, start_BT, stop_BT, *, reach: tuple[int, int] | None, dtype) -> tuple[jax.Array, jax.Array]:
    """Returns o_BTNH in `dtype` and the log-sum-exp lse_BTN in float32. Queries without keys get exactly 0 and -inf."""
    o_BTNH, lse_BTN = _in_parts(_forward, q_BTNH, k_BSKH, v_BSKH, start_BT, stop_BT, reach=reach, dtype=dtype)
    return o_BTNH, lse_BTN


def backward(q_BTNH, k_BSKH, v_BSKH, start_BT, stop_BT, do_BTNH, lse_BTN, delta_BTN, *, reach: tuple[int, int] | None):
    """Returns dq, dk and dv in float32, from the merged log-sum-exp and delta = sum_H do o."""
    return _in_parts(_backward, q_BTNH, k_BSKH, v_BSKH, start_BT, stop_BT, do_BTNH, lse_BTN, delta_BTN, reach=reach)


def _in_parts(f, q, k, *others, reach, **options) -> tuple[jax.Array, ...]:
    """Calls f on as many rows at a time as have pairs that fit into scalar memory. Only large batches of long rows need several calls."""
    (B, T), S = q.shape[:2], k.shape[1]
    block = block_size(B, T, S, reach)
    step = max(1, MAX_PAIRS // _max_pairs(1, T, S, block))
    parts = [f(block, *(x[b : b + step] for x in (q, k, *others)), **options) for b in range(0, B, step)]
    return parts[0] if len(parts) == 1 else tuple(jnp.concatenate(results) for results in zip(*parts, strict=True))


def _forward(block: int, q, k, v, start, stop, *, dtype):
    blocks = _Blocks(block, q, k, start, stop)
    H = q.shape[3]
    scratch = [pltpu.VMEM((rows, block), jnp.float32) for rows in (H, 1, 1)]
    inputs = [blocks.pad_queries(q), blocks.pad_keys(k), blocks.pad_keys(v)]
    o, lse = blocks.call(_forward_kernel, [("q", H, dtype), ("q", 1, jnp.float32)], scratch, "qkk", *inputs)
    return blocks.unpad_queries(o), blocks.unpad_queries(lse, -jnp.inf)[..., 0]


def _backward(block: int, q, k, v, start, stop, do, lse, delta):
    blocks = _Blocks(block, q, k, start, stop)
    H = q.shape[3]
    lse_delta = jnp.stack([jnp.maximum(lse, LOWEST), delta], -1)
    inputs = [blocks.pad_queries(q), blocks.pad_keys(k), blocks.pad_keys(v)]
    inputs += [blocks.pad_queries(do.astype(q.dtype)), blocks.pad_queries(lse_delta)]
    (dq,) = blocks.call(_dq_kernel, [("q", H, jnp.float32)], [], "qkkqq", *inputs)
    dk, dv = blocks.call(_dkv_kernel, [("k", H, jnp.float32)] * 2, [], "qkkqq", *inputs, by_keys=True)
    return blocks.unpad_queries(dq), blocks.unpad_keys(dk), blocks.unpad_keys(dv)


class _Blocks:
    """Pads arrays to whole blocks, with positions on the last axis, calls the kernels, and removes the padding from the results."""

    def __init__(self, block: int, q_BTNH: jax.Array, k_BSKH: jax.Array, start_BT: jax.Array, stop_BT: jax.Array):
        self.block, self.start, self.stop = block, start_BT.astype(jnp.int32), stop_BT.astype(jnp.int32)
        (self.B, self.T, self.N, H), (self.S, self.K) = q_BTNH.shape, k_BSKH.shape[1:3]
        self.I, self.J, self.G = math.ceil(self.T / block), math.ceil(self.S / block), self.N // self.K
        bounds = jnp.stack([jnp.maximum(self.start, 0), jnp.minimum(self.stop, self.S)], -1)[:, :, None]
        self.bounds_B12T = self.pad_queries(bounds)  # padding is zero, which means an empty range
        self.options = {"scale": H**-0.5, "precision": lax.Precision.HIGHEST if q_BTNH.dtype == jnp.float32 else lax.Precision.DEFAULT}

    def pad_queries(self, x_BTNH):
        """[B, N, H, I * block]"""
        return jnp.pad(x_BTNH.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), (0, self.I * self.block - self.T)))

    def pad_keys(self, x_BSKH):
        """[B, K, H, J * block]"""
        return jnp.pad(x_BSKH.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), (0, self.J * self.block - self.S)))

    def unpad_queries(self, x_BNHT, empty: float = 0):
        """[B, T, N, H], with `empty` for queries without keys, whose blocks no pair may have written."""
        has_key = self.start.clip(0) < self.stop.clip(max=self.S)
        return jnp.where(has_key[..., None, None], x_BNHT[..., : self.T].transpose(0, 3, 1, 2), empty)

    def unpad_keys(self, x_BKHS):
        """[B, S, K, H], with 0 for blocks of keys that no pair has written."""
        visited_BJ = needed_blocks(self.start, self.stop, self.S, self.block, self.block).any(1)
        visited_BS = jnp.repeat(visited_BJ, self.block, axis=1)[:, : self.S]
        return jnp.where(visited_BS[..., None, None], x_BKHS[..., : self.S].transpose(0, 3, 1, 2), 0)

    def call(self, kernel, outputs, scratch, kinds: str, *inputs, by_keys: bool = False) -> list[jax.Array]:
        """Calls a kernel on all pairs of blocks.

        outputs: (kind, H, dtype) of each output. kinds: the kind of each input. A kind is "q" for [B, N, H, T] or "k" for [B, K, H, S]. The
        grid is (K, G, P): a pair visits its query block once per head. With `by_keys` it is (K, P, G): all heads add to one key block.
        """
        unpack = functools.partial(unpack_pair, I=self.I, J=self.J, by_keys=by_keys)

        def spec(kind: str, H: int) -> pl.BlockSpec:
            def index(h, x, y, pairs_P):
                p, g = (x, y) if by_keys else (y, x)
                b, i, j, *_ = unpack(pairs_P[p])
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
                functools.partial(kernel, unpack=unpack, **self.options),
                [jax.ShapeDtypeStruct((self.B, sizes[kind][0], H, sizes[kind][1]), dtype) for kind, H, dtype in outputs],
                grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, **specs),
                compiler_params=pltpu.CompilerParams(
                    dimension_semantics=("parallel", "arbitrary" if by_keys else "parallel", "arbitrary"),
                ),
                interpret=interpret,
                name=f"range_attention{kernel.__name__.removesuffix('_kernel')}",
            )(*args)

        pairs_P, count = visited_pairs(self.start, self.stop, self.S, self.block, by_keys)
        tpu, other = functools.partial(run, False), functools.partial(run, True)
        return lax.platform_dependent(count, pairs_P, self.bounds_B12T, *inputs, tpu=tpu, default=other)


# ---- the kernels


def _product(x, y, contracted: tuple[int, int], precision) -> jax.Array:
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _logits(j, bounds_2Q, q_HQ, k_HS, scale, precision):
    """Logits [S, Q] in float32, MASKED for keys outside the query's range."""
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
    old_top = top_1Q[...]
    top = jnp.maximum(old_top, logits_SQ.max(0, keepdims=True))
    weights_SQ = jnp.exp(logits_SQ - top)
    rescale = jnp.exp(old_top - top)
    top_1Q[...] = top
    total_1Q[...] = total_1Q[...] * rescale + weights_SQ.sum(0, keepdims=True)
    sum_HQ[...] = sum_HQ[...] * rescale + _product(v_HS[...], weights_SQ.astype(v_HS.dtype), (1, 0), precision)

    @pl.when(last)
    def _():
        total = total_1Q[...]
        o_HQ[...] = (sum_HQ[...] / jnp.where(total > 0, total, 1)).astype(o_HQ.dtype)
        lse_1Q[...] = top_1Q[...] + jnp.log(total)


def _weights(j, bounds_2Q, q_HQ, k_HS, v_HS, do_HQ, lse_delta_2Q, scale, precision):
    """Returns p and ds, [S, Q] float32: exactly 0 for keys outside the query's range."""
    p_SQ = jnp.exp(_logits(j, bounds_2Q, q_HQ, k_HS, scale, precision) - lse_delta_2Q[0:1])
    dp_SQ = _product(v_HS[...], do_HQ[...], (0, 0), precision)
    return p_SQ, p_SQ * (dp_SQ - lse_delta_2Q[1:2]) * scale


def _dq_kernel(pairs_P, bounds_2Q, q_HQ, k_HS, v_HS, do_HQ, lse_delta_2Q, dq_HQ, *, unpack, scale, precision):
    _, _, j, first, _ = unpack(pairs_P[pl.program_id(2)])

    @pl.when(first)
    def _():
        dq_HQ[...] = jnp.zeros_like(dq_HQ)

    ds_SQ = _weights(j, bounds_2Q, q_HQ, k_HS, v_HS, do_HQ, lse_delta_2Q, scale, precision)[1]
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

"""Range attention for NVIDIA GPUs: Pallas kernels that load and compute only the needed pairs of blocks.

Reasons for kernels of our own: the Triton backward pass of tokamax 0.0.12 turns ranges into a dense mask, whose memory grows with the
square of the length. Its Hopper kernels support only 16-bit inputs and recent GPUs. It drops the cotangents of its softmax residuals, so
that parts cannot be merged outside of it. The kernels here are lowered through Triton. They run on any NVIDIA GPU from Ampere on, and
multiply float32 in true float32. Pallas deprecates this lowering in favour of Mosaic GPU (DeprecationWarning from JAX 0.11 on); when it is
removed, these kernels must be ported, but their callers do not change.

Each program computes one block of one head. It loops over a list of the blocks that it needs (`block_lists`). Sums stay in registers and
there are no atomic additions, so results are reproducible bitwise. Memory is linear in the length, except for the lists: 4 bytes per pair
of blocks and row, twice. A masked pair has a weight of exactly zero. The kernels are compiled if the computation is lowered for CUDA;
otherwise they are interpreted, which is slow.

Axes: B batch, T query positions, S key positions, N heads, K key-value heads, G query heads per key-value head, H head size, I query
blocks, J key blocks, W positions per block. T, S and H are padded inside, since Triton needs powers of two that are at least 16.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

try:
    from jax.experimental.pallas import triton as plgpu
except ImportError:  # this version of JAX lacks the lowering
    plgpu: Any = None

from iam_jax.kernels.blocks import needed_blocks

_MAX_HEAD_SIZE = 256
_MASKED = -1e30  # logit of a masked key; finite, so that the maximum over masked keys alone gives no NaN
_LOG2E = math.log2(math.e)  # the kernels use powers of 2, which are one instruction


def unsupported_reason(q: jax.Array | jax.ShapeDtypeStruct, k: jax.Array | jax.ShapeDtypeStruct, reach: tuple[int, int] | None) -> str:
    """Returns why the backend does not support the inputs, or "" if it does."""
    if plgpu is None:
        return "needs a version of JAX that lowers Pallas through Triton"
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"does not support {q.dtype}"
    if q.shape[3] > _MAX_HEAD_SIZE:
        return f"supports head sizes up to {_MAX_HEAD_SIZE}, not {q.shape[3]}"
    if jax.default_backend() == "gpu" and not _is_ampere_or_later(getattr(jax.local_devices()[0], "compute_capability", "")):
        return "needs an NVIDIA GPU of compute capability 8.0 (Ampere) or later"
    return ""


def _is_ampere_or_later(capability: str) -> bool:
    major, _, minor = str(capability).partition(".")
    return major.isdecimal() and minor.isdecimal() and int(major) >= 8  # ROCm uses names such as gfx942


def block_size(head_size: int, dtype: jnp.dtype, reach: tuple[int, int] | None) -> int:
    """The number of queries, and of keys, in a block: a power of two, at least 16.

    This is the largest block that fits into the registers of an Ampere GPU and into 99 KB of shared memory, the size of its small models.
    Blocks are smaller if ranges are short. head_size is the padded head size.
    """
    block = (32 if head_size > 128 else 64) // (2 if jnp.dtype(dtype).itemsize > 2 else 1)
    return min(block, 32) if reach is not None and sum(reach) < 64 else block


def _compiler_params(block: int, head_size: int, dtype: jnp.dtype) -> Any:
    large = block * head_size * jnp.dtype(dtype).itemsize >= 2**14  # the sums do not fit into the registers of 4 warps
    return plgpu.CompilerParams(num_warps=8 if large else 4, num_stages=2)


class BlockLists(NamedTuple):
    """The blocks that the kernels visit, in this order. Only the first `…_count` entries of each list are valid. All arrays are int32."""

    keys_BIJ: jax.Array  # key blocks of each query block
    keys_count_BI: jax.Array
    queries_BJI: jax.Array  # query blocks of each key block
    queries_count_BJ: jax.Array


def block_lists(start_BT: jax.Array, stop_BT: jax.Array, keys: int, block: int) -> BlockLists:
    """Lists the pairs of `needed_blocks`. keys: the number of keys; block: the number of queries, and of keys, in a block."""
    needed_BIJ = needed_blocks(start_BT, stop_BT, keys, block, block)

    def sorted_indices(needed):
        count = needed.shape[-1]
        return jnp.sort(jnp.where(needed, jnp.arange(count, dtype=jnp.int32), count)), needed.sum(-1, dtype=jnp.int32)

    return BlockLists(*sorted_indices(needed_BIJ), *sorted_indices(needed_BIJ.swapaxes(1, 2)))


# ---- forward and backward


def forward(q_BTNH, k_BSKH, v_BSKH, start_BT, stop_BT, *, reach: tuple[int, int] | None, dtype) -> tuple[jax.Array, jax.Array]:
    """Returns o_BTNH in `dtype` and the log-sum-exp lse_BTN in float32. Queries without keys get 0 and -inf."""
    blocks = _Blocks(q_BTNH, k_BSKH, start_BT, stop_BT, reach)
    block_WH, block_W, keys_SH = blocks.query_specs()
    arrays = [(blocks.pad(q_BTNH), block_WH), (blocks.pad(k_BSKH), keys_SH), (blocks.pad(v_BSKH), keys_SH)]
    outputs = [(blocks.query_shape(blocks.H, dtype), block_WH), (blocks.query_shape(None, jnp.float32), block_W)]
    o_BTNH, lse_BTN = blocks.call(_forward_kernel, (blocks.I, blocks.N), [*arrays, *blocks.visits_of_queries()], outputs)
    return blocks.unpad(o_BTNH, blocks.T), lse_BTN[:, : blocks.T]


def backward(q_BTNH, k_BSKH, v_BSKH, start_BT, stop_BT, do_BTNH, lse_BTN, delta_BTN, *, reach: tuple[int, int] | None):
    """Returns dq, dk and dv in float32, from the merged log-sum-exp and delta = sum_H do o."""
    blocks = _Blocks(q_BTNH, k_BSKH, start_BT, stop_BT, reach)
    q, do, lse, delta, k, v = (blocks.pad(x) for x in (q_BTNH, do_BTNH, lse_BTN, delta_BTN, k_BSKH, v_BSKH))

    block_WH, block_W, keys_SH = blocks.query_specs()
    arrays = [(q, block_WH), (do, block_WH), (lse, block_W), (delta, block_W), (k, keys_SH), (v, keys_SH)]
    outputs = [(blocks.query_shape(blocks.H, jnp.float32), block_WH)]
    (dq,) = blocks.call(_dq_kernel, (blocks.I, blocks.N), [*arrays, *blocks.visits_of_queries()], outputs)

    queries_TGH, queries_TG, block_WH = blocks.key_specs()
    arrays = [(q, queries_TGH), (do, queries_TGH), (lse, queries_TG), (delta, queries_TG), (k, block_WH), (v, block_WH)]
    outputs = [(jax.ShapeDtypeStruct(k.shape, jnp.float32), block_WH)] * 2
    dk, dv = blocks.call(_dkdv_kernel, (blocks.J, blocks.K), [*arrays, *blocks.visits_of_keys()], outputs)
    return blocks.unpad(dq, blocks.T), blocks.unpad(dk, blocks.S), blocks.unpad(dv, blocks.S)


class _Blocks:
    """Pads rows to whole blocks, makes the block specifications, and calls a kernel compiled or interpreted."""

    def __init__(self, q_BTNH: jax.Array, k_BSKH: jax.Array, start_BT: jax.Array, stop_BT: jax.Array, reach: tuple[int, int] | None):
        self.B, self.T, self.N, self.head_size = q_BTNH.shape
        self.S, self.K = k_BSKH.shape[1:3]
        self.G = self.N // self.K
        self.H = max(16, pl.next_power_of_2(self.head_size))
        self.W = block_size(self.H, q_BTNH.dtype, reach)
        self.I, self.J = (-(-length // self.W) for length in (self.T, self.S))
        self.params = _compiler_params(self.W, self.H, q_BTNH.dtype)
        self.bounds = [self.pad(x.astype(jnp.int32)) for x in (start_BT, jnp.minimum(stop_BT, self.S))]
        self.lists = block_lists(start_BT, stop_BT, self.S, self.W)

    def pad(self, x: jax.Array) -> jax.Array:
        """Pads the positions of [B, positions, …], and the heads of arrays with four axes, with zeros. Padded queries have no keys."""
        heads = [(0, 0), (0, self.H - self.head_size)][: max(x.ndim - 2, 0)]
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % self.W), *heads))

    def unpad(self, x: jax.Array, length: int) -> jax.Array:
        return x[:, :length, :, : self.head_size]

    def query_shape(self, head_size: int | None, dtype) -> jax.ShapeDtypeStruct:
        heads = (self.N,) if head_size is None else (self.N, head_size)
        return jax.ShapeDtypeStruct((self.B, self.I * self.W, *heads), dtype)

    def query_specs(self) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
        """Specs for programs (i, n, b): the query block as [W, H] and as [W], and all keys [S, H]."""
        return (
            pl.BlockSpec((None, self.W, None, self.H), lambda i, n, b: (b, i, n, 0)),
            pl.BlockSpec((None, self.W, None), lambda i, n, b: (b, i, n)),
            pl.BlockSpec((None, self.J * self.W, None, self.H), lambda i, n, b: (b, 0, lax.div(n, self.G), 0)),
        )

    def visits_of_queries(self):
        start, stop = ((x, pl.BlockSpec((None, self.W), lambda i, n, b: (b, i))) for x in self.bounds)
        visits = (self.lists.keys_BIJ, pl.BlockSpec((None, None, self.J), lambda i, n, b: (b, i, 0)))
        return start, stop, visits, (self.lists.keys_count_BI, pl.BlockSpec((None, None), lambda i, n, b: (b, i)))

    def key_specs(self) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
        """Specs for programs (j, k, b): all queries as [T, G, H] and as [T, G], and the key block [W, H]."""
        T = self.I * self.W
        return (
            pl.BlockSpec((None, T, self.G, self.H), lambda j, k, b: (b, 0, k, 0)),
            pl.BlockSpec((None, T, self.G), lambda j, k, b: (b, 0, k)),
            pl.BlockSpec((None, self.W, None, self.H), lambda j, k, b: (b, j, k, 0)),
        )

    def visits_of_keys(self):
        start, stop = ((x, pl.BlockSpec((None, self.I * self.W), lambda j, k, b: (b, 0))) for x in self.bounds)
        visits = (self.lists.queries_BJI, pl.BlockSpec((None, None, self.I), lambda j, k, b: (b, j, 0)))
        return start, stop, visits, (self.lists.queries_count_BJ, pl.BlockSpec((None, None), lambda j, k, b: (b, j)))

    def call(self, kernel, grid: tuple[int, int], inputs, outputs):
        arrays, in_specs = zip(*inputs, strict=True)
        out_shapes, out_specs = zip(*outputs, strict=True)

        def run(*arrays, interpret: bool):
            return pl.pallas_call(
                functools.partial(kernel, scale=self.head_size**-0.5),
                grid=(*grid, self.B),
                in_specs=in_specs,
                out_specs=out_specs,
                out_shape=out_shapes,
                compiler_params=self.params,
                interpret=interpret,
            )(*arrays)

        compiled, interpreted = (functools.partial(run, interpret=interpret) for interpret in (False, True))
        return lax.platform_dependent(*arrays, cuda=compiled, default=interpreted)


# ---- the kernels


def _dot(x: jax.Array, y: jax.Array, axis: int, *, of_y: int) -> jax.Array:
    """Contracts `axis` of x with axis `of_y` of y and accumulates in float32. float32 inputs are not rounded to TF32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(x, y, (((axis,), (of_y,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _forward_kernel(q_ref, k_ref, v_ref, start_ref, stop_ref, visits_ref, count_ref, o_ref, lse_ref, *, scale: float):
    """Attends from a query block [W, H] to the key blocks of its list, with a running maximum and sum; logits are in base 2."""
    q, start, stop = q_ref[...], start_ref[...], stop_ref[...]
    W = q.shape[0]

    def visit(n, carry):
        o, top, total = carry
        first = visits_ref[n] * W
        keys = pl.ds(first, W)
        logits = _dot(q, k_ref[keys, :], 1, of_y=1) * (scale * _LOG2E)
        inside = _inside(start[:, None], stop[:, None], first, logits.shape, 1)
        logits = jnp.where(inside, logits, _MASKED)
        new_top = jnp.maximum(top, logits.max(1))
        p = jnp.where(inside, jnp.exp2(logits - new_top[:, None]), 0.0)
        rescale = jnp.exp2(top - new_top)
        v = v_ref[keys, :]
        o = o * rescale[:, None] + _dot(p.astype(v.dtype), v, 1, of_y=0)
        return o, new_top, total * rescale + p.sum(1)

    carry = jnp.zeros(q.shape, jnp.float32), jnp.full(W, _MASKED, jnp.float32), jnp.zeros(W, jnp.float32)
    o, top, total = lax.fori_loop(0, count_ref[...], visit, carry)
    empty = total == 0
    o_ref[...] = jnp.where(empty[:, None], 0.0, o / jnp.where(empty, 1.0, total)[:, None]).astype(o_ref.dtype)
    lse_ref[...] = jnp.where(empty, -jnp.inf, top / _LOG2E + jnp.log(jnp.where(empty, 1.0, total)))


def _inside(start, stop, first, shape: tuple[int, ...], axis: int) -> jax.Array:
    """True for keys inside the ranges. Keys lie along `axis` of `shape`; the first one is key number `first`."""
    s = first + lax.broadcasted_iota(jnp.int32, shape, axis)
    return (s >= start) & (s < stop)


def _dq_kernel(q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref, start_ref, stop_ref, visits_ref, count_ref, dq_ref, *, scale: float):
    q, do, lse, delta, start, stop = (ref[...] for ref in (q_ref, do_ref, lse_ref, delta_ref, start_ref, stop_ref))
    W = q.shape[0]

    def visit(n, dq):
        first = visits_ref[n] * W
        k, v = k_ref[pl.ds(first, W), :], v_ref[pl.ds(first, W), :]
        logits, dp = _dot(q, k, 1, of_y=1), _dot(do, v, 1, of_y=1)
        _, ds = _p_ds(logits, dp, lse[:, None], delta[:, None], start[:, None], stop[:, None], first, 1, scale)
        return dq + _dot(ds.astype(k.dtype), k, 1, of_y=0)

    dq_ref[...] = lax.fori_loop(0, count_ref[...], visit, jnp.zeros(q.shape, jnp.float32))


def _dkdv_kernel(
    q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref, start_ref, stop_ref, visits_ref, count_ref, dk_ref, dv_ref, *, scale: float
):
    """Computes pairs as [W keys, W queries], so that the last two products need no transposition."""
    k, v = k_ref[...], v_ref[...]
    W, G = k.shape[0], q_ref.shape[1]
    first = pl.program_id(0) * W

    def visit(n, carry):
        dk, dv = carry
        queries, g = pl.ds(visits_ref[lax.div(n, G)] * W, W), lax.rem(n, G)
        q, do = q_ref[queries, g, :], do_ref[queries, g, :]
        lse, delta, start, stop = lse_ref[queries, g], delta_ref[queries, g], start_ref[queries], stop_ref[queries]
        logits, dp = _dot(k, q, 1, of_y=1), _dot(v, do, 1, of_y=1)
        p, ds = _p_ds(logits, dp, lse[None, :], delta[None, :], start[None, :], stop[None, :], first, 0, scale)
        return dk + _dot(ds.astype(q.dtype), q, 1, of_y=0), dv + _dot(p.astype(do.dtype), do, 1, of_y=0)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk_ref[...], dv_ref[...] = lax.fori_loop(0, count_ref[...] * G, visit, (zeros, zeros))


def _p_ds(logits, dp, lse, delta, start, stop, first, axis: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """Returns the attention weights and the gradient of q k; both are zero for masked pairs.

    logits: q k, unscaled. The keys lie along `axis`; the first one is key number `first`.
    """
    inside = _inside(start, stop, first, logits.shape, axis)
    p = jnp.where(inside, jnp.exp2(logits * (scale * _LOG2E) - lse * _LOG2E), 0.0)
    return p, p * (dp - delta) * scale

"""Range attention for NVIDIA GPUs: Pallas kernels that load and compute only the pairs of blocks that hold an allowed pair.

Why our own: tokamax 0.0.12's Triton backward turns ranges into a dense mask (memory in the square of the length), its Hopper kernels
take 16-bit inputs and new GPUs only, and it drops the cotangents of its softmax residuals, so that parts cannot be merged outside it.
These are lowered through Triton: any NVIDIA GPU from Ampere on, float32 in true float32. Pallas deprecates that lowering in favour
of Mosaic GPU, with a DeprecationWarning from JAX 0.11 on; when it goes, the kernels here have to move, their callers do not.

A program owns one block of one head and goes through a list of the blocks it needs (`plan`); sums stay in registers and nothing is
added atomically, so results repeat exactly. Memory is linear in the length, but for the lists: 4 bytes for each pair of blocks and
row, twice. A masked pair has a weight of exactly zero. Compiled where the computation is lowered for CUDA, else interpreted (slow).

Axes: B batch, T query positions, S key positions, N heads, K key-value heads, G query heads of a key-value head, H head size, I query
blocks, J key blocks, W positions of a block. T, S and H are padded inside: Triton wants powers of two, of 16 at least.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

try:
    from jax.experimental.pallas import triton as plgpu
except ImportError:  # a JAX without this lowering
    plgpu = None

from iam_jax.kernels.blocks import needed_blocks

_HEAD_SIZE = 256  # at most
_MASKED = -1e30  # a finite logit: a maximum over masked keys alone then stays harmless
_LOG2E = math.log2(math.e)  # the kernels use powers of 2: one instruction


def refuses(q: jax.Array, k: jax.Array, reach: tuple[int, int] | None) -> str:
    if plgpu is None:
        return "needs a JAX that lowers Pallas through Triton"
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"has no {q.dtype}"
    if q.shape[3] > _HEAD_SIZE:
        return f"has no head size {q.shape[3]}, only up to {_HEAD_SIZE}"
    if jax.default_backend() == "gpu" and not _ampere(getattr(jax.local_devices()[0], "compute_capability", "")):
        return "needs an NVIDIA GPU of compute capability 8.0 (Ampere) or later"
    return ""


def _ampere(capability: str) -> bool:
    major, _, minor = str(capability).partition(".")
    return major.isdecimal() and minor.isdecimal() and int(major) >= 8  # ROCm's are named like gfx942


def block_size(head_size: int, dtype: jnp.dtype, reach: tuple[int, int] | None) -> int:
    """Positions of a block, of queries and of keys: a power of two, at least 16. The largest that the compiler fits into an Ampere
    GPU's registers and the 99 KB of shared memory that its small models have; less where ranges are short. head_size is padded."""
    block = (32 if head_size > 128 else 64) // (2 if jnp.dtype(dtype).itemsize > 2 else 1)
    return min(block, 32) if reach is not None and sum(reach) < 64 else block


def _compiler_params(block: int, head_size: int, dtype: jnp.dtype) -> "plgpu.CompilerParams":
    large = block * head_size * jnp.dtype(dtype).itemsize >= 2**14  # 4 warps' registers do not hold its sums
    return plgpu.CompilerParams(num_warps=8 if large else 4, num_stages=2)


class Plan(NamedTuple):
    """The blocks that the kernels visit, in this order: the first `…_count` entries of each list."""

    keys_BIJ: jax.Array  # for each query block
    keys_count_BI: jax.Array
    queries_BJI: jax.Array  # for each key block
    queries_count_BJ: jax.Array


def plan(start_BT: jax.Array, stop_BT: jax.Array, keys: int, block: int) -> Plan:
    """Lists of exactly the pairs of `needed_blocks`, with blocks of `block` queries and as many of `keys` keys; all int32."""
    needed_BIJ = needed_blocks(start_BT, stop_BT, keys, block, block)

    def lists(needed):
        last = needed.shape[-1]
        return jnp.sort(jnp.where(needed, jnp.arange(last, dtype=jnp.int32), last)), needed.sum(-1, dtype=jnp.int32)

    return Plan(*lists(needed_BIJ), *lists(needed_BIJ.swapaxes(1, 2)))


# ---- the calls


def forward(q_BTNH, k_BSKH, v_BSKH, start_BT, stop_BT, *, reach: tuple[int, int] | None, dtype) -> tuple[jax.Array, jax.Array]:
    """o_BTNH in `dtype` and the log-sum-exp lse_BTN, float32; 0 and -inf in rows without a key."""
    cut = _Cut(q_BTNH, k_BSKH, start_BT, stop_BT, reach)
    block_WH, block_W, keys_SH = cut.query_specs()
    inputs = [(cut.padded(q_BTNH), block_WH), (cut.padded(k_BSKH), keys_SH), (cut.padded(v_BSKH), keys_SH), *cut.visits_of_queries()]
    outputs = [(cut.queries_like(cut.H, dtype), block_WH), (cut.queries_like(None, jnp.float32), block_W)]
    o_BTNH, lse_BTN = cut.call(_forward_kernel, (cut.I, cut.N), inputs, outputs)
    return cut.unpadded(o_BTNH, cut.T), lse_BTN[:, : cut.T]


def backward(q_BTNH, k_BSKH, v_BSKH, start_BT, stop_BT, do_BTNH, lse_BTN, delta_BTN, *, reach: tuple[int, int] | None):
    """dq, dk and dv, float32, by the merged log-sum-exp and delta = sum_H do o."""
    cut = _Cut(q_BTNH, k_BSKH, start_BT, stop_BT, reach)
    q, do, lse, delta, k, v = (cut.padded(x) for x in (q_BTNH, do_BTNH, lse_BTN, delta_BTN, k_BSKH, v_BSKH))

    block_WH, block_W, keys_SH = cut.query_specs()
    inputs = [(q, block_WH), (do, block_WH), (lse, block_W), (delta, block_W), (k, keys_SH), (v, keys_SH), *cut.visits_of_queries()]
    (dq,) = cut.call(_dq_kernel, (cut.I, cut.N), inputs, [(cut.queries_like(cut.H, jnp.float32), block_WH)])

    queries_TGH, queries_TG, block_WH = cut.key_specs()
    of_queries = [(q, queries_TGH), (do, queries_TGH), (lse, queries_TG), (delta, queries_TG)]
    inputs = [*of_queries, (k, block_WH), (v, block_WH), *cut.visits_of_keys()]
    dk, dv = cut.call(_dkdv_kernel, (cut.J, cut.K), inputs, [(jax.ShapeDtypeStruct(k.shape, jnp.float32), block_WH)] * 2)
    return cut.unpadded(dq, cut.T), cut.unpadded(dk, cut.S), cut.unpadded(dv, cut.S)


class _Cut:
    """Rows cut into blocks: padding, block specifications, and the choice between compiled and interpreted."""

    def __init__(self, q_BTNH: jax.Array, k_BSKH: jax.Array, start_BT: jax.Array, stop_BT: jax.Array, reach: tuple[int, int] | None):
        self.B, self.T, self.N, self.head_size = q_BTNH.shape
        self.S, self.K = k_BSKH.shape[1:3]
        self.G = self.N // self.K
        self.H = max(16, pl.next_power_of_2(self.head_size))
        self.W = block_size(self.H, q_BTNH.dtype, reach)
        self.I, self.J = (-(-length // self.W) for length in (self.T, self.S))
        self.params = _compiler_params(self.W, self.H, q_BTNH.dtype)
        self.bounds = [self.padded(x.astype(jnp.int32)) for x in (start_BT, jnp.minimum(stop_BT, self.S))]
        self.plan = plan(start_BT, stop_BT, self.S, self.W)

    def padded(self, x: jax.Array) -> jax.Array:
        """Zeros after [B, positions, …] and, of four axes, after the head; queries beyond T thus have no keys."""
        heads = [(0, 0), (0, self.H - self.head_size)][: max(x.ndim - 2, 0)]
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % self.W), *heads))

    def unpadded(self, x: jax.Array, length: int) -> jax.Array:
        return x[:, :length, :, : self.head_size]

    def queries_like(self, head_size: int | None, dtype) -> jax.ShapeDtypeStruct:
        rest = (self.N,) if head_size is None else (self.N, head_size)
        return jax.ShapeDtypeStruct((self.B, self.I * self.W, *rest), dtype)

    def query_specs(self) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
        """For programs (i, n, b): of the query block [W, H] and [W], and of all its keys [S, H]."""
        return (
            pl.BlockSpec((None, self.W, None, self.H), lambda i, n, b: (b, i, n, 0)),
            pl.BlockSpec((None, self.W, None), lambda i, n, b: (b, i, n)),
            pl.BlockSpec((None, self.J * self.W, None, self.H), lambda i, n, b: (b, 0, lax.div(n, self.G), 0)),
        )

    def visits_of_queries(self):
        start, stop = ((x, pl.BlockSpec((None, self.W), lambda i, n, b: (b, i))) for x in self.bounds)
        visits = (self.plan.keys_BIJ, pl.BlockSpec((None, None, self.J), lambda i, n, b: (b, i, 0)))
        return start, stop, visits, (self.plan.keys_count_BI, pl.BlockSpec((None, None), lambda i, n, b: (b, i)))

    def key_specs(self) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
        """For programs (j, k, b): of all its queries [T, G, H] and [T, G], and of the key block [W, H]."""
        T = self.I * self.W
        return (
            pl.BlockSpec((None, T, self.G, self.H), lambda j, k, b: (b, 0, k, 0)),
            pl.BlockSpec((None, T, self.G), lambda j, k, b: (b, 0, k)),
            pl.BlockSpec((None, self.W, None, self.H), lambda j, k, b: (b, j, k, 0)),
        )

    def visits_of_keys(self):
        start, stop = ((x, pl.BlockSpec((None, self.I * self.W), lambda j, k, b: (b, 0))) for x in self.bounds)
        visits = (self.plan.queries_BJI, pl.BlockSpec((None, None, self.I), lambda j, k, b: (b, j, 0)))
        return start, stop, visits, (self.plan.queries_count_BJ, pl.BlockSpec((None, None), lambda j, k, b: (b, j)))

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
    """The product over `axis` of x and `of_y` of y, summed in float32; float32 is multiplied as such, not as TF32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(x, y, (((axis,), (of_y,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _forward_kernel(q_ref, k_ref, v_ref, start_ref, stop_ref, visits_ref, count_ref, o_ref, lse_ref, *, scale: float):
    """[W, H] queries against the blocks of their list, by the running maximum and sum; logits in base 2."""
    q, start, stop = q_ref[...], start_ref[...], stop_ref[...]
    W = q.shape[0]

    def visit(place, carry):
        o, top, total = carry
        first = visits_ref[place] * W
        keys = pl.ds(first, W)
        logits = _dot(q, k_ref[keys, :], 1, of_y=1) * (scale * _LOG2E)
        inside = _inside(start[:, None], stop[:, None], first, logits.shape, 1)
        logits = jnp.where(inside, logits, _MASKED)
        new_top = jnp.maximum(top, logits.max(1))
        p = jnp.where(inside, jnp.exp2(logits - new_top[:, None]), 0.0)
        kept = jnp.exp2(top - new_top)
        v = v_ref[keys, :]
        o = o * kept[:, None] + _dot(p.astype(v.dtype), v, 1, of_y=0)
        return o, new_top, total * kept + p.sum(1)

    carry = jnp.zeros(q.shape, jnp.float32), jnp.full(W, _MASKED, jnp.float32), jnp.zeros(W, jnp.float32)
    o, top, total = lax.fori_loop(0, count_ref[...], visit, carry)
    empty = total == 0
    o_ref[...] = jnp.where(empty[:, None], 0.0, o / jnp.where(empty, 1.0, total)[:, None]).astype(o_ref.dtype)
    lse_ref[...] = jnp.where(empty, -jnp.inf, top / _LOG2E + jnp.log(jnp.where(empty, 1.0, total)))


def _inside(start, stop, first, shape: tuple[int, int], axis: int) -> jax.Array:
    """Which keys, counted from `first` along `axis`, are in the ranges."""
    s = first + lax.broadcasted_iota(jnp.int32, shape, axis)
    return (s >= start) & (s < stop)


def _dq_kernel(q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref, start_ref, stop_ref, visits_ref, count_ref, dq_ref, *, scale: float):
    q, do, lse, delta, start, stop = (ref[...] for ref in (q_ref, do_ref, lse_ref, delta_ref, start_ref, stop_ref))
    W = q.shape[0]

    def visit(place, dq):
        first = visits_ref[place] * W
        k, v = k_ref[pl.ds(first, W), :], v_ref[pl.ds(first, W), :]
        logits, dp = _dot(q, k, 1, of_y=1), _dot(do, v, 1, of_y=1)
        _, ds = _p_ds(logits, dp, *(x[:, None] for x in (lse, delta, start, stop)), first, 1, scale)
        return dq + _dot(ds.astype(k.dtype), k, 1, of_y=0)

    dq_ref[...] = lax.fori_loop(0, count_ref[...], visit, jnp.zeros(q.shape, jnp.float32))


def _dkdv_kernel(
    q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref, start_ref, stop_ref, visits_ref, count_ref, dk_ref, dv_ref, *, scale: float
):
    """The pairs lie keys first, [W of keys, W of queries]: the last two products then need no transposition."""
    k, v = k_ref[...], v_ref[...]
    W, G = k.shape[0], q_ref.shape[1]
    first = pl.program_id(0) * W

    def visit(place, carry):
        dk, dv = carry
        queries, g = pl.ds(visits_ref[lax.div(place, G)] * W, W), lax.rem(place, G)
        q, do = q_ref[queries, g, :], do_ref[queries, g, :]
        of_queries = lse_ref[queries, g], delta_ref[queries, g], start_ref[queries], stop_ref[queries]
        logits, dp = _dot(k, q, 1, of_y=1), _dot(v, do, 1, of_y=1)
        p, ds = _p_ds(logits, dp, *(x[None, :] for x in of_queries), first, 0, scale)
        return dk + _dot(ds.astype(q.dtype), q, 1, of_y=0), dv + _dot(p.astype(do.dtype), do, 1, of_y=0)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk_ref[...], dv_ref[...] = lax.fori_loop(0, count_ref[...] * G, visit, (zeros, zeros))


def _p_ds(logits, dp, lse, delta, start, stop, first, axis: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """The weights and the gradient of q k, of unscaled logits; zero where masked. The keys lie along `axis`, counted from `first`."""
    inside = _inside(start, stop, first, logits.shape, axis)
    p = jnp.where(inside, jnp.exp2(logits * (scale * _LOG2E) - lse * _LOG2E), 0.0)
    return p, p * (dp - delta) * scale

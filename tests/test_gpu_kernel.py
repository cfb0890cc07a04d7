"""The GPU backend itself, interpreted on the CPU in blocks of 16, and lowered for CUDA without a GPU."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.lib.mlir import ir
from jax._src.pallas.triton.lowering import _new_ir_context
from jax.sharding import AbstractDevice, AbstractMesh

from iam_jax.kernels import gpu

BLOCK = 16
SHAPES = [(2, 40, 40, 4, 2, 6), (1, 21, 37, 3, 1, 20), (2, 50, 33, 2, 2, 16), (1, 16, 5, 6, 2, 5)]  # B, T, S, N, K, H
REAL_BLOCK_SIZE = gpu.block_size


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(gpu, "block_size", lambda head_size, dtype, reach: BLOCK)


def kernels(q, k, v, start, stop, do, lse=None, delta=None):
    """Forward; and backward by `lse` and `delta`, or by the ones that belong to this range alone."""
    o, own_lse = gpu.forward(q, k, v, start, stop, reach=None, dtype=q.dtype)
    delta = (do * o).astype(jnp.float32).sum(-1) if delta is None else delta
    return o, own_lse, *gpu.backward(q, k, v, start, stop, do, own_lse if lse is None else lse, delta, reach=None)


@cache
def run():
    return jax.jit(kernels)


def inputs(shape, seed, dtype=np.float32):
    """q, k, v, start, stop, do: some ranges are empty, some the wrong way round, some go beyond the keys on either side."""
    B, T, S, N, K, H = shape
    rng = np.random.default_rng(seed)
    q, k, v, do = (jnp.asarray(rng.standard_normal(size), dtype) for size in ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)))
    start = rng.integers(-5, S + 5, (B, T)).astype(np.int32)
    return q, k, v, start, start + rng.integers(-4, S, (B, T)).astype(np.int32), do


def oracle(q, k, v, start, stop, do, lse=None, delta=None):
    """The same in NumPy's float64, dense."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    (B, _, N, H), (S, K) = q.shape, k.shape[1:3]
    k, v = (np.repeat(x, N // K, axis=2) for x in (k, v))
    s = np.arange(S)
    inside = ((s >= start[..., None]) & (s < stop[..., None]))[:, None]  # B, 1, T, S
    e = np.where(inside, np.exp(np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H)), 0)
    total = np.moveaxis(e.sum(-1), 1, 2)  # B, T, N
    with np.errstate(divide="ignore"):
        own_lse = np.log(total)
    o = np.einsum("bnts,bsnh->btnh", e, v) / np.where(total, total, 1)[..., None]
    used_lse, delta = (own_lse, (do * o).sum(-1)) if lse is None else (np.asarray(lse, np.float64), np.asarray(delta, np.float64))
    p = e * np.moveaxis(np.where(total, np.exp(-used_lse), 0), 2, 1)[..., None]
    ds = p * (np.einsum("btnh,bsnh->bnts", do, v) - np.moveaxis(delta, 2, 1)[..., None]) / np.sqrt(H)
    dk, dv = (np.einsum("bnts,btnh->bsnh", x, y).reshape(B, S, K, N // K, H).sum(3) for x, y in ((ds, q), (p, do)))
    return o, own_lse, np.einsum("bnts,bsnh->btnh", ds, k), dk, dv


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("merged", [False, True])
def test_values_and_gradients_in_float32(shape, merged):
    """merged: the log-sum-exp and delta of more than this range, which the gradients must take as given."""
    arrays, more = inputs(shape, seed=1), {}
    if merged:
        lse = np.array(run()(*arrays)[1])
        more = {"lse": lse + np.where(np.isfinite(lse), np.log(2), 0), "delta": np.random.default_rng(2).random(lse.shape, np.float32)}
    got = run()(*arrays, **more)
    assert (arrays[3] >= arrays[4]).any() and (arrays[4] > shape[2]).any() and (arrays[3] < 0).any()
    for x, y in zip(got, oracle(*arrays, **more), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bits(dtype):
    """From the same rounded inputs, each result within 1 % of its norm; the sums are float32."""
    arrays = inputs(SHAPES[0], 3, dtype)
    got, expected = run()(*arrays), oracle(*arrays)
    assert [x.dtype for x in got] == [dtype, *[jnp.float32] * 4]
    for place in (0, 2, 3, 4):
        x, y = np.asarray(got[place], np.float64), expected[place]
        assert np.linalg.norm(x - y) <= 0.01 * np.linalg.norm(y)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-5)  # logits are never rounded


def packing(seed, B=2, T=90):
    """start, stop [B, T]: users of random lengths side by side, each query sees some earlier stretch of its user's positions, or none."""
    rng = np.random.default_rng(seed)
    users = np.sort(rng.integers(0, 5, (B, T)), axis=1)
    first = np.array([[np.flatnonzero(row == user)[0] for user in row] for row in users])
    start = first + rng.integers(0, 3, (B, T))
    stop = np.where(rng.random((B, T)) < 0.2, start, np.arange(T) + 1 - rng.integers(0, 9, (B, T)))
    return start.astype(np.int32), stop.astype(np.int32)


def brute_force(start, stop, keys):
    """The set of needed (b, query block, key block), one key at a time."""
    return {
        (b, t // BLOCK, s // BLOCK)
        for b, t in np.ndindex(start.shape)
        for s in range(max(start[b, t], 0), min(stop[b, t], keys))
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_plan_lists_exactly_the_needed_blocks_in_order(seed):
    start, stop = packing(seed)
    plan = gpu.plan(start, stop, start.shape[1], BLOCK)
    needed, pairs = brute_force(start, stop, start.shape[1]), 2 * 6 * 6
    assert 0 < len(needed) < pairs

    def listed(visits, count):
        lists = {(b, own): visits[b, own, :n].tolist() for (b, own), n in np.ndenumerate(count)}
        assert all(list_ == sorted(set(list_)) for list_ in lists.values())
        return {(b, own, other) for (b, own), list_ in lists.items() for other in list_}

    assert listed(np.asarray(plan.keys_BIJ), np.asarray(plan.keys_count_BI)) == needed
    by_keys = listed(np.asarray(plan.queries_BJI), np.asarray(plan.queries_count_BJ))
    assert {(b, i, j) for b, j, i in by_keys} == needed


def test_only_the_needed_blocks_are_visited():
    """NaN in one block reaches exactly the blocks that need it: 0 * NaN is NaN, so a visit cannot hide."""
    start, stop = packing(1)
    B, T = start.shape
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((B, T, heads, 4)).astype(np.float32) for heads in (2, 1, 1, 2)]
    needed = brute_force(start, stop, T)
    lse, delta = np.zeros((2, B, T, 2), np.float32)

    def reached(x):
        return {(b, t // BLOCK) for b, t in zip(*np.nonzero(np.isnan(np.asarray(x)).any((2, 3))), strict=True)}

    for block in range(-(-T // BLOCK)):
        q, k, v, do = (x.copy() for x in arrays)
        for x in (k, v):
            x[:, block * BLOCK : (block + 1) * BLOCK] = np.nan
        o, _, dq, _, _ = run()(q, k, v, start, stop, do, lse, delta)
        visitors = {(b, i) for b, i, j in needed if j == block}
        has_keys = {(b, t // BLOCK) for b, t in zip(*np.nonzero(start < stop), strict=True)}
        assert reached(dq) == visitors and reached(o) == visitors & has_keys

        q, k, v, do = (x.copy() for x in arrays)
        for x in (q, do):
            x[:, block * BLOCK : (block + 1) * BLOCK] = np.nan
        _, _, _, dk, dv = run()(q, k, v, start, stop, do, lse, delta)
        assert reached(dk) == reached(dv) == {(b, j) for b, i, j in needed if i == block}


def test_masked_keys_of_visited_blocks_count_for_exactly_nothing():
    q, k, v, _, _, do = inputs(SHAPES[0], 5)
    start, stop = np.full((2, 40), 5, np.int32), np.full((2, 40), 20, np.int32)
    inside = ((np.arange(40) >= 5) & (np.arange(40) < 20))[:, None, None]
    o, lse, dq, dk, dv = run()(q, k, v, start, stop, do)
    changed = run()(q, jnp.where(inside, k, 1e4), jnp.where(inside, v, -1e4), start, stop, do)
    for x, y in zip((o, lse, dq, dk, dv), changed, strict=True):
        np.testing.assert_array_equal(x, y)
    assert not np.where(inside, 0, dk).any() and not np.where(inside, 0, dv).any() and np.asarray(dk).any()


def test_no_key_at_all():
    """Nothing is even read."""
    q, k, v, start, _, do = inputs(SHAPES[1], 4)
    k, v = jnp.full_like(k, jnp.nan), jnp.full_like(v, jnp.nan)
    o, lse, *grads = run()(q, k, v, start, start - 1, do)
    assert (np.asarray(lse) == -np.inf).all()
    for x in (o, *grads):
        np.testing.assert_array_equal(x, np.zeros(x.shape))


def test_empty_rows_among_others():
    """Exactly zero although their block is visited for others, with NaN in it."""
    q, k, v, start, stop, do = inputs(SHAPES[0], 6)
    empty = np.maximum(start, 0) >= np.minimum(stop, 40)
    o, lse, *_ = run()(q, k, v.at[:, 20].set(jnp.nan), start, stop, do)
    assert empty.any() and np.isnan(np.asarray(o)).any()
    np.testing.assert_array_equal(np.asarray(o)[empty], 0)
    np.testing.assert_array_equal(np.asarray(lse) == -np.inf, np.repeat(empty[..., None], 4, axis=2))
    np.testing.assert_array_equal(np.asarray(run()(q, k, v, start, stop, do)[2])[empty], 0)


def test_refusals(monkeypatch):
    def refuses(H=64, dtype=jnp.float32):
        return gpu.refuses(jax.ShapeDtypeStruct((1, 8, 2, H), dtype), None, None)

    assert [refuses(dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)] == [""] * 3
    assert refuses(H=256) == "" and "257" in refuses(H=257)
    assert "int8" in refuses(dtype=jnp.int8) and "float8" in refuses(dtype=jnp.float8_e4m3fn)

    class Device:
        compute_capability = "8.6"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device])
    assert refuses() == ""
    for capability, ok in (("7.5", False), ("9.0", True), ("12.0", True), ("gfx942", False)):
        Device.compute_capability = capability
        assert (refuses() == "") is ok


def test_block_sizes():
    """Powers of two, whose four blocks of each kind fit the 99 KB of the smallest GPUs in question."""
    for H in (16, 32, 64, 128, 256):
        for dtype, size in ((jnp.float32, 4), (jnp.bfloat16, 2)):
            for reach in (None, (10, 0), (1000, 0)):
                block = REAL_BLOCK_SIZE(H, dtype, reach)
                assert block in (16, 32, 64) and 5 * block * H * size <= 99 * 1024


# ---- lowered for CUDA


def lowered(H, dtype, N=6, K=2, B=2, T=200, S=300):
    """The StableHLO module for an A100, and each kernel's Triton code."""
    of = jax.ShapeDtypeStruct
    q, k, bound, row = of((B, T, N, H), dtype), of((B, S, K, H), dtype), of((B, T), jnp.int32), of((B, T, N), jnp.float32)
    mesh = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(device_kind="NVIDIA A100", num_cores=None, platform="gpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(partial(kernels)).trace(q, k, k, bound, bound, q, row, row)  # a new function: nothing cached by jit
        module = traced.lower(lowering_platforms=("cuda",)).compiler_ir()
    codes = []

    def collect(op):
        if op.operation.name == "stablehlo.custom_call" and op.attributes["call_target_name"].value == "__gpu$xla.gpu.triton":
            codes.append(ir.StringAttr(op.attributes["mhlo.backend_config"]["ir"]).value_bytes)
        return ir.WalkResult.ADVANCE

    module.operation.walk(collect)
    with _new_ir_context():
        return str(module), [str(ir.Module.parse(code)) for code in codes]


@pytest.mark.parametrize("H", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lowers_for_cuda(H, dtype, monkeypatch):
    """As Triton kernels, with the real block sizes: forward, dq, dk and dv; 16-bit operands are not widened before a product."""
    monkeypatch.setattr(gpu, "block_size", REAL_BLOCK_SIZE)
    _, codes = lowered(H, dtype)
    products = [re.findall(r"tt\.dot.*: tensor<\d+x\d+x(\w+)> \* tensor<\d+x\d+x(\w+)> -> tensor<\d+x\d+x(\w+)>", code) for code in codes]
    kind = "f32" if dtype == jnp.float32 else "bf16"
    assert sorted(map(len, products)) == [2, 3, 4]
    assert {types for code in products for types in code} == {(kind, kind, "f32")}


def test_float32_is_not_multiplied_as_tf32(monkeypatch):
    def reduced(codes):
        return sum("tf32" in line for code in codes for line in code.splitlines() if "tt.dot" in line)

    assert reduced(lowered(64, jnp.float32)[1]) == 0
    product = gpu._dot
    monkeypatch.setattr(gpu, "_dot", lambda x, y, axis, *, of_y: product(x, y, axis, of_y=of_y) * 0 + jnp.dot(x, y.T if of_y else y))
    assert reduced(lowered(64, jnp.float32)[1]) > 0  # the test would see it


def test_memory_is_linear_in_the_length(monkeypatch):
    """No array as large as the mask; the largest says which queries need which key block, and is never kept (one fused reduction)."""
    monkeypatch.setattr(gpu, "block_size", REAL_BLOCK_SIZE)
    length = 8192
    text, _ = lowered(16, jnp.bfloat16, N=1, K=1, B=1, T=length, S=length)
    sizes = [np.prod([int(n) for n in dims.split("x")[:-1]]) for dims in re.findall(r"tensor<((?:\d+x)+)[a-z]", text)]
    assert max(sizes) <= length * length // 64

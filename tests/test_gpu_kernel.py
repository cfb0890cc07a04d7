"""Parts that only the GPU kernels have: lists of blocks, unsupported inputs, and their code for CUDA, without a GPU. Shared tests are in
test_kernels.py."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.lib.mlir import ir
from jax._src.pallas.triton.lowering import _new_ir_context
from jax.sharding import AbstractDevice, AbstractMesh
from test_kernels import BLOCK, needed_pairs, packing

from iam_jax.kernels import gpu


def kernels(q, k, v, start, stop, do, lse, delta):
    o, own_lse = gpu.forward(q, k, v, start, stop, reach=None, dtype=q.dtype)
    return o, own_lse, *gpu.backward(q, k, v, start, stop, do, lse, delta, reach=None)


@pytest.mark.parametrize("seed", range(5))
def test_lists_hold_exactly_the_needed_blocks_in_order(seed):
    start, stop = packing(seed)
    lists = gpu.block_lists(start, stop, start.shape[1], BLOCK)
    needed, pairs = needed_pairs(start, stop, start.shape[1]), 2 * 6 * 6
    assert 0 < len(needed) < pairs

    def listed(visits, count):
        lists = {(b, own): visits[b, own, :n].tolist() for (b, own), n in np.ndenumerate(count)}
        assert all(list_ == sorted(set(list_)) for list_ in lists.values())
        return {(b, own, other) for (b, own), list_ in lists.items() for other in list_}

    assert listed(np.asarray(lists.keys_BIJ), np.asarray(lists.keys_count_BI)) == needed
    by_keys = listed(np.asarray(lists.queries_BJI), np.asarray(lists.queries_count_BJ))
    assert {(b, i, j) for b, j, i in by_keys} == needed


def test_unsupported_inputs(monkeypatch):
    def reason(H=64, dtype=jnp.float32):
        return gpu.unsupported_reason(jax.ShapeDtypeStruct((1, 8, 2, H), dtype), None, None)

    assert [reason(dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)] == [""] * 3
    assert reason(H=256) == "" and "257" in reason(H=257)
    assert "int8" in reason(dtype=jnp.int8) and "float8" in reason(dtype=jnp.float8_e4m3fn)

    class Device:
        compute_capability = "8.6"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device])
    assert reason() == ""
    for capability, ok in (("7.5", False), ("9.0", True), ("12.0", True), ("gfx942", False)):
        Device.compute_capability = capability
        assert (reason() == "") is ok


def test_block_sizes():
    """Block sizes are powers of two, and five blocks fit into the 99 KB of shared memory of the smallest supported GPUs."""
    for H in (16, 32, 64, 128, 256):
        for dtype, size in ((jnp.float32, 4), (jnp.bfloat16, 2)):
            for reach in (None, (10, 0), (1000, 0)):
                block = gpu.block_size(H, dtype, reach)
                assert block in (16, 32, 64) and 5 * block * H * size <= 99 * 1024


# ---- lowered for CUDA


def lowered(H, dtype, N=6, K=2, B=2, T=200, S=300):
    """The StableHLO module for an A100, and each kernel's Triton code."""
    of = jax.ShapeDtypeStruct
    q, k, bound, row = of((B, T, N, H), dtype), of((B, S, K, H), dtype), of((B, T), jnp.int32), of((B, T, N), jnp.float32)
    mesh = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(device_kind="NVIDIA A100", num_cores=None, platform="gpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(partial(kernels)).trace(q, k, k, bound, bound, q, row, row)  # a new function, so that jit has nothing cached
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
def test_lowers_for_cuda(H, dtype):
    """The forward, dq and dk/dv kernels lower to Triton with the real block sizes. 16-bit operands are not widened before a product."""
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
    assert reduced(lowered(64, jnp.float32)[1]) > 0  # the test detects TF32


def test_memory_is_linear_in_the_length():
    """No array is as large as the mask. The largest marks the key blocks that each query needs, inside a fused reduction."""
    length = 8192
    text, _ = lowered(16, jnp.bfloat16, N=1, K=1, B=1, T=length, S=length)
    sizes = [np.prod([int(n) for n in dims.split("x")[:-1]]) for dims in re.findall(r"tensor<((?:\d+x)+)[a-z]", text)]
    assert max(sizes) <= length * length // 64

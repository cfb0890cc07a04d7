"""Parts that only the TPU kernels have: lists of pairs, real block sizes, parts, unsupported inputs. Shared tests: test_kernels.py."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import attention_arrays, dense_attention, range_mask
from test_kernels import BLOCK, any_ranges, needed_pairs, packing

from iam_jax.kernels import tpu
from iam_jax.kernels.range_attention import range_attention


@jax.jit
def attend(q, k, v, do, start, stop):
    o, pullback = jax.vjp(lambda q, k, v: range_attention(q, k, v, start, stop, implementation="tpu"), q, k, v)
    return o, *pullback(do)


def test_a_block_of_the_real_size():
    B, T, S, *_ = shape = (1, 140, 300, 2, 1, 8)
    assert tpu.block_size(B, T, S, None) == 256
    arrays, bounds = attention_arrays(shape, 0), any_ranges(shape, 0)
    mask = range_mask(S, [bounds])
    o, lse, *grads = dense_attention(*arrays, mask)
    for x, y in zip(attend(*arrays, *bounds), (o, *grads), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    got_o, got_lse = jax.jit(partial(tpu.forward, reach=None, dtype=jnp.float32))(*arrays[:3], *bounds)
    np.testing.assert_allclose(got_lse, lse, rtol=1e-5, atol=1e-5)
    assert not mask.any(-1).all() and not np.asarray(got_o)[~mask.any(-1)].any()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [packing, any_ranges])
@pytest.mark.parametrize("by_keys", [False, True])
def test_needed_pairs_are_listed_once_and_in_order(make, seed, by_keys):
    B, T, S = (3, 122, 122) if make is packing else (2, 74, 140)
    start, stop = packing(seed, B, T) if make is packing else any_ranges((B, T, S), seed, longest=22)
    pairs, count = tpu.visited_pairs(start, stop, S, BLOCK, by_keys)
    b, i, j, first, last = (np.asarray(x)[:count].tolist() for x in tpu.unpack_pair(pairs, -(-T // BLOCK), -(-S // BLOCK), by_keys))
    expected = sorted(needed_pairs(start, stop, S), key=lambda pair: (pair[0], *pair[:0:-1]) if by_keys else pair)
    assert list(zip(b, i, j, strict=True)) == expected and 0 < len(expected) < len(pairs)
    target = list(zip(b, j if by_keys else i, strict=True))
    assert first == [n == 0 or target[n - 1] != target[n] for n in range(count)]
    assert last == [n + 1 == count or target[n + 1] != target[n] for n in range(count)]


def test_if_nothing_is_needed_one_pair_is_visited():
    pairs, count = tpu.visited_pairs(np.full((2, 19), 5, np.int32), np.full((2, 19), 2, np.int32), 27, BLOCK)
    assert count == 1 and [int(x[0]) for x in tpu.unpack_pair(pairs, 2, 2)] == [0, 0, 0, 1, 1]


def test_rows_are_computed_in_parts_if_the_list_is_too_long(monkeypatch):
    shape = (3, 40, 40, 2, 1, 4)
    arrays, bounds = attention_arrays(shape, 0), any_ranges(shape, 0)
    monkeypatch.setattr(tpu, "block_size", lambda *args: BLOCK)
    attend.clear_cache()
    whole = attend(*arrays, *bounds)
    monkeypatch.setattr(tpu, "MAX_PAIRS", 18)  # 9 per row
    attend.clear_cache()
    assert str(jax.make_jaxpr(partial(tpu.forward, reach=None, dtype=jnp.float32))(*arrays[:3], *bounds)).count("name=range_attention") == 4
    for x, y in zip(whole, attend(*arrays, *bounds), strict=True):
        np.testing.assert_array_equal(x, y)
    attend.clear_cache()


# ---- block sizes and unsupported inputs


def test_blocks_grow_with_the_rows():
    assert [tpu.block_size(1, T, T, None) for T in (5, 128, 129, 2047, 2048)] == [128, 128, 256, 256, 512]
    assert tpu.block_size(1, 4096, 4096, (300, 0)) == 256
    assert tpu.block_size(64, 16384, 16384, (300, 0)) == 512  # 64 * 64**2 pairs are too many


def test_unsupported_inputs():
    def reason(T=8, H=8, dtype=jnp.float32):
        x = jax.ShapeDtypeStruct((1, T, 1, H), dtype)
        return tpu.unsupported_reason(x, x, None)

    assert not reason() and not reason(dtype=jnp.bfloat16) and not reason(H=256) and not reason(T=131072)
    assert "float16" in reason(dtype=jnp.float16) and "257" in reason(H=257) and "too many" in reason(T=2**18)
    arrays = attention_arrays((1, 4, 4, 1, 1, 4), 0, jnp.float16)
    with pytest.raises(ValueError, match="'tpu' supports float32 and bfloat16, not float16"):
        attend(*arrays, *any_ranges((1, 4, 4), 0))

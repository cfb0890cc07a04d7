"""The TPU kernels, interpreted, in blocks of a few positions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

from iam_jax.kernels import tpu
from iam_jax.kernels.range_attention import range_attention

W = 8
SHAPES = {  # B, T, S, N, K, H
    "grouped heads": (2, 24, 24, 4, 2, 6),
    "no multiple of the block": (2, 19, 27, 3, 3, 4),
    "more queries than keys": (1, 33, 5, 2, 1, 16),
    "one of each": (1, 1, 1, 1, 1, 1),
}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(tpu, "block_size", lambda B, T, S, reach: W)


def inputs(shape, seed, dtype=np.float32):
    B, T, S, N, K, H = shape
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(size), dtype) for size in ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))]


def ranges(B, T, S, seed):
    """Some beyond the ends, some empty, some with start > stop."""
    rng = np.random.default_rng(seed)
    start = rng.integers(-4, S + 4, (B, T)).astype(np.int32)
    return start, start + rng.integers(-3, 12, (B, T)).astype(np.int32)


def packing(B, T, S, seed):
    """Rows of users of a few items each: a token's keys are its user's earlier items, none for the first and for the padding."""
    start, stop = np.zeros((2, B, T), np.int32)
    rng = np.random.default_rng(seed)
    for b in range(B):
        t = 0
        while t < T - 4:
            user = t
            for _ in range(rng.integers(1, 6)):
                end = min(t + rng.integers(1, 7), T)
                start[b, t:end], stop[b, t:end] = user, t
                t = end
    return np.minimum(start, S), np.minimum(stop, S)


def pairs_needed(start, stop, keys):
    every = ((b, t, s) for b, t in np.ndindex(start.shape) for s in range(max(start[b, t], 0), min(stop[b, t], keys)))
    return {(b, t // W, s // W) for b, t, s in every}


def dense(q, k, v, do, start, stop):
    """o, lse, delta, dq, dk and dv in float64."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    (B, S, K, H), G = k.shape, q.shape[2] // k.shape[2]
    k_BSNH, v_BSNH = (np.repeat(x, G, axis=2) for x in (k, v))
    s = np.arange(S)
    inside = ((s >= start[..., None]) & (s < stop[..., None]))[:, :, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        e = np.where(inside, np.exp(np.einsum("BTNH,BSNH->BTNS", q, k_BSNH) * H**-0.5), 0)
        p = np.nan_to_num(e / e.sum(-1, keepdims=True))
        lse = np.log(e.sum(-1))
    o = np.einsum("BTNS,BSNH->BTNH", p, v_BSNH)
    delta = (o * do).sum(-1)
    ds = p * (np.einsum("BTNH,BSNH->BTNS", do, v_BSNH) - delta[..., None]) * H**-0.5
    dk, dv = (np.einsum("BTNS,BTNH->BSNH", x, y).reshape(B, S, K, G, H).sum(3) for x, y in ((ds, q), (p, do)))
    return o, lse, delta, np.einsum("BTNS,BSNH->BTNH", ds, k_BSNH), dk, dv


@quick_jit
def attend(q, k, v, do, start, stop):
    o, pullback = jax.vjp(lambda q, k, v: range_attention(q, k, v, start, stop, implementation="tpu"), q, k, v)
    return o, *pullback(do)


def check(shape, seed, start, stop):
    arrays = inputs(shape, seed)
    o, lse, _, *grads = dense(*arrays, start, stop)
    for got, expected in zip(attend(*arrays, start, stop), (o, *grads), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    got = quick_jit(partial(tpu.forward, reach=None, dtype=jnp.float32))(*arrays[:3], start, stop)
    empty = np.maximum(start, 0) >= np.minimum(stop, shape[2])
    assert (np.asarray(got[0])[empty] == 0).all()
    np.testing.assert_allclose(got[1], lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(small, shape):
    for seed in range(3):
        check(shape, seed, *ranges(*shape[:3], seed))


def test_a_block_of_the_real_size():
    B, T, S, *_ = shape = (1, 140, 300, 2, 1, 8)
    assert tpu.block_size(B, T, S, None) == 256
    check(shape, 0, *ranges(B, T, S, 0))


def test_bfloat16(small):
    """From the same rounded inputs: within 2 % of the norm."""
    shape = SHAPES["grouped heads"]
    arrays, (start, stop) = inputs(shape, 0, jnp.bfloat16), ranges(*shape[:3], 0)
    o, _, _, *grads = dense(*arrays, start, stop)
    for got, expected in zip(attend(*arrays, start, stop), (o, *grads), strict=True):
        assert got.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(got, np.float64) - expected) <= 0.02 * np.linalg.norm(expected)


def test_backward_goes_by_the_merged_softmax(small):
    """With the log-sum-exp of twice the mass, half the weights: the other half lies in another range."""
    shape = SHAPES["grouped heads"]
    (q, k, v, do), (start, stop) = inputs(shape, 1), ranges(*shape[:3], 1)
    _, lse, delta, *_ = dense(q, k, v, do, start, stop)
    run = quick_jit(partial(tpu.backward, reach=None))
    lse, delta = jnp.asarray(lse, jnp.float32), jnp.asarray(delta, jnp.float32)
    alone, shared = (run(q, k, v, start, stop, do, x, delta) for x in (lse, lse + np.log(2)))
    for x, y in zip(alone, shared, strict=True):
        np.testing.assert_allclose(x, 2 * y, rtol=1e-5, atol=1e-5)


# ---- what is visited


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [packing, ranges])
@pytest.mark.parametrize("by_keys", [False, True])
def test_what_is_needed_is_listed_once_and_in_order(make, seed, by_keys):
    B, T, S = (3, 61, 61) if make is packing else (2, 37, 70)
    start, stop = make(B, T, S, seed)
    pairs, count = tpu.visits(start, stop, S, W, by_keys)
    b, i, j, first, last = (np.asarray(x)[:count].tolist() for x in tpu.unpack(pairs, -(-T // W), -(-S // W), by_keys))
    expected = sorted(pairs_needed(start, stop, S), key=lambda pair: (pair[0], *pair[:0:-1]) if by_keys else pair)
    assert list(zip(b, i, j, strict=True)) == expected and 0 < len(expected) < len(pairs)
    target = list(zip(b, j if by_keys else i, strict=True))
    assert first == [n == 0 or target[n - 1] != target[n] for n in range(count)]
    assert last == [n + 1 == count or target[n + 1] != target[n] for n in range(count)]


@pytest.mark.parametrize("seed", range(2))
def test_what_is_not_needed_is_not_read(small, seed):
    """NaN in every other block of keys or of queries leaves a block's results as they were."""
    B, T, S, *_ = shape = (2, 45, 45, 2, 1, 4)
    (q, k, v, do), (start, stop) = inputs(shape, seed), packing(B, T, S, seed)
    forward = quick_jit(partial(tpu.forward, reach=None, dtype=jnp.float32))
    backward = quick_jit(partial(tpu.backward, reach=None))
    o, lse = forward(q, k, v, start, stop)
    delta = (do * o).sum(-1)
    dq, dk, dv = backward(q, k, v, start, stop, do, lse, delta)
    blocks = -(-T // W)
    needed = np.zeros((B, blocks, blocks), bool)
    needed[tuple(np.transpose(list(pairs_needed(start, stop, S))))] = True

    def spoil(x, keep_BI):
        return jnp.where(np.repeat(keep_BI, W, axis=1)[:, :T, None, None], x, jnp.nan)

    for block in range(blocks):
        place = np.s_[:, block * W : (block + 1) * W]
        k2, v2 = (spoil(x, needed[:, block]) for x in (k, v))
        o2, lse2 = forward(q, k2, v2, start, stop)
        dq2, *_ = backward(q, k2, v2, start, stop, do, lse, delta)
        q2, do2 = (spoil(x, needed[:, :, block]) for x in (q, do))
        _, dk2, dv2 = backward(q2, k, v, start, stop, do2, lse, delta)
        for x, y in ((o, o2), (lse, lse2), (dq, dq2), (dk, dk2), (dv, dv2)):
            np.testing.assert_array_equal(x[place], y[place])
    assert not np.isnan(dq).any() and np.isnan(dq2).any() and np.isnan(dk2).any()


def test_nothing_needed(small):
    """One pair is visited, and none of it is seen: not even NaN."""
    B, T, S, *_ = shape = SHAPES["no multiple of the block"]
    q, k, v, do = inputs(shape, 0)
    start, stop = np.full((B, T), 5, np.int32), np.full((B, T), 2, np.int32)
    pairs, count = tpu.visits(start, stop, S, W)
    assert count == 1 and [int(x[0]) for x in tpu.unpack(pairs, 3, 4)] == [0, 0, 0, 1, 1]
    o, lse = quick_jit(partial(tpu.forward, reach=None, dtype=jnp.float32))(q, k, v + jnp.nan, start, stop)
    o2, *grads = attend(q, k, v + jnp.nan, do, start, stop)
    assert (lse == -np.inf).all() and not any(np.asarray(x).any() for x in (o, o2, *grads))


def test_rows_in_parts_where_the_list_is_too_long(small, monkeypatch):
    shape = (3, 24, 24, 2, 1, 4)
    arrays, bounds = inputs(shape, 0), ranges(*shape[:3], 0)
    whole = attend(*arrays, *bounds)
    monkeypatch.setattr(tpu, "MAX_PAIRS", 18)  # 9 in a row
    attend.clear_cache()
    assert str(jax.make_jaxpr(partial(tpu.forward, reach=None, dtype=jnp.float32))(*arrays[:3], *bounds)).count("name=range_attention") == 4
    for x, y in zip(whole, attend(*arrays, *bounds), strict=True):
        np.testing.assert_array_equal(x, y)
    attend.clear_cache()


# ---- choices


def test_blocks_grow_with_the_rows():
    assert [tpu.block_size(1, T, T, None) for T in (5, 128, 129, 2047, 2048)] == [128, 128, 256, 256, 512]
    assert tpu.block_size(1, 4096, 4096, (300, 0)) == 256
    assert tpu.block_size(64, 16384, 16384, (300, 0)) == 512  # 64 * 64**2 pairs are too many


def test_refusals():
    def refuses(T=8, H=8, dtype=jnp.float32):
        x = jax.ShapeDtypeStruct((1, T, 1, H), dtype)
        return tpu.refuses(x, x, None)

    assert not refuses() and not refuses(dtype=jnp.bfloat16) and not refuses(H=256) and not refuses(T=131072)
    assert "float16" in refuses(dtype=jnp.float16) and "257" in refuses(H=257) and "too many" in refuses(T=2**18)
    arrays = inputs((1, 4, 4, 1, 1, 4), 0, jnp.float16)
    with pytest.raises(ValueError, match="'tpu' takes float32 and bfloat16, not float16"):
        attend(*arrays, *ranges(1, 4, 4, 0))

"""One suite for the forward and backward functions of all backends, below the merge. Tests of a single backend are in its own file."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import attention_arrays, dense_attention, range_mask

from iam_jax.kernels import blocked, gpu, local, tpu

BLOCK = 16
BACKENDS = {"local": local, "blocked": blocked, "tpu": tpu, "gpu": gpu}
VISITING = ("blocked", "tpu", "gpu")  # backends that visit only the needed pairs of blocks
SHAPES = [  # B, T, S, N, K, H
    (2, 40, 40, 4, 2, 6),
    (1, 21, 37, 3, 1, 20),
    (2, 50, 33, 2, 2, 16),
    (1, 33, 5, 2, 1, 16),
    (1, 16, 5, 6, 2, 5),
    (1, 1, 1, 1, 1, 1),
]


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        for name in VISITING:
            patch.setattr(BACKENDS[name], "block_size", lambda *args, **kwargs: BLOCK)
        yield


@cache
def compiled(name, dtype=np.float32, reach=None):
    forward = jax.jit(partial(BACKENDS[name].forward, reach=reach, dtype=dtype))
    return forward, jax.jit(partial(BACKENDS[name].backward, reach=reach))


def any_ranges(shape, seed, longest=None):
    """Random ranges: some are empty, some have a stop before the start, some exceed the keys on either side."""
    B, T, S, *_ = shape
    rng = np.random.default_rng(seed)
    start = rng.integers(-5, S + 5, (B, T)).astype(np.int32)
    return start, start + rng.integers(-4, (longest or S) + 1, (B, T)).astype(np.int32)


def packing(seed, B=2, T=90):
    """Users of random lengths in a row. Each query sees an earlier range of its user's positions, or none."""
    rng = np.random.default_rng(seed)
    users = np.sort(rng.integers(0, 5, (B, T)), axis=1)
    first = np.array([[np.flatnonzero(row == user)[0] for user in row] for row in users])
    start = first + rng.integers(0, 3, (B, T))
    stop = np.where(rng.random((B, T)) < 0.2, start, np.arange(T) + 1 - rng.integers(0, 9, (B, T)))
    return start.astype(np.int32), stop.astype(np.int32)


def needed_pairs(start, stop, keys):
    """The set of needed (b, query block, key block), from a loop over keys."""
    every = ((b, t, s) for b, t in np.ndindex(start.shape) for s in range(max(start[b, t], 0), min(stop[b, t], keys)))
    return {(b, t // BLOCK, s // BLOCK) for b, t, s in every}


def run(name, arrays, start, stop, lse=None, delta=None, reach=None):
    """Returns o, lse, dq, dk and dv. lse and delta default to those of this range alone."""
    q, k, v, do = arrays
    forward, backward = compiled(name, q.dtype, reach)
    o, own_lse = forward(q, k, v, start, stop)
    if lse is None:
        lse, delta = own_lse, (do.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1)
    return o, own_lse, *backward(q, k, v, start, stop, do, lse, delta)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_values_and_gradients_in_float32(name, shape):
    """With its own softmax, and with the log-sum-exp and delta of a merge with further ranges."""
    if name == "local" and shape[1] != shape[2]:
        pytest.skip("local: as many keys as queries")
    for seed in range(1, 4):
        arrays, (start, stop), reach = attention_arrays(shape, seed), any_ranges(shape, seed), None
        if shape[1] > 1:
            assert (start >= stop).any() and (stop > shape[2]).any() and (start < 0).any()
        if name == "local":
            reach, t = (9, 4), np.arange(shape[1])
            start, stop = np.maximum(start, t - 9).astype(np.int32), np.minimum(stop, t + 5).astype(np.int32)
        mask = range_mask(shape[2], [(start, stop)])
        lse = (dense_attention(*arrays, mask).lse + np.log(2)).astype(np.float32)
        delta = np.random.default_rng(2).random(lse.shape, np.float32)
        for given in ({}, {"lse": lse, "delta": delta}):
            got = run(name, arrays, start, stop, **given, reach=reach)
            for x, y in zip(got, dense_attention(*arrays, mask, **given), strict=True):
                assert x.dtype == jnp.float32
                np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
            o, got_lse, dq = (np.asarray(x)[~mask.any(-1)] for x in got[:3])
            assert (got_lse == -np.inf).all() and not o.any() and not dq.any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", BACKENDS)
def test_16_bits(name, dtype):
    """With the same rounded inputs, each result is within 1 % of its norm; sums are float32."""
    if name == "tpu" and dtype == jnp.float16:
        pytest.skip("tpu: no float16")
    shape = SHAPES[0]
    arrays, (start, stop) = attention_arrays(shape, 3, dtype), any_ranges(shape, 3)
    reach = (44, 83) if name == "local" else None  # 5 before the first key, of the last query; 44 behind the last, of the first
    got = run(name, arrays, start, stop, reach=reach)
    expected = dense_attention(*arrays, range_mask(shape[2], [(start, stop)]))
    assert [x.dtype for x in got] == [dtype, *[jnp.float32] * 4]
    np.testing.assert_allclose(got[1], expected.lse, atol=1e-5)  # logits are never rounded
    for place in (0, 2, 3, 4):
        assert np.linalg.norm(np.asarray(got[place], np.float64) - expected[place]) <= 0.01 * np.linalg.norm(expected[place])


# ---- visited blocks


@pytest.mark.parametrize("bounds", [packing(1), any_ranges((2, 90, 90), 1, longest=16)], ids=["packing", "any_ranges"])
@pytest.mark.parametrize("name", VISITING)
def test_only_the_needed_blocks_are_visited(name, bounds):
    """NaN in one block reaches exactly the blocks that need it. Since 0 * NaN is NaN, every visit is detected."""
    start, stop = bounds
    B, T = start.shape
    arrays = attention_arrays((B, T, T, 2, 1, 4), 0)
    needed = needed_pairs(start, stop, T)
    assert 0 < len(needed) < B * 6 * 6
    lse, delta = np.zeros((2, B, T, 2), np.float32)

    def reached(x):
        return {(b, t // BLOCK) for b, t in zip(*np.nonzero(np.isnan(np.asarray(x)).any((2, 3))), strict=True)}

    for block in range(-(-T // BLOCK)):
        place = np.s_[:, block * BLOCK : (block + 1) * BLOCK]
        q, k, v, do = arrays
        o, own_lse, dq, *_ = run(name, (q, k.at[place].set(jnp.nan), v.at[place].set(jnp.nan), do), start, stop, lse, delta)
        assert reached(dq) == reached(o) == reached(own_lse[..., None]) == {(b, i) for b, i, j in needed if j == block}
        *_, dk, dv = run(name, (q.at[place].set(jnp.nan), k, v, do.at[place].set(jnp.nan)), start, stop, lse, delta)
        assert reached(dk) == reached(dv) == {(b, j) for b, i, j in needed if i == block}


@pytest.mark.parametrize("name", VISITING)
def test_masked_keys_of_visited_blocks_have_no_effect(name):
    q, k, v, do = attention_arrays(SHAPES[0], 5)
    start, stop = np.full((2, 40), 5, np.int32), np.full((2, 40), 20, np.int32)
    inside = ((np.arange(40) >= 5) & (np.arange(40) < 20))[:, None, None]
    got = run(name, (q, k, v, do), start, stop)
    changed = run(name, (q, jnp.where(inside, k, 1e4), jnp.where(inside, v, -1e4), do), start, stop)
    for x, y in zip(got, changed, strict=True):
        np.testing.assert_array_equal(x, y)
    dk, dv = map(np.asarray, got[3:])
    assert not np.where(inside, 0, dk).any() and not np.where(inside, 0, dv).any() and dk.any()


@pytest.mark.parametrize("name", VISITING)
def test_no_key_at_all(name):
    """Keys that are NaN have no effect if no query sees them."""
    q, k, v, do = attention_arrays(SHAPES[1], 4)
    start, _ = any_ranges(SHAPES[1], 4)
    o, lse, *grads = run(name, (q, k + jnp.nan, v + jnp.nan, do), start, start - 1)
    assert (np.asarray(lse) == -np.inf).all() and not any(np.asarray(x).any() for x in (o, *grads))


@pytest.mark.parametrize("name", VISITING)
def test_empty_rows_among_others(name):
    """Empty rows are exactly zero, although their block is visited for other rows and contains NaN."""
    (q, k, v, do), (start, stop) = attention_arrays(SHAPES[0], 6), any_ranges(SHAPES[0], 6)
    empty = ~range_mask(40, [(start, stop)]).any(-1)
    o, lse, *_ = run(name, (q, k, v.at[:, 20].set(jnp.nan), do), start, stop)
    assert empty.any() and np.isnan(np.asarray(o)).any()
    np.testing.assert_array_equal(np.asarray(o)[empty], 0)
    np.testing.assert_array_equal(np.asarray(lse) == -np.inf, np.repeat(empty[..., None], 4, axis=2))

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iam_jax.kernels.range_attention import range_attention

SHAPES = [(2, 7, 7, 4, 2, 6), (1, 5, 5, 3, 3, 2), (1, 3, 9, 2, 1, 4)]  # B, T, S, N, K, H


@cache
def compiled(include_self):
    @jax.jit
    def run(q, k, v, do, start, stop):
        o, pullback = jax.vjp(lambda q, k, v: range_attention(q, k, v, start, stop, include_self=include_self), q, k, v)
        return o, *pullback(do)

    return run


def reference(q, k, v, do, start, stop, include_self):
    """Values and gradients in float64, one query and one head at a time."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    o, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    scale, grouped = q.shape[-1] ** -0.5, q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        keys = sorted({*range(start[b, t], stop[b, t])} | ({t} if include_self else set()))
        if not keys:
            continue
        K, V = k[b, keys, n // grouped], v[b, keys, n // grouped]
        p = np.exp(K @ q[b, t, n] * scale)
        p /= p.sum()
        o[b, t, n] = p @ V
        ds = p * (V @ do[b, t, n] - o[b, t, n] @ do[b, t, n]) * scale
        dq[b, t, n] = ds @ K
        for place, s in enumerate(keys):
            dk[b, s, n // grouped] += ds[place] * q[b, t, n]
            dv[b, s, n // grouped] += p[place] * do[b, t, n]
    return o, dq, dk, dv


def inputs(shape, seed, dtype=np.float32):
    B, T, S, N, K, H = shape
    rng = np.random.default_rng(seed)
    sizes = ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    arrays = [jnp.asarray(rng.standard_normal(size), dtype) for size in sizes]
    bounds = np.sort(rng.integers(0, S + 1, (2, B, T)), axis=0).astype(np.int32)
    bounds[1] = np.where(rng.random((B, T)) < 0.2, bounds[0], bounds[1])  # some rows are empty
    return arrays, bounds


@settings(max_examples=40, deadline=None)
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 10**6), include_self=st.booleans())
def test_values_and_gradients_in_float32(shape, seed, include_self):
    arrays, (start, stop) = inputs(shape, seed)
    got = compiled(include_self)(*arrays, start, stop)
    for x, y in zip(got, reference(*arrays, start, stop, include_self), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("include_self", [False, True])
def test_bfloat16(include_self):
    """From the same rounded inputs: values within 2^-7 of the mean size of the values (weights and result have 8 bits each),
    gradients within 2 % of their norm."""
    arrays, (start, stop) = inputs(SHAPES[0], 3, jnp.bfloat16)
    o, *grads = compiled(include_self)(*arrays, start, stop)
    q, k, v, do = arrays
    expected, *expected_grads = reference(*arrays, start, stop, include_self)
    size = reference(q, k, jnp.abs(v), do, start, stop, include_self)[0]
    assert o.dtype == jnp.bfloat16 and (size > 0).any()
    assert (np.abs(np.asarray(o, np.float64) - expected) <= size / 128).all()
    for x, y in zip(grads, expected_grads, strict=True):
        assert x.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(x, np.float64) - y) <= 0.02 * np.linalg.norm(y)


def test_empty_rows_are_exactly_zero_with_zero_gradients():
    (q, k, v, do), _ = inputs(SHAPES[0], 0)
    empty = np.broadcast_to(np.arange(7) % 2 == 1, (2, 7))
    start, stop = np.where(empty, 3, 1).astype(np.int32), np.where(empty, 3, 6).astype(np.int32)
    q = q * 1e4  # logits far beyond exp's range
    o, dq, dk, dv = compiled(False)(q, k, v, do, start, stop)
    assert (np.asarray(o)[empty] == 0).all() and (np.asarray(dq)[empty] == 0).all()
    assert np.asarray(o)[~empty].all()
    assert all(np.isfinite(x).all() for x in (o, dq, dk, dv))
    only_empty = np.where(empty[..., None, None], do, 0)
    assert not any(np.asarray(x).any() for x in compiled(False)(q, k, v, only_empty, start, stop)[1:])
    # A start behind its stop is empty too.
    o, *grads = compiled(False)(q, k, v, do, np.full_like(start, 5), np.full_like(stop, 2))
    assert not any(np.asarray(x).any() for x in (o, *grads))


def test_self_key_counts_once():
    (q, k, v, do), _ = inputs(SHAPES[0], 1)
    t = np.broadcast_to(np.arange(7, dtype=np.int32), (2, 7))
    zero = np.zeros_like(t)
    inside, without = compiled(True)(q, k, v, do, zero, t + 1), compiled(False)(q, k, v, do, zero, t + 1)
    outside = compiled(True)(q, k, v, do, zero, t)  # the same keys
    for a, b, c in zip(inside, without, outside, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    alone = compiled(True)(q, k, v, do, zero, zero)[0]
    np.testing.assert_allclose(alone, np.repeat(v, 2, axis=2), rtol=1e-6)
    assert not np.allclose(compiled(False)(q, k, v, do, zero, t)[0], outside[0])


def test_keys_outside_the_range_leave_no_bit():
    (q, k, v, do), _ = inputs(SHAPES[0], 2)
    start, stop = np.full((2, 7), 2, np.int32), np.full((2, 7), 5, np.int32)
    run = partial(compiled(False), q, do=do, start=start, stop=stop)
    o, dq, dk, dv = run(k=k, v=v)
    outside = np.r_[0:2, 5:7]
    o2, dq2, dk2, dv2 = run(k=k.at[:, outside].add(1e6), v=v.at[:, outside].add(1e6))
    for a, b in ((o, o2), (dq, dq2), (dk, dk2), (dv, dv2)):
        np.testing.assert_array_equal(a, b)
    assert not np.asarray(dk)[:, outside].any() and not np.asarray(dv)[:, outside].any()
    for edge in (2, 4):
        assert (run(k=k, v=v.at[:, edge].add(1))[0] != o).any(axis=(2, 3)).all()

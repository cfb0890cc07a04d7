"""One suite for all backends of range_attention. Kernels are interpreted, with blocks so small that a row has several."""

import logging
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import attention_arrays, dense_attention, pack_row, range_mask, stack
from hypothesis import given, settings
from hypothesis import strategies as st

from iam_jax.kernels import IMPLEMENTATIONS as BACKENDS
from iam_jax.kernels import blocked, gpu, local, range_attention, tpu
from iam_jax.kernels.range_attention import _warn_once, choose_implementation, cudnn_unsupported_reason
from iam_jax.model.attention import key_ranges
from iam_jax.runs.checkpoint import Checkpoints

BLOCK = 16
SHAPE = (2, 40, 40, 4, 2, 16)  # B, T, S, N, K, H
SHAPES = [SHAPE, (1, 21, 50, 2, 1, 32), (1, 33, 9, 3, 3, 24), (1, 1, 1, 1, 1, 1)]
VARIANTS = [(1, False), (2, False), (2, True), (1, True)]  # number of ranges, include_self


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        for backend in (blocked, tpu, gpu):
            patch.setattr(backend, "block_size", lambda *args, **kwargs: BLOCK)
        yield


@cache
def compiled(backend, include_self=False, two_ranges=False, reach=None):
    @jax.jit
    def run(q, k, v, do, start, stop, *second):
        def attend(q, k, v):
            options = {"include_self": include_self, "second": second if two_ranges else None, "reach": reach, "implementation": backend}
            return range_attention(q, k, v, start, stop, **options)

        o, pullback = jax.vjp(attend, q, k, v)
        return o, *pullback(do)

    return run


def brute_force(q, k, v, do, ranges, include_self):
    o, _, *grads = dense_attention(q, k, v, do, range_mask(k.shape[1], ranges, include_self))
    return o, *grads


def flat(ranges):
    return [bound for pair in ranges for bound in pair]


def agree(got, expected, dtype=np.float32):
    if dtype == np.float32:
        for x, y in zip(got, expected, strict=True):
            assert x.dtype == np.float32
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
        return
    # bfloat16 has 8 bits: inputs are equal, weights and results are rounded.
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == dtype
        assert np.linalg.norm(np.asarray(x, np.float64) - y) <= 0.015 * np.linalg.norm(y)
        assert np.abs(np.asarray(x, np.float64) - y).max(initial=0) <= 0.02 * np.abs(y).max(initial=0)


# ---- packings: users, items, prompts, padding, candidates


@st.composite
def packings(draw, slots=SHAPE[1], longest=SHAPE[1]):
    """Two rows. An item may be longer than a block, or a single token."""
    rows = []
    for _ in range(2):
        users, free = [], slots
        for _ in range(draw(st.integers(0, 4))):
            items = draw(st.lists(st.one_of(st.integers(1, 3), st.integers(1, longest)), min_size=1, max_size=6))
            user = (draw(st.integers(0, min(5, longest))), items)
            if (size := user[0] + sum(user[1])) <= free:
                users.append(user)
                free -= size
        row = pack_row(slots, *users)
        # The last items of some users are candidates after the others.
        row["candidate"] = np.zeros(slots, np.int32)
        for number, (_, items) in enumerate(users, start=1):
            history = draw(st.integers(1, len(items)))
            mine = (row["user"] == number) & (row["group"] > history)
            row["candidate"][mine] = row["group"][mine] - history
        rows.append(row)
    return stack(rows)


ranges_of = jax.jit(key_ranges)


def relation_ranges(packing, relation, candidates):
    ranges = ranges_of(packing["user"], packing["group"], packing["candidate"] if candidates else None)[relation]
    return [tuple(map(np.asarray, part)) for part in ranges if part is not None]


@pytest.mark.parametrize("backend", ["reference", "blocked", "tpu", "gpu"])
@settings(max_examples=25, deadline=None)
@given(packings(), st.sampled_from(["full", "intra", "inter", "intra_both"]), st.booleans(), st.booleans(), st.integers(0, 99))
def test_relations_in_float32(backend, packing, relation, candidates, include_self, seed):
    ranges, arrays = relation_ranges(packing, relation, candidates), attention_arrays(SHAPE, seed)
    got = compiled(backend, include_self, len(ranges) == 2)(*arrays, *flat(ranges))
    agree(got, brute_force(*arrays, ranges, include_self))


@settings(max_examples=40, deadline=None)
@given(packings(longest=9), st.sampled_from(["intra", "intra_both"]), st.booleans(), st.booleans(), st.integers(0, 99))
def test_local_relations_in_float32(packing, relation, candidates, include_self, seed):
    ranges, arrays = relation_ranges(packing, relation, candidates), attention_arrays(SHAPE, seed)
    reach = (8, 0) if relation == "intra" else (8, 8)
    got = compiled("local", include_self, False, reach)(*arrays, *flat(ranges))
    agree(got, brute_force(*arrays, ranges, include_self))


def random_ranges(shape, seed, parts, reach=None):
    """Random ranges; two ranges are disjoint. A third of the queries have no keys, some because the stop is before the start."""
    B, T, S = shape[:3]
    rng = np.random.default_rng(seed)
    bounds = np.sort(rng.integers(0, S + 1, (2 * parts, B, T)), axis=0)
    if reach is not None:
        bounds = np.clip(bounds, np.arange(T) - reach[0], np.arange(T) + reach[1] + 1).clip(0, S)
    bounds = bounds.astype(np.int32)
    ranges = [[bounds[2 * part], bounds[2 * part + 1]] for part in range(parts)]
    for pair in ranges:
        empty = rng.random((B, T)) < 0.3
        pair[1] = np.where(empty, pair[0] - rng.integers(0, 3, (B, T)), pair[1]).astype(np.int32)
    return [tuple(pair) for pair in ranges]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_ranges(backend, dtype, shape):
    """Lengths that differ and are not multiples of a block, odd numbers of heads, ranges without structure. SHAPE has every variant in
    each type; another shape has two of them in one type and the other two in the other."""
    reach = (11, 5) if backend == "local" else None
    if backend == "local" and shape[1] != shape[2]:
        pytest.skip("local: as many keys as queries")
    if backend == "reference" and dtype == jnp.bfloat16 and shape[:3] == (1, 1, 1) and jax.__version_info__ < (0, 12):
        pytest.skip("XLA of JAX 0.10 for CPUs cannot multiply a single bfloat16 query and key")
    half = (SHAPES.index(shape) + (dtype == np.float32)) % 2
    for seed, (parts, include_self) in list(enumerate(VARIANTS))[half if shape != SHAPE else 0 :: 2 if shape != SHAPE else 1]:
        arrays, ranges = attention_arrays(shape, seed, dtype), random_ranges(shape, seed, parts, reach)
        got = compiled(backend, include_self, parts == 2, reach)(*arrays, *flat(ranges))
        agree(got, brute_force(*arrays, ranges, include_self), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("H", "dtype"), [(40, np.float32), (64, jnp.bfloat16), (128, np.float32), (256, jnp.bfloat16)])
def test_head_sizes(backend, H, dtype):
    """Besides those of SHAPES. Nothing depends on both the size and the type."""
    shape, reach = (1, 20, 20, 2, 1, H), (6, 0) if backend == "local" else None
    arrays, ranges = attention_arrays(shape, H, dtype), random_ranges(shape, H, 1, reach)
    agree(compiled(backend, False, False, reach)(*arrays, *flat(ranges)), brute_force(*arrays, ranges, False), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_rows_are_exactly_zero_with_zero_gradients(backend):
    reach = (39, 39) if backend == "local" else None
    q, k, v, do = attention_arrays(SHAPE, 0)
    empty = np.broadcast_to(np.arange(40) % 2 == 1, (2, 40))
    start, stop = np.where(empty, 3, 1).astype(np.int32), np.where(empty, 3, 26).astype(np.int32)
    q = q * 1e4  # logits far outside the range of exp
    run = compiled(backend, reach=reach)
    o, dq, dk, dv = run(q, k, v, do, start, stop)
    assert (np.asarray(o)[empty] == 0).all() and (np.asarray(dq)[empty] == 0).all()
    assert np.asarray(o)[~empty].all()
    assert all(np.isfinite(x).all() for x in (o, dq, dk, dv))
    only_empty = np.where(empty[..., None, None], do, 0)
    assert not any(np.asarray(x).any() for x in run(q, k, v, only_empty, start, stop)[1:])
    # A range whose stop is before its start is empty, and so is a batch without any key.
    o, *grads = run(q, k, v, do, np.full_like(start, 5), np.full_like(stop, 2))
    assert not any(np.asarray(x).any() for x in (o, *grads))


@pytest.mark.parametrize("backend", BACKENDS)
def test_self_key_counts_once(backend):
    reach = (39, 0) if backend == "local" else None
    q, k, v, do = attention_arrays(SHAPE, 1)
    t = np.broadcast_to(np.arange(40, dtype=np.int32), (2, 40))
    zero = np.zeros_like(t)
    with_self, without = compiled(backend, True, False, reach), compiled(backend, False, False, reach)
    inside, plain = with_self(q, k, v, do, zero, t + 1), without(q, k, v, do, zero, t + 1)
    outside = with_self(q, k, v, do, zero, t)  # the same keys
    for a, b, c in zip(inside, plain, outside, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(a, c, rtol=1e-5, atol=1e-5)
    alone = with_self(q, k, v, do, zero, zero)[0]
    np.testing.assert_allclose(alone, np.repeat(v, 2, axis=2), rtol=1e-6)
    assert not np.allclose(without(q, k, v, do, zero, t)[0], outside[0])
    second = compiled(backend, True, True, reach)(q, k, v, do, zero, t // 2, t // 2, t + 1)  # the self key is in the second range
    for a, b in zip(second, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("include_self", [False, True])
def test_keys_outside_the_ranges_have_no_effect(backend, include_self):
    """Bitwise within one compiled program, for values and for gradients of visible keys."""
    reach = (39, 39) if backend == "local" else None
    q, k, v, do = attention_arrays(SHAPE, 2)
    first = np.full((2, 40), 2, np.int32), np.full((2, 40), 5, np.int32)
    second = np.full((2, 40), 17, np.int32), np.full((2, 40), 31, np.int32)
    allowed = np.zeros(40, bool)
    allowed[2:5] = allowed[17:31] = True
    run = partial(compiled(backend, include_self, True, reach), q)
    o, dq, dk, dv = run(k, v, do, *first, *second)
    outside = np.flatnonzero(~allowed)
    o2, dq2, dk2, dv2 = run(k.at[:, outside].add(1e4), v.at[:, outside].add(1e4), do, *first, *second)
    # A token that is its own key sees itself; the results of other tokens do not change.
    for a, b in ((o, o2), (dq, dq2)):
        np.testing.assert_array_equal(np.asarray(a)[:, allowed], np.asarray(b)[:, allowed])
        assert include_self or (np.asarray(a) == b).all()
    if not include_self:
        for a, b in ((dk, dk2), (dv, dv2)):
            np.testing.assert_array_equal(a, b)
            assert not np.asarray(a)[:, outside].any()
    for edge in (2, 4, 17, 30):
        assert (run(k, v.at[:, edge].add(1), do, *first, *second)[0] != o).any(axis=(2, 3)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_query_has_no_influence_on_another(backend):
    reach = (39, 0) if backend == "local" else None
    q, k, v, do = attention_arrays(SHAPE, 3)
    t = np.broadcast_to(np.arange(40, dtype=np.int32), (2, 40))
    start = np.maximum(t - 20, 0)
    run = compiled(backend, False, False, reach)
    o, dq, *_ = map(np.asarray, run(q, k, v, do, start, t + 1))
    for changed in (0, 15, 16, 39):
        o2, dq2, *_ = run(q.at[0, changed].add(1), k, v, do, start, t + 1)
        same = np.ones((2, 40), bool)
        same[0, changed] = False
        np.testing.assert_array_equal((np.asarray(o2) == o).all((2, 3)) | ~same, True)
        np.testing.assert_array_equal((np.asarray(dq2) == dq).all((2, 3)) | ~same, True)
        # Row 0 has one key, so its weight is 1 for any query.
        assert (np.asarray(o2)[0, changed] != o[0, changed]).any() == (changed > 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_parts_are_those_of_the_whole(backend):
    """Two adjacent ranges equal one range. A merge outside the custom gradient would fail here."""
    reach = (39, 0) if backend == "local" else None
    arrays = attention_arrays(SHAPE, 4)
    t = np.broadcast_to(np.arange(40, dtype=np.int32), (2, 40))
    whole = compiled(backend, False, False, reach)(*arrays, 0 * t, t + 1)
    parts = compiled(backend, False, True, reach)(*arrays, 0 * t, t // 3, t // 3, t + 1)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def test_local_returns_nan_where_a_range_exceeds_its_reach():
    q, k, v, _ = attention_arrays(SHAPE, 0)
    t = np.broadcast_to(np.arange(40, dtype=np.int32), (2, 40))
    start = np.maximum(t - 4, 0)
    start[0, 30], start[1, 7] = 25, 0
    for reach, broken in (((4, 0), {(0, 30), (1, 7)}), ((5, 0), {(1, 7)}), ((7, 0), set())):
        o = np.asarray(range_attention(q, k, v, start, t + 1, reach=reach, implementation="local"))
        assert set(zip(*np.nonzero(np.isnan(o).any((2, 3))), strict=True)) == broken
    o = np.asarray(range_attention(q, k, v, start, np.minimum(t + 3, 40), reach=(7, 1), implementation="local"))
    assert np.isnan(o)[:, :38].all() and np.isfinite(o[:, 39]).all()


# ---- choice of the backend


def shapes(dtype=jnp.float32, H=16, T=4096, S=None):
    return jax.ShapeDtypeStruct((1, T, 2, H), dtype), jax.ShapeDtypeStruct((1, S or T, 2, H), dtype)


@pytest.fixture
def no_warning_yet():
    _warn_once.cache_clear()
    yield
    _warn_once.cache_clear()


def test_the_automatic_choice(no_warning_yet, caplog):
    def choice(reach, platform, **sizes):
        return choose_implementation(*shapes(**sizes), reach, platform=platform)

    assert choice((11, 0), "cpu") == "local"
    assert choice((11, 0), "cpu", T=22) == "reference"  # every block of `local` would attend to every key
    assert choice((11, 0), "cpu", T=24) == "local"
    assert choice((64, 63), "cpu") == "local"
    assert choice((128, 0), "cpu") == choice(None, "cpu") == "blocked"
    assert choice(None, "cpu", T=511) == "reference"
    assert choice((11, 0), "cpu", T=20, S=512) == "blocked"
    for platform in ("tpu", "gpu"):
        assert choice((11, 0), platform) == choice(None, platform) == platform
        assert not caplog.messages
        assert choice((11, 0), platform, H=512) == "local"
        reason = f"range_attention: implementation {platform!r} supports head sizes up to 256, not 512; falling back to "
        assert caplog.messages == [f"{reason}'local'"]
        caplog.clear()
        assert choice(None, platform, H=512) == "reference"
        assert caplog.messages == [f"{reason}'reference', whose memory grows with the square of the length"]
        caplog.clear()
    assert choose_implementation(*shapes(), None) == "blocked"  # tests run on a CPU


def test_a_fallback_warns_once_on_stderr(no_warning_yet, monkeypatch, capsys, tmp_path):
    """Without any configured logging, and although Checkpoints silences absl's logger, with which Orbax reports every step of a save."""
    monkeypatch.setattr(logging.root, "handlers", [])
    Checkpoints(tmp_path, keep=1, metric="ndcg@10").close()
    assert not logging.getLogger("absl").isEnabledFor(logging.WARNING)
    for _ in range(3):
        choose_implementation(*shapes(H=512), None, platform="tpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "range_attention: implementation 'tpu' supports head sizes up to 256, not 512; falling back to 'reference', whose memory grows "
        "with the square of the length"
    )


def test_unsupported_inputs_are_refused():
    q, k, v, _ = attention_arrays(SHAPE, 0)
    t = np.zeros((2, 40), np.int32)
    with pytest.raises(ValueError, match=r"implementation 'local' needs `reach`, the largest distance between a query and its keys"):
        range_attention(q, k, v, t, t, implementation="local")
    with pytest.raises(ValueError, match=r"'local' needs as many keys as queries, not 30 and 40"):
        range_attention(q, k[:, :30], v[:, :30], t, t, reach=(3, 0), implementation="local")
    with pytest.raises(ValueError, match=r"implementation = 'splash': must be one of reference, local, blocked, tpu, gpu"):
        range_attention(q, k, v, t, t, implementation="splash")
    with pytest.raises(ValueError, match="q, k and v have different dtypes: float32, bfloat16, float32"):
        range_attention(q, k.astype(jnp.bfloat16), v, t, t)
    with pytest.raises(ValueError, match=r"ranges have shape \(2, 39\), but queries have shape \(2, 40\)"):
        range_attention(q, k, v, t[:, :39], t)
    with pytest.raises(ValueError, match=r"the shapes of q \(2, 40, 3, 16\), k \(2, 40, 2, 16\) and v \(2, 40, 2, 16\) do not match"):
        range_attention(q[:, :, :3], k, v, t, t)
    for backend in ("tpu", "gpu"):
        with pytest.raises(ValueError, match=f"implementation '{backend}' supports head sizes up to 256, not 300"):
            range_attention(*(jnp.zeros((2, 40, 2, 300)),) * 3, t, t, implementation=backend)


def test_inputs_that_cudnn_does_not_support():
    assert cudnn_unsupported_reason(*shapes(jnp.float32, 64)) == "does not support float32"
    assert cudnn_unsupported_reason(*shapes(jnp.bfloat16, 20)) == "does not support head size 20"
    assert cudnn_unsupported_reason(*shapes(jnp.bfloat16, 256)) == "does not support head size 256"
    assert cudnn_unsupported_reason(*shapes(jnp.bfloat16, 64, T=33)) == "needs even lengths"
    assert cudnn_unsupported_reason(*shapes(jnp.float16, 128)) == cudnn_unsupported_reason(*shapes(jnp.bfloat16, 16)) == ""


def test_no_array_in_the_square_of_the_length(monkeypatch):
    monkeypatch.setattr(blocked, "block_size", lambda *args: 128)  # the real block size

    def memory(backend, T):
        q, k = shapes(T=T)
        t = jax.ShapeDtypeStruct((1, T), jnp.int32)
        compiled_ = compiled(backend, False, False, (11, 0) if backend == "local" else None).lower(q, k, k, q, t, t).compile()
        return compiled_.memory_analysis().temp_size_in_bytes

    grown = {backend: memory(backend, 4096) / memory(backend, 1024) for backend in ("local", "blocked", "reference")}
    assert grown["local"] < 4.3 and grown["blocked"] < 4.3 and grown["reference"] > 12


@pytest.mark.parametrize("reach", [(11, 0), (11, 11), (0, 0), (25, 17)])
@pytest.mark.parametrize("chunk", [1, 130, 300])
def test_chunks_of_local_are_joined(monkeypatch, reach, chunk):
    """Rows of 40 positions, in chunks of one block, of several blocks and of half a row."""
    assert 2 * 40 * 4 > chunk
    arrays, ranges = attention_arrays(SHAPE, 0), random_ranges(SHAPE, 1, 1, reach)

    def run():
        o, pullback = jax.vjp(lambda q, k, v: range_attention(q, k, v, *ranges[0], reach=reach, implementation="local"), *arrays[:3])
        return o, *pullback(arrays[3])

    monkeypatch.setattr(local, "_CHUNK", chunk)
    chunks = local._Blocks(*arrays[:2], reach).chunks
    assert chunks > 1 or (reach == (25, 17) and chunk == 300)
    agree(run(), brute_force(*arrays, ranges, False))

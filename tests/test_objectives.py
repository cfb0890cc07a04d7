import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_config, random_params, reference_states, softmax, stack, tiny_data, tiny_rows

from iam_jax.model import make_model
from iam_jax.model import softmax as softmax_module
from iam_jax.model.items import all_text_vectors, item_vectors
from iam_jax.model.softmax import cross_entropy, sampled_cross_entropy
from iam_jax.training.objectives import counts, draw, losses, make_training_items, summed_up
from iam_jax.training.objectives import item as item_objective

# ---- the two softmax losses

RNG = np.random.default_rng(0)
H, V = RNG.standard_normal((11, 4)).astype(np.float32), RNG.standard_normal((7, 4)).astype(np.float32)
LABEL = np.array([3, 0, -1, 6, 6, 2, -1, -1, 0, 5, 3], np.int32)
ALLOWED = np.array([1, 0, 1, 1, 0, 1, 1], bool)


def plain_cross_entropy(h, v, label, allowed=None):
    """Value and gradients in float64, one position at a time."""
    h, v = np.asarray(h, np.float64), np.asarray(v, np.float64)
    total, dh, dv = 0.0, np.zeros_like(h), np.zeros_like(v)
    keep = np.arange(len(v)) if allowed is None else np.flatnonzero(allowed)
    for x in np.flatnonzero(label >= 0):
        p = np.zeros(len(v))
        p[keep] = softmax(v[keep] @ h[x])
        total -= np.log(p[label[x]])
        p[label[x]] -= 1
        dh[x], dv = p @ v, dv + np.outer(p, h[x])
    return total, dh, dv


@pytest.mark.parametrize("allowed", [None, ALLOWED], ids=["all", "some"])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("chunk", [2048, 11, 4, 1])
def test_cross_entropy_is_the_plain_one(chunk, passes, allowed, monkeypatch):
    """passes: how often the logits are computed."""
    monkeypatch.setattr(softmax_module, "_ONE_PASS", V.size if passes == 1 else V.size - 1)
    label = LABEL if allowed is None else np.where(np.isin(LABEL, np.flatnonzero(ALLOWED)), LABEL, -1)
    run = jax.value_and_grad(lambda h, v: 3 * cross_entropy(h, v, label, allowed_C=allowed, chunk=chunk), argnums=(0, 1))
    jaxpr = str(jax.make_jaxpr(run)(H, V))
    assert ("scan[" in jaxpr, "f32[11,7]" in jaxpr) == (chunk < 11, chunk >= 11)  # with all logits at once, or without such an array
    assert jaxpr.count("dot_general") == 2 + passes
    value, (dh, dv) = jax.jit(run)(H, V)
    for got, expected in zip((value, dh, dv), plain_cross_entropy(H, V, label, allowed), strict=True):
        np.testing.assert_allclose(got, 3 * expected, rtol=1e-5, atol=6e-6)
    assert not np.asarray(dh)[label < 0].any()
    if allowed is not None:
        assert not np.asarray(dv)[~ALLOWED].any()


def test_nothing_to_predict():
    value, grads = jax.value_and_grad(lambda h, v: cross_entropy(h, v, np.full(11, -1), chunk=4), argnums=(0, 1))(H, V)
    assert value == 0 and not any(np.asarray(g).any() for g in grads)


def sampled(h, v, vt, label=LABEL, candidate=(), log_expected=0.0, chunk=2048):
    candidate = np.asarray(candidate, np.int32)
    return sampled_cross_entropy(h, label, candidate, v, vt, jnp.broadcast_to(jnp.float32(log_expected), candidate.shape), chunk)


@pytest.mark.parametrize("chunk", [2048, 4])
def test_sampled_with_every_item_once_is_the_full_softmax(chunk):
    def by_sample(h, v):
        return sampled(h, v, v[jnp.maximum(LABEL, 0)], candidate=np.arange(7), chunk=chunk)

    value, grads = jax.jit(jax.value_and_grad(by_sample, argnums=(0, 1)))(H, V)
    for got, expected in zip((value, *grads), plain_cross_entropy(H, V, LABEL), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("chunk", [2048, 3])
def test_sampled_by_hand(chunk):
    """Accidental hits and invalid candidates are excluded; repeated candidates count as often as they occur."""
    candidate = np.array([3, 3, 6, -1, 2, 1], np.int32)
    expected_count = np.array([2.0, 2.0, 0.5, 9.0, 1.0, 4.0])
    vc = RNG.standard_normal((6, 4)).astype(np.float32)  # distinct vectors show which candidate is excluded
    vt = RNG.standard_normal((11, 4)).astype(np.float32)
    total, used = 0.0, np.zeros((11, 6), bool)
    for x in np.flatnonzero(LABEL >= 0):
        used[x] = (candidate != LABEL[x]) & (candidate >= 0)
        positive = np.exp(H[x] @ vt[x])
        total -= np.log(positive / (positive + (np.exp(vc[used[x]] @ H[x]) / expected_count[used[x]]).sum()))
    run = jax.value_and_grad(
        functools.partial(sampled, candidate=candidate, log_expected=np.log(expected_count), chunk=chunk), argnums=(0, 1, 2)
    )
    value, (dh, dv, dvt) = run(H, vc, vt)
    assert float(value) == pytest.approx(total, rel=1e-5)
    assert not np.asarray(dh)[LABEL < 0].any() and not np.asarray(dvt)[LABEL < 0].any() and not np.asarray(dv)[3].any()
    only_hits = np.where(np.isin(LABEL, [3]), LABEL, -1)  # then the first two candidates are accidental hits everywhere
    gradient = jax.grad(lambda v: sampled(H, v, vt, only_hits, candidate, np.log(expected_count)))(vc)
    assert (np.asarray(gradient) != 0).any(1).tolist() == [False, False, True, False, True, True]


SHARE = np.array([0.4, 0.0, 0.1, 0.25, 0.05, 0.2, 0.0])


def test_sampled_denominator_has_the_full_ones_expectation():
    """Over 4,000 draws of 5 further in-batch targets and 12 negatives, within 4 standard errors (about 2 %)."""
    until, in_batch = summed_up(SHARE), SHARE[::-1].copy()
    in_batch_until = summed_up(in_batch)
    log_expected = np.log(5 * in_batch + 12 * SHARE)
    assert np.isfinite(log_expected[[0, 2, 3, 4, 5, 6]]).all()
    h, target = H[:1] * 0.5, np.array([4], np.int32)

    @jax.jit
    def denominators(keys):
        def one(key):
            a, b = jax.random.split(key)
            candidate = jnp.concatenate([target, draw(a, in_batch_until, 5), draw(b, until, 12)])
            loss = sampled_cross_entropy(h, target, candidate, jnp.asarray(V)[candidate], V[target], jnp.float32(log_expected)[candidate])
            return jnp.exp(loss + (h[0] * V[target[0]]).sum())

        return jax.lax.map(one, keys)

    got = np.asarray(denominators(jax.random.split(jax.random.key(0), 4000)), np.float64)
    reachable = np.flatnonzero(SHARE + in_batch)
    full = np.exp(V[reachable] @ h[0]).sum()
    error = got.std() / len(got) ** 0.5
    assert 0 < error < 0.01 * full
    assert abs(got.mean() - full) < 4 * error
    assert abs(np.exp(V[reachable] @ h[0] + 0.3).sum() - full) > 4 * error  # a wrong count would be detected


def test_draw_follows_the_shares():
    """In 100,000 draws every frequency is within 4 standard deviations, and items without a share never occur."""
    drawn = np.asarray(draw(jax.random.key(1), summed_up(SHARE), 100_000))
    frequency = np.bincount(drawn, minlength=7) / 100_000
    assert drawn.dtype == np.int32 and len(frequency) == 7
    assert (np.abs(frequency - SHARE) <= 4 * np.sqrt(SHARE * (1 - SHARE) / 100_000)).all()
    assert (frequency[SHARE == 0] == 0).all()


def test_shares_are_summed_up_exactly():
    """In a large catalogue, items without weight have width zero, also at both ends; other items have their share within 2^-31."""
    rng = np.random.default_rng(0)
    weight = rng.poisson(1.0, 200_000) * (rng.random(200_000) > 0.3)
    weight[[0, -1]] = 0
    until = summed_up(weight)
    width = np.diff(until.astype(np.int64), prepend=0)
    assert until.dtype == np.uint32 and until[-1] == 2**31
    assert (width[weight == 0] == 0).all() and (width >= 0).all()
    assert np.abs(width / 2**31 - weight / weight.sum()).max() <= 2**-31
    # The bounds: the first and the last value that a draw can have.
    edges = np.searchsorted(until, np.array([0, 2**31 - 1], np.uint32), side="right")
    assert (weight[edges] > 0).all()


# ---- with a model

FIELDS = {
    "table": {"vectors": "table"},
    "text": {"vectors": "text", "softmax": "full"},
    "both and token": {"vectors": "both", "softmax": "full", "token": 0.5, "chunk": 16},
    "cached": {"vectors": "text", "softmax": "cached", "negatives": 2},
    "sampled": {"vectors": "both", "negatives": 6},
}


KEY, CACHE = jax.random.key(5, impl="rbg"), np.random.default_rng(1).standard_normal((9, 16)).astype(np.float32)


@functools.cache
def case(name):
    """(config, model, parameters, items, batch of 4 rows)."""
    config = make_config(model={"schedule": "intra inter", "mlp": "plain"}, objective=FIELDS[name])
    prepared = tiny_data(users=14, items=9, cold=2)
    rows = tiny_rows(prepared, config)
    assert len(rows) >= 4
    model = make_model(config, prepared.catalogue.vocabulary, prepared.catalogue.items)
    items = make_training_items(prepared.catalogue, prepared.events, rows.segments, config)
    return config, model, random_params(model), items, stack([rows[i] for i in range(4)])


@functools.cache
def sums_of(name):
    config, model, *_ = case(name)
    return jax.jit(lambda params, items, batch, key=None, cache=None: losses(model.bind(params), config, items, batch, key, cache))


@functools.cache
def vectors_of(name, chunk=1024):
    """(text vectors, vectors as ranked) of all items."""
    config, model, params, items, _ = case(name)
    text = jax.jit(lambda params: all_text_vectors(model.bind(params), items.catalogue, chunk=chunk))
    ranked = jax.jit(lambda params: item_vectors(model.bind(params), config, items.catalogue))
    return text(params) if config.uses_text else None, ranked(params)


def plain_heads(name):
    """h_XE of the targets and v_IE from the model in plain NumPy."""
    config, _model, params, _items, batch = case(name)
    x_BTD = reference_states(config.model, params["decoder"], batch)
    x_BTD = x_BTD / np.sqrt((x_BTD**2).mean(-1, keepdims=True) + 1e-6) * params["decoder"]["final_norm"]["scale"]
    h_BMD = np.take_along_axis(x_BTD, batch["target_at"][..., None], axis=1) @ np.asarray(params["state_DE"])
    v_IE = np.asarray(vectors_of(name)[1])
    return x_BTD, h_BMD.reshape(-1, 16), v_IE


@pytest.mark.parametrize("name", ["table", "both and token"])
def test_losses_are_plain_log_softmax(name):
    config, model, params, items, batch = case(name)
    sums = sums_of(name)(params, items, batch)
    x_BTD, h_XE, v_IE = plain_heads(name)
    trained = np.asarray(items.catalogue.trained_I)
    assert not trained.all() and (batch["target"] < 0).any()
    expected = {"item": plain_cross_entropy(h_XE, v_IE, batch["target"].reshape(-1), trained)[0]}
    if config.objective.token:
        embedding = np.asarray(model.bind(params).output_embedding()[0])
        expected["token"] = plain_cross_entropy(x_BTD.reshape(-1, 16), embedding, batch["label"].reshape(-1))[0]
    assert {k: float(v) for k, v in sums.items()} == pytest.approx(expected, rel=1e-4)
    assert {k: int(v) for k, v in counts(batch).items()} == {
        "item": sum(t >= 0 for t in batch["target"].reshape(-1)), "token": sum(t >= 0 for t in batch["label"].reshape(-1)),
    }  # fmt: skip


def test_token_labels_are_the_next_tokens_of_targets():
    batch = case("both and token")[-1]
    row, slot = np.nonzero(batch["label"] >= 0)
    np.testing.assert_array_equal(batch["label"][row, slot], batch["token"][row, slot + 1])
    assert len(row) > (batch["target"] >= 0).sum()  # several tokens per item


@pytest.mark.parametrize("name", ["both and token", "cached"])
def test_sums_do_not_depend_on_how_rows_are_split(name):
    config, _model, params, items, batch = case(name)
    # Which fresh vectors correct a stale cache depends on the batch's targets, so the cache must be fresh.
    cache = vectors_of(name)[0] if config.softmax == "cached" else None
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(4)]
    whole = sums_of(name)(params, items, batch, KEY, cache)
    parts = [sums_of(name)(params, items, row, KEY, cache) for row in rows]
    for key, value in whole.items():
        assert float(value) == pytest.approx(sum(float(part[key]) for part in parts), rel=1e-5)
    for key, value in counts(batch).items():
        assert int(value) == sum(int(counts(row)[key]) for row in rows) > 0
    assert len({float(part["item"]) for part in parts}) == 4


def test_item_vectors_are_table_plus_text():
    _config, model, params, items, _ = case("both and token")
    bound = model.bind(params)
    text, ranked = vectors_of("both and token")
    np.testing.assert_allclose(ranked, text + bound.table(items.catalogue.trained_I), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(vectors_of("both and token", chunk=4)[0], text, rtol=1e-5, atol=1e-6)  # 9 items in chunks of three
    one = jax.jit(bound.text_vectors)(items.catalogue.token_IT[5:6], items.catalogue.length_I[5:6])
    np.testing.assert_allclose(text[5:6], one, rtol=1e-5, atol=1e-6)


# ---- cached softmax


@pytest.mark.parametrize("vectors", ["text", "both"])
def test_the_expected_cached_loss_bounds_the_full_one_and_is_equal_with_a_fresh_cache(monkeypatch, vectors):
    """Loss and gradient over all pairs of items that may be drawn, each with its probability. An earlier estimator failed both: with a
    fresh cache, only the batch's targets got a gradient; with a stale one, its loss fell below that of the full softmax."""
    config, _, _, items, batch = case("cached")
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, vectors=vectors))
    model = make_model(config, 13, 9)
    params = random_params(model)
    batch = jax.tree.map(lambda x: x[:1], batch)
    target_X = batch["target"].reshape(-1)
    targets = target_X[target_X >= 0]
    share, trained = np.asarray(items.drawn_share_I), np.asarray(items.catalogue.trained_I)
    assert 1 < len(np.unique(targets)) < len(targets)  # an item is a target twice
    assert (trained & ~np.isin(np.arange(9), targets)).sum() > 1 and ((share > 0) == trained).all()
    pairs = np.stack(np.meshgrid(*[np.flatnonzero(trained)] * 2), -1).reshape(-1, 2).astype(np.int32)
    full = dataclasses.replace(config, objective=dataclasses.replace(config.objective, softmax="full"))

    def full_loss(params):
        return losses(model.bind(params), full, items, batch, None, None)["item"]

    def bound(params, cache):
        """log Z + Z' / Z - 1 - h f_y, with Z' from fresh vectors of all items, and Z, from stale ones, a constant."""
        network = model.bind(params)
        h_XE = network.project(jnp.take_along_axis(network.states(batch), batch["target_at"][..., None], axis=1).reshape(-1, 16))
        v_IE = item_vectors(network, full, items.catalogue)
        stale_IE = cache if vectors == "text" else cache + network.table(items.catalogue.trained_I)
        fresh_XI, stale_XI = (jnp.where(trained, h_XE @ v.T, -jnp.inf) for v in (v_IE, stale_IE))
        log_Z_X = jax.lax.stop_gradient(jax.nn.logsumexp(stale_XI, axis=1))
        ratio_X = jnp.exp(fresh_XI - log_Z_X[:, None]).sum(1)
        own_X = jnp.take_along_axis(fresh_XI, jnp.maximum(target_X, 0)[:, None], axis=1)[:, 0]
        return jnp.where(target_X >= 0, log_Z_X - own_X + ratio_X - 1, 0).sum()

    @jax.jit
    def run(params, cache):
        def drawn(pair):
            monkeypatch.setattr(item_objective, "draw", lambda key, until_I, count: pair)
            return jax.value_and_grad(lambda params: losses(model.bind(params), config, items, batch, KEY, cache)["item"])(params)

        return jax.value_and_grad(full_loss)(params), jax.value_and_grad(bound)(params, cache), jax.lax.map(drawn, jnp.asarray(pairs))

    fresh = jax.jit(lambda params: all_text_vectors(model.bind(params), items.catalogue))(params)
    probability = share[pairs].prod(1)
    assert probability.sum() == pytest.approx(1)

    def means(drawn):
        return jax.tree.map(lambda x: np.einsum("p,p...->...", probability, np.asarray(x, np.float64)), drawn)

    def assert_close(got, expected):
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, np.abs(b).max()), err_msg=jax.tree_util.keystr(path))

    exact, _, drawn = run(params, fresh)
    np.testing.assert_allclose(drawn[0], exact[0], rtol=1e-6)  # whatever was drawn
    assert_close(means(drawn), exact)
    of_text = np.asarray(drawn[1]["text_DE"])
    assert np.abs(of_text - of_text[0]).max() > 1e-3  # the gradients of single draws differ

    exact, expected, drawn = run(params, CACHE)
    assert_close(means(drawn), expected)
    assert expected[0] > exact[0] + 1


def test_weights_by_hand(monkeypatch):
    """With dropout, the fresh vectors of an item differ, so that each occurrence has a share. Padding and drawn targets have none."""
    items = dataclasses.replace(case("cached")[3], drawn_share_I=jnp.asarray(SHARE, jnp.float32))
    target, drawn = np.array([3, -1, 2, 3, 3, -1], np.int32), np.array([5, 0, 3, 5, 4], np.int32)
    got = item_objective._weights(items, target, drawn)
    np.testing.assert_allclose(got[:6], [1 / 3, 0, 1, 1 / 3, 1 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(got[6:], [1 / (5 * 0.2), 1 / (5 * 0.4), 0, 1 / (5 * 0.2), 1 / (5 * 0.05)], rtol=1e-6)


def test_weights_are_bounded():
    """Half of the draws are uniform over the items with a training event."""
    config, _, _, items, _ = case("cached")
    share, trained = np.asarray(items.drawn_share_I, np.float64), np.asarray(items.catalogue.trained_I)
    popular = np.asarray(case("sampled")[3].drawn_share_I, np.float64)
    np.testing.assert_allclose(share, (popular + trained / trained.sum()) / 2, rtol=1e-6)
    assert (1 / (config.objective.negatives * share[trained])).max() < 2 * trained.sum() / config.objective.negatives


# ---- sampled softmax


def test_what_the_sampled_loss_samples(monkeypatch):
    """Candidates are the targets of the batch and drawn items with training events. Each counts as often as it is expected among the
    targets of the other positions and the draws."""
    config, model, params, items, batch = case("sampled")
    seen = {}

    def spy(h_XE, target_X, candidate_C, v_CE, vt_XE, log_expected_C, chunk):
        seen.update(candidate=candidate_C, v=v_CE, vt=vt_XE, log_expected=log_expected_C, target=target_X)
        return sampled_cross_entropy(h_XE, target_X, candidate_C, v_CE, vt_XE, log_expected_C, chunk)

    monkeypatch.setattr(item_objective, "sampled_cross_entropy", spy)

    @jax.jit
    def run(key):
        sums = losses(model.bind(params), config, items, batch, key, None)
        return sums, dict(seen)

    sums, one = run(jax.random.key(0, impl="rbg"))
    other = run(jax.random.key(1, impl="rbg"))[1]
    one, other = (jax.tree.map(np.asarray, x) for x in (one, other))
    flat = batch["target"].reshape(-1)
    X, n = len(flat), (flat >= 0).sum()
    np.testing.assert_array_equal(one["candidate"][:X], flat)
    assert len(one["candidate"]) == X + 6 and not np.array_equal(one["candidate"][X:], other["candidate"][X:])
    assert np.asarray(items.catalogue.trained_I)[one["candidate"][X:]].all()
    there = one["candidate"] >= 0
    expected = (n - 1) * np.asarray(items.target_share_I) + 6 * np.asarray(items.drawn_share_I)
    np.testing.assert_allclose(np.exp(one["log_expected"][there]), expected[one["candidate"][there]], rtol=1e-5)
    vectors = np.asarray(vectors_of("sampled")[1])
    np.testing.assert_allclose(one["v"][there], vectors[one["candidate"][there]], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(one["vt"], one["v"][:X])
    assert np.isfinite(float(sums["item"])) and float(sums["item"]) > 0


# ---- facts about the items


@pytest.mark.parametrize("prompt", [0, 2])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_items_by_a_plain_count(prompt, power):
    config = make_config(objective={"negatives_power": power})
    prepared = tiny_data(prompt=prompt, cold=2)
    events, catalogue = prepared.events, prepared.catalogue
    items = make_training_items(catalogue, events, tiny_rows(prepared, config).segments, config)
    trained, targets = np.zeros(8), np.zeros(8)
    for begin, end in zip(events.offsets[:-1], events.offsets[1:], strict=True):
        for place, event in enumerate(range(begin, end - 2)):  # the last two are validation and test
            trained[events.item[event]] += 1
            targets[events.item[event]] += place > 0 or prompt > 0
    drawn = np.where(trained > 0, trained**power, 0)
    np.testing.assert_array_equal(items.catalogue.trained_I, trained > 0)
    assert not np.asarray(items.catalogue.trained_I)[-2:].any()
    np.testing.assert_allclose(items.target_share_I, targets / targets.sum(), rtol=1e-6)
    np.testing.assert_allclose(items.drawn_share_I, drawn / drawn.sum(), rtol=1e-6)
    np.testing.assert_array_equal(items.drawn_until_I, summed_up(drawn))
    for i in range(8):
        text = catalogue.tokens[catalogue.offsets[i] : catalogue.offsets[i + 1]]
        assert items.catalogue.length_I[i] == len(text) and items.catalogue.token_IT[i, : len(text)].tolist() == text.tolist()

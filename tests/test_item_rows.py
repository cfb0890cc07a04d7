import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_config, random_params, stack, tiny_data, tiny_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from iam_jax.data.catalogue import Catalogue
from iam_jax.data.item_rows import CatalogueItems, DistinctItems, pack_items, without_items
from iam_jax.devices.mesh import make_mesh
from iam_jax.model import make_model
from iam_jax.model.network import Network
from iam_jax.ranking.evaluate import Evaluator
from iam_jax.training import objectives

DATA = {"row_tokens": 24, "context_items": 1}


@st.composite
def catalogues(draw):
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=12))
    prompt, suffix = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    offsets = np.cumsum([0, *lengths, prompt, suffix])
    return Catalogue(np.arange(offsets[-1], dtype=np.int32) + 1, offsets, 1000, 0, "")


@settings(deadline=None)
@given(catalogues(), st.data())
def test_items_are_packed_whole_and_in_order(catalogue, data):
    """Every token id is another, so that a slot tells its token."""
    entries = np.flatnonzero(np.diff(catalogue.offsets))
    items = np.array(sorted(data.draw(st.sets(st.sampled_from(entries.tolist()), min_size=1))))
    slots = data.draw(st.integers(int(catalogue.lengths.max()), 16))
    rows, start = pack_items(catalogue, items, slots)
    found = {name: x.reshape(-1) for name, x in rows.items()}
    used = 0
    for item, first in zip(items, start, strict=True):
        length = catalogue.lengths[item]
        there = slice(first, first + length)
        assert first // slots == (first + length - 1) // slots  # none across the end of a row
        assert found["token"][there].tolist() == catalogue.tokens[catalogue.offsets[item] : catalogue.offsets[item + 1]].tolist()
        assert found["position"][there].tolist() == list(range(length))
        (user,) = set(found["user"][there])
        assert user > 0 and (found["user"] == user).sum() == length  # no item shares a user
        used += length
    assert (found["user"] > 0).sum() == (found["group"] == 1).sum() == used
    assert len(rows["token"]) == 1 or used > (len(rows["token"]) - 1) * (slots - catalogue.lengths.max())
    more, again = pack_items(catalogue, items, slots, len(rows["token"]) + 2)
    assert not more["user"][-2:].any() and (again == start).all()
    with pytest.raises(ValueError, match="need"):
        pack_items(catalogue, items, slots, len(rows["token"]) - 1)


@pytest.mark.parametrize(("prompt", "suffix"), [(0, 0), (2, 0), (0, 3), (2, 1)])
@pytest.mark.parametrize(("chunks", "multiple"), [(8, 1), (9, 3)])
def test_every_token_and_target_finds_its_item(prompt, suffix, chunks, multiple):
    prepared = tiny_data(users=30, prompt=prompt, suffix=suffix)
    rows = tiny_rows(prepared, make_config(data=DATA))
    assert any((rows.segments.last > rows.segments.stop).tolist())  # some targets are no input
    items = DistinctItems(rows, 4, chunks, multiple)
    assert items.item_rows % (chunks * multiple) == 0
    plain = stack([rows[row] for row in range(4)])
    batch = items(plain)
    assert set(batch) == set(plain) - {"item", "within"} | {"leading", "slot", "target_slot"}
    leading = {name: x.reshape(-1) for name, x in batch["leading"].items()}
    real, slot = plain["user"] > 0, batch["slot"]
    np.testing.assert_array_equal(leading["token"][slot][real], plain["token"][real])
    np.testing.assert_array_equal(leading["position"][slot][real], plain["within"][real])
    # Tokens of one occurrence share one item's row, and different items do not.
    boundary, target = batch["target_slot"], plain["target"]
    assert (leading["token"][boundary][target >= 0] == prepared.catalogue.vocabulary - 1).all()
    for item in np.unique(target[target >= 0]):
        (at,) = np.unique(boundary[target == item])
        own = leading["token"][leading["user"] == leading["user"][at]]
        assert own.tolist() == prepared.catalogue.tokens[prepared.catalogue.offsets[item] : prepared.catalogue.offsets[item + 1]].tolist()
    assert len(np.unique(leading["user"])) - 1 == len(items.distinct(plain))


@pytest.mark.parametrize(("prompt", "suffix"), [(0, 0), (2, 1)])
@pytest.mark.parametrize("targets", [True, False])
def test_a_process_packs_the_items_of_the_whole_batch(prompt, suffix, targets):
    """From its own rows and the others' numbers it gets what it would from all rows."""
    rows = tiny_rows(tiny_data(users=30, items=20, prompt=prompt, suffix=suffix), make_config(data=DATA))
    items = DistinctItems(rows, 4, targets=targets)
    chosen = np.array([5, 0, 3, 1])
    some = [rows[row] for row in chosen]
    whole = items(stack(some))
    for here in ([0, 1, 2, 3], [1], [0, 2], [2, 3]):
        own = items(stack([some[place] for place in here]), chosen, np.array(here))
        assert own.keys() == whole.keys()
        for name, x in whole["leading"].items():
            np.testing.assert_array_equal(own["leading"][name], x)
        for name in whole.keys() - {"leading"}:
            np.testing.assert_array_equal(own[name], whole[name][here])


def test_without_targets_only_the_input_counts():
    prepared = tiny_data(users=30, items=20)
    rows = tiny_rows(prepared, make_config(data=DATA))
    plain = stack([rows[row] for row in range(2)])
    batch = DistinctItems(rows, 2, targets=False)(plain)
    assert set(batch) == set(plain) - {"item", "within"} | {"leading", "slot"}
    real = plain["user"] > 0
    assert len(np.unique(batch["leading"]["user"])) - 1 == len(np.unique(plain["item"][real]))
    np.testing.assert_array_equal(batch["leading"]["token"].reshape(-1)[batch["slot"]][real], plain["token"][real])


def test_an_item_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="row_tokens = 2: the longest item has 4"):
        pack_items(tiny_data().catalogue, np.arange(8), 2)


def test_gradients_of_an_item_that_occurs_often_add_up():
    """In bfloat16 itself, 256 + 1 is 256."""
    x = jnp.ones((3, 4), jnp.bfloat16)
    gradient = jax.grad(lambda x: Network.taken(x, jnp.zeros((2, 1024), int)).astype(jnp.float32).sum())(x)
    assert gradient.dtype == jnp.bfloat16 and (gradient[0] == 2048).all() and not gradient[1:].any()


def test_the_rows_of_items_hold_any_batch():
    """Also where every occurrence is another item: their number is fixed before the batches are known."""
    for seed in range(5):
        prepared = tiny_data(seed, users=12, items=80, cold=30, prompt=seed % 2, suffix=seed % 3 * 2)
        rows = tiny_rows(prepared, make_config(data=DATA))
        for size in (1, 2, len(rows)):
            items = DistinctItems(rows, size)
            for first in range(len(rows) - size + 1):
                items(stack([rows[row] for row in range(first, first + size)]))


# ---- the same losses, gradients and ranks as without

CASES = {
    "table": {"model": {"schedule": "intra*2 inter*2"}},
    "sampled text": {"model": {"schedule": "(intra inter)*2"}, "objective": {"vectors": "both", "negatives": 5, "token": 1.0}},
    "cached text, both directions": {
        "model": {"schedule": "intra_both intra inter full"},
        "objective": {"vectors": "text", "softmax": "cached", "negatives": 5},
    },
    "full text": {"model": {"schedule": "intra inter"}, "objective": {"vectors": "text", "softmax": "full"}},
    "text after all layers": {
        "model": {"schedule": "intra inter", "inter_positions": "item"},
        "objective": {"vectors": "text", "text_layers": "all"},
    },
}  # fmt: skip

SUFFIXED = ("sampled text", "cached text, both directions")


@functools.cache
def case(name):
    prepared = tiny_data(users=30, prompt=2, suffix=2 * (name in SUFFIXED))
    config = make_config(data=DATA, **CASES[name])
    rows = tiny_rows(prepared, config)
    items = objectives.make_training_items(prepared.catalogue, prepared.events, rows.segments, config)
    model = make_model(config, prepared.catalogue.vocabulary, prepared.catalogue.items, int(prepared.catalogue.lengths.max()))
    return prepared, config, rows, items, model, random_params(model)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_the_plain_ones(name):
    prepared, config, rows, items, model, params = case(name)
    plain = stack([rows[row] for row in range(4)])
    once = DistinctItems(rows, 4, targets=config.softmax != "full")(plain)  # as training does
    tokens = int(rows.catalogue.lengths[DistinctItems(rows, 4).distinct(plain)].sum())
    assert tokens < (plain["user"] > 0).sum()  # some items do occur twice
    cache = jax.random.normal(jax.random.key(1), (prepared.catalogue.items, config.model.width))
    key = jax.random.key(3) if config.softmax != "full" else None

    @jax.jit
    def run(params, batch):
        return jax.value_and_grad(lambda p: sum(objectives.losses(model.bind(p), config, items, batch, key, cache).values()))(params)

    (loss, grads), (expected, expected_grads) = run(params, once), run(params, without_items(plain))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for path, g in jax.tree_util.tree_leaves_with_path(expected_grads):
        mine = functools.reduce(lambda tree, step: tree[step.key], path, grads)
        np.testing.assert_allclose(mine, g, rtol=1e-4, atol=1e-4 * max(1.0, np.abs(g).max()), err_msg=jax.tree_util.keystr(path))
    text = str(jax.make_jaxpr(lambda p: objectives.losses(model.bind(p), config, items, once, key, cache))(params))
    assert "cond[" in text  # parts of the rows without a token are skipped


def test_what_is_skipped_does_not_matter():
    """A full part and an empty one give the states of the parts alone."""
    prepared, _, _, _, model, params = case("table")
    rows, _ = pack_items(prepared.catalogue, np.arange(prepared.catalogue.items), 24, rows=8)
    assert not rows["user"][-1].any() and rows["user"][0].any()
    run = jax.jit(lambda params, rows, chunks: model.bind(params).leading_states(rows, chunks), static_argnums=2)
    parts, whole = (np.asarray(run(params, rows, chunks)).reshape(8, 24, -1) for chunks in (8, 1))
    real = rows["user"] > 0
    np.testing.assert_allclose(parts[real], whole[real], rtol=1e-5, atol=1e-6)
    empty = ~real.any(1)
    assert not parts[empty].any() and whole[empty].any()


@pytest.mark.parametrize("name", CASES)
def test_ranking_vectors_are_the_plain_ones(name):
    prepared, _, _, _, model, params = case(name)
    targets = np.setdiff1d(np.arange(len(prepared.events.item)), prepared.events.offsets[:-1])
    results, losses = [], []
    for item_states in ("on", "off"):
        sections = {section: dict(fields) for section, fields in CASES[name].items()}
        sections["model"]["item_states"] = item_states
        config = make_config(data=DATA, eval={"batch_rows": 2}, **sections)
        evaluator = Evaluator(model, config, prepared, make_mesh(config.mesh))
        leading = evaluator.leading_states(params, evaluator.rows(targets))
        assert (leading is not None) == (item_states == "on")
        h = evaluator.history_vectors(params, targets, leading, lambda: None, "test")
        results.append((h, np.asarray(evaluator.ranker.item_vectors(params, leading))))
        losses.append(evaluator.losses(params, targets))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and bool(losses[0]) == bool(config.objective.token)


@pytest.mark.parametrize(("prompt", "suffix"), [(3, 0), (0, 2), (3, 2)])
def test_the_whole_catalogue_is_there_once(prompt, suffix):
    prepared = tiny_data(prompt=prompt, suffix=suffix)
    items = CatalogueItems(prepared.catalogue, 24, rows_at_once=2)
    assert len(items.rows["token"]) == 2 * items.chunks
    assert (items.rows["user"] > 0).sum() == len(prepared.catalogue.tokens)
    token = items.rows["token"].reshape(-1)
    assert (token[items.boundary_slots] == prepared.catalogue.vocabulary - 1).all() and len(
        set(items.boundary_slots)
    ) == prepared.catalogue.items
    rows = tiny_rows(prepared, make_config(data=DATA))
    batch = stack([rows[row] for row in range(3)])
    out = items(batch)
    assert set(out) == set(batch) - {"item", "within"} | {"slot"} and out["slot"].dtype == np.int32
    real = batch["user"] > 0
    np.testing.assert_array_equal(token[out["slot"]][real], batch["token"][real])
    owner = items.rows["user"].reshape(-1)[out["slot"]]
    for entry, size in ((8, prompt), (9, suffix)):  # there once, and every user takes it over
        there = real & (batch["item"] == entry)
        assert there.sum() == size * batch["user"].max(1).sum() and len(np.unique(owner[there])) == (size > 0)

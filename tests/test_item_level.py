"""Item-level layers (the mark `|`) and the item's identity at the input, against a token-level twin in plain NumPy and by perturbation."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from helpers import MEANINGS, _attention, _mlp, _norm, layer_params, make_config, metrics_lines, on_devices, random_params, stack, tiny_data
from test_artefact import service
from test_main import config_text, run

import iam_jax
from iam_jax.config import default_config, resolve
from iam_jax.data.batches import evaluation_rows, training_rows
from iam_jax.data.item_rows import CatalogueItems, DistinctItems, without_items
from iam_jax.data.vectors import Vectors
from iam_jax.devices.mesh import make_mesh
from iam_jax.errors import InputError
from iam_jax.model import make_model
from iam_jax.model.items import left_out, make_items
from iam_jax.ranking.evaluate import Evaluator
from iam_jax.schedule import parse_schedule
from iam_jax.training import objectives
from iam_jax.training.flops import attention_flops, step_flops, visible_pairs
from iam_jax.training.objectives import OBJECTIVES, States
from iam_jax.training.run import make_run
from iam_jax.training.step import init_state, make_train_step

MARKED = {"data": {"row_items": 12, "row_tokens": 24, "context_items": 2}}


@functools.cache
def case(schedule, item_input="none", item_width=0, vectors="both", prompt=2, suffix=1, given="", **model):
    config = make_config(
        data=MARKED["data"] | {"vectors": given},
        model={"schedule": schedule, "item_input": item_input, "item_width": item_width, **model},
        objective={"vectors": vectors, "softmax": "full"},
    )
    prepared = tiny_data(users=30, cold=2, prompt=prompt, suffix=suffix)
    catalogue = prepared.catalogue
    made = make_model(config, catalogue.vocabulary, catalogue.items, int(catalogue.lengths.max()))
    rows = training_rows(
        prepared.events, catalogue, config.row_slots, config.data.context_items, whole_text=False, seed=0, **config.row_options
    )
    return config, prepared, made, random_params(made), rows


# ---- the schedule


def test_the_mark_in_a_schedule():
    schedule = parse_schedule("intra*2 intra_both | (inter full)*2 inter")
    assert schedule.relations == ("intra", "intra", "intra_both", "inter", "full", "inter", "full", "inter")
    assert schedule.item_level and schedule.token_stages == 2 and schedule.leading_intra == 3
    assert len(schedule.own_layers) == 3  # a pretrained model has only the layers before the mark
    assert parse_schedule("|full").leading_intra == 0 and parse_schedule("|full").item_level
    assert not parse_schedule("intra inter").item_level


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("intra | intra", "'intra' behind the mark"),
        ("intra | (inter intra_both)*2", "'intra_both' behind the mark"),
        ("inter | full", "'inter' before the mark"),
        ("intra |", "no layer behind the mark"),
        ("|", "no layer behind the mark"),
        ("intra | full | full", "more than one mark"),
        ("(intra | full)*2", "cannot read"),
    ],
)
def test_marks_that_are_refused(text, named):
    with pytest.raises(InputError, match=named):
        parse_schedule(text)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model": {"schedule": "intra inter", "item_width": 8}}, r"model\.item_width"),
        ({"model": {"schedule": "intra | inter", "item_width": 10}}, r"model\.item_width"),
        ({"model": {"schedule": "intra | inter", "item_heads": 2}}, r"model\.item_heads"),
        ({"model": {"schedule": "intra | inter", "positions": "learned"}}, r"model\.positions"),
        ({"model": {"schedule": "intra | inter", "item_states": "off"}}, r"model\.item_states"),
        ({"model": {"schedule": "intra | inter"}, "objective": {"token": 1.0}}, r"objective\.token"),
        ({"model": {"schedule": "intra | inter"}, "objective": {"vectors": "text", "text_layers": "all"}}, r"objective\.text_layers"),
        ({"model": {"schedule": "intra | inter"}, "data": {"row_items": 1}}, r"data\.row_items"),
        ({"model": {"schedule": "intra inter", "item_input": "both"}}, r"model\.item_input"),
        ({"model": {"schedule": "intra | inter", "content_input": "text"}, "objective": {"vectors": "both"}}, r"model\.content_input"),
        ({"model": {"schedule": "intra | inter", "content_input": "vector"}}, r"model\.content_input"),
        ({"model": {"schedule": "intra inter", "content_input": "vector"}, "objective": {"vectors": "both"}}, r"model\.content_input"),
        ({"model": {"token_embeddings": "lsa"}}, r"model\.token_embeddings"),
        ({"model": {"token_embeddings": "svd"}, "data": {"tokenizer": "id"}}, r"model\.token_embeddings"),
        (
            {
                "model": {"schedule": "intra inter", "item_input": "own"},
                "objective": {"item": 0.0, "token": 1.0},
                "eval": {"ranking": "likelihood"},
            },
            r"model\.item_input",
        ),
    ],
)
def test_configs_that_are_refused(fields, named):
    with pytest.raises(InputError, match=named):
        make_config(**fields)


# ---- rows


@pytest.mark.parametrize(("prompt", "suffix"), [(0, 0), (2, 0), (0, 3), (2, 1)])
def test_rows_have_one_slot_for_each_item(prompt, suffix):
    """The token-level rows, with only the last token of each entry."""
    prepared = tiny_data(users=30, prompt=prompt, suffix=suffix)
    events, catalogue = prepared.events, prepared.catalogue
    targets = np.setdiff1d(np.arange(len(events.item)), events.offsets[:-1])
    by_item = evaluation_rows(events, catalogue, 9, targets, by_item=True, identity=True)
    by_token = evaluation_rows(events, catalogue, 99, targets)
    tokens = {
        row["segment"][m]: (row, m) for row in (by_token[r] for r in range(len(by_token))) for m in np.flatnonzero(row["target"] >= 0)
    }
    for row in (by_item[r] for r in range(len(by_item))):
        for m in np.flatnonzero(row["target"] >= 0):
            other, n = tokens[row["segment"][m]]
            mine = row["user"] == row["user"][row["target_at"][m]]
            theirs = other["user"] == other["user"][other["target_at"][n]]
            last = theirs & (other["within"] == catalogue.lengths[other["item"]] - 1)
            assert row["target"][m] == other["target"][n] and mine.sum() == last.sum()
            for name in ("token", "group", "item", "within"):
                np.testing.assert_array_equal(row[name][mine], other[name][last], err_msg=name)
            assert row["position"][mine].tolist() == list(range(mine.sum()))
            assert row["target_at"][m] == np.flatnonzero(mine)[-1]
        item = row["item"]
        np.testing.assert_array_equal(row["identity"], np.where((row["user"] > 0) & (item < catalogue.items), item, -1))


def test_the_identity_of_token_level_rows_is_at_the_boundary_tokens():
    _, prepared, _, _, rows = case("intra inter", "own")
    batch = stack([rows[r] for r in range(4)])
    boundary = (batch["user"] > 0) & (batch["token"] == prepared.catalogue.vocabulary - 1)
    np.testing.assert_array_equal(batch["identity"], np.where(boundary, batch["item"], -1))
    assert boundary.any()


def test_a_history_that_is_longer_than_a_row_is_cut_between_items():
    _, prepared, _, _, _ = case("intra | inter")
    rows = training_rows(prepared.events, prepared.catalogue, 5, 2, whole_text=False, seed=0, by_item=True)
    first, last = rows.segments.first, rows.segments.last
    events = np.sort(np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)]))
    expected = np.concatenate([np.arange(a, b) for a, b in zip(prepared.events.offsets[:-1], prepared.events.train_ends, strict=True)])
    np.testing.assert_array_equal(events, expected)  # with a prompt, every training event is a target once
    assert (rows.sizes <= 5).all() and (rows.sizes == 5).any()


# ---- states and gradients


def twin(config, params, prepared, entries):
    """States [n, E] float64 of the boundary tokens of one user's entries: all tokens go through the layers before the mark, and only
    boundary tokens are keys and queries behind it."""
    p, catalogue, schedule = jax.tree.map(lambda x: np.asarray(x, np.float64), params), prepared.catalogue, config.schedule
    shape = config.model.item_shape
    length = catalogue.lengths[entries]
    token = np.concatenate([catalogue.tokens[catalogue.offsets[e] : catalogue.offsets[e + 1]] for e in entries])
    group, last = np.repeat(np.arange(len(entries)), length), np.cumsum(length) - 1
    t, s = np.indices((len(token), len(token)))
    boundary = np.isin(np.arange(len(token)), last)
    x = p["decoder"]["embedding_VD"][token] * config.model.width**0.5
    for number, (relation, layer) in enumerate(zip(schedule.relations, layer_params(p["decoder"], _flat(config)), strict=True)):
        behind = number >= schedule.leading_intra
        if number == schedule.leading_intra:
            x = _item_input(config, p, prepared, x, entries, last)
        model, position = (shape, group) if behind else (config.model, np.arange(len(token)))
        allowed = MEANINGS[relation](True, group[t], group[s], t, s) & (not behind or (boundary[t] & boundary[s]))
        if behind and config.model.self_key and relation == "inter":
            allowed = allowed | np.eye(len(token), dtype=bool)
        x = x + _attention(model, layer["attention"], _norm(model, layer["attention_norm"], x), allowed, position)
        x = x + _mlp(model, layer["mlp"], _norm(model, layer["mlp_norm"], x))
    return _norm(shape, p["decoder"]["item_norm" if config.model.item_width else "final_norm"], x)[last]


def _flat(config):
    return config.model.schedule.replace("|", " ")


def _item_input(config, p, prepared, x, entries, last):
    if config.model.content_input == "vector":  # prompt and suffix, too
        x = _norm(config.model, p["input_norm"], _norm(config.model, p["text_norm"], x) * x.shape[1] ** -0.5 @ p["text_DE"])
    elif config.model.item_width:
        x = _norm(config.model, p["content_norm"], x) @ p["content_DE"]
    if config.model.item_input != "none":
        table = p["table_IE"] if config.model.item_input == "table" else p["identity_IE"]
        x = x.copy()
        for entry, at in zip(entries, last, strict=True):
            if entry < prepared.catalogue.items and prepared.events.train_counts[entry]:
                x[at] += table[entry] * p["identity_scale"]
    return x


VARIANTS = {
    "inter": ("intra*2 | inter*2", {}),
    "full, a table of its own": ("intra_both intra | full*2", {"item_input": "own"}),
    "another width, the shared table": ("intra | (inter full)*2", {"item_input": "table", "item_width": 8, "item_heads": 2}),
    "one map for both, another width": (
        "intra | full inter",
        {"item_input": "table", "item_width": 8, "item_heads": 2, "content_input": "vector"},
    ),
    "no text layer, self key": ("| inter*2", {"item_input": "table", "self_key": True, "vectors": "table"}),
    "no layer before": ("| full", {"item_width": 24, "item_input": "own", "vectors": "table", "prompt": 0, "suffix": 0}),
}


def states_and_batch(name):
    schedule, fields = VARIANTS[name]
    config, prepared, made, params, rows = case(schedule, **fields)
    plain = stack([rows[r] for r in range(3)])
    finish = DistinctItems(rows, 3, row_tokens=24) if config.states_by_item else without_items
    items = make_items(prepared.catalogue, prepared.events.train_counts > 0)

    @jax.jit
    def states(params, batch):
        network = made.bind(params)
        leading = network.leading_states(batch["leading"], 8) if "leading" in batch else None
        return network.states(batch, leading_XD=leading, items=items)

    return config, prepared, params, plain, finish(plain), states


@pytest.mark.parametrize("name", VARIANTS)
def test_states_and_gradients_are_those_of_a_token_level_twin(name):
    config, prepared, params, plain, batch, states = states_and_batch(name)
    x_BSE = np.asarray(states(params, batch))
    weight = np.random.default_rng(0).standard_normal(x_BSE.shape)
    seen = 0

    def expected(params):
        out = np.zeros(x_BSE.shape)
        for b in range(len(plain["user"])):
            for user in range(1, plain["user"][b].max() + 1):
                mine = plain["user"][b] == user
                out[b, mine] = twin(config, params, prepared, plain["item"][b, mine])
        return out

    reference = expected(params)
    for b in range(len(plain["user"])):
        real = plain["user"][b] > 0
        np.testing.assert_allclose(x_BSE[b, real], reference[b, real], rtol=2e-5, atol=2e-5)
        seen += real.sum()
    assert seen > 20
    real = (plain["user"] > 0)[..., None]
    gradients = jax.grad(lambda p: (states(p, batch) * (weight * real)).sum())(params)
    # The derivative of the twin along a random direction of all parameters, by central differences in float64
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for seed in range(2):
        rng = np.random.default_rng(seed)
        direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), wide)  # noqa: B023
        ahead, back = ((expected(jax.tree.map(lambda x, d, h=h: x + h * d, wide, direction)) * weight * real).sum() for h in (1e-5, -1e-5))
        along = sum(
            float((np.asarray(g, np.float64) * d).sum())
            for g, d in zip(jax.tree.leaves(gradients), jax.tree.leaves(direction), strict=True)
        )
        assert along == pytest.approx((ahead - back) / 2e-5, rel=2e-4)


IMPLEMENTATIONS = ["reference", "auto", "tpu", "gpu"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("schedule", ["intra | inter*2", "intra | full", "| inter", "| (full inter)*2"])
def test_a_slot_depends_on_earlier_items_and_on_nothing_else(schedule, implementation):
    """Bitwise: a change of one slot's content changes exactly the slots that can see it through the relations."""
    if implementation not in ("reference", "auto") and schedule != "intra | inter*2":
        pytest.skip("one schedule is enough for the kernels' own masks")
    config, prepared, made, params, rows = case(schedule, "own", vectors="table", attention=implementation)
    batch = stack([rows[r] for r in range(2)])
    B, S = batch["user"].shape
    slot = np.arange(B * S, dtype=np.int32).reshape(B, S)  # every slot has a content of its own
    batch = {name: x for name, x in batch.items() if name in ("user", "group", "position", "identity")} | {"slot": slot}
    items = make_items(prepared.catalogue, prepared.events.train_counts > 0)
    states = jax.jit(lambda content: made.bind(params).states(batch, leading_XD=content, items=items).reshape(B * S, -1))
    content = jnp.asarray(np.random.default_rng(0).standard_normal((B * S, 16)), jnp.float32)
    before = np.asarray(states(content))
    reach = np.eye(B * S, dtype=bool)
    user, group, t, s = (batch["user"].reshape(-1), batch["group"].reshape(-1), *np.indices((B * S, B * S)))
    same = (user[t] == user[s]) & (user[t] > 0) & (t // S == s // S)
    for relation in config.schedule.relations[config.schedule.leading_intra :]:
        reach |= (MEANINGS[relation](same, group[t], group[s], t, s).astype(int) @ reach) > 0
    changed = [(np.asarray(states(content.at[n].add(1.0))) != before).any(-1) for n in range(B * S)]
    np.testing.assert_array_equal(np.stack(changed, axis=1), reach)


def test_identity_moves_only_what_follows_and_cold_items_have_none():
    config, prepared, made, params, rows = case("intra inter", "own")  # at token level
    batch = without_items(stack([rows[r] for r in range(2)]))
    trained = prepared.events.train_counts > 0
    items = make_items(prepared.catalogue, trained)
    states = jax.jit(lambda params, batch: made.bind(params).states(batch, items=items))
    before = np.asarray(states(params, batch))
    assert not trained.all()
    for item in range(prepared.catalogue.items):
        moved = params | {"identity_IE": params["identity_IE"].at[item].add(1.0)}
        changed = (np.asarray(states(moved, batch)) != before).any(-1)
        own = batch["identity"] == item
        assert changed[own].all() == trained[item] or not own.any()
        for b in range(2):
            for t in np.flatnonzero(changed[b]):
                earlier = (batch["user"][b] == batch["user"][b, t]) & (np.arange(changed.shape[1]) <= t)
                assert (own[b] & earlier).any() and trained[item]
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, item_input="none"))
    without = make_model(plain, prepared.catalogue.vocabulary, prepared.catalogue.items, int(prepared.catalogue.lengths.max()))
    zero = params | {"identity_scale": jnp.zeros(())}
    plain_batch = {name: x for name, x in batch.items() if name != "identity"}
    other = {name: x for name, x in params.items() if not name.startswith("identity")}
    np.testing.assert_array_equal(states(zero, batch), jax.jit(lambda p, b: without.bind(p).states(b))(other, plain_batch))


@pytest.mark.parametrize("content_input", ["state", "vector"])
@pytest.mark.parametrize(
    ("schedule", "fields"), [("| inter", {}), ("intra | inter", {}), ("intra | inter", {"item_width": 8, "item_heads": 2})]
)
def test_the_input_with_given_vectors(schedule, fields, content_input):
    """Every entry's input by the formulas of docs/mathematics.md, and item vectors; with one map for both, its gradient has both parts."""
    config, prepared, _, _, _ = case(schedule, "table", given="tfidf", content_input=content_input, **fields)
    catalogue, trained = prepared.catalogue, prepared.events.train_counts > 0
    given = np.random.default_rng(0).standard_normal((catalogue.items, 5)).astype(np.float32)
    given[3] = 0  # a text without any known word
    made = make_model(config, catalogue.vocabulary, catalogue.items, int(catalogue.lengths.max()), 5)
    params, items = random_params(made), make_items(catalogue, trained, given)
    entry = np.arange(catalogue.items + 2)[None]  # then the prompt and the suffix
    rng = np.random.default_rng(1)
    states_XD = rng.standard_normal((entry.size, config.model.width)).astype(np.float32)
    batch = {"slot": entry, "identity": np.where(entry < catalogue.items, entry, -1), "token": np.zeros_like(entry)}
    got = np.asarray(made.bind(params).inputs(batch, None, jnp.asarray(states_XD), items))[0]

    p, model = jax.tree.map(lambda x: np.asarray(x, np.float64), params), config.model
    x_IP = given / np.sqrt(np.square(given).sum(-1).mean())
    vector_XP = np.concatenate([x_IP, np.zeros((2, 5))])
    content = vector_XP @ p["output_vector_PE"]
    if config.reads_text:
        unit = states_XD.shape[1] ** -0.5 if content_input == "vector" else 1
        content = content + unit * _norm(model, p["text_norm"], states_XD) @ p["text_DE"]
    vectors = made.bind(params).content(jnp.asarray(states_XD) if config.reads_text else None, jnp.asarray(vector_XP, jnp.float32))
    np.testing.assert_allclose(vectors, content, rtol=1e-5, atol=1e-5)
    if content_input == "vector":
        x = _norm(model, p["input_norm"], content)
        if not config.reads_text:
            x[-2:] = states_XD[-2:]
    else:
        x = _norm(model, p["content_norm"], states_XD) @ p["content_DE"] if model.item_width else states_XD
        x = x + vector_XP @ p["input_vector_PE"]
    row = np.where(trained[:, None], p["table_IE"], 0)
    expected = x + np.concatenate([row, 0 * row[:2]]) * p["identity_scale"]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert ("input_vector_PE" in params) == (content_input == "state")

    def total(params):
        return made.bind(params).inputs(batch, None, jnp.asarray(states_XD), items)[0, :3].sum()

    assert (np.abs(jax.grad(total)(params)["output_vector_PE"]).max() > 1e-4) == (content_input == "vector")


@pytest.mark.parametrize(
    "name", ["full, a table of its own", "another width, the shared table", "one map for both, another width", "no text layer, self key"]
)
def test_ranking_uses_the_states_of_training(name):
    """Histories and items through the evaluator, as the training step computes them from distinct items."""
    schedule, fields = VARIANTS[name]
    config, prepared, made, params, _ = case(schedule, **fields)
    targets = np.setdiff1d(np.arange(len(prepared.events.item)), prepared.events.offsets[:-1])
    evaluator = Evaluator(made, config, prepared, make_mesh(config.mesh))
    leading = evaluator.leading_states(params, evaluator.rows(targets))
    assert leading is not None and leading.shape == (prepared.catalogue.items + 2, config.model.width)
    h = evaluator.history_vectors(params, targets, leading)
    rows = evaluator.rows(targets)
    plain = stack([rows[r] for r in range(len(rows))])
    batch = DistinctItems(rows, len(rows), row_tokens=24)(plain) if config.states_by_item else without_items(plain)
    items = make_items(prepared.catalogue, prepared.events.train_counts > 0)

    @jax.jit
    def projected(params, batch):
        network = made.bind(params)
        leading = network.leading_states(batch["leading"], 8) if "leading" in batch else None
        return network.project(network.states(batch, leading_XD=leading, items=items))

    x = np.asarray(projected(params, batch))
    for b in range(len(rows)):
        for m in np.flatnonzero(plain["target"][b] >= 0):
            np.testing.assert_allclose(h[plain["segment"][b, m]], x[b, plain["target_at"][b, m]], rtol=1e-4, atol=1e-5)
    packed = CatalogueItems(prepared.catalogue, 24, 4, by_item=True)
    assert (packed(plain)["slot"] == plain["item"]).all() and packed.boundary_slots.tolist() == list(range(prepared.catalogue.items))


def test_flops_of_item_level_layers():
    """Attention behind the mark is counted with the width of its layers and the visible pairs of items."""
    config, prepared, _, _, rows = case("intra | inter", "table", 8, item_heads=2)
    batch = stack([rows[r] for r in range(4)])
    pairs = visible_pairs(batch)
    counted = sum(
        MEANINGS["inter"]((u[t] == u[s]) & (u[t] > 0), g[t], g[s], t, s).sum()
        for u, g in zip(batch["user"], batch["group"], strict=True)
        for t, s in [np.indices((len(u), len(u)))]
    )
    assert pairs["inter"] == counted / 4
    flops = attention_flops(config.model.item_shape, pairs, ("inter",))
    assert flops.total() == pytest.approx(4 * 8 * counted / 4)
    step = step_flops(make_run(dataclasses.replace(config, train=dataclasses.replace(config.train, batch_rows=2)), prepared))
    assert step.model.total() > 0 and step.hardware.total() >= step.model.total()


# ---- what keeps it from over-fitting


def test_an_item_that_is_left_out_has_no_identity_or_no_content():
    """As a cold item, in the input and in the item vectors; never both, and with the shares that were asked for."""
    config, prepared, made, params, rows = case("intra | inter", "table", vectors="both")
    items = make_items(prepared.catalogue, prepared.events.train_counts > 0)
    many = dataclasses.replace(items, trained_I=jnp.ones(20000, bool))
    drawn = left_out(many, 0.3, 0.2, jax.random.key(0))
    assert not (~drawn.identity_I & ~drawn.content_I).any()
    assert abs(float((~drawn.identity_I).mean()) - 0.3) < 0.02 and abs(float((~drawn.content_I).mean()) - 0.2) < 0.02

    batch = DistinctItems(rows, 2, row_tokens=24)(stack([rows[r] for r in range(2)]))
    training = objectives.make_training_items(prepared.catalogue, prepared.events, rows.segments, config)

    @jax.jit
    def loss(params, items, leading):
        network = made.bind(params)
        states = network.states(batch, leading_XD=network.leading_states(batch["leading"], 8) * leading[:, None], items=items)
        mine = dataclasses.replace(training, catalogue=items)
        shared = OBJECTIVES["item"].shared(network, config, mine, batch, None, (None, None), None)
        return states, OBJECTIVES["item"].loss(network, config, mine, batch, States(states), (None, None), shared)

    everything = jnp.ones(batch["leading"]["token"].size)
    present = jnp.ones(prepared.catalogue.items, bool)
    item = int(batch["identity"].max())
    without_row = params | {"table_IE": params["table_IE"].at[item].set(0.0)}
    mine = dataclasses.replace(items, identity_I=present.at[item].set(False), content_I=present)
    for a, b in zip(loss(params, mine, everything), loss(without_row, items, everything), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    slots = np.asarray(batch["slot"])[np.asarray(batch["identity"]) == item]
    without_content = everything.at[slots].set(0.0)
    mine = dataclasses.replace(items, identity_I=present, content_I=present.at[item].set(False))
    states, _ = loss(params, mine, everything)
    np.testing.assert_allclose(states, loss(params, items, without_content)[0], rtol=1e-6, atol=1e-6)


def test_leaving_out_is_the_same_for_all_micro_batches():
    """Gradients of a step do not depend on optimizer.accumulate."""
    steps = []
    for parts in (1, 2):
        config = make_config(
            data=MARKED["data"] | {"vectors": "tfidf"},
            model={"schedule": "| inter", "item_input": "table", "drop_identity": 0.4, "drop_content": 0.3},
            objective={"vectors": "both"},
            optimizer={"accumulate": parts, "warmup_steps": 0, "epsilon": 1e-2},
            train={"batch_rows": 4},
        )
        prepared = tiny_data(users=30)
        vectors = np.random.default_rng(0).standard_normal((prepared.catalogue.items, 5)).astype(np.float32)
        prepared = dataclasses.replace(prepared, content=Vectors(vectors, ""))
        this = make_run(config, prepared)
        assert config.softmax == "full"
        with jax.set_mesh(this.mesh):
            batch = this.finish(stack([this.rows[r] for r in range(4)]))
            state, metrics = make_train_step(this)(init_state(this), batch, this.items, np.int32(0))
        steps.append((state["params"], float(metrics["item_sum"])))
    assert steps[0][1] == pytest.approx(steps[1][1], rel=1e-5)
    for a, b in zip(jax.tree.leaves(steps[0][0]), jax.tree.leaves(steps[1][0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


# ---- whole commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("items")
    fields = {
        "model.schedule": "intra | inter full", "model.item_input": "table", "model.item_width": 8, "model.item_heads": 2,
        "objective.vectors": "both", "data.row_items": 16, "data.prompt": "bought: ", "data.suffix": "next: ", "model.dropout": 0.1,
    }  # fmt: skip
    (folder / "run.py").write_text(config_text(tiny | fields))
    out, _ = run(folder, "--config=run.py", "--workdir=run")
    assert "rows of 16 slots" in out and "leading intra layers once per distinct item" in out
    return folder


def test_a_resumed_run_is_bitwise_an_uninterrupted_one(folder):
    run(folder, "--config=run.py", "--workdir=parts", "--config.train.steps=3", "--config.eval.test=false")
    run(folder, "--config=run.py", "--workdir=parts")
    assert metrics_lines(folder / "parts")[-1] == metrics_lines(folder / "run")[-1]
    assert (folder / "parts" / "ranks.parquet").read_bytes() == (folder / "run" / "ranks.parquet").read_bytes()


def test_many_devices_rank_as_one(folder):
    before = pl.read_parquet(folder / "run" / "ranks.parquet")
    mesh = "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"
    run(folder, "--workdir=run", "--mode=evaluate", *mesh, **on_devices(8))
    after = pl.read_parquet(folder / "run" / "ranks.parquet")
    assert after["user", "target"].equals(before["user", "target"]) and (after["rank"] - before["rank"]).abs().max() <= 1


def test_lists_of_scoring_the_api_and_a_service_are_equal(folder):
    """Also for items that only a history has, by their text, and behind an export."""
    fields = default_config()
    fields.update(json.loads((folder / "run" / "config.json").read_text()))
    assert resolve(fields).item_level
    recommender = iam_jax.load(folder / "run", step="last")
    ids = recommender.item_ids.to_list()[:9]
    histories = [ids[:3], ids[2:9], [ids[5]]]
    table = pl.DataFrame({"user": ["a", "b", "c"], "item": histories}).with_columns(timestamp=pl.int_ranges(pl.col("item").list.len()))
    table.explode("item", "timestamp").write_csv(folder / "users.csv")
    run(folder, "--workdir=run", "--mode=score", "--users=users.csv", "--top_k=50", "--step=last", "--output=lists")
    scored = pl.concat([pl.read_parquet(path) for path in sorted((folder / "lists").glob("*.parquet"))])
    scored = scored.group_by("user", maintain_order=True).agg("item", "score")
    out, _ = run(folder, "--workdir=run", "--mode=export", "--format=stablehlo", "--step=last", "--output=out")
    assert "rows of 16 slots" in out
    (served,) = service(folder / "out", [histories])
    lists = recommender.recommend(histories, k=50)
    for mine, theirs, (_, items, scores) in zip(lists, served, scored.rows(), strict=True):
        assert [one.item for one in mine] == items == [item for item, _ in theirs]
        np.testing.assert_allclose([one.score for one in mine], scores, rtol=0)
        np.testing.assert_allclose([score for _, score in theirs], scores, rtol=1e-4, atol=1e-5)
    known, text = recommender.user_vectors([[ids[0], ids[1]]]), recommender.user_vectors([[{"text": "something else"}, ids[1]]])
    assert np.isfinite(text).all() and not np.allclose(known, text)

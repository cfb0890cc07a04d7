"""Relations as objects: one that is added here, by one object each, works everywhere and is refused where it must be."""

import functools
import importlib
import json
import subprocess
import sys

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_beam
import test_candidates
import test_item_rows
from helpers import allowed_keys, make_config, pack_row, packed_batch, random_params, range_mask, stack, tiny_data
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import rows
from test_main import config_text
from test_main import run as run_command

from iam_jax.data.assumed import Assumption
from iam_jax.errors import InputError
from iam_jax.model import make_model
from iam_jax.model.attention import decode_ranges, key_ranges
from iam_jax.planning.plan import PlanRequest, make_plan
from iam_jax.ranking.beam import beam_search, make_trie
from iam_jax.ranking.likelihood import log_likelihoods
from iam_jax.relations import RELATIONS, Relation, register, unregister
from iam_jax.schedule import parse_schedule
from iam_jax.training.flops import visible_pairs
from iam_jax.training.run import make_run

PREVIOUS = 'Relation("previous", start=lambda at: at.start_of(at.before - 1), meaning="the item before its own")'
# Each relation and, for the twin in tests/helpers.py, its meaning once more.
ADDED = {
    "previous": (eval(PREVIOUS), lambda same, group_t, group_s, t, s: same & (group_s == group_t - 1)),
    "recent": (
        Relation("recent", start=lambda at: at.start_of(at.before - 1), own="past"),
        lambda same, group_t, group_s, t, s: same & (group_s >= group_t - 1) & (s <= t),
    ),
    "all_but_previous": (
        Relation("all_but_previous", start=lambda at: at.user_start, stop=lambda at: at.start_of(at.before - 1), own="past"),
        lambda same, group_t, group_s, t, s: same & (group_s != group_t - 1) & (s <= t),
    ),
    "whole_history": (
        Relation("whole_history", start=lambda at: at.user_start, own="whole"),
        lambda same, group_t, group_s, t, s: same & (group_s <= group_t),
    ),
}
BATCH = packed_batch()
REAL = (BATCH["user"] > 0).reshape(-1)
backends = importlib.import_module("iam_jax.kernels.range_attention")  # the package's attribute of this name is the function


@pytest.fixture(scope="module", autouse=True)
def added():
    """The relations above, for this file only. A model that another file made is never one of theirs: its schedule is another."""
    with pytest.MonkeyPatch.context() as patch:
        for name, (relation, meaning) in ADDED.items():
            register(relation)
            patch.setitem(helpers.MEANINGS, name, meaning)
        patch.setattr(helpers, "SELF_KEY", helpers.SELF_KEY | {"previous"})
        yield
        for name in ADDED:
            unregister(name)
    assert list(RELATIONS) == ["full", "intra", "inter", "intra_both"]


# ---- masks


def mask_of(ranges, keys, row=0):
    """[T, S] bool: one row's mask; its ranges do not overlap."""
    parts = [range_mask(keys, [part])[row].astype(int) for part in ranges if part is not None]
    assert sum(parts).max() <= 1
    return sum(parts) > 0


def keys_of(ranges, keys, row=0):
    """The mask as a list: the keys of each token."""
    return [np.flatnonzero(seen).tolist() for seen in mask_of(ranges, keys, row)]


def test_mask_by_hand():
    """Prompt, first items, several users in a row, padding."""
    batch = stack([pack_row(15, (2, [2, 3]), (0, [1, 2]), (1, [2]))])  # p p a a b b b | c d d | p e e, two slots of padding
    ranges = key_ranges(batch["user"], batch["group"])["previous"]
    assert ranges.second is None
    of_prompt, of_a, of_c, of_third = [0, 1], [2, 3], [7], [10]
    assert keys_of(ranges, 15) == [[], [], of_prompt, of_prompt, of_a, of_a, of_a, [], of_c, of_c, [], of_third, of_third, [], []]


def test_mask_of_candidates_by_hand():
    """Each candidate's previous item is the last of the history, whatever its place in the row; the second user has a prompt only."""
    user = np.array([[1] * 7 + [2] * 4 + [0]], np.int32)
    group = np.array([[1, 1, 2, 3, 3, 3, 3, 0, 1, 1, 1, 0]], np.int32)  # a a b | two candidates of 2 tokens || p | candidates of 1 and 2
    candidate = np.array([[0, 0, 0, 1, 1, 2, 2, 0, 1, 2, 2, 0]], np.int32)
    ranges = key_ranges(user, group, candidate)
    assert keys_of(ranges["previous"], 12) == [[], [], [0, 1], [2], [2], [2], [2], [], [7], [7], [7], []]
    assert keys_of(ranges["recent"], 12) == [
        [0], [0, 1], [0, 1, 2], [2, 3], [2, 3, 4], [2, 5], [2, 5, 6], [7], [7, 8], [7, 9], [7, 9, 10], [],
    ]  # fmt: skip
    assert keys_of(ranges["all_but_previous"], 12) == [
        [0], [0, 1], [2], [0, 1, 3], [0, 1, 3, 4], [0, 1, 5], [0, 1, 5, 6], [7], [8], [9], [9, 10], [],
    ]  # fmt: skip


def test_mask_while_decoding_by_hand():
    """Two candidates behind histories of 4 and 2 tokens; candidate 0 in slots 5, 6, …, candidate 1 in slots 8, 9, …: the third token."""
    batch = stack([pack_row(5, (1, [2, 1])), pack_row(5, (0, [1, 1]))])
    ranges = decode_ranges(batch["user"], batch["group"], jnp.array([5, 8]), jnp.array([7, 10]), self_key=False)
    assert "whole_history" not in ranges and "intra_both" not in ranges
    assert [keys_of(ranges["previous"], 11, row) for row in (0, 1)] == [[[3], [3]], [[1], [1]]]
    assert [keys_of(ranges["recent"], 11, row) for row in (0, 1)] == [[[3, 5, 6, 7], [3, 8, 9, 10]], [[1, 5, 6, 7], [1, 8, 9, 10]]]
    rest = [[[0, 1, 2, 5, 6, 7], [0, 1, 2, 8, 9, 10]], [[0, 5, 6, 7], [0, 8, 9, 10]]]
    assert [keys_of(ranges["all_but_previous"], 11, row) for row in (0, 1)] == rest
    with_self = decode_ranges(batch["user"], batch["group"], jnp.array([5, 8]), jnp.array([7, 10]), True, ("previous", "recent"))
    assert set(with_self) == {"previous", "recent"}
    assert keys_of(with_self["previous"], 11) == [[3, 7], [3, 10]] and keys_of(with_self["recent"], 11) == keys_of(ranges["recent"], 11)


ranges_of = jax.jit(lambda user, group: key_ranges(user, group, relations=list(ADDED)))


@settings(max_examples=40, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=1))
def test_masks_against_their_meaning(packed):
    batch = stack(packed)
    ranges = ranges_of(batch["user"], batch["group"])
    assert {name for name, (_, second) in ranges.items() if second is not None} == {"all_but_previous"}  # elsewhere one range is enough
    for name, of_relation in ranges.items():
        expected = allowed_keys(name, batch["user"][0], batch["group"][0])
        np.testing.assert_array_equal(mask_of(of_relation, batch["user"].shape[1]), expected, err_msg=name)


def test_padding_sees_nothing():
    """By any relation, those that see their own item too: padding has a group, and it is 0 as a prompt's is."""
    batch = stack([pack_row(8, (2, [1]))])
    for name, ranges in key_ranges(batch["user"], batch["group"]).items():
        assert not mask_of(ranges, 8)[3:].any(), name
        assert mask_of(ranges, 8)[:3].any(), name


def test_bounds_are_cut_to_the_earlier_items_of_the_user():
    wrong = Relation("wrong", start=lambda at: at.user_start - 5, stop=lambda at: at.item_stop + 3)
    user, group = np.array([[1, 1, 1, 2, 2, 2, 2, 2]], np.int32), np.array([[1, 1, 2, 1, 2, 3, 3, 3]], np.int32)
    candidate = np.array([[0, 0, 0, 0, 0, 1, 2, 2]], np.int32)
    register(wrong)
    try:
        for candidates in (None, candidate):
            ranges = key_ranges(user, group, candidates)
            assert keys_of(ranges["wrong"], 8) == keys_of(ranges["inter"], 8)
        ranges = decode_ranges(user[:, :3], group[:, :3], jnp.array([3]), jnp.array([4]), self_key=False)
        assert keys_of(ranges["wrong"], 5) == keys_of(ranges["inter"], 5) == [[0, 1, 2]]
    finally:
        unregister("wrong")


# ---- a model with them


@functools.cache
def probe(schedule, implementation):
    """(params, (params, count) -> its states [24, D] and their Jacobian [24, 24, D], zero for states >= count)."""
    longest = 3 if implementation == "local" else None
    model = make_model(make_config(model={"schedule": schedule}), vocabulary=24, items=3, longest=longest)
    direction = jnp.asarray(np.random.default_rng(0).standard_normal((24, 16)), jnp.float32)

    @jax.jit
    def run(params, count=0):
        def states(embedding):
            return model.bind(params | {"decoder": params["decoder"] | {"embedding_VD": embedding}}).decoder(BATCH).reshape(24, -1)

        x, pullback = jax.vjp(states, params["decoder"]["embedding_VD"])

        def derivative(t, jacobian):
            return jacobian.at[t].set(pullback(jnp.zeros_like(x).at[t].set(direction[t]))[0])

        return x, jax.lax.fori_loop(0, count, derivative, jnp.zeros((24, 24, 16)))

    return random_params(model), run


def reached(schedule):
    """[24, 24] bool: whether state t can depend on input s, by multiplying up the relations' meaning."""
    out = np.zeros((24, 24), bool)
    for row, (user, group) in enumerate(zip(BATCH["user"], BATCH["group"], strict=True)):
        seen = np.eye(12, dtype=bool)
        for relation in parse_schedule(schedule).relations:
            seen |= (allowed_keys(relation, user, group).astype(int) @ seen) > 0
        out[12 * row : 12 * row + 12, 12 * row : 12 * row + 12] = seen
    return out


@pytest.mark.parametrize("implementation", ["reference", "local", "blocked"])
@pytest.mark.parametrize("schedule", ["previous", "intra previous", "all_but_previous", "whole_history"])
def test_states_depend_on_what_they_may_see_and_on_nothing_else(monkeypatch, schedule, implementation):
    """Bitwise, values and gradients, in one compiled program: perturbing input s changes exactly the states that may see it."""
    chosen, choose = set(), backends.choose_implementation

    def recorded(*args, **options):
        chosen.add(choose(*args, **options))
        return choose(*args, **options)

    monkeypatch.setattr(backends, "choose_implementation", recorded)
    monkeypatch.setattr(backends, "BLOCKED_KEYS", 8 if implementation == "blocked" else 512)
    params, run = probe(schedule, implementation)
    if implementation == "local" and "intra" not in schedule:  # only bounded ranges are local: this is the program of `reference`
        run.lower(params)
        assert chosen == {"reference"}
        return
    states, jacobian = map(np.asarray, run(params, 24))
    assert chosen == ({"local", "reference"} if implementation == "local" else {implementation})
    expected = reached(schedule)
    np.testing.assert_array_equal((jacobian != 0).any(-1), expected)
    decoder = params["decoder"]

    def perturbed(s):
        return params | {"decoder": decoder | {"embedding_VD": decoder["embedding_VD"].at[s].add(1.0)}}

    changed = [(np.asarray(run(perturbed(s))[0]) != states).any(-1) for s in range(24)]
    np.testing.assert_array_equal(np.stack(changed, axis=1), expected)


def test_previous_in_words():
    """One layer: a state depends on itself and on the item before its own; two layers reach the item before that, too."""
    user, group = BATCH["user"].reshape(-1), BATCH["group"].reshape(-1)
    t, s = np.indices((24, 24))
    same_user = (t // 12 == s // 12) & (user[t] == user[s]) & (user[t] > 0)
    distance = np.where(same_user, group[t] - group[s], -1)
    np.testing.assert_array_equal(reached("previous"), (t == s) | (distance == 1))
    np.testing.assert_array_equal(reached("previous*2"), (t == s) | (distance == 1) | (distance == 2))


@pytest.mark.parametrize("fields", [{}, {"self_key": True, "inter_positions": "item"}])
def test_states_are_those_of_plain_numpy(fields):
    fields = {"schedule": "(intra previous)*2 all_but_previous", "positions": "rotary"} | fields
    config = make_config(model=fields)
    model = make_model(config, vocabulary=24, items=3)
    params = random_params(model)
    got = jax.jit(lambda params: model.bind(params).decoder(BATCH))(params)
    np.testing.assert_allclose(got, helpers.reference_states(config.model, params["decoder"], BATCH), rtol=2e-5, atol=2e-5)


# ---- candidates, decoding, item states: the tests of those files hold for the new relations

SCHEDULES = {
    "previous": {"schedule": "previous intra previous", "self_key": True, "inter_positions": "item"},
    "all but previous": {"schedule": "intra all_but_previous recent"},
}


@pytest.fixture(params=SCHEDULES)
def name(request, monkeypatch):
    for module in (test_beam, test_candidates):
        monkeypatch.setitem(module.SCHEDULES, request.param, SCHEDULES[request.param])
    return request.param


def test_each_candidate_is_as_if_alone(name):
    test_candidates.test_each_candidate_is_as_if_alone(name)
    test_candidates.test_nothing_leaks_between_candidates(name)
    test_candidates.test_log_likelihoods_are_those_of_one_candidate_at_a_time(name)


def test_beam_search(name):
    test_beam.test_cached_states_are_those_of_whole_rows(name)
    test_beam.test_as_wide_as_the_catalogue_is_exhaustive(name)


def test_item_states_behind_a_leading_layer(monkeypatch):
    model = {"schedule": "intra previous*2", "item_states": "on"}
    monkeypatch.setitem(test_item_rows.CASES, "previous", {"model": model, "objective": {"vectors": "both"}})
    test_item_rows.test_ranking_vectors_are_the_plain_ones("previous")


def test_a_layer_that_sees_earlier_items_does_not_lead():
    """States after `previous` depend on the history: nothing may compute them once per item."""
    config = make_config(model={"schedule": "previous intra"})
    assert config.schedule.leading_intra == 0 and not config.states_by_item
    assert make_config(model={"schedule": "intra previous intra"}).schedule.leading_intra == 1
    run = make_run(config, tiny_data(users=30))
    assert "leading" not in run.finish({name: np.stack([run.rows[row][name] for row in range(4)]) for name in run.rows[0]})
    for section, fields, field in (
        ("model", {"item_states": "on"}, "model.item_states"),
        ("objective", {"vectors": "text", "text_layers": "leading"}, "objective.text_layers"),
    ):
        for schedule, refused in (("previous intra", True), ("recent intra", True), ("intra previous", False)):
            sections = {"model": {"schedule": schedule}}
            sections[section] = sections.get(section, {}) | fields
            if not refused:
                make_config(**sections)
                continue
            with pytest.raises(InputError, match=rf"config\.{field} = .* a schedule that begins with intra"):
                make_config(**sections)


def test_a_relation_that_sees_ahead_is_refused_where_tokens_are_predicted():
    schedule = {"schedule": "intra whole_history"}
    config = make_config(model=schedule)
    with pytest.raises(InputError, match=r"config\.objective\.token = 1\.0: the relation whole_history sees the token to be predicted"):
        make_config(model=schedule, objective={"token": 1.0})
    catalogue = test_beam.CATALOGUE
    model = make_model(config, catalogue.vocabulary, catalogue.items, 5)
    params = random_params(model)
    with pytest.raises(ValueError, match="without whole_history: it sees the tokens that are to be predicted"):
        log_likelihoods(model.bind(params), test_candidates.ROWS, 5)
    with pytest.raises(ValueError, match="without whole_history"):
        beam_search(model, params, make_trie(catalogue), test_beam.BATCH, 2)
    with pytest.raises(ValueError, match="'whole_history' cannot decode"):
        decode_ranges(BATCH["user"], BATCH["group"], jnp.array([12]), jnp.array([12]), False, ("whole_history",))


# ---- plans, and whole commands


def test_plan():
    pairs = visible_pairs(BATCH)
    for name in ADDED:
        by_meaning = sum(allowed_keys(name, *row).sum() for row in zip(BATCH["user"], BATCH["group"], strict=True))
        assert pairs[name] == by_meaning / 2
    assert visible_pairs(BATCH, self_key=True)["previous"] == pairs["previous"] + REAL.sum() / 2
    assert visible_pairs(BATCH, self_key=True)["recent"] == pairs["recent"]
    config = make_config(model={"schedule": "previous"}, train={"batch_rows": 4}, data={"vocabulary": 300})
    made = make_plan(config, PlanRequest("local", Assumption(items=40, item_length=4, users=30, events=6), ("training",)))
    assert made.fits("training") and made.peak("training").temporaries > 0
    planned = [made.run.rows[row] for row in range(len(made.run.rows))]
    seen = np.mean([allowed_keys("previous", row["user"], row["group"]).sum() for row in planned])
    assert 0 < seen and made.step.model["float32 highest"] == pytest.approx(4 * seen * 4 * 16 * (1 + 2.5))


def test_a_config_file_that_adds_a_relation_trains_and_ranks(tmp_path, tiny):
    """Nothing but the file knows it."""
    fields = tiny | {"model.schedule": "intra previous", "objective.token": 0.1, "train.steps": 4}
    head = f"from iam_jax.relations import Relation, register\n\nregister({PREVIOUS})\n"
    (tmp_path / "with_previous.py").write_text(head + config_text(fields))
    run_command(tmp_path, "--config=with_previous.py", "--workdir=run")
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())["results"]["model"]
    assert 0 < result["test"]["ndcg@10"] < 1
    _, message = run_command(tmp_path, "--mode=evaluate", "--workdir=run", code=2)
    assert "'previous' is not a relation; the relations are full, intra, inter, intra_both" in message


# ---- the registry


def test_what_cannot_be_registered():
    with pytest.raises(ValueError, match="the relation 'inter' belongs to iam_jax"):
        register(Relation("inter", own="past"))
    for wrong in ("", "Previous", "previous2", "previous item", "+previous", "a*2"):  # a schedule could not name it
        with pytest.raises(ValueError, match="lower-case letters and underscores"):
            Relation(wrong, own="past")
    with pytest.raises(ValueError, match="own = 'future' must be"):
        Relation("later", own="future")
    for fields in ({}, {"stop": lambda at: at.before}, {"stop": lambda at: at.before, "own": "past"}):
        with pytest.raises(ValueError, match="needs `start` or `own`"):
            Relation("nothing", **fields)


def test_a_schedule_lists_what_is_registered():
    with pytest.raises(InputError) as caught:
        parse_schedule("intra next")
    assert str(caught.value).endswith("'next' is not a relation; the relations are full, intra, inter, intra_both, " + ", ".join(ADDED))


def test_reading_a_schedule_imports_no_jax():
    program = "import sys, iam_jax.schedule as s; s.parse_schedule('(intra inter)*2'); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

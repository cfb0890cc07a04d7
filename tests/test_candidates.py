import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import allowed_keys, make_config, random_params, tiny_data
from hypothesis import given, settings
from hypothesis import strategies as st

from iam_jax.data.candidates import candidate_rows
from iam_jax.data.catalogue import Catalogue
from iam_jax.model import make_model
from iam_jax.model.attention import key_ranges
from iam_jax.ranking.likelihood import log_likelihoods

PREPARED = tiny_data(prompt=2, suffix=1)
CATALOGUE = PREPARED.catalogue
LENGTHS = CATALOGUE.lengths
HISTORIES = [np.array([0, 3, 5, 0]), np.array([6])]
CANDIDATES = [np.array([1, 5, 2, 2, 7]), np.array([4, 0])]
ROWS = candidate_rows(CATALOGUE, HISTORIES, CANDIDATES, 24, 40)
SCHEDULES = {
    "item-aware": {"schedule": "(intra inter)*2"},
    "ordinary": {"schedule": "full*3"},
    "ablations": {"schedule": "(full inter)*2 (intra full)*2"},
    "HatLLM": {"schedule": "intra full inter"},
    "inserted blocks": {"schedule": "(full full intra inter)*2"},
    "self key, item positions": {"schedule": "(intra inter)*2", "self_key": True, "inter_positions": "item"},
    "learned positions": {"schedule": "full inter", "positions": "learned", "norm": "layer", "kv_heads": 1},
    "both directions": {"schedule": "intra_both inter full", "self_key": True},
}


@functools.cache
def model_of(name):
    model = make_model(make_config(model=SCHEDULES[name]), CATALOGUE.vocabulary, CATALOGUE.items, int(LENGTHS.max()))
    return model, random_params(model)


@functools.cache
def states_of(name):
    model, params = model_of(name)
    return jax.jit(lambda batch, params=params: model.bind(params).states(batch))


def alone(history, candidate):
    """Scores the candidate as the next item of an ordinary row."""
    entries = (CATALOGUE.items, *history, CATALOGUE.items + 1, candidate)
    groups = [np.split(CATALOGUE.tokens, CATALOGUE.offsets[1:-1])[entry] for entry in entries]
    token = np.zeros(40, np.int32)
    size = sum(map(len, groups))
    token[:size] = np.concatenate(groups)
    user = (np.arange(40) < size).astype(np.int32)
    group = np.zeros(40, np.int32)
    group[:size] = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    batch = {"token": token, "user": user, "group": group, "position": np.arange(40, dtype=np.int32) * user}
    return jax.tree.map(lambda x: x[None], batch), size - len(groups[-1])


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 7), max_size=6), st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(7, 30))
def test_layout(history, candidates, max_tokens):
    history, candidates = np.array(history, int), np.array(candidates)
    row = {name: x[0].tolist() for name, x in candidate_rows(CATALOGUE, [history], [candidates], max_tokens).items()}
    kept = list(history)
    while 3 + sum(LENGTHS[kept]) + max(LENGTHS[candidates]) > max_tokens:
        kept.pop(0)
    texts = np.split(CATALOGUE.tokens, CATALOGUE.offsets[1:-1])
    groups = [texts[-2], *(texts[item] for item in kept), texts[-1], *(texts[item] for item in candidates)]
    end = 3 + sum(LENGTHS[kept])
    before = len(kept) + 2
    assert row["token"] == [token for group in groups for token in group]
    assert row["group"] == [min(g, before) for g, group in enumerate(groups) for _ in group]
    assert row["candidate"] == [max(g - before + 1, 0) for g, group in enumerate(groups) for _ in group]
    position = list(range(end)) + [end + place for item in candidates for place in range(LENGTHS[item])]
    assert row["position"] == position and set(row["user"]) == {1}


def test_by_hand():
    """A prompt of one token, items of 2, 3, 1 and a suffix of 2: the row for each template, with the history cut to fit."""
    expected = {  # (tokens of the prompt, of the suffix) -> the row
        (1, 2): {
            "token": [90, 21, 22, 23, 95, 96, 31, 11, 12],
            "group": [0, 1, 1, 1, 2, 2, 3, 3, 3],
            "position": [0, 1, 2, 3, 4, 5, 6, 6, 7],
            "candidate": [0, 0, 0, 0, 0, 0, 1, 2, 2],
        },
        (0, 2): {
            "token": [21, 22, 23, 95, 96, 31, 11, 12],
            "group": [1, 1, 1, 2, 2, 3, 3, 3],
            "position": [0, 1, 2, 3, 4, 5, 5, 6],
            "candidate": [0, 0, 0, 0, 0, 1, 2, 2],
        },
        (1, 0): {
            "token": [90, 21, 22, 23, 31, 11, 12],
            "group": [0, 1, 1, 1, 2, 2, 2],
            "position": [0, 1, 2, 3, 4, 4, 5],
            "candidate": [0, 0, 0, 0, 1, 2, 2],
        },
    }
    for (prompt, suffix), row in expected.items():
        entries = [[11, 12], [21, 22, 23], [31], [90][:prompt], [95, 96][:suffix]]
        catalogue = Catalogue(np.concatenate(entries).astype(np.int32), np.cumsum([0, *map(len, entries)]), 99, 0, "")
        for history, max_tokens in (([1], 99), ([0, 1], prompt + suffix + 3 + 2 + 1)):
            batch = candidate_rows(catalogue, [np.array(history)], [np.array([2, 0])], max_tokens)
            assert {name: x[0].tolist() for name, x in batch.items()} == row | {"user": [1] * len(row["token"])}


def test_what_does_not_fit_is_refused():
    bare = tiny_data().catalogue
    one = [np.array([0])]
    short = int(bare.lengths[0])
    suffixed = tiny_data(suffix=3).catalogue  # nothing can be predicted from a suffix alone
    for catalogue, more in ((bare, 0), (suffixed, 3)):
        for history, max_tokens in ((np.array([], int), 24), (np.array([0]), more + short)):
            with pytest.raises(ValueError, match="user 0: no prompt"):
                candidate_rows(catalogue, [history], one, max_tokens)
    for catalogue, max_tokens in ((bare, short - 1), (CATALOGUE, int(LENGTHS[0]) + 2)):  # prompt and suffix have three tokens
        with pytest.raises(ValueError, match=f"user 0: the longest candidate does not fit in {max_tokens} tokens"):
            candidate_rows(catalogue, [np.array([0])], one, max_tokens)
    with pytest.raises(ValueError, match="there is no history"):
        candidate_rows(bare, [], [], 24)
    needed = int(LENGTHS[[0, 3]].sum()) + 3 + int(LENGTHS[[1, 2]].sum())
    for slots in (needed - 1, needed):
        go = functools.partial(candidate_rows, CATALOGUE, [np.array([0, 3])], [np.array([1, 2])], 24, slots)
        if slots == needed:
            assert go()["token"].shape == (1, needed)
        else:
            with pytest.raises(ValueError, match=f"row_tokens = {slots}: a history with its candidates needs {needed}"):
                go()


def test_key_ranges_of_candidates():
    """From the definition: a candidate sees the history as the next item would, and itself, but no other candidate."""
    ranges = key_ranges(*(jnp.asarray(ROWS[name]) for name in ("user", "group", "candidate")))
    s = np.arange(40)
    for b in range(2):
        user, group, candidate = (ROWS[name][b] for name in ("user", "group", "candidate"))
        t_, s_ = np.indices((40, 40))
        for relation, (first, second) in ranges.items():
            expected = allowed_keys(relation, user, group) & ((candidate[t_] == candidate[s_]) | (candidate[s_] == 0))
            parts = [
                (s >= np.asarray(start)[b, :, None]) & (s < np.asarray(stop)[b, :, None]) for start, stop in filter(None, (first, second))
            ]
            np.testing.assert_array_equal(sum(part.astype(int) for part in parts), expected, err_msg=relation)  # disjoint, too
            assert (second is not None) == (relation == "full")


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_candidate_is_as_if_alone(name):
    states = np.asarray(states_of(name)(ROWS))
    for b, (history, candidates) in enumerate(zip(HISTORIES, CANDIDATES, strict=True)):
        for c, item in enumerate(candidates, start=1):
            batch, end = alone(history, item)
            expected = np.asarray(states_of(name)(batch))[0, end : end + LENGTHS[item]]
            np.testing.assert_allclose(states[b, ROWS["candidate"][b] == c], expected, rtol=2e-5, atol=1e-5)
            np.testing.assert_allclose(states[b, :end], np.asarray(states_of(name)(batch))[0, :end], rtol=2e-5, atol=1e-5)
    plain = ROWS | {"candidate": np.zeros_like(ROWS["candidate"])}
    # Without their numbers they would be one long item (beyond what `local` reaches: NaN).
    assert not np.allclose(np.asarray(states_of(name)(plain))[ROWS["candidate"] > 0], states[ROWS["candidate"] > 0], atol=0.01)


@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_leaks_between_candidates(name):
    """Bitwise, values and gradients, within one compiled program."""
    model, params = model_of(name)
    size = ROWS["token"].size
    embedding = np.asarray(params["decoder"]["embedding_VD"])[ROWS["token"].reshape(-1)]
    direction = np.random.default_rng(0).standard_normal((*ROWS["token"].shape, 16)).astype(np.float32)
    batch = ROWS | {"token": np.arange(size, dtype=np.int32).reshape(ROWS["token"].shape)}  # a row of the embedding for every slot
    chosen = (ROWS["candidate"] == 2)[..., None] * direction

    @jax.jit
    def run(embedding):
        def states(embedding):
            return model.bind(params | {"decoder": params["decoder"] | {"embedding_VD": embedding}}).decoder(batch)

        x, pullback = jax.vjp(states, embedding)
        return x, pullback(chosen)[0]

    x, gradient = map(np.asarray, run(embedding))
    others = (ROWS["candidate"] > 0) & (ROWS["candidate"] != 2)
    visible = (ROWS["candidate"] == 0) & (ROWS["user"] > 0)
    assert not gradient.reshape(*others.shape, -1)[others | (ROWS["user"] == 0)].any()
    assert gradient.reshape(*others.shape, -1)[visible].any(-1).any()
    for c in range(1, 6):
        mine = ROWS["candidate"] == c
        changed = (np.asarray(run(embedding + mine.reshape(-1, 1))[0]) != x).any(-1)
        assert not (changed & ~mine).any() and changed[mine].all()
    history = np.asarray(run(embedding + visible.reshape(-1, 1))[0])
    assert (history != x).any(-1)[ROWS["candidate"] > 0].any()


@pytest.mark.parametrize("name", [name for name, fields in SCHEDULES.items() if "both" not in fields["schedule"]])
def test_log_likelihoods_are_those_of_one_candidate_at_a_time(name):
    model, params = model_of(name)

    @jax.jit
    def run(batch):
        return [log_likelihoods(model.bind(params), batch, 5, chunk=16, normalize=normalize) for normalize in (False, True)]

    got, mean = map(np.asarray, run(ROWS))
    assert got.shape == (2, 5) and not got[1, 2:].any() and not mean[1, 2:].any()
    output = np.concatenate([np.asarray(part, np.float64) for part in model.bind(params).output_embedding()])
    for b, (history, candidates) in enumerate(zip(HISTORIES, CANDIDATES, strict=True)):
        for c, item in enumerate(candidates):
            batch, end = alone(history, item)
            logits = np.asarray(states_of(name)(batch), np.float64)[0, end - 1 : end - 1 + LENGTHS[item]] @ output.T
            logits -= np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) + logits.max(1, keepdims=True)
            tokens = batch["token"][0, end : end + LENGTHS[item]]
            assert tokens[-1] == CATALOGUE.vocabulary - 1
            np.testing.assert_allclose(got[b, c], logits[np.arange(len(tokens)), tokens].sum(), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(mean[b, c], got[b, c] / len(tokens), rtol=1e-6)


def test_log_likelihoods_are_refused_where_the_text_is_seen():
    model, params = model_of("both directions")
    with pytest.raises(ValueError, match="intra_both"):
        log_likelihoods(model.bind(params), ROWS, 5)

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import _norm, make_config, random_params, reference_states
from hypothesis import given, settings
from hypothesis import strategies as st

from iam_jax.data.candidates import candidate_rows
from iam_jax.data.catalogue import Catalogue
from iam_jax.model import make_model
from iam_jax.model.attention import decode_ranges
from iam_jax.ranking.beam import _Beam, _extend, _items, beam_search, history_rows, make_trie, search
from iam_jax.ranking.likelihood import log_likelihoods

END, TOKENS = 7, 24  # the boundary token; what a model is made for
# Prefixes of other texts, equal texts, a single token.
TEXTS = [[1, 2, 3], [1, 2], [4], [1, 2, 3], [1], [5, 0, 2, 6], [4], [1, 2, 0], [5, 0]]
PROMPT, SUFFIX = [3, 3], [6]


def catalogue_of(texts, prompt=PROMPT, suffix=SUFFIX, end=END):
    entries = [*([*text, end] for text in texts), prompt, suffix]
    tokens = np.array([token for entry in entries for token in entry], np.int32)
    return Catalogue(tokens, np.cumsum([0, *map(len, entries)]), end + 1, 0, "")


CATALOGUE = catalogue_of(TEXTS)
HISTORIES = [np.array([5, 3, 0]), np.array([6]), np.zeros(0, int)]
BATCH = history_rows(CATALOGUE, HISTORIES, TOKENS, 18)
SCHEDULES = {
    "item-aware": {"schedule": "(intra inter)*2"},
    "ordinary": {"schedule": "full*2"},
    "HatLLM": {"schedule": "intra full inter"},
    "inserted blocks": {"schedule": "(full full +intra +inter)*2"},
    "self key, item positions": {"schedule": "(intra inter)*2", "self_key": True, "inter_positions": "item"},
    "learned positions": {"schedule": "full inter", "positions": "learned", "norm": "layer", "kv_heads": 1},
}


@functools.cache
def model_of(name, **more):
    model = make_model(make_config(model=SCHEDULES[name] | more), CATALOGUE.vocabulary, CATALOGUE.items, 5)
    return model, random_params(model)


@functools.cache
def sums(name, **more):
    model, params = model_of(name, **more)
    batch = candidate_rows(CATALOGUE, HISTORIES, [np.arange(CATALOGUE.items)] * len(HISTORIES), TOKENS)
    return np.asarray(jax.jit(lambda batch: log_likelihoods(model.bind(params), batch, CATALOGUE.items))(batch))


def likelihoods(name, normalize=False, **more):
    """The likelihood of every item, [users, items], in one pass."""
    return sums(name, **more) / (CATALOGUE.item_lengths if normalize else 1)


def searched(name, beams, normalize=False, chunk=2048, **more):
    model, params = model_of(name, **more)
    run = jax.jit(lambda trie, batch: search(model.bind(params), trie, batch, beams, normalize=normalize, chunk=chunk))
    return jax.tree.map(np.asarray, run(make_trie(CATALOGUE), BATCH))


def distinct(texts):
    """Distinct texts in their order, each with its items."""
    found = {}
    for item, text in enumerate(texts):
        found.setdefault((*text, END), []).append(item)
    return found


# ---- the trie


def walk(trie, texts):
    """Checks every node and edge of the trie against dicts of dicts."""
    plain, seen = {}, 0
    for text in texts:
        node = plain
        for token in (*text, END):
            node = node.setdefault(token, {})
    edges, tokens, items_at, items = map(np.asarray, (trie.first_edge_N, trie.edge_token, trie.first_item_N, trie.item_I))
    level, expected_next = [(0, plain, ())], 1
    degrees, leaves, depth = [], 0, -1
    while level:
        below = []
        for node, children, prefix in level:
            seen += 1
            at = range(edges[node], edges[node + 1])
            assert [int(tokens[e]) for e in at] == sorted(children)
            assert [e + 1 for e in at] == list(range(expected_next, expected_next + len(children)))  # breadth first
            expected_next += len(children)
            degrees.append(len(children))
            leaves += not children
            assert items[items_at[node] : items_at[node + 1]].tolist() == distinct(texts).get(prefix, [])
            below += [(e + 1, children[int(tokens[e])], (*prefix, int(tokens[e]))) for e in at]
        level, depth = below, depth + 1
    assert seen == len(edges) - 1 == len(items_at) - 1 == len(tokens) + 1
    assert (trie.depth, trie.degree, trie.sequences, trie.vocabulary) == (depth, max(degrees), leaves, END + 1)


titles = st.lists(st.integers(0, 2), min_size=1, max_size=3)


@settings(deadline=None, max_examples=100)
@given(st.lists(titles, min_size=1, max_size=12))
def test_trie_is_that_of_the_texts(texts):
    walk(make_trie(catalogue_of(texts)), texts)


def test_trie_by_hand():
    """[1] and [1, 2] share an edge: root -1-> 1, -4-> 2; 1 -2-> 3, -end-> 4; 2 -end-> 5; 3 -end-> 6."""
    trie = make_trie(catalogue_of([[1, 2], [4], [1], [4]]))
    assert trie.first_edge_N.tolist() == [0, 2, 4, 5, 6, 6, 6, 6] and trie.edge_token.tolist() == [1, 4, 2, END, END, END]
    assert trie.first_item_N.tolist() == [0, 0, 0, 0, 0, 1, 3, 4] and trie.item_I.tolist() == [2, 1, 3, 0]
    assert (trie.depth, trie.degree, trie.sequences) == (3, 2, 3)


def test_trie_refuses_what_is_no_end():
    ids = Catalogue(np.arange(3, dtype=np.int32), np.array([0, 1, 2, 3, 3, 3]), 3, 0, "")
    assert make_trie(ids).depth == 1  # an id is a boundary token itself
    with pytest.raises(ValueError, match=r"item 1: its tokens are a prefix of another item's tokens"):
        make_trie(dataclasses.replace(ids, tokens=np.array([1, 2, 1], np.int32), offsets=np.array([0, 2, 3, 3, 3])))
    for offsets in ([0, 3, 3, 3, 3], [0, 0, 0]):
        with pytest.raises(ValueError, match="a trie needs at least one item, and tokens for every item"):
            make_trie(dataclasses.replace(ids, offsets=np.array(offsets)))


# ---- histories


def test_history_rows_are_those_before_all_candidates():
    everything = [np.arange(CATALOGUE.items)] * 3
    for max_tokens in (9, 15, TOKENS):
        rows = candidate_rows(CATALOGUE, HISTORIES, everything, max_tokens)
        got = history_rows(CATALOGUE, HISTORIES, max_tokens, 18)
        for b in range(3):
            before = (rows["candidate"][b] == 0) & (rows["user"][b] > 0)
            for name, x in got.items():
                assert x.dtype == np.int32 and x[b, : before.sum()].tolist() == rows[name][b, before].tolist()
                assert not x[b, before.sum() :].any()
    assert (BATCH["user"] > 0).sum(1).tolist() == [5 + 4 + 4 + 3, 5, 3]
    with pytest.raises(ValueError, match="the longest item, 5 tokens, does not fit in 7 tokens"):
        history_rows(CATALOGUE, HISTORIES, 7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_cached_states_are_those_of_whole_rows(name):
    """Two candidates of four tokens after each history, all at once or token by token from a cache."""
    model, params = model_of(name)
    candidates = np.array([0, 7])
    rows = candidate_rows(CATALOGUE, HISTORIES, [candidates] * 3, TOKENS)
    token_2T = np.array([[*TEXTS[item], END] for item in candidates])

    @jax.jit
    def run(rows, batch):
        recommender = model.bind(params)
        history_B, group_B = (batch["user"] > 0).sum(1), batch["group"].max(1) + 1
        before, cache = recommender.cached_states(batch, recommender.decoder.cache(3, 18 + 8), jnp.broadcast_to(jnp.arange(18), (3, 18)))
        begin = 18 + 4 * jnp.arange(2)

        def step(cache, t):
            whole = jnp.ones((3, 2), jnp.int32)
            position = (history_B + t)[:, None] * whole
            token = {"token": token_2T.T[t] * whole, "user": whole, "group": group_B[:, None] * whole, "position": position}
            ranges = decode_ranges(batch["user"], batch["group"], begin, begin + t, model.bind(params).config.model.self_key)
            x, cache = recommender.cached_states(token, cache, (begin + t) * whole, ranges)
            return cache, x

        return recommender.states(rows), before, jax.lax.scan(step, cache, jnp.arange(4))[1]

    token_2T = jnp.asarray(token_2T)
    whole, before, after = map(np.asarray, run(rows, BATCH))
    for b in range(3):
        n = int((BATCH["user"][b] > 0).sum())
        np.testing.assert_allclose(before[b, :n], whole[b, :n], rtol=2e-5, atol=1e-5)
        for c in range(2):
            np.testing.assert_allclose(after[:, b, c], whole[b, rows["candidate"][b] == c + 1], rtol=2e-5, atol=1e-5)


# ---- the search


def exhaustive(scores_I):
    """Items and scores, best first; items with equal texts are adjacent, in the order of the catalogue."""
    groups = sorted(distinct(TEXTS).values(), key=lambda items: -scores_I[items[0]])
    best = [float(scores_I[items[0]]) for items in groups]
    assert (np.diff(best) < -1e-3).all()  # far enough apart for one order
    return [item for items in groups for item in items], [x for x, items in zip(best, groups, strict=True) for _ in items]


@pytest.mark.parametrize("name", SCHEDULES)
def test_as_wide_as_the_catalogue_is_exhaustive(name):
    normalize = name in ("item-aware", "HatLLM")
    if name == "HatLLM":  # once with the usual compilation
        items, scores = beam_search(*model_of(name), make_trie(CATALOGUE), BATCH, len(TEXTS), normalize=normalize)
    else:
        items, scores = searched(name, len(TEXTS), normalize)
    assert items.dtype == np.int32 and scores.dtype == np.float32 and items.shape == scores.shape == (3, len(TEXTS))
    for b, expected in enumerate(likelihoods(name, normalize)):
        order, best = exhaustive(expected)
        assert items[b].tolist() == order
        np.testing.assert_allclose(scores[b], best, rtol=1e-5, atol=1e-4)
    assert np.ptp(scores[:, 0]) > 0.01  # the history counts


def test_bfloat16():
    """Scores from a cache differ from those of one pass only by rounding, and differ from those in float32."""
    items, scores = searched("HatLLM", len(TEXTS), dtype="bfloat16")
    expected = np.take_along_axis(likelihoods("HatLLM", dtype="bfloat16"), items, axis=1)
    np.testing.assert_allclose(scores, expected, atol=0.1)
    assert all(sorted(row) == list(range(len(TEXTS))) for row in items.tolist()) and (np.diff(scores) <= 0).all()
    assert np.abs(scores - np.take_along_axis(likelihoods("HatLLM"), items, axis=1)).max() > 1e-4


def next_log_probs(model_and_params, groups):
    """Log-probabilities [V] of the token after a row of groups, float64, from NumPy on the whole row."""
    model, params = model_and_params
    config = model.bind(params).config.model
    token = np.array([[token for group in groups for token in group]])
    group = np.repeat(np.arange(len(groups)), [len(group) for group in groups])[None]
    batch = {"token": token, "user": np.ones_like(token), "group": group, "position": np.arange(token.size)[None]}
    decoder = jax.tree.map(lambda x: np.asarray(x, np.float64), params["decoder"])
    x_D = _norm(config, decoder["final_norm"], reference_states(config, decoder, batch)[0, -1])
    (output_VD,) = model.bind(params).output_embedding()
    logits_V = np.asarray(output_VD, np.float64) @ x_D
    return logits_V - np.log(np.exp(logits_V).sum())


def slow_search(name, history, beams, normalize):
    """A plain implementation of beam search: [(score, item)]."""
    texts = distinct(TEXTS)

    def score(hypothesis):
        return hypothesis[0] / max(len(hypothesis[1]), 1) if normalize else hypothesis[0]

    pool = [(0.0, ())]
    while any(prefix not in texts for _, prefix in pool):
        grown = []
        for total, prefix in pool:
            if prefix in texts:
                grown.append((total, prefix))
                continue
            log_prob = next_log_probs(model_of(name), [PROMPT, *([*TEXTS[item], END] for item in history), SUFFIX, prefix])
            tokens = {text[len(prefix)] for text in texts if text[: len(prefix)] == prefix}
            grown += [(total + log_prob[token], (*prefix, token)) for token in sorted(tokens)]
        pool = sorted(grown, key=lambda hypothesis: -score(hypothesis))[:beams]
    return [(score(hypothesis), item) for hypothesis in pool for item in texts[hypothesis[1]]][:beams]


@pytest.mark.parametrize(
    ("name", "beams", "normalize", "chunk"),
    [("item-aware", 2, False, 2048), ("HatLLM", 3, True, 6), ("ordinary", 1, False, 1), ("self key, item positions", 5, True, 10)],
)
def test_narrow_beams_are_those_of_the_slow_search(name, beams, normalize, chunk):
    """One, two (with a remainder of one) or all users at a time; each score is the log-likelihood of the item."""
    items, scores = searched(name, beams, normalize, chunk)
    for b, history in enumerate(HISTORIES):
        expected = slow_search(name, history, beams, normalize)
        assert len(expected) == beams and items[b].tolist() == [item for _, item in expected]
        np.testing.assert_allclose(scores[b], [x for x, _ in expected], rtol=1e-5, atol=1e-5)
    best = [np.sort(row)[::-1][:beams] for row in likelihoods(name, normalize)]
    assert any((scores[b] < best[b] - 0.01).any() for b in range(3)) == (name != "self key, item positions")


MADE = 6  # items of the catalogues below


@functools.cache
def made_model():
    config = make_config(model={"schedule": "intra inter", "width": 8})
    model = make_model(config, END + 1, MADE, 4)
    return model, random_params(model)


def widened(trie):
    """Pads the trie to the largest possible number of nodes, so that one program fits all catalogues. Padded nodes are empty."""

    def pad(x, size, fill):
        return np.pad(x, (0, size - len(x)), constant_values=fill)

    nodes = 4 * MADE + 1
    edges, items = (pad(x, nodes + 1, x[-1]) for x in (trie.first_edge_N, trie.first_item_N))
    tokens = pad(trie.edge_token, nodes, 0)
    return dataclasses.replace(
        trie, first_edge_N=edges, first_item_N=items, edge_token=tokens, depth=4, degree=4, sequences=max(trie.sequences, MADE)
    )


@functools.cache
def made_programs():
    model, params = made_model()
    run = [jax.jit(lambda trie, batch, beams=beams: search(model.bind(params), trie, batch, beams)) for beams in (2, MADE)]
    return run, jax.jit(lambda batch: log_likelihoods(model.bind(params), batch, MADE))


@settings(deadline=None, max_examples=60)
@given(st.lists(titles, min_size=MADE, max_size=MADE), st.lists(st.integers(0, MADE - 1), min_size=1, max_size=4))
def test_only_items_that_exist(texts, history):
    """For any titles, the search returns the requested number of distinct items with their log-likelihoods, up to the full ranking."""
    catalogue, searches = catalogue_of(texts, [], []), made_programs()
    everything, history = np.arange(MADE), np.array(history)
    token_room = 2 * TOKENS
    batch, trie = history_rows(catalogue, [history], TOKENS, 20), widened(make_trie(catalogue))
    rows = candidate_rows(catalogue, [history], [everything], 20 + int(catalogue.item_lengths.max()), token_room)
    expected_I = np.asarray(searches[1](rows))[0]
    for run, beams in zip(searches[0], (2, MADE), strict=True):
        items, scores = (np.asarray(x)[0] for x in run(trie, batch))
        assert len(set(items.tolist())) == beams == len(items) and set(items.tolist()) <= set(range(MADE))
        np.testing.assert_allclose(scores, expected_I[items], rtol=1e-5, atol=1e-4)
        assert (np.diff(scores) <= 0).all()
        place = {item: at for at, item in enumerate(items.tolist())}
        for equal in distinct(texts).values():  # together, in the catalogue's order; only the last ones may be cut
            found = [place[item] for item in equal if item in place]
            assert found == list(range(found[0], found[0] + len(found))) if found else True
            assert [item for item in items if item in equal] == equal[: len(found)]
            assert len(found) in (0, len(equal)) or found[-1] == beams - 1


# ---- what users call


def test_single_item_and_id_tokens():
    """With one item in the catalogue, its score is its likelihood. With id tokens the search is one softmax over the items."""
    model, params = made_model()
    single = catalogue_of([[1]], [], [])
    items, scores = beam_search(model, params, make_trie(single), history_rows(single, [np.array([0])], TOKENS), 1)
    first, last = (next_log_probs((model, params), groups)[token] for groups, token in (([[1, END]], 1), ([[1, END], [1]], END)))
    assert items.tolist() == [[0]]
    np.testing.assert_allclose(scores, [[first + last]], rtol=1e-5)
    ids = Catalogue(np.arange(8, dtype=np.int32), np.append(np.arange(9), [8, 8]), 8, 0, "")
    batch = history_rows(ids, [np.array([3, 1])], TOKENS)
    items, scores = beam_search(model, params, make_trie(ids), batch, 8)
    expected = next_log_probs((model, params), [[3], [1]])
    assert items[0].tolist() == np.argsort(-expected).tolist()
    np.testing.assert_allclose(scores[0], np.sort(expected)[::-1], rtol=1e-5)
    with pytest.raises(FloatingPointError, match="8 of 8 scores are not finite"):
        beam_search(model, jax.tree.map(lambda x: x * jnp.nan, params), make_trie(ids), batch, 8)


def test_what_is_refused():
    model, params = model_of("item-aware")
    trie = make_trie(CATALOGUE)
    for beams in (0, len(TEXTS) + 1):
        with pytest.raises(ValueError, match=f"beams = {beams}: must be between 1 and the number of items, 9"):
            beam_search(model, params, trie, BATCH, beams)
    both = make_model(make_config(model={"schedule": "intra_both inter"}), CATALOGUE.vocabulary, CATALOGUE.items)
    with pytest.raises(ValueError, match="intra_both"):
        beam_search(both, random_params(both), trie, BATCH, 2)
    with pytest.raises(ValueError, match="without candidates"):
        beam_search(model, params, trie, BATCH | {"candidate": BATCH["user"]}, 2)
    with pytest.raises(ValueError, match="the vocabulary of the trie is 9, that of the model 8"):
        beam_search(model, params, dataclasses.replace(trie, vocabulary=9), BATCH, 2)
    with pytest.raises(ValueError, match="row 1 has no tokens"):
        beam_search(model, params, trie, BATCH | {"user": BATCH["user"] * np.array([[1], [0], [1]])}, 2)
    learned, params = model_of("learned positions")
    batch = history_rows(CATALOGUE, [np.array([0] * 5)], TOKENS + 5)
    with pytest.raises(ValueError, match="24 learned positions, but the longest history and item need 27"):
        beam_search(learned, params, trie, batch, 2)


def test_nothing_is_missing_in_silence():
    """A place without an item has the score -inf; a NaN among a user's hypotheses makes all of them NaN. `beam_search` raises for both."""
    trie = make_trie(catalogue_of([[1], [2], [2]]))  # leaves 3 and 4
    items, scores = _items(trie, jnp.array([4, 0]), jnp.array([-1, -jnp.inf]), beams=3)
    assert items.tolist()[:2] == [1, 2] and scores.tolist() == [-1, -1, -np.inf]
    number = jnp.array([1, 1])
    for first in (-1, jnp.nan):
        beam = _Beam(jnp.array([first, -2.0]), number, jnp.array([1, 2]), number, number)
        sums = jax.jit(functools.partial(_extend, trie, (jnp.zeros((8, 4)),), width=2, normalize=False))(jnp.ones((2, 4)), beam).sum_BW
        np.testing.assert_allclose(sums, np.array([-1, -2]) - np.log(8) if first == -1 else np.array([np.nan] * 2), rtol=1e-6)

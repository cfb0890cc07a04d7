import dataclasses
import hashlib
import itertools
import pathlib

import numpy as np
import polars as pl
import pytest
from helpers import write_shop
from hypothesis import given, settings
from hypothesis import strategies as st

from iam_jax.data.splits import TEST, TRAIN, VALIDATION, Events
from iam_jax.ranking import baselines
from iam_jax.ranking.baselines import evaluate, item_knn, last_item_transitions, popularity, rank_scores
from iam_jax.ranking.metrics import ranking_metrics

DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"


def events_of(histories, items, held_out=2):
    """One list of items per user; the last two events of users with three or more are validation and test."""

    def labels(n):
        return [TRAIN] * (n - held_out) + [VALIDATION, TEST][:held_out] if n > held_out else [TRAIN] * n

    lengths = [len(h) for h in histories]
    return Events(
        user_ids=np.array([f"u{u}" for u in range(len(histories))], object),
        item_ids=np.array([f"i{i}" for i in range(items)], object),
        item=np.array([i for h in histories for i in h], np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        timestamp=np.concatenate([np.arange(n) for n in [*lengths, 0]]).astype(np.int64),
        label=np.array([x for n in lengths for x in labels(n)], np.uint8),
    )


def slow_rank(score, target, history, filter_seen):
    others = [i for i in range(len(score)) if i != target and not (filter_seen and i in history)]
    return 1 + sum(score[i] > score[target] for i in others), sum(score[i] == score[target] for i in others)


def history_of(events, target):
    user = max(u for u in range(len(events.user_ids)) if events.offsets[u] <= target)
    return events.item[events.offsets[user] : target].tolist()


def slow_scores(kind, histories, events):
    """{target: scores} by counting with dictionaries; Markov scores are (count, popularity) pairs."""
    items, train = len(events.item_ids), {}
    for user, history in enumerate(histories):
        begin = events.offsets[user]
        train[user] = [i for k, i in enumerate(history) if events.label[begin + k] == TRAIN]
    popular = [sum(h.count(i) for h in train.values()) for i in range(items)]
    scores = {}
    for user, history in enumerate(histories):
        for k in range(len(history)):
            pairs = [(a, b) for h in train.values() for a, b in itertools.pairwise(h)]
            count = [pairs.count((history[k - 1], i)) if k else 0 for i in range(items)]
            scores[events.offsets[user] + k] = popular if kind == "popularity" else list(zip(count, popular, strict=True))
    return scores


@st.composite
def catalogues(draw):
    items = draw(st.integers(2, 7))
    return items, draw(st.lists(st.lists(st.integers(0, items - 1), min_size=1, max_size=7), min_size=1, max_size=6))


@settings(max_examples=60, deadline=None)
@given(catalogues(), st.booleans(), st.sampled_from(["popularity", "markov"]))
def test_counts_against_dictionaries(catalogue, filter_seen, kind):
    """Repeated items, users with one event, items without events, every event as a target."""
    items, histories = catalogue
    events = events_of(histories, items)
    scorer = popularity(events) if kind == "popularity" else last_item_transitions(events)
    targets = np.arange(len(events.item))
    rank, ties = evaluate(scorer, events, targets, filter_seen)
    dense = evaluate(scorer.__call__, events, targets, filter_seen)  # a bound method has no `ranks`: the dense path
    scores = slow_scores(kind, histories, events)
    expected = [slow_rank(scores[e], events.item[e], history_of(events, e), filter_seen) for e in targets]
    assert list(zip(rank, ties, strict=True)) == expected
    assert list(zip(*dense, strict=True)) == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([np.int64, np.float64, np.float32]))
def test_rank_scores_against_a_loop(seed, filter_seen, dtype):
    rng = np.random.default_rng(seed)
    n, items = rng.integers(1, 6), rng.integers(1, 9)
    scores = rng.integers(0, 4, size=(n, items)).astype(dtype)
    target = rng.integers(items, size=n)
    seen = [rng.integers(items, size=rng.integers(0, 8)) for _ in range(n)]  # with repeats, and sometimes the target
    pairs = np.repeat(np.arange(n), [len(s) for s in seen]), np.concatenate(seen)
    rank, ties = rank_scores(scores, target, pairs if filter_seen else None)
    assert rank.dtype == ties.dtype == np.int64
    for k in range(n):
        assert (rank[k], ties[k]) == slow_rank(scores[k], target[k], set(seen[k].tolist()), filter_seen)


def test_by_hand():
    # Training events: 0 1 | 0 1 | 0 2; popularity: 0: 3, 1: 2, 2: 1, 3: 0. After 0 come 1 twice and 2 once.
    events = events_of([[0, 1, 2, 0], [0, 1, 3, 3], [0, 2, 0, 1]], 4)
    assert popularity(events).base.tolist() == [3, 2, 1, 0]
    scores = last_item_transitions(events)(events, np.array([0, 1, 2, 11]))
    assert scores.tolist() == [[3, 2, 1, 0], [3, 2 * 4 + 2, 1 * 4 + 1, 0], [3, 2, 1, 0], [3, 10, 5, 0]]
    test = np.array([3, 7, 11])
    # user 0 returns to 0 after 0 1 2: seen 1 and 2 are out, 0 (seen, but the target) beats 3.
    # user 1 repeats 3 after 0 1 3: every other candidate but 2 is seen.
    rank, ties = evaluate(popularity(events), events, test)
    assert rank.tolist() == [1, 2, 1] and ties.tolist() == [0, 0, 0]
    rank, _ = evaluate(popularity(events), events, test, filter_seen=False)
    assert rank.tolist() == [1, 4, 2]


def test_a_transition_does_not_cross_users_or_the_training_period():
    events = events_of([[0, 1], [2, 3, 4, 5]], 6)
    scorer = last_item_transitions(events)
    pairs = {(int(a), int(b)) for a in range(6) for b in scorer.item[scorer.offsets[a] : scorer.offsets[a + 1]]}
    assert pairs == {(0, 1), (2, 3)}  # not 1→2 (two users), 3→4 or 4→5 (held out)


def test_the_last_item_may_be_a_validation_event():
    """1→2 occurs in the training events of user 0; user 1 has item 1 only as its validation event."""
    events = events_of([[1, 2, 0, 0], [3, 1, 2]], 5)
    rank, _ = evaluate(last_item_transitions(events), events, np.array([6]))
    assert rank.tolist() == [1]


def slow_knn(events, k, decay, last):
    """[targets, items] from dense matrices: cosines of the columns of users x items, the k largest per row, a loop over each history."""
    users, items = len(events.user_ids), len(events.item_ids)
    X = np.zeros((users, items))
    popular = np.zeros(items)
    for user in range(users):
        train = [e for e in range(events.offsets[user], events.offsets[user + 1]) if events.label[e] == TRAIN]
        for e in train:
            popular[events.item[e]] += 1
        for e in train[-last:]:
            X[user, events.item[e]] = 1
    norm = np.maximum(np.sqrt(np.outer(X.sum(0), X.sum(0))), 1e-9)
    cosine = X.T @ X / norm
    np.fill_diagonal(cosine, 0)
    for a in range(items):
        nearest = sorted(range(items), key=lambda i: (-cosine[a, i], i))[:k]
        cosine[a, [i for i in range(items) if i not in nearest]] = 0
    scores = np.zeros((len(events.item), items))
    for target in range(len(events.item)):
        weight = 1.0
        for item in history_of(events, target)[::-1][:last]:
            scores[target] += weight * cosine[item]
            weight *= decay
    return scores, popular


@settings(max_examples=60, deadline=None)
@given(
    catalogues(), st.booleans(), st.integers(1, 4), st.sampled_from([0.25, 0.8, 1.0]), st.integers(1, 5), st.sampled_from([1, 5, 1 << 22])
)
def test_item_knn_against_dense_matrices(catalogue, filter_seen, k, decay, last, entries):
    """In blocks of any size. Items that are no neighbours of the history follow, ordered by popularity."""
    items, histories = catalogue
    events = events_of(histories, items)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "ENTRIES", entries)
        scorer = item_knn(events, k, decay, last)
        targets = np.arange(len(events.item))
        got, (expected, popular) = scorer(events, targets), slow_knn(events, k, decay, last)
        np.testing.assert_allclose(np.where(got > 0, got, 0) / 2**40, expected, atol=1e-11)
        assert (got[expected == 0] == np.broadcast_to(popular - popular.max() - 1, got.shape)[expected == 0]).all()
        ranks = evaluate(scorer, events, targets, filter_seen)
        dense = evaluate(scorer.__call__, events, targets, filter_seen)
    np.testing.assert_array_equal(ranks, dense)
    seen = [history_of(events, e) for e in targets]
    slow = [slow_rank(got[e], events.item[e], seen[e], filter_seen) for e in targets]
    assert list(zip(*ranks, strict=True)) == slow


def test_item_knn_by_hand():
    # Training: u0 0 1, u1 0 1 1, u2 0 2, u3 3 (and u0 to u2 have two more events each).
    events = events_of([[0, 1, 3, 2], [0, 1, 1, 3, 3], [0, 2, 1, 2], [3]], 5)
    scorer = item_knn(events, k=2, decay=0.5)
    neighbours = {
        a: list(zip(*(x[scorer.offsets[a] : scorer.offsets[a + 1]].tolist() for x in (scorer.item, scorer.similarity)), strict=True))
        for a in range(5)
    }
    assert neighbours == {
        0: [(1, pytest.approx(2 / 6**0.5)), (2, pytest.approx(1 / 3**0.5))],
        1: [(0, pytest.approx(2 / 6**0.5))],
        2: [(0, pytest.approx(1 / 3**0.5))],
        3: [],
        4: [],
    }
    one = 2.0**40
    # u0's test event has the history 0 1 3: item 3, the last, has no neighbour; 1 is one step back, 0 two. Popularity: 3 3 1 1 0.
    assert scorer(events, np.array([3])).tolist() == [
        [round(one * 0.5 * 2 / 6**0.5), round(one * 0.25 * 2 / 6**0.5), round(one * 0.25 / 3**0.5), -3, -4]
    ]
    assert item_knn(events, k=1).item.tolist() == [1, 0, 0]
    for wrong in ({"k": 0}, {"decay": 0.0}, {"decay": 1.1}, {"last": 0}, {"last": 8193}):
        with pytest.raises(ValueError, match="must be 1 or more"):
            item_knn(events, **wrong)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_an_error(value):
    scores = np.zeros((2, 3))
    scores[1, 2] = value
    with pytest.raises(ValueError, match="item 2 in row 1"):
        rank_scores(scores, np.array([0, 0]))


def test_chunks_and_progress(monkeypatch):
    rng = np.random.default_rng(3)
    events = events_of([rng.integers(50, size=rng.integers(1, 20)).tolist() for _ in range(40)], 50)
    targets = rng.permutation(len(events.item))
    table = rng.integers(0, 9, size=(len(events.item), 50))

    def scorer(_, chunk):
        assert len(chunk) * 50 <= baselines.BLOCK
        return table[chunk]

    whole = evaluate(scorer, events, targets), evaluate(last_item_transitions(events), events, targets)
    monkeypatch.setattr(baselines, "BLOCK", 350)
    monkeypatch.setattr(baselines, "_CHUNK", 9)
    done = []
    parts = evaluate(scorer, events, targets, progress=done.append), evaluate(last_item_transitions(events), events, targets)
    np.testing.assert_array_equal(whole, parts)
    assert sum(done) == len(targets) and done[0] == 7


def test_no_targets_and_no_training_events():
    events = events_of([[0, 1, 2]], 4)
    events = dataclasses.replace(events, label=np.full(3, TEST, np.uint8))
    empty = evaluate(popularity(events), events, np.zeros(0, np.int64))
    assert empty[0].shape == empty[1].shape == (0,)
    for scorer in (popularity(events), last_item_transitions(events), item_knn(events)):
        rank, ties = evaluate(scorer, events, np.arange(3))
        assert rank.tolist() == [1, 1, 1] and ties.tolist() == [3, 2, 1]


def leave_one_out(folder):
    """Events of a table, ordered by time and then by the hash of user and item, written independently of the package's split."""
    rows = pl.read_csv(folder / "interactions.tsv.gz", separator="\t", infer_schema_length=0)
    keyed = sorted(
        (u, float(t), hashlib.sha256(f"{u}\t{i}".encode()).hexdigest(), i)
        for u, i, t in zip(rows["user"], rows["item"], rows["timestamp"], strict=True)
    )
    items = sorted(pl.read_csv(folder / "items.tsv.gz", separator="\t", infer_schema_length=0, quote_char=None)["item"])
    index, histories = {item: k for k, item in enumerate(items)}, {}
    for user, _, _, item in keyed:
        histories.setdefault(user, []).append(index[item])
    return events_of(list(histories.values()), len(items))


@pytest.mark.skipif(not (DATA / "amazon2014-toys").is_dir(), reason="the Amazon Toys tables are not beside this checkout")
def test_toys():
    events = leave_one_out(DATA / "amazon2014-toys")
    assert (len(events.user_ids), len(events.item_ids), len(events.item)) == (19124, 11758, 165247)
    ndcg = ndcg_of_all(events)
    assert 0.003 < ndcg["popularity"] < 0.015 and 3 * ndcg["popularity"] < ndcg["markov"] < 0.06 and ndcg["markov"] < ndcg["knn"] < 0.06


def test_a_made_up_shop(tmp_path):
    """What test_toys asserts, but for the values, wherever it runs."""
    ndcg = ndcg_of_all(leave_one_out(write_shop(tmp_path / "shop")))
    assert ndcg["popularity"] < ndcg["markov"] and ndcg["popularity"] < ndcg["knn"]


def ndcg_of_all(events):
    """NDCG@10 of the last events by each baseline; some of them alone have the same ranks."""
    targets = events.offsets[1:] - 1
    scorers = {"popularity": popularity(events), "markov": last_item_transitions(events), "knn": item_knn(events)}
    ranks = {name: evaluate(scorer, events, targets) for name, scorer in scorers.items()}
    ndcg = {name: ranking_metrics(*pair)["ndcg@10"].mean() for name, pair in ranks.items()}
    few = targets[::40]
    for name, scorer in scorers.items():
        np.testing.assert_array_equal(np.array(ranks[name])[:, ::40], evaluate(scorer.__call__, events, few))
    return ndcg

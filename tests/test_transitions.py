"""Transitions and rules against the formulas: by hand, and by loops over dictionaries; integer for integer, whatever the blocks."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_baselines import DATA, catalogues, events_of, history_of, leave_one_out, slow_rank

from iam_jax.data.splits import TRAIN
from iam_jax.ranking import baselines, transitions
from iam_jax.ranking.baselines import evaluate
from iam_jax.ranking.metrics import ranking_metrics
from iam_jax.ranking.transitions import PairCounts, history_weights, rules

SETTINGS = {"window": 2, "power": 0.5, "tau": 0.5, "last": 3, "decay": 0.5, "share": 0.8, "popularity": 0.3}


def scorer_of(events, **changes):
    return transitions.transitions(events, PairCounts(events), **SETTINGS | changes)


def slow_counts(events, window, power):
    """{(h, a): C} and {h: pairs that begin with h}."""
    counts, begun = {}, {}
    for user in range(len(events.user_ids)):
        at = range(events.offsets[user], events.offsets[user + 1])
        train = [int(events.item[e]) for e in at if events.label[e] == TRAIN]
        for k, h in enumerate(train):
            for d, a in enumerate(train[k + 1 : k + 1 + window], start=1):
                counts[h, a] = counts.get((h, a), 0) + round(d**-power * 2**30) / 2**30
                begun[h] = begun.get(h, 0) + 1
    return counts, begun


def slow_weights(n, decay, share):
    falling = [decay**age for age in range(n)]
    return [share * w / sum(falling) + (1 - share) / n for w in falling]


def slow_scores(events, target, matrix, base, last, decay, share, unit):
    """(integers, floats) [items]: matrix (h, a) -> value, base a -> value; the integers from the rounded terms."""
    history = history_of(events, target)[::-1][:last]
    weights = slow_weights(len(history), decay, share) if history else []
    items = range(len(events.item_ids))
    exact = [base(a) + sum(w * matrix(h, a) for w, h in zip(weights, history, strict=True)) for a in items]
    rounded = [
        round(base(a) * 2**16 / unit) + sum(round(w * 2**16) * round(matrix(h, a) / unit) for w, h in zip(weights, history, strict=True))
        for a in items
    ]
    return rounded, exact


def test_smoothed_transitions_by_hand():
    # Training: 0 1 2 | 0 1 (and each user has two more events). Pairs within two events: 0→1 twice at distance 1, 1→2 at 1, 0→2 at 2.
    events = events_of([[0, 1, 2, 3, 0], [0, 1, 3, 0]], 4)
    scorer = scorer_of(events, tau=0.5, popularity=0.3)
    far = 2**-0.5
    weight = 0.8 / 1.5 + 0.2 / 2, 0.8 * 0.5 / 1.5 + 0.2 / 2  # of the last item and the one before, of a history of two items
    # Target 2, the third event of user 0, has the history 0 1. I = 4 and tau = 0.5 · 4, so C · I / tau is 2 C.
    expected = [
        0.3 * math.log(2),
        0.3 * math.log(2) + weight[1] * math.log(1 + 2 * 2),
        weight[0] * math.log(1 + 2 * 1) + weight[1] * math.log(1 + 2 * far),
        0.0,  # item 3 has no training event and counts as an item with one
    ]
    np.testing.assert_allclose(scorer(events, np.array([2]))[0] * scorer.unit, expected, atol=3e-5)
    # Without a history, only popularity is left.
    np.testing.assert_allclose(scorer(events, np.array([0]))[0] * scorer.unit, [0.3 * math.log(2)] * 2 + [0, 0], atol=1e-8)
    # The test event of user 1: the last three items of 0 1 3, the validation event included, have the ages 2, 1, 0.
    falling = np.array([0.25, 0.5, 1.0])
    weight = 0.8 * falling / falling.sum() + 0.2 / 3
    third = weight[0] * math.log(1 + 2 * far) + weight[1] * math.log(3)
    np.testing.assert_allclose(scorer(events, np.array([8]))[0, 2] * scorer.unit, third, atol=3e-5)


def test_sequential_rules_by_hand():
    events = events_of([[0, 1, 2, 3, 0], [0, 1, 3, 0]], 4)
    scorer = rules(events, PairCounts(events), window=2, last=1, decay=1.0)
    # Of three pairs that begin with 0, two are 0→1 at distance 1 and one is 0→2 at distance 2.
    np.testing.assert_allclose(scorer(events, np.array([1]))[0] * scorer.unit, [0, 2 / 3, 0.5 / 3, 0], atol=1e-9)
    rank, ties = evaluate(scorer, events, np.array([1, 3, 4]), filter_seen=False)
    # Target 3 follows 2, with which no pair begins: popularity 2 2 1 0. Target 0 follows 3, too.
    assert rank.tolist() == [1, 4, 1] and ties.tolist() == [0, 0, 1]


@settings(max_examples=60, deadline=None)
@given(
    catalogues(),
    st.booleans(),
    st.sampled_from([1, 2, 6]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.02, 4.0]),
    st.sampled_from([(1, 1.0, 1.0), (3, 0.5, 0.8), (9, 0.85, 0.6)]),
    st.sampled_from([-0.4, 0.0, 0.3]),
    st.sampled_from([1, 7, 1 << 22]),
    st.booleans(),
)
def test_ranks_against_loops(catalogue, filter_seen, window, power, tau, kernel, popularity, block, dense):
    """Both baselines; every event is a target; in blocks of any size, with a sparse and a dense matrix."""
    items, histories = catalogue
    events = events_of(histories, items)
    last, decay, share = kernel
    weights = {"last": last, "decay": decay, "share": share}
    targets, popular = np.arange(len(events.item)), events.train_counts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transitions, "_PAIRS", block)
        patch.setattr(transitions, "_SCORES", block)
        patch.setattr(baselines, "ENTRIES", block)
        patch.setattr(transitions, "_DENSE", 1 << 24 if dense else 0)
        counts = PairCounts(events)
        of = {
            "transitions": transitions.transitions(events, counts, window, power, tau, popularity=popularity, **weights),
            "rules": rules(events, counts, window, **weights),
        }
        ranks = {name: evaluate(scorer, events, targets, filter_seen) for name, scorer in of.items()}
    counted, _ = slow_counts(events, window, power)
    inverse, begun = slow_counts(events, window, 1.0)
    terms = {
        "transitions": (
            lambda h, a: math.log1p(counted.get((h, a), 0) / tau),
            lambda a: popularity * math.log(max(popular[a], 1)),
            2.0**-30,
        ),
        "rules": (lambda h, a: inverse.get((h, a), 0) / begun.get(h, 1), lambda a: int(popular[a]) * 2.0**-51, 2.0**-35),
    }
    for name, (matrix, base, unit) in terms.items():
        slow = [slow_scores(events, e, matrix, base, *kernel, unit) for e in targets]
        assert of[name](events, targets).tolist() == [rounded for rounded, _ in slow]
        np.testing.assert_allclose(of[name](events, targets) * of[name].unit, [exact for _, exact in slow], atol=2e-4)
        expected = [
            slow_rank(rounded, events.item[e], history_of(events, e), filter_seen) for e, (rounded, _) in zip(targets, slow, strict=True)
        ]
        assert list(zip(*ranks[name], strict=True)) == expected


def test_pairs_are_of_training_events_of_one_user():
    events = events_of([[0, 1], [2, 3, 4, 5]], 6)
    assert {tuple(pair) for pair in np.argwhere(PairCounts(events)(5, 1.0).toarray()).tolist()} == {(0, 1), (2, 3)}


def test_blocks_bound_the_pairs_that_are_counted_at_the_same_time(monkeypatch):
    rng = np.random.default_rng(0)
    events = events_of([(rng.integers(30, size=rng.integers(5, 60)) ** 2 // 30).tolist() for _ in range(50)], 30)
    whole = PairCounts(events)(20, 0.5)
    sizes, sums = [], baselines.sums_by_key
    monkeypatch.setattr(transitions, "_PAIRS", 300)
    monkeypatch.setattr(transitions, "sums_by_key", lambda key, *args: (sizes.append(len(key)), sums(key, *args))[1])
    counts = PairCounts(events)
    assert (counts(20, 0.5) != whole).nnz == 0
    # Sums of an item's blocks have at most one key for each item of the catalogue from both sides.
    assert max(sizes) <= 300 and len(sizes) > 50 and counts.begun(20).max() > 300


def test_a_large_catalogue_keeps_the_largest_counts(monkeypatch):
    rng = np.random.default_rng(1)
    events = events_of([rng.integers(80, size=40).tolist() for _ in range(30)], 80)
    whole = PairCounts(events)(30, 0.0).toarray()
    monkeypatch.setattr(transitions, "_KEPT", 80 * 60)
    kept = PairCounts(events)(30, 0.0)
    assert np.diff(kept.indptr).max() == 60 and (whole > 0).sum(1).max() > 60
    for row, few in zip(whole, kept.toarray(), strict=True):
        largest = sorted(np.flatnonzero(row), key=lambda a, row=row: (-row[a], a))[:60]
        assert np.flatnonzero(few).tolist() == sorted(largest) and (few[largest] == row[largest]).all()


def test_counts_of_several_settings_are_kept_within_a_bound(monkeypatch):
    events = events_of([np.arange(20).tolist()] * 3, 20)
    monkeypatch.setattr(transitions, "_KEPT", 2000)
    counts = PairCounts(events)
    first = counts(2, 1.0)
    assert counts(2, 1.0) is first and counts(3, 1.0) is counts(3, 1.0)
    monkeypatch.setattr(transitions, "_KEPT", first.nnz + 1)
    counts(1, 1.0)
    assert counts(2, 1.0) is not first


def test_settings_out_of_range():
    events = events_of([[0, 1, 2]] * 3, 3)
    for change, message in (
        ({"tau": 0.0}, "tau = 0.0 must be above 0"),
        ({"window": 0}, "window = 0 must be 1 or more"),
        ({"last": 0}, "last = 0 must be 1 or more"),
        ({"decay": 0.0}, r"decay = 0.0 in \(0, 1\]"),
        ({"share": 1.5}, "share = 1.5"),
        ({"popularity": 99.0}, "a term must be below 60"),
    ):
        with pytest.raises(ValueError, match=message):
            scorer_of(events_of([[0, 1, 0, 1]] * 9, 3) if "popularity" in change else events, **change)
    assert history_weights(50, 0.85, 0.8).sum(1)[1:] == pytest.approx(2**16, rel=1e-3)


def test_without_training_events_or_targets():
    events = events_of([[0, 1, 2]], 4)
    events.label[:] = 2
    for scorer in (scorer_of(events), rules(events, PairCounts(events), 5, 3, 0.5)):
        assert [part.shape for part in evaluate(scorer, events, np.zeros(0, np.int64))] == [(0,), (0,)]
        rank, ties = evaluate(scorer, events, np.arange(3))
        assert rank.tolist() == [1, 1, 1] and ties.tolist() == [3, 2, 1]


@pytest.mark.skipif(not (DATA / "amazon2014-toys").is_dir(), reason="the Amazon Toys tables are not beside this checkout")
def test_toys():
    """The settings of a search on validation. (The whole search takes longer than a test may.)"""
    events = leave_one_out(DATA / "amazon2014-toys")
    changes = {"window": 10, "power": 0.5, "tau": 4.0, "last": 50, "decay": 0.85, "share": 1.0, "popularity": 0.0}
    rank, ties = evaluate(scorer_of(events, **changes), events, events.offsets[1:] - 1)
    assert ranking_metrics(rank, ties)["ndcg@10"].mean() == pytest.approx(0.0496, abs=2e-4)

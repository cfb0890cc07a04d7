import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iam_jax.ranking import metrics
from iam_jax.ranking.metrics import format_table, paired_difference, ranking_metrics, summarize

ranks_and_ties = st.lists(st.tuples(st.integers(1, 70), st.integers(0, 70)), min_size=1, max_size=20)


def at_position(r, k):
    """HR, Precision, NDCG and MRR of a target at position r."""
    return (1.0, 1 / k, 1 / math.log2(r + 1), 1 / r) if r <= k else (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("rank,ties", [(1, 0), (1, 3), (3, 2), (4, 4), (6, 3), (1, 5)])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_every_order_of_the_tied_block(rank, ties, k):
    block = range(ties + 1)  # number 0 is the target
    orders = list(itertools.permutations(block))
    expected = np.mean([at_position(rank + order.index(0), k) for order in orders], axis=0)
    got = ranking_metrics(np.array([rank]), np.array([ties]), [k])
    np.testing.assert_allclose([got[f"{name}@{k}"][0] for name in ("hr", "precision", "ndcg", "mrr")], expected, atol=1e-14)


def test_values_by_hand():
    got = ranking_metrics(np.array([1, 2, 10, 11, 9]), np.array([0, 0, 0, 0, 3]), [10])
    np.testing.assert_allclose(got["hr@10"], [1, 1, 1, 0, 0.5])
    np.testing.assert_allclose(got["precision@10"], [0.1, 0.1, 0.1, 0, 0.05])
    np.testing.assert_allclose(got["mrr@10"], [1, 0.5, 0.1, 0, (1 / 9 + 1 / 10) / 4])
    np.testing.assert_allclose(got["ndcg@10"], [1, 0.6309297535714575, 0.2890648263178879, 0, (0.30103 + 0.28906483) / 4], rtol=1e-7)


def test_a_constant_scorer_gets_the_expectation_of_a_random_one():
    items, k = 37, 10
    constant = ranking_metrics(np.array([1]), np.array([items - 1]), [k])
    random = ranking_metrics(np.arange(1, items + 1), np.zeros(items, int), [k])  # every position is equally likely
    for name, value in constant.items():
        assert value[0] == pytest.approx(random[name].mean(), abs=1e-14)
    assert constant["hr@10"][0] == pytest.approx(10 / 37)


@given(ranks_and_ties)
def test_hr_is_the_clip_formula_and_metrics_are_ordered(pairs):
    rank, ties = np.array(pairs).T
    got = ranking_metrics(rank, ties, [1, 5, 20, 50])
    for k in (1, 5, 20, 50):
        np.testing.assert_allclose(got[f"hr@{k}"], np.clip((k - rank + 1) / (ties + 1), 0, 1), atol=1e-12)
        assert np.all(got[f"mrr@{k}"] <= got[f"ndcg@{k}"] + 1e-12) and np.all(got[f"ndcg@{k}"] <= got[f"hr@{k}"] + 1e-12)
        assert np.all(got[f"mrr@{k}"] >= 0)
    for small, large in itertools.pairwise((1, 5, 20, 50)):
        for name in ("hr", "ndcg", "mrr"):
            assert np.all(got[f"{name}@{small}"] <= got[f"{name}@{large}"] + 1e-12)


@given(ranks_and_ties)
def test_metrics_do_not_increase_with_rank_or_ties(pairs):
    rank, ties = np.array(pairs).T
    base = ranking_metrics(rank, ties, [10])
    for worse in (ranking_metrics(rank + 1, ties, [10]), ranking_metrics(rank, ties + 1, [10])):
        assert all(np.all(worse[name] <= base[name] + 1e-12) for name in base)


def test_narrow_and_unsigned_integers_do_not_wrap():
    got = ranking_metrics(np.array([1, 200], np.uint8), np.array([0, 100], np.uint8), [50])
    assert got["hr@50"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "rank,ties,ks",
    [([0], [0], [10]), ([1], [-1], [10]), ([1, 2], [0], [10]), ([1.5], [0], [10]), ([1], [0], [0]), ([[1]], [[0]], [1])],
)
def test_bad_values_raise(rank, ties, ks):
    with pytest.raises(ValueError):
        ranking_metrics(np.array(rank), np.array(ties), ks)


def example(users=40, events=150, seed=1):
    rng = np.random.default_rng(seed)
    user = rng.integers(users, size=events)
    return user, rng.integers(1, 30, size=events), rng.integers(0, 3, size=events), rng.random(events) < 0.2


def test_bootstrap_equals_a_slow_loop():
    user, rank, ties, cold = example()
    got = summarize(user, rank, ties, cold, ks=[10], resamples=60, seed=7)
    value = ranking_metrics(rank, ties, [10])["ndcg@10"]
    ids = sorted(set(user.tolist()))
    rng, means = np.random.default_rng(7), []
    for _ in range(60):
        drawn = [ids[i] for i in rng.integers(len(ids), size=len(ids))]
        events = [v for u in drawn for v in value[user == u]]  # a user who is drawn twice counts twice, with all events
        means.append(sum(events) / len(events))
    assert got["ndcg@10"] == pytest.approx(value.mean())
    assert got["ndcg@10_ci"] == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist())
    assert got["users"] == len(ids) and got["events"] == 150
    assert got["tie_rate"] == pytest.approx((ties > 0).mean())
    assert got["cold"]["events"] == cold.sum() and got["cold"]["ndcg@10"] == pytest.approx(value[cold].mean())
    assert json.loads(json.dumps(got)) == got


def test_blocks_do_not_change_the_resamples(monkeypatch):
    whole = summarize(*example(), ks=[5])
    monkeypatch.setattr(metrics, "_BLOCK", 200)  # five resamples at a time
    blocked = summarize(*example(), ks=[5])
    assert blocked["hr@5_ci"] == pytest.approx(whole["hr@5_ci"], abs=1e-12)


def test_clusters_widen_the_interval():
    """Ten identical events of a user contain as much information as one."""
    hit = np.tile([1, 100], 50)
    alone = summarize(np.arange(100), hit, 0 * hit, hit < 0, ks=[10])
    clustered = summarize(np.repeat(np.arange(100), 10), np.repeat(hit, 10), np.zeros(1000, int), np.zeros(1000, bool), ks=[10])
    as_if_independent = summarize(np.arange(1000), np.repeat(hit, 10), np.zeros(1000, int), np.zeros(1000, bool), ks=[10])

    def width(summary):
        return summary["hr@10_ci"][1] - summary["hr@10_ci"][0]

    assert clustered["hr@10_ci"] == pytest.approx(alone["hr@10_ci"])
    assert width(alone) == pytest.approx(2 * 1.96 * 0.05, rel=0.15)  # standard error of the binomial distribution: sqrt(.25 / 100)
    assert width(as_if_independent) < 0.5 * width(clustered)


def test_same_seed_same_interval_whatever_the_order_and_type_of_the_users():
    user, rank, ties, cold = example()
    order = np.random.default_rng(0).permutation(len(user))
    names = np.array([f"{u:03}" for u in user], object)
    base = summarize(user, rank, ties, cold, ks=[10])
    moved = summarize(names[order], rank[order], ties[order], cold[order], ks=[10])
    assert moved["hr@10_ci"] == pytest.approx(base["hr@10_ci"], abs=1e-12)
    assert summarize(user, rank, ties, cold, ks=[10], seed=1)["hr@10_ci"] != base["hr@10_ci"]
    assert summarize(user, rank, ties, cold, ks=[10]) == base


def test_paired_difference():
    user, rank, ties, _ = example()
    a, b = ranking_metrics(rank, ties, [10]), ranking_metrics(rank + 3, ties, [10])
    difference = paired_difference(user, a, b)
    assert difference["ndcg@10"] == pytest.approx(a["ndcg@10"].mean() - b["ndcg@10"].mean())
    assert 0 < difference["ndcg@10_ci"][0] < difference["ndcg@10"] < difference["ndcg@10_ci"][1]
    mirrored = paired_difference(user, b, a)
    assert mirrored["ndcg@10_ci"] == pytest.approx([-x for x in difference["ndcg@10_ci"][::-1]], abs=1e-12)
    nothing = paired_difference(user, a, a)
    assert nothing["hr@10"] == 0 and nothing["hr@10_ci"] == [0, 0]
    # A constant advantage has an interval of width zero, although the interval of each model is wide.
    shifted = {name: value + 0.25 for name, value in a.items()}
    assert paired_difference(user, shifted, a)["hr@10_ci"] == pytest.approx([0.25, 0.25])
    with pytest.raises(ValueError, match=r"the two models have different metrics: \["):
        paired_difference(user, a, {"hr@10": b["hr@10"]})
    with pytest.raises(ValueError, match="the two models have different events"):
        paired_difference(user, a, {name: value[1:] for name, value in b.items()})


def test_lengths_must_agree():
    user, rank, ties, cold = example()
    with pytest.raises(ValueError):
        summarize(user[1:], rank, ties, cold)
    with pytest.raises(ValueError):
        summarize(user, rank, ties, cold[1:])


def test_no_events_keep_the_keys_with_nulls():
    empty = np.zeros(0, int)
    nothing = summarize(empty, empty, empty, empty.astype(bool))
    assert nothing["users"] == 0 and nothing["events"] == 0 and nothing["tie_rate"] is None and nothing["hr@10"] is None
    assert nothing["hr@10_ci"] is None and nothing["cold"] == {"events": 0} | {k: None for k in nothing["cold"] if k != "events"}
    assert nothing.keys() == summarize(*example()).keys()
    assert json.loads(json.dumps(nothing)) == nothing


def test_new_and_repeated_targets_apart():
    user, rank, ties, cold = example()
    repeated = np.arange(len(rank)) % 3 == 0
    got, value = summarize(user, rank, ties, cold, ks=[10], repeated=repeated), ranking_metrics(rank, ties, [10])["ndcg@10"]
    for part, chosen in (("new", ~repeated), ("repeated", repeated)):
        assert got[part]["events"] == chosen.sum() and got[part]["ndcg@10"] == pytest.approx(value[chosen].mean())
    assert got == summarize(user, rank, ties, cold, ks=[10]) | {part: got[part] for part in ("new", "repeated")}
    with pytest.raises(ValueError, match="new has 149 entries, rank 150"):
        summarize(user, rank, ties, cold, repeated=repeated[1:])


def test_no_cold_events():
    user, rank, ties, _ = example()
    assert summarize(user, rank, ties, np.zeros(150, bool), resamples=2)["cold"]["hr@10"] is None


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 20), st.integers(0, 4), st.booleans()), min_size=1, max_size=30))
def test_summary_is_within_bounds(rows):
    got = summarize(*(np.array(column) for column in zip(*rows, strict=True)), ks=[1, 10], resamples=20)
    for name in ("hr@1", "ndcg@10", "mrr@10", "precision@10"):
        low, high = got[f"{name}_ci"]
        assert -1e-12 <= low <= high <= 1 + 1e-12 and -1e-12 <= got[name] <= 1 + 1e-12


def test_the_interval_of_many_users():
    """The interval is close to the normal approximation: about four standard errors wide, around the mean."""
    users = 20_000
    rank = np.random.default_rng(0).integers(1, 1000, size=users)
    got = summarize(np.arange(users), rank, np.zeros(users, int), np.zeros(users, bool), resamples=400)
    (low, high), mean = got["hr@10_ci"], got["hr@10"]
    assert low < mean < high and (high - low) / (mean * (1 - mean) / users) ** 0.5 == pytest.approx(2 * 1.96, rel=0.25)


def test_table():
    user, rank, ties, cold = example()
    model = summarize(user, rank, ties, cold)
    text = format_table({"model": model, "popularity": {"hr@10": 0.125, "hr@10_ci": [0.1, 0.15]}, "empty": {"hr@10": None}})
    lines = text.splitlines()
    assert lines[0].split() == "model HR@10 [95 %] NDCG@10 [95 %] HR@50 MRR@10".split()
    assert len(lines) == 5 and "0.1250 [0.1000, 0.1500]" in lines[3] and lines[4].split() == ["empty", "-", "-", "-", "-"]
    assert f"{model['ndcg@10']:.4f} [{model['ndcg@10_ci'][0]:.4f}" in lines[2]
    start = lines[0].index("NDCG@10")
    assert all(line[start - 2 : start] == "  " and line[start] != " " for line in lines if len(line) > start)  # columns line up
    assert format_table({}).splitlines()[0].startswith("model")

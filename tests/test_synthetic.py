import dataclasses
import itertools

import numpy as np
import polars as pl
import pytest

from iam_jax.data.sources import synthetic
from iam_jax.data.sources.synthetic import LIKED, VALUES, generate
from iam_jax.data.splits import TEST, TRAIN, VALIDATION, Events
from iam_jax.errors import InputError
from iam_jax.ranking.baselines import evaluate, last_item_transitions, popularity
from iam_jax.ranking.metrics import ranking_metrics


def events_of(tables, keep=True):
    """Leave-one-out events of the tables' interactions, and the items that remain."""
    rows = tables.interactions.filter(keep).sort("user", "timestamp")
    item_ids = np.array(sorted(set(rows["item"])), object)
    user_ids, lengths = np.unique(rows["user"].to_numpy().astype(object), return_counts=True)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    label = np.full(len(rows), TRAIN, np.uint8)
    label[offsets[1:] - 1], label[offsets[1:] - 2] = TEST, VALIDATION
    item = np.searchsorted(item_ids, rows["item"].to_numpy().astype(object)).astype(np.int32)
    return Events(user_ids, item_ids, item, offsets, rows["timestamp"].to_numpy(), label)


def ndcg(scorer, events):
    return ranking_metrics(*evaluate(scorer, events, events.offsets[1:] - 1))["ndcg@10"].mean()


@pytest.fixture(scope="module")
def shop():
    return generate()


@pytest.fixture(scope="module")
def events(shop):
    return events_of(shop.tables())


def positions(shop):
    return np.nonzero(shop.item >= 0)


def test_default_sizes_and_tables(shop):
    tables = shop.tables()
    assert tables.interactions.schema == {"user": pl.String, "item": pl.String, "timestamp": pl.Int64}
    assert set(tables.items.schema.values()) == {pl.String} and tables.items.columns == ["item", "title", "category", "brand"]
    assert tables.items.height == tables.items["item"].n_unique() == 800 and tables.interactions["user"].n_unique() == 2000
    assert tables.interactions.null_count().sum_horizontal().item() == 0
    assert 23_000 < tables.interactions.height < 25_000  # a mean of 12
    assert tables.interactions.select("user", "item").is_unique().all()  # no user buys an item twice
    gaps = tables.interactions.select(pl.col("timestamp").diff().over("user").drop_nulls())["timestamp"]
    assert gaps.min() >= 3600
    assert set(tables.interactions["item"]) <= set(tables.items["item"])


def test_titles_contain_the_attributes(shop):
    words = [word for values in VALUES.values() for value in values for word in value]
    assert len(words) == len(set(words))  # no word means two things
    meaning = {word: (facet, k) for facet, values in VALUES.items() for k, value in enumerate(values) for word in value}
    for k, title in enumerate(shop.title):
        read = dict(meaning[word] for word in title.replace(",", "").split() if word != "by")
        assert read == {facet: shop.value[facet][k] for facet in VALUES}
    first = shop.tables().items.row(0, named=True)
    assert meaning[first["category"]] == ("category", shop.value["category"][0]) and first["brand"] in first["title"]


def test_the_same_seed_gives_the_same_tables(shop, monkeypatch):
    tables = shop.tables()
    assert generate().tables().fingerprint == tables.fingerprint
    assert generate(seed=1).tables().fingerprint != tables.fingerprint
    monkeypatch.setattr(synthetic, "_BLOCK", 800 * 300)  # the purchases are drawn for 300 users at a time
    assert generate().tables().fingerprint == tables.fingerprint
    # These values must never change, so that results on this shop can be cited.
    assert tables.fingerprint == "f2ec5fc3f080a3d1cb35911974a45018ba9f55a9db1cb1840b543038bd1d9d89"


def test_probabilities(shop):
    user, position = positions(shop)
    few = slice(0, None, 7)
    p = shop.probabilities(user[few], position[few])
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-12)
    assert p.min() == 0 and np.all(p[np.arange(len(p)), shop.item[user[few], position[few]]] > 0)
    for row, (u, k) in enumerate(zip(user[few][:200], position[few][:200], strict=True)):
        assert np.all(p[row, shop.item[u, :k]] == 0) and np.count_nonzero(p[row]) == 800 - k


def slow_probabilities(shop, user, position):
    """The equation of the module docstring, item by item."""
    history = shop.item[user, :position].tolist()
    category = shop.value["category"]
    odds = []
    for i in range(len(shop.title)):
        o = int(shop.popularity[i])
        for facet in LIKED:
            o *= shop.taste if shop.liked[facet][user, shop.value[facet][i]] else 1
        if history and category[i] == shop.follows[category[history[-1]]]:
            o *= shop.after_last
        if len(history) > 1 and category[i] == shop.skips[category[history[-2]]]:
            o *= shop.after_before
        odds.append(0 if i in history else o)
    p = np.array(odds) / sum(odds)
    if history and (partner := shop.partner[history[-1]]) not in history:
        p *= 1 - shop.partner_permille / 1000
        p[partner] += shop.partner_permille / 1000
    return p


def test_probabilities_against_the_equation(shop):
    for user, position in itertools.product((0, 17, 1999), (0, 1, 2, 5)):
        got = shop.probabilities(np.array([user]), np.array([position]))[0]
        np.testing.assert_allclose(got, slow_probabilities(shop, user, position), rtol=1e-12)


def test_purchases_follow_the_probabilities(shop):
    """If items are drawn from p, p(item) − Σ p² has mean zero; the same holds for other functions of item and p."""
    user, position = positions(shop)
    p = shop.probabilities(user, position)
    item = shop.item[user, position]
    partner, free = shop.partners(user, position)
    popular = shop.popularity > 5
    liked = shop.liked["brand"][:, shop.value["brand"]][user]
    row = np.arange(len(user))
    for observed, expected in (
        (p[row, item], (p * p).sum(1)),
        (popular[item], p[:, popular].sum(1)),
        (liked[row, item], (p * liked).sum(1)),
        ((item == partner) & free, np.where(free, p[row, partner], 0)),
    ):
        difference = observed - expected
        assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(len(difference))
        assert observed.std() > 0


def test_partners_match(shop):
    """The partner belongs to the next category, and no other item there shares more attributes."""
    category = shop.value["category"]
    assert np.all(category[shop.partner] == shop.follows[category])
    for i in range(0, 800, 50):
        rivals = np.flatnonzero(category == shop.follows[category[i]])
        common = [sum(shop.value[f][i] == shop.value[f][j] for f in LIKED) for j in rivals]
        assert common[rivals.tolist().index(shop.partner[i])] == max(common)
    for cycle in (shop.follows, shop.skips):
        seen = list(itertools.accumulate(range(7), lambda c, _, cycle=cycle: int(cycle[c]), initial=0))
        assert sorted(seen) == list(range(8)) and cycle[seen[-1]] == seen[0]  # all 8 categories, then the first again


def test_the_oracle_is_best_and_needs_tastes_and_transitions(shop, events):
    best, tastes, transitions = (ndcg(shop.oracle(*flags).scores, events) for flags in ((True, True), (True, False), (False, True)))
    popular, markov = ndcg(popularity(events), events), ndcg(last_item_transitions(events), events)
    # The module docstring contains these values.
    assert [round(float(x), 3) for x in (best, tastes, transitions, markov, popular)] == [0.321, 0.235, 0.097, 0.075, 0.009]


@pytest.mark.parametrize("ablation", [{"taste": 1}, {"after_last": 1, "after_before": 1, "partner_permille": 0}])
def test_an_ablated_generator_is_less_predictable(shop, events, ablation):
    ablated = generate(**ablation)
    ablated_events = events_of(ablated.tables())
    best = ndcg(ablated.oracle().scores, ablated_events)
    assert best < (0.3 if "taste" in ablation else 0.8) * ndcg(shop.oracle().scores, events)
    blind = ablated.oracle(tastes="taste" not in ablation, transitions="taste" in ablation)
    assert ndcg(blind.scores, ablated_events) == pytest.approx(best, abs=1e-12)  # the removed effect has no value in this shop


def test_the_oracle_finds_users_and_items_by_id(shop):
    """After a filter removes users and items, the probabilities of a purchase do not change."""
    tables = shop.tables()
    whole = events_of(tables)
    part = events_of(tables, (pl.col("user") > "u0000100") & ~pl.col("item").str.ends_with("7"))
    assert len(part.user_ids) == 1899 and len(part.item_ids) == 720
    target = part.offsets[1:][:50] - 1
    scores = shop.oracle().scores(part, target)
    for row, e in enumerate(target):
        user = np.searchsorted(whole.user_ids, part.user_ids[row])
        begin, end = whole.offsets[user], whole.offsets[user + 1]
        item = np.searchsorted(whole.item_ids, part.item_ids[part.item[e]])
        same = begin + int(np.flatnonzero(whole.item[begin:end] == item)[0])
        columns = np.searchsorted(whole.item_ids, part.item_ids)
        np.testing.assert_array_equal(scores[row], shop.oracle().scores(whole, np.array([same]))[0, columns])
    strange = dataclasses.replace(part, item_ids=np.array(["x", *part.item_ids[1:]], object))
    with pytest.raises(ValueError, match="'x'"):
        shop.oracle().scores(strange, target)
    with pytest.raises(ValueError, match="not a purchase"):
        shop.oracle().scores(dataclasses.replace(part, item=np.roll(part.item, 100)), target)


@pytest.mark.parametrize("mean", [3, 3.4, 10.5, 20])
def test_lengths(mean):
    lengths = generate(users=4000, items=100, events_per_user=mean).length
    assert lengths.min() >= 3 and abs(lengths.mean() - mean) < 0.4 and lengths.max() <= max(3, 1.5 * mean + 2)


@pytest.mark.parametrize(
    "arguments",
    [{"users": 0}, {"events_per_user": 2}, {"items": 20}, {"taste": 0}, {"after_last": 1000}, {"partner_permille": 1001}],
)
def test_bad_arguments_raise(arguments):
    with pytest.raises(InputError, match=r"data\.synthetic"):
        generate(**arguments)


def test_a_tiny_shop():
    """With few items per category, some categories are empty and some items have no partner."""
    shop = generate(users=5, items=12, events_per_user=3)
    user, position = positions(shop)
    np.testing.assert_allclose(shop.probabilities(user, position).sum(1), 1)
    assert (shop.length == 3).all()

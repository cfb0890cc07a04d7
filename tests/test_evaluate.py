"""Ranks against plain loops, integer for integer: every number here is exact in float32."""

import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from helpers import make_config, random_params, tiny_data

from iam_jax.config import DataConfig, MeshConfig
from iam_jax.data.prepare import Prepared
from iam_jax.data.splits import TEST, TRAIN, VALIDATION, Events, Split, make_split
from iam_jax.data.tables import Tables
from iam_jax.devices.mesh import make_mesh
from iam_jax.model import make_model
from iam_jax.ranking import baselines, core, evaluate, metrics
from iam_jax.ranking.evaluate import Evaluator, evaluate_all, format_results, validation_subset
from iam_jax.ranking.scores import rank_catalogue

POLL = {"poll": lambda: None, "label": ""}


def slow_rank(score, target, left_out):
    others = [i for i in range(len(score)) if i != target and i not in left_out]
    return 1 + sum(score[i] > score[target] for i in others), sum(score[i] == score[target] for i in others)


# ---- the jitted function alone


@pytest.mark.parametrize("chunk", [1, 5, 12, 36, 37, 100])
def test_rank_catalogue_equals_loops_whatever_the_chunk(chunk):
    rng = np.random.default_rng(0)
    h, v = rng.integers(-2, 3, (23, 3)), rng.integers(-2, 3, (37, 3))
    target = rng.integers(37, size=23)
    target[:2] = 0, 36  # the ends of the catalogue
    seen = [[i for i in rng.permutation(37)[: rng.integers(9)] if i != target[x]] for x in range(23)]
    padded = np.array([row + [-1] * (9 - len(row)) for row in seen], np.int32)
    expected = [slow_rank(h[x] @ v.T, target[x], seen[x]) for x in range(23)]
    assert sum(ties > 0 for _, ties in expected) > 5
    assert expected != [slow_rank(h[x] @ v.T, target[x], []) for x in range(23)]
    rank, ties, finite = jax.jit(rank_catalogue, static_argnames="chunk")(jnp.float32(h), jnp.float32(v), target, padded, chunk=chunk)
    assert list(zip(rank.tolist(), ties.tolist(), strict=True)) == expected
    assert finite.all()


# ---- the evaluator, with a model of integers


class TokenSums:
    """A recommender whose state is the sum of the embeddings of the user's tokens so far."""

    def __init__(self, params):
        self.params = params

    def leading_states(self, rows, chunks):
        return self.params["embedding"][rows["token"]].reshape(-1, 4)

    def states(self, batch, key=None, leading_XD=None, items=None):
        same = batch["user"][:, :, None] == batch["user"][:, None, :]
        x_BSD = self.params["embedding"][batch["token"]] if leading_XD is None else leading_XD[batch["slot"]]
        return jnp.where(jnp.tril(same)[..., None], x_BSD[:, None], 0).sum(2)

    def project(self, x):
        return x

    def table(self, trained):
        return self.params["table"]


def integers(prepared, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"embedding": (prepared.catalogue.vocabulary, 4), "table": (prepared.catalogue.items, 4)}
    return {name: jnp.float32(rng.integers(-2, 3, shape)) for name, shape in shapes.items()}


def make_evaluator(prepared, made=None, mesh=None, **sections):
    config = make_config(**sections)
    return Evaluator(made or SimpleNamespace(bind=TokenSums), config, prepared, mesh or make_mesh(MeshConfig()))


def tokens_of(prepared, item):
    return prepared.catalogue.tokens[prepared.catalogue.offsets[item] : prepared.catalogue.offsets[item + 1]].tolist()


def history_of(events, target):
    user = max(u for u in range(len(events.user_ids)) if events.offsets[u] <= target)
    return events.item[events.offsets[user] : target].tolist()


def recent(prepared, history, slots):
    """The most recent items that fit."""
    kept = []
    for item in reversed(history):
        if sum(len(tokens_of(prepared, i)) for i in [*kept, item]) > slots:
            break
        kept.insert(0, item)
    return kept


def slow_ranks(prepared, params, targets, filter_seen, slots):
    embedding, table = (np.asarray(params[name], int) for name in ("embedding", "table"))
    ranks = []
    for target in targets:
        history = history_of(prepared.events, target)
        tokens = [token for item in recent(prepared, history, slots) for token in tokens_of(prepared, item)]
        score = table @ embedding[tokens].sum(0)
        ranks.append(slow_rank(score, prepared.events.item[target], history if filter_seen else []))
    return ranks


@pytest.mark.parametrize(("filter_seen", "item_states"), [(True, "on"), (True, "off"), (False, "on")])
@pytest.mark.parametrize(("slots", "batch_rows", "chunk", "scores"), [(24, 32, 8192, 1 << 24), (64, 1, 3, 0), (24, 3, 4, 0), (9, 2, 1, 0)])
def test_ranks_depend_on_no_packing_batch_or_chunk(monkeypatch, filter_seen, item_states, slots, batch_rows, chunk, scores):
    prepared = tiny_data(users=12)
    params, targets = integers(prepared), np.concatenate([prepared.events.targets(label) for label in (VALIDATION, TEST)])
    monkeypatch.setattr(core, "_SCORES", scores)  # 0: eight targets at a time
    settings = {"filter_seen": filter_seen, "batch_rows": batch_rows, "chunk_items": chunk}
    evaluator = make_evaluator(prepared, data={"row_tokens": slots}, model={"item_states": item_states}, eval=settings)
    assert (evaluator.leading_states(params, evaluator.rows(targets)) is not None) == (item_states == "on")
    rank, ties = evaluator.rank(params, targets)
    expected = slow_ranks(prepared, params, targets, filter_seen, slots)
    assert list(zip(rank.tolist(), ties.tolist(), strict=True)) == expected

    histories = [history_of(prepared.events, target) for target in targets]
    repeated = [prepared.events.item[target] in history for target, history in zip(targets, histories, strict=True)]
    assert any(repeated) and not all(repeated)  # so that a target left out with the seen items would show
    cut = [recent(prepared, history, slots) != history for history in histories]
    assert any(cut) == (slots == 9)
    if filter_seen:
        assert expected != slow_ranks(prepared, params, targets, False, slots)


def tied_data(ties, **sizes):
    """tiny_data with three events of a user at each time, split in this order of ties."""
    prepared = tiny_data(**sizes)
    events = prepared.events
    table = pl.DataFrame(
        {
            "user": events.user_ids[events.user].tolist(),
            "item": events.item_ids[events.item].tolist(),
            "timestamp": (np.arange(len(events.item)) - events.offsets[events.user]) // 3,
        }
    )
    items = pl.DataFrame({"item": events.item_ids.tolist()})
    split = make_split(Tables(table, items, "events", "items", ""), DataConfig(ties=ties), lambda items: np.ones(len(items), bool))
    return Prepared(split, prepared.catalogue)


def test_exact_ranks_under_every_order_of_ties():
    found = {}
    for ties in ("hash", "file", "item"):
        prepared = tied_data(ties, users=12)
        params, targets = integers(prepared), prepared.events.targets(TEST)
        rank, tied = make_evaluator(prepared).rank(params, targets)
        found[ties] = list(zip(rank.tolist(), tied.tolist(), strict=True))
        assert found[ties] == slow_ranks(prepared, params, targets, True, 24)
    assert found["hash"] != found["file"] != found["item"] != found["hash"]


@pytest.mark.parametrize("ties", ["hash", "file", "item"])
def test_a_random_scorer_does_not_see_the_order_of_ties(ties):
    """Its mean is what a constant scorer gets."""
    events = tied_data(ties, users=12, items=30).events
    targets, rng = events.targets(TEST), np.random.default_rng(0)
    of = {}
    for name, draw, count in (("random", rng.random, 300), ("constant", np.ones, 1)):
        ranks = [baselines.evaluate(lambda _, at, draw=draw: draw((len(at), 30)), events, targets) for _ in range(count)]
        of[name] = [np.mean([metrics.ranking_metrics(*pair)[metric] for pair in ranks]) for metric in ("hr@10", "ndcg@10")]
    assert of["random"] == pytest.approx(of["constant"], abs=0.03)


@pytest.mark.parametrize("ties", ["hash", "file", "item"])
def test_a_constant_scorer_gets_what_a_random_one_expects(ties):
    prepared = tied_data(ties, users=12, items=30)
    targets = prepared.events.targets(TEST)
    evaluator = make_evaluator(prepared)
    params = integers(prepared) | {"table": jnp.zeros((30, 4))}
    summary = evaluate.summarize(prepared, evaluator.config, targets, evaluator.rank(params, targets))
    candidates = [30 - len(set(history_of(prepared.events, t)) - {prepared.events.item[t]}) for t in targets]
    assert len(set(candidates)) > 1
    for k in (1, 5, 10, 20, 50):  # a random order puts the target at each of its n places equally often
        gains = {
            "hr": lambda r: 1,
            "precision": lambda r, k=k: 1 / k,
            "ndcg": lambda r: 1 / math.log2(r + 1),
            "mrr": lambda r: 1 / r,
        }
        for name, gain in gains.items():
            expected = np.mean([sum(gain(r) for r in range(1, min(k, n) + 1)) / n for n in candidates])
            assert summary[f"{name}@{k}"] == pytest.approx(expected, rel=1e-12)
    assert summary["tie_rate"] == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_an_error_with_the_users_name(value):
    prepared = tiny_data(users=12, vocabulary=60)
    evaluator, params, targets = make_evaluator(prepared), integers(prepared), prepared.events.targets(TEST)
    table = params["table"].at[:, 0].set(1)
    evaluator.rank(params | {"table": table}, targets)
    holds = [{t for item in history_of(prepared.events, target) for t in tokens_of(prepared, item)} for target in targets]
    token = min(set.union(*holds) - holds[0])
    held = [token in tokens for tokens in holds]
    broken = {"embedding": params["embedding"].at[token, 0].set(value), "table": table}
    with pytest.raises(FloatingPointError, match=f"u{held.index(True):03}"):
        evaluator.rank(broken, targets)


def test_histories_are_read_as_each_alone():
    prepared = tiny_data(users=12)
    config = make_config()
    model = make_model(config, prepared.catalogue.vocabulary, prepared.catalogue.items)
    params, events = random_params(model), prepared.events
    targets = np.setdiff1d(np.arange(len(events.item)), events.offsets[:-1])
    evaluator = make_evaluator(prepared, model)
    packed = evaluator.history_vectors(params, targets, None, **POLL)
    (rows,) = evaluator._rows.values()
    assert len(rows) < len(targets) / 2  # rows do hold several users

    alone = {name: np.zeros((len(targets), 24), np.int32) for name in ("token", "user", "group", "position")}
    last = np.zeros(len(targets), int)
    for n, target in enumerate(targets):
        groups = [tokens_of(prepared, item) for item in history_of(events, target)]
        token = [t for group in groups for t in group]
        last[n] = len(token) - 1
        alone["token"][n, : len(token)], alone["user"][n, : len(token)] = token, 1
        alone["group"][n, : len(token)] = [g for g, group in enumerate(groups, 1) for _ in group]
        alone["position"][n, : len(token)] = np.arange(len(token))
    recommender = model.bind(params)
    expected = recommender.project(jax.jit(recommender.states)(alone)[np.arange(len(targets)), last])
    np.testing.assert_allclose(packed, expected, rtol=1e-4, atol=1e-5)


# ---- the files


def temporal_data():
    """Four users; validation and test hold several events of a user or none, and v's first event is a test event."""
    label = {
        "u": [TRAIN, TRAIN, VALIDATION, VALIDATION, TEST, TEST],
        "v": [TEST, TEST],
        "w": [TRAIN, TRAIN],
        "x": [TRAIN, TEST],
    }
    tiny = tiny_data(items=8)
    sizes = [len(labels) for labels in label.values()]
    events = Events(
        np.array(list(label), object),
        tiny.events.item_ids,
        np.array([0, 1, 2, 0, 3, 7, 1, 4, 5, 2, 6, 1], np.int32),
        np.concatenate([[0], np.cumsum(sizes)]),
        np.concatenate([10 * np.arange(size) for size in sizes]),
        np.array([x for labels in label.values() for x in labels], np.uint8),
    )
    return Prepared(Split(events, None, "a1b2", ()), tiny.catalogue)


@pytest.fixture
def temporal(tmp_path, capsys):
    prepared = temporal_data()
    oracle = baselines.popularity(prepared.events)  # any scorer
    evaluator = make_evaluator(prepared, data={"split": "temporal", "t1": "1", "t2": "2"}, eval={"resamples": 50})
    params = integers(prepared)
    returned = evaluate_all(evaluator, params, 12, tmp_path, oracle)
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert saved == returned
    return SimpleNamespace(
        prepared=prepared,
        params=params,
        saved=saved,
        ranks=pl.read_parquet(tmp_path / "ranks.parquet"),
        printed=capsys.readouterr().out,
    )


def test_temporal_targets_are_events_with_all_earlier_ones_as_history(temporal):
    events, ranks = temporal.prepared.events, temporal.ranks
    targets = [2, 3, 4, 5, 7, 11]  # v's first event has no history
    assert ranks["split"].to_list() == ["validation"] * 2 + ["test"] * 4
    assert ranks["user"].to_list() == ["u", "u", "u", "u", "v", "x"]
    assert ranks["timestamp"].to_list() == events.timestamp[targets].tolist()
    assert ranks["target"].to_list() == [f"i{item:03}" for item in (2, 0, 3, 7, 4, 1)]
    expected = slow_ranks(temporal.prepared, temporal.params, targets, True, 24)
    assert list(zip(ranks["rank"], ranks["ties"], strict=True)) == expected
    assert ranks["cold"].to_list() == [i not in (0, 1, 5, 2, 6) for i in (2, 0, 3, 7, 4, 1)]
    assert ranks["repeated"].to_list() == [False, True, False, False, False, False]  # u: 0 1 2 0 3 7
    assert ranks.schema == {
        "split": pl.String, "user": pl.String, "timestamp": pl.Int64, "target": pl.String,
        "rank": pl.Int64, "ties": pl.Int64, "cold": pl.Boolean, "repeated": pl.Boolean,
    }  # fmt: skip


def test_the_test_events_can_be_left_alone(temporal, tmp_path):
    config = {"data": {"split": "temporal", "t1": "1", "t2": "2"}, "eval": {"resamples": 50, "test": False}}
    evaluation = evaluate_all(make_evaluator(temporal.prepared, **config), temporal.params, 12, tmp_path)
    assert evaluation["results"]["model"] == {"validation": temporal.saved["results"]["model"]["validation"]}
    assert evaluation["protocol"] == temporal.saved["protocol"]
    assert pl.read_parquet(tmp_path / "ranks.parquet").equals(temporal.ranks.filter(pl.col("split") == "validation"))


def test_evaluation_json_holds_the_protocol_and_every_model(temporal):
    saved = temporal.saved
    assert saved["split_sha256"] == "a1b2" and saved["step"] == 12
    assert saved["protocol"] == {
        "split": "temporal", "filter_seen": True, "candidates": 8, "k_core": 0, "ties": "hash", "duplicates": "keep",
        "ks": [1, 5, 10, 20, 50], "context_items": 1, "ranking": "item",
    }  # fmt: skip
    names = [f"{name}@{k}" for name in ("hr", "precision", "ndcg", "mrr") for k in (1, 5, 10, 20, 50)]
    assert list(saved["results"]) == ["model", "popularity", "last_item", "item_knn", "transitions", "rules", "oracle"]
    for result in saved["results"].values():
        assert list(result) == ["validation", "test"]
        for summary in result.values():
            assert set(summary) == {"users", "events", "tie_rate", "cold", "new", "repeated", *names, *(f"{name}_ci" for name in names)}
            assert all(set(summary[part]) == {"events", *names} for part in ("cold", "new", "repeated"))
            for name in names:
                low, high = summary[f"{name}_ci"]
                assert 0 <= low <= summary[name] <= high <= 1
    assert saved["results"]["oracle"] == saved["results"]["popularity"] != saved["results"]["model"]
    test = saved["results"]["model"]["test"]
    assert (test["users"], test["events"], test["cold"]["events"]) == (3, 4, 3)
    validation = saved["results"]["model"]["validation"]
    assert (validation["new"]["events"], validation["repeated"]["events"], test["repeated"]["events"]) == (1, 1, 0)
    assert "test: 3 users, 4 events, 8 candidates, step 12" in temporal.printed
    assert [line.split()[0] for line in temporal.printed.splitlines()[5:]] == [
        "model",
        "popularity",
        "last_item",
        "item_knn",
        "transitions",
        "rules",
        "oracle",
    ]


def test_metrics_follow_from_ranks_parquet(temporal):
    for split in ("validation", "test"):
        part = temporal.ranks.filter(pl.col("split") == split)
        summary = temporal.saved["results"]["model"][split]
        for k in (1, 5, 10):
            hr = [min(max((k - rank + 1) / (ties + 1), 0), 1) for rank, ties in zip(part["rank"], part["ties"], strict=True)]
            assert summary[f"hr@{k}"] == pytest.approx(np.mean(hr), rel=1e-12)
            if split == "test":
                assert summary["cold"][f"hr@{k}"] == pytest.approx(np.mean(np.array(hr)[part["cold"]]), rel=1e-12)
        users, rank, ties, cold, repeated = (part[name].to_numpy() for name in ("user", "rank", "ties", "cold", "repeated"))
        assert metrics.summarize(users, rank, ties, cold, (1, 5, 10, 20, 50), 50, 0, repeated) == summary


def test_without_an_event_to_evaluate(tmp_path):
    prepared = temporal_data()
    prepared.events.label[:] = TRAIN
    evaluation = evaluate_all(make_evaluator(prepared), integers(prepared), 1, tmp_path)
    assert evaluation["results"]["model"] == {}
    assert format_results(evaluation).startswith("nothing was evaluated: no user has a validation or test event")


def test_the_validation_subset_is_whole_users_and_always_the_same():
    prepared = tiny_data(users=30)
    events, every = prepared.events, prepared.events.targets(VALIDATION)

    def subset(users, seed=0):
        return validation_subset(events, make_config(eval={"validation_users": users, "seed": seed})).tolist()

    assert subset(0) == subset(30) == subset(99) == every.tolist()
    assert len(subset(7)) == 7 and set(subset(7)) < set(every.tolist())
    assert subset(7) == subset(7) != subset(7, seed=1)
    several = temporal_data().events
    several.label[several.label == TEST] = VALIDATION  # u: 4 events, v and x one each
    sizes = {seed: len(validation_subset(several, make_config(eval={"validation_users": 1, "seed": seed}))) for seed in range(20)}
    assert set(sizes.values()) == {1, 4}

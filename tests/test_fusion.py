"""A model fused with smoothed transitions against dense NumPy: ranks, lists and scores on one device and on eight; the choice of the
weight; the same ranks in evaluation, scoring and the Python API. Eight devices run in another process, which prints JSON."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import polars as pl
import pytest
from helpers import on_devices, tiny_data
from test_evaluate import history_of, integers, make_evaluator, recent, tokens_of
from test_main import run

import iam_jax
from iam_jax import InputError
from iam_jax.config import MeshConfig, get_config, resolve
from iam_jax.data.splits import TEST, VALIDATION, Split
from iam_jax.devices.mesh import make_mesh
from iam_jax.ranking import fusion
from iam_jax.ranking.baselines import rank_scores
from iam_jax.ranking.choice import targets_of_choice
from iam_jax.ranking.evaluate import evaluate_all, seen_lists
from iam_jax.ranking.fusion import Fusion
from iam_jax.ranking.transitions import PairCounts, transitions
from iam_jax.serving.offline import ScoreRequest, score

K = 9
WEIGHT = 2.0
SETTINGS = {"window": 2, "power": 0.5, "tau": 0.5, "last": 3, "decay": 0.5, "share": 0.8, "popularity": 0.3}


def shop():
    """61 items: not divisible by eight devices, nor by a chunk."""
    return tiny_data(users=20, items=61, cold=3)


def sums_of(events):
    return transitions(events, PairCounts(events), **SETTINGS)


def found_on(shape: tuple[int, int, int], filter_seen: bool) -> list:
    """[rank, ties], [items, scores of lists], and the scores of a few candidates, by the ranking core."""
    prepared, mesh = shop(), make_mesh(MeshConfig(*shape))
    events, targets, params = prepared.events, prepared.events.targets(TEST), integers(prepared)
    bonus = Fusion(sums_of(events), WEIGHT).bonus(events, targets, 61)
    evaluator = make_evaluator(prepared, eval={"chunk_items": 5, "filter_seen": filter_seen}, mesh=mesh)
    with jax.set_mesh(mesh):
        h_nE, v_IE = evaluator.all_vectors(params, targets)
        ranks = evaluator.rank_vectors(h_nE, v_IE, targets, bonus)
        seen = seen_lists(events, targets) if filter_seen else None
        item, scores, finite = evaluator.ranker.top(h_nE, v_IE, seen, K, bonus)
        pairs = evaluator.ranker.scores(h_nE, v_IE, candidates(), bonus)
    assert finite.all()
    return [[x.tolist() for x in found] for found in (ranks, (item, scores), (np.where(candidates() < 0, -1, pairs),))]


def candidates():
    item = np.random.default_rng(0).integers(61, size=(20, 4)).astype(np.int32)
    item[::3, -1] = -1
    return item


def expected(filter_seen: bool) -> list:
    """The same by dense NumPy, in float32."""
    prepared = shop()
    events, targets = prepared.events, prepared.events.targets(TEST)
    params = {name: np.asarray(x, int) for name, x in integers(prepared).items()}
    tokens = [
        [token for item in recent(prepared, history_of(events, target), 24) for token in tokens_of(prepared, item)] for target in targets
    ]
    own = np.stack([params["table"] @ params["embedding"][some].sum(0) for some in tokens]).astype(np.float32)
    sums = sums_of(events)
    added = (sums(events, targets) * (WEIGHT * sums.unit)).astype(np.float32)
    scores, target = own + added, events.item[targets]
    seen = seen_lists(events, targets)
    pairs = np.repeat(np.arange(20), seen.lengths), seen.item
    ranks = rank_scores(scores, target, pairs if filter_seen else None)
    assert not np.array_equal(ranks[0], rank_scores(own, target, pairs if filter_seen else None)[0])  # the fusion does something
    left = scores.copy()
    if filter_seen:
        left[pairs] = -np.inf
    best = np.argsort(-left, axis=1, kind="stable")[:, :K]
    some = np.where(candidates() < 0, -1, np.take_along_axis(scores, np.maximum(candidates(), 0), 1))
    return [[x.tolist() for x in found] for found in (ranks, (best, np.take_along_axis(scores, best, 1)), (some,))]


@pytest.mark.parametrize("filter_seen", [True, False])
def test_ranks_and_lists_by_dense_numpy(filter_seen):
    assert found_on((1, 1, 1), filter_seen) == expected(filter_seen)


def test_ranks_and_lists_on_eight_devices():
    env = os.environ | on_devices(8)
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env, cwd=Path(__file__).parents[1], timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == expected(True)


def test_items_without_counts_and_the_weight_0():
    """Items that the baseline does not know count nothing, in histories and as candidates."""
    events = shop().events
    sums, targets = sums_of(events), events.targets(TEST)
    assert Fusion(sums, 0.0).bonus(events, targets, 61) is None
    more = dataclasses.replace(events, item=np.where(events.item == events.item[targets[0] - 1], 70, events.item))
    assert (sums.dense(events, targets) == sums(events, targets)).all()
    found = Fusion(sums, 1.0).bonus(more, targets, 64)(np.arange(20))
    unknown = np.setdiff1d(np.arange(61), events.item)[0]  # an item without counts: the age of the others stays
    plain = dataclasses.replace(events, item=np.where(more.item == 70, unknown, events.item))
    assert found.dtype == np.float32 and found.shape == (20, 64) and not found[:, 61:].any()
    assert np.array_equal(found[:, :61], Fusion(sums, 1.0).bonus(plain, targets, 61)(np.arange(20))) and found.any()


def test_the_grid_grows_where_the_best_weight_is():
    def weights(peak, ratio=1.3):
        return fusion.search(ratio, lambda weight: -abs(weight - peak))

    around = [2.0**power for power in range(-3, 4)]
    assert list(weights(1.0)) == [0.0, *around]
    assert list(weights(20.0)) == [0.0, *around, 16.0, 32.0] and fusion.best(weights(20.0)) == 16.0
    assert list(weights(0.07)) == [0.0, *around, 1 / 16, 1 / 32] and fusion.best(weights(0.07)) == 1 / 16
    assert len(weights(1e9)) == len(weights(0.0)) == 16  # the growth ends
    assert fusion.best(weights(0.0)) == 0.0 and weights(1.0, ratio=None) == {0.0: -1.0}
    assert fusion.best({0.0: 0.5, 2.0: 0.7, 1.0: 0.7}) == 1.0


def evaluated(prepared, workdir):
    evaluator = make_evaluator(prepared, eval={"fusion": "transitions", "baselines": False, "resamples": 2, "metric": "ndcg@50"})
    return evaluator, evaluate_all(evaluator, integers(prepared), 7, workdir)


def test_the_weight_is_chosen_on_validation_and_read_again(tmp_path, monkeypatch, capsys):
    prepared = shop()
    events = prepared.events
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    evaluator, found = evaluated(prepared, tmp_path / "a")
    record = json.loads((tmp_path / "a" / "fusion.json").read_text())
    assert list(found["results"]) == ["model", "fusion", "transitions"] and "fusion: model + " in capsys.readouterr().out
    assert found["fusion"] == {"baseline": "transitions", "weight": record["weight"], "validation": record["value"]}
    targets = targets_of_choice(events, evaluator.config)
    assert record["value"] == pytest.approx(found["results"]["fusion"]["validation"]["ndcg@50"]) and len(targets) == 20
    assert record["trials"][0] == {"weight": 0.0, "value": pytest.approx(found["results"]["model"]["validation"]["ndcg@50"])}
    assert record["value"] == max(trial["value"] for trial in record["trials"]) and record["step"] == 7
    assert record["grid"] == sorted(trial["weight"] for trial in record["trials"])
    stored = pl.read_parquet(tmp_path / "a" / "baselines.parquet").filter(pl.col("name") == "fusion")
    assert len(stored) == len(pl.read_parquet(tmp_path / "a" / "ranks.parquet")) == 40

    item = np.where(events.label == TEST, (events.item + 5) % 58, events.item).astype(np.int32)
    other = dataclasses.replace(prepared, split=Split(dataclasses.replace(events, item=item), None, "", ()))
    _, changed = evaluated(other, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "fusion.json").read_text()) == record
    assert changed["results"]["fusion"]["test"] != found["results"]["fusion"]["test"]

    monkeypatch.setattr(fusion, "choose", None)
    assert evaluated(prepared, tmp_path / "a")[1] == found
    for name, value in (("step", 8), ("weight", float("nan")), ("settings", {})):
        (tmp_path / "a" / "fusion.json").write_text(json.dumps(record | {name: value}))
        with pytest.raises(TypeError):  # it would be chosen again
            evaluated(prepared, tmp_path / "a")


def test_a_constant_model_and_constant_counts():
    prepared = shop()
    events, targets = prepared.events, prepared.events.targets(VALIDATION)
    evaluator = make_evaluator(prepared)
    params = integers(prepared)
    h_nE, v_IE = evaluator.all_vectors(params, targets)
    constant = dataclasses.replace(sums_of(events), base=np.zeros(61, np.int64), matrix=sums_of(events).matrix * 0)
    arguments = evaluator.ranker, h_nE, v_IE, events, targets, 0
    sums = sums_of(events)
    assert fusion.range_ratio(constant, *arguments) is None
    assert fusion.range_ratio(sums, evaluator.ranker, h_nE * 0, *arguments[2:]) == 1.0
    own, other = (x.max(1) - x.mean(1) for x in (h_nE @ np.asarray(v_IE).T, sums(events, targets) * sums.unit))
    assert fusion.range_ratio(sums, *arguments) == pytest.approx(own.sum() / other.sum(), rel=1e-5)


def test_evaluation_scoring_and_the_api_agree(shop_run, tmp_path):
    shutil.copytree(shop_run / "run", tmp_path / "run")
    overrides = {"eval.fusion": "transitions", "data.path": str(shop_run / "moved")}
    with pytest.raises(InputError, match=r"has no weight for step .*evaluate that step first"):
        iam_jax.load(tmp_path / "run", overrides=overrides)
    chosen = iam_jax.evaluate(tmp_path / "run", overrides=overrides)["fusion"]
    record = json.loads((tmp_path / "run" / "fusion.json").read_text())
    assert chosen["weight"] == record["weight"]
    (tmp_path / "run" / "fusion.json").write_text(json.dumps(record | {"weight": WEIGHT}))  # the choice may be 0
    evaluation = iam_jax.evaluate(tmp_path / "run", overrides=overrides)
    assert evaluation["fusion"]["weight"] == WEIGHT and evaluation["results"]["fusion"] != evaluation["results"]["model"]

    ranks = pl.read_parquet(tmp_path / "run" / "ranks.parquet")
    other = pl.read_parquet(tmp_path / "run" / "baselines.parquet").filter(pl.col("name") == "fusion")
    ranks = ranks.with_columns(other["rank"], other["ties"]).filter(pl.col("split") == "test")
    events = pl.read_parquet(shop_run / "moved" / "interactions.parquet").sort("user", "timestamp")
    before = events.join(ranks.select("user", last="timestamp"), on="user").filter(pl.col("timestamp") < pl.col("last"))
    histories = dict(before.group_by("user", maintain_order=True).agg("item").iter_rows())
    rec = iam_jax.load(tmp_path / "run", overrides=overrides)
    rank, ties = rec.rank([histories[user] for user in ranks["user"]], ranks["target"].to_list())
    assert rank.tolist() == ranks["rank"].to_list() and ties.tolist() == ranks["ties"].to_list()

    before.select("user", "item", "timestamp").write_parquet(tmp_path / "users.parquet")
    config = get_config(str(tmp_path / "run"))
    config.update_from_flattened_dict(overrides)
    asked = ScoreRequest(output=str(tmp_path / "lists"), users=str(tmp_path / "users.parquet"), top_k=50)
    score(tmp_path / "run", resolve(config), asked, saved=True)
    lists = pl.concat([pl.read_parquet(path) for path in sorted((tmp_path / "lists").glob("part-*.parquet"))])
    assert rec.recommend(before.select("user", "item", "timestamp"), k=50).equals(lists)
    joined = ranks.join(lists, left_on=["user", "target"], right_on=["user", "item"], suffix="_of_list")
    within = joined.filter((pl.col("rank_of_list") >= pl.col("rank")) & (pl.col("rank_of_list") <= pl.col("rank") + pl.col("ties")))
    assert len(within) == len(joined) > 20
    user, target = ranks["user"][0], lists["item"][0]
    assert rec.score([histories[user]], [[target]])[0] == pytest.approx(dict(rec.recommend([histories[user]], k=50)[0])[target], rel=1e-4)
    assert json.loads((tmp_path / "lists" / "request.json").read_text())["fusion"] == {"baseline": "transitions", "weight": WEIGHT}

    _, err = run(tmp_path, "--workdir=run", "--mode=export", "--config.eval.fusion=transitions", "--output=out", code=2)
    assert "exports the model alone, without counts" in err and not (tmp_path / "out").exists()


if __name__ == "__main__":
    print(json.dumps(found_on((2, 2, 2), True)))

"""The choice of a baseline's settings: the search, what it is made of, and that it is stored."""

import dataclasses
import json

import pytest
from helpers import make_config, tiny_data, write_shop
from test_baselines import events_of, leave_one_out

from iam_jax.data.splits import TEST, VALIDATION, Split
from iam_jax.ranking import baselines, choice
from iam_jax.ranking.baselines import evaluate
from iam_jax.ranking.choice import BASELINES, choose, choose_or_read, search
from iam_jax.ranking.metrics import ranking_metrics


def test_the_search_goes_from_coarse_to_fine():
    grid = {"a": (0, 1, 2, 3, 4, 5, 6), "b": (0, 1, 2, 3)}
    asked = []

    def metric(settings):
        asked.append((settings["a"], settings["b"]))
        return -abs(settings["a"] - 4) - 2 * abs(settings["b"] - 2)

    trials = search(grid, {"a": 1, "b": 3}, metric)
    # From a = 1 every second value of a, then of b; then the neighbours of a, and of b.
    assert asked == [(1, 3), (3, 3), (5, 3), (3, 1), (2, 3), (4, 3), (4, 2), (3, 2), (5, 2), (4, 1)]
    assert [(settings["a"], settings["b"]) for settings, _ in trials] == asked and all(value == metric(s) for s, value in trials)
    assert max(trials, key=lambda trial: trial[1])[0] == {"a": 4, "b": 2}


def test_equal_points_keep_the_start():
    trials = search({"a": (1, 2, 3)}, {"a": 2}, lambda _: 0.5)
    assert max(trials, key=lambda trial: trial[1])[0] == {"a": 2} and len(trials) == 3


def test_starts_are_points_of_grids():
    for name, baseline in BASELINES.items():
        assert name == baseline.name and baseline.grid.keys() == baseline.start.keys()
        assert all(value in baseline.grid[setting] for setting, value in baseline.start.items())
        assert all(list(values) == sorted(set(values)) for values in baseline.grid.values())
    assert list(BASELINES) == ["popularity", "last_item", "item_knn", "transitions", "rules"]


@pytest.mark.parametrize("name", ["transitions", "rules"])
def test_the_choice_is_the_best_point_on_validation(name):
    prepared = tiny_data(users=40, items=12)
    config, events = make_config(eval={"validation_users": 25, "metric": "hr@5"}), prepared.events
    record = choose(BASELINES[name], events, config)
    assert json.loads(json.dumps(record)) == record
    assert record["conditions"] == {"metric": "hr@5", "filter_seen": True, "validation_users": 25, "seed": 0}
    assert record["grid"] == {setting: list(values) for setting, values in BASELINES[name].grid.items()}
    assert record["value"] == max(trial["value"] for trial in record["trials"]) and len(record["trials"]) > 8
    best = next(trial for trial in record["trials"] if trial["value"] == record["value"])
    assert best == record["settings"] | {"value": record["value"]}
    targets = choice.subset_of_users(events, VALIDATION, 25, 0)
    ranks = evaluate(BASELINES[name].make(events)(**record["settings"]), events, targets)
    assert len(targets) == 25 and ranking_metrics(*ranks)["hr@5"].mean() == record["value"]
    # Test events do not take part.
    changed = events.item.copy()
    changed[events.label == TEST] = 0
    assert choose(BASELINES[name], dataclasses.replace(events, item=changed), config) == record


def test_nothing_to_choose_on():
    events = events_of([[0, 1], [1, 2]], 3)
    record = choose(BASELINES["transitions"], events, make_config())
    assert record["value"] is None and record["settings"] == BASELINES["transitions"].start and record["trials"] == []
    assert "not chosen: no validation event" in choice.describe("transitions", record)
    assert choose(BASELINES["popularity"], tiny_data().events, make_config())["settings"] == {}


def test_the_record_of_a_folder_is_used_under_the_same_conditions(tmp_path, monkeypatch):
    prepared, config = tiny_data(users=20), make_config()
    split = dataclasses.replace(prepared.split, sha256="a1")
    rules = BASELINES["rules"]
    record = choose_or_read(rules, split, config, tmp_path)
    choice.write_records({"rules": record}, split, tmp_path)
    monkeypatch.setattr(choice, "choose", lambda *_: {"settings": "chosen again"})
    assert choose_or_read(rules, split, config, tmp_path) == record

    def again(split: Split = split, baseline=rules, **evaluation):
        return choose_or_read(baseline, split, make_config(eval=evaluation), tmp_path)["settings"] == "chosen again"

    assert not again() and not again(resamples=7)
    assert again(metric="hr@10") and again(filter_seen=False) and again(validation_users=3) and again(seed=1)
    assert again(dataclasses.replace(split, sha256="b2"))
    assert again(baseline=dataclasses.replace(rules, grid=rules.grid | {"window": (1, 10)}))
    (tmp_path / choice.RECORDS_FILE).write_text("half a fi")
    assert again()


def test_a_made_up_shop(tmp_path):
    """On data with a hidden order, chosen transitions and rules find it."""
    events = leave_one_out(write_shop(tmp_path / "shop"))
    targets = events.targets(TEST)

    def ndcg(scorer):
        return ranking_metrics(*evaluate(scorer, events, targets))["ndcg@10"].mean()

    scorers = {name: BASELINES[name].make(events) for name in ("transitions", "rules")}
    found = {name: ndcg(make(**choose(BASELINES[name], events, make_config())["settings"])) for name, make in scorers.items()}
    assert min(found.values()) > 1.5 * ndcg(baselines.popularity(events))

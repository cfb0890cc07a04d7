"""Top-K lists of baselines, `--mode=score --baseline=…`: the same files, order and checks as those of a model."""

import dataclasses
import shutil

import numpy as np
import polars as pl
import pytest
from test_main import run
from test_offline import config_of, folder, lists, read, scored, users  # noqa: F401  (fixtures)

from iam_jax.data.prepare import read_split
from iam_jax.errors import InputError
from iam_jax.ranking import baselines
from iam_jax.ranking.choice import BASELINES, Baseline, choose_or_read
from iam_jax.serving import offline


def moved(folder):  # noqa: F811
    return {"data__path": str(folder / "moved"), "data__cache": str(folder / "cache")}


@pytest.mark.parametrize("name", list(BASELINES))
def test_lists_are_the_ranks_of_the_evaluation(folder, users, tmp_path, name, monkeypatch):  # noqa: F811
    """A target is at its rank, or among the items of equal score from there; scores fall; seen items are left out."""
    monkeypatch.setattr(baselines, "BLOCK", 300)  # six users at a time
    frame = scored(folder, tmp_path / "every", users=users, top_k=1000, baseline=name, **moved(folder))
    assert frame.schema == {"user": pl.String, "item": pl.String, "rank": pl.Int32, "score": pl.Float32}
    every = lists(frame)
    seen = {user: set(there) for user, there in pl.read_csv(users, infer_schema=False).group_by("user").agg("item").iter_rows()}
    assert len(every) == 60 and all(not seen[user] & set(items) for user, (items, _) in every.items())
    assert all((np.diff(scores) <= 0).all() for _, scores in every.values())
    config = config_of(folder, **moved(folder))
    split = read_split(config.data)
    events, record = split.events, choose_or_read(BASELINES[name], split, config, folder / "run")
    targets = events.offsets[1:] - 1
    rank, ties = baselines.evaluate(BASELINES[name].make(events)(**record["settings"]), events, targets)
    compared = 0
    for user, target, first, more in zip(events.user_ids, events.item[targets], rank, ties, strict=True):
        items, _ = every[user]
        if events.item_ids[target] in items:
            assert first <= items.index(events.item_ids[target]) + 1 <= first + more
            compared += 1
    assert compared > 20
    top = scored(folder, tmp_path / "top", users=users, top_k=7, baseline=name, **moved(folder))
    assert top.equals(frame.filter(pl.col("rank") <= 7))
    assert {path.name for path in (tmp_path / "top").iterdir()} == {*(f"part-{n:05}-of-00004.parquet" for n in range(4)), "request.json"}


def test_candidates(folder, users, tmp_path):  # noqa: F811
    every = lists(scored(folder, tmp_path / "every", users=users, top_k=1000, baseline="rules", eval__filter_seen=False, **moved(folder)))
    rng = np.random.default_rng(0)
    asked = {user: rng.choice(items, rng.integers(1, 9), replace=False).tolist() for user, (items, _) in list(every.items())[::3]}
    pairs = [(user, item) for user, items in asked.items() for item in items]
    pl.DataFrame(pairs, schema=["user", "item"], orient="row").write_parquet(tmp_path / "pairs.parquet")
    request = {"users": users, "candidates": tmp_path / "pairs.parquet", "baseline": "rules", "eval__filter_seen": False}
    for user, (items, scores) in lists(scored(folder, tmp_path / "out", **request, **moved(folder))).items():
        whole = dict(zip(*every[user], strict=True))
        place = {item: n for n, item in enumerate(every[user][0])}
        assert items == sorted(asked[user], key=place.get) and scores == [whole[item] for item in items]


def test_an_interrupted_request_goes_on(folder, users, tmp_path, monkeypatch):  # noqa: F811
    request = {"users": users, "baseline": "transitions", **moved(folder)}
    whole = scored(folder, tmp_path / "whole", **request)
    scored(folder, tmp_path / "parts", **request)
    (tmp_path / "parts" / "part-00002-of-00004.parquet").unlink()
    write, wrote = offline.write_atomically, []
    monkeypatch.setattr(offline, "write_atomically", lambda path, writer: (wrote.append(path.name), write(path, writer)))
    assert scored(folder, tmp_path / "parts", **request).equals(whole) and wrote == ["part-00002-of-00004.parquet"]
    with pytest.raises(InputError, match=r"another request \(baseline, run differ\)"):
        scored(folder, tmp_path / "parts", **request | {"baseline": "rules"})
    with pytest.raises(InputError, match=r"another request \(baseline, run, step differ\)"):
        scored(folder, tmp_path / "parts", users=users)


def test_the_settings_are_chosen_without_an_evaluation(folder, users, tmp_path):  # noqa: F811
    """The choice depends on the data alone, so that the lists are those of the evaluation's settings."""
    expected = scored(folder, tmp_path / "one", users=users, top_k=5, baseline="transitions", **moved(folder))
    saved = folder / "run" / "baselines.json"
    text = saved.read_text()
    saved.unlink()
    try:
        assert scored(folder, tmp_path / "two", users=users, top_k=5, baseline="transitions", **moved(folder)).equals(expected)
        assert not saved.exists()
    finally:
        saved.write_text(text)


def test_from_the_command_line(folder, users):  # noqa: F811
    flags = "--workdir=run", "--mode=score", f"--users={users}", "--output=counted", "--baseline=transitions"
    out, _ = run(folder, *flags, "--config.data.path=moved")
    assert "transitions: window " in out and "points); 4 parts" in out and len(read(folder / "counted")) > 0
    for more, message in (
        (("--baseline=markov",), "--baseline=markov: must be one of popularity, last_item, item_knn, transitions, rules"),
        (("--vectors",), "--baseline cannot be combined with --items or --vectors"),
        (("--mode=evaluate",), "--users is for --mode=score"),
    ):
        _, err = run(folder, *flags, "--config.data.path=moved", *more, code=2)
        assert message in err and err.count("\n") == 1


def test_other_data_are_refused(folder, users, tmp_path):  # noqa: F811
    events = pl.read_parquet(folder / "moved" / "interactions.parquet")
    (tmp_path / "other").mkdir()
    events[:-1].write_parquet(tmp_path / "other" / "interactions.parquet")
    shutil.copy(folder / "moved" / "items.csv", tmp_path / "other")
    with pytest.raises(InputError, match="was made from other data: its split_sha256 is"):
        scored(folder, tmp_path / "out", users=users, baseline="rules", **moved(folder) | {"data__path": str(tmp_path / "other")})


def test_ties_and_duplicates_of_the_users_are_treated_as_in_training(folder, tmp_path):  # noqa: F811
    from iam_jax.data.histories import users_of_table
    from iam_jax.data.stored import read_stored

    ids = read_stored(folder / "run", config_of(folder).data).item_ids
    table = pl.DataFrame({"user": ["u"] * 4, "item": ids.gather([5, 2, 9, 2]), "timestamp": [1, 1, 1, 1]})
    config = config_of(folder).data
    found = {}
    for ties in ("file", "item"):
        for duplicates in ("keep", "drop"):
            listed, _ = users_of_table(table, "users", ids, dataclasses.replace(config, ties=ties, duplicates=duplicates))
            found[ties, duplicates] = listed.events.item.tolist()
    assert found == {
        ("file", "keep"): [5, 2, 9, 2],
        ("file", "drop"): [5, 2, 9],
        ("item", "keep"): [2, 2, 5, 9],
        ("item", "drop"): [2, 5, 9],
    }


def test_a_baseline_of_ones_own(folder, users, tmp_path):  # noqa: F811
    """It is scored without a grid; its scores must be finite."""
    request = {"users": users, "top_k": 3, "baseline": "own", **moved(folder)}
    try:
        for value, message in ((0.5, ""), (np.nan, "a score of the baseline 'own' is not finite")):
            BASELINES.register(
                Baseline("own", lambda events, value=value: lambda: lambda _, at: np.full((len(at), len(events.item_ids)), value))
            )
            if message:
                with pytest.raises(FloatingPointError, match=message):
                    scored(folder, tmp_path / "nan", **request)
            else:  # the first items of the catalogue that were not seen
                assert scored(folder, tmp_path / "own", **request)["score"].unique().to_list() == [0.5]
    finally:
        BASELINES.unregister("own")

"""The Python API's recommender against offline scoring, against the evaluator, and against plain NumPy."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import polars as pl
import pytest
from forks import python
from helpers import on_devices

import iam_jax
from iam_jax import InputError, Recommendation
from iam_jax.config import get_config, resolve
from iam_jax.serving.offline import ScoreRequest, score


@pytest.fixture(scope="module")
def rec(shop_run):
    return iam_jax.load(shop_run / "run")


@pytest.fixture(scope="module")
def users(shop):
    """The histories of 20 users, as a table."""
    chosen = shop.interactions["user"].unique().sort()[:20]
    return shop.interactions.filter(pl.col("user").is_in(chosen.to_list())).select("user", "item", "timestamp")


@pytest.fixture(scope="module")
def histories(users):
    """The same as lists, by user id. (The shop's timestamps do not tie within a user.)"""
    assert not users.select("user", "timestamp").is_duplicated().any()
    ordered = users.sort("user", "timestamp").group_by("user", maintain_order=True).agg("item")
    return dict(ordered.iter_rows())


def scored(shop_run, output, users, **request):
    """What `--mode=score` writes."""
    users.write_parquet(output.parent / "users.parquet")
    config = resolve(get_config(str(shop_run / "run")))
    asked = ScoreRequest(output=str(output), users=str(output.parent / "users.parquet"), **request)
    score(shop_run / "run", config, asked, saved=True)
    return pl.concat([pl.read_parquet(path) for path in sorted(output.glob("part-*.parquet"))])


def test_lists_are_those_of_offline_scoring_bitwise(rec, shop_run, users, histories, tmp_path):
    few = users.filter(pl.col("user").is_in(sorted(histories)[:16]))  # a part of the shop's run
    expected = scored(shop_run, tmp_path / "lists", few, top_k=7)
    assert rec.recommend(few, k=7).equals(expected)
    lists = rec.recommend([histories[user] for user in sorted(histories)[:16]], k=7)
    assert [one for items in lists for one in items] == list(map(Recommendation, expected["item"], expected["score"]))
    assert all(not {item for item, _ in items} & set(histories[user]) for user, items in zip(sorted(histories), lists, strict=False))


def test_tables_are_answered_in_kind(rec, users):
    own = rec.recommend(users, k=3)
    frame = pd.DataFrame({name: users[name].to_list() for name in users.columns})
    found = rec.recommend(frame, k=3)
    assert isinstance(found, pd.DataFrame) and list(found.columns) == ["user", "item", "rank", "score"]
    assert found["item"].tolist() == own["item"].to_list() and found["rank"].tolist() == own["rank"].to_list()
    assert (found["score"].to_numpy() == own["score"].to_numpy()).all() and found["score"].dtype == np.float32
    dates = frame.assign(timestamp=pd.to_datetime(frame["timestamp"], unit="s"))
    assert rec.recommend(dates, k=3).equals(found)


def test_pandas_columns_of_every_type(rec, users):
    """Extension types, categories, and times of every unit and zone are the plain columns."""
    frame = pd.DataFrame({name: users[name].to_list() for name in users.columns})
    expected = rec.recommend(frame, k=3)
    times = pd.to_datetime(frame["timestamp"], unit="s")
    others = [
        frame.astype({"user": "string", "item": "category", "timestamp": "Int64"}),
        frame.astype({"user": object, "item": object, "timestamp": float}),
        frame.assign(note=[{1, "a"}] * len(frame)),  # a column that nothing reads
        *(frame.assign(timestamp=times.astype(f"datetime64[{unit}]")) for unit in ("s", "ms", "us", "ns")),
        *(frame.assign(timestamp=times.astype(f"datetime64[{unit}]").dt.tz_localize("Asia/Tokyo")) for unit in ("s", "ns")),
    ]
    for other in others:
        assert rec.recommend(other, k=3).equals(expected)


def test_missing_values_of_pandas_are_refused(rec):
    """None, NaN, NaT and NA are no ids and no times, whatever the type of their column."""
    a, b = rec.items["item"][:2]
    good = {"user": ["u", "v"], "item": [a, b], "timestamp": [1, 2]}
    for missing in (None, np.nan, pd.NA):
        for column, value in (("user", "u"), ("item", a)):
            for dtype in (object, "string", "category"):
                frame = pd.DataFrame(good | {column: pd.Series([value, missing], dtype=dtype)})
                with pytest.raises(InputError, match=rf"^histories: column '{column}': empty ids: nothing \(row 2\)$"):
                    rec.recommend(frame)
    times = pd.to_datetime(["2020-01-01", None])
    for column in (pd.Series([1.0, np.nan]), pd.Series([1, None], dtype="Int64"), times, times.tz_localize("UTC"), times.astype(object)):
        with pytest.raises(InputError, match=r"^histories: column 'timestamp': missing timestamps: nothing \(row 2\)$"):
            rec.recommend(pd.DataFrame(good | {"timestamp": column}))
    pairs = pd.DataFrame({"user": ["u", "v"], "item": [a, np.nan]})
    with pytest.raises(InputError, match=r"^candidates: column 'item': empty ids: nothing \(row 2\)$"):
        rec.score(pd.DataFrame(good), pairs)
    twice = pd.concat([pd.DataFrame(good), pairs[["item"]]], axis=1)
    with pytest.raises(InputError, match=r"^histories: more than one column 'item'; its columns are 'user', 'item', 'timestamp', 'item'$"):
        rec.recommend(twice)


def test_seen_items_on_request_and_lists_that_end(rec, histories):
    history = next(iter(histories.values()))
    everything = rec.recommend([history], k=1000, filter_seen=False)[0]
    assert len(everything) == 50 and {item for item, _ in everything} == set(rec.items["item"])
    unseen = rec.recommend([history], k=1000)[0]
    assert unseen == [one for one in everything if one.item not in history] and len(unseen) == 50 - len(set(history))


def test_scores_of_candidates(rec, shop_run, users, histories, tmp_path):
    items = rec.items["item"].to_list()
    asked = {user: items[n : n + 1 + n % 4][::-1] for n, user in enumerate(sorted(histories))}
    pairs = pl.DataFrame([(user, item) for user in asked for item in asked[user]], schema=["user", "item"], orient="row")
    pairs.write_parquet(tmp_path / "pairs.parquet")
    expected = scored(shop_run, tmp_path / "scores", users, candidates=str(tmp_path / "pairs.parquet"))
    table = rec.score(users, pairs)
    assert table.select("user", "item", "rank").equals(expected.select("user", "item", "rank"))
    np.testing.assert_allclose(table["score"], expected["score"], rtol=1e-5, atol=1e-6)
    lists = rec.score(list(histories.values()), list(asked.values()))
    of_pair = {(user, item): value for user, item, value in table.select("user", "item", "score").iter_rows()}
    for user, found in zip(asked, lists, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, [of_pair[user, item] for item in asked[user]], rtol=1e-5, atol=1e-6)
    twice = rec.score([histories[sorted(histories)[0]]], [[items[3], items[1], items[3]]])[0]
    assert twice[0] == twice[2] != twice[1]


def test_vectors_scores_and_neighbours_by_numpy(rec, histories):
    items, v_IE = rec.items["item"].to_list(), rec.item_vectors().astype(np.float64)
    h_nE = rec.user_vectors(list(histories.values())).astype(np.float64)
    assert v_IE.shape == (50, 16) and h_nE.shape == (20, 16)
    products = h_nE @ v_IE.T
    for found, row in zip(rec.score(list(histories.values()), [items] * 20), products, strict=True):
        np.testing.assert_allclose(found, row, rtol=1e-4, atol=1e-5)
    cosine = v_IE @ v_IE.T / np.linalg.norm(v_IE, axis=1) / np.linalg.norm(v_IE, axis=1)[:, None]
    best = np.argsort(-cosine[7])
    near = rec.similar(items[7], k=5)
    assert [item for item, _ in near] == [items[i] for i in best if i != 7][:5]
    np.testing.assert_allclose([value for _, value in near], np.sort(cosine[7])[::-1][1:6], rtol=1e-4)


def test_ranks_are_the_evaluators(shop_run, users, tmp_path):
    """Integer for integer, by the test protocol's histories."""
    shutil.copytree(shop_run / "run", tmp_path / "run")
    evaluation = iam_jax.evaluate(tmp_path / "run", overrides={"data.path": str(shop_run / "moved")})
    assert evaluation == json.loads((tmp_path / "run" / "evaluation.json").read_text())
    rec = iam_jax.load(tmp_path / "run", step=evaluation["step"])
    ranks = pl.read_parquet(tmp_path / "run" / "ranks.parquet").filter(pl.col("split") == "test")
    events = pl.read_parquet(shop_run / "moved" / "interactions.parquet").sort("user", "timestamp")
    before = events.join(ranks.select("user", last="timestamp"), on="user").filter(pl.col("timestamp") < pl.col("last"))
    histories = dict(before.group_by("user", maintain_order=True).agg("item").iter_rows())
    rank, ties = rec.rank([histories[user] for user in ranks["user"]], ranks["target"].to_list())
    assert rank.tolist() == ranks["rank"].to_list() and ties.tolist() == ranks["ties"].to_list() and len(rank) > 20
    unfiltered, _ = rec.rank([histories[user] for user in ranks["user"]], ranks["target"].to_list(), filter_seen=False)
    assert (unfiltered >= rank).all() and (unfiltered > rank).any()


def test_an_item_by_its_text(rec, shop_run, histories, tmp_path):
    """In a history, as if `--items` had added it; its neighbours, as those of an item with this text but without a table row."""
    text, history = "red zebra lantern", next(iter(histories.values()))
    (tmp_path / "new.csv").write_text(f"item,title\nzz,{text}\n")
    rows = [("u", item, n) for n, item in enumerate([*history, "zz"])]
    users = pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row")
    expected = scored(shop_run, tmp_path / "lists", users, items=str(tmp_path / "new.csv"), top_k=50)
    found = rec.recommend([[*history, {"text": text}]], k=50)[0]
    kept = expected.filter(pl.col("item") != "zz")
    assert [item for item, _ in found] == kept["item"].to_list()
    np.testing.assert_allclose([value for _, value in found], kept["score"], rtol=1e-5, atol=1e-5)
    assert found != rec.recommend([history], k=50)[0]
    rank, _ = rec.rank([[*history, {"text": text}]], [found[4].item])
    assert rank.tolist() == [5]
    assert rec.similar({"text": rec.items["text"][3]}, k=50) != rec.similar({"text": text}, k=50)


def changed(shop_run, folder, fields):
    """A copy of the run as if it had been trained by a config with these fields, which change no parameter."""
    shutil.copytree(shop_run / "run", folder)
    config = get_config(str(folder))
    config.update_from_flattened_dict(fields)
    (folder / "config.json").write_text(config.to_json_best_effort())
    return iam_jax.load(folder)


def test_texts_longer_than_all_items(shop_run, tmp_path):
    """Attention inside an item is compiled for the longest item of the catalogue; a longer text has its vector all the same."""
    text, found = {"text": "red zebra lantern " * 3}, []
    for attention in ("auto", "reference"):
        rec = changed(shop_run, tmp_path / attention, {"data.item_tokens": 40, "model.attention": attention})
        items = rec.items["item"].to_list()
        near, lists = dict(rec.similar(text, k=50)), dict(rec.recommend([[items[0], text]], k=50)[0])
        arrays = [rec.user_vectors([[items[0], text], [text], [{"text": "red"}]]), rec.score([[text, items[0]]], [items])[0]]
        arrays += [[near[item] for item in items], [lists[item] for item in items[1:]], rec.rank([[items[0], text]], [items[7]])[0]]
        found.append(arrays)
    for auto, reference in zip(*found, strict=True):
        np.testing.assert_allclose(auto, reference, rtol=1e-4, atol=1e-5)


def test_texts_longer_than_a_row(shop_run, tmp_path):
    rec = changed(shop_run, tmp_path / "run", {"data.item_tokens": 40, "data.row_tokens": 24})
    history = [rec.items["item"][0], {"text": "zebra " * 40}]
    for call, name in ((lambda: rec.recommend([history]), "histories[0][1]"), (lambda: rec.similar(history[1]), "item")):
        with pytest.raises(InputError) as refused:
            call()
        assert str(refused.value) == f"{name}: its text has 41 tokens, but a row has room for 24 (config.data.row_tokens = 24)"


def test_items_with_their_text(rec, shop, shop_run):
    titles = dict(shop.items.select("item", "title").iter_rows())
    items = rec.items
    assert items.columns == ["item", "text", "trained"] and items["item"].to_list() == sorted(titles)
    for item, text in zip(items["item"], items["text"], strict=True):
        assert text and titles[item].startswith(text)  # six tokens of it
    assert rec.config.data.item_tokens == 6 and set(rec.params) >= {"decoder", "table_IE"}
    assert rec.step == json.loads((shop_run / "run" / "evaluation.json").read_text())["step"]


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda rec, a: rec.recommend([[a], [a, "nowhere"]]), InputError, r"histories\[1\]\[1\]: no item 'nowhere' in the catalogue of 50"),
        (lambda rec, a: rec.recommend([[a], []]), InputError, r"histories\[1\] is empty"),
        (lambda rec, a: rec.recommend([]), InputError, "histories is empty"),
        (lambda rec, a: rec.recommend([a]), TypeError, r"histories\[0\] is .* a list of lists"),
        (lambda rec, a: rec.recommend(a), TypeError, "histories is a str"),
        (lambda rec, a: rec.recommend([[7]]), TypeError, r"histories\[0\]\[0\] is 7 \(int\)"),
        (lambda rec, a: rec.recommend([[{"title": "x"}]]), TypeError, r"histories\[0\]\[0\] is \{'title'"),
        (lambda rec, a: rec.recommend([[{"text": ""}]]), InputError, r"histories\[0\]\[0\]: the tokenizer makes no token"),
        (lambda rec, a: rec.recommend([[a]], k=0), InputError, "k = 0: must be 1 or more"),
        (lambda rec, a: rec.recommend([[a]], k=2.5), TypeError, r"k is 2\.5"),
        (lambda rec, a: rec.recommend(pl.DataFrame({"user": ["u"], "item": [a]})), InputError, "histories: no column 'timestamp'"),
        (
            lambda rec, a: rec.recommend(pl.DataFrame({"user": ["u", "u"], "item": [a, "x"], "timestamp": [1, 2]})),
            InputError,
            r"histories: column 'item': 1 item that .* 'x' \(row 2\)",
        ),
        (lambda rec, a: rec.score([[a]], [["x"]]), InputError, r"candidates\[0\]\[0\]: no item 'x'"),
        (lambda rec, a: rec.score([[a]], [[a], [a]]), InputError, "2 lists of candidates for 1 histories"),
        (lambda rec, a: rec.score([[a]], [[]]), InputError, r"candidates\[0\] is empty"),
        (lambda rec, a: rec.score([[a]], pl.DataFrame({"user": ["0"], "item": [a]})), TypeError, "both as lists or both as tables"),
        (lambda rec, a: rec.recommend([pl.Series([a])]), TypeError, r"histories\[0\] is a Series: .* a list of lists"),
        (lambda rec, a: rec.recommend([np.array(a)]), TypeError, r"histories\[0\] is a ndarray: .* a list of lists"),
        (lambda rec, a: rec.recommend(b"a"), TypeError, "histories is a bytes"),
        (lambda rec, a: rec.rank([[a]], [a, a]), InputError, "2 targets for 1 histories: each history needs one"),
        (lambda rec, a: rec.rank([[a]], a), TypeError, "targets is a str: it must be a list of item ids"),
        (lambda rec, a: rec.rank([[a]], None), TypeError, "targets is a NoneType"),
        (lambda rec, a: rec.rank([[a]], ["x"]), InputError, r"targets\[0\]: no item 'x'"),
        (lambda rec, a: rec.similar("x"), InputError, "no item 'x'"),
    ],
)
def test_bad_input_is_one_clear_exception(rec, call, error, named):
    with pytest.raises(error, match=named) as caught:
        call(rec, rec.items["item"][0])
    assert "\n" not in str(caught.value)


def test_vectors_that_are_not_finite(shop_run, histories):
    """Neither a vector nor a list is made of them."""
    rec = iam_jax.load(shop_run / "run")
    items, some = rec.items["item"].to_list(), list(histories.values())[:2]
    rec.params["table_IE"] = rec.params["table_IE"].at[3].set(np.nan)
    assert np.isfinite(rec.user_vectors(some)).all()
    with pytest.raises(FloatingPointError, match=rf"^the vector of item '{items[3]}' is not finite$"):
        rec.item_vectors()
    with pytest.raises(FloatingPointError, match=rf"^a cosine of item '{items[5]}' is not finite$"):
        rec.similar(items[5])
    with pytest.raises(FloatingPointError, match=r"^a score of user '0' is not finite$"):
        rec.recommend(some)
    rec = iam_jax.load(shop_run / "run")
    rec.params["state_DE"] = rec.params["state_DE"] * np.inf
    with pytest.raises(FloatingPointError, match=r"^the vector of user '0' is not finite$"):
        rec.user_vectors(some)


def test_folders_and_steps_that_are_not_there(shop_run, tmp_path):
    with pytest.raises(InputError, match=r"nothing/config\.json: cannot read the config of a run"):
        iam_jax.load(tmp_path / "nothing")
    with pytest.raises(InputError, match="--step=7"):
        iam_jax.load(shop_run / "run", step=7)


def test_fields_of_a_loaded_run(rec, shop_run, histories):
    """Those that make no other model, as on the command line."""
    other = iam_jax.load(shop_run / "run", overrides={"score.batch_rows": 1, "eval.chunk_items": 7})
    assert (
        (other.config.score.batch_rows, other.config.eval.chunk_items)
        == (1, 7)
        != (rec.config.score.batch_rows, rec.config.eval.chunk_items)
    )
    for found, expected in zip(*(r.recommend(list(histories.values()), k=5) for r in (other, rec)), strict=True):
        assert [item for item, _ in found] == [item for item, _ in expected]
    with pytest.raises(InputError, match=r"config\.mesh: data x fsdp x tensor = 3 x 1 x 1, but there are 1 devices"):
        iam_jax.load(shop_run / "run", overrides={"mesh.data": 3})
    with pytest.raises(InputError, match=r"model\.width \(16 there, 8 here\)"):
        iam_jax.load(shop_run / "run", overrides={"model.width": 8})
    with pytest.raises(InputError, match=r"config\.score\.batchrows: no such field"):
        iam_jax.load(shop_run / "run", overrides={"score.batchrows": 1})


def on_a_mesh(folder: str) -> dict:
    rec = iam_jax.load(folder)
    items = rec.items["item"].to_list()
    histories = [items[n : n + 2 + n % 5] for n in range(40)]
    held = [shard.data.nbytes for shard in rec._item_vectors.addressable_shards]
    scores = [found.tolist() for found in rec.score(histories, [items[:9]] * 40)]
    rank, ties = rec.rank(histories, [items[-1 - n] for n in range(40)])
    return {"held": held, "lists": rec.recommend(histories, k=9), "scores": scores, "ranks": [rank.tolist(), ties.tolist()]}


def test_item_vectors_are_spread_over_eight_devices(rec, shop_run):
    """Each device holds about an eighth of the item vectors; lists and ranks are those of one device."""
    command = [python(), __file__, str(shop_run / "run")]
    done = subprocess.run(command, env=os.environ | on_devices(8), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found, expected = json.loads(done.stdout.splitlines()[-1]), on_a_mesh(str(shop_run / "run"))
    assert expected["held"] == [50 * 16 * 4] and found["held"] == [7 * 16 * 4] * 8  # 50 items: 7 rows on each of 8 devices
    assert found["ranks"] == expected["ranks"]
    np.testing.assert_allclose(found["scores"], expected["scores"], rtol=1e-5, atol=1e-5)
    for here, there in zip(found["lists"], expected["lists"], strict=True):
        assert [item for item, _ in here] == [item for item, _ in there]
        np.testing.assert_allclose([value for _, value in here], [value for _, value in there], rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    print(json.dumps(on_a_mesh(sys.argv[1])))

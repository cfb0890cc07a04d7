"""Offline scoring, from a working folder alone: what comes out, in which order, and that no interruption shows."""

import dataclasses
import importlib.util
import io
import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import polars as pl
import pytest
from conftest import SHOP_RUN as FIELDS
from forks import python, start
from jobs import run_job
from test_main import config_text, contents, run, wait_for
from tqdm import tqdm

import iam_jax
from iam_jax.config import get_config, override, resolve, to_json
from iam_jax.data import stored as stored_lib
from iam_jax.data.histories import Lists
from iam_jax.data.prepare import prepare
from iam_jax.data.tokenizer import train_bpe
from iam_jax.devices.signals import Stop
from iam_jax.errors import InputError
from iam_jax.ranking.scores import top_items
from iam_jax.serving import offline
from iam_jax.serving.offline import ScoreRequest, score


@pytest.fixture(scope="session")
def folder(shop_run):
    return shop_run


@pytest.fixture
def users(folder):
    """The test protocol's histories: every event but each user's last."""
    events = pl.read_parquet(folder / "moved" / "interactions.parquet")
    ranks = pl.read_parquet(folder / "run" / "ranks.parquet").filter(pl.col("split") == "test")
    table = events.join(ranks.select("user", "timestamp", last="target"), on=["user", "timestamp"], how="left")
    path = folder / "users.csv"
    table.filter(pl.col("last").is_null() | (pl.col("last") != pl.col("item"))).select("user", "item", "timestamp").write_csv(path)
    return path


def config_of(folder, **changes):
    config = get_config(str(folder / "run"))
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return resolve(config)


def scored(folder, output, **request):
    """The request's rows, in this process."""
    changes = {name: request.pop(name) for name in list(request) if "__" in name}
    request = {name: value if name in ("top_k", "vectors", "step") else str(value) for name, value in request.items()}
    score(folder / "run", config_of(folder, **changes), ScoreRequest(output=str(output), **request), saved=True)
    return read(output)


def read(output):
    return pl.concat([pl.read_parquet(path) for path in sorted(output.glob("part-*.parquet"))])


def lists(frame):
    return {user: (items, scores) for user, items, scores in frame.group_by("user").agg("item", "score").iter_rows()}


@pytest.fixture
def vectors(folder, users, tmp_path):
    """Item and user vectors by id, from --vectors."""
    found = []
    for name, more in (("item", {}), ("user", {"users": users})):
        frame = scored(folder, tmp_path / f"{name}-vectors", vectors=True, **more)
        assert frame.columns == [name, "vector"]
        found.append(dict(zip(frame[name], frame["vector"].to_numpy(), strict=True)))
    return found


def test_lists_equal_a_slow_twin(folder, users, vectors, tmp_path):
    items, states = vectors
    frame = scored(folder, tmp_path / "lists", users=users, top_k=7)
    assert frame.schema == {"user": pl.String, "item": pl.String, "rank": pl.Int32, "score": pl.Float32}
    assert sorted(path.name for path in (tmp_path / "lists").iterdir()) == [
        *(f"part-{n:05}-of-00004.parquet" for n in range(4)),
        "request.json",
    ]
    assert frame["user"].to_list() == [user for user in sorted(states) for _ in range(7)] and len(states) == 60
    assert frame["rank"].to_list() == [*range(1, 8)] * 60
    seen = {user: set(there) for user, there in pl.read_csv(users, infer_schema=False).group_by("user").agg("item").iter_rows()}
    for user, (got, scores) in lists(frame).items():
        expected = {item: float(states[user].astype(np.float64) @ vector) for item, vector in items.items() if item not in seen[user]}
        best = sorted(expected, key=expected.get, reverse=True)[:7]
        assert got == best
        np.testing.assert_allclose(scores, [expected[item] for item in best], rtol=1e-4, atol=1e-5)


def test_item_vectors_are_read_back(folder, vectors, tmp_path):
    """As content of another run, `data.vectors`, from several files; vectors of users are refused."""
    data = config_of(folder, data__path=str(folder / "moved"), data__cache=str(tmp_path / "cache")).data
    prepared = prepare(dataclasses.replace(data, vectors=str(tmp_path / "item-vectors")))
    np.testing.assert_array_equal(prepared.vectors, [vectors[0][item] for item in prepared.events.item_ids.tolist()])
    with pytest.raises(InputError, match="no column 'item'; its columns are 'user', 'vector'"):
        prepare(dataclasses.replace(data, vectors=str(tmp_path / "user-vectors")))


@pytest.mark.parametrize("filter_seen", [True, False])
def test_positions_are_the_evaluators_ranks(folder, users, tmp_path, filter_seen):
    run(folder, "--workdir=run", "--mode=evaluate", "--config.data.path=moved", f"--config.eval.filter_seen={str(filter_seen).lower()}")
    ranks = pl.read_parquet(folder / "run" / "ranks.parquet").filter(pl.col("split") == "test")
    every = lists(scored(folder, tmp_path / "every", users=users, top_k=1000, eval__filter_seen=filter_seen))
    compared = 0
    for user, target, rank, ties in ranks.select("user", "target", "rank", "ties").iter_rows():
        items, _ = every[user]
        if target in items:  # with filter_seen, targets that the user had before are left out
            assert rank <= items.index(target) + 1 <= rank + ties
            compared += 1
    assert compared > 20


def test_chunks_ties_and_seen_items():
    """Integers are exact: equal for every chunk size, and to NumPy's stable sort."""
    rng = np.random.default_rng(0)
    h_XE, v_IE = rng.integers(-2, 3, (5, 4)).astype(np.float32), rng.integers(-2, 3, (23, 4)).astype(np.float32)
    seen = [rng.choice(23, n, replace=False) for n in (0, 1, 5, 20, 23)]
    padded = Lists(np.concatenate(seen).astype(np.int32), np.cumsum([0, *map(len, seen)])).padded(32)
    for chunk in (1, 4, 7, 23):
        top = jax.jit(top_items, static_argnums=3, static_argnames="chunk")
        item, score, finite = map(np.asarray, top(h_XE, v_IE, padded, 9, chunk=chunk))
        assert finite.all()
        for x in range(5):
            scores = v_IE @ h_XE[x]
            best = [i for i in np.argsort(-scores, kind="stable") if i not in seen[x]][:9]
            assert item[x, : len(best)].tolist() == best and (score[x, : len(best)] == scores[best]).all()
            assert (score[x, len(best) :] == -np.inf).all()
    v_IE[3, 1] = np.nan
    assert not np.asarray(top(h_XE, v_IE, padded, 9, chunk=7)[2]).any()


def test_users_unseen_in_training_and_order_in_time(folder, shop, tmp_path):
    """A stranger with the same events has the same list, whatever the order of the rows; another order of time gives another one."""
    history = shop.items["item"].to_list()[:6]
    rows = [("stranger", item, t) for t, item in enumerate(history)] + [("twin", item, 10 * t) for t, item in enumerate(history)]
    rows += [("backwards", item, -t) for t, item in enumerate(history)]
    frame = pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row")
    frame.sample(fraction=1.0, shuffle=True, seed=1).write_csv(tmp_path / "new.tsv", separator="\t")
    found = lists(scored(folder, tmp_path / "out", users=tmp_path / "new.tsv", top_k=10))
    assert found["stranger"] == found["twin"] and found["stranger"][1] != found["backwards"][1]
    assert not set(history) & set(found["stranger"][0])


def test_candidates(folder, users, shop, tmp_path):
    every = lists(scored(folder, tmp_path / "every", users=users, top_k=1000, eval__filter_seen=False))
    rng, asked = np.random.default_rng(0), {}
    for user in list(every)[::3]:
        asked[user] = rng.choice(shop.items["item"].to_list(), rng.integers(1, 12), replace=False).tolist()
    pairs = [(user, item) for user, items in asked.items() for item in items]
    pl.DataFrame(pairs, schema=["user", "item"], orient="row").write_parquet(tmp_path / "pairs.parquet")
    frame = scored(folder, tmp_path / "out", users=users, candidates=tmp_path / "pairs.parquet")
    assert len(frame) == len(pairs)
    assert sorted(asked) == frame["user"].unique(maintain_order=True).to_list()
    for user, (items, scores) in lists(frame).items():
        whole = dict(zip(*every[user], strict=True))
        assert items == sorted(asked[user], key=lambda item: (-whole[item], item))
        np.testing.assert_allclose(scores, [whole[item] for item in items], rtol=1e-5, atol=1e-6)
    top = scored(folder, tmp_path / "two", users=users, candidates=tmp_path / "pairs.parquet", top_k=2)
    assert top.equals(frame.filter(pl.col("rank") <= 2))


def test_uneven_candidates_are_scored_in_pieces(folder, users, shop, tmp_path, monkeypatch):
    every = sorted(pl.read_csv(users, infer_schema=False)["user"].unique())
    items = shop.items["item"].to_list()
    pairs = [(user, item) for n, user in enumerate(every) for item in (items if n == 20 else items[n % 7 : n % 7 + 2])]
    pl.DataFrame(pairs, schema=["user", "item"], orient="row").write_parquet(tmp_path / "pairs.parquet")
    whole = scored(folder, tmp_path / "whole", users=users, candidates=tmp_path / "pairs.parquet")
    given, sizes = offline.Recommender.score_candidates, []

    def told(self, users, *args):
        sizes.append((len(users), int(users.candidates.lengths.max())))
        return given(self, users, *args)

    monkeypatch.setattr(offline.Recommender, "score_candidates", told)
    monkeypatch.setattr(offline, "_PAIRS", 30)
    pieces = scored(folder, tmp_path / "pieces", users=users, candidates=tmp_path / "pairs.parquet")
    assert (1, 50) in sizes and all(count * most <= 30 for count, most in sizes if count > 1) and sum(n for n, _ in sizes) == len(every)
    assert pieces["user"].equals(whole["user"]) and pieces["item"].equals(whole["item"])
    np.testing.assert_allclose(pieces["score"], whole["score"], rtol=1e-5, atol=1e-6)


def test_new_items_are_scored_from_their_text(folder, tiny, shop, users, tmp_path):
    """As if they had been in the catalogue of the training, which has no event of them."""
    tables = tmp_path / "tables"
    tables.mkdir()
    shop.interactions.write_parquet(tables / "interactions.parquet")
    new = pl.DataFrame({"item": ["zz1", "zz0"], "title": ["the zebra " * 30, shop.items["title"][3]]})
    pl.concat([shop.items.select("item", "title"), new]).write_csv(tables / "items.csv")
    train_bpe(shop.items["title"].to_list(), 300).save(str(tmp_path / "tokenizer.json"))
    fields = {name: value for name, value in tiny.items() if "synthetic" not in name} | FIELDS
    fields |= {"objective.vectors": "text", "data.tokenizer": str(tmp_path / "tokenizer.json"), "train.steps": 4, "eval.test": False}
    (tmp_path / "run.py").write_text(config_text(fields))
    run(tmp_path, "--config=run.py", "--workdir=with/run")
    shop.items.write_csv(tables / "items.csv")
    run(tmp_path, "--config=run.py", "--workdir=without/run")
    new.write_csv(tmp_path / "new.csv")
    shutil.rmtree(tables)
    (tmp_path / "tokenizer.json").unlink()
    known = scored(tmp_path / "with", tmp_path / "known", vectors=True)
    added = scored(tmp_path / "without", tmp_path / "added", vectors=True, items=tmp_path / "new.csv")
    assert added["item"].to_list() == known["item"].to_list() == [*shop.items["item"].sort(), "zz0", "zz1"]
    np.testing.assert_allclose(added["vector"].to_numpy(), known["vector"].to_numpy(), rtol=1e-5, atol=1e-6)
    # They are in lists, and in histories.
    more = pl.read_csv(users, infer_schema=False)
    last = pl.DataFrame({"user": ["late"] * 2, "item": ["zz0", "zz1"], "timestamp": ["1", "2"]}, schema=more.schema)
    pl.concat([more, last]).write_csv(tmp_path / "users.csv")
    both = {name: {"users": tmp_path / "users.csv", "top_k": 60} for name in ("with", "without")}
    both["without"]["items"] = tmp_path / "new.csv"
    a, b = (lists(scored(tmp_path / name, tmp_path / f"{name}-lists", **request)) for name, request in both.items())
    assert a.keys() == b.keys() and len(a) == 61 and any("zz1" in items for items, _ in a.values())
    for user, (_, scores) in a.items():
        np.testing.assert_allclose(scores, b[user][1], rtol=1e-4, atol=1e-5)


def test_an_added_items_table_row_counts_as_zero(folder, users, tmp_path):
    """With vectors = both, an added item with the text of a known one has its vector less the table's row."""
    (tmp_path / "new.csv").write_text("item,title\nzz,brand new thing\n")
    known, added = (
        scored(folder, tmp_path / name, vectors=True, **more) for name, more in (("a", {}), ("b", {"items": tmp_path / "new.csv"}))
    )
    assert added["item"].to_list() == [*known["item"], "zz"]
    np.testing.assert_allclose(added["vector"].to_numpy()[:-1], known["vector"].to_numpy(), rtol=1e-5, atol=1e-6)
    assert np.abs(added["vector"].to_numpy()[-1]).max() > 1e-3


# ---- interruptions


def test_an_interrupted_request_goes_on(folder, users, tmp_path, monkeypatch):
    whole = scored(folder, tmp_path / "whole", users=users)
    write, calls = offline.write_atomically, []

    def interrupted(path, writer):
        calls.append(path.name)
        if len(calls) == 4:  # the request, two parts, and in the middle of the third
            (path.parent / f".{path.name}-left").write_text("half")
            raise Stop
        write(path, writer)

    with monkeypatch.context() as patch:
        patch.setattr(offline, "write_atomically", interrupted)
        with pytest.raises(Stop):
            scored(folder, tmp_path / "parts", users=users)
    there = contents(tmp_path / "parts")
    assert len(there) == 4  # with what the kill left
    wrote = []
    with monkeypatch.context() as patch:
        patch.setattr(offline, "write_atomically", lambda path, writer: (wrote.append(path.name), write(path, writer)))
        assert scored(folder, tmp_path / "parts", users=users).equals(whole)
    assert wrote == [f"part-{n:05}-of-00004.parquet" for n in (2, 3)]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_two_processes_share_the_parts(folder, users, tmp_path):
    whole = scored(folder, tmp_path / "whole", users=users)
    flags = "--workdir=run", "--mode=score", f"--users={users}", f"--output={tmp_path / 'shared'}"
    told = run_job(folder, 2, *flags)
    assert "; 4 parts" in told and "shared: 60 users in" in told and told.count("parts") == 1  # the first process tells for both
    assert read(tmp_path / "shared").equals(whole)
    (tmp_path / "shared" / "part-00002-of-00004.parquet").unlink()
    assert "4 parts, 3 exist already" in run_job(folder, 2, *flags) and read(tmp_path / "shared").equals(whole)


def test_stopped_and_on_with_the_same_command(folder, users):
    """The test of the benchmark, below, kills the command."""
    command = ("--workdir=run", "--mode=score", f"--users={users}", "--top_k=5", "--config.score.part_users=1")
    out, err = run(folder, *command, "--output=one")
    assert err == "" and "60 users" in out and "users/s" in out and "60 parts" in out
    two = folder / "two"
    process = start(folder, *command, f"--output={two.name}")
    wait_for(process, lambda: len(list(two.glob("part-*"))) >= 2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    kept = len(list(two.glob("part-*")))
    assert 2 <= kept < 60 and process.returncode == 75 and err == "stopped; run the same command again to continue\n"
    out, _ = run(folder, *command, f"--output={two.name}")
    assert f"60 parts, {kept} exist already" in out
    assert contents(two) == contents(folder / "one")


def test_progress_within_a_part(folder, users, tmp_path, monkeypatch):
    """The bar moves with the batches, and ends at the number of users also where parts were there."""
    bars = []

    def bar(**flags):
        bars.append(tqdm(**flags | {"file": io.StringIO(), "disable": False}))
        advance, bars[-1].updates = bars[-1].update, []
        bars[-1].update = lambda n: (bars[-1].updates.append(n), advance(n))
        return bars[-1]

    monkeypatch.setattr(offline, "tqdm", bar)
    scored(folder, tmp_path / "lists", users=users, score__batch_rows=1)
    assert bars[0].n == 60 and len([n for n in bars[0].updates if n]) > 8  # there are 4 parts
    (tmp_path / "lists" / "part-00002-of-00004.parquet").unlink()
    scored(folder, tmp_path / "lists", users=users, score__batch_rows=1)
    assert bars[1].initial == 44 and bars[1].n == 60
    scored(folder, tmp_path / "vectors", vectors=True)
    assert bars[2].n == bars[2].total == 50


def test_the_benchmark_tells_whether_a_kill_shows(folder, tmp_path, monkeypatch, capsys):
    """Its commands are killed (SIGKILL), and go on with the same command."""
    script = Path(__file__).parents[1] / "benchmarks" / "offline_scoring.py"
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(script.parent)
    spec = importlib.util.spec_from_file_location("offline_scoring", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "COMMAND", [python(), *module.COMMAND[1:]])
    flags = ["--workdir=run", "--path=moved", "--users=70", "--part_users=8", "--parts=1", "--top_k=5", f"--output={tmp_path / 'o.json'}"]
    assert module.main(flags) == 0
    results, printed = json.loads((tmp_path / "o.json").read_text())["results"], capsys.readouterr().out.splitlines()
    for (users, parts), row, line in zip([(60, 8), (70, 9)], results.values(), printed[-2:], strict=True):
        assert (row["users"], row["rows"], row["parts"], row["equal"]) == (users, users * 5, parts, True) and 1 <= row["kept"] < parts
        assert line.split()[:2] == [str(users), str(users * 5)] and line.split()[-3:] == [str(parts), str(row["kept"]), "True"]

    def other_files(flags, output, stop_at=None):
        output.mkdir(exist_ok=True)
        pl.DataFrame({"rank": [len(str(output))]}).write_parquet(output / "part-0.parquet")
        return "1 users in 1.0 s", 1

    monkeypatch.setattr(module, "run", other_files)
    assert module.main(["--workdir=run", f"--path={folder / 'moved'}", f"--output={tmp_path / 'o.json'}"]) == 1


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("lists", "a score of user"),
        ("candidates", "a score of user"),
        ("user vectors", "the vector of user"),
        ("vectors", "the vector of item"),
    ],
)
def test_a_value_that_is_not_finite_ends_it(folder, users, shop, tmp_path, monkeypatch, kind, named):
    restore = offline.restore
    nan = lambda x: jax.numpy.full_like(x, np.nan) if np.issubdtype(x.dtype, np.floating) else x  # noqa: E731
    monkeypatch.setattr(
        offline, "restore", lambda *arguments: (lambda step, params: (step, jax.tree.map(nan, params)))(*restore(*arguments))
    )
    request = {"users": users} if kind != "vectors" else {}
    if kind == "candidates":
        request |= {"candidates": tmp_path / "pairs.csv"}
        shop.interactions.select("user", "item").unique().write_csv(request["candidates"])
    with pytest.raises(FloatingPointError, match=rf"{named} '.+' is not finite"):
        scored(folder, tmp_path / "lists", **request, **({"vectors": True} if "vectors" in kind else {}))
    assert not list((tmp_path / "lists").glob("part-*"))


# ---- text generators


def test_text_generators(tmp_path, tiny, shop):
    """Beams as wide as the catalogue: the lists are the order of the likelihoods of all items as candidates."""
    fields = {name: value for name, value in tiny.items() if "synthetic" not in name} | FIELDS
    fields |= {"objective.item": 0.0, "objective.token": 1.0, "eval.ranking": "likelihood", "data.path": "tables", "data.prompt": "so: "}
    fields |= {"train.steps": 4, "score.batch_rows": 20, "eval.test": False}
    (tmp_path / "tables").mkdir()
    events, items = shop.interactions, shop.items.head(12).select("item", "title")
    events = events.filter(pl.col("item").is_in(items["item"].to_list()))
    events.write_parquet(tmp_path / "tables" / "interactions.parquet")
    items.write_csv(tmp_path / "tables" / "items.csv")
    (tmp_path / "run.py").write_text(config_text(fields))
    run(tmp_path, "--config=run.py", "--workdir=run")
    some = events["user"].unique().sort().to_list()[:5]
    few = events.filter(pl.col("user").is_in(some))
    few.write_parquet(tmp_path / "users.parquet")
    pl.DataFrame([(u, i) for u in some for i in items["item"]], schema=["user", "item"], orient="row").write_csv(tmp_path / "pairs.csv")
    request = {"users": tmp_path / "users.parquet"}
    given = lists(scored(tmp_path, tmp_path / "given", candidates=tmp_path / "pairs.csv", **request))
    found = lists(scored(tmp_path, tmp_path / "found", top_k=12, **request))
    for user in some:
        seen = set(few.filter(pl.col("user") == user)["item"])
        expected = [(item, value) for item, value in zip(*given[user], strict=True) if item not in seen]
        assert found[user][0] == [item for item, _ in expected] and len(expected) == 12 - len(seen)
        np.testing.assert_allclose(found[user][1], [value for _, value in expected], rtol=1e-4)
    rec = iam_jax.load(tmp_path / "run")
    histories = dict(few.sort("user", "timestamp").group_by("user", maintain_order=True).agg("item").iter_rows())
    assert rec.recommend(few, k=12).equals(scored(tmp_path, tmp_path / "again", top_k=12, **request))
    rank, ties = rec.rank([histories[user] for user in some], [given[user][0][3] for user in some], filter_seen=False)
    values = [given[user][1] for user in some]  # equal texts tie
    assert rank.tolist() == [1 + sum(other > value[3] for other in value) for value in values]
    assert ties.tolist() == [sum(other == value[3] for other in value) - 1 for value in values]
    assert rec.recommend([[*histories[some[0]], {"text": "red zebra"}]], k=3) != rec.recommend([histories[some[0]]], k=3)
    with pytest.raises(InputError, match=r"config\.eval\.ranking = 'likelihood' has no vectors"):
        rec.item_vectors()
    long_texts = override(get_config(str(tmp_path / "run")), {"data.item_tokens": 40})
    (tmp_path / "run" / "config.json").write_text(to_json(resolve(long_texts)))
    rec, history = iam_jax.load(tmp_path / "run"), [{"text": "zebra lantern " * 3}]  # longer than all items
    ranked, order = rec.recommend([history], k=12)[0], rec.items["item"].to_list()
    np.testing.assert_allclose([dict(ranked)[item] for item in order], rec.score([history], [order])[0], rtol=1e-4)
    with pytest.raises(InputError, match=r"--vectors: a model with config\.eval\.ranking = 'likelihood' has no vectors"):
        scored(tmp_path, tmp_path / "vectors", vectors=True)


# ---- refused, each in one line


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        ({}, ("--output=DIR is missing",)),
        ({"output": "out"}, ("--users=TABLE is missing",)),
        ({"output": "out", "candidates": "pairs.csv", "vectors": True}, ("--candidates=TABLE needs --users",)),
        ({"output": "out", "users": "good.csv", "top_k": 0}, ("--top_k=0",)),
        (
            {"output": "out", "users": "good.csv", "vectors": True, "top_k": 3},
            ("--vectors cannot be combined with --candidates or --top_k",),
        ),
        ({"output": "run", "users": "good.csv"}, ("--output=run is not empty and has no request.json",)),
        ({"output": "good.csv/out", "users": "good.csv"}, ("good.csv cannot be written to",)),
        ({"output": "out", "users": "good.csv", "step": "77"}, ("--step=77", "30")),
        ({"output": "out", "users": "absent.csv"}, ("absent.csv", "No such file")),
        ({"output": "out", "users": "pairs.csv"}, ("pairs.csv: no column 'timestamp'",)),
        ({"output": "out", "users": "unknown.csv"}, ("unknown.csv: column 'item': 1 item that", "--items=TABLE", "'nowhere' (line 3)")),
        ({"output": "out", "users": "good.csv", "candidates": "unknown.csv"}, ("unknown.csv: column 'item'", "'nowhere' (line 3)")),
        ({"output": "out", "users": "good.csv", "candidates": "twice.csv"}, ("twice.csv: 2 rows repeat a pair", "u")),
        ({"output": "out", "users": "good.csv", "candidates": "stranger.csv"}, ("stranger.csv: column 'user'", "'nobody' (line 2)")),
        (
            {"output": "out", "users": "good.csv", "items": "known.csv"},
            ("known.csv: column 'item'", "in the working folder's catalogue already", "(line 2)"),
        ),
        (
            {"output": "out", "users": "good.csv", "items": "double.csv"},
            ("double.csv: column", "more than once", "line 2", "line 4"),
        ),
        ({"output": "out", "users": "good.csv", "items": "empty.csv"}, ("empty.csv: column 'item'", "without text", "'zy' (line 3)")),
        ({"output": "out", "users": "good.csv", "items": "untitled.csv"}, ("untitled.csv: config.data.text = '{title}' uses {title}",)),
        ({"output": "out", "users": "good.csv", "model__width": 8}, ("model.width (16 there, 8 here)",)),
    ],
)
def test_what_does_not_fit_is_told(folder, shop, monkeypatch, request_, named):
    monkeypatch.chdir(folder)
    item = shop.items["item"][0]
    tables = {
        "good.csv": f"user,item,timestamp\nu,{item},1\n",
        "pairs.csv": f"user,item\nu,{item}\n",
        "unknown.csv": f"user,item,timestamp\nu,{item},1\nu,nowhere,2\n",
        "twice.csv": f"user,item\nu,{item}\nu,{item}\n",
        "stranger.csv": f"user,item\nnobody,{item}\n",
        "known.csv": f"item,title\n{item},x\n",
        "double.csv": "item,title\nzz,x\nzy,y\nzz,z\n",
        "untitled.csv": "item,name\nzz,x\n",
        "empty.csv": "item,title\nzz,x\nzy,\n",
    }
    for name, text in tables.items():
        (folder / name).write_text(text)
    before = contents(folder)
    with pytest.raises(InputError) as refused:
        scored(folder, request_.pop("output", ""), **request_)
    told = str(refused.value)
    assert "\n" not in told and all(name in told for name in named), told
    assert contents(folder) == before


def test_refused_commands_end_with_2(folder):
    for flags, named in (
        (("--mode=score", "--workdir=run", "--users=run.py", "--output=out"), "run.py: a table ends in .csv"),
        (("--mode=score", "--workdir=absent", "--users=run.py", "--output=out"), "absent/config.json"),
        (("--workdir=run", "--users=run.py"), "--users is for --mode=score"),
    ):
        _, err = run(folder, *flags, code=2)
        assert err.startswith("error: ") and err.count("\n") == 1 and named in err
    assert not (folder / "out").exists()


def test_other_requests_and_other_folders_are_refused(folder, users, tmp_path):
    scored(folder, tmp_path / "out", users=users, top_k=3)
    before = contents(tmp_path / "out")
    for change, named in (
        ({"top_k": 4}, "top_k"),
        ({"eval__filter_seen": False}, "eval.filter_seen"),
        ({"score__part_users": 8}, "score.part_users"),
    ):
        with pytest.raises(InputError, match=rf"another request \(.*{named}.* differ\)"):
            scored(folder, tmp_path / "out", **({"users": users, "top_k": 3} | change))
    assert contents(tmp_path / "out") == before

    copy = tmp_path / "copy"
    shutil.copytree(folder / "run", copy / "run")
    scored(copy, tmp_path / "out", users=users, top_k=3)  # moved: the same run
    items = pl.read_parquet(copy / "run" / stored_lib.ITEMS_FILE)
    items.with_columns(pl.when(pl.col("item") == items["item"][0]).then(pl.lit("other")).otherwise("item").alias("item")).write_parquet(
        copy / "run" / stored_lib.ITEMS_FILE
    )
    with pytest.raises(InputError, match=r"do not match data\.json: their items_sha256"):
        scored(copy, tmp_path / "new", users=users)
    (copy / "run" / stored_lib.ITEMS_FILE).unlink()
    with pytest.raises(InputError, match=r"items\.parquet is missing"):
        scored(copy, tmp_path / "new", users=users)
    shutil.copy(folder / "run" / stored_lib.ITEMS_FILE, copy / "run")
    for saved in (copy / "run" / "checkpoints").glob("*/progress/metadata"):
        saved.write_text(json.dumps(json.loads(saved.read_text()) | {"minutes": 77.0}))
    with pytest.raises(InputError, match=r"another request \(run differ\)"):
        scored(copy, tmp_path / "out", users=users, top_k=3)  # trained anew: the same step, another model


def test_added_items_need_a_model_that_reads_text(folder, tmp_path):
    config = config_of(folder, objective__vectors="table")
    with pytest.raises(InputError, match=r"--items: the model's item vectors do not come from text"):
        ScoreRequest(output=str(tmp_path / "out"), vectors=True, items="new.csv").check(config)

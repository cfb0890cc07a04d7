"""The table of a comparison agrees with its runs, and runs that cannot be compared are refused."""

import importlib.util
import json
import subprocess
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from forks import python

from iam_jax.config import flatten
from iam_jax.errors import InputError
from iam_jax.ranking import metrics
from iam_jax.runs import compare

ROOT = Path(__file__).parents[1]
PROTOCOL = {"split": "leave_one_out", "filter_seen": True, "candidates": 1234, "ks": [1, 3]}


def write_run(
    folder: Path, ranks, ties=None, split="abc", users=None, cost=None, protocol=(), bootstrap=(200, 7), losses=(), ks=(1, 3), baselines=()
) -> Path:
    """Writes a working folder with test ranks and one validation event of rank 1. baselines: {name: test ranks}."""
    folder.mkdir(parents=True)
    n = len(ranks)
    frame = {
        "split": ["validation"] + ["test"] * n,
        "user": ["u0", *(users or [f"u{k}" for k in range(n)])],
        "timestamp": range(n + 1),
        "target": ["a"] * (n + 1),
        "rank": [1, *ranks],
        "ties": [0] * (n + 1),
    }
    frame = pl.DataFrame(frame)
    frame.write_parquet(folder / "ranks.parquet")
    results = {"model": {}, "popularity": {}}
    for part in ("validation", "test"):
        rows = frame.filter(pl.col("split") == part)
        cold = np.zeros(len(rows), bool)
        summary = metrics.summarize(rows["user"].to_numpy(), rows["rank"].to_numpy(), rows["ties"].to_numpy(), cold, ks, *bootstrap)
        results["model"][part] = summary | (dict(losses) if part == "validation" else {})
        results["popularity"][part] = summary | {"ndcg@3": 0.125}
    evaluation = {"split_sha256": split, "protocol": PROTOCOL | dict(protocol), "step": 3, "results": results}
    evaluation["bootstrap"] = dict(zip(("resamples", "seed"), bootstrap, strict=True))
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    if baselines:
        rows = [
            {"name": name, "split": part, "rank": rank, "ties": 0}
            for name, of in baselines.items()
            for part, rank in zip(frame["split"], [1, *of], strict=True)
        ]
        pl.DataFrame(rows).write_parquet(folder / "baselines.parquet")
    if cost:
        (folder / "run.json").write_text(json.dumps(cost))
    return folder


COST = {"parameters": 5000, "trained": 4000, "steps": 9, "tokens_seen": 1234567, "minutes": 2.25}


@pytest.fixture
def two_runs(tmp_path):
    users = ["u0", "u0", "u1", "u2", "u3"]
    first = write_run(tmp_path / "one", [1, 1, 3, 1, 9], users=users, cost=COST)
    second = write_run(tmp_path / "two", [1, 3, 3, 1, 9], users=users, losses={"token_loss": 1.5, "text_loss": 1.25})
    return {"one": first, "b|c": second}


def test_runs_of_a_version_without_an_order_of_ties_had_the_default(tmp_path):
    old = write_run(tmp_path / "one", [1, 2])
    new = write_run(tmp_path / "two", [1, 2], protocol={"ties": "hash", "duplicates": "keep"})
    assert compare.collect({"one": old, "two": new})["difference"]["test"]["two"]["ndcg@3"] == 0
    other = write_run(tmp_path / "three", [1, 2], protocol={"ties": "file", "duplicates": "keep"})
    with pytest.raises(InputError, match=r"protocol\.ties is 'hash' in one, 'file' in two"):
        compare.collect({"one": old, "two": other})


def test_new_and_repeated_targets_have_rows_if_there_are_any(two_runs):
    found = compare.collect(two_runs)
    assert not any("repeated targets" in row[0] for row in compare.table(found))
    for number, summary in enumerate(found["results"]["test"].values()):
        summary |= {"new": {"events": 3, "ndcg@3": 0.25}, "repeated": {"events": number, "ndcg@3": 0.5 + number}}
    rows = {row[0]: row[1:] for row in compare.table(found)}
    assert rows["NDCG@3, new targets"][:2] == ["0.2500", "0.2500"] and rows["NDCG@3, repeated targets"][:2] == ["0.5000", "1.5000"]


def test_differences_are_paired_and_resample_users(two_runs):
    found = compare.collect(two_runs)
    difference = found["difference"]["test"]["b|c"]
    # One event of user u0, who has two: from gain 1 to 1/log2(4) in NDCG@3, from 1 to 0 in HR@1.
    assert difference["ndcg@3"] == pytest.approx(-0.5 / 5) and difference["hr@1"] == pytest.approx(-1 / 5)
    draws, generator = [], np.random.default_rng(7)
    for _ in range(200):
        drawn = generator.integers(4, size=4)
        draws.append(-0.5 * (drawn == 0).sum() / sum(2 if user == 0 else 1 for user in drawn))
    assert difference["ndcg@3_ci"] == pytest.approx(np.percentile(draws, [2.5, 97.5]).tolist())
    assert found["difference"]["validation"]["b|c"]["ndcg@3"] == 0
    assert found["results"]["test"]["one"]["ndcg@3"] == pytest.approx((1 + 1 + 0.5 + 1 + 0) / 5)
    assert found["results"]["test"]["popularity"]["ndcg@3"] == 0.125
    assert found["runs"] == {"one": {"step": 3, **COST}, "b|c": {"step": 3, **dict.fromkeys(COST)}}
    assert found["split_sha256"] == "abc" and found["bootstrap"] == {"resamples": 200, "seed": 7}


def test_baselines_have_differences_too(tmp_path):
    users = ["u0", "u0", "u1", "u2"]
    run = write_run(tmp_path / "run", [1, 1, 2, 9], users=users, baselines={"popularity": [1, 2, 1, 9], "knn": [3, 3, 3, 3]})
    same = write_run(tmp_path / "popularity", [1, 2, 1, 9], users=users)
    found = compare.collect({"run": run, "popularity": same})
    difference = found["difference"]["test"]
    assert difference["popularity'"] == difference["popularity"] and difference["popularity"]["hr@1"] == 0
    assert difference["popularity"]["ndcg@3"] == pytest.approx(0, abs=1e-12) and difference["popularity"]["hr@1_ci"][0] < 0
    assert "knn" not in difference  # it is not in evaluation.json
    none = write_run(tmp_path / "none", [1, 1, 2, 9], users=users)
    assert "popularity" not in compare.collect({"none": none, "run": run})["difference"]["test"]


def test_over_seeds_draws_a_user_with_the_events_of_all_seeds(tmp_path):
    users, rng = [f"u{k}" for k in (0, 0, 1, 2, 3, 4, 5, 5, 5)], np.random.default_rng(0)
    ranks = rng.integers(1, 5, (2, 3, 9))  # side, seed, event
    sides = [
        {seed: compare.read(write_run(tmp_path / f"{side}{seed}", ranks[side, seed].tolist(), users=users)) for seed in range(3)}
        for side in range(2)
    ]
    found = compare.over_seeds(sides[0], sides[1] | {7: sides[1][0]})
    gain = np.where(ranks <= 3, 1 / np.log2(ranks + 1), 0)
    apart = gain[0] - gain[1]  # seed, event
    assert found["seeds"] == [0, 1, 2] and found["ndcg@3"] == pytest.approx(apart.mean())
    assert [found["by_seed"][seed]["ndcg@3"] for seed in range(3)] == pytest.approx(apart.mean(1))
    of_user = np.array([int(user[1:]) for user in users])
    draws, generator = [], np.random.default_rng(7)
    for _ in range(200):
        drawn = generator.integers(6, size=6)
        draws.append(np.concatenate([apart[:, of_user == user].ravel() for user in drawn]).mean())
    assert found["ndcg@3_ci"] == pytest.approx(np.percentile(draws, [2.5, 97.5]).tolist())
    assert compare.over_seeds(sides[0], {5: sides[1][0]}) is None


def test_one_table_as_text_and_markdown(two_runs, tmp_path):
    found = compare.collect(two_runs)
    rows = {row[0].strip(): row[1:] for row in compare.table(found) if not row[0].startswith("  ")}
    assert rows["test"] == ["one", "b|c", "popularity"]
    for metric in (f"{name}@{k}" for name in ("ndcg", "hr", "mrr", "precision") for k in (1, 3)):
        assert rows[metric.upper()][0].startswith(f"{found['results']['test']['one'][metric]:.4f} [")
    assert rows["parameters"] == ["5,000", "", ""] and rows["of them trained"] == ["4,000", "", ""]
    assert rows["tokens seen"] == ["1,234,567", "", ""] and rows["training minutes"][0] == f"{2.25:.1f}"
    assert rows["step evaluated"] == ["3", "3", ""] and rows["validation token_loss"] == ["", "1.5000", ""]
    low, high = found["difference"]["test"]["b|c"]["ndcg@3_ci"]
    cell = f"-0.1000 [{low:+.4f}, {high:+.4f}]"
    compare.write(found, tmp_path / "out")
    text, markdown = ((tmp_path / "out" / f"comparison.{ending}").read_text() for ending in ("txt", "md"))
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == json.loads(json.dumps(found))
    assert ["minus", "one", *cell.split()] in [line.split() for line in text.splitlines()] and "4 users, 5 events, 1,234 candidates" in text
    assert f"| minus one |  | {cell} |  |" in markdown
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in lines} == {5 - 1 + 1}  # name, three columns


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"split": "x" * 64}, ["split_sha256 is 'abc' in one, xxxxxxxxxxxx… in two"]),
        ({"protocol": {"filter_seen": False}}, ["protocol.filter_seen is True in one, False in two"]),
        ({"protocol": {"ranking": "likelihood"}}, ["protocol.ranking is None in one, 'likelihood' in two"]),
        (
            {"protocol": {"ks": [3, 1], "candidates": 9}},
            ["protocol.candidates is 1234 in one, 9 in two; protocol.ks is [1, 3]"],
        ),
        ({"users": ["u0", "v"]}, ["ranks.parquet has other events"]),
    ],
)
def test_runs_that_cannot_be_compared(tmp_path, other, named):
    folders = [write_run(tmp_path / "one", [1, 2]), write_run(tmp_path / "two", [1, 2], **other)]
    with pytest.raises(InputError) as caught:
        compare.collect(compare.named(folders))
    assert all(name in str(caught.value) for name in named) and str(folders[1]) in str(caught.value) and "\n" not in str(caught.value)


def test_intervals_of_one_table_are_of_one_kind(tmp_path):
    folders = [write_run(tmp_path / name, [1, 2]) for name in ("one", "two")]
    path = folders[1] / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bootstrap": {"resamples": 7, "seed": 0}}))
    with pytest.raises(InputError, match=r"two: the intervals have other settings .*'resamples': 7"):
        compare.collect(compare.named(folders))


def test_candidates_are_compared_if_both_runs_have_their_hash(tmp_path):
    folders = [write_run(tmp_path / name, [1, 2]) for name in ("one", "two")]
    (folders[0] / "data.json").write_text('{"items_sha256": "aa"}')
    compare.collect(compare.named(folders))
    (folders[1] / "data.json").write_text('{"items_sha256": "bb"}')
    with pytest.raises(InputError, match="items_sha256 is 'aa' in one, 'bb' in two"):
        compare.collect(compare.named(folders))


def test_ranks_of_another_evaluation_than_the_means(tmp_path):
    """As if the evaluation was interrupted between the two files."""
    folders = [write_run(tmp_path / "one", [1, 2]), write_run(tmp_path / "two", [1, 2])]
    write_run(tmp_path / "later", [2, 2])
    (tmp_path / "later" / "ranks.parquet").rename(folders[1] / "ranks.parquet")
    with pytest.raises(InputError, match="from two evaluations, one of them interrupted; evaluate again"):
        compare.collect(compare.named(folders))


@pytest.mark.parametrize("missing", ["evaluation.json", "ranks.parquet"])
@pytest.mark.parametrize("how", ["absent", "broken"])
def test_folders_without_an_evaluation(tmp_path, missing, how):
    folders = [write_run(tmp_path / "one", [1, 2]), write_run(tmp_path / "two", [1, 2])]
    path = folders[1] / missing
    path.unlink() if how == "absent" else path.write_text("{")
    with pytest.raises(InputError, match=f"^{folders[1]}: " + (f"no {missing} there" if how == "absent" else "the results of")):
        compare.collect(compare.named(folders))


def test_names_of_runs_are_distinct(tmp_path):
    assert list(compare.named([Path("a/x"), Path("b/y/")])) == ["x", "y"]
    assert list(compare.named([Path("a/x"), Path("b/x"), Path("c")])) == ["a/x", "b/x", f"{Path.cwd().name}/c"]
    for folders, message in (([Path("a")], "two working folders or more"), ([Path("a"), Path("b/../a")], "given twice")):
        with pytest.raises(InputError, match=message):
            compare.named(folders)


def test_the_command(two_runs, tmp_path):
    def main(*arguments):
        command = [python(), "-m", "iam_jax.main", "--mode=compare", *arguments]
        process = subprocess.run(command, cwd=tmp_path, env=None, capture_output=True, text=True, timeout=60)
        return process.returncode, process.stdout, process.stderr

    code, out, err = main("--runs=one,two", "--output=out")
    assert (code, err) == (0, "") and out.startswith((tmp_path / "out" / "comparison.txt").read_text())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"comparison.{ending}" for ending in ("json", "md", "txt")}
    for arguments, message in (
        (("--runs=one,nowhere", "--output=never"), "nowhere: no evaluation.json there"),
        (("--runs=one", "--output=never"), "two working folders or more"),
        ((), "two working folders or more"),
        (("--runs=one,two", "--output=one/run.json"), "--output=one/run.json: cannot be written"),
    ):
        code, out, err = main(*arguments)
        assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "never").exists()


def load(name):
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_comparison_names_configs_of_one_protocol(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    comparisons, configs = load("compare").COMPARISONS, ROOT / "configs"
    same = ("source", "category", "untitled", "k_core", "last_n", "split", "t1", "t2", "context_items")
    for variants in comparisons.values():
        protocols = set()
        for config, *overrides in variants.values():
            path, _, variant = config.partition(":")
            spec = importlib.util.spec_from_file_location(path, configs / path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            made = flatten(module.get_config(*([variant] if variant else [])).to_dict())
            made |= dict(override.removeprefix("--config.").split("=", 1) for override in overrides)
            evaluation = {name: value for name, value in made.items() if name.startswith("eval.") and name != "eval.batch_rows"}
            protocol = evaluation | {name: made[f"data.{name}"] for name in same}
            protocols.add(tuple((name, str(value)) for name, value in sorted(protocol.items())))
        assert len(protocols) == 1

"""benchmarks/sasrec.py at toy size, if RecTools is installed. No time is asserted."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from iam_jax.config import get_config, to_json
from iam_jax.ranking import metrics
from iam_jax.runs import compare

FOLDER = Path(__file__).parents[1] / "benchmarks"
SMALL = ["data.k_core=0", "eval.resamples=20", "train.batch_rows=4", "model.width=16", "model.mlp_width=16"]
needs_rectools = pytest.mark.skipif(importlib.util.find_spec("rectools") is None, reason="RecTools is not installed: the extra `rectools`")


def run(*flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, FOLDER / "sasrec.py", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    """User 0 has 70 events, more than a session; only one user has items i40 to i45, and i44 and i45 have no training event; times tie."""
    folder, rng = tmp_path_factory.mktemp("tables"), np.random.default_rng(0)
    lines = ["user\titem\ttimestamp"]
    for user in range(40):
        start, events = rng.integers(40), 70 if user == 0 else rng.integers(5, 12)
        lines += [f"u{user:02}\ti{(start + 3 * t + rng.integers(2)) % 40:02}\t{t // 2}" for t in range(events)]
    lines += [f"ux\ti{40 + t}\t{t}" for t in range(6)]
    (folder / "interactions.tsv").write_text("\n".join(lines) + "\n")
    (folder / "items.tsv").write_text("item\ttitle\n" + "".join(f"i{i:02}\ttitle {i}\n" for i in range(46)))
    return folder


@needs_rectools
def test_speed(tables, tmp_path):
    output = tmp_path / "s.json"
    few = ["--windows=2", "--seconds=0.05", "--trial_seconds=0.05", "--warmup_steps=1", "--batch_size", 4, 8]
    done = run("speed", f"--path={tables}", "--set", *SMALL, *few, f"--output={output}")
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert [trial["batch"] for trial in result["trials"]] == [4, 8]
    best = max(result["trials"], key=lambda trial: trial["events_per_second"])
    ours, theirs = result["results"]["iam_jax"], result["results"]["rectools"]
    assert (ours["batch"], theirs["batch"]) == (4, best["batch"])
    for side in (ours, theirs):
        assert len(side["samples"]) == 2 and side["warmup_seconds"] > 0
        for sample in side["samples"]:
            assert sample["slots"] > sample["tokens"] and sample["seconds"] > 0.05
            assert sample["events_per_second"] == pytest.approx(sample["events"] / sample["seconds"])
        rates = [sample["events_per_second"] for sample in side["samples"]]
        assert side["events_per_second"] == pytest.approx(np.mean(rates)) and side["events_spread"] == [min(rates), max(rates)]
    # The real tokens of a session are its targets; a window of a long history has context tokens without targets.
    assert all(sample["events"] == sample["tokens"] > 0 for sample in theirs["samples"])
    assert all(0 < sample["events"] <= sample["tokens"] for sample in ours["samples"])
    assert all(sample["slots"] == sample["steps"] * 4 * 64 for sample in ours["samples"])
    assert all(sample["slots"] % 50 == 0 for sample in theirs["samples"]) and theirs["padding"] > 0.5 > ours["padding"]
    assert result["events_ratio"] == pytest.approx(ours["events_per_second"] / theirs["events_per_second"])
    assert f"{result['events_ratio']:.2f} times RecTools' real events per second" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("iam_jax   "))
    assert line.split()[1:3] == ["4", f"{ours['events_per_second']:,.0f}"]


@needs_rectools
def test_quality(tables, tmp_path, monkeypatch):
    """Two seeds; the same results as runs of ours give a difference of 0; finished seeds are kept; other settings are refused."""
    folder, output = tmp_path / "peer", tmp_path / "q.json"
    flags = ["quality", f"--path={tables}", "--epochs=2", "--batch_size=16", f"--output={output}"]
    flags += ["--learning_rate", 0.01, 0.001]
    done = run(*flags, "--set", *SMALL, "--seeds", 0, 1, f"--folder={folder}")
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    tried = {trial["learning_rate"]: trial["ndcg@10"] for trial in result["trials"]}
    assert list(tried) == [0.01, 0.001] and result["seeds"]["1"]["rate"] == max(tried, key=tried.get)
    assert result["equal"] and "82 of 82 top tens identical" in done.stdout
    for seed in ("0", "1"):
        peer = compare.read(folder / f"seed{seed}")
        assert peer.evaluation["split_sha256"] == result["split_sha256"] and peer.evaluation["protocol"]["candidates"] == 46
        test = peer.ranks.filter(pl.col("split") == "test")
        (cold,) = test.filter(pl.col("target") == "i45").rows(named=True)
        assert cold["cold"] and cold["ties"] == 0  # i44, the other item without a vector, is in its history
        assert test.height == 41 and peer.cost["parameters"] > 41 * 16 and peer.cost["steps"] == 2 * 3
        value = metrics.ranking_metrics(test["rank"].to_numpy(), test["ties"].to_numpy(), [10])["ndcg@10"].mean()
        assert result["means"]["rectools"]["by_seed"][seed]["ndcg@10"] == pytest.approx(value)
        assert [step["epoch"] for step in result["seeds"][seed]["validations"]] == [1, 2]
    collected = compare.collect({"zero": folder / "seed0", "one": folder / "seed1"})  # as --mode=compare reads working folders
    assert collected["difference"]["test"]["one"]["events"] == 41

    monkeypatch.syspath_prepend(FOLDER)
    import sasrec

    config = sasrec.config_of(sasrec.parse(["quality", f"--path={tables}", "--set", *SMALL]))
    (folder / "seed0" / "config.json").write_text(to_json(config))
    assert get_config(str(folder / "seed0")).train.seed == 0
    again = [*flags, "--seeds", 0, 1, f"--folder={folder}", "--runs", folder / "seed0"]
    done = run(*again)
    assert done.returncode == 0, done.stderr
    assert "seed 0: already finished" in done.stdout and "no significant difference" in done.stdout
    difference = json.loads(output.read_text())["difference"]
    assert difference["seeds"] == [0] and difference["ndcg@10"] == 0 and difference["ndcg@10_ci"] == [0, 0]
    done = run(*again, "--dropout=0.1")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith("was made with another dropout; choose another --folder")
    other = json.loads(to_json(config))
    other["train"]["seed"], other["model"]["dropout"] = 1, 0.2
    (folder / "seed1" / "config.json").write_text(json.dumps(other))
    done = run(*again, folder / "seed1")
    assert done.returncode == 2 and f"seed1 was made with another model.dropout than {folder / 'seed0'}" in done.stderr
    done = run(*again, "--set", "data.context_items=3")
    assert done.returncode == 2 and "cannot be compared with RecTools here: it has another protocol" in done.stderr


@needs_rectools
def test_a_wrong_input_is_found_by_rectools_own_recommend(tables, monkeypatch):
    """Sessions without the last event give another top 10."""
    monkeypatch.syspath_prepend(FOLDER)
    import rectools_peer
    import sasrec

    from iam_jax.data.prepare import prepare

    args = sasrec.parse(["quality", f"--path={tables}", "--epochs=1", "--threads=1", "--set", *SMALL])
    config = sasrec.config_of(args)
    prepared = prepare(config.data)
    callback = rectools_peer.ValidationCallback(config, prepared, args, 0, 0.0)
    model = rectools_peer.fit(config, args, prepared.events, callback, 16, 0, 1e-3)
    evaluator = callback.evaluator
    assert rectools_peer.same_recommendations(model, evaluator, 30)["equal"]
    right = evaluator.history_vectors
    monkeypatch.setattr(evaluator, "history_vectors", lambda params, targets: right(params, targets - 1))
    assert not rectools_peer.same_recommendations(model, evaluator, 30)["equal"]


def test_wrong_settings_give_a_one_line_error(tmp_path):
    done = run("quality", f"--path={tmp_path}", "--epochs=1", "--set", "objective.softmax=sampled")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    has_rectools = importlib.util.find_spec("rectools") is not None
    assert ("the config is not SASRec" if has_rectools else "rectools is not installed: pip install") in done.stderr

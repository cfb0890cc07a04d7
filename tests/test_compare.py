"""launch/compare.py: its table agrees with the runs it read."""

import importlib.util
import json
from pathlib import Path

import polars as pl
import pytest

SPEC = importlib.util.spec_from_file_location("compare", Path(__file__).parents[1] / "launch" / "compare.py")
compare = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compare)


def write_run(folder: Path, ranks: list[int], split: str = "abc", **losses: float) -> None:
    folder.mkdir(parents=True)
    n = len(ranks)
    frame = {"split": ["test"] * n + ["validation"], "user": [f"u{k}" for k in range(n)] + ["u0"]}
    pl.DataFrame(frame | {"rank": [*ranks, 1], "ties": [0] * (n + 1)}).write_parquet(folder / "ranks.parquet")
    mean = sum(1 / [0, 1, 1.584962500721156, 2][rank] for rank in ranks) / n
    result = {"ndcg@10": mean, "ndcg@10_ci": [0, 1], "hr@10": 1.0, "hr@10_ci": [1, 1]}
    results = {"model": {"validation": result | losses, "test": result}, "popularity": {"test": result | {"ndcg@10": 0.125}}}
    (folder / "evaluation.json").write_text(json.dumps({"split_sha256": split, "step": 3, "results": results}))


def test_differences_are_paired(tmp_path):
    write_run(tmp_path / "one", [1, 1, 3, 1])
    write_run(tmp_path / "two-b", [1, 3, 3, 1], token_loss=1.5, text_loss=1.25)
    summary = compare.collect(tmp_path, ["one", "two, b"])
    difference = summary["difference"]["two, b"]
    assert difference["ndcg@10"] == pytest.approx(-0.125)
    low, high = difference["ndcg@10_ci"]
    assert low <= -0.125 <= high <= 0  # no resample of these users can favour the second
    assert summary["test"]["one"]["ndcg@10"] == pytest.approx(0.875) and summary["test"]["popularity"]["ndcg@10"] == 0.125
    text = compare.format_summary(summary)
    assert "-0.1250" in text and "-14.3%" in text
    assert text.splitlines()[-1] == "  two, b: 1.5000; 1.2500" and "one: " not in text.split("validation")[1]


def test_other_splits_are_refused(tmp_path):
    write_run(tmp_path / "one", [1])
    write_run(tmp_path / "two", [1], split="xyz")
    with pytest.raises(SystemExit, match="another split"):
        compare.collect(tmp_path, ["one", "two"])


def test_every_comparison_names_configs_that_exist():
    for variants in compare.COMPARISONS.values():
        assert all((compare.CONFIGS / config.partition(":")[0]).exists() for config, *_ in variants.values())

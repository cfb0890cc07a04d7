"""launch/reproduce.py: equal budgets, learning rates by validation, seeds paired, empty cells, and nothing run twice."""

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_compare import write_run

from iam_jax.config import resolve
from iam_jax.errors import InputError
from iam_jax.schedule import parse_schedule

ROOT = Path(__file__).parents[1]
SAME = {"split": "leave_one_out", "ks": [1, 10]}


@pytest.fixture
def reproduce(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    spec = importlib.util.spec_from_file_location("reproduce", ROOT / "launch" / "reproduce.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ran(reproduce, monkeypatch):
    """Commands that are told instead of run: SASRec is better with a smaller rate, the others with a larger one, and seed 1 diverges for
    item-aware attention."""
    told = []

    def run(workdir, flags):
        given = dict(flag.lstrip("-").split("=", 1) for flag in flags)
        told.append((workdir.parent.name, given))
        rate, seed = float(given["config.optimizer.learning_rate"]), int(given["config.train.seed"])
        sasrec = workdir.parent.name == "sasrec"
        if workdir.parent.name == "iam" and seed == 1:
            return 4
        if workdir.parent.name == "hatllm" and seed == 1:
            return 75
        cost = {"parameters": 10, "trained": 10, "steps": 2, "tokens_seen": 100 * (seed + 1), "minutes": 0.5}
        # two users: the first at rank 1, or 2 for SASRec; the second at rank 1 + seed
        write_run(workdir, [2 if sasrec else 1, 1 + seed], protocol=SAME, cost=cost, ks=(1, 10))
        path = workdir / "evaluation.json"
        evaluation = json.loads(path.read_text())
        evaluation["results"]["model"]["validation"]["ndcg@10"] = 1 / rate if sasrec else rate
        path.write_text(json.dumps(evaluation))
        module.mark(workdir, flags)
        return 0

    module = reproduce.commands
    monkeypatch.setattr(module, "run", run)
    return told


def arguments(tmp_path, *more):
    return ["demo", "--models", "ordinary", "sasrec", "--minutes=8", "--trials=2", "--folder", str(tmp_path / "runs"), *more]


def rows_of(tmp_path):
    lines = (tmp_path / "runs" / "reproduction.md").read_text().splitlines()
    return {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in (line.split("|") for line in lines if line.startswith("| "))
    }


def test_two_models_two_seeds_two_trials(reproduce, ran, tmp_path, capsys):
    assert reproduce.main(arguments(tmp_path, "--seeds", "0", "1")) == 0
    assert [model for model, _ in ran] == ["ordinary"] * 2 + ["sasrec"] * 2 + ["ordinary", "sasrec"] * 2
    assert {given["config.train.max_minutes"] for _, given in ran[:4]} == {"2.0"}  # each trial's budget is the same
    assert {given["config.train.max_minutes"] for _, given in ran[4:]} == {"8.0"}
    assert ["config.eval.test" in given for _, given in ran] == [True] * 4 + [False] * 4 and ran[0][1]["config.eval.test"] == "false"
    rates = [given["config.optimizer.learning_rate"] for _, given in ran]
    assert rates == ["0.003", "0.009", "0.001", "0.003", *["0.009", "0.001"] * 2]
    assert "2 x (2 trials of 2 minutes + 2 seeds of 8), 0.7 hours" in capsys.readouterr().out

    rows = rows_of(tmp_path)
    assert list(rows)[1:] == [
        "ordinary attention", "item-aware attention", "without intra", "without inter", "HatLLM's order", "SASRec",
        "popularity", "last_item", "item_knn",
    ]  # fmt: skip
    gain = 1 / np.log2(3)  # of rank 2
    by_seed = {"ordinary attention": [1, (1 + gain) / 2], "SASRec": [(gain + 1) / 2, gain]}
    for name, values in by_seed.items():
        assert rows[name][2] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
        assert rows[name][1] == "0, 1" and rows[name][5:] == ["10", "150", "0.5"]
    # The first user is at rank 2 instead of 1 with both seeds, the second never differs: the difference is -x for a resample of
    # the first user twice, 0 for the second twice.
    low, high = -(1 - gain), 0
    assert rows["SASRec"][4] == f"{(low + high) / 2:+.4f} [{low:+.4f}, {high:+.4f}]" and rows["ordinary attention"][4] == ""
    assert rows["popularity"][2] != "" and rows["popularity"][:2] == ["", ""]
    for name in ("item-aware attention", "without intra", "without inter", "HatLLM's order", "last_item", "item_knn"):
        assert rows[name] == [""] * 8
    saved = json.loads((tmp_path / "runs" / "reproduction.json").read_text())
    trials = saved["data"]["demo"]["rows"]["sasrec"]["trials"]
    assert [(trial["learning_rate"], trial["validation_ndcg@10"]) for trial in trials] == [
        (0.001, 1000.0),
        (0.003, pytest.approx(333.3, abs=0.1)),
    ]
    assert saved["data"]["demo"]["rows"]["iam"] is None and saved["budget"]["minutes"] == 8

    before = len(ran)
    assert reproduce.main(arguments(tmp_path, "--seeds", "0", "1")) == 0 and len(ran) == before
    assert reproduce.main(arguments(tmp_path, "--seeds", "0", "1", "2")) == 0 and len(ran) == before + 2
    assert rows_of(tmp_path)["SASRec"][1] == "0, 1, 2"


def test_what_diverges_or_is_interrupted_leaves_its_cells_empty(reproduce, ran, tmp_path):
    command = ["demo", "--models", "ordinary", "iam", "hatllm", "--minutes=8", "--trials=1", "--folder", str(tmp_path / "runs")]
    assert reproduce.main([*command, "--seeds", "0", "1"]) == 75  # hatllm's second seed is interrupted
    rows = rows_of(tmp_path)
    assert rows["ordinary attention"][1] == "0, 1" and rows["item-aware attention"][1] == rows["HatLLM's order"][1] == "0"
    assert rows["item-aware attention"][4] == "+0.0000 [+0.0000, +0.0000]"  # over the seed that both have
    assert [model for model, _ in ran].count("iam") == 3
    assert reproduce.main([*command, "--seeds", "0", "1"]) == 75
    assert [model for model, _ in ran].count("iam") == 3  # a run that diverged is not run again
    assert reproduce.main([*command, "--seeds", "1", "0"]) == 75 and rows_of(tmp_path)["item-aware attention"] == [""] * 8


def test_a_dry_run_and_a_table_run_nothing(reproduce, ran, tmp_path, capsys):
    assert reproduce.main(arguments(tmp_path, "--seeds", "5", "--dry-run", "--", "--config.train.steps=7")) == 0
    told = [shlex.split(line[3:]) for line in capsys.readouterr().out.splitlines() if " -m iam_jax.main " in line]
    assert len(told) == 2 * (2 + 1) and not ran and not (tmp_path / "runs").exists()
    for flags in told:
        assert "--config.train.steps=7" in flags and "--config.train.seed=5" in flags
    assert reproduce.main(arguments(tmp_path, "--table")) == 0 and not ran
    assert all(cells == [""] * 8 for cells in list(rows_of(tmp_path).values())[1:])
    for wrong in (["--minutes=0"], ["--trials=0"], ["--seeds", "1", "1"], ["--path", "toys=x"]):
        with pytest.raises(SystemExit) as ended:
            reproduce.main([*arguments(tmp_path), *wrong])
        assert ended.value.code == 2


def test_every_models_config_resolves_and_shares_the_protocol(reproduce, tmp_path):
    args = reproduce.argparse.Namespace(rest=[], paths={}, folder=tmp_path)
    for data, (_, repeats, _) in reproduce.DATASETS.items():
        shared = []
        for model in reproduce.MODELS:
            file, flags, rate = reproduce.model_flags(args, data, model)
            config = reproduce._config(file)
            assert rate == config.optimizer.learning_rate
            for name, value in (flag.removeprefix("--config.").split("=", 1) for flag in flags):
                *path, last = name.split(".")
                section = config[path[0]]
                section[last] = type(section[last])(value)
            made = resolve(config)
            shared.append({field: getattr(made.data, field) for field in reproduce.SHARED})
            layers = len(made.schedule.relations)
            assert model == "sasrec" or layers == 2 * repeats or (model, layers) == ("hatllm", 3)
        assert all(fields == shared[0] for fields in shared), data
    toys = configs_of("amazon_toys.py")
    for variant, model in {"iam": "iam", "full": "ordinary", "no_intra": "no_intra", "no_inter": "no_inter", "hatllm": "hatllm"}.items():
        assert resolve(toys(variant)).schedule.relations == parse_schedule(reproduce.MODELS[model][1](1)).relations
    assert toys() == toys("iam")
    with pytest.raises(InputError, match=r"amazon_toys\.py:half: the variants are iam, full"):
        toys("half")


def configs_of(file):
    space = {}
    exec((ROOT / "configs" / file).read_text(encoding="utf-8"), space)
    return space["get_config"]


def test_end_to_end(tmp_path, tiny):
    few = {"train.steps": 2, "eval.resamples": 5, "log.progress": False, "log.tensorboard": False}
    few |= {name: value for name, value in tiny.items() if name.startswith("data.synthetic.")}
    command = [sys.executable, ROOT / "launch" / "reproduce.py", "demo", "--models", "sasrec", "--seeds", "0", "--trials=1", "--minutes=1"]
    command += [f"--folder={tmp_path / 'runs'}", "--", *(f"--config.{name}={value}" for name, value in few.items())]
    process = subprocess.run(command, cwd=ROOT, env=None, capture_output=True, text=True, timeout=180)
    assert process.returncode == 0, process.stderr
    folders = sorted((tmp_path / "runs" / "demo" / "sasrec").glob("*rate0.001-seed0"))
    read = [json.loads((folder / "evaluation.json").read_text())["results"]["model"] for folder in folders]
    assert [(folder.name[:5], list(results)) for folder, results in zip(folders, read, strict=True)] == [
        ("rate0", ["validation", "test"]),
        ("trial", ["validation"]),  # the test events are read once, with the chosen learning rate
    ]
    rows = rows_of(tmp_path)
    assert rows["SASRec"][:2] == ["0.001", "0"] and float(rows["SASRec"][2]) > 0 and float(rows["SASRec"][7]) >= 0
    assert rows["popularity"][2] and rows["last_item"][2] and rows["ordinary attention"] == [""] * 8

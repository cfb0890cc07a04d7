"""launch/reproduce.py: equal budgets, learning rates selected on validation, paired seeds, empty cells, and no repeated runs."""

import importlib.util
import json
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from forks import python
from test_compare import write_run

from iam_jax.config import flatten, resolve
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
    """Records commands instead of running them. SASRec is better with a smaller rate, the others with a larger one, and seed 1 diverges
    for item-aware attention."""
    recorded = []

    def run(workdir, flags):
        values = dict(flag.lstrip("-").split("=", 1) for flag in flags)
        recorded.append((workdir.parent.name, values))
        if workdir.name.startswith("calibration"):
            # Lines of 5 steps: the first includes compilation, then 3, 1, 2 and 9 seconds; in the second calibration one second more each.
            times = np.array([100, 3, 1, 2, 9]) + int(workdir.name[-1])
            lines = [{"step": 5 * k + 5, "tokens_seen": 50 * k + 50, "tokens_per_second": 50 / t} for k, t in enumerate(times)]
            workdir.mkdir(parents=True)
            (workdir / "metrics.jsonl").write_text(
                "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 25, "validation/hr@1": 0}])
            )
            (workdir / "evaluation.json").write_text("{}")
            module.mark(workdir, flags)
            return 0
        rate, seed = float(values["config.optimizer.learning_rate"]), int(values["config.train.seed"])
        sasrec = workdir.parent.name == "sasrec"
        if workdir.parent.name == "iam" and seed == 1:
            workdir.parent.mkdir(parents=True, exist_ok=True)
            module.mark(workdir, flags, diverged=True)
            return 4
        if workdir.parent.name == "hatllm" and seed == 1:
            return 75
        cost = {"parameters": 10, "trained": 10, "steps": 2, "tokens_seen": 100 * (seed + 1), "minutes": 0.5}
        # two users: the first at rank 1, or 2 for SASRec; the second at rank 1 + seed
        write_run(workdir, [2 if sasrec else 1, 1 + seed], protocol=SAME, cost=cost, ks=(1, 10), baselines={"popularity": [9, 1]})
        path = workdir / "evaluation.json"
        evaluation = json.loads(path.read_text())
        evaluation["results"]["model"]["validation"]["ndcg@10"] = 1 / rate if sasrec else rate
        path.write_text(json.dumps(evaluation))
        module.mark(workdir, flags)
        return 0

    module = reproduce.commands
    monkeypatch.setattr(module, "run", run)
    return recorded


def arguments(tmp_path, *more):
    return ["demo", "--models", "ordinary", "sasrec", "--minutes=8", "--trials=2", "--folder", str(tmp_path / "runs"), *more]


def rows_of(tmp_path):
    lines = (tmp_path / "runs" / "reproduction.md").read_text().splitlines()
    return {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in (line.split("|") for line in lines if line.startswith("| "))
    }


def test_two_models_two_seeds_two_trials(reproduce, ran, tmp_path, capsys):
    assert reproduce.main(arguments(tmp_path, "--seeds", "0", "1")) == 0
    assert [model for model, _ in ran[:4]] == ["ordinary", "sasrec"] * 2  # calibrations take turns
    assert {values["config.train.steps"] for _, values in ran[:4]} == {"40"}
    ran = ran[4:]
    assert [model for model, _ in ran] == ["ordinary"] * 2 + ["sasrec"] * 2 + ["ordinary", "sasrec"] * 2
    # The median of 3, 1, 2 and 9 seconds for five steps is half a second per step. A trial takes 2 minutes, a run 8.
    assert {values["config.train.steps"] for _, values in ran[:4]} == {"240"}
    assert {values["config.train.steps"] for _, values in ran[4:]} == {"960"}
    assert ["config.eval.test" in values for _, values in ran] == [True] * 4 + [False] * 4 and ran[0][1]["config.eval.test"] == "false"
    for _, values in ran:  # warm-up, decay and validations at the same shares of every run
        steps = int(values["config.train.steps"])
        expected = {"optimizer.decay_steps": steps, "optimizer.warmup_steps": steps // 10, "train.eval_every": steps // 8}
        assert {name: int(values[f"config.{name}"]) for name in expected} == expected
        assert values["config.train.max_minutes"] == "0.0" and values["config.train.patience"] == "0"
    rates = [values["config.optimizer.learning_rate"] for _, values in ran]
    assert rates == ["0.003", "0.009", "0.001", "0.003", *["0.009", "0.001"] * 2]
    assert "2 x (2 trials of 2 minutes + 2 seeds of 8), at most 0.7 hours" in capsys.readouterr().out

    rows = rows_of(tmp_path)
    assert list(rows)[1:] == [
        "ordinary attention", "item-aware attention", "without intra", "without inter", "HatLLM's order", "SASRec",
        "popularity", "last_item", "item_knn",
    ]  # fmt: skip
    gain = 1 / np.log2(3)  # NDCG at rank 2
    by_seed = {"ordinary attention": [1, (1 + gain) / 2], "SASRec": [(gain + 1) / 2, gain]}
    for name, values in by_seed.items():
        assert rows[name][2] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
        assert rows[name][1] == "0, 1" and rows[name][5:] == ["10", "2", "150", "0.5"]
    # The first user is at rank 2 instead of 1 with both seeds, the second never differs. The difference is -x for a resample with
    # the first user twice, 0 for the second twice.
    low, high = -(1 - gain), 0
    assert rows["SASRec"][4] == f"{(low + high) / 2:+.4f} [{low:+.4f}, {high:+.4f}]" and rows["ordinary attention"][4] == ""
    assert rows["popularity"][2] != "" and rows["popularity"][:2] == ["", ""]
    # The second user is at rank 1 instead of 1 and 2; the first at rank 9 instead of 1, with NDCG 1 / log2(10).
    far = 1 / np.log2(10)
    low, high = far - 1, (1 - gain) / 2
    assert rows["popularity"][4] == f"{(low + high) / 2:+.4f} [{low:+.4f}, {high:+.4f}]"
    for name in ("item-aware attention", "without intra", "without inter", "HatLLM's order", "last_item", "item_knn"):
        assert rows[name] == [""] * 9
    saved = json.loads((tmp_path / "runs" / "reproduction.json").read_text())
    trials = saved["data"]["demo"]["rows"]["sasrec"]["trials"]
    assert [(trial["learning_rate"], trial["validation_ndcg@10"]) for trial in trials] == [
        (0.001, 1000.0),
        (0.003, pytest.approx(333.3, abs=0.1)),
    ]
    assert saved["data"]["demo"]["rows"]["iam"] is None and saved["budget"]["minutes"] == 8
    assert saved["data"]["demo"]["rows"]["sasrec"]["seconds_per_step"] == pytest.approx(0.5)


def test_finished_runs_are_not_repeated(reproduce, ran, tmp_path):
    assert reproduce.main(arguments(tmp_path, "--seeds", "0", "1")) == 0
    before = len(ran)
    assert reproduce.main(arguments(tmp_path, "--seeds", "0", "1")) == 0 and len(ran) == before
    assert reproduce.main(arguments(tmp_path, "--seeds", "2")) == 0 and len(ran) == before + 2
    assert rows_of(tmp_path)["SASRec"][1] == "0, 1, 2"  # earlier seeds stay in the table


def test_the_table_keeps_earlier_results(reproduce, ran, tmp_path, capsys):
    """Another data set, another path of the data and logging flags keep earlier results; another budget has its own folders."""
    folder = tmp_path / "runs"
    assert reproduce.main(arguments(tmp_path, "--path", f"demo={tmp_path}", "--", "--config.log.progress=false")) == 0
    filled = rows_of(tmp_path)
    assert filled["SASRec"][1] == "0, 1, 2"
    assert reproduce.main(["toys", "--models", "iam", "--seeds", "0", "--minutes=8", "--trials=2", "--table", f"--folder={folder}"]) == 0
    markdown = (folder / "reproduction.md").read_text()
    assert markdown.index("**toys**") < markdown.index("**demo**") and filled["SASRec"][4] in markdown
    before = len(ran)
    assert reproduce.main([*arguments(tmp_path), "--minutes=4", "--seeds", "0"]) == 0 and len(ran) == before + 6
    assert {values["config.train.steps"] for _, values in ran[before:]} == {"120", "480"}
    assert reproduce.main(arguments(tmp_path, "--table")) == 0 and rows_of(tmp_path)["SASRec"] == filled["SASRec"]
    capsys.readouterr()
    assert reproduce.main(arguments(tmp_path, "--table", "--", "--config.model.dropout=0.5")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "was run with other flags (only one of the two commands has '--config.model.dropout=0.5')" in error


def test_a_run_whose_folder_was_deleted_is_repeated(reproduce, ran, tmp_path):
    assert reproduce.main(arguments(tmp_path, "--seeds", "0")) == 0
    before, deleted = len(ran), next((tmp_path / "runs" / "demo" / "sasrec").glob("8min-*-seed0"))
    for path in deleted.iterdir():
        path.unlink()
    deleted.rmdir()
    assert reproduce.main(arguments(tmp_path, "--seeds", "0")) == 0 and len(ran) == before + 1 and (deleted / "evaluation.json").exists()


def test_diverged_and_interrupted_runs_have_empty_cells(reproduce, ran, tmp_path):
    command = ["demo", "--models", "ordinary", "iam", "hatllm", "--minutes=8", "--trials=1", "--folder", str(tmp_path / "runs")]
    assert reproduce.main([*command, "--seeds", "0", "1"]) == 75  # hatllm's second seed is interrupted
    rows = rows_of(tmp_path)
    assert rows["ordinary attention"][1] == "0, 1" and rows["HatLLM's order"][1] == "0"
    assert rows["item-aware attention"][1] == "0; 1 diverged"
    assert rows["item-aware attention"][4] == "+0.0000 [+0.0000, +0.0000]"  # over the common seed
    assert [model for model, _ in ran].count("iam") == 2 + 3
    assert reproduce.main([*command, "--seeds", "0", "1"]) == 75
    assert [model for model, _ in ran].count("iam") == 2 + 3  # a diverged run is not repeated
    assert reproduce.main([*command, "--seeds", "1", "0"]) == 75 and rows_of(tmp_path) == rows


def test_a_dry_run_and_a_table_run_nothing(reproduce, ran, tmp_path, capsys):
    assert reproduce.main(arguments(tmp_path, "--seeds", "5", "--dry-run", "--", "--config.train.steps=7")) == 0
    printed = [shlex.split(line[3:]) for line in capsys.readouterr().out.splitlines() if " -m iam_jax.main " in line]
    assert len(printed) == 2 * (2 + 2 + 1) and not ran and not (tmp_path / "runs").exists()
    runs = [flags for flags in printed if not any("calibration" in flag for flag in flags)]
    assert len(runs) == 6 and all(flags[-1] == "--config.train.steps=7" for flags in runs)  # the last of equal flags counts
    seeds = [next(flag for flag in flags if flag.startswith("--config.train.seed=")) for flags in printed]
    assert sorted(seed[-1] for seed in seeds) == ["0"] * 8 + ["5"] * 2  # calibrations and trials have their own seed
    assert reproduce.main(arguments(tmp_path, "--table")) == 0 and not ran
    assert all(cells == [""] * 9 for cells in list(rows_of(tmp_path).values())[1:])
    for wrong in (["--minutes=0"], ["--trials=0"], ["--seeds", "1", "1"], ["--path", "toys=x"], ["--", "--config.eval.test=false"]):
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
            shared.append({name: value for name, value in flatten(config.to_dict()).items() if name in reproduce.SHARED})
            assert len(shared[-1]) == len(reproduce.SHARED)
            assert model != "sasrec" or made.model.dropout == (0.2 if data == "ml1m" else 0.4)  # as published
            layers = len(made.schedule.relations)
            assert model == "sasrec" or layers == 2 * repeats or (model, layers) == ("hatllm", 3)
        assert all(fields == shared[0] for fields in shared), data
    toys = configs_of("amazon_toys.py")
    for variant, model in {"iam": "iam", "full": "ordinary", "no_intra": "no_intra", "no_inter": "no_inter", "hatllm": "hatllm"}.items():
        assert resolve(toys(variant)).schedule.relations == parse_schedule(reproduce.MODELS[model][1](1)).relations
    assert toys() == toys("iam")
    with pytest.raises(InputError, match=r"amazon_toys\.py:half: the variants are iam, full"):
        toys("half")


def test_a_signal_is_not_lost_when_the_command_is_about_to_end(reproduce, tmp_path, monkeypatch):
    child, commands = tmp_path / "child", reproduce.commands
    child.write_text(f"#!/bin/sh\ntrap '' TERM INT\ntouch {tmp_path}/there\nsleep 0.3\nexit 0\n")
    child.chmod(0o755)
    monkeypatch.setattr(commands.sys, "executable", str(child))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def stop():
        while not (tmp_path / "there").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    assert commands.run(tmp_path / "run", ["--flag"]) == 75
    assert (tmp_path / "run.command").read_text() == "--flag"  # marked as finished nevertheless
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert commands.run(tmp_path / "run", ["--flag"]) == 0


def configs_of(file):
    space = {}
    exec((ROOT / "configs" / file).read_text(encoding="utf-8"), space)
    return space["get_config"]


def test_end_to_end(reproduce, tmp_path, tiny, monkeypatch):
    """Commands that are not recorded, but run: one calibration, a trial, the run itself."""
    fields = {"train.steps": 2, "eval.resamples": 5, "log.progress": False, "log.tensorboard": False}
    fields |= {name: value for name, value in tiny.items() if name.startswith("data.synthetic.")}
    monkeypatch.setattr(reproduce, "CALIBRATIONS", 1)
    monkeypatch.setattr(sys, "executable", python())
    monkeypatch.chdir(ROOT)
    command = ["demo", "--models", "sasrec", "--seeds", "0", "--trials=1", "--minutes=1", f"--folder={tmp_path / 'runs'}"]
    assert reproduce.main([*command, "--", *(f"--config.{name}={value}" for name, value in fields.items())]) == 0
    folders = sorted((tmp_path / "runs" / "demo" / "sasrec").glob("*min-rate0.001-seed0"))
    read = [json.loads((folder / "evaluation.json").read_text())["results"]["model"] for folder in folders]
    assert [(folder.name.split("-")[0], list(results)) for folder, results in zip(folders, read, strict=True)] == [
        ("1min", ["validation", "test"]),
        ("trial", ["validation"]),  # the test events are read once, with the chosen learning rate
    ]
    rows = rows_of(tmp_path)
    assert rows["SASRec"][:2] == ["0.001", "0"] and float(rows["SASRec"][2]) > 0 and float(rows["SASRec"][8]) >= 0
    assert rows["popularity"][2] and rows["last_item"][2] and rows["ordinary attention"] == [""] * 9


def test_calibrations_and_trials_that_diverge(reproduce, ran, tmp_path, capsys, monkeypatch):
    run, commands = reproduce.commands.run, reproduce.commands

    def some_diverge(workdir, flags):
        if (workdir.parent.name, workdir.name[:5]) in (("iam", "calib"), ("no_intra", "trial")):
            workdir.parent.mkdir(parents=True, exist_ok=True)
            commands.mark(workdir, flags, diverged=True)
            return commands.NON_FINITE
        return run(workdir, flags)

    monkeypatch.setattr(commands, "run", some_diverge)
    command = ["demo", "--models", "ordinary", "iam", "no_intra", "--minutes=8", "--trials=2", "--seeds", "0"]
    for more in ([], ["--table"], ["--dry-run"]):
        assert reproduce.main([*command, f"--folder={tmp_path / 'runs'}", *more]) == 0
    printed = capsys.readouterr().out
    assert "demo, iam, seed 0: not run, a calibration diverged" in printed
    assert "demo, no_intra, seed 0: not run, every trial diverged" in printed
    rows = rows_of(tmp_path)
    assert rows["ordinary attention"][1] == "0" and rows["item-aware attention"] == [""] * 9
    assert rows["without intra"] == ["", "every trial diverged", *[""] * 7]

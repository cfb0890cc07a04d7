"""launch/reproduce.py: equal budgets, one search for every model, paired seeds, marked rows, and no repeated runs."""

import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
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
from iam_jax.ranking import metrics
from iam_jax.schedule import parse_schedule

ROOT = Path(__file__).parents[1]
SAME = {"split": "leave_one_out", "ks": [1, 10]}
GAIN = 1 / np.log2(3)  # NDCG at rank 2
FAR = 1 / np.log2(10)  # NDCG at rank 9


@pytest.fixture
def launch(monkeypatch):
    """The modules of launch/ by name."""
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    names = ("commands", "models", "budgets", "search", "results", "reproduce")
    return type("Launch", (), {name: importlib.import_module(name) for name in names})


class Runner:
    """Records commands instead of running them.

    A step takes half a second, and an epoch has 20 steps. SASRec is better with a smaller learning rate, the others with a larger one.
    """

    def __init__(self, commands):
        self.commands, self.ran, self.stops, self.diverge = commands, [], {}, lambda model, name, seed: False

    def __call__(self, workdir, flags, watch=None):
        values = dict(flag.lstrip("-").split("=", 1) for flag in flags)
        model = (workdir.parent.parent if workdir.parent.name.startswith("search-") else workdir.parent).name
        seed = int(values["config.train.seed"])
        self.ran.append((model, workdir.name, values))
        if self.diverge(model, workdir.name, seed):
            workdir.parent.mkdir(parents=True, exist_ok=True)
            self.commands.mark(workdir, flags, self.commands.DIVERGED)
            return self.commands.NON_FINITE
        workdir.mkdir(parents=True, exist_ok=True)
        if workdir.name.startswith("calibration"):
            # Lines of 5 steps: the first includes compilation, then 3, 1, 2 and 9 seconds; in the second calibration one second more each.
            times = np.array([100, 3, 1, 2, 9]) + int(workdir.name[len("calibration")])
            lines = [{"step": 5 * k + 5, "tokens_seen": 50 * k + 50, "tokens_per_second": 50 / t} for k, t in enumerate(times)]
            lines = [*(line | {"epoch": line["step"] / 20} for line in lines), {"step": 25, "validation/hr@1": 0}]
            (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            (workdir / "evaluation.json").write_text("{}")
            self.commands.mark(workdir, flags)
            return 0
        rate, steps, every = (float(values[f"config.{name}"]) for name in ("optimizer.learning_rate", "train.steps", "train.eval_every"))
        quality = min(0.9, 1e-4 / rate if model == "sasrec" else 10 * rate)
        log = workdir / "metrics.jsonl"
        done = len(log.read_text().splitlines()) if log.exists() else 0
        for number in range(done + 1, 9):
            with log.open("a") as file:
                file.write(json.dumps({"step": int(number * every), "validation/ndcg@10": quality * number / 8}) + "\n")
            if self.stops.get((model, workdir.name)) == number:
                del self.stops[model, workdir.name]
                return 75
            if watch and watch():
                return self.commands.ENDED
        text = log.read_text()
        shutil.rmtree(workdir)
        cost = {"parameters": 10, "trained": 10, "steps": int(steps), "tokens_seen": 100 * (seed + 1), "minutes": 0.5}
        # Two users: the first at rank 1, or 2 for SASRec; the second at rank 1 + seed. Fused, both are at rank 1.
        fused = {"fusion": [1, 1]} if "config.eval.fusion" in values else {}
        write_run(
            workdir,
            [2 if model == "sasrec" else 1, 1 + seed],
            protocol=SAME,
            cost=cost,
            ks=(1, 10),
            baselines={"far": [9, 1], "top": [2, 1]} | fused,
        )
        log.write_text(text)
        path = workdir / "evaluation.json"
        evaluation = json.loads(path.read_text())
        results = evaluation["results"]
        results["model"]["validation"]["ndcg@10"] = quality
        del results["popularity"]
        ranked = (("far", 0.2, [9, 1]), ("top", 0.4, [2, 1]), ("oracle", 0.9, [1, 1]))
        for name, value, ranks in (*((name, 0.95, ranks) for name, ranks in fused.items()), *ranked):
            summary = metrics.summarize(np.arange(2), np.array(ranks), np.zeros(2, int), np.zeros(2, bool), (1, 10), 200, 7)
            results[name] = {"validation": {"ndcg@10": value}, "test": summary}
        path.write_text(json.dumps(evaluation))
        self.commands.mark(workdir, flags)
        return 0


@pytest.fixture
def runner(launch, monkeypatch):
    made = Runner(launch.commands)
    monkeypatch.setattr(launch.commands, "run", made)
    return made


def arguments(tmp_path, *more, models=("ordinary", "sasrec"), trials=2):
    return ["demo", "--models", *models, f"--trials={trials}", "--folder", str(tmp_path / "runs"), *more]


def sections(tmp_path):
    """{heading: {first cell: other cells}} of the page; trials are keyed by the first two cells."""
    found, rows = {}, {}
    for line in (tmp_path / "runs" / "reproduction.md").read_text().splitlines():
        if line.startswith("#"):
            rows = found.setdefault(line.strip("# "), {})
        elif line.startswith("| "):
            first, *others = [cell.strip() for cell in line.split("|")[1:-1]]
            rows[(first, others[0]) if "Trials" in next(reversed(found)) else first] = others
    return found


def table(tmp_path, unit="minutes"):
    return next(rows for heading, rows in sections(tmp_path).items() if heading.startswith(f"Equal {unit}"))


def saved(tmp_path):
    return json.loads((tmp_path / "runs" / "reproduction.json").read_text())["data"]["demo"]


# ---- budgets and the table


def test_equal_minutes(launch, runner, tmp_path):
    assert launch.reproduce.main(arguments(tmp_path, "--minutes=8", "--trial_minutes=2", "--seeds", "0", "1")) == 0
    ran = [(model, values) for model, name, values in runner.ran if not name.startswith("calibration")]
    first = [model for model, name, _ in runner.ran[:4] if name.startswith("calibration")]
    assert first == ["ordinary", "sasrec"] * 2  # calibrations take turns
    assert [model for model, _ in ran] == ["ordinary"] * 2 + ["sasrec"] * 2 + ["ordinary", "sasrec"] * 2
    # The median of 3, 1, 2 and 9 seconds for five steps is half a second per step. A trial takes 2 minutes, a run 8.
    assert [values["config.train.steps"] for _, values in ran] == ["240"] * 4 + ["960"] * 4
    assert ["config.eval.test" in values for _, values in ran] == [True] * 4 + [False] * 4 and ran[0][1]["config.eval.test"] == "false"
    for _, values in ran:  # warm-up, decay and validations at the same shares of every run
        steps = int(values["config.train.steps"])
        expected = {"optimizer.decay_steps": steps, "optimizer.warmup_steps": steps // 10, "train.eval_every": steps // 8}
        assert {name: int(values[f"config.{name}"]) for name in expected} == expected
        assert values["config.train.max_minutes"] == "0.0" and values["config.train.patience"] == "0"
    rates = [float(values["config.optimizer.learning_rate"]) for _, values in ran]
    assert rates[0] == 0.003 and rates[2] == 0.003  # the first trial is the setting of the config
    assert rates[4:] == [max(rates[:2]), min(rates[2:4])] * 2

    rows = table(tmp_path)
    assert list(rows)[1:] == [
        *(launch.models.MODELS[model].title for model in launch.models.MODELS if not launch.models.MODELS[model].needs),
        "ordinary attention + transitions", "SASRec + transitions", "far", "top", "oracle",
    ]  # fmt: skip
    for name, values in {"ordinary attention": [1, (1 + GAIN) / 2], "SASRec": [(GAIN + 1) / 2, GAIN]}.items():
        assert rows[name][2] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
        assert rows[name][1] == "0, 1" and rows[name][7:] == ["10", "960", "150", "48.0", "8.0", "0.5", "0.500"]
    # The first user is at rank 2 instead of 1 with both seeds, the second never differs. The difference is -x for a resample with
    # the first user twice, 0 for the second twice.
    low, high = -(1 - GAIN), 0
    assert rows["SASRec"][4] == f"{(low + high) / 2:+.4f} [{low:+.4f}, {high:+.4f}]" and rows["ordinary attention"][4] == ""
    # The best baseline on validation is "top", with ranks 2 and 1: not the oracle. The second user is behind it with seed 1.
    low, high = (GAIN - 1) / 2, 0
    assert rows["SASRec"][5] == f"{(low + high) / 2:+.4f} [{low:+.4f}, {high:+.4f}]" and rows["SASRec"][6] == ""
    assert rows[""][5].endswith("minus top (best baseline on validation)") and saved(tmp_path)["best_baseline"] == "top"
    # The second user is at rank 1 instead of 1 and 2; the first at rank 9 instead of 1.
    low, high = FAR - 1, (1 - GAIN) / 2
    assert rows["far"][4] == f"{(low + high) / 2:+.4f} [{low:+.4f}, {high:+.4f}]" and rows["far"][:2] == ["", ""]
    assert rows["far"][5] == f"{(FAR - GAIN) / 2:+.4f} [{FAR - GAIN:+.4f}, +0.0000]" and rows["top"][5] == ""
    # Fused, the second user is at rank 1 with both seeds, instead of 1 and 2; the first does not change.
    low, high = 0, (1 - GAIN) / 2
    fused = rows["ordinary attention + transitions"]
    assert fused[:3] == ["", "0, 1", "1.0000 ± 0.0000"] and fused[7:] == [""] * 7
    assert fused[4] == f"{(low + high) / 2:+.4f} [{low:+.4f}, {high:+.4f}]"
    stored = saved(tmp_path)["comparisons"]["8minutes"]
    assert stored["ordinary + transitions"]["difference"]["model"]["ndcg@10"] == pytest.approx((low + high) / 2)
    assert rows["item-aware attention"] == [""] * 14 and saved(tmp_path)["comparisons"]["8minutes"]["iam"] is None

    trials = saved(tmp_path)["searches"]["2minutes"]["sasrec"]
    assert [trial["setting"]["optimizer.learning_rate"] for trial in trials] == rates[2:4]
    best = 1e-4 / rates[2]
    assert trials[0]["validations"] == pytest.approx([best * k / 8 for k in range(1, 9)])
    assert trials[0]["validation_ndcg@10"] == pytest.approx(best)
    cells = sections(tmp_path)["Trials of 2 minutes"]["SASRec", "0"]
    state = "finished" + ", chosen" * (rates[3] > rates[2])
    assert cells[2].split()[0] == f"{best / 8:.4f}" and cells[3:] == [f"{best:.4f}", state, "240", "12.00", "2.00"]
    assert "†" not in (tmp_path / "runs" / "reproduction.md").read_text()


def test_both_comparisons_in_one_folder(launch, runner, tmp_path):
    """Equal epochs need one calibration. Both comparisons then share a search, or each has its own."""
    command = arguments(tmp_path, "--seeds", "0", models=["ordinary"])
    assert launch.reproduce.main([*command, "--epochs=12", "--trial_epochs=4"]) == 0
    assert [values["config.train.steps"] for _, _, values in runner.ran] == ["40", "80", "80", "240"]
    before = len(runner.ran)
    assert launch.reproduce.main([*command, "--epochs=12", "--trial_epochs=4", "--minutes=8"]) == 0
    assert [name[:11] for _, name, _ in runner.ran[before:]] == ["calibration", "8minutes-tr"]
    headings = list(sections(tmp_path))
    assert [heading.partition(":")[0] for heading in headings[1:3]] == ["Equal epochs", "Equal minutes"]
    assert headings[3:] == ["Trials of 4 epochs"]
    assert table(tmp_path, "epochs")["ordinary attention"][8:12] == ["240", "100", "12.0", "2.0"]
    assert table(tmp_path, "minutes")["ordinary attention"][8:12] == ["960", "100", "48.0", "8.0"]
    before = len(runner.ran)
    assert launch.reproduce.main([*command, "--epochs=12", "--minutes=8"]) == 0  # searches of a quarter: 3 epochs, 2 minutes
    assert [values["config.train.steps"] for _, _, values in runner.ran[before:]] == ["64", "64", "240", "240", "240", "960"]
    assert list(sections(tmp_path))[3:] == ["Trials of 3 epochs", "Trials of 2 minutes"]


def test_steps(launch):
    budgets, budget = launch.budgets, launch.models.Budget
    found = budgets.Measured(seconds=0.5, epoch=103.4)
    assert budgets.steps_of(budget("epochs", 12), found) == 1240  # the multiple of 8 next to 1240.8
    assert budgets.steps_of(budget("minutes", 8.2), found) == 976  # 984 with two digits is 980
    assert budgets.steps_of(budget("epochs", 0.01), found) == 8
    assert budgets.is_equal(budget("epochs", 12), 1240, found) and not budgets.is_equal(budget("epochs", 12), 1248, found)
    assert budgets.is_equal(budget("minutes", 8.2), 976, found) and not budgets.is_equal(budget("epochs", 0.01), 8, found)


def test_another_structure_has_its_own_calibration(launch, runner, tmp_path):
    """SASRec's width and number of blocks change the time of a step."""
    assert launch.reproduce.main(arguments(tmp_path, "--minutes=8", "--seeds", "0", models=["sasrec"], trials=6)) == 0
    settings = {
        (values["config.model.schedule"], values["config.model.width"])
        for _, name, values in runner.ran
        if name.startswith("trial")  # width and MLP width are one parameter
        and values["config.model.width"] == values["config.model.mlp_width"]
    }
    calibrated = [(v["config.model.schedule"], v["config.model.width"]) for _, name, v in runner.ran if name.startswith("calibration")]
    assert set(calibrated) == settings | {("full*2", "64")} and len(settings) > 1 and len(calibrated) == 2 * len(set(calibrated))


# ---- spaces


def test_every_models_config_resolves_and_shares_the_protocol(launch, tmp_path):
    models = launch.models
    vectors = dict.fromkeys(models.DATASETS, "v.parquet")
    plan = models.Plan(tmp_path, ("toys",), (), (0,), 2, {}, vectors=vectors, pretrained="MODEL")
    protocol = (*models.SHARED, "data.context_items")
    for data, dataset in models.DATASETS.items():
        shared = []
        for name, model in models.MODELS.items():
            file, fields = models.config_of(plan, data, name)
            own = models.own_setting(plan, data, name)
            for parameter, value in own.items():
                values = model.space[parameter]
                inside = values.low <= value <= values.high if isinstance(values, models.LogUniform) else value in values
                assert inside, (data, name, parameter, value)
                assert not set(parameter.split()) & set(fields)
            config = made_config(file, [*models.overrides(fields), *models.overrides(own)])
            made = resolve(config)
            shared.append({field: value for field, value in flatten(config.to_dict()).items() if field in protocol})
            assert len(shared[-1]) == len(protocol)
            layers = len(made.schedule.relations)
            if model.kind == "token":
                assert layers == 2 * dataset.repeats or (name, layers) == ("hatllm", 3)
            assert made.item_level == (model.kind in ("item", "tower")) and made.constant_tower == (model.kind == "tower")
            assert model.kind == "token" or made.softmax == ("sampled" if name == "hybrid_text" else "full")
        assert all(fields == shared[0] for fields in shared), data
    assert models.own_setting(plan, "ml1m", "sasrec")["model.dropout"] == 0.2  # as published
    toys = configs_of("amazon_toys.py")
    for variant, model in {"iam": "iam", "full": "ordinary", "no_intra": "no_intra", "no_inter": "no_inter", "hatllm": "hatllm"}.items():
        assert resolve(toys(variant)).schedule.relations == parse_schedule(models.MODELS[model].schedule(1)).relations
    for data, file in (("toys", "amazon_toys.py"), ("ml1m", "ml1m.py"), ("scientific", "amazon_scientific.py")):
        for variant in ("hybrid", "hybrid_full"):  # the config has the fields with which its figures are reproduced
            _, fields = models.config_of(plan, data, variant)
            own = models.own_setting(plan, data, variant)
            variant_of_file = flatten(configs_of(file)(variant).to_dict())
            wanted = {name: value for name, value in (fields | own).items() if name not in ("data.context_items", "objective.text_layers")}
            assert {name: variant_of_file[name] for name in wanted} == wanted
        with pytest.raises(InputError, match=rf"^{file}:half: the variants are hybrid, hybrid_full, iam"):
            configs_of(file)("half")
    with pytest.raises(InputError, match=r"^table\.py:half: the variants are hybrid, iam$"):
        configs_of("table.py")("half")
    assert toys() == toys("hybrid")
    with pytest.raises(InputError, match=r"amazon_toys\.py:half: the variants are hybrid, hybrid_full, iam, full"):
        toys("half")


def made_config(file, flags):
    file, _, variant = file.partition(":")
    config = configs_of(file)(*filter(None, [variant]))
    for name, value in (flag.removeprefix("--config.").split("=", 1) for flag in flags):
        section, last = name.split(".")
        config[section][last] = type(config[section][last])(value)
    return config


def configs_of(file):
    space = {}
    exec((ROOT / "configs" / file).read_text(encoding="utf-8"), space)
    return space["get_config"]


# ---- the search


def test_an_interrupted_search_gives_the_same_trials(launch, runner, tmp_path):
    """Two interruptions: in a trial, and one that leaves an incomplete line in the journal."""
    flags = ["--epochs=8", "--trial_epochs=4", "--seeds", "0"]
    assert launch.reproduce.main(arguments(tmp_path / "whole", *flags, models=["sasrec"], trials=6)) == 0
    whole = [(name, values["config.optimizer.learning_rate"]) for _, name, values in runner.ran]
    runner.ran.clear()
    runner.stops = {("sasrec", "trial1"): 2, ("sasrec", "trial4"): 1}
    command = arguments(tmp_path / "parts", *flags, models=["sasrec"], trials=6)
    assert launch.reproduce.main(command) == 75
    assert [cells[4] for cells in list(sections(tmp_path / "parts")["Trials of 4 epochs"].values())[1:]] == ["finished", "unfinished"]
    journal = tmp_path / "parts" / "runs" / "demo" / "sasrec" / "search-4epochs" / "journal.log"
    with journal.open("a") as file:
        file.write('{"op_code"')
    assert launch.reproduce.main(command) == 75 and launch.reproduce.main(command) == 0
    ran = [(name, values["config.optimizer.learning_rate"]) for _, name, values in runner.ran]
    assert ran.count(next(run for run in ran if run[0] == "trial1")) == 2 and len(ran) == len(whole) + 2
    assert list(dict.fromkeys(ran)) == whole
    assert saved(tmp_path / "parts")["searches"] == saved(tmp_path / "whole")["searches"]
    assert table(tmp_path / "parts", "epochs") == table(tmp_path / "whole", "epochs")


@pytest.mark.parametrize("where", ["before the result is stored", "before a pruned trial is marked"])
def test_an_interruption_between_a_run_and_its_result(launch, runner, tmp_path, monkeypatch, where):
    """A trial that ended before its result was stored is not run again."""
    flags, whole, parts = ["--epochs=8", "--trial_epochs=4", "--seeds", "0"], tmp_path / "whole", tmp_path / "parts"
    assert launch.reproduce.main(arguments(whole, *flags, models=["ordinary"], trials=6)) == 0
    count, states = len(runner.ran), [trial["state"] for trial in saved(whole)["searches"]["4epochs"]["ordinary"]]
    study, mark, stopped = launch.search._optuna().study.Study, launch.commands.mark, []
    tell = study.tell

    def interrupted(self, trial, *values, **more):
        if not stopped and trial.number == 0:
            stopped.append(trial)
            raise KeyboardInterrupt
        return tell(self, trial, *values, **more)

    def interrupted_mark(workdir, flags, end=""):
        if not stopped and end == launch.commands.PRUNED:
            stopped.append(workdir)
            raise KeyboardInterrupt
        mark(workdir, flags, end)

    if where == "before the result is stored":
        monkeypatch.setattr(study, "tell", interrupted)
    else:
        assert "pruned" in states
        monkeypatch.setattr(launch.commands, "mark", interrupted_mark)
    command = arguments(parts, *flags, models=["ordinary"], trials=6)
    with pytest.raises(KeyboardInterrupt):
        launch.reproduce.main(command)
    assert launch.reproduce.main(command) == 0 and len(runner.ran) == 2 * count and stopped
    assert saved(parts)["searches"] == saved(whole)["searches"]


def test_bad_trials_are_pruned(launch, runner, tmp_path):
    """After two finished trials, a trial that is below their median is stopped at its third validation."""
    assert launch.reproduce.main(arguments(tmp_path, "--epochs=8", "--seeds", "0", models=["ordinary"], trials=8)) == 0
    trials = saved(tmp_path)["searches"]["2epochs"]["ordinary"]
    pruned = [trial for trial in trials if trial["state"] == "pruned"]
    assert pruned and len(trials) == 8 and all(trial["state"] in ("pruned", "finished") for trial in trials)
    for number, trial in enumerate(trials):
        before = [t["validation_ndcg@10"] for t in trials[:number] if t["state"] == "finished"]
        rate = trial["setting"]["optimizer.learning_rate"]
        worse = len(before) >= 2 and min(0.9, 10 * rate) < np.median(before)
        assert trial["state"] == ("pruned" if worse else "finished")
        assert len(trial["validations"]) == (3 if worse else 8) and trial["epochs"] == pytest.approx(trial["steps"] / 20)
        assert trial["steps"] == (3 * 5 if worse else 40) and trial["planned_steps"] == 40
    best = max(trial["validation_ndcg@10"] for trial in trials if trial["state"] == "finished")
    chosen = saved(tmp_path)["comparisons"]["8epochs"]["ordinary"]["chosen"]
    assert trials[chosen]["validation_ndcg@10"] == best
    assert any("pruned after 3 of 8" in cells for cells in sections(tmp_path)["Trials of 2 epochs"].values())
    before = len(runner.ran)
    assert launch.reproduce.main(arguments(tmp_path, "--epochs=8", "--seeds", "0", models=["ordinary"], trials=8)) == 0
    assert len(runner.ran) == before  # a pruned trial is finished, too


def test_more_trials_continue_a_search(launch, runner, tmp_path):
    flags = ["--epochs=8", "--seeds", "0"]
    assert launch.reproduce.main(arguments(tmp_path / "six", *flags, models=["ordinary"], trials=6)) == 0
    assert launch.reproduce.main(arguments(tmp_path / "more", *flags, models=["ordinary"], trials=3)) == 0
    three = saved(tmp_path / "more")["searches"]
    assert launch.reproduce.main(arguments(tmp_path / "more", *flags, models=["ordinary"], trials=6)) == 0
    assert saved(tmp_path / "more")["searches"] == saved(tmp_path / "six")["searches"]
    assert launch.reproduce.main(arguments(tmp_path / "more", *flags, "--table", models=["ordinary"], trials=3)) == 0
    assert saved(tmp_path / "more")["searches"] == three


def test_a_search_over_another_space_is_refused(launch, runner, tmp_path, monkeypatch, capsys):
    command = arguments(tmp_path, "--epochs=8", "--seeds", "0", models=["ordinary"])
    assert launch.reproduce.main(command) == 0
    changed = launch.models.MODELS["ordinary"]._replace(space={**launch.models.TOKEN_SPACE, "model.dropout": (0.0, 0.5)})
    monkeypatch.setitem(launch.models.MODELS, "ordinary", changed)
    assert launch.reproduce.main(command) == 2 and "was made over another space" in capsys.readouterr().err


def test_optuna_is_an_extra(launch, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    folder = tmp_path / "runs" / "demo" / "ordinary" / "search-2epochs"
    folder.mkdir(parents=True)
    (folder / "journal.log").touch()
    assert launch.reproduce.main(arguments(tmp_path, "--epochs=8", "--table")) == 2
    assert "needs optuna: pip install 'iam_jax[tune]'" in capsys.readouterr().err


# ---- continuing, and rows that are not equal


def test_finished_runs_are_not_repeated(launch, runner, tmp_path):
    command = [*arguments(tmp_path), "--minutes=8"]
    assert launch.reproduce.main([*command, "--seeds", "0", "1"]) == 0
    before = len(runner.ran)
    assert launch.reproduce.main([*command, "--seeds", "0", "1"]) == 0 and len(runner.ran) == before
    assert launch.reproduce.main([*command, "--seeds", "2"]) == 0 and len(runner.ran) == before + 2
    assert table(tmp_path)["SASRec"][1] == "0, 1, 2"  # earlier seeds stay in the table
    deleted = next((tmp_path / "runs" / "demo" / "sasrec").glob("8minutes-*-seed0"))
    shutil.rmtree(deleted)
    assert launch.reproduce.main([*command, "--seeds", "0"]) == 0 and len(runner.ran) == before + 3 and (deleted / "run.json").exists()


def test_the_table_keeps_earlier_results(launch, runner, tmp_path, capsys):
    """Another data set, another path of the data and logging flags keep earlier results; another budget has its own folders."""
    folder, main = tmp_path / "runs", launch.reproduce.main
    assert main(arguments(tmp_path, "--minutes=8", "--path", f"demo={tmp_path}", "--", "--config.log.progress=false")) == 0
    filled = table(tmp_path)
    assert filled["SASRec"][1] == "0, 1, 2"
    assert main(["toys", "--models", "iam", "--seeds", "0", "--minutes=8", "--trials=2", "--table", f"--folder={folder}"]) == 0
    markdown = (folder / "reproduction.md").read_text()
    assert markdown.index("## toys") < markdown.index("## demo") and filled["SASRec"][4] in markdown
    before = len(runner.ran)
    assert main(arguments(tmp_path, "--minutes=4", "--seeds", "0")) == 0 and len(runner.ran) == before + 6
    assert {values["config.train.steps"] for _, _, values in runner.ran[before:]} == {"120", "480"}
    assert main(arguments(tmp_path, "--minutes=8", "--table")) == 0 and table(tmp_path)["SASRec"] == filled["SASRec"]
    capsys.readouterr()
    assert main(arguments(tmp_path, "--minutes=8", "--table", "--", "--config.model.remat=true")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "was run with other flags (only one of the two commands has '--config.model.remat=true')" in error


def test_unequal_rows_are_marked(launch, runner, tmp_path):
    assert launch.reproduce.main(arguments(tmp_path, "--minutes=8", "--seeds", "0", "1")) == 0
    assert launch.reproduce.main(arguments(tmp_path, "--minutes=8", "--seeds", "0", models=["iam"])) == 0
    runner.stops = {("no_inter", "trial1"): 4}
    assert launch.reproduce.main(arguments(tmp_path, "--minutes=8", "--seeds", "0", models=["no_inter"])) == 75
    markdown = (tmp_path / "runs" / "reproduction.md").read_text()
    assert "- item-aware attention: 1 of 2 seeds." in markdown and "- without inter: 1 of 2 trials." in markdown
    marked = ["item-aware attention †", "without inter †", "item-aware attention + transitions †"]
    assert [name for name in table(tmp_path) if "†" in name] == marked
    # A run whose number of steps is not that of the budget, and trials of an epoch that is shorter than eight steps.
    run = next((tmp_path / "runs" / "demo" / "sasrec").glob("8minutes-*-seed1")) / "run.json"
    run.write_text(json.dumps(json.loads(run.read_text()) | {"steps": 480}))
    assert launch.reproduce.main(arguments(tmp_path, "--minutes=8", "--seeds", "0", "1", "--table")) == 0
    assert saved(tmp_path)["comparisons"]["8minutes"]["sasrec"]["unequal"] == ["seed 1: 24.00 epochs, 4.00 minutes instead of 8 minutes"]
    assert launch.reproduce.main(arguments(tmp_path, "--epochs=8", "--trial_epochs=0.1", "--seeds", "0", models=["ordinary"])) == 0
    assert saved(tmp_path)["comparisons"]["8epochs"]["ordinary"]["unequal"] == ["trials 0, 1 are not of 0.1 epochs"]


def test_diverged_and_interrupted_runs(launch, runner, tmp_path, capsys):
    def diverge(model, name, seed):
        run = name.startswith("8minutes")
        return (
            (model == "iam" and run and seed == 1)
            or (model, name) == ("no_intra", "calibration0")
            or (model == "no_inter" and name.startswith("trial"))
        )

    runner.diverge = diverge
    models = ["ordinary", "iam", "no_intra", "no_inter", "hatllm"]
    command = arguments(tmp_path, "--minutes=8", "--seeds", "0", "1", models=models, trials=1)
    runner.stops = {("hatllm", "8minutes-trial0of2minutes-seed1"): 3}
    assert launch.reproduce.main(command) == 75
    rows, printed = table(tmp_path), capsys.readouterr().out
    assert rows["ordinary attention"][1] == "0, 1" and rows["HatLLM's order †"][1] == "0"
    assert rows["item-aware attention"][1] == "0; 1 diverged"
    assert rows["item-aware attention"][4] == "+0.0000 [+0.0000, +0.0000]"  # over the common seed
    assert "demo, no_intra: not run, a calibration diverged" in printed and rows["without intra"] == [""] * 14
    assert "demo, no_inter, 8 minutes, seed 0: not run, every trial diverged" in printed
    assert sections(tmp_path)["Trials of 2 minutes"]["without inter", "0"][4] == "diverged"
    before = len(runner.ran)
    assert launch.reproduce.main(command) == 0 and len(runner.ran) == before + 1  # a diverged run is not repeated
    assert table(tmp_path)["HatLLM's order"][1] == "0, 1"


# ---- flags


def test_a_dry_run_and_a_table_run_nothing(launch, runner, tmp_path, capsys):
    command = arguments(tmp_path, "--epochs=8", "--minutes=8", "--seeds", "5")
    assert launch.reproduce.main([*command, "--dry-run", "--", "--config.train.batch_rows=3"]) == 0
    printed = [shlex.split(line[3:]) for line in capsys.readouterr().out.splitlines() if " -m iam_jax.main " in line]
    assert len(printed) == 2 * (2 + 2 + 2) and not runner.ran and not (tmp_path / "runs").exists()
    rows = [[flag for flag in flags if flag.startswith("--config.train.batch_rows=")] for flags in printed]
    assert {flags[-1] for flags in rows} == {"--config.train.batch_rows=3"}  # also in calibrations the last of equal flags counts
    seeds = [next(flag for flag in flags if flag.startswith("--config.train.seed=")) for flags in printed]
    assert sorted(seed[-1] for seed in seeds) == ["0"] * 8 + ["5"] * 4  # calibrations and trials have their own seed
    assert launch.reproduce.main([*command, "--table"]) == 0 and not runner.ran
    assert all(cells == [""] * 14 for cells in list(table(tmp_path).values())[1:])


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--minutes=0"], "--minutes=0: must be above 0"),
        (["--minutes=8", "--trial_epochs=nan"], "--trial_epochs=nan: must be above 0"),
        ([], "--epochs, --minutes or both are needed"),
        (["--epochs=1", "--trials=0"], "--trials=0: must be at least 1"),
        (["--epochs=1", "--seeds", "1", "1"], "--seeds 1 1: must be distinct"),
        (["--epochs=1", "--path", "toys=x"], "--path toys: must be DATA=…, where DATA is one of demo"),
        (["--epochs=1", "--vectors", "demo="], "--vectors demo: must be DATA="),
        (["--epochs=1", "--models", "hybrid_minilm"], "--models hybrid_minilm: needs --vectors"),
        (["--epochs=1", "--models", "hybrid_smollm"], "--models hybrid_smollm: needs --pretrained"),
        (["--epochs=1", "--models", "other"], "argument --models: invalid choice"),
        (["--epochs=1", "--", "--config.train.steps=7"], "--config.train.steps cannot be set: it is part of the budgets"),
        (["--epochs=1", "--", "--config.eval.test=false"], "--config.eval.test cannot be set: it is part of the budgets"),
        (["--epochs=1", "--", "--config.model.dropout=0.5"], "--config.model.dropout cannot be set: the search tries its values"),
    ],
)
def test_wrong_flags_give_one_line(launch, runner, tmp_path, capsys, flags, error):
    with pytest.raises(SystemExit) as ended:
        launch.reproduce.main(["demo", f"--folder={tmp_path / 'runs'}", *flags])
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and printed.startswith(f"error: {error}") and printed.count("\n") == 1
    assert not runner.ran and not (tmp_path / "runs").exists()


def test_rows_of_models_that_need_files(launch, tmp_path):
    command = ["demo", "toys", "--epochs=1", f"--folder={tmp_path}"]
    plan, _ = launch.reproduce.parse(command)
    assert not [model for model in ("hybrid_minilm", "hybrid_both", "hybrid_smollm") if plan.available("toys", model)]
    plan, _ = launch.reproduce.parse([*command, "--vectors", "toys=V", "--pretrained=M"])
    assert plan.available("toys", "hybrid_minilm") and not plan.available("demo", "hybrid_minilm")
    assert plan.available("demo", "hybrid_smollm")
    assert launch.models.config_of(plan, "toys", "hybrid_minilm")[1]["data.vectors"] == "V"
    assert launch.models.config_of(plan, "toys", "hybrid_both")[1]["data.vectors"] == "tfidf+V"
    assert launch.models.config_of(plan, "toys", "hybrid_smollm")[1]["model.pretrained"] == "M"


# ---- processes


def child(tmp_path, monkeypatch, commands, script):
    """Puts a shell script in the place of Python."""
    path = tmp_path / "child"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(commands.sys, "executable", str(path))
    monkeypatch.setattr(commands, "POLL_SECONDS", 0.02)


def test_a_signal_is_not_lost_when_the_command_is_about_to_end(launch, tmp_path, monkeypatch):
    commands = launch.commands
    child(tmp_path, monkeypatch, commands, f"trap '' TERM INT\ntouch {tmp_path}/there\nsleep 0.3\nexit 0")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def stop():
        while not (tmp_path / "there").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    for watch in (None, lambda: False):
        (tmp_path / "there").unlink(missing_ok=True)
        threading.Thread(target=stop).start()
        assert commands.run(tmp_path / "run", ["--flag"], watch) == 75
        assert (tmp_path / "run.command").read_text() == "--flag"  # marked as finished nevertheless
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert commands.run(tmp_path / "run", ["--flag"], watch) == 0


def test_a_watched_command_is_stopped(launch, tmp_path, monkeypatch):
    """SIGTERM ends it. A command that ends with an error meanwhile is not one that was stopped."""
    commands = launch.commands
    for code, expected in ((75, commands.ENDED), (0, commands.ENDED), (1, 1)):
        child(tmp_path, monkeypatch, commands, f"trap 'exit {code}' TERM\ntouch {tmp_path}/there\nwhile true; do sleep 0.02; done")
        (tmp_path / "there").unlink(missing_ok=True)
        assert commands.run(tmp_path / "run", ["--flag"], (tmp_path / "there").exists) == expected
        assert not (tmp_path / "run.command").exists()
    commands.mark(tmp_path / "run", ["--flag"], commands.PRUNED)
    assert commands.finished(tmp_path / "run", ["--flag"]) and commands.code_of(tmp_path / "run") == commands.ENDED
    assert not commands.diverged(tmp_path / "run")


def test_end_to_end(tmp_path, tiny):
    fields = {"train.batch_rows": 2, "eval.resamples": 5, "log.progress": False, "log.tensorboard": False}
    fields |= {name: value for name, value in tiny.items() if name.startswith("data.synthetic.")}
    command = [python(), ROOT / "launch" / "reproduce.py", "demo", "--models", "sasrec", "--seeds", "0", "--trials=1"]
    command += ["--epochs=5", "--trial_epochs=5", f"--folder={tmp_path / 'runs'}"]
    command += ["--", *(f"--config.{name}={value}" for name, value in fields.items())]
    process = subprocess.run(command, cwd=ROOT, env=None, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    folder = tmp_path / "runs" / "demo" / "sasrec"
    read = {
        name: json.loads((folder / path / "evaluation.json").read_text())["results"]["model"]
        for name, path in {"trial": "search-5epochs/trial0", "run": "5epochs-trial0of5epochs-seed0"}.items()
    }
    # The test events are read once, with the chosen setting.
    assert list(read["trial"]) == ["validation"] and list(read["run"]) == ["validation", "test"]
    rows, found = table(tmp_path, "epochs"), saved(tmp_path)
    cells = rows["SASRec"]
    assert cells[0].startswith("learning rate 0.003, dropout 0.4") and cells[1] == "0" and float(cells[2]) > 0
    assert cells[8] == "8" and float(cells[10]) == 5.3 and float(cells[12]) >= 0
    assert rows["item_knn"][2] and rows["last_item"][2] and rows["ordinary attention"] == [""] * 14
    trial = found["searches"]["5epochs"]["sasrec"][0]
    assert len(trial["validations"]) == 8 and trial["state"] == "finished" and trial["steps"] == 8
    assert trial["validation_ndcg@10"] == read["trial"]["validation"]["ndcg@10"]
    assert found["best_baseline"] not in (None, "oracle")

"""Whole commands as a user types them, each in its own process: a fresh one, or a forked one (forks.py)."""

import json
import os
import signal
import subprocess
import sys
import time

import forks
import jax
import numpy as np
import orbax.checkpoint as ocp
import polars as pl
import pytest
from forks import run
from helpers import metrics_lines

from iam_jax import main as main_lib
from iam_jax.devices.signals import Signals
from iam_jax.errors import NonFiniteError
from iam_jax.ranking import metrics
from iam_jax.runs.workdir import lock_workdir

TITLE = "item,title\na,red lantern\nb,blue kettle\nc,old clock\nd,teal rug\n"
EVENTS = "user,item,timestamp\n" + "".join(f"u{u},{item},{t}\n" for u in range(9) for t, item in enumerate("abcd"))


def config_text(fields, more=""):
    lines = "".join(f"    config.{name} = {value!r}\n" for name, value in fields.items())
    head = "from iam_jax.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"
    return f"{head}{lines}{more}    return config\n"


@pytest.fixture(scope="session")
def steps(tiny):
    """Settings of a run that is long enough to be interrupted."""
    return tiny | {"train.steps": 200, "train.eval_every": 75, "log.every": 3}


@pytest.fixture(scope="session")
def folder(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("main")
    (folder / "tiny.py").write_text(config_text(steps))
    return folder


def start(folder, *arguments, **env):
    """`forks.start` in a fresh process."""
    command = [sys.executable, "-m", "iam_jax.main", *arguments]
    return subprocess.Popen(command, cwd=folder, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_anew(folder, *arguments, code=0, **env):
    """`forks.run` in a fresh process."""
    process = start(folder, *arguments, **env)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, (out, err)
    return out, err


def wait_for(process, condition):
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def checkpoint(workdir, step):
    """The state of a checkpoint on one device, from any devices."""
    here, saved = jax.sharding.SingleDeviceSharding(jax.devices()[0]), {}
    checkpointer = ocp.Checkpointer(ocp.StandardCheckpointHandler())
    for item in ("params", "rest"):
        saved |= checkpointer.restore(workdir / "checkpoints" / str(step) / item, args=ocp.args.StandardRestore(fallback_sharding=here))
    return saved


def assert_same(left, right):
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for name in left:
            assert_same(left[name], right[name])
    elif isinstance(left, (list, tuple)):
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        np.testing.assert_array_equal(left, right)


# ---- runs


@pytest.fixture(scope="session")
def whole(folder):
    return run_anew(folder, "--config=tiny.py", "--workdir=whole")


def test_output_and_files_of_a_run(folder, whole):
    out, err = whole
    assert err == ""
    for message in ("split ", "data ready in ", "validation ndcg@10", "test: 60 users", "wrote whole/evaluation.json"):
        assert message in out
    table = out[out.index("test: 60 users") :].splitlines()
    assert [line.split()[0] for line in table[3:10]] == ["model", "popularity", "last_item", "item_knn", "transitions", "rules", "oracle"]
    names = {path.name for path in (folder / "whole").iterdir()}
    assert names == {
        "config.json", "data.json", "tokenizer.json", "items.parquet", "metrics.jsonl", "tensorboard", "checkpoints", "evaluation.json",
        "ranks.parquet", "baselines.parquet", "baselines.json", "run.json", ".lock",
    }  # fmt: skip
    evaluation = json.loads((folder / "whole" / "evaluation.json").read_text())
    assert evaluation["split_sha256"] == out.split("split ")[1].split()[0]
    hr = {name: result["test"]["hr@10"] for name, result in evaluation["results"].items()}
    assert hr["oracle"] == max(hr.values()) and all(f"{value:.4f}" in out for value in hr.values())
    cost = json.loads((folder / "whole" / "run.json").read_text())
    last_step = json.loads((folder / "whole" / "metrics.jsonl").read_text().splitlines()[-2])  # the last line is a validation
    assert (cost["steps"], cost["tokens_seen"]) == (last_step["step"], last_step["tokens_seen"]) and last_step["step"] == 200
    assert f"{cost['parameters']:,} parameters; " in out and cost["trained"] == cost["parameters"] and 0 < cost["minutes"] < 5
    assert pl.read_parquet(folder / "whole" / "ranks.parquet")["split"].value_counts().sort("split")["count"].to_list() == [60, 60]
    baselines = pl.read_parquet(folder / "whole" / "baselines.parquet")
    assert baselines["name"].unique(maintain_order=True).to_list() == list(hr)[1:]
    for name, rows in baselines.filter(pl.col("split") == "test").group_by("name"):
        per_event = metrics.ranking_metrics(rows["rank"].to_numpy(), rows["ties"].to_numpy(), [10])
        assert len(rows) == 60 and per_event["hr@10"].mean() == pytest.approx(hr[name[0]])


def test_one_run_at_a_time_in_a_working_folder(folder):
    with lock_workdir(folder / "held"):
        _, err = run(folder, "--config=tiny.py", "--workdir=held", code=2)
    assert err == "error: --workdir=held: another process is training there\n"
    assert [path.name for path in (folder / "held").iterdir()] == [".lock"]


def test_the_same_command_twice_gives_the_same_bytes(folder, whole):
    run_anew(folder, "--config=tiny.py", "--workdir", "twice", PYTHONHASHSEED="7", JAX_ENABLE_COMPILATION_CACHE="false")
    for name in (
        "evaluation.json",
        "ranks.parquet",
        "baselines.parquet",
        "baselines.json",
        "config.json",
        "data.json",
        "tokenizer.json",
        "items.parquet",
    ):
        assert (folder / "twice" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
    assert_same(checkpoint(folder / "twice", 200), checkpoint(folder / "whole", 200))


def test_ctrl_c_and_sigterm_and_on_with_the_same_command(folder, whole):
    workdir, command = folder / "parts", ("--config=tiny.py", "--workdir=parts")
    done = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start(folder, *command)

        def lines():
            path = workdir / "metrics.jsonl"
            return len(path.read_text().splitlines()) if path.exists() else 0

        wait_for(process, lambda: lines() >= done + 3)  # noqa: B023
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 75, (out, err)
        assert err == "stopped; run the same command again to continue\n"
        assert not (workdir / "evaluation.json").exists()
        saved = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())  # only complete checkpoints
        assert 0 < saved[-1] < 200
        done = lines()
    out, _ = run(folder, *command)
    assert f"continuing from step {saved[-1]}" in out
    for name in ("evaluation.json", "ranks.parquet"):
        assert (workdir / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert_same(checkpoint(workdir, 200), checkpoint(folder / "whole", 200))

    assert metrics_lines(workdir) == metrics_lines(folder / "whole")
    metrics = (workdir / "metrics.jsonl").read_bytes()
    out, _ = run(folder, *command)  # a finished run is evaluated again but not trained
    assert (workdir / "metrics.jsonl").read_bytes() == metrics
    assert (workdir / "evaluation.json").read_bytes() == (folder / "whole" / "evaluation.json").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["config", "data"])
def test_a_signal_before_training_leaves_nothing(tmp_path, tiny, number, moment):
    wait = "    import pathlib, time\n    pathlib.Path('here').touch()\n    time.sleep(60)\n"
    if moment == "data":  # a config file may contain code: this one makes the shop slow
        wait = "    def slow(*_, **__):\n" + wait.replace("    ", "        ")
        wait += "    from iam_jax.data.sources import synthetic\n    synthetic.generate = slow\n"
    (tmp_path / "tiny.py").write_text(config_text(tiny, wait))
    process = forks.start(tmp_path, "--config=tiny.py", XDG_CACHE_HOME=str(tmp_path / "cache"))
    wait_for(process, (tmp_path / "here").exists)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 75, (out, err)
    assert err == ("stopped; run the same command again to continue\n" if moment == "data" else "")
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"tiny.py", "here"}


def test_evaluate_needs_only_the_working_folder(folder, whole):
    def evaluation():
        return json.loads((folder / "whole" / "evaluation.json").read_text())

    before, trained = contents(folder / "whole"), evaluation()
    out, err = run(folder, "--mode=evaluate", "--workdir=whole")
    assert err == "" and "data ready in" in out and "test: 60 users" in out
    assert contents(folder / "whole") == before  # the same bytes as after training

    run(folder, "--mode=evaluate", "--workdir=whole", "--config.eval.filter_seen=false", "--step=last", "--config.eval.metric=hr@10")
    other = evaluation()
    assert trained["protocol"]["filter_seen"] and not other["protocol"]["filter_seen"]
    assert other["step"] == 200
    assert other["results"]["popularity"] != trained["results"]["popularity"]
    anew = ("evaluation.json", "ranks.parquet", "baselines.parquet", "baselines.json")
    same = {name: data for name, data in contents(folder / "whole").items() if name not in anew}
    assert same.items() <= before.items() and len(before) == len(same) + 4
    for name in ("evaluation.json", "ranks.parquet", "baselines.json"):
        (folder / "whole" / name).write_bytes(before[name])


# ---- wrong input

TINY, TABLE = "--config=tiny.py", "--config=table.py"
WRONG = {
    "unknown field": ((TINY, "--config.model.widht=3"), "--config.model.widht", "did you mean --config.model.width"),
    "unknown section": ((TINY, "--config.modle.width=3"), "--config.modle.width"),
    "unknown in the file": (("--config=unknown.py",), "unknown.py", "widht"),
    "out of range": ((TINY, "--config.train.batch_rows=0"), "config.train.batch_rows = 0", "1 or more"),
    "do not fit": ((TINY, "--config.model.heads=3"), "config.model.heads = 3", "must divide model.width"),
    "wrong type": ((TINY, "--config.model.width=wide"), "--config.model.width=wide"),
    "wrong type in the file": (("--config=type.py",), "type.py", "width"),
    "schedule": ((TINY, "--config.model.schedule=intra outer"), "config.model.schedule", "'outer'"),
    "no config": ((), "--config=FILE is missing"),
    "missing file": (("--config=nowhere.py",), "--config=nowhere.py", "no such file"),
    "file with an error": (("--config=broken.py",), "broken.py", "SyntaxError"),
    "file without a config": (("--config=empty.py",), "empty.py", "get_config"),
    "file that ends": (("--config=exit.py",), "exit.py"),
    "bad flag": ((TINY, "--wrokdir=x"), "wrokdir"),
    "no flag": ((TINY, "train"), "unknown flag 'train'"),
    "bad mode": ((TINY, "--mode=eval"), "--mode=eval", "evaluate"),
    "no list": ((TINY, "--mode=plan", "--topology=local", "--top_k=-2"), "--top_k=-2: must be 1 or more"),
    "no run": ((TINY, "--mode=evaluate", "--workdir=nowhere"), "nowhere", "no run there"),
    "no run, no config": (("--mode=evaluate", "--workdir=nowhere"), "nowhere/config.json"),
    "not a run": ((TINY, "--workdir=notes"), "notes", "not empty"),
    "no data": ((TABLE, "--config.data.path=nowhere"), "nowhere"),
    "missing column": ((TABLE, "--config.data.path=column"), "interactions.csv", "timestamp"),
    "unknown item": ((TABLE, "--config.data.path=item"), "interactions.csv", "item", "'zebra'"),
    "unknown text column": ((TABLE, "--config.data.path=good", "--config.data.text={name}"), "config.data.text", "{name}", "title"),
    "k-core that leaves nothing": ((TABLE, "--config.data.path=good", "--config.data.k_core=99"), "k_core"),
}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "tiny.py").write_text(config_text(tiny))
    (folder / "table.py").write_text(config_text(tiny | {"data.source": "table"}))
    (folder / "unknown.py").write_text(config_text(tiny | {"model.widht": 3}))
    (folder / "type.py").write_text(config_text(tiny | {"model.width": "wide"}))
    (folder / "broken.py").write_text("def get_config(:\n")
    (folder / "empty.py").write_text("def get_config():\n    return {}\n")
    (folder / "exit.py").write_text("raise SystemExit('enough')\n")
    (folder / "notes").mkdir()
    (folder / "notes" / "thesis.tex").write_text("precious")
    events = {"good": EVENTS, "column": EVENTS.replace("timestamp", "when"), "item": EVENTS.replace("u5,c", "u5,zebra")}
    for name, text in events.items():
        (folder / name).mkdir()
        (folder / name / "interactions.csv").write_text(text)
        (folder / name / "items.csv").write_text(TITLE)
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gives_a_one_line_error_and_writes_nothing(wrong, case):
    arguments, *named = WRONG[case]
    before = contents(wrong)
    _out, err = run(wrong, *arguments, code=2, XDG_CACHE_HOME=str(wrong / "cache"), PYTHONDONTWRITEBYTECODE="1")
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert len(err) < 400 and "Traceback" not in err
    assert all(name in err for name in named), err
    assert contents(wrong) == before and not (wrong / "cache").exists() and not (wrong / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((TINY, "--config.model.width=8", "--config.train.steps=200"), ("config", "model.width (16 there, 8 here)")),
        ((TINY, "--config.train.steps=199"), ("train.steps (200 there, 199 here)",)),
        ((TINY, "--config.eval.metric=hr@7", "--config.eval.ks=(7,)"), ("eval.metric = 'hr@7' was not measured",)),
        (("--mode=evaluate", "--step=77"), ("--step=77", "150, 200")),
        (("--mode=evaluate", "--step=newest"), ("--step=newest",)),
    ],
)
def test_conflicting_commands_leave_a_run_unchanged(folder, whole, arguments, named):
    before = contents(folder / "whole")
    _, err = run(folder, *arguments, "--workdir=whole", code=2)
    assert err.startswith("error: ") and err.count("\n") == 1 and all(name in err for name in named), err
    assert contents(folder / "whole") == before


def test_help(folder):
    out, err = run_anew(folder, "--help")
    assert "--workdir" in out and "--config" in out and err == ""


@pytest.mark.parametrize(
    ("raised", "code", "printed"),
    [
        (NonFiniteError("step 3: item_sum not finite"), 4, "error: step 3: item_sum not finite\n"),
        (FloatingPointError("a score of user 'u' is not finite"), 4, "error: a score of user 'u' is not finite\n"),
        (PermissionError(13, "Permission denied", "closed/run/config.json"), 2, "error: closed/run/config.json: Permission denied\n"),
    ],
)
def test_exit_codes(monkeypatch, capsys, raised, code, printed):
    def run(_):
        raise raised

    monkeypatch.setattr(main_lib, "run", run)
    for name in ("install", "ignore"):  # else the other tests, and the programs that they start, would ignore signals
        monkeypatch.setattr(Signals, name, lambda self: None)
    with pytest.raises(SystemExit) as ended:
        main_lib._main([])
    assert ended.value.code == code and capsys.readouterr().err == printed


STOPPED = """
import threading
from iam_jax import main
from iam_jax.devices.signals import Stop

def run(_):
    threading.Thread(target=threading.Event().wait).start()  # as a library's thread whose owner was interrupted
    print("begun")
    raise Stop

main.run = run
main._main([])
"""


def test_a_thread_that_never_ends_does_not_block_a_stopped_program():
    done = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (75, "begun\n", "stopped; run the same command again to continue\n")

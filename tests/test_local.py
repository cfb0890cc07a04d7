"""launch/local.py: jobs of real processes give equal results for any number of processes, also after a kill or a stop."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from helpers import metrics_lines as lines
from jobs import LAUNCHER, load_launcher, run_job, start_job
from test_main import assert_same, checkpoint, config_text, run

from iam_jax.config import default_config, resolve
from iam_jax.data.batches import training_rows
from iam_jax.data.prepare import prepare

STEPS, ROWS = 14, 28  # an epoch has 21 rows: one ends with every third step


@pytest.fixture(scope="module")
def settings(tiny):
    """Each distinct item once in two micro-batches, so that a process needs facts about the rows of the others."""
    steps = {"train.steps": STEPS, "train.batch_rows": ROWS, "train.eval_every": STEPS // 2, "train.save_every": 2, "log.every": 1}
    return tiny | steps | {"model.dropout": 0.0, "model.item_states": "on", "optimizer.accumulate": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, settings):
    folder = tmp_path_factory.mktemp("local")
    (folder / "tiny.py").write_text(config_text(settings | {"eval.baselines": False}))
    return folder


@pytest.fixture(scope="module")
def single_process(folder):
    """One process, in two commands. Its state between them is in the folder `changed`."""
    run(folder, "--config=tiny.py", "--workdir=one", f"--config.train.steps={STEPS // 2}", "--config.eval.test=false")
    shutil.copytree(folder / "one", folder / "changed")
    run(folder, "--config=tiny.py", "--workdir=one")
    return folder / "one"


@pytest.fixture(scope="module")
def two_processes(folder):
    """An uninterrupted run of two processes, as a user starts it. (The other jobs' processes are forked.)"""
    output = run_job(folder, 2, "--config=tiny.py", "--workdir=two", fresh=True)
    for message in (
        "split ",
        "data ready ",
        "12,608 parameters; ",
        f"step {STEPS // 2}: validation ",
        "test: 60 users",
        "wrote two/evaluation.json",
    ):
        assert output.count(f"[0] {message}") == 1 and f"[1] {message}" not in output  # only the first process prints
    return folder / "two"


def assert_alike(left, right):
    """The losses agree within 1e-4, and rounding changes the ranks of at most one user."""
    for a, b in zip(lines(left), lines(right), strict=True):
        assert a.keys() == b.keys() and [a["step"], a.get("tokens_seen")] == [b["step"], b.get("tokens_seen")]
        if "item_loss" in a:  # not a validation
            assert a["item_loss"] == pytest.approx(b["item_loss"], rel=1e-4), a["step"]
            assert a["step"] > 12 or a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4), a["step"]
    a, b = (pl.read_parquet(workdir / "ranks.parquet") for workdir in (left, right))
    assert a["split", "user", "target"].equals(b["split", "user", "target"]) and len(a) == 120
    assert a["user"].filter(a["rank"] != b["rank"]).n_unique() <= 1


def test_two_processes_train_as_one(single_process, two_processes):
    assert_alike(single_process, two_processes)


@pytest.mark.slow
def test_four_processes_train_as_one(folder, single_process):
    """Two processes each share their rows."""
    run_job(folder, 4, "--config=tiny.py", "--workdir=four", "--config.mesh.tensor=2", timeout=900)
    assert_alike(single_process, folder / "four")


def test_every_row_once_an_epoch(two_processes, settings):
    """Checked with the total tokens of all processes at the ends of epochs."""
    fields = default_config()
    fields.update_from_flattened_dict(settings)
    config = resolve(fields)
    prepared = prepare(config.data)
    rows = training_rows(prepared.events, prepared.catalogue, 64, 2, whole_text=False, seed=0)
    seen = {line["step"] * ROWS: line["tokens_seen"] for line in lines(two_processes) if "tokens_seen" in line}
    ends = [count for count in seen if count % len(rows) == 0]
    assert len(ends) >= 4
    assert all(seen[count] == count // len(rows) * rows.sizes.sum() for count in ends)


def test_continued_by_another_number_of_processes(folder, single_process):
    """The losses and tokens of one process: no row is repeated or skipped."""
    assert f"continuing from step {STEPS // 2}" in run_job(folder, 2, "--config=tiny.py", "--workdir=changed")
    assert_alike(single_process, folder / "changed")


def wait_for(job, condition):
    end = time.monotonic() + 600
    while not condition():
        assert job.poll() is None and time.monotonic() < end, job.communicate()[0]
        time.sleep(0.02)


def process_of(job, number):
    """The process id of one of the launcher's processes."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    (found,) = [int(child) for child in children if f"--process_id={number}" in Path(f"/proc/{child}/cmdline").read_text()]
    return found


def test_killed_stopped_and_continued(folder, two_processes):
    """The result equals that of an uninterrupted run bitwise."""
    flags = "--config=tiny.py", "--workdir=again", "--config.mesh.heartbeat_seconds=10"
    saved = folder / "again" / "checkpoints"
    job = start_job(folder, 2, *flags)
    wait_for(job, (saved / "4").exists)
    os.kill(process_of(job, 1), signal.SIGKILL)
    output, _ = job.communicate(timeout=120)  # the documented time limit
    assert job.returncode == 128 + signal.SIGKILL and "process 1 was ended by SIGKILL" in output
    assert "error: process 0: " in output or "heartbeat" in output  # the first process noticed by itself
    assert "killed" not in output

    job = start_job(folder, 2, *flags)
    wait_for(job, (saved / "6").exists)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=400)
    assert job.returncode == 75 and output.count("stopped; run the same command again to continue") == 1
    last = max(int(path.name) for path in saved.iterdir() if path.name.isdecimal())
    assert 6 <= last < STEPS and lines(folder / "again")[-1]["step"] <= last

    assert f"continuing from step {last}" in run_job(folder, 2, *flags)
    for step in (STEPS // 2, STEPS):
        if (two_processes / "checkpoints" / str(step)).exists():
            assert_same(checkpoint(folder / "again", step), checkpoint(two_processes, step))
    assert lines(folder / "again") == lines(two_processes)
    assert (folder / "again" / "ranks.parquet").read_bytes() == (two_processes / "ranks.parquet").read_bytes()


# ---- the launcher itself


@pytest.fixture
def launcher(monkeypatch):
    launcher = load_launcher()
    monkeypatch.setattr(launcher.signal, "signal", lambda *_: None)
    return launcher


def test_commands_and_devices(launcher, monkeypatch):
    commands = launcher.job(["program", "--flag"], 2, 3, {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--other"})
    assert [variables["XLA_FLAGS"] for variables, _ in commands] == ["--other --xla_force_host_platform_device_count=3"] * 2
    assert [command[:3] for _, command in commands] == [["program", "--flag", "--multihost"]] * 2
    assert [command[-2:] for _, command in commands] == [["--processes=2", "--process_id=0"], ["--processes=2", "--process_id=1"]]
    (address,) = {command[3] for _, command in commands}
    assert address.startswith("--coordinator=localhost:")
    visible = {"CUDA_VISIBLE_DEVICES": "0,1,5,7"}
    assert [variables["CUDA_VISIBLE_DEVICES"] for variables in launcher.environments(2, None, visible)] == ["0,1", "5,7"]
    assert [variables["CUDA_VISIBLE_DEVICES"] for variables in launcher.environments(3, 1, visible)] == ["0", "1", "5"]
    with pytest.raises(ValueError, match="2 processes with 3 devices each need more than the 4 available GPUs"):
        launcher.environments(2, 3, visible)
    assert launcher.environments(2, None, visible | {"JAX_PLATFORMS": "cpu"}) == [{"JAX_PLATFORMS": "cpu"}] * 2


def program(text):
    return {}, [sys.executable, "-c", text]


def test_the_first_nonzero_exit_code_is_returned(launcher):
    output = []
    ends = "import sys; print('out'); print('err', file=sys.stderr); sys.exit({})"
    assert launcher.run([program(ends.format(0))] * 2, 60, lambda *line, **_: output.append(*line)) == 0
    assert sorted(output) == ["[0] err\n", "[0] out\n", "[1] err\n", "[1] out\n"]
    assert launcher.run([program(ends.format(0)), program(ends.format(75))], 60, lambda *_, **__: None) == 75


def test_a_process_that_does_not_exit_is_killed(launcher):
    output = []
    stuck = program("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)")
    assert launcher.run([stuck, program("import sys; sys.exit(4)")], 0.5, lambda *line, **_: output.append(*line)) == 4
    assert output == ["process 0: still running 0.5 s after another one failed; killed"]


def test_dry_run_and_wrong_flags():
    output = run_local("--processes=2", "--dry-run", "--", "--config=a b.py")
    first, second = output.stdout.splitlines()
    assert "JAX_PLATFORMS=cpu " in first and first.endswith("--process_id=0") and "-m iam_jax.main '--config=a b.py' --multihost" in second
    for wrong in (["--processes=0", "--", "--config=a"], ["--processes=2"], ["--processes=2", "--other", "--", "-x"]):
        assert run_local(*wrong, code=2).stdout == ""


def run_local(*arguments, code=0):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, str(LAUNCHER), *arguments], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == code, done.stderr
    return done

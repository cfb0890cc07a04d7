"""launch/local.py: jobs of real processes, alike whatever their number; killed, stopped, and gone on with."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from helpers import metrics_lines as lines
from jobs import LAUNCHER, load_launcher, run_job, start_job
from test_main import assert_same, checkpoint, config_text

from iam_jax.config import default_config, resolve
from iam_jax.data.batches import training_rows
from iam_jax.data.prepare import prepare

STEPS = 84


@pytest.fixture(scope="module")
def settings(tiny):
    """Each distinct item once, of two micro-batches: what a process must know of the others' rows."""
    steps = {"train.steps": STEPS, "train.eval_every": 42, "train.save_every": 12, "log.every": 3}
    return tiny | steps | {"model.dropout": 0.0, "model.item_states": "on", "optimizer.accumulate": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, settings):
    folder = tmp_path_factory.mktemp("local")
    (folder / "tiny.py").write_text(config_text(settings | {"eval.baselines": False}))
    return folder


@pytest.fixture(scope="module")
def one(folder):
    run_job(folder, 1, "--config=tiny.py", "--workdir=one")
    return folder / "one"


@pytest.fixture(scope="module")
def two(folder):
    """The whole run of two processes, uninterrupted."""
    told = run_job(folder, 2, "--config=tiny.py", "--workdir=two")
    for said in ("split ", "data ready ", "12,608 parameters; ", "step 42: validation ", "test: 60 users", "wrote two/evaluation.json"):
        assert told.count(f"[0] {said}") == 1 and f"[1] {said}" not in told  # only the first process tells
    return folder / "two"


def assert_alike(left, right):
    """The same curve within 1e-4, and ranks that rounding moves for one user at most."""
    for a, b in zip(lines(left), lines(right), strict=True):
        assert a.keys() == b.keys() and [a["step"], a.get("tokens_seen")] == [b["step"], b.get("tokens_seen")]
        if "item_loss" in a:  # no validation
            assert a["item_loss"] == pytest.approx(b["item_loss"], rel=1e-4), a["step"]
            assert a["step"] > 12 or a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4), a["step"]
    a, b = (pl.read_parquet(workdir / "ranks.parquet") for workdir in (left, right))
    assert a["split", "user", "target"].equals(b["split", "user", "target"]) and len(a) == 120
    assert a["user"].filter(a["rank"] != b["rank"]).n_unique() <= 1


def test_two_processes_train_as_one(one, two):
    assert_alike(one, two)


@pytest.mark.slow
def test_four_processes_train_as_one(folder, one):
    """Two and two share their rows."""
    run_job(folder, 4, "--config=tiny.py", "--workdir=four", "--config.mesh.tensor=2", timeout=900)
    assert_alike(one, folder / "four")


def test_every_row_once_an_epoch(two, settings):
    """By the tokens that the processes saw together at the ends of epochs."""
    fields = default_config()
    fields.update_from_flattened_dict(settings)
    config = resolve(fields)
    prepared = prepare(config.data)
    rows = training_rows(prepared.events, prepared.catalogue, 64, 2, whole_text=False, seed=0)
    seen = {line["step"] * 4: line["tokens_seen"] for line in lines(two) if "tokens_seen" in line}
    ends = [count for count in seen if count % len(rows) == 0]
    assert len(ends) >= 4
    assert all(seen[count] == count // len(rows) * rows.sizes.sum() for count in ends)


def test_gone_on_with_by_another_number_of_processes(folder, one):
    """The curve of one process, its tokens to the last: no row repeated or skipped."""
    run_job(folder, 1, "--config=tiny.py", "--workdir=changed", "--config.train.steps=42", "--config.eval.test=false")
    run_job(folder, 2, "--config=tiny.py", "--workdir=changed")
    assert_alike(one, folder / "changed")


def wait_for(job, condition):
    end = time.monotonic() + 600
    while not condition():
        assert job.poll() is None and time.monotonic() < end, job.communicate()[0]
        time.sleep(0.02)


def process_of(job, number):
    """The id of one of a launcher's processes."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    (found,) = [int(child) for child in children if f"--process_id={number}" in Path(f"/proc/{child}/cmdline").read_text()]
    return found


def test_killed_stopped_and_gone_on_with(folder, two):
    """Bitwise what it would have been."""
    flags = "--config=tiny.py", "--workdir=again", "--config.mesh.heartbeat_seconds=10"
    saved = folder / "again" / "checkpoints"
    job = start_job(folder, 2, *flags)
    wait_for(job, (saved / "24").exists)
    os.kill(process_of(job, 1), signal.SIGKILL)
    told, _ = job.communicate(timeout=120)  # what is promised
    assert job.returncode == 128 + signal.SIGKILL and "process 1 was ended by SIGKILL" in told
    assert "error: process 0: " in told or "heartbeat" in told  # the first process found out by itself
    assert "killed" not in told

    job = start_job(folder, 2, *flags)
    wait_for(job, (saved / "48").exists)
    job.send_signal(signal.SIGTERM)
    told, _ = job.communicate(timeout=400)
    assert job.returncode == 75 and told.count("stopped; the same command goes on from here") == 1
    last = max(int(path.name) for path in saved.iterdir() if path.name.isdecimal())
    assert 48 <= last < STEPS and lines(folder / "again")[-1]["step"] <= last

    assert f"continuing from step {last}" in run_job(folder, 2, *flags)
    for step in (STEPS // 2, STEPS):
        if (two / "checkpoints" / str(step)).exists():
            assert_same(checkpoint(folder / "again", step), checkpoint(two, step))
    assert lines(folder / "again") == lines(two)
    assert (folder / "again" / "ranks.parquet").read_bytes() == (two / "ranks.parquet").read_bytes()


# ---- the launcher itself


@pytest.fixture
def launcher(monkeypatch):
    launcher = load_launcher()
    monkeypatch.setattr(launcher.signal, "signal", lambda *_: None)
    return launcher


def test_commands_and_devices(launcher, monkeypatch):
    commands = launcher.job(["program", "--flag"], 2, 3, {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--other"})
    assert [more["XLA_FLAGS"] for more, _ in commands] == ["--other --xla_force_host_platform_device_count=3"] * 2
    assert [command[:3] for _, command in commands] == [["program", "--flag", "--multihost"]] * 2
    assert [command[-2:] for _, command in commands] == [["--processes=2", "--process_id=0"], ["--processes=2", "--process_id=1"]]
    (address,) = {command[3] for _, command in commands}
    assert address.startswith("--coordinator=localhost:")
    visible = {"CUDA_VISIBLE_DEVICES": "0,1,5,7"}
    assert [more["CUDA_VISIBLE_DEVICES"] for more in launcher.environments(2, None, visible)] == ["0,1", "5,7"]
    assert [more["CUDA_VISIBLE_DEVICES"] for more in launcher.environments(3, 1, visible)] == ["0", "1", "5"]
    with pytest.raises(ValueError, match="2 processes with 3 devices each need more than the 4 available GPUs"):
        launcher.environments(2, 3, visible)
    assert launcher.environments(2, None, visible | {"JAX_PLATFORMS": "cpu"}) == [{"JAX_PLATFORMS": "cpu"}] * 2


def program(text):
    return {}, [sys.executable, "-c", text]


def test_the_first_code_that_is_not_0(launcher):
    told = []
    ends = "import sys; print('out'); print('err', file=sys.stderr); sys.exit({})"
    assert launcher.run([program(ends.format(0))] * 2, 60, lambda *line, **_: told.append(*line)) == 0
    assert sorted(told) == ["[0] err\n", "[0] out\n", "[1] err\n", "[1] out\n"]
    assert launcher.run([program(ends.format(0)), program(ends.format(75))], 60, lambda *_, **__: None) == 75


def test_a_process_that_does_not_follow_is_killed(launcher):
    told = []
    stuck = program("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)")
    assert launcher.run([stuck, program("import sys; sys.exit(4)")], 0.5, lambda *line, **_: told.append(*line)) == 4
    assert told == ["process 0: still running 0.5 s after another one failed; killed"]


def test_dry_run_and_wrong_flags():
    told = run_local("--processes=2", "--dry-run", "--", "--config=a b.py")
    first, second = told.stdout.splitlines()
    assert "JAX_PLATFORMS=cpu " in first and first.endswith("--process_id=0") and "-m iam_jax.main '--config=a b.py' --multihost" in second
    for wrong in (["--processes=0", "--", "--config=a"], ["--processes=2"], ["--processes=2", "--other", "--", "-x"]):
        assert run_local(*wrong, code=2).stdout == ""


def run_local(*arguments, code=0):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, str(LAUNCHER), *arguments], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == code, done.stderr
    return done

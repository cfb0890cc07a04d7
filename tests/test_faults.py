"""Failures that a run survives: kills, a full disk, damaged checkpoints, another mesh; working folders of earlier versions."""

import contextlib
import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from forks import run
from helpers import metrics_lines, on_devices
from test_main import assert_same, checkpoint, config_text, contents, start, wait_for

from iam_jax.config import LogConfig
from iam_jax.errors import InputError
from iam_jax.runs.logs import MetricsLog
from iam_jax.storage.files import write_atomically

TESTS = Path(__file__).parent
STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("faults")
    settings = tiny | {"train.steps": STEPS, "train.save_every": 1, "eval.baselines": False, "objective.token": 0.1}
    settings["model.schedule"] = "full"  # one layer
    (folder / "tiny.py").write_text(config_text(settings))
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    run(folder, "--config=tiny.py", "--workdir=whole")
    return folder / "whole"


def progress(workdir, step=STEPS):
    saved = json.loads((workdir / "checkpoints" / str(step) / "progress" / "metadata").read_text())
    return {name: value for name, value in saved.items() if name != "minutes"}


def assert_as_uninterrupted(workdir, whole):
    assert_same(checkpoint(workdir, STEPS), checkpoint(whole, STEPS))
    assert progress(workdir) == progress(whole)
    assert metrics_lines(workdir) == metrics_lines(whole)
    assert (workdir / "evaluation.json").read_bytes() == (whole / "evaluation.json").read_bytes()


# ---- killed


def trial(folder, whole, seed):
    """Runs the same command until it finishes, killed once or twice before, every second time during a save."""
    draw = random.Random(seed)
    name = f"killed-{seed}"
    for attempt in range(draw.randint(1, 2)):
        if (seed + attempt) % 2:
            kill = ["batch", draw.randrange(STEPS), draw.uniform(0, 0.2)]
        else:
            moment = draw.choice(["before", "after", "deleted"])
            kill = ["save", draw.randint(1, 9 if moment == "deleted" else 50), moment]  # a save names several folders
        print(f"seed {seed}: {kill}")
        run(folder, "--config=tiny.py", f"--workdir={name}", kill=kill)
    run(folder, "--config=tiny.py", f"--workdir={name}")
    assert_as_uninterrupted(folder / name, whole)
    shutil.rmtree(folder / name)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_at_random_moments_equals_an_uninterrupted_one(folder, whole, seed):
    trial(folder, whole, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_killed_at_twenty_more_moments(folder, whole, seed):
    trial(folder, whole, seed)


def test_a_run_killed_before_its_first_checkpoint_reports_it(folder, whole):
    out, _ = run(folder, "--config=tiny.py", "--workdir=first", kill=["save", 1, "before"])
    assert "no checkpoint yet" not in out
    (left,) = (folder / "first" / "checkpoints").iterdir()
    assert "tmp" in left.name
    out, _ = run(folder, "--config=tiny.py", "--workdir=first")
    assert "no checkpoint yet: starting from step 0" in out
    assert_as_uninterrupted(folder / "first", whole)


# ---- damaged checkpoints, another mesh


def test_if_the_newest_checkpoint_is_damaged_the_previous_one_is_used(folder, whole):
    workdir = folder / "damaged"
    shutil.copytree(whole, workdir)
    (data,) = (workdir / "checkpoints" / str(STEPS) / "rest" / "d").iterdir()
    data.write_bytes(data.read_bytes()[:100])
    out, err = run(folder, "--workdir=damaged")
    message = f"checkpoints/{STEPS} is damaged (rest: "
    assert message in out and f"; using step {STEPS - 1}\n" in out and f"continuing from step {STEPS - 1}\n" in out and err == ""
    assert_as_uninterrupted(workdir, whole)
    (data,) = (workdir / "checkpoints" / str(STEPS) / "params" / "d").iterdir()
    data.write_bytes(data.read_bytes()[:100])
    before = contents(workdir)
    _, err = run(folder, "--workdir=damaged", "--mode=evaluate", f"--step={STEPS}", code=2)
    assert err.startswith("error: ") and err.count("\n") == 1 and f"checkpoints/{STEPS} is damaged (params: " in err
    assert contents(workdir) == before
    out, err = run(folder, "--workdir=damaged", "--mode=evaluate", "--step=last")
    assert f"; using step {STEPS - 1}\n" in out and err == ""
    assert json.loads((workdir / "evaluation.json").read_text())["step"] == STEPS - 1


def test_on_another_mesh_no_example_is_repeated_or_skipped(folder, whole):
    run(folder, "--config=tiny.py", "--workdir=meshes", kill=["batch", 7, 0.0])
    run(folder, "--config=tiny.py", "--workdir=meshes", "--config.mesh.fsdp=2", **on_devices(4))
    there, here = progress(folder / "meshes"), progress(whole)
    assert [there[name] for name in ("step", "next_batch", "tokens")] == [here[name] for name in ("step", "next_batch", "tokens")]
    for one, other in zip(metrics_lines(folder / "meshes"), metrics_lines(whole), strict=True):
        assert one.keys() == other.keys() and one["step"] == other["step"]
        for name in one.keys() & {"item_loss", "token_loss", "gradient_norm"}:
            assert one[name] == pytest.approx(other[name], rel=1e-4)
        assert [one.get(name) for name in ("tokens_seen", "epoch")] == [other.get(name) for name in ("tokens_seen", "epoch")]
    sharding = json.loads((folder / "meshes" / "checkpoints" / str(STEPS) / "params" / "_sharding").read_text())
    assert any("fsdp" in text for text in sharding.values())  # the mesh was different


# ---- a full disk


@pytest.fixture
def disk(tmp_path):
    """A file system of 640 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_while_saving(folder, whole, disk):
    command = "--config=tiny.py", f"--workdir={disk}/run"
    for _ in range(2):  # the disk is also full the second time
        _, err = run(folder, *command, code=2)
        assert err.startswith("error: ") and err.count("\n") == 1 and "No space left on device" in err and str(disk) in err
    steps = [int(path.name) for path in (disk / "run" / "checkpoints").iterdir() if path.name.isdecimal()]
    assert steps and max(steps) < STEPS
    subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
    out, _ = run(folder, *command)
    assert f"continuing from step {max(steps)}\n" in out
    assert_as_uninterrupted(disk / "run", whole)


def test_a_full_disk_while_other_files_are_written(disk):
    (disk / "run").mkdir()
    log = MetricsLog(disk / "run", 0, LogConfig())
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    frame = pl.DataFrame({"rank": np.arange(100_000)})
    for name, write in (("ranks.parquet", frame.write_parquet), ("evaluation.json", lambda path: path.write_text("x" * 9999))):
        with pytest.raises(InputError, match=rf"{name}: cannot be written \(.*No space left on device"):
            write_atomically(disk / "run" / name, write)
    with pytest.raises(InputError, match=r"metrics\.jsonl: cannot be read or written \(No space left on device\)"):
        for step in range(1000):
            log.write(step, {"item_loss": 0.5})
    with contextlib.suppress(InputError):
        log.close()
    assert {path.name for path in (disk / "run").iterdir()} == {"metrics.jsonl", "tensorboard"}


# ---- stopped


@pytest.mark.slow
def test_the_demo_stopped_by_sigterm(tmp_path):
    """test_main.py has a shorter test with the tiny config."""
    command = f"--config={TESTS.parent / 'configs' / 'demo.py'}", "--workdir=demo", "--config.log.every=5"
    done = 0
    for _ in range(2):
        process = start(tmp_path, *command, XLA_FLAGS="")  # with the flags of normal use
        log, lines = tmp_path / "demo" / "metrics.jsonl", done // 5 + 4
        wait_for(process, lambda log=log, lines=lines: log.exists() and len(log.read_text().splitlines()) >= lines)
        process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        out, err = process.communicate(timeout=100)
        print(f"out in {time.monotonic() - begun:.1f} s")
        assert process.returncode == 75 and err.endswith("stopped; run the same command again to continue\n")
        assert (f"continuing from step {done}\n" in out) == (done > 0)
        (done,) = sorted(int(path.name) for path in (tmp_path / "demo" / "checkpoints").iterdir())[-1:]
        assert 0 < done < 400


# ---- working folders of earlier versions


@pytest.mark.parametrize("commit", ["d01666a", "50a2050"])
def test_a_working_folder_of_an_earlier_version(folder, commit):
    """tests/data/make_old_workdir.py made it."""
    made, name = TESTS / "data" / f"old_workdir_{commit}", f"old-{commit}"
    workdir = folder / name
    shutil.copytree(made, workdir)
    assert ("skip_limit" in (workdir / "config.json").read_text()) == (commit != "d01666a")
    out, err = run(folder, f"--workdir={name}", "--mode=evaluate")
    assert err == ""
    before, after = (json.loads((folder / "evaluation.json").read_text()) for folder in (made, workdir))
    before["protocol"] |= {"ties": "hash", "duplicates": "keep"}  # what earlier versions did
    assert [before[name] for name in ("split_sha256", "protocol", "step")] == [after[name] for name in ("split_sha256", "protocol", "step")]
    for split in ("validation", "test"):
        there, here = before["results"]["model"][split], after["results"]["model"][split]
        assert here.keys() >= there.keys() and here["ndcg@10"] > 0
        for metric in ("users", "hr@1", "hr@10", "ndcg@10", "mrr@10", "tie_rate"):
            assert here[metric] == pytest.approx(there[metric], rel=1e-6)

    items = pl.read_parquet(workdir / "items.parquet")["item"]
    events = "".join(f"u{user},{items[n]},{n}\n" for user in range(3) for n in range(user, user + 4))
    (folder / "events.csv").write_text(f"user,item,timestamp\n{events}")
    run(folder, f"--workdir={name}", "--mode=score", "--users=events.csv", f"--output={name}-lists", "--top_k=5")
    (part,) = (folder / f"{name}-lists").glob("*.parquet")
    assert pl.read_parquet(part).group_by("user").len()["len"].to_list() == [5, 5, 5]

    out, err = run(folder, f"--workdir={name}", "--config.train.steps=44")  # training continues
    assert "continuing from step 40\n" in out
    assert [line["step"] for line in metrics_lines(workdir) if "item_loss" in line] == [20, 40, 44]
    assert progress(workdir, 44)["skipped"] == 0 and "skip_limit" in (workdir / "config.json").read_text()

"""Telemetry of a run: times without validations, figures of every process, memory, a profile of selected steps."""

import json
import mmap
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jobs import two_processes

from iam_jax.config import default_config, resolve
from iam_jax.data.prepare import prepare
from iam_jax.devices import chips
from iam_jax.devices.signals import Signals, Stop
from iam_jax.errors import InputError, NonFiniteError
from iam_jax.training import loop as train_lib
from iam_jax.training import telemetry
from iam_jax.training.flops import StepFlops
from iam_jax.training.loop import train
from iam_jax.training.run import make_run
from iam_jax.training.step import init_state, make_train_step
from iam_jax.training.telemetry import Meter, Profile, is_timing, memory

CHIP = chips.find_chip("TPU v5e")


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(telemetry, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_a_window_of_steps(clock):
    meter = Meter(Counter({"bfloat16": 2e12, "float32": 1e12}), CHIP)
    for tokens in (30, 50):
        with meter.waiting():
            clock(0.5)
        clock(1.5)
        meter.step(tokens, tokens / 10)
    clock(1000)  # a validation
    meter.resume()
    clock(4)
    meter.step(100, 10)
    figures = meter.take()
    assert figures["step_seconds"] == pytest.approx(8 / 3) and figures["data_wait"] == pytest.approx(1 / 8)
    assert figures["tokens_per_second"] == pytest.approx(180 / 8) and figures["targets_per_second"] == pytest.approx(18 / 8)
    assert figures["mfu"] == pytest.approx(3 * 3e12 / 197e12 / jax.device_count() / 8)
    assert all(map(is_timing, figures)) and not any(name.endswith("_by_process") for name in figures)

    clock(3)  # the next window does not depend on the previous one
    meter.step(6, 3)
    figures = meter.take()
    assert (figures["step_seconds"], figures["tokens_per_second"], figures["data_wait"]) == (3, 2, 0)
    assert "mfu" not in _taken(Meter(), clock)


def _taken(meter, clock):
    clock(1)
    meter.step(1, 1)
    return meter.take()


def test_memory(monkeypatch):
    before = memory()["host_bytes"]
    held = mmap.mmap(-1, 2**27)  # an array may be given memory that other tests have freed
    np.frombuffer(held, np.uint8)[:] = 1
    assert abs(memory()["host_bytes"] - before - len(held)) < 2**25
    assert memory().keys() == {"host_bytes"}  # CPUs report nothing else
    stats = [{"bytes_in_use": 5, "peak_bytes_in_use": 9}, {"bytes_in_use": 7, "peak_bytes_in_use": 8}]
    devices = [SimpleNamespace(memory_stats=lambda one=one: one) for one in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory().items() > {"device_bytes": 7, "device_peak_bytes": 9}.items()


TWO = """
import json, sys
from types import SimpleNamespace
from jobs import join_job

join_job(sys.argv[1:])
import jax
from iam_jax.training import telemetry

now, process = [0], jax.process_index()
telemetry.time = SimpleNamespace(monotonic=lambda: now[0])
telemetry.memory = lambda: {"host_bytes": 10**10 * (3 - process)}
meter = telemetry.Meter()
with meter.waiting():
    now[0] += 3 * process
now[0] += 1
meter.step(70, 7)
print(json.dumps(meter.take()), file=sys.stderr)
"""


def test_figures_of_every_process():
    outputs = two_processes(["-c", TWO])
    first, second = (json.loads(next(line for line in out.splitlines() if line.startswith("{"))) for out in outputs)
    shared = {
        "step_seconds_by_process": [1, 4],
        "data_wait": 0.75,
        "data_wait_by_process": [0, 0.75],
        "host_bytes": 3e10,
        "host_bytes_by_process": [3e10, 2e10],
    }
    assert first == shared | {"step_seconds": 1, "tokens_per_second": 70, "targets_per_second": 7}
    assert second == shared | {"step_seconds": 4, "tokens_per_second": 17.5, "targets_per_second": 1.75}
    assert all(map(is_timing, first))


# ---- in training


@pytest.fixture(scope="module")
def make(tiny):
    """A run of six steps from test_train.py, whose step may be in the cache. Its step and initial state are made once for all tests."""
    once, tiny = [], tiny | {"objective.token": 0.1, "log.every": 1}

    def make(**changes):
        config = default_config()
        config.update_from_flattened_dict(tiny | {name.replace("__", "."): value for name, value in changes.items()})
        resolved = resolve(config)
        run = make_run(resolved, prepare(resolved.data))
        if not once:
            with jax.set_mesh(run.mesh):
                once.extend([make_train_step(run), init_state(run)])
        return run, *once

    return make


def go(monkeypatch, run, workdir, step, initial, signals=None):
    monkeypatch.setattr(train_lib, "make_train_step", lambda _: step)
    monkeypatch.setattr(train_lib, "init_state", lambda _: jax.tree.map(jnp.copy, initial))  # a step donates its buffers
    monkeypatch.setattr(train_lib, "validation_subset", lambda *_: np.zeros(0, np.int64))
    with jax.set_mesh(run.mesh):
        train(run, workdir, None, signals or Signals())
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def traces(workdir):
    return [path for path in workdir.rglob("*.xplane.pb") if path.stat().st_size]


def test_a_profile_of_some_steps(make, monkeypatch, tmp_path):
    run, step, initial = make(log__profile="2:4")
    turns = []
    monkeypatch.setattr(Profile, "turn", lambda self, turn=Profile.turn: (turns.append(len(turns)), turn(self)))
    traced = []

    def seen(state, batch, items, number, frozen):
        traced.append((int(number), len(turns)))
        return step(state, batch, items, number, frozen)

    lines = go(monkeypatch, run, tmp_path / "profiled", seen, initial)
    assert traced == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    (trace,) = traces(tmp_path / "profiled")
    assert trace.is_relative_to(tmp_path / "profiled" / "profile" / "process-0")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all({"step_seconds", "data_wait", "host_bytes", "tokens_per_second"} < line.keys() and "mfu" not in line for line in lines)

    run, step, initial = make()
    plain = go(monkeypatch, run, tmp_path / "plain", step, initial)
    assert not (tmp_path / "plain" / "profile").exists()
    assert [line["item_loss"] for line in plain] == [line["item_loss"] for line in lines]


@pytest.mark.parametrize(("ending", "error"), [("signal", Stop), ("loss", NonFiniteError)])
def test_a_profile_ends_with_the_run(make, monkeypatch, tmp_path, ending, error):
    run, step, initial = make(log__profile="1:100", train__skip_limit=0)
    signals = Signals()

    def last(state, batch, items, number, frozen):
        state, metrics = step(state, batch, items, number, frozen)
        signals.requested |= ending == "signal" and number == 2
        return state, metrics | ({"item_sum": np.float32(np.nan)} if ending == "loss" and number == 2 else {})

    with pytest.raises(error):
        go(monkeypatch, run, tmp_path, last, initial, signals)
    assert len(traces(tmp_path)) == 1
    jax.profiler.start_trace(str(tmp_path / "another"))  # no trace is active
    jax.profiler.stop_trace()


def test_a_profile_that_cannot_be_written(tmp_path):
    (tmp_path / "profile").write_text("no folder")
    profile = Profile(tmp_path, "0:2")
    assert profile.due(0) and not profile.due(2)
    profile.turn()
    with pytest.raises(InputError, match=r"profile/process-0/.*: cannot be written \(Not a directory\)"):
        profile.close()
    assert not profile.due(1)


def test_utilisation_if_the_chip_is_known(make, monkeypatch, tmp_path, capsys):
    run, step, initial = make()
    monkeypatch.setattr(train_lib, "find_chip", lambda kind: CHIP if kind == jax.devices()[0].device_kind else None)
    monkeypatch.setattr(train_lib, "step_flops", lambda _: StepFlops(Counter({"bfloat16": 197e9}), Counter()))
    for line in go(monkeypatch, run, tmp_path / "known", step, initial):
        assert line["mfu"] == pytest.approx(1e-3 / jax.device_count() / line["step_seconds"])

    def uncounted(run):
        raise ValueError("flops: conv_general_dilated is not counted")

    monkeypatch.setattr(train_lib, "step_flops", uncounted)
    capsys.readouterr()
    meter = train_lib.make_meter(run)
    meter.step(1, 1)
    assert "mfu" not in meter.take()
    assert capsys.readouterr().out == "no model FLOPs utilisation in metrics.jsonl: flops: conv_general_dilated is not counted\n"

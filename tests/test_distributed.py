"""Several processes as one job: agreement, and reports of differences and failures. test_local.py uses real processes."""

import os
from types import SimpleNamespace

import pytest
from jobs import two_processes
from test_main import config_text

from iam_jax import main as main_lib
from iam_jax.devices import distributed
from iam_jax.devices.signals import Signals, Stop
from iam_jax.errors import InputError, JobError, NonFiniteError


@pytest.fixture
def job(monkeypatch):
    """Makes this process the first of two. `replies`: the next values from the other process; `sent`: the values that this one gathered."""
    replies, sent = [], []

    def gather(value):
        sent.append(value)
        return [value, replies.pop(0)]

    monkeypatch.setattr(distributed, "_processes", 2)
    monkeypatch.setattr(distributed, "_before_agreement", True)
    monkeypatch.setattr(distributed, "gather", gather)
    return SimpleNamespace(replies=replies, sent=sent)


def test_facts_that_differ_are_named(job):
    facts = {"config.train.seed": 0, "split_sha256": "aa"}
    job.replies += [{"facts": facts}, {"facts": facts | {"split_sha256": "bb"}}, {"facts": {"config.train.seed": 0}}]
    distributed.agree(facts, Signals())
    for other in ("'bb'", "None"):
        with pytest.raises(InputError, match=f"^the processes differ: split_sha256 is 'aa' in process 0, {other} in process 1$"):
            distributed.agree(facts, Signals())


@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [
        (InputError("items.csv: no\n such column"), InputError, "process 1: items.csv: no such column"),
        (Stop(), Stop, "process 1: "),
        (NonFiniteError("step 3"), NonFiniteError, "process 1: step 3"),
        (OSError("disk full"), JobError, "process 1: OSError: disk full"),
    ],
)
def test_all_raise_what_one_raises_alone(job, error, raised, text):
    """Before the first agreement, and inside `fail_together`."""
    job.replies.append({"facts": {}})
    distributed.report_failure(error)
    distributed.report_failure(error)  # reported once, since the others wait only once
    (report,) = job.sent
    job.replies += [report, report["problem"], None, None]
    with pytest.raises(raised, match=f"^{text}$"):
        distributed.agree({"a": 1}, Signals())
    with pytest.raises(raised, match=f"^{text}$"), distributed.fail_together(Signals()):
        pass
    with pytest.raises(type(error)) as caught, distributed.fail_together(Signals()):
        raise error
    assert caught.value is error and job.sent[-1] == report["problem"]
    with distributed.fail_together(Signals()):
        pass
    assert job.sent[-1] is None


def test_signals_of_several_processes():
    """A signal takes effect when all processes have agreed; only inside `raising` it takes effect at once."""
    flags, signals = [False, True], Signals()
    signals.share(lambda flag: flag or flags.pop(0))
    signals.defer()
    signals.poll()
    signals._handle(15, None)
    assert signals.requested and not signals.stopping
    with pytest.raises(Stop), signals.raising():
        raise AssertionError
    with signals.deferred():
        pass
    signals._handle(15, None)  # still deferred
    signals.requested = False
    with pytest.raises(Stop):
        signals.poll()
    assert signals.stopping and not flags
    with pytest.raises(Stop), signals.raising():
        signals._handle(15, None)


def test_a_process_that_hangs_ends_itself(monkeypatch, capsys):
    class Ended(Exception):
        pass

    def exit_(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", exit_)
    monkeypatch.setattr(distributed, "_process", 3)
    distributed.report_progress("step 7")
    with pytest.raises(Ended, match=r"^5$"):
        distributed._watch(0.05)
    error = capsys.readouterr().err
    assert error.startswith("error: process 3: no progress for ") and error.endswith("(config.mesh.hang_minutes), waiting for step 7\n")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"processes": 2}, "--processes is for --multihost"),
        ({"multihost": True, "coordinator": "a:1", "processes": 2}, "--process_id is missing: .* go together"),
        ({"multihost": True, "process_id": 0}, "--coordinator is missing: .* go together"),
        ({"multihost": True, "coordinator": "a:1", "processes": 2, "process_id": 2}, r"--process_id=2: must be from 0 to .* = 1"),
        ({"multihost": True, "mode": "compare"}, "--mode=compare runs in one process"),
    ],
)
def test_conflicting_flags(monkeypatch, given, message):
    values = {"multihost": False, "mode": "train", "coordinator": "", "processes": None, "process_id": None} | given
    flags = {name: SimpleNamespace(value=value) for name, value in values.items()}
    monkeypatch.setattr(main_lib, "_MULTIHOST", flags.pop("multihost"))
    monkeypatch.setattr(main_lib, "_MODE", flags.pop("mode"))
    monkeypatch.setattr(main_lib, "_JOB", flags)
    with pytest.raises(InputError, match=message):
        main_lib._check_job()


OTHER = """
import sys
from absl import app
from iam_jax import main

if "--process_id=1" in sys.argv:
    sys.argv.append("--config.data.synthetic.seed=1")
app.run(main._main, flags_parser=main._parse)
"""


def test_processes_with_other_data_are_refused(tmp_path, tiny):
    (tmp_path / "tiny.py").write_text(config_text(tiny))
    outputs = two_processes(["-c", OTHER, "--config=tiny.py", "--workdir=run"], cwd=tmp_path, code=2)
    for out in outputs:
        assert "error: the processes differ: config.data.synthetic.seed is 0 in process 0, 1 in process 1" in out
    assert not (tmp_path / "run").exists()

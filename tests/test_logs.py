"""After an interruption, metrics.jsonl and TensorBoard events equal those of an uninterrupted run."""

import json
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from iam_jax.config import LogConfig
from iam_jax.runs.logs import MetricsLog, progress_bar


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """(step, tag, value) of every scalar, and the steps from which earlier events are hidden. A record is its length (8 bytes), a
    checksum (4), the event, a checksum (4)."""
    scalars, purged = [], []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            purged += [event.step] * (event.session_log.status == SessionLog.START)
    return scalars, purged


def test_lines_and_events(tmp_path, caplog, capfd):
    log = MetricsLog(tmp_path, 0, LogConfig())
    log.write(2, {"item_loss": 0.5, "epoch": 0.25})
    assert lines(tmp_path) == [{"step": 2, "item_loss": 0.5, "epoch": 0.25}]  # before it is closed
    log.write(2, {"validation/hr@10": 0.125})
    log.close()
    assert lines(tmp_path)[1:] == [{"step": 2, "validation/hr@10": 0.125}]
    scalars, _ = events(tmp_path)
    assert scalars == [(2, "item_loss", 0.5), (2, "epoch", 0.25), (2, "validation/hr_10", 0.125)]
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_lists_are_scalars_in_events(tmp_path):
    log = MetricsLog(tmp_path, 0, LogConfig())
    log.write(2, {"data_wait_by_process": [0.5, 0.25]})
    log.close()
    assert lines(tmp_path) == [{"step": 2, "data_wait_by_process": [0.5, 0.25]}]
    assert events(tmp_path)[0] == [(2, "data_wait_by_process/0", 0.5), (2, "data_wait_by_process/1", 0.25)]


def test_without_tensorboard(tmp_path):
    log = MetricsLog(tmp_path, 0, LogConfig(tensorboard=False))
    log.write(1, {"item_loss": 0.5})
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("tail", ["", '{"step": 8, "item_lo', '{"step": 4, "item_lo', "\n", "[1]\n", '{"item_loss": 1}\n', "8\n"])
def test_reopening_drops_later_lines_and_broken_ones(tmp_path, tail):
    log = MetricsLog(tmp_path, 0, LogConfig())
    for step in (2, 4, 6):
        log.write(step, {"item_loss": 1 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    log = MetricsLog(tmp_path, 4, LogConfig())
    log.write(6, {"item_loss": 9.0})
    log.close()
    assert lines(tmp_path) == [{"step": 2, "item_loss": 0.5}, {"step": 4, "item_loss": 0.25}, {"step": 6, "item_loss": 9.0}]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["metrics.jsonl", "tensorboard"]
    assert events(tmp_path)[1][-1] == 5  # TensorBoard hides the earlier step 6, but not step 4


def test_the_bar_starts_where_the_run_does(capsys):
    with progress_bar(LogConfig(), 10, 4) as bar:
        bar.update()
    assert "5/10" in capsys.readouterr().err
    with progress_bar(LogConfig(progress=False), 10, 4) as bar:
        bar.update()
    assert capsys.readouterr() == ("", "")

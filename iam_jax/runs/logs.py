"""The output of a run during training: metrics.jsonl, TensorBoard events, a progress bar."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from iam_jax.config import LogConfig
from iam_jax.devices.distributed import is_first
from iam_jax.errors import InputError
from iam_jax.storage.files import write_atomically
from iam_jax.storage.remote import Mirror, is_remote

_UPLOAD_SECONDS = 30  # between two uploads to object storage, besides those before checkpoints

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to `metrics.jsonl` and to TensorBoard events, in the first process of a job.

    Opening it at a step removes lines of later steps, of validations after `validated`, and an incomplete last line. So after an
    interruption the file is that of an uninterrupted run. Raises InputError if the file cannot be read or written.

    Object storage cannot append. There the files grow in a local folder and are uploaded as a whole: from time to time, before a checkpoint
    (`upload`), and at the end.
    """

    def __init__(self, workdir: Path, step: int, config: LogConfig, validated: int | None = None):
        self._file = self._events = self._mirror = None
        self.path = workdir / METRICS_FILE
        if not is_first():
            return
        with self._as_input_error():
            if is_remote(workdir):
                self._mirror = Mirror(workdir)
                self._mirror.fetch(METRICS_FILE)
                workdir = self._mirror.local
            file = workdir / METRICS_FILE
            if file.exists():
                lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
                kept = [line for line in lines if _step(line) <= (step if validated is None or "validation/" not in line else validated)]
                write_atomically(file, lambda path: path.write_text("".join(line + "\n" for line in kept), encoding="utf-8"))
            self._file = file.open("a", encoding="utf-8")
            self._events = _Events(workdir / "tensorboard", step) if config.tensorboard else None

    def write(self, step: int, values: dict[str, float | list[float]]) -> None:
        with self._as_input_error():
            if self._file is not None:
                self._file.write(json.dumps({"step": step, **values}) + "\n")
                self._file.flush()
            if self._events is not None:
                self._events.write(step, values)
        try:
            self._upload(_UPLOAD_SECONDS)
        except OSError as error:  # a later upload may succeed; the one before a checkpoint has to
            print(f"{error.filename}: not uploaded yet ({error.strerror})", flush=True)

    def upload(self) -> None:
        """Uploads the files. Call it before a checkpoint, so that a run resumed from it has the earlier lines."""
        with self._as_input_error():
            self._upload()

    def _upload(self, at_most_every: float = 0) -> None:
        if self._mirror is not None:
            if self._events is not None:
                self._events.flush()
            self._mirror.upload(at_most_every)

    def close(self) -> None:
        with self._as_input_error():
            for file in (self._file, self._events, self._mirror):
                if file is not None:
                    file.close()

    @contextlib.contextmanager
    def _as_input_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{error.filename or self.path}: cannot be read or written ({error.strerror})") from error


class _Events:
    """A TensorBoard file. tensorboardX's own SummaryWriter writes in a thread, which ends silently when the disk is full: training would
    then wait for it for ever."""

    def __init__(self, folder: Path, step: int):
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        messages: Any = event_pb2  # protobuf makes its classes when it is imported
        self._event, self._scalar = messages.Event, summary.scalar
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = event_file_writer.EventsWriter(str(folder / "events"))
        start = messages.SessionLog(status=messages.SessionLog.START)
        self._write(step + 1, session_log=start)  # hides an interrupted run's events of later steps
        self._flushed = time.monotonic()

    def write(self, step: int, values: dict[str, float | list[float]]) -> None:
        for name, value in values.items():
            scalars = {f"{name}/{k}": one for k, one in enumerate(value)} if isinstance(value, list) else {name: value}
            for tag, scalar in scalars.items():
                self._write(step, summary=self._scalar(tag.replace("@", "_"), scalar))  # TensorBoard allows no "@"
        if time.monotonic() > self._flushed + 10:
            self.flush()

    def flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()

    def _write(self, step: int, **what: object) -> None:
        self._writer.write_event(self._event(step=step, wall_time=time.time(), **what))


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def progress_bar(config: LogConfig, steps: int, start: int) -> tqdm:
    """A bar with the steps done, steps per second and time left. If the output is not a terminal, a line every ten seconds."""
    interval = 0.2 if sys.stderr.isatty() else 10
    return tqdm(
        total=steps,
        initial=start,
        desc="training",
        unit="step",
        disable=not (config.progress and is_first()),
        mininterval=interval,
        maxinterval=interval,
    )

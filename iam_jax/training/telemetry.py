"""Telemetry of training: how long steps take, how long they wait for data, utilisation, memory, profiles."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from iam_jax.devices.chips import Chip, Flops, seconds_at_peak
from iam_jax.devices.distributed import gather
from iam_jax.errors import InputError

# Fields of metrics.jsonl that depend on the machine and on time. Two runs of the same command differ in these fields only.
SPEEDS = ("step_seconds", "tokens_per_second", "targets_per_second", "mfu")
OF_A_PROCESS = (
    "data_wait",
    "host_bytes",
    "device_bytes",
    "device_peak_bytes",
)  # several processes: the largest value and a list


def is_timing(name: str) -> bool:
    """Whether a field of metrics.jsonl may differ between two runs of one command."""
    return name.removesuffix("_by_process") in SPEEDS + OF_A_PROCESS


class Meter:
    """Measures the steps since the last line of metrics.jsonl, without validations and saves.

    flops: the model's operations in a step, on all devices together. chip: None if it is not known.
    """

    def __init__(self, flops: Flops | None = None, chip: Chip | None = None):
        self._peak_seconds = seconds_at_peak(flops, chip) / jax.device_count() if flops and chip else None
        self._clear()
        self.resume()

    def _clear(self) -> None:
        self._steps, self._tokens, self._targets, self._seconds, self._waited = 0, 0, 0, 0.0, 0.0

    def resume(self) -> None:
        """Excludes the time since the last step."""
        self._clock = time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which the loop waits for the next batch."""
        before = time.monotonic()
        yield
        self._waited += time.monotonic() - before

    def step(self, tokens: float, targets: float) -> None:
        """Records a finished step. tokens, targets: of all processes together."""
        now = time.monotonic()
        self._seconds, self._clock = self._seconds + now - self._clock, now
        self._steps, self._tokens, self._targets = self._steps + 1, self._tokens + tokens, self._targets + targets

    def take(self) -> dict[str, float | list[float]]:
        """The measurements since the last call, of at least one step. With several processes all must call it at the same point."""
        seconds = max(self._seconds, 1e-9)
        figures: dict[str, float | list[float]] = {
            "step_seconds": seconds / self._steps,
            "tokens_per_second": self._tokens / seconds,
            "targets_per_second": self._targets / seconds,
        }
        if self._peak_seconds is not None:
            figures["mfu"] = self._peak_seconds * self._steps / seconds
        own = {"step_seconds": figures["step_seconds"], "data_wait": min(self._waited / seconds, 1.0)} | memory()
        self._clear()
        every = gather(own)
        for name in own:
            if name in OF_A_PROCESS:
                figures[name] = max(one[name] for one in every)
            if len(every) > 1:
                figures[f"{name}_by_process"] = [one[name] for one in every]
        return figures


def memory() -> dict[str, int]:
    """Bytes resident in this process, and on the fullest local device now and at its peak (if the platform reports them)."""
    found = {}
    with contextlib.suppress(OSError):  # only Linux has it
        found["host_bytes"] = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        found["device_bytes"] = max(one["bytes_in_use"] for one in stats)
        found["device_peak_bytes"] = max(one["peak_bytes_in_use"] for one in stats)
    return found


class Profile:
    """A jax.profiler trace of the training steps `steps` ("100:110": from step 100 to step 110; empty: none).

    Each process writes its trace to workdir/profile/process-<number>.
    """

    def __init__(self, workdir: Path, steps: str):
        first, _, stop = steps.partition(":")
        self._steps = range(int(first), int(stop)) if steps else range(0)
        self._target = workdir / "profile" / f"process-{jax.process_index()}"
        self._folder: tempfile.TemporaryDirectory | None = None

    def due(self, step: int) -> bool:
        """Whether the trace begins or ends after `step` steps."""
        return (step in self._steps) != (self._folder is not None)

    def turn(self) -> None:
        """Starts the trace, or ends and writes it."""
        if self._folder is not None:
            return self.close()
        self._folder = tempfile.TemporaryDirectory(prefix="iam_jax-profile-")
        jax.profiler.start_trace(self._folder.name)

    def close(self) -> None:
        """Ends and writes a running trace. There is no later one. Raises InputError if it cannot be written."""
        if self._folder is None:
            return
        folder, self._folder, self._steps = self._folder, None, range(0)
        with folder:
            jax.profiler.stop_trace()
            # The profiler knows local disks only; the working folder may be elsewhere.
            for path in (path for path in Path(folder.name).rglob("*") if path.is_file()):
                target = self._target / path.relative_to(folder.name)
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(path.read_bytes())
                except OSError as error:
                    raise InputError(f"{target}: cannot be written ({error.strerror})") from error

"""What a run tells while it goes: metrics.jsonl, TensorBoard events, a progress bar."""

import json
import sys
from pathlib import Path

from tqdm import tqdm

from iam_jax.config import LogConfig
from iam_jax.files import write_atomically
from iam_jax.storage import Mirror, is_remote

_UPLOAD_SECONDS = 30  # between two uploads to object storage that no checkpoint asks for


class MetricsLog:
    """Appends to `metrics.jsonl` and to TensorBoard events. Opened at a step, it first drops lines of later steps, and a half-written
    last one: after an interruption the file reads like that of one uninterrupted run.

    Object storage appends nothing: the files grow in a local folder there, and are put whole from time to time, before a checkpoint
    (`upload`), and at the end."""

    def __init__(self, workdir: Path, step: int, config: LogConfig):
        self._mirror = None
        if is_remote(workdir):
            self._mirror = Mirror(workdir)
            self._mirror.fetch("metrics.jsonl")
            workdir = self._mirror.local
        self.path = workdir / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
            write_atomically(self.path, lambda path: path.write_text("".join(line + "\n" for line in kept), encoding="utf-8"))
        self._file = self.path.open("a", encoding="utf-8")
        self._writer = None
        if config.tensorboard:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)  # what an interrupted run told of later steps

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name.replace("@", "_"), value, step)  # TensorBoard allows no "@"
        try:
            self.upload(_UPLOAD_SECONDS)
        except OSError as error:  # the next one may get through; what comes with a checkpoint must
            print(f"{error.filename}: not uploaded yet ({error.strerror})", flush=True)

    def upload(self, at_most_every: float = 0) -> None:
        """Before a checkpoint, so that a run resumed from it finds the lines before it. Raises OSError."""
        if self._mirror is not None:
            if self._writer is not None:
                self._writer.flush()
            self._mirror.upload(at_most_every)

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()
        if self._mirror is not None:
            self._mirror.close()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def progress_bar(config: LogConfig, steps: int, start: int) -> tqdm:
    """Steps done, steps a second, time left; a line every ten seconds where the output is no terminal."""
    interval = 0.2 if sys.stderr.isatty() else 10
    return tqdm(
        total=steps,
        initial=start,
        desc="training",
        unit="step",
        disable=not config.progress,
        mininterval=interval,
        maxinterval=interval,
    )

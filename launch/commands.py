"""Training commands, one after another, that are not run twice."""

import shlex
import signal
import subprocess
import sys
from pathlib import Path

from iam_jax.files import write_atomically

CONFIGS = Path(__file__).parents[1] / "configs"


def command(workdir: Path, config: str, flags: list[str]) -> list[str]:
    """The flags of a training command: a file of configs/, perhaps with a variant, and overrides."""
    return [f"--config={CONFIGS / config}", f"--workdir={workdir}", *flags]


def finished(workdir: Path, flags: list[str]) -> bool:
    """Whether this very command was run to its end there."""
    done = _mark(workdir)
    return done.exists() and done.read_text() == shlex.join(flags)


def told(flags: list[str]) -> str:
    return shlex.join([sys.executable, "-m", "iam_jax.main", *flags])


def run(workdir: Path, flags: list[str]) -> int:
    """Runs a command, or goes on with it, and returns its exit code; 0 marks it as finished."""
    process = subprocess.Popen([sys.executable, "-m", "iam_jax.main", *flags])
    signal.signal(signal.SIGINT, lambda *_: None)  # the terminal signals the child too, and the child saves before it ends
    signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    code = process.wait()
    if not code:
        mark(workdir, flags)
    return code


def mark(workdir: Path, flags: list[str]) -> None:
    write_atomically(_mark(workdir), lambda path: path.write_text(shlex.join(flags)))


def _mark(workdir: Path) -> Path:
    return workdir.with_name(f"{workdir.name}.command")

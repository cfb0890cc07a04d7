"""Training commands, one after another, that are not run twice."""

import shlex
import signal
import subprocess
import sys
from pathlib import Path

from iam_jax.errors import InputError, quote_first
from iam_jax.storage.files import write_atomically

NON_FINITE, DIVERGED = 4, "diverged"  # exit code of a run that diverged, and what then marks it
CONFIGS = Path(__file__).parents[1] / "configs"


def command(workdir: Path, config: str, flags: list[str]) -> list[str]:
    """The flags of a training command: a file of configs/, perhaps with a variant, and overrides."""
    return [f"--config={CONFIGS / config}", f"--workdir={workdir}", *flags]


def split_rest(argv: list[str]) -> tuple[list[str], list[str]]:
    """What stands before and behind `--`."""
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


def finished(workdir: Path, flags: list[str]) -> bool:
    """Whether this command was run to its end there. Raises InputError where another one was."""
    done = _mark(workdir)
    if not done.exists():
        return False
    there, wanted = (_that_count(text) for text in (shlex.split(done.read_text()), flags))
    diverged = DIVERGED in there
    if [flag for flag in there if flag != DIVERGED] != wanted:
        only = [flag for flag in there if flag not in (*wanted, DIVERGED)] + [flag for flag in wanted if flag not in there]
        raise InputError(f"{workdir} was run with other flags ({quote_first(only)} on one side only); choose another --folder")
    return diverged or (workdir / "evaluation.json").exists()


def diverged(workdir: Path) -> bool:
    """Whether the command that was finished there ended with a loss that is not finite."""
    return _mark(workdir).exists() and DIVERGED in shlex.split(_mark(workdir).read_text())


def _that_count(flags: list[str]) -> list[str]:
    """Without the flags that say where the data are and what is told: the results are the same."""
    return sorted(flag for flag in flags if not flag.startswith(("--config.data.path=", "--config.data.cache=", "--config.log.")))


def told(flags: list[str]) -> str:
    return shlex.join([sys.executable, "-m", "iam_jax.main", *flags])


def run(workdir: Path, flags: list[str]) -> int:
    """Runs a command, or goes on with it, and returns its exit code; 0 and divergence mark it as finished. Ctrl-C and SIGTERM go to the
    command, which saves; then the code is 75 even where it was just ending."""
    process, stopped = None, []

    def stop(number: int, _) -> None:
        stopped.append(number)
        if process is not None:
            process.send_signal(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        # In a session of its own, or a terminal's Ctrl-C would reach it twice.
        process = subprocess.Popen([sys.executable, "-m", "iam_jax.main", *flags], start_new_session=True)
        if stopped:
            process.send_signal(stopped[0])
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code in (0, NON_FINITE):
        mark(workdir, flags, diverged=code == NON_FINITE)
    return 75 if stopped and code == 0 else code


def mark(workdir: Path, flags: list[str], diverged: bool = False) -> None:
    write_atomically(_mark(workdir), lambda path: path.write_text(shlex.join([*flags, *[DIVERGED] * diverged])))


def _mark(workdir: Path) -> Path:
    return workdir.with_name(f"{workdir.name}.command")

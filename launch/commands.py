"""Training commands that run one after another and are not repeated once they have finished."""

import shlex
import signal
import subprocess
import sys
from pathlib import Path

from iam_jax.errors import InputError, quote_first
from iam_jax.storage.files import write_atomically

NON_FINITE, DIVERGED = 4, "diverged"  # exit code of a diverged run, and the mark that it gets
CONFIGS = Path(__file__).parents[1] / "configs"


def command(workdir: Path, config: str, flags: list[str]) -> list[str]:
    """Returns the flags of a training command. config: a file of configs/, optionally with ":variant"; flags: overrides."""
    return [f"--config={CONFIGS / config}", f"--workdir={workdir}", *flags]


def split_rest(argv: list[str]) -> tuple[list[str], list[str]]:
    """Returns the arguments before and after `--`."""
    index = argv.index("--") if "--" in argv else len(argv)
    return argv[:index], argv[index + 1 :]


def finished(workdir: Path, flags: list[str]) -> bool:
    """Whether this command finished in this working folder. Raises InputError if a command with other flags did."""
    mark = _mark(workdir)
    if not mark.exists():
        return False
    earlier, wanted = (_relevant(text) for text in (shlex.split(mark.read_text()), flags))
    diverged = DIVERGED in earlier
    if [flag for flag in earlier if flag != DIVERGED] != wanted:
        different = [flag for flag in earlier if flag not in (*wanted, DIVERGED)] + [flag for flag in wanted if flag not in earlier]
        flags_text = f"only one of the two commands has {quote_first(different)}"
        raise InputError(f"{workdir} was run with other flags ({flags_text}); choose another --folder")
    return diverged or (workdir / "evaluation.json").exists()


def diverged(workdir: Path) -> bool:
    """Whether the command that finished in this working folder had a non-finite loss."""
    return _mark(workdir).exists() and DIVERGED in shlex.split(_mark(workdir).read_text())


def _relevant(flags: list[str]) -> list[str]:
    """Sorts the flags, without those for the location of the data and for logging, which do not change the results."""
    return sorted(flag for flag in flags if not flag.startswith(("--config.data.path=", "--config.data.cache=", "--config.log.")))


def shell_line(flags: list[str]) -> str:
    """Returns the command as a line for a shell."""
    return shlex.join([sys.executable, "-m", "iam_jax.main", *flags])


def run(workdir: Path, flags: list[str]) -> int:
    """Runs or continues a command and returns its exit code. Success and divergence mark it as finished.

    Ctrl-C and SIGTERM are forwarded to the command, which saves its state. The exit code is then 75, even if the command had just finished.
    """
    process, stopped = None, []

    def stop(number: int, _) -> None:
        stopped.append(number)
        if process is not None:
            process.send_signal(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        # A new session, because otherwise Ctrl-C in a terminal would reach the command twice.
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
    """Marks the command as finished in this working folder."""
    write_atomically(_mark(workdir), lambda path: path.write_text(shlex.join([*flags, *[DIVERGED] * diverged])))


def _mark(workdir: Path) -> Path:
    return workdir.with_name(f"{workdir.name}.command")

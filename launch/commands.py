"""Training commands that run one after another and are not repeated once they have finished."""

import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from iam_jax.errors import InputError, quote_first
from iam_jax.storage.files import write_atomically

NON_FINITE, DIVERGED = 4, "diverged"  # exit code of a diverged run, and the mark that it gets
ENDED, PRUNED = -1, "pruned"  # code of a run that `watch` ended, and the mark that it gets
STOPPED = (0, 75, -signal.SIGTERM)  # exit codes of a run after SIGTERM
POLL_SECONDS = 0.5  # between two calls of `watch`
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
    ends = {DIVERGED, PRUNED}
    if [flag for flag in earlier if flag not in ends] != wanted:
        different = [flag for flag in earlier if flag not in (*wanted, *ends)] + [flag for flag in wanted if flag not in earlier]
        flags_text = f"only one of the two commands has {quote_first(different)}"
        raise InputError(f"{workdir} was run with other flags ({flags_text}); choose another --folder")
    return bool(ends & set(earlier)) or (workdir / "evaluation.json").exists()


def diverged(workdir: Path) -> bool:
    """Whether the command that finished in this working folder had a non-finite loss."""
    return _has(workdir, DIVERGED)


def code_of(workdir: Path) -> int:
    """Returns the code with which the command in this working folder finished: 0, NON_FINITE or ENDED."""
    return NON_FINITE if diverged(workdir) else ENDED if _has(workdir, PRUNED) else 0


def _has(workdir: Path, end: str) -> bool:
    return _mark(workdir).exists() and end in shlex.split(_mark(workdir).read_text())


def _relevant(flags: list[str]) -> list[str]:
    """Sorts the flags, without those that do not change a model's results: for the location of the data, logging and fusion."""
    free = ("--config.data.path=", "--config.data.cache=", "--config.log.", "--config.eval.fusion=")
    return sorted(flag for flag in flags if not flag.startswith(free))


def shell_line(flags: list[str]) -> str:
    """Returns the command as a line for a shell."""
    return shlex.join([sys.executable, "-m", "iam_jax.main", *flags])


def run(workdir: Path, flags: list[str], watch: Callable[[], bool] | None = None) -> int:
    """Runs or continues a command and returns its exit code. Success and divergence mark it as finished.

    Ctrl-C and SIGTERM are forwarded to the command, which saves its state. The exit code is then 75, even if the command had just finished.
    `watch` is called twice a second. Once it returns True, the command gets SIGTERM; the code is then ENDED, and the command is not marked.
    """
    process, stopped, ended = None, [], False

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
        while watch is not None and not (stopped or ended) and process.poll() is None:
            try:
                process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if ended := watch():
                    process.send_signal(signal.SIGTERM)
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if ended and not stopped and code in STOPPED:
        return ENDED
    if code in (0, NON_FINITE):
        mark(workdir, flags, DIVERGED if code == NON_FINITE else "")
    return 75 if stopped and code == 0 else code


def mark(workdir: Path, flags: list[str], end: str = "") -> None:
    """Marks the command as finished in this working folder. end: DIVERGED, PRUNED or empty."""
    write_atomically(_mark(workdir), lambda path: path.write_text(shlex.join([*flags, *filter(None, [end])])))


def _mark(workdir: Path) -> Path:
    return workdir.with_name(f"{workdir.name}.command")

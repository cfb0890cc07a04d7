"""What goes wrong on the user's side, told in one line."""

from collections.abc import Iterable


class InputError(ValueError):
    """Bad input, flag or config: the program prints the message as one line and exits with code 2."""


class NonFiniteError(RuntimeError):
    """Training met a loss or a gradient that is not finite: exit code 4, the last good checkpoint untouched."""


class JobError(RuntimeError):
    """The job of several processes failed, and not for this process's input: exit code 5, the same command goes on."""


def some(values: Iterable, limit: int = 3) -> str:
    """The first few of `values`, as they are quoted in an error."""
    values = list(values)
    more = f" and {len(values) - limit:,} more" if len(values) > limit else ""
    return ", ".join(repr(value) for value in values[:limit]) + more

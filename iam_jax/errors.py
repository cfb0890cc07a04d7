"""What goes wrong on the user's side, told in one line."""

from collections.abc import Iterable


class InputError(ValueError):
    """Bad input, flag or config: the program prints the message as one line and exits with code 2."""


class DamagedError(InputError):
    """A checkpoint that cannot be read any more: the message says which and why. Where another can stand in for it, it does."""


class NonFiniteError(RuntimeError):
    """Training met more losses or gradients that are not finite than train.skip_limit: exit code 4, the last good checkpoint untouched."""


class JobError(RuntimeError):
    """The job of several processes failed, and not for this process's input: exit code 5, the same command goes on."""


def some(values: Iterable, limit: int = 3) -> str:
    """The first few of `values`, as they are quoted in an error."""
    values = list(values)
    more = f" and {len(values) - limit:,} more" if len(values) > limit else ""
    return ", ".join(repr(value) for value in values[:limit]) + more

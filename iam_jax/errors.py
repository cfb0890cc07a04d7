"""What goes wrong on the user's side, told in one line."""

import os
import re
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input, flag or config: the program prints the message as one line and exits with code 2."""


class DamagedError(InputError):
    """A checkpoint that cannot be read any more: the message says which and why. Where another can stand in for it, it does."""


class NonFiniteError(RuntimeError):
    """Training met more losses or gradients that are not finite than train.skip_limit: exit code 4, the last good checkpoint untouched."""


class JobError(RuntimeError):
    """The job of several processes failed, and not for this process's input: exit code 5, the same command goes on."""


def quote_first(values: Iterable, limit: int = 3) -> str:
    """The first few of `values`, as they are quoted in an error."""
    values = list(values)
    more = f" and {len(values) - limit:,} more" if len(values) > limit else ""
    return ", ".join(repr(value) for value in values[:limit]) + more


def of_the_system(error: BaseException | None) -> str | None:
    """What the operating system said ("No space left on device"), if it is behind an error; libraries quote it in their own."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        if code := re.search(r"os_error_code='(\d+)'|\(os error (\d+)\)", str(error)):  # tensorstore; polars
            return os.strerror(int(code[1] or code[2]))
        error = error.__cause__ or error.__context__
    return None

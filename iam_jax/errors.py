"""Exceptions of the program, and helpers for their one-line messages."""

import os
import re
from collections.abc import Iterable


class InputError(ValueError):
    """Invalid input, flag or config. The program prints the message as one line and exits with code 2."""


class DamagedError(InputError):
    """A checkpoint cannot be read any more. The message names it and the reason. Callers use another checkpoint if there is one."""


class NonFiniteError(RuntimeError):
    """More training steps than train.skip_limit had a non-finite loss or gradient: exit code 4. The last good checkpoint is kept."""


class JobError(RuntimeError):
    """The job of several processes failed, but not because of this process's input: exit code 5. The same command continues the run."""


def quote_first(values: Iterable, limit: int = 3) -> str:
    """Quotes the first `limit` values for an error message and gives the number of the others."""
    values = list(values)
    others = f" and {len(values) - limit:,} more" if len(values) > limit else ""
    return ", ".join(repr(value) for value in values[:limit]) + others


def os_error_reason(error: BaseException | None) -> str | None:
    """Returns the message of the operating system ("No space left on device") behind an error, or None if there is none.

    Libraries wrap such errors in types of their own, so this also searches causes and the messages of tensorstore and polars.
    """
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        if code := re.search(r"os_error_code='(\d+)'|\(os error (\d+)\)", str(error)):  # tensorstore; polars
            return os.strerror(int(code[1] or code[2]))
        error = error.__cause__ or error.__context__
    return None

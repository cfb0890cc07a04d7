"""Files that are complete or absent."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from iam_jax.errors import InputError, of_the_system


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a temporary neighbour of `path`, which then takes its place. Raises InputError where the system does not allow it."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
        try:
            write(Path(name))
            os.chmod(name, 0o644)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except Exception as error:
        if (reason := of_the_system(error)) is None:
            raise
        raise InputError(f"{path}: cannot be written ({reason})") from error

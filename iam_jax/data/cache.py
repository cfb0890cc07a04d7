"""Folders of prepared data. A folder is complete or absent, never half-written."""

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from iam_jax.errors import InputError


def cache_root(configured: str) -> Path:
    """`configured` (config.data.cache), or the user's cache folder."""
    if configured:
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iam_jax"


def cached_folder(folder: Path, make: Callable[[], Callable[[Path], None]]) -> Path:
    """Returns `folder`, and makes it first if it does not exist.

    `make` computes and returns a writer. So bad input is found before anything is written. The writer fills a temporary folder beside it,
    which is then renamed. If two processes make the same folder, the result of the first one stays. Raises InputError if it cannot be
    written.
    """
    if folder.is_dir():
        return folder
    write = make()
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")  # not tempfile.mkdtemp, whose folders other users cannot read
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        reason = f"cannot write prepared data there ({error.strerror})"
        raise InputError(f"{folder.parent}: {reason}; see config.data.cache") from error
    try:
        write(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder

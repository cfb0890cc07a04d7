"""Atomic file writes, and checks of the folders for them, on local disks and on object storage (remote.py)."""

import io
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from iam_jax.errors import InputError, os_error_reason
from iam_jax.storage import remote


def to_path(name: str | os.PathLike) -> Path:
    """Returns a pathlib.Path, or an epath.Path for gs:// and s3://.

    Raises InputError for other storage, and if object storage cannot be reached or its client is not installed (`remote.remote_folder`).
    """
    return remote.remote_folder(os.fspath(name)) if re.match(r"[a-z][a-z0-9+.-]*://", os.fspath(name)) else Path(name)


def make_folder(folder: Path) -> None:
    """Makes the folder and its parents if they do not exist. Object storage has no folders, so nothing happens there."""
    if not remote.is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def check_writable(folder: Path, flag: str) -> None:
    """Raises InputError if files cannot be written to the folder, or if it does not exist and cannot be made.

    flag: the flag that gave the folder, for the message.
    """
    if remote.is_remote(folder):
        return remote.check_writable(folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"--{flag}={folder}: {existing} cannot be written to")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file so that it is complete or absent, whatever happens.

    `write` gets the path of a temporary file beside `path` (for object storage, of a local file), which then replaces `path`. Raises
    InputError if the operating system refuses, for instance because the disk is full; other errors of `write` pass through.
    """
    try:
        if remote.is_remote(path):
            with tempfile.TemporaryDirectory(prefix="iam_jax-") as local:
                write(Path(local) / path.name)
                remote.put(path, (Path(local) / path.name).read_bytes())
            return
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
        try:
            write(Path(name))
            os.chmod(name, 0o644)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except Exception as error:
        if (reason := os_error_reason(error)) is None:
            raise
        raise InputError(f"{path}: cannot be written ({reason})") from error


def parquet_source(path: Path) -> Path | io.BytesIO:
    """Returns what `polars.read_parquet` should read. Remote files are read here, since polars has its own client with other settings."""
    return io.BytesIO(path.read_bytes()) if remote.is_remote(path) else path

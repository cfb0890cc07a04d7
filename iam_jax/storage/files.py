"""Files that are complete or absent, and the folders that hold them: local ones, or on object storage (`storage.py`)."""

import io
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from iam_jax.errors import InputError, of_the_system
from iam_jax.storage import remote as storage


def to_path(name: str | os.PathLike) -> Path:
    """A pathlib.Path, or for gs:// and s3:// an epath.Path. Raises InputError for storage that is not known or lacks its client."""
    return storage.remote_folder(os.fspath(name)) if re.match(r"[a-z][a-z0-9+.-]*://", os.fspath(name)) else Path(name)


def make_folder(folder: Path) -> None:
    """With its parents, unless it is there; on object storage there are only names."""
    if not storage.is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def check_writable(folder: Path, flag: str) -> None:
    """Raises InputError where nothing can be written to the folder, or where a folder that is not there cannot be made."""
    if storage.is_remote(folder):
        return storage.check_writable(folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"--{flag}={folder}: {existing} cannot be written to")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a temporary neighbour of `path`, or for object storage a local file, which then takes its place. Raises InputError
    where the system does not allow it."""
    try:
        if storage.is_remote(path):
            with tempfile.TemporaryDirectory(prefix="iam_jax-") as local:
                write(Path(local) / path.name)
                storage.put(path, (Path(local) / path.name).read_bytes())
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
        if (reason := of_the_system(error)) is None:
            raise
        raise InputError(f"{path}: cannot be written ({reason})") from error


def parquet(path: Path) -> Path | io.BytesIO:
    """What polars reads: it has a client of its own, with other settings."""
    return io.BytesIO(path.read_bytes()) if storage.is_remote(path) else path

"""Public data sets in their original files: where the files are and how they are read. `tfds_tables.py` keeps what was read."""

import contextlib
import gzip
import hashlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

from iam_jax.errors import InputError

Event = tuple[str, str, int, float]  # user, item, unix seconds, rating
Files = Mapping[str, Path]  # the originals of "interactions" and "items"


class Checksum(NamedTuple):
    """The published size and hash of a file."""

    size: int  # bytes
    sha256: str
    name: str


class Originals:
    """The two original files of a data set. A subclass says where they are (`urls`) and how they are read (`events`, `items`)."""

    name: ClassVar[str]  # of the folder of prepared data
    variant = ""  # name of its subfolder, if there are several
    text: ClassVar[tuple[str, ...]]  # the items' text columns
    checksums: ClassVar[dict[str, Checksum]] = {}  # published checksums, by address

    def __init__(self, files: Files | None = None):
        """files: None, if they are to be downloaded."""
        self.files = files
        self.counts: dict[str, int] = {}  # filled while the files are read; kept with the prepared data

    def urls(self) -> dict[str, str]:
        """The addresses of "interactions" and "items"."""
        raise NotImplementedError

    def events(self, files: Files) -> Iterator[Event]:
        """All events, in the file's order."""
        raise NotImplementedError

    def items(self, files: Files) -> Iterator[tuple[str, ...]]:
        """All items as (item, *text). It is called after the last event was read."""
        raise NotImplementedError

    def called(self, split: str) -> str:
        """The name of an original in errors: the user's file, or the address that it was downloaded from."""
        return str(self.files[split]) if self.files else self.urls()[split]


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def reading(path: Path, name: str) -> Iterator[None]:
    """Turns the errors of a damaged archive into an InputError that names the archive and the file to remove."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{name}: damaged or incomplete ({error}); remove {path} and fetch it again") from error


def malformed(name: str, number: int, expected: str, line: str | bytes) -> InputError:
    """The error for a line that cannot be parsed."""
    return InputError(f"{name}: line {number}: expected {expected}, found {line[:100]!r}")

"""Public data from its original files: `TableBuilder`, which MovieLens and Amazon share, and the errors of reading them."""

import contextlib
import gzip
import hashlib
import itertools
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import polars as pl
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants
from tensorflow_datasets.core.download import downloader

from iam_jax.data.tables import Tables
from iam_jax.errors import InputError

BLOCK = 65_536  # rows of a record

NUMBERS = {"timestamp": np.int64, "rating": np.float32}

Event = tuple[str, str, int, float]  # user, item, unix seconds, rating
Files = Mapping[str, Path]  # the originals of "interactions" and "items"


class TableBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Two tables as TFDS splits: `interactions` (user, item, timestamp, rating) and `items` (item, then `TEXT`).

    A record is a block of up to `BLOCK` rows: strings one to a line, numbers as arrays. (Measured, a million events: blocks are
    written in 0.5 s and read in 0.1 s, one record per user takes 3.5 s and 0.6 s; 20,000 items: 0.3 s instead of 2.6 s.) TFDS
    has one set of features for all splits, so the columns that a split does not have are empty in its records.

    A subclass says where the two originals are (`urls`) and how they are read (`events`, `items`). What it counts on the way
    goes to `self.counts`, and with the originals' SHA-256 and the content's fingerprint to the metadata that TFDS keeps.
    """

    VERSION = tfds.core.Version("1.0.0")
    TEXT: ClassVar[tuple[str, ...]]
    files: Files | None = None  # None: they are downloaded

    def urls(self) -> dict[str, str]:
        """The originals' addresses, of "interactions" and "items"."""
        raise NotImplementedError

    def events(self, files: Files) -> Iterator[Event]:
        """All events, in the file's order."""
        raise NotImplementedError

    def items(self, files: Files) -> Iterator[tuple[str, ...]]:
        """All items as (item, *TEXT); asked for after the last event."""
        raise NotImplementedError

    def called(self, split: str) -> str:
        """What errors call an original: the user's file, or the address that it came from."""
        return str(self.files[split]) if self.files else self.urls()[split]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: tfds.features.Text() for name in ("user", "item", *self.TEXT)}
        features |= {name: tfds.features.Tensor(shape=(None,), dtype=dtype) for name, dtype in NUMBERS.items()}
        features, metadata = tfds.features.FeaturesDict(features), tfds.core.MetadataDict()
        return tfds.core.DatasetInfo(builder=self, features=features, metadata=metadata, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        files = self.files or {split: _download(dl_manager, url) for split, url in self.urls().items()}
        self.counts: dict[str, int] = {}
        self._content = hashlib.sha256()
        self.info.metadata["originals"] = {split: sha256(path) for split, path in files.items()}
        return {split: self._generate_examples(files, split) for split in ("interactions", "items")}

    def _generate_examples(self, files: Files, split: str) -> Iterator[tuple[int, dict]]:
        columns = ("user", "item", *NUMBERS) if split == "interactions" else ("item", *self.TEXT)
        rows = self.events(files) if split == "interactions" else self.items(files)
        count = 0
        while block := list(itertools.islice(rows, BLOCK)):
            record = {name: "" for name in ("user", "item", *self.TEXT)}
            record |= {name: np.zeros(0, dtype) for name, dtype in NUMBERS.items()}
            for name, values in zip(columns, zip(*block, strict=True), strict=True):
                record[name] = np.array(values, NUMBERS[name]) if name in NUMBERS else "\n".join(values)
                stored = record[name].tobytes() if name in NUMBERS else record[name].encode()
                self._content.update(f"{split} {name} {len(block)} {len(stored)}\n".encode() + stored)
            yield count, record
            count += len(block)
        if not count:
            raise InputError(f"{self.called(split)}: no {split} in this file")
        self.counts[split] = count
        self.info.metadata.update(counts=self.counts, fingerprint=self._content.hexdigest())

    def tables(self) -> Tables:
        """The tables, once they are prepared."""

        def read(split: str, *columns: str) -> pl.DataFrame:
            schema = {name: pl.Int64 if name in NUMBERS else pl.String for name in columns}
            blocks = []
            for record in self.as_data_source(split=split):
                data = {name: record[name] if name in NUMBERS else record[name].decode().split("\n") for name in columns}
                blocks.append(pl.DataFrame(data, schema=schema))
            return pl.concat(blocks)

        return Tables(
            interactions=read("interactions", "user", "item", "timestamp"),
            items=read("items", "item", *self.TEXT),
            interactions_name=self.called("interactions"),
            items_name=self.called("items"),
            fingerprint=self.info.metadata["fingerprint"],
        )


def prepared(cls: type[TableBuilder], data_dir: str, files: Files | None, config: str | None = None) -> TableBuilder:
    """A builder whose tables can be read; they are prepared first where they are not.

    What comes from the user's own files is kept apart from what was downloaded, in a folder named after the files' content.
    An interrupted preparation leaves nothing that could be taken for data: TFDS writes elsewhere and renames at the end.
    """
    root = Path(data_dir or constants.DATA_DIR).expanduser()
    if files:
        key = "".join(f"{split} {sha256(path)}\n" for split, path in files.items())
        root = root / "originals" / hashlib.sha256(key.encode()).hexdigest()[:16]

    def make() -> TableBuilder:
        builder = cls(data_dir=root, config=config, file_format="array_record")
        builder.files = files
        return builder

    builder = make()
    if not builder.is_prepared():
        try:
            builder.download_and_prepare()
        except OSError:
            if not builder.is_prepared():  # else another process was the first to finish the same
                raise
    return make()


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def reading(path: Path, name: str) -> Iterator[None]:
    """Turns the errors of a damaged archive into one that names it, and the file to remove where it was downloaded."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{name}: damaged or incomplete ({error}); remove {path} and fetch it again") from error


def malformed(name: str, number: int, expected: str, line: str | bytes) -> InputError:
    """The error for a line that is not what it should be."""
    return InputError(f"{name}: line {number}: expected {expected}, found {line[:100]!r}")


def _download(dl_manager: tfds.download.DownloadManager, url: str) -> Path:
    retries, downloader.MAX_RETRIES = downloader.MAX_RETRIES, 3  # TFDS's ten leave a user without network waiting for 200 s
    try:
        return dl_manager.download(url)
    except Exception as error:  # the errors of requests, of TFDS and of its checksums have no base class in common
        reason = " ".join(str(error).split())
        by_hand = "download it by hand into a folder and name that folder with --config.data.path"
        raise InputError(f"{url}: the download failed ({type(error).__name__}: {reason}); {by_hand}") from error
    finally:
        downloader.MAX_RETRIES = retries

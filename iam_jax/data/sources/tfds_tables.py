"""Public data sets downloaded, prepared and kept by TensorFlow Datasets (TFDS), without TensorFlow."""

import hashlib
import itertools
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants, utils
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.download.checksums import UrlInfo

from iam_jax.data.sources.originals import Files, Originals, sha256
from iam_jax.data.tables import Tables
from iam_jax.errors import InputError

BLOCK = 65_536  # rows of a record

NUMBERS = {"timestamp": np.int64, "rating": np.float32}


class TableBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Two tables as TFDS splits: `interactions` (user, item, timestamp, rating) and `items` (item, then the text columns).

    A record is a block of up to `BLOCK` rows: strings one to a line, numbers as arrays. (Measured for a million events: blocks are
    written in 0.5 s and read in 0.1 s, one record per user in 3.5 s and 0.6 s; for 20,000 items: 0.3 s instead of 2.6 s.) TFDS
    has one set of features for all splits, so the columns that a split does not have are empty in its records.

    The metadata that TFDS keeps holds the counts of `Originals`, the originals' SHA-256 and the content's fingerprint.
    """

    VERSION = tfds.core.Version("1.0.0")
    originals: Originals  # set by `prepared`

    @property
    def facts(self) -> dict:
        """The metadata: see above."""
        assert self.info.metadata is not None
        return self.info.metadata

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: tfds.features.Text() for name in ("user", "item", *self.originals.text)}
        features |= {name: tfds.features.Tensor(shape=(None,), dtype=dtype) for name, dtype in NUMBERS.items()}
        features, metadata = tfds.features.FeaturesDict(features), tfds.core.MetadataDict()
        return tfds.core.DatasetInfo(builder=self, features=features, metadata=metadata, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        originals = self.originals
        files = originals.files or {split: _download(dl_manager, url) for split, url in originals.urls().items()}
        self._content = hashlib.sha256()
        self.facts["originals"] = {split: sha256(path) for split, path in files.items()}
        return {split: self._generate_examples(files, split) for split in ("interactions", "items")}

    def _generate_examples(self, files: Files, split: str) -> Iterator[tuple[int, dict]]:
        originals = self.originals
        columns = ("user", "item", *NUMBERS) if split == "interactions" else ("item", *originals.text)
        rows = originals.events(files) if split == "interactions" else originals.items(files)
        count = 0
        while block := list(itertools.islice(rows, BLOCK)):
            record: dict[str, Any] = {name: "" for name in ("user", "item", *originals.text)}
            record |= {name: np.zeros(0, dtype) for name, dtype in NUMBERS.items()}
            for name, values in zip(columns, zip(*block, strict=True), strict=True):
                record[name] = np.array(values, NUMBERS[name]) if name in NUMBERS else "\n".join(values)
                stored = record[name].tobytes() if name in NUMBERS else record[name].encode()
                self._content.update(f"{split} {name} {len(block)} {len(stored)}\n".encode() + stored)
            yield count, record
            count += len(block)
        if not count:
            raise InputError(f"{originals.called(split)}: no {split} in this file")
        originals.counts[split] = count
        self.facts.update(counts=originals.counts, fingerprint=self._content.hexdigest())

    def tables(self) -> Tables:
        """The prepared tables."""

        def read(split: str, *columns: str) -> pl.DataFrame:
            schema = {name: pl.Int64 if name in NUMBERS else pl.String for name in columns}
            blocks = []
            builder: Any = self  # a decorator hides the method's arguments
            for record in builder.as_data_source(split=split):
                data = {name: record[name] if name in NUMBERS else record[name].decode().split("\n") for name in columns}
                blocks.append(pl.DataFrame(data, schema=schema))
            return pl.concat(blocks)

        return Tables(
            interactions=read("interactions", "user", "item", "timestamp"),
            items=read("items", "item", *self.originals.text),
            interactions_name=self.originals.called("interactions"),
            items_name=self.originals.called("items"),
            fingerprint=self.facts["fingerprint"],
        )


def prepared(originals: Originals, data_dir: str | Path = "") -> TableBuilder:
    """A builder whose tables can be read. They are prepared first if necessary.

    Tables from the user's own files are kept apart from downloaded ones, in a folder named after the hash of the files. An interrupted
    preparation leaves no incomplete data: TFDS writes to another folder and renames it at the end.
    """
    root = Path(data_dir or constants.DATA_DIR).expanduser()
    if originals.files:
        key = "".join(f"{split} {sha256(path)}\n" for split, path in originals.files.items())
        root = root / "originals" / hashlib.sha256(key.encode()).hexdigest()[:16]
    variant = originals.variant
    fields = {
        "name": originals.name,
        "originals": originals,
        "BUILDER_CONFIGS": [tfds.core.BuilderConfig(name=variant)] if variant else [],
        "url_infos": {url: UrlInfo(utils.Size(size), *rest) for url, (size, *rest) in originals.checksums.items()} or None,
    }
    cls: Any = types.new_class(type(originals).__name__, (TableBuilder,), {"skip_registration": True}, lambda body: body.update(fields))

    def make() -> TableBuilder:
        return cls(data_dir=root, config=variant or None, file_format="array_record")

    builder = make()
    if not builder.is_prepared():
        try:
            builder.download_and_prepare()
        except OSError:
            if not builder.is_prepared():  # else another process prepared the same data first
                raise
    return make()


def _download(dl_manager: tfds.download.DownloadManager, url: str) -> Path:
    retries, downloader.MAX_RETRIES = downloader.MAX_RETRIES, 3  # with TFDS's ten retries a user without a network waits for 200 s
    try:
        return Path(dl_manager.download(url))
    except Exception as error:  # errors of requests, of TFDS and of its checksums have no common base class
        reason = " ".join(str(error).split())
        by_hand = "download it by hand into a folder and name that folder with --config.data.path"
        raise InputError(f"{url}: the download failed ({type(error).__name__}: {reason}); {by_hand}") from error
    finally:
        downloader.MAX_RETRIES = retries

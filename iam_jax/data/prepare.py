"""Prepares the data of a source for training and evaluation: events, catalogue, split hash.

Prepared data is cached under the content of the source and every setting that it depends on.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import polars as pl

from iam_jax.config import DataConfig, vector_sources
from iam_jax.data import tables as tables_lib
from iam_jax.data.cache import cache_root, cached_folder
from iam_jax.data.catalogue import Catalogue, catalogue_texts, has_text, make_catalogue
from iam_jax.data.sources import SOURCES, Source
from iam_jax.data.splits import Events, Split, as_strings, facts_of, make_split, note_of, shuffle_training
from iam_jax.data.tokenizer import Vocabulary, load_given
from iam_jax.data.vectors import Vectors, item_vectors, vector_files
from iam_jax.errors import InputError

_VERSION = 2  # of the cached files
_ARRAYS = ("item", "offsets", "timestamp", "label")  # of Events
_SPLIT_FIELDS = (  # of DataConfig: a split depends on them
    "untitled", "k_core", "last_n", "split", "t1", "t2", "text", "unseen_items",
)  # fmt: skip
_NEWER_FIELDS = {"ties": "hash", "duplicates": "keep"}  # and their defaults, with which prepared data keep their names


@dataclasses.dataclass(frozen=True)
class Prepared:
    split: Split
    catalogue: Catalogue
    content: Vectors | None = None  # with data.vectors

    @property
    def vectors(self) -> np.ndarray | None:
        """[I, P] float32: the items' content vectors, in the order of the catalogue. None without data.vectors."""
        return None if self.content is None else self.content.of_items

    @property
    def events(self) -> Events:
        return self.split.events


def prepare(config: DataConfig, given: Vocabulary | None = None) -> Prepared:
    """Reads, checks, filters, orders, splits and tokenises the data, and reads or computes the items' vectors.

    `given`: the pretrained model's vocabulary, with config.tokenizer = "pretrained". Raises InputError for bad data.
    """
    cache = cache_root(config.cache)
    load_given(config.tokenizer, given)  # a wrong path is found before the data is read and anything is written
    from_text, path = vector_sources(config.vectors)
    if path:
        vector_files(path)
    split = read_split(config)
    catalogue = make_catalogue(split.items, config, cache, given)
    longest = int(catalogue.item_lengths.max(initial=0))
    needed = catalogue.frame_tokens + (config.context_items + 1) * longest
    if needed > config.row_tokens:
        raise InputError(
            f"config.data.row_tokens = {config.row_tokens} is too small: prompt, suffix and {config.context_items} + 1 items "
            f"(config.data.context_items) of up to {longest} tokens need {needed}"
        )
    content = None
    if config.vectors:
        texts = catalogue_texts(split.items, config) if from_text else []
        content = item_vectors(config, split.items["item"], texts, split.events.train_counts > 0, cache)
        split = dataclasses.replace(split, notes=(*split.notes, *content.notes))
    return Prepared(split, catalogue, content)


def read_split(config: DataConfig) -> Split:
    """Reads, checks, filters, orders and splits the events. Raises InputError for bad data."""
    if config.path.startswith("~"):
        config = dataclasses.replace(config, path=str(Path(config.path).expanduser()))
    split = _cached_split(config, cache_root(config.cache))
    return shuffle_training(split) if config.shuffled_order else split


def _source(config: DataConfig) -> Source:
    """The source to read: data.source, or `table` if data.path holds tables that replace the source's own files."""
    source = SOURCES[config.source]
    if source.accepts_tables and config.path and tables_lib.table_files(config.path, "interactions"):
        return SOURCES["table"]
    return source


def _load(source: Source, config: DataConfig) -> tables_lib.Tables:
    tables = source.load(config, cache_root(config.cache))
    tables_lib.check_tables(tables, check_unknown_items=config.untitled != "drop")
    return tables


def _cached_split(config: DataConfig, cache: Path) -> Split:
    """The split, cached under its settings and the identity of its source (`Source.identity`)."""
    newer = {field: getattr(config, field) for field, default in _NEWER_FIELDS.items() if getattr(config, field) != default}
    settings = [_VERSION, {field: getattr(config, field) for field in _SPLIT_FIELDS} | newer, config.tokenizer == "id"]
    source, tables = _source(config), None
    identity = source.identity(config)
    if identity is None:
        tables = _load(source, config)
        identity = [source.name, tables.fingerprint]
    digest = hashlib.sha256(json.dumps([settings, identity]).encode()).hexdigest()

    def make():
        split = make_split(tables or _load(source, config), config, lambda items: has_text(items, config))

        def write(folder: Path) -> None:
            for name in _ARRAYS:
                np.save(folder / f"{name}.npy", getattr(split.events, name))
            users = pl.Series("user", split.events.user_ids.tolist(), dtype=pl.String)
            users.to_frame().write_parquet(folder / "users.parquet")
            split.items.write_parquet(folder / "items.parquet")
            saved = {"sha256": split.sha256, "notes": split.notes, "facts": split.facts}
            (folder / "split.json").write_text(json.dumps(saved), encoding="utf-8")

        return write

    folder = cached_folder(cache / f"split-{digest[:32]}", make)
    items = pl.read_parquet(folder / "items.parquet")
    users = pl.read_parquet(folder / "users.parquet")["user"]
    arrays = {name: np.load(folder / f"{name}.npy") for name in _ARRAYS}
    events = Events(user_ids=as_strings(users), item_ids=as_strings(items["item"]), **arrays)
    saved = json.loads((folder / "split.json").read_text(encoding="utf-8"))
    facts, notes = saved.get("facts"), tuple(saved["notes"])
    if facts is None:  # prepared by a version without them
        facts = facts_of(events)
        notes += (note_of(facts, config),)
    return Split(events, items, saved["sha256"], notes, facts)

"""The catalogue as a working folder stores it: every item's id and tokens, and whether it has a training event.

Scoring needs no other data. New items are added from their text.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import polars as pl

from iam_jax.config import DataConfig
from iam_jax.data import tokenizer as tokens_lib
from iam_jax.data.catalogue import Catalogue, frame_entries, item_entries, item_texts
from iam_jax.data.prepare import Prepared
from iam_jax.data.tables import read_table, refuse
from iam_jax.data.vectors import TRANSFORM_FILE, VECTORS_FILE, Vectors, read_vectors
from iam_jax.errors import InputError
from iam_jax.storage.files import parquet_source

ITEMS_FILE = "items.parquet"


@dataclasses.dataclass(frozen=True)
class Stored:
    """The catalogue of a working folder, and the items that were added to it."""

    item_ids: pl.Series  # [I] String: those of the training catalogue in its order, then the added ones, sorted
    catalogue: Catalogue
    trained: np.ndarray  # [I] bool: whether the item has a training event
    known: int  # number of items of the training catalogue
    content: Vectors | None = None  # with data.vectors

    @property
    def vectors(self) -> np.ndarray | None:
        """[I, P] float32: the items' content vectors, in the order of item_ids. None without data.vectors."""
        return None if self.content is None else self.content.of_items


def identity(item_ids: list[str], catalogue: Catalogue) -> dict[str, str]:
    """The hashes of a catalogue in data.json."""
    return {"catalogue_sha256": catalogue.sha256, "items_sha256": hashlib.sha256("\n".join(item_ids).encode()).hexdigest()}


def items_frame(prepared: Prepared) -> pl.DataFrame:
    """The table that ITEMS_FILE holds: `item`, `tokens` (boundary token included) and `trained`, in the catalogue's order."""
    catalogue, events = prepared.catalogue, prepared.events
    tokens = pl.Series("tokens", catalogue.tokens[: catalogue.offsets[catalogue.items]], dtype=pl.Int32)
    of_item = pl.Series("of", np.repeat(np.arange(catalogue.items), catalogue.item_lengths))
    lists = pl.DataFrame([of_item, tokens]).group_by("of", maintain_order=True).agg("tokens")
    ids = pl.Series("item", events.item_ids.tolist(), dtype=pl.String)
    return pl.DataFrame([ids, lists["tokens"], pl.Series("trained", events.train_counts > 0)])


def read_stored(workdir: Path, config: DataConfig) -> Stored:
    """Reads the catalogue of a working folder. Raises InputError if its files are missing, unreadable, or not from the same catalogue."""
    path = workdir / ITEMS_FILE
    try:
        saved = json.loads((workdir / "data.json").read_text(encoding="utf-8"))
        if not path.exists():
            raise InputError(f"{path} is missing: an older version trained this folder; run the same training command again to add it")
        frame = pl.read_parquet(parquet_source(path), glob=False, hive_partitioning=False)
        ids, trained, lengths = frame["item"], frame["trained"].to_numpy(), frame["tokens"].list.len().to_numpy()
        tokens = frame["tokens"].explode().to_numpy().astype(np.int32)
    except InputError:
        raise
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise InputError(f"{workdir}: data.json or {ITEMS_FILE} cannot be read: {str(error).splitlines()[0]}") from error
    around, tokenizer_json, vocabulary = [[], []], "", len(ids)
    if config.tokenizer != "id":
        tokenizer = tokens_lib.load_tokenizer(workdir / "tokenizer.json")
        entries = frame_entries(tokenizer, config)
        around = [entries["prompt"], entries["suffix"]]
        tokenizer_json, vocabulary = tokenizer.to_str(), int(tokens.max(initial=0)) + 1  # every item ends with the highest id
    every = np.concatenate([tokens, *(np.array(entry, np.int32) for entry in around)])
    offsets = np.cumsum([0, *lengths, *map(len, around)], dtype=np.int64)
    catalogue = Catalogue(every, offsets, vocabulary, 0, tokenizer_json)
    for name, value in identity(ids.to_list(), catalogue).items():
        if not isinstance(saved, dict) or saved.get(name) != value:
            raise InputError(f"{workdir}: {ITEMS_FILE} and tokenizer.json do not match data.json: their {name} is {value}")
    return Stored(ids, catalogue, trained, len(ids), _read_vectors(workdir, config, len(ids), saved.get("vectors_sha256")))


def _read_vectors(workdir: Path, config: DataConfig, items: int, sha256: str | None) -> Vectors | None:
    """The vectors of a working folder's catalogue, if it has any. Raises InputError if they are not those of data.json."""
    if not config.vectors:
        return None
    content = Vectors.load(workdir)
    if content.sha256 != sha256 or len(content.of_items) != items:
        raise InputError(f"{workdir}: {VECTORS_FILE} and {TRANSFORM_FILE} do not match data.json, whose vectors_sha256 is {sha256}")
    return content


def add_items(stored: Stored, config: DataConfig, path: str | Path) -> tuple[Stored, list[str]]:
    """The catalogue with the items of a table (`item`, then text columns) added, and notes to print.

    If the vectors of the catalogue's items are from a file, the table is a Parquet file with a column `vector`, too; vectors, or parts of
    them, that were computed from text are computed from the new items' texts.

    Raises InputError for items that are in the catalogue already, for repeated items, for items without text (data.untitled), for vectors
    that `read_vectors` refuses or that have another length, and if the model reads ids.
    """
    if not stored.catalogue.tokenizer_json:
        raise InputError(f"{path}: the model reads item ids (config.data.tokenizer = 'id'), and a new item has none")
    given = stored.content is not None and stored.content.given > 0
    if given and Path(path).suffix != ".parquet":
        raise InputError(f"{path}: new items of this model need a column 'vector' (config.data.vectors), which only .parquet files have")
    table, notes = read_table(path, ("item",), others=True, without=["vector"] if given else []), []
    ids = table["item"]
    if ids.n_unique() < len(ids):
        refuse(str(path), ids, ids.is_duplicated(), "item ids that occur more than once", together=True)
    there = ids.is_in(stored.item_ids.to_list())
    if there.any():
        refuse(str(path), ids, there, "items that are in the working folder's catalogue already (--items adds to it)")
    try:
        texts = item_texts(table, config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if config.untitled == "id":
        texts = [text or item for text, item in zip(texts, ids.to_list(), strict=True)]
    empty = np.array([not text for text in texts])
    if empty.any() and config.untitled == "error":
        refuse(str(path), ids, pl.Series(empty), f"items without text by the template {config.text!r}")
    if empty.any():
        notes.append(f"left out {empty.sum():,} added items without text")
    chosen = np.flatnonzero(~empty)
    chosen = chosen[ids.gather(chosen).arg_sort().to_numpy()]
    entries, truncated = text_entries(stored.catalogue, config, [texts[row] for row in chosen])
    nothing = np.isin(np.arange(len(ids)), [row for row, entry in zip(chosen, entries, strict=True) if not entry])
    if nothing.any():
        refuse(str(path), ids, pl.Series(nothing), "items whose text the tokenizer turns into no token")
    if truncated:
        notes.append(f"{truncated:,} added items have more than {config.item_tokens} text tokens and are truncated")
    item_ids = pl.concat([stored.item_ids, ids.gather(chosen)])
    trained = np.append(stored.trained, np.zeros(len(entries), bool))
    content = stored.content
    if content is not None:
        vectors = read_vectors([Path(path)], ids.gather(chosen))[0] if given else None
        if vectors is not None:
            content.check_length(vectors.shape[1], f"{path}: column 'vector'")
        content = content.extended(content.of_new([texts[row] for row in chosen], vectors))
    return Stored(item_ids, stored.catalogue.extended(entries), trained, stored.known, content), notes


def text_entries(catalogue: Catalogue, config: DataConfig, texts: list[str]) -> tuple[list[list[int]], int]:
    """The entries of items with these texts, and the number of texts that are truncated. The catalogue must have a tokenizer.

    An entry is [] if the tokenizer turns the text into no token.
    """
    tokenizer = tokens_lib.Tokenizer.from_str(catalogue.tokenizer_json)
    tokens = tokens_lib.encode(tokenizer, texts)
    separator = frame_entries(tokenizer, config)["separator"]
    entries = item_entries(tokens, separator, catalogue.vocabulary - 1, config.item_tokens)
    entries = [entry if text else [] for entry, text in zip(entries, tokens, strict=True)]
    return entries, sum(len(text) > config.item_tokens for text in tokens)


def decoded_texts(catalogue: Catalogue, config: DataConfig) -> list[str] | None:
    """The text of every item, decoded from its tokens (at most `data.item_tokens`). None without a tokenizer."""
    if not catalogue.tokenizer_json:
        return None
    tokenizer = tokens_lib.Tokenizer.from_str(catalogue.tokenizer_json)
    separator = len(frame_entries(tokenizer, config)["separator"])
    tokens = np.split(catalogue.tokens[: catalogue.offsets[catalogue.items]], catalogue.offsets[1 : catalogue.items])
    texts = tokenizer.decode_batch([entry[separator:-1].tolist() for entry in tokens], skip_special_tokens=False)
    return [text.strip() for text in texts]

"""Input of the Python API: turns histories and candidates, given as lists or as polars or pandas tables, into rows of the catalogue."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from iam_jax.config import Config
from iam_jax.data.catalogue import Catalogue
from iam_jax.data.histories import Lists, Users, candidates_of_table, users_of_table
from iam_jax.data.stored import Stored, text_entries
from iam_jax.data.tables import INTERACTIONS, choose_columns, table_of
from iam_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Histories:
    """Histories as rows of `catalogue`, in which the items that were given as text follow those of the working folder."""

    users: Users
    catalogue: Catalogue
    table: str = ""  # "polars" or "pandas" if the histories were a table
    notes: tuple[str, ...] = ()  # about events that were left out
    new_vectors: np.ndarray | None = None  # [n, P] float32: the content vectors of the items given as text, if the model reads vectors


class Reader:
    """Reads histories and candidates for one catalogue."""

    def __init__(self, config: Config, stored: Stored):
        self._config, self._stored = config, stored
        self._given = stored.content is not None and stored.content.given > 0
        self._row = {item: row for row, item in enumerate(stored.item_ids.to_list())}

    def row(self, item: object, name: str = "item") -> int:
        """The catalogue row of an item id. name: of the item, for errors. Raises TypeError if the id is not a string, and InputError if the
        item is unknown."""
        if not isinstance(item, str):
            raise TypeError(f"{name} is {item!r} ({type(item).__name__}): an item id must be a string")
        if item not in self._row:
            raise InputError(f"{name}: no item {item!r} in the catalogue of {len(self._row):,} items")
        return self._row[item]

    def text_entries(self, items: Sequence[dict], names: Sequence[str]) -> list[list[int]]:
        """The tokens of items `{"text": …}`, or `{"text": …, "vector": …}` if the catalogue's vectors are from a file.

        names: of the items, for errors.

        Raises TypeError for other dicts. Raises InputError if a text has no tokens or does not fit into a row, or if the model reads ids.
        """
        for name, item in zip(names, items, strict=True):
            if item.keys() != ({"text", "vector"} if self._given else {"text"}) or not isinstance(item["text"], str):
                expected = "{'text': '…', 'vector': […]}" if self._given else "{'text': '…'}"
                raise TypeError(f"{name} is {_shown(item)}: an item that is not in the catalogue must be {expected}")
        if items and not self._stored.catalogue.tokenizer_json:
            raise InputError(f"{names[0]}: the model reads item ids (config.data.tokenizer = 'id'), not text")
        catalogue, row_tokens = self._stored.catalogue, self._config.data.row_tokens
        entries, _ = text_entries(catalogue, self._config.data, [" ".join(item["text"].split()) for item in items])
        room = row_tokens - (0 if self._config.item_level else catalogue.frame_tokens)
        if self._config.eval.ranking == "likelihood":  # a candidate follows the history
            room -= int(catalogue.item_lengths.max())
        for name, entry in zip(names, entries, strict=True):
            if not entry:
                raise InputError(f"{name}: the tokenizer makes no token of its text")
            if len(entry) > room:
                rows = f"a row has room for {room} (config.data.row_tokens = {row_tokens})"
                raise InputError(f"{name}: its text has {len(entry)} tokens, but {rows}")
        return entries

    def new_vectors(self, items: Sequence[dict], names: Sequence[str]) -> np.ndarray | None:
        """[n, P] float32: the content vectors of items that `text_entries` accepts. None if the model reads none.

        Raises TypeError for a `vector` that is not a list of numbers. Raises InputError for one of another length, or if a number is not
        finite.
        """
        content = self._stored.content
        if content is None:
            return None
        given = np.empty((len(items), content.given), np.float32) if self._given else None
        if given is not None:
            for n, (name, item) in enumerate(zip(names, items, strict=True)):
                raw = np.asarray(item["vector"]) if is_list(item["vector"]) else np.zeros(0, object)
                if raw.ndim != 1 or raw.dtype.kind not in "iuf":
                    raise TypeError(f"{name}: its vector must be a list of numbers")
                content.check_length(len(raw), f"{name}: its vector")
                with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite
                    given[n] = raw
        vectors = content.of_new([" ".join(item["text"].split()) for item in items], given)
        for name, vector in zip(names, vectors, strict=True):
            if not np.isfinite(vector).all():
                raise InputError(f"{name}: its vector has a number that is not finite in float32")
        return vectors

    def histories(self, given: Any) -> Histories:
        """Reads histories. Raises TypeError if they are neither a list of lists nor a table, and InputError for an unknown item or an empty
        history."""
        if kind := table_kind(given):
            table = table_of(_to_polars(given, INTERACTIONS, "histories"), INTERACTIONS, "histories")
            users, notes = users_of_table(table, "histories", self._stored.item_ids, self._config.data)
            return Histories(users, self._stored.catalogue, kind, tuple(notes))
        rows, texts, names = [], [], []
        items = self._stored.catalogue.items
        for n, history in enumerate(_lists(given, "histories")):
            if not history and not self._stored.catalogue.prompt:
                raise InputError(f"histories[{n}] is empty: the model needs at least one item to predict the next one")
            rows.append([])
            for position, item in enumerate(history):
                name = f"histories[{n}][{position}]"
                if isinstance(item, dict):
                    rows[-1].append(items + len(texts))
                    texts.append(item)
                    names.append(name)
                else:
                    rows[-1].append(self.row(item, name))
        catalogue, new_vectors = self._stored.catalogue, None
        if texts:
            catalogue = catalogue.extended(self.text_entries(texts, names))
            new_vectors = self.new_vectors(texts, names)
        ids = pl.Series("user", [str(n) for n in range(len(rows))], dtype=pl.String)
        return Histories(Users(ids, to_lists(rows), None), catalogue, new_vectors=new_vectors)

    def candidates(self, given: Any, histories: Histories) -> tuple[Users, list[list[int]] | None]:
        """Reads candidates for these histories.

        Returns the users with their distinct candidates; if they are lists, also the rows of all candidates in the given order.

        Raises what `histories` raises; TypeError if only one of the two is a table; InputError if a table repeats a pair, or if there is
        another number of lists than histories.
        """
        kind = table_kind(given)
        if bool(kind) != bool(histories.table):
            raise TypeError("histories and candidates: give both as lists or both as tables")
        if kind:
            table = table_of(_to_polars(given, ("user", "item"), "candidates"), ("user", "item"), "candidates")
            return candidates_of_table(table, "candidates", histories.users, self._stored.item_ids), None
        rows = []
        for n, items in enumerate(_lists(given, "candidates")):
            rows.append([self.row(item, f"candidates[{n}][{position}]") for position, item in enumerate(items)])
            if not items:
                raise InputError(f"candidates[{n}] is empty")
        if len(rows) != len(histories.users):
            raise InputError(f"{len(rows):,} lists of candidates for {len(histories.users):,} histories")
        users = histories.users
        return Users(users.ids, users.events, to_lists([sorted(set(items)) for items in rows])), rows


def _shown(item: dict) -> str:
    text = repr(item)
    return text if len(text) <= 200 else text[:197] + "..."


def table_kind(given: object) -> str:
    """Returns "polars" or "pandas" for their tables, "" for anything else. It imports neither library."""
    module, name = type(given).__module__.partition(".")[0], type(given).__name__
    return module if module in ("polars", "pandas") and name == "DataFrame" else ""


def convert_table(table: pl.DataFrame, kind: str) -> Any:
    """Returns a polars table as a table of the library `kind`, "polars" or "pandas"."""
    if kind == "polars":
        return table
    import pandas

    return pandas.DataFrame({column.name: column.to_numpy() if column.dtype.is_numeric() else column.to_list() for column in table})


def to_lists(rows: Sequence[Sequence[int] | np.ndarray]) -> Lists:
    """Packs lists of integers into `Lists`."""
    return Lists(np.array([item for items in rows for item in items], np.int32), np.cumsum([0, *map(len, rows)], dtype=np.int64))


def _to_polars(table: Any, required: Sequence[str], name: str) -> pl.DataFrame:
    """Returns a polars table unchanged, and the required columns of a pandas table as a polars table. name: of the table, for errors.

    Raises InputError if a required column is missing, occurs twice or cannot be converted.
    """
    if isinstance(table, pl.DataFrame):
        return table
    columns = []
    for column in choose_columns(name, [str(column) for column in table.columns], required):
        try:
            columns.append(_column(table[column]))
        except (pl.exceptions.PolarsError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{name}: column {column!r} cannot be read: {str(error).splitlines()[0]}") from error
    return pl.DataFrame(columns)


def _column(column: Any) -> pl.Series:
    """Converts a pandas column. Missing values (None, NaN, NaT, NA) become null."""
    if getattr(column.dtype, "tz", None) is not None:
        column = column.dt.tz_convert("UTC").dt.tz_localize(None)  # times without a time zone are in UTC
    if isinstance(column.dtype, np.dtype) and column.dtype.kind in "iufM":
        values = column.to_numpy()
        if values.dtype.kind == "M" and np.datetime_data(values.dtype)[0] == "s":
            values = values.astype("datetime64[ms]")  # polars has no unit of seconds
        return pl.Series(column.name, values, nan_to_null=True)
    values = [None if missing else value for value, missing in zip(column.tolist(), column.isna().tolist(), strict=True)]
    return pl.Series(column.name, values, strict=False)


def is_list(given: object) -> bool:
    """Whether the value is a list, a tuple or an array with at least one axis. Strings and bytes do not count as lists."""
    if isinstance(given, np.ndarray):
        return given.ndim > 0
    return isinstance(given, Sequence) and not isinstance(given, str | bytes)


def _lists(given: Any, name: str) -> list[list]:
    """Returns the value as a list of lists. name: of the value, for errors. Raises TypeError if it is none, InputError if it is empty."""
    expected = "a list of lists of item ids, or a polars or pandas table"
    if not is_list(given):
        raise TypeError(f"{name} is a {type(given).__name__}: it must be {expected}")
    lists = []
    for n, items in enumerate(given):
        if not is_list(items):
            value = repr(items) if isinstance(items, str | dict) else f"a {type(items).__name__}"
            raise TypeError(f"{name}[{n}] is {value}: {name} must be {expected} ([['a', 'b']] is one list with two items)")
        lists.append([str(item) if isinstance(item, np.str_) else item for item in items])
    if not lists:
        raise InputError(f"{name} is empty")
    return lists

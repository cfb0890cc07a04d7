"""The user's own two tables, interactions and items, read from CSV, TSV or Parquet and checked.

Nothing is guessed and nothing is repaired: a file is either read exactly or refused, by an error of one line that names the file, the
column and the first bad rows. Checks are whole-column operations. The places of bad rows are only computed for the error.
"""

import csv
import dataclasses
import gzip
import hashlib
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import polars as pl

from iam_jax.errors import InputError

INTERACTIONS = ("user", "item", "timestamp")
ENDINGS = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")
LAYOUT = (
    "interactions.* (columns user, item, timestamp) and items.* (column item, then text columns), "
    "each ending in .csv, .tsv, .csv.gz, .tsv.gz or .parquet"
)
_TIMESTAMPS = (pl.Int64, pl.Float64, pl.Datetime("us", "UTC"))
BAD_PARQUET = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)
# Rust's \d matches the digits of every script, hence [0-9]. Zeros after the sixth decimal are accepted, other digits do not match.
_ISO = (
    r"^(?<date>[0-9]{4}-[0-9]{2}-[0-9]{2})(?:[T ](?<clock>[0-9]{2}:[0-9]{2})"
    r"(?::(?<second>[0-5][0-9])(?:[.,](?<fraction>[0-9]{1,6})0*)?)?"
    r"(?:Z|(?<sign>[+-])(?<hours>[01][0-9]|2[0-3])(?::?(?<minutes>[0-5][0-9]))?)?)?$"
)


@dataclasses.dataclass(frozen=True)
class Tables:
    """The two tables that every source returns."""

    interactions: pl.DataFrame  # user, item: String; timestamp: Int64, Float64 or Datetime("us", "UTC"); in the order of the file
    items: pl.DataFrame  # item, then the text columns: String, never null (an absent text is "")
    interactions_name: str  # of the file (or builder), for errors
    items_name: str
    fingerprint: str  # hex SHA-256 of the content, part of the key of cached data


def table_files(folder: str | Path, kind: str) -> list[Path]:
    """The files of `folder` that can be read as the table `kind` ("interactions" or "items")."""
    return [path for ending in ENDINGS if (path := Path(folder) / f"{kind}{ending}").is_file()]


def find_tables(folder: str | Path) -> tuple[Path, Path]:
    """The paths of the interactions and of the items. Raises InputError if one is absent or if there is more than one."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; it should hold {LAYOUT}")
    paths = []
    for kind in ("interactions", "items"):
        found = table_files(folder, kind)
        if not found:
            other = ", ".join(sorted(path.name for path in folder.glob(f"{kind}.*")))
            raise InputError(f"{folder}: no {kind} table{other and f' (found {other})'}; it should hold {LAYOUT}")
        if len(found) > 1:
            raise InputError(f"{folder}: more than one {kind} table: {', '.join(path.name for path in found)}; keep one")
        paths += found
    return paths[0], paths[1]


def fingerprint_tables(folder: str | Path) -> str:
    """Hex SHA-256 of the bytes and names of both files (the ending determines how a file is read), without parsing them."""
    total = hashlib.sha256()
    for path in find_tables(folder):
        try:
            with path.open("rb") as file:
                total.update(f"{path.name}\t{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return total.hexdigest()


def read_tables(folder: str | Path, *, check_unknown_items: bool = True) -> Tables:
    """Reads and checks the tables of `folder`.

    `check_unknown_items=False` allows interactions with items that are not in the items table. Raises InputError if the tables cannot
    be read exactly as they are: see `read_table` and `check_tables`.
    """
    tables = load_tables(folder)
    check_tables(tables, check_unknown_items=check_unknown_items)
    return tables


def load_tables(folder: str | Path) -> Tables:
    """Reads the tables of `folder`, without `check_tables`."""
    interactions, items = find_tables(folder)
    return Tables(
        interactions=read_table(interactions, INTERACTIONS),
        items=read_table(items, ("item",), others=True),
        interactions_name=str(interactions),
        items_name=str(items),
        fingerprint=fingerprint_tables(folder),
    )


def check_tables(tables: Tables, *, check_unknown_items: bool = True) -> None:
    """Checks the tables of any source: columns and types as in `Tables`, at least one row in each, one row per item id, and only known
    items in the interactions. Raises InputError."""
    for name, table, required in (
        (tables.interactions_name, tables.interactions, INTERACTIONS),
        (tables.items_name, tables.items, ("item", *tables.items.columns)),
    ):
        _check_columns(name, table, required)
        if table.is_empty():
            raise InputError(f"{name}: the table has no rows")
    ids = tables.items["item"]
    if ids.n_unique() < len(ids):
        refuse(tables.items_name, ids, ids.is_duplicated(), "item ids that occur more than once", together=True)
    if check_unknown_items:
        known = tables.items.lazy().select("item")
        used = tables.interactions.lazy().select("item").unique()
        unknown = used.join(known, on="item", how="anti").collect()["item"]
        if len(unknown):
            item = tables.interactions["item"]
            what = f"{len(unknown):,} unknown item{'s' * (len(unknown) > 1)}, absent from {tables.items_name}"
            refuse(tables.interactions_name, item, item.is_in(unknown.to_list()), what)


def _check_columns(name: str, table: pl.DataFrame, required: Sequence[str]) -> None:
    for column in required:
        if column not in table.columns:
            raise InputError(f"{name}: no column {column!r}; its columns are {', '.join(table.columns)}")
        types = _TIMESTAMPS if column == "timestamp" else (pl.String,)
        if table[column].dtype not in types:
            raise InputError(f"{name}: column {column!r} is of type {table[column].dtype}; it must be {' or '.join(map(str, types))}")
        if table[column].null_count():
            refuse(name, table[column], table[column].is_null(), "missing values")


def read_table(path: str | Path, required: Sequence[str], *, others: bool = False, without: Sequence[str] = ()) -> pl.DataFrame:
    """Reads one table, in the format of its ending (`ENDINGS`).

    Of the `required` columns `timestamp` becomes Int64, Float64 or Datetime("us", "UTC"). Any other is an id: a String, verbatim, never
    empty. With `others` the remaining columns, except for those in `without`, follow as text, null as ""; otherwise they are not loaded.

    - CSV is RFC 4180: quoted fields may hold commas, doubled quotes and newlines, and a quote elsewhere is an error.
    - TSV has no quoting: a field is everything between two tabs, so `24" ruler` and `"Hello"` keep their quotes.
    - Both are UTF-8 (a byte order mark is accepted). The first line names the columns, and every line has as many fields.
    - Parquet: ids may be text, categories or integers (taken as decimal text), never floats.
    - A text timestamp column is decided as a whole: all integers (exact, 64 bits), else all finite numbers, else all ISO-8601
      (`2014-07-23`, `2014-07-23T01:02:03.000004Z`, `2014-07-23 01:02+05:30`; without an offset it is UTC).

    Raises InputError for everything else: an unreadable file, a missing or repeated column, no rows, bytes that are not UTF-8, lines
    of unequal length, empty ids, and timestamps that are missing, not finite, of mixed kinds or not exactly representable.
    """
    path = Path(path)
    if not path.name.endswith(ENDINGS):
        raise InputError(f"{path}: a table ends in {', '.join(ENDINGS)}")
    frame = (_read_parquet if path.suffix == ".parquet" else _read_text)(path, required, others, without)
    return _checked(frame, str(path), required)


def table_of(frame: pl.DataFrame, required: Sequence[str], name: str) -> pl.DataFrame:
    """The `required` columns of a table in memory, with the types and the checks of `read_table`. Errors call it `name`."""
    return _checked(frame.select(choose_columns(name, frame.columns, required)), name, required)


def _checked(frame: pl.DataFrame, name: str, required: Sequence[str]) -> pl.DataFrame:
    if frame.is_empty():
        raise InputError(f"{name}: the table has no rows")
    columns = []
    for column in frame.iter_columns():
        convert = _text if column.name not in required else _timestamps if column.name == "timestamp" else _ids
        columns.append(convert(name, column))
    return pl.DataFrame(columns)


def parse_timestamps(text: pl.Series, name: str = "timestamps") -> pl.Series:
    """Text as Int64 if all values are integers, else Float64 if all are finite numbers, else Datetime("us", "UTC") if all are ISO-8601.

    Raises InputError for any other column. name: of the table, in the error.
    """
    whole = text.cast(pl.Int64, strict=False)
    if not whole.null_count():
        return whole
    number = text.cast(pl.Float64, strict=False)
    finite = number.is_finite().fill_null(False)
    if finite.all():
        # One fraction turns all values into floats. An integer that is not exact as a float would then tie with its neighbours.
        exact = (whole == number.cast(pl.Int64, strict=False)).fill_null(False)
        rounded = text.str.contains(r"^[+-]?[0-9]+$") & ~exact
        if rounded.any():
            refuse(name, text, rounded, "integers beyond 64 bits, or not exact as floats in a column of floats")
        return number
    time = _parse_iso(text)
    if not time.null_count():
        return time
    neither = ~finite & time.is_null()
    if neither.any():
        refuse(name, text, neither, "not an integer, a finite number or an ISO-8601 time down to microseconds")
    numbers_are_few = finite.sum() <= 0.5 * len(finite)
    few, kinds = (finite, "numbers among ISO-8601 times") if numbers_are_few else (~finite, "ISO-8601 times among numbers")
    refuse(name, text, few, kinds)


def canonical_timestamps(timestamps: pl.Series) -> pl.Series:
    """The text of each timestamp, the same for all file formats.

    Int64 in decimal, Float64 as Python's repr, Datetime as YYYY-MM-DDTHH:MM:SS.ffffffZ.
    """
    if timestamps.dtype == pl.Datetime:
        return timestamps.dt.strftime("%Y-%m-%dT%H:%M:%S%.6fZ")
    text = timestamps.cast(pl.String)
    if timestamps.dtype == pl.Float64:
        # In this range polars, like repr, writes the shortest digits that give the same number again, without an exponent.
        size = timestamps.abs()
        odd = ~(size.is_between(1e-4, 1e15) | (size == 0))
        if odd.any():
            text = text.scatter(odd.arg_true(), [repr(x) for x in timestamps.filter(odd)])
    return text


def refuse(name: str, column: pl.Series, bad: pl.Series, what: str, *, together: bool = False) -> NoReturn:
    """Raises the InputError for the rows of the table `name` where `bad` is true: the first values, their places, and the count.

    `together`: the repeats of the first bad value are shown first, next to each other.
    """
    rows = bad.arg_true()
    if together:
        rows = (column == column[rows[0]]).arg_true().append(rows).unique(maintain_order=True)
    first = rows.head(3).to_list()
    shown = ", ".join(f"{_short(column[row])} ({place})" for row, place in zip(first, _places(name, first), strict=True))
    more = f" and {len(rows) - len(first):,} more rows" if len(rows) > len(first) else ""
    raise InputError(f"{name}: column {column.name!r}: {what}: {shown}{more}")


def _short(value: object) -> str:
    text = "nothing" if value is None else repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _places(name: str, rows: list[int]) -> list[str]:
    """The places of rows of a table: the line in a text file (the header is line 1), else the row counted from 1."""
    path = Path(name)
    if path.suffix == ".parquet" or not (path.name.endswith(ENDINGS) and path.is_file()):
        return [f"row {row + 1:,}" for row in rows]
    lines = [row + 2 for row in rows]
    if ".csv" in path.suffixes and b'"' in (data := _load(path)):  # quoted newlines: a record may span lines
        wanted, last = set(rows), max(rows) + 1
        begins = {}
        for record, match in enumerate(re.finditer(rb'(?:[^"\n]++|"[^"]*+"?+)*+(?:\n|\Z)', data), start=-1):
            if record in wanted:
                begins[record] = data.count(b"\n", 0, match.start()) + 1
            if record >= last:
                break
        lines = [begins[row] for row in rows]
    return [f"line {line:,}" for line in lines]


def choose_columns(
    path: Path | str, names: list[str], required: Sequence[str], others: bool = False, without: Sequence[str] = ()
) -> list[str]:
    """The columns to load, the required ones first."""
    found = ", ".join(map(_short, names[:20])) + ", ..." * (len(names) > 20)
    for name in required:
        if name not in names:
            raise InputError(f"{path}: no column {name!r}; its columns are {found}")
    chosen = [*required, *(name for name in names if others and name not in (*required, *without))]
    for name in chosen:
        if names.count(name) > 1:
            raise InputError(f"{path}: more than one column {name!r}; its columns are {found}")
    return chosen


def _read_parquet(path: Path, required: Sequence[str], others: bool, without: Sequence[str]) -> pl.DataFrame:
    try:
        with path.open("rb") as file:  # an open file: a path would be expanded where it holds `*` or `[`
            chosen = choose_columns(path, list(pl.read_parquet_schema(file)), required, others, without)
        return pl.read_parquet(path, columns=chosen, glob=False, hive_partitioning=False).select(chosen)
    except BAD_PARQUET as error:
        raise InputError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from error


def _load(path: Path) -> bytes:
    """The file's bytes, decompressed, without byte order mark and without empty lines at the end."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: not a whole gzip file: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return data.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")


def _read_text(path: Path, required: Sequence[str], others: bool, without: Sequence[str]) -> pl.DataFrame:
    data = _load(path)
    quoted = ".csv" in path.suffixes
    separator = "," if quoted else "\t"
    if not data:
        raise InputError(f"{path}: the file is empty")
    first = re.compile(rb'(?:[^"\n]++|"[^"]*+"?+)*+' if quoted else rb"[^\n]*+").match(data)
    assert first is not None  # the patterns match the empty string too
    head = first[0].removesuffix(b"\r")
    _check_utf8(path, head)
    try:
        names = next(csv.reader([head.decode()], strict=True)) if quoted else head.decode().split("\t")
    except csv.Error as error:
        raise InputError(f"{path}: line 1 is not a line of RFC-4180 column names: {error}") from error
    if not any(names):
        raise InputError(f"{path}: line 1 is empty, it should name the columns")
    chosen = choose_columns(path, names, required, others, without)

    # polars fills short lines with nulls, and a stray quote can join two lines. So the shape of every line is checked first.
    field = rb'(?:"(?:[^"]++|"")*+"|[^",\n]*+)' if quoted else rb"[^\t\n]*+"
    line = separator.encode().join([field] * len(names)) + rb"\r?+(?:\n|\Z)"
    lines = re.match(rb"(?:%s)*+" % line, data)
    assert lines is not None
    end = lines.end()
    if end < len(data):
        number, text = data.count(b"\n", 0, end) + 1, data[end:].partition(b"\n")[0]
        _check_utf8(path, data)  # the better error where both are wrong, as in a file of another encoding
        if quoted and b'"' in text:
            what = "has a quote that RFC 4180 does not allow (or an unequal number of fields)"
        else:
            what = f"has {text.count(separator.encode()) + 1} fields, the first line has {len(names)}"
        raise InputError(f"{path}: line {number:,} {what}: {_short(text.decode())}")
    try:
        indices = sorted(names.index(name) for name in chosen)
        frame = pl.read_csv(
            data, columns=indices, separator=separator, quote_char='"' if quoted else None, infer_schema=False, encoding="utf8"
        )
    except pl.exceptions.PolarsError as error:
        _check_utf8(path, data)
        raise InputError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    frame.columns = [names[index] for index in indices]
    return frame.select(chosen)


def _check_utf8(path: Path, data: bytes) -> None:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line:,} holds bytes that are not UTF-8: {data[error.start : error.end]!r}") from error


def _ids(name: str, column: pl.Series) -> pl.Series:
    if column.dtype not in (pl.String, pl.Categorical, pl.Enum, pl.Null) and not column.dtype.is_integer():
        raise InputError(f"{name}: column {column.name!r} is of type {column.dtype}; ids are text or integers")
    ids = column.cast(pl.String)
    empty = ids.is_null() | (ids == "").fill_null(True)
    if empty.any():
        refuse(name, ids, empty, "empty ids")
    return ids


def _text(name: str, column: pl.Series) -> pl.Series:
    if column.dtype.is_nested() or column.dtype in (pl.Binary, pl.Object):
        raise InputError(f"{name}: column {column.name!r} is of type {column.dtype}; write it as text or leave it out")
    return column.cast(pl.String).fill_null("")


def _timestamps(name: str, column: pl.Series) -> pl.Series:
    dtype = column.dtype
    if dtype in (pl.Categorical, pl.Enum):
        column, dtype = column.cast(pl.String), pl.String
    missing = column.is_null() | (column == "").fill_null(True) if dtype == pl.String else column.is_null()
    if missing.any():
        refuse(name, column, missing, "missing timestamps")
    if dtype == pl.String:
        return parse_timestamps(column, name)
    if dtype.is_integer():
        whole = column.cast(pl.Int64, strict=False)
        if whole.null_count():
            refuse(name, column, whole.is_null(), "integers beyond 64 bits")
        return whole
    if dtype.is_float():
        if not column.is_finite().all():
            refuse(name, column, ~column.is_finite(), "timestamps that are not finite")
        return column.cast(pl.Float64)
    if isinstance(dtype, pl.Datetime):
        if dtype.time_unit == "ns" and (fine := column.to_physical() % 1000 != 0).any():
            refuse(name, column, fine, "times finer than a microsecond")
        column = column.dt.replace_time_zone("UTC") if dtype.time_zone is None else column.dt.convert_time_zone("UTC")
        return column.dt.cast_time_unit("us")
    if dtype == pl.Date:
        return column.cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    raise InputError(f"{name}: column {column.name!r} is of type {dtype}; timestamps are integers, floats, dates or ISO-8601")


def _parse_iso(text: pl.Series) -> pl.Series:
    """Datetime("us", "UTC") of each ISO-8601 text; null for other text and for times finer than a microsecond."""
    part = pl.col("part").struct.field
    clock = pl.concat_str(
        [
            part("date"),
            pl.lit(" "),
            part("clock").fill_null("00:00"),
            pl.lit(":"),
            part("second").fill_null("00"),
            pl.lit("."),
            part("fraction").fill_null("").str.pad_end(6, "0"),
        ]
    )
    offset = part("hours").cast(pl.Int64) * 60 + part("minutes").cast(pl.Int64).fill_null(0)
    east = pl.when(part("sign") == "-").then(-offset).otherwise(offset).fill_null(0)
    local = clock.str.strptime(pl.Datetime("us"), "%Y-%m-%d %H:%M:%S%.6f", strict=False)
    frame = pl.DataFrame({"part": text.str.extract_groups(_ISO)})
    return frame.select((local - pl.duration(minutes=east)).dt.replace_time_zone("UTC").alias(text.name))[text.name]

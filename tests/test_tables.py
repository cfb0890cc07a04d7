"""The user's tables are read exactly and equally from every format, or refused with one line that names the location."""

import csv
import datetime
import gzip
import hashlib
import io
import os
import random
from pathlib import Path

import polars as pl
import pytest
from helpers import write_shop

from iam_jax.data import tables as tables_lib
from iam_jax.data.tables import (
    Tables,
    canonical_timestamps,
    check_tables,
    find_tables,
    fingerprint_tables,
    read_table,
    read_tables,
)
from iam_jax.errors import InputError

DATA = Path(__file__).parents[2] / "shared" / "data"
UTC = datetime.UTC

# Ids that a reader may change by mistake: leading zeros, "1.0", blanks, words that mean null elsewhere, another script.
EVENTS = [("007", "1.0", 5), ("7", "1", 5), (" u ", "NA", -3), ("null", "été", 2**53 + 1), ("None", "NaN", 2**53)]
ITEMS = [("1.0", "Drill, 24", ""), ("1", "Café 木", "x"), ("NA", "null", "007"), ("été", " padded ", "|"), ("NaN", "t", "NA")]


def write(path: Path, names: list[str], rows: list[tuple]) -> Path:
    """Writes `rows` in the format of `path`, without polars' own text writer."""
    if path.suffix == ".parquet":
        pl.DataFrame(rows, schema=names, orient="row").write_parquet(path)
        return path
    text = io.StringIO()
    if ".csv" in path.suffixes:
        csv.writer(text).writerows([names, *rows])
    else:
        text.writelines("\t".join(map(str, row)) + "\n" for row in [names, *rows])
    return put(path, text.getvalue().encode())


def put(path: Path, data: bytes | str) -> Path:
    data = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def refused(function, *args, **kwargs) -> str:
    with pytest.raises(InputError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def folder(tmp_path: Path, interactions: str = "user,item,timestamp\na,1,5\n", items: str = "item,title\n1,x\n") -> Path:
    put(tmp_path / "interactions.csv", interactions)
    put(tmp_path / "items.csv", items)
    return tmp_path


def times(tmp_path: Path, *values: str) -> pl.Series:
    path = put(tmp_path / "t.csv", "\n".join(["timestamp", *values]) + "\n")
    return read_table(path, ["timestamp"])["timestamp"]


@pytest.mark.parametrize("ending", tables_lib.ENDINGS)
def test_every_format_gives_the_same_frames(tmp_path, ending):
    # `rating` is a further column that must be ignored; the order of the columns also differs from ours.
    write(tmp_path / f"interactions{ending}", ["rating", "timestamp", "user", "item"], [(9.5, t, u, i) for u, i, t in EVENTS])
    write(tmp_path / f"items{ending}", ["title", "item", "extra"], [(t, i, e) for i, t, e in ITEMS])
    tables = read_tables(tmp_path)
    assert tables.interactions.schema == {"user": pl.String, "item": pl.String, "timestamp": pl.Int64}
    assert tables.interactions.rows() == EVENTS
    assert tables.items.schema == {"item": pl.String, "title": pl.String, "extra": pl.String}
    assert tables.items.rows() == ITEMS
    assert tables.interactions_name == str(tmp_path / f"interactions{ending}")
    assert tables.items_name == str(tmp_path / f"items{ending}")


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("ending", [".csv", ".tsv", ".csv.gz", ".tsv.gz"])
def test_byte_order_mark_newlines_and_empty_lines_at_the_end(tmp_path, ending, newline):
    separator = "," if "csv" in ending else "\t"
    lines = [separator.join(row) for row in (("item", "title"), ("1", "a"), ("2", ""))]
    for tail in ("", newline, newline * 3):
        path = put(tmp_path / f"items{ending}", b"\xef\xbb\xbf" + (newline.join(lines) + tail).encode())
        assert read_table(path, ["item"], others=True).rows() == [("1", "a"), ("2", "")]


def test_one_column(tmp_path):
    assert read_table(put(tmp_path / "users.csv", "user\n1\n02\n"), ["user"]).rows() == [("1",), ("02",)]
    assert "line 3" in refused(read_table, put(tmp_path / "users.csv", "user\n1\n\n2\n"), ["user"])


def test_csv_quoting_is_rfc_4180(tmp_path):
    random.seed(0)
    pieces = ["a", ",", '"', "\n", "\r\n", " ", "\t", "é", ""]
    rows = [(str(i), "".join(random.choices(pieces, k=9)), "".join(random.choices(pieces, k=3))) for i in range(90_000)]
    path = write(tmp_path / "items.csv", ["item", 'a "title"', "b,c\nd"], rows)
    frame = read_table(path, ["item"], others=True)
    assert frame.columns == ["item", 'a "title"', "b,c\nd"]
    assert frame.rows() == rows  # 2.4 MB: more than one of polars' parallel chunks


def test_tsv_has_no_quoting(tmp_path):
    path = put(tmp_path / "items.tsv", 'item\ttitle\n1\t24" ruler\n2\t"Hello"\n3\t"open\n"4"\t""\n5\ta,b\n')
    rows = [("1", '24" ruler'), ("2", '"Hello"'), ("3", '"open'), ('"4"', '""'), ("5", "a,b")]
    assert read_table(path, ["item"], others=True).rows() == rows


def test_parquet_ids(tmp_path):
    path = tmp_path / "t.parquet"
    frame = pl.DataFrame(
        {
            "a": pl.Series([2**64 - 1, 7], dtype=pl.UInt64),
            "b": pl.Series([-5, 0], dtype=pl.Int8),
            "c": pl.Series(["y", "007"], dtype=pl.Categorical),
            "d": pl.Series([1.0, 2.0]),
        }
    )
    frame.write_parquet(path)
    assert read_table(path, ["c", "b", "a"]).rows() == [("y", "-5", "18446744073709551615"), ("007", "0", "7")]
    message = refused(read_table, path, ["d"])
    assert str(path) in message and "column 'd' is of type Float64; ids are text or integers" in message


def test_item_texts_of_other_types(tmp_path):
    path = tmp_path / "items.parquet"
    pl.DataFrame({"item": [1, 2], "year": [1999, None], "price": [9.99, 1.0], "nothing": [None, None]}).write_parquet(path)
    frame = read_table(path, ["item"], others=True)
    assert frame.rows() == [("1", "1999", "9.99", ""), ("2", "", "1.0", "")]
    pl.DataFrame({"item": [1], "vector": [[1.0, 2.0]]}).write_parquet(path)
    assert "column 'vector' is of type List(Float64)" in refused(read_table, path, ["item"], others=True)
    assert read_table(path, ["item"]).rows() == [("1",)]


def test_a_path_is_not_a_pattern(tmp_path):
    path = tmp_path / "a[1]*.parquet"
    pl.DataFrame({"item": ["x"]}).write_parquet(path)
    pl.DataFrame({"item": ["y"]}).write_parquet(tmp_path / "a1b.parquet")
    assert read_table(path, ["item"]).rows() == [("x",)]


# Timestamps


def test_integer_timestamps_are_exact(tmp_path):
    got = times(tmp_path, str(2**53 + 1), str(2**53), str(2**63 - 1), str(-(2**63)), "007")
    assert got.dtype == pl.Int64 and got.to_list() == [2**53 + 1, 2**53, 2**63 - 1, -(2**63), 7]
    assert canonical_timestamps(got).to_list() == [str(x) for x in got.to_list()]
    assert tables_lib.parse_timestamps(pl.Series([str(2**53 + 1)])).to_list() == [2**53 + 1]


def test_float_timestamps(tmp_path):
    texts = ["1", "2.5", "-1e3", "1700000000.123456", "1e22", ".5", "3e-7", "0.0"]
    got = times(tmp_path, *texts)
    assert got.dtype == pl.Float64 and got.to_list() == [float(x) for x in texts]
    assert canonical_timestamps(got).to_list() == [repr(float(x)) for x in texts]


def test_iso_timestamps(tmp_path):
    def at(*args):
        return datetime.datetime(*args, tzinfo=UTC)

    expected = {
        "2014-07-23": at(2014, 7, 23),
        "2014-07-23T01:02": at(2014, 7, 23, 1, 2),
        "2014-07-23 01:02:03": at(2014, 7, 23, 1, 2, 3),
        "2014-07-23T01:02:03Z": at(2014, 7, 23, 1, 2, 3),
        "2014-07-23T01:02:03.5": at(2014, 7, 23, 1, 2, 3, 500_000),
        "2014-07-23T01:02:03.000001Z": at(2014, 7, 23, 1, 2, 3, 1),
        "2014-07-23T01:02:03.123456000": at(2014, 7, 23, 1, 2, 3, 123_456),
        "2014-07-23T01:02:03+05:30": at(2014, 7, 22, 19, 32, 3),
        "2014-12-31T23:30:00-0100": at(2015, 1, 1, 0, 30),
        "2016-02-29T00:00:00+02": at(2016, 2, 28, 22),
        "1969-12-31T23:59:59.999999Z": at(1969, 12, 31, 23, 59, 59, 999_999),
    }
    got = times(tmp_path, *expected)
    assert got.dtype == pl.Datetime("us", "UTC") and got.to_list() == list(expected.values())
    text = [x.strftime("%Y-%m-%dT%H:%M:%S.%fZ") for x in expected.values()]
    assert canonical_timestamps(got).to_list() == text and "2014-07-23T01:02:03.000001Z" in text


def test_canonical_floats_are_pythons(tmp_path):
    random.seed(0)
    values = [random.choice([1, -1]) * random.random() * 10.0 ** random.randint(-9, 22) for _ in range(20_000)]
    values += [0.0, -0.0, 1e15, 1e16, 1e-4, 9.9e-5, 123456789012345680.0, 978300019.0]
    assert canonical_timestamps(pl.Series(values)).to_list() == [repr(x) for x in values]


@pytest.mark.parametrize(
    "typed, texts",
    [
        (pl.Series([978300019, 5], dtype=pl.Int32), ["978300019", "5"]),
        (pl.Series([978300019.25, 5.0]), ["978300019.25", "5"]),
        (pl.Series([0.5, 0.25], dtype=pl.Float32), ["0.5", "0.25"]),
        (pl.Series([datetime.date(2014, 7, 23), datetime.date(1960, 1, 1)]), ["2014-07-23", "1960-01-01"]),
        (pl.Series([1, -1]).cast(pl.Datetime("ms")), ["1970-01-01T00:00:00.001", "1969-12-31T23:59:59.999"]),
        (pl.Series([1000, -1000]).cast(pl.Datetime("ns")), ["1970-01-01T00:00:00.000001", "1969-12-31T23:59:59.999999"]),
        (pl.Series([0, 1]).cast(pl.Datetime("us", "Asia/Kolkata")), ["1970-01-01T05:30+05:30", "1970-01-01 00:00:00.000001"]),
        (pl.Series(["2014-07-23", "2015-07-23"], dtype=pl.Categorical), ["2014-07-23", "2015-07-23"]),
        (pl.Series(["12", "9007199254740993"]), ["12", "9007199254740993"]),
    ],
)
def test_timestamps_are_the_same_from_text_and_parquet(tmp_path, typed, texts):
    path = tmp_path / "t.parquet"
    pl.DataFrame({"timestamp": typed}).write_parquet(path)
    binary, text = read_table(path, ["timestamp"])["timestamp"], times(tmp_path, *texts)
    assert binary.dtype == text.dtype and binary.to_list() == text.to_list()
    assert canonical_timestamps(binary).to_list() == canonical_timestamps(text).to_list()


NEITHER = "not an integer, a finite number or an ISO-8601 time down to microseconds: "


@pytest.mark.parametrize(
    "values, message",
    [
        (["1", "x", "3", " 4", "5"], NEITHER + "'x' (line 3), ' 4' (line 5)"),
        (["1", "nan", "inf"], NEITHER + "'nan' (line 3), 'inf' (line 4)"),
        (["1", "1e400"], NEITHER + "'1e400' (line 3)"),
        (["2020-01-01", "2020-02-30"], NEITHER + "'2020-02-30' (line 3)"),
        (["2020-01-01T00:00:00.0000001"], NEITHER + "'2020-01-01T00:00:00.0000001' (line 2)"),
        (["2020-01-01T00:00:60", "2020-01-01T24:00", "2020-01-01T00:00+0", "2020-1-1"], "and 1 more rows"),
        (["1", "2", "2020-01-01"], "ISO-8601 times among numbers: '2020-01-01' (line 4)"),
        (["2020-01-01", "2", "2020-01-01"], "numbers among ISO-8601 times: '2' (line 3)"),
        (["1", '""', "3"], "missing timestamps: '' (line 3)"),
        (["9223372036854775808", "1"], "not exact as floats in a column of floats: '9223372036854775808' (line 2)"),
        (["1.5", "9007199254740993"], "not exact as floats in a column of floats: '9007199254740993' (line 3)"),
    ],
)
def test_bad_timestamps(tmp_path, values, message):
    found = refused(times, tmp_path, *values)
    assert found.startswith(f"{tmp_path / 't.csv'}: column 'timestamp': ") and message in found


@pytest.mark.parametrize(
    "series, message",
    [
        (
            pl.Series([1, None, 3, None, None, None]),
            "missing timestamps: nothing (row 2), nothing (row 4), nothing (row 5)",
        ),
        (pl.Series([1.0, float("nan"), float("-inf")]), "not finite: nan (row 2), -inf (row 3)"),
        (pl.Series([2**63], dtype=pl.UInt64), "integers beyond 64 bits: 9223372036854775808 (row 1)"),
        (pl.Series([1000, 1]).cast(pl.Datetime("ns")), "finer than a microsecond: 1970-01-01 00:00:00"),
        (pl.Series([True]), "is of type Boolean; timestamps are"),
        (pl.Series([None], dtype=pl.Null), "missing timestamps: nothing (row 1)"),
    ],
)
def test_bad_timestamps_in_parquet(tmp_path, series, message):
    path = tmp_path / "t.parquet"
    pl.DataFrame({"timestamp": series}).write_parquet(path)
    found = refused(read_table, path, ["timestamp"])
    assert found.startswith(f"{path}: column 'timestamp'") and message in found


def test_lines_are_counted_in_the_file_not_in_records(tmp_path):
    text = 'item,title,timestamp\n1,"two\nlines ""x""",1\n2,"\n\n",2\n3,c,oops\n'
    assert "'oops' (line 7)" in refused(read_table, put(tmp_path / "t.csv", text), ["item", "timestamp"])
    assert "'oops' (line 7)" in refused(read_table, put(tmp_path / "t.csv", text.replace("\n", "\r\n")), ["timestamp"])
    text = 'timestamp\ttitle\n1\t"\noops\t"\n'
    assert "'oops' (line 3)" in refused(read_table, put(tmp_path / "t.tsv.gz", text), ["timestamp"])


# Refused tables


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("t.csv", "user,Item\n1,2\n", "no column 'item'; its columns are 'user', 'Item'"),
        ("t.tsv", "user,item\n1,2\n", "no column 'user'; its columns are 'user,item'"),
        ("t.csv", "user,item,item\n1,2,3\n", "more than one column 'item'; its columns are 'user', 'item', 'item'"),
        ("t.csv", "", "the file is empty"),
        ("t.csv.gz", "", "the file is empty"),
        ("t.csv", "\nuser,item\n1,2\n", "line 1 is empty"),
        ("t.csv", "user,item\n", "the table has no rows"),
        ("t.csv", 'user,"item\n1,2\n', "line 1 is not a line of RFC-4180 column names"),
        ("t.tsv", b"user\titem\n1\t2\n3\t\xe9\n", r"line 3 holds bytes that are not UTF-8: b'\xe9'"),
        ("t.csv.gz", b"user,item,ignored\n1,2,x\n3,4,\xff\n", r"line 3 holds bytes that are not UTF-8: b'\xff'"),
        ("t.csv", "user,item\n1,2\n".encode("utf-16"), r"line 1 holds bytes that are not UTF-8: b'\xff'"),
        ("t.csv", "user,item\n1,2\n3\n", "line 3 has 1 fields, the first line has 2: '3'"),
        ("t.csv", "user,item\n1,2\n\n3,4\n", "line 3 has 1 fields, the first line has 2: ''"),
        ("t.csv", "user,item,z\n1,2,\n3,4\n5,6,7,8\n", "line 3 has 2 fields, the first line has 3: '3,4'"),
        ("t.tsv", "user\titem\tz\n1\t2\t3\n3\t4\t5\t6\n", r"line 3 has 4 fields, the first line has 3: '3\t4\t5\t6'"),
        ("t.csv", 'user,item,t\n1,2,24" ruler\n2,3,12" ruler\n', "line 2 has a quote that RFC 4180 does not allow"),
        ("t.csv", 'user,item,t\n1,2,3\n1,2,"24" ruler"\n', "line 3 has a quote that RFC 4180 does not allow"),
        ("t.csv", 'user,item,t\n1,2,3\n1,2,"open\n1,2,3\n', "line 3 has a quote that RFC 4180 does not allow"),
        ("t.csv", "user,item\n1,2\n,3\n4,5\n6,\n", "column 'user': empty ids: nothing (line 3)"),
        ("t.csv", 'user,item\n1,2\n3,""\n4,\n', "column 'item': empty ids: '' (line 3), nothing (line 4)"),
        ("t.json", "{}", "a table ends in .csv, .tsv, .csv.gz, .tsv.gz, .parquet"),
        ("t.parquet", "user,item\n1,2\n", "not a readable Parquet file: "),
    ],
)
def test_refused(tmp_path, name, data, message):
    path = put(tmp_path / name, data)
    found = refused(read_table, path, ["user", "item"])
    assert found.startswith(f"{path}: ") and message in found


def test_broken_archives(tmp_path):
    path = tmp_path / "t.csv.gz"
    rows = "user,item\n" + "".join(f"{i * 7919 % 100_003},{i}\n" for i in range(20_000))
    whole = gzip.compress(rows.encode())
    for data in (rows.encode(), whole[: len(whole) // 2], whole[:-6], whole[:-8] + b"12345678", whole[:50] + b"\xff" * 50):
        path.write_bytes(data)
        assert refused(read_table, path, ["user", "item"]).startswith(f"{path}: not a whole gzip file: ")
    path.write_bytes(gzip.compress(b"user,item\n1,2\n") + gzip.compress(b"3,4\n"))  # two members, as `cat` makes
    assert read_table(path, ["user", "item"]).rows() == [("1", "2"), ("3", "4")]

    path = tmp_path / "t.parquet"
    pl.DataFrame({"user": [str(i) for i in range(9999)], "item": ["x"] * 9999}).write_parquet(path)
    whole = path.read_bytes()
    for data in (b"", whole[: len(whole) // 2], whole[:-4]):
        path.write_bytes(data)
        assert refused(read_table, path, ["user", "item"]).startswith(f"{path}: not a readable Parquet file: ")


def test_parquet_refused(tmp_path):
    path = tmp_path / "t.parquet"
    pl.DataFrame({"user": ["a", None, ""], "item": [1, 2, 3]}).write_parquet(path)
    assert "column 'user': empty ids: nothing (row 2), '' (row 3)" in refused(read_table, path, ["user", "item"])
    assert "no column 'timestamp'; its columns are 'user', 'item'" in refused(read_table, path, ["user", "timestamp"])
    pl.DataFrame({"user": [], "item": []}, schema={"user": pl.String, "item": pl.String}).write_parquet(path)
    assert refused(read_table, path, ["user", "item"]) == f"{path}: the table has no rows"


def test_unreadable_paths(tmp_path):
    assert "cannot be read: No such file" in refused(read_table, tmp_path / "t.csv", ["user"])
    assert "No such file" in refused(read_table, tmp_path / "t.parquet", ["user"])
    (tmp_path / "d.tsv").mkdir()
    assert "cannot be read: Is a directory" in refused(read_table, tmp_path / "d.tsv", ["user"])
    if os.geteuid():  # root reads everything
        path = put(tmp_path / "t.csv", "user\n1\n")
        path.chmod(0)
        assert "cannot be read: Permission denied" in refused(read_table, path, ["user"])


def test_long_values_are_cut(tmp_path):
    message = refused(times, tmp_path, "x" * 10_000)
    assert len(message) < 500 and "xxx..." in message
    assert len(refused(read_table, put(tmp_path / "t.csv", "[" * 200_000), ["user"])) < 500
    assert len(refused(read_table, put(tmp_path / "t.csv", "a," * 5_000 + "b\n1\n"), ["user"])) < 500


def test_find_tables(tmp_path):
    layout = "should hold interactions.* (columns user, item, timestamp) and items.* (column item, then text columns)"
    message = refused(read_tables, tmp_path / "nowhere")
    assert f"{tmp_path / 'nowhere'}: no such folder" in message and layout in message
    put(tmp_path / "interactions.json", "{}")
    message = refused(read_tables, tmp_path)
    assert "no interactions table (found interactions.json)" in message and layout in message
    put(tmp_path / "interactions.csv", "user,item,timestamp\na,1,5\n")
    message = refused(read_tables, tmp_path)
    assert "no items table; it" in message and layout in message
    put(tmp_path / "items.tsv", "item\ttitle\n1\tx\n")
    assert find_tables(tmp_path) == (tmp_path / "interactions.csv", tmp_path / "items.tsv")
    put(tmp_path / "items.csv.gz", "item,title\n1,x\n")
    assert "more than one items table: items.tsv, items.csv.gz; keep one" in refused(read_tables, tmp_path)


def test_duplicate_items(tmp_path):
    items = "item,title\n1,x\n2,b\n3,c\n2,b\n4,d\n2,b\n4,e\n"
    message = refused(read_tables, folder(tmp_path, items=items))
    assert message == (
        f"{tmp_path / 'items.csv'}: column 'item': item ids that occur more than once: "
        "'2' (line 3), '2' (line 5), '2' (line 7) and 2 more rows"
    )
    items = "item,title\n1,x\n4,b\n3,c\n2,b\n2,d\n4,e\n"
    assert "'4' (line 3), '4' (line 7), '2' (line 5) and 1 more rows" in refused(read_tables, folder(tmp_path, items=items))


def test_unknown_items(tmp_path):
    events = "user,item,timestamp\na,1,5\na,x,6\nb,01,7\nb,1,8\nc,x,9\nd,x,9\n"
    message = refused(read_tables, folder(tmp_path, events))
    assert message == (
        f"{tmp_path / 'interactions.csv'}: column 'item': 2 unknown items, absent from {tmp_path / 'items.csv'}: "
        "'x' (line 3), '01' (line 4), 'x' (line 6) and 1 more rows"
    )
    assert read_tables(tmp_path, check_unknown_items=False).interactions["item"].to_list() == ["1", "x", "01", "1", "x", "x"]


def test_checks_serve_other_sources_too():
    interactions = pl.DataFrame({"user": ["a", "b"], "item": ["1", "9"], "timestamp": [1, 2]})
    items = pl.DataFrame({"item": ["1", "2"], "title": ["x", "y"]})
    message = refused(check_tables, Tables(interactions, items, "the builder", "its items", ""))
    assert message == "the builder: column 'item': 1 unknown item, absent from its items: '9' (row 2)"
    assert refused(check_tables, Tables(interactions, items.clear(), "a", "b", "")) == "b: the table has no rows"
    check_tables(Tables(interactions, items, "a", "b", ""), check_unknown_items=False)

    def message(interactions=interactions, items=items):
        return refused(check_tables, Tables(interactions, items, "a", "b", ""), check_unknown_items=False)

    assert message(interactions.drop("timestamp")) == "a: no column 'timestamp'; its columns are user, item"
    assert message(items=items.drop("item")) == "b: no column 'item'; its columns are title"
    assert message(interactions.cast({"user": pl.Int64}, strict=False)) == "a: column 'user' is of type Int64; it must be String"
    assert message(items=items.with_columns(title=1)) == "b: column 'title' is of type Int32; it must be String"
    assert message(interactions.cast({"timestamp": pl.Int32})).startswith(
        "a: column 'timestamp' is of type Int32; it must be Int64 or Float64"
    )
    missing = items.with_columns(title=pl.Series(["x", None]))
    assert message(items=missing) == "b: column 'title': missing values: nothing (row 2)"


def test_fingerprint(tmp_path):
    first = fingerprint_tables(folder(tmp_path))
    files = ["interactions.csv", "items.csv"]
    lines = [f"{name}\t{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}\n" for name in files]
    assert first == hashlib.sha256("".join(lines).encode()).hexdigest() == read_tables(tmp_path).fingerprint
    assert fingerprint_tables(folder(tmp_path, items="item,title\n1,y\n")) != first
    assert fingerprint_tables(folder(tmp_path)) == first
    (tmp_path / "items.csv").rename(tmp_path / "items.tsv")  # the same bytes would be read as other columns
    assert fingerprint_tables(tmp_path) != first


@pytest.mark.skipif(not DATA.is_dir(), reason="the development data is not here")
@pytest.mark.parametrize(
    "name, users, items, events",
    [
        ("amazon2014-toys", 19_124, 11_758, 165_247),
        ("movielens-1m", 6_040, 3_416, 999_611),
        ("amazon2018-scientific", 2_928, 1_585, 19_712),
    ],
)
def test_real_data(name, users, items, events):
    tables = read_verbatim(DATA / name)
    assert (tables.interactions["user"].n_unique(), len(tables.items), len(tables.interactions)) == (users, items, events)


def test_a_made_up_shop(tmp_path):
    """What test_real_data asserts, wherever it runs."""
    tables = read_verbatim(write_shop(tmp_path / "shop"))
    assert (tables.interactions["user"].n_unique(), len(tables.items)) == (200, 60)


def read_verbatim(folder):
    """The tables of a folder, whose values are written again as they are in the files."""
    tables = read_tables(folder)
    with gzip.open(folder / "interactions.tsv.gz", "rt", encoding="utf-8", newline="\n") as file:
        lines = file.read().splitlines()[1:]
    texts = canonical_timestamps(tables.interactions["timestamp"])
    rows = zip(tables.interactions["user"], tables.interactions["item"], texts, strict=True)
    assert ["\t".join(row) for row in rows] == lines
    with gzip.open(folder / "items.tsv.gz", "rt", encoding="utf-8", newline="\n") as file:
        assert ["\t".join(row) for row in tables.items.rows()] == file.read().split("\n")[1:-1]
    return tables

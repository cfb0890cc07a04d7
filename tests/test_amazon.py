"""The Amazon source: categories, the formats of both releases, counts, and the data kept between runs."""

import gzip
import hashlib
import json
from pathlib import Path

import polars as pl
import pytest
import tensorflow_datasets as tfds

from iam_jax.data.sources import amazon
from iam_jax.errors import InputError


def review(user: str, item: str, timestamp: int, rating: float = 5.0) -> dict:
    return {
        "reviewerID": user,
        "asin": item,
        "reviewerName": 'D. "Dee" O\'Hara',
        "reviewText": "says 'asin': 'NONE' é\n",
        "overall": rating,
        "summary": "ok",
        "unixReviewTime": timestamp,
        "reviewTime": "01 1, 2014",
    }


REVIEWS = [
    review("A1", "B00B", 1388534400),
    review("A1", "B00A", 1388534400, 1.0),
    review("A2", "B00A", 1380000000),
    review("A1", "B00B", 1388534400, 4.0),  # a repeated pair stays
    review("A2", "0000C", 1390000000),
    review("A2", "B00D", 1390000001),
]
INTERACTIONS = pl.DataFrame(
    {
        "user": ["A1", "A1", "A2", "A1", "A2", "A2"],
        "item": ["B00B", "B00A", "B00A", "B00B", "0000C", "B00D"],
        "timestamp": [1388534400, 1388534400, 1380000000, 1388534400, 1390000000, 1390000001],
    }
)
METADATA_2014 = [
    {
        "asin": "B00A",
        "title": "Dolls &amp; Bears,\n 12\" 'Max'",
        "price": 3.99,
        "imUrl": "http://x/1.jpg",
        "related": {"also_bought": ["B00B"]},
        "brand": "Säntis",
        "categories": [["Toys & Games", "Dolls"], ["Toys & Games", "Animals &amp; Figures", "Bears"], ["A", "B", "C"]],
    },
    {"asin": "B99Z", "title": "never reviewed", "categories": [["Toys & Games"]]},
    {"asin": "B00B", "categories": [["Toys & Games"]], "description": "no title, no brand"},
    {"asin": "0000C", "title": "Cube", "categories": [[]]},
]
ITEMS_2014 = pl.DataFrame(
    [
        ("0000C", "Cube", "", ""),
        ("B00A", "Dolls & Bears, 12\" 'Max'", "Säntis", "Toys & Games > Animals & Figures > Bears"),
        ("B00B", "", "", "Toys & Games"),
        ("B00D", "", "", ""),  # no metadata at all
    ],
    schema=["item", "title", "brand", "category"],
    orient="row",
)
METADATA_2018 = [
    {
        "category": ["Arts, Crafts & Sewing", "Beads"],
        "title": "Glass Beads",
        "brand": "\n    Acme  Co",
        "asin": "B00A",
        "price": "",
    },
    {"category": [], "title": "never reviewed", "brand": "", "asin": "B99Z"},
    {"category": "", "title": "var aPageStart = (new Date()).getTime();\nvar ue_t0", "brand": "", "asin": "B00B"},
    {"category": [], "title": "second of its kind", "brand": "Other", "asin": "B00A"},
    {"category": ["Arts, Crafts & Sewing"], "title": "Yarn", "brand": None, "asin": "0000C", "fit": True},
]
ITEMS_2018 = pl.DataFrame(
    [
        ("0000C", "Yarn", "", "Arts, Crafts & Sewing"),
        ("B00A", "Glass Beads", "Acme Co", "Arts, Crafts & Sewing > Beads"),
        ("B00B", "", "", ""),
        ("B00D", "", "", ""),
    ],
    schema=["item", "title", "brand", "category"],
    orient="row",
)


def lines(records, dump=json.dumps) -> bytes:
    return "".join(dump(record) + "\n" for record in records).encode()


def write(folder: Path, year: int, reviews=REVIEWS, metadata=None, pack=gzip.compress) -> tuple[Path, Path]:
    """Both originals of 2014/Toys_and_Games or 2018/Arts_Crafts_and_Sewing."""
    folder.mkdir(exist_ok=True)
    name, prefix = ("Toys_and_Games", "reviews_") if year == 2014 else ("Arts_Crafts_and_Sewing", "")
    ending = ".json.gz" if pack is gzip.compress else ".json"
    paths = folder / f"{prefix}{name}_5{ending}", folder / f"meta_{name}{ending}"
    metadata = metadata or (lines(METADATA_2014, repr) if year == 2014 else lines(METADATA_2018))
    paths[0].write_bytes(pack(reviews if isinstance(reviews, bytes) else lines(reviews)))
    paths[1].write_bytes(pack(metadata))
    return paths


def test_categories():
    assert len(amazon.CATEGORIES[2014]) == len(set(amazon.CATEGORIES[2014])) == 24
    assert len(amazon.CATEGORIES[2018]) == len(set(amazon.CATEGORIES[2018])) == 29
    for year, names in amazon.CATEGORIES.items():
        assert all(amazon.resolve(f"{year}/{name}") == (year, name) for name in names)
    every = {name for names in amazon.CATEGORIES.values() for name in names}
    assert all(set(aliases.values()) <= every for aliases in amazon.ALIASES.values())


@pytest.mark.parametrize(
    "text, expected",
    [
        ("toys", (2014, "Toys_and_Games")),
        ("2018/Toys", (2018, "Toys_and_Games")),
        ("2014/toys_AND_games", (2014, "Toys_and_Games")),
        ("2018/Cell Phones and Accessories", (2018, "Cell_Phones_and_Accessories")),
        ("CellPhones", (2014, "Cell_Phones_and_Accessories")),
        ("beauty", (2014, "Beauty")),
        ("2018/beauty", (2018, "All_Beauty")),
        ("ARTS", (2018, "Arts_Crafts_and_Sewing")),
        ("scientific", (2018, "Industrial_and_Scientific")),
    ],
)
def test_resolve(text, expected):
    assert amazon.resolve(text) == expected


@pytest.mark.parametrize("text", ["", "2014/arts", "2018/Beauty_and_more", "2013/toys", "x/2014/toys", "toyz"])
def test_unknown_category(text):
    with pytest.raises(InputError, match=r"^unknown Amazon category .*2014: Amazon_Instant_Video, .*; 2018: AMAZON_FASHION, .*toys"):
        amazon.load(category=text)


def test_addresses():
    assert amazon.addresses(2014, "Beauty") == {
        "interactions": "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/reviews_Beauty_5.json.gz",
        "items": "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/meta_Beauty.json.gz",
    }
    assert amazon.addresses(2018, "Prime_Pantry") == {
        "interactions": "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/categoryFilesSmall/Prime_Pantry_5.json.gz",
        "items": "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/metaFiles2/meta_Prime_Pantry.json.gz",
    }


@pytest.mark.parametrize(
    "year, items, counted",
    [
        (2014, ITEMS_2014, "1 of them without metadata, 2 without a title (in 0 it is a script); 0 repeated metadata lines"),
        (2018, ITEMS_2018, "1 of them without metadata, 2 without a title (in 1 it is a script); 1 repeated metadata lines"),
    ],
)
def test_load(tmp_path, capsys, year, items, counted):
    paths = write(tmp_path / "gz", year)
    tables = amazon.load(tmp_path / "gz", f"{year}/{'toys' if year == 2014 else 'arts'}", tmp_path / "tfds")
    assert tables.interactions.equals(INTERACTIONS) and tables.interactions.schema == INTERACTIONS.schema
    assert tables.items.equals(items)
    assert (tables.interactions_name, tables.items_name) == tuple(map(str, paths))
    printed = capsys.readouterr().out
    assert f"6 reviews, 4 items, {counted}" in printed
    assert all(f"{path}: SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}" in printed for path in paths)

    write(tmp_path / "plain", year, pack=bytes)
    plain = amazon.load(tmp_path / "plain", "", tmp_path / "tfds")  # the only category in the folder
    assert plain.interactions.equals(INTERACTIONS) and plain.items.equals(items) and plain.fingerprint == tables.fingerprint


def test_prepared_once_and_by_content(tmp_path, monkeypatch):
    write(tmp_path / "originals", 2014)
    first = amazon.load(tmp_path / "originals", "toys", tmp_path / "tfds")
    with monkeypatch.context() as patch:
        patch.setattr(amazon, "parse_reviews", None)  # so that parsing again fails
        again = amazon.load(tmp_path / "originals", "toys", tmp_path / "tfds")
        write(tmp_path / "originals", 2014, metadata=lines(METADATA_2014[:1], repr))
        with pytest.raises(TypeError):
            amazon.load(tmp_path / "originals", "toys", tmp_path / "tfds")
    assert again.items.equals(first.items) and again.interactions.equals(INTERACTIONS)
    other = amazon.load(tmp_path / "originals", "toys", tmp_path / "tfds")
    assert other.items["title"].to_list() == ["", "Dolls & Bears, 12\" 'Max'", "", ""]
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_parse_reviews():
    assert list(amazon.parse_reviews([json.dumps(r).encode() for r in REVIEWS[:2]])) == [
        ("A1", "B00B", 1388534400, 5.0),
        ("A1", "B00A", 1388534400, 1.0),
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[1]",
        b'{"asin": "B"}',
        b'{"reviewerID": "A", "asin": "B", "unixReviewTime": "1", "overall": 5.0}',
        b'{"reviewerID": "A", "asin": "B", "unixReviewTime": 1.5, "overall": 5.0}',
        b'{"reviewerID": "A", "asin": "B", "unixReviewTime": 9223372036854775808, "overall": 5.0}',
        b'{"reviewerID": "A", "asin": "B", "unixReviewTime": 1, "overall": null}',
        b'{"reviewerID": "A", "asin": "", "unixReviewTime": 1, "overall": 5.0}',
        b'{"reviewerID": 7, "asin": "B", "unixReviewTime": 1, "overall": 5.0}',
        b'{"reviewerID": "A\\n", "asin": "B", "unixReviewTime": 1, "overall": 5.0}',
        b'{"reviewerID": "\xff", "asin": "B", "unixReviewTime": 1, "overall": 5.0}',
        b"__import__('os').getpid()",
    ],
)
def test_malformed_review(line):
    with pytest.raises(InputError, match=r"^here\.json: line 2: expected a review with reviewerID, .*, found b"):
        list(amazon.parse_reviews([json.dumps(REVIEWS[0]).encode(), line], "here.json"))


@pytest.mark.parametrize(
    "line",
    [b"{'asin': 'B00A', 'title': __import__('os').getcwd()}\n", b"{'asin': 'B00A', 'title': 'cut", b"{'title': 'x'}", b"\n"],
)
def test_malformed_metadata(line):
    with pytest.raises(InputError, match=r"^meta: line 3: expected a product with asin, found b"):
        amazon.parse_metadata([b"{'asin': 'B99Z', 'title'\n", b"{'asin': 'B00A'}\n", line], {"B00A"}, {}, "meta")


def test_metadata_texts():
    records = [
        b'{ "asin": "1", "title": "Tom &amp;amp; Jerry", "category": "Games"}',
        b"{'title': \"'asin': 'x'\", 'asin': '2'}",
        b'{"asin": "3", "title": "half \\ud83d", "brand": null, "category": ["A", " ", "B"]}',
    ]
    assert amazon.parse_metadata(records, {"1", "2", "3"}, {}) == {
        "1": ("Tom &amp; Jerry", "", "Games"),
        "2": ("'asin': 'x'", "", ""),
        "3": ("half ?", "", "A > B"),
    }


@pytest.mark.parametrize("present", [[], ["reviews_Toys_and_Games_5.json.gz"], ["meta_Toys_and_Games.json"]])
def test_missing_files(tmp_path, present):
    for name in present:
        (tmp_path / name).touch()
    absent = {"reviews_Toys_and_Games_5.json.gz", "meta_Toys_and_Games.json.gz"} - {
        *present,
        *(name + ".gz" for name in present),
    }
    with pytest.raises(InputError, match=rf"^{tmp_path}: no .*expected meta_\{{category\}}\.json\.gz and, for the 2014") as error:
        amazon.load(tmp_path, "toys", tmp_path / "tfds")
    assert all(name in str(error.value) for name in absent)


def test_which_category(tmp_path):
    with pytest.raises(InputError, match="no Amazon reviews in this folder"):
        amazon.load(tmp_path, "", tmp_path / "tfds")
    write(tmp_path, 2014)
    write(tmp_path, 2018)
    with pytest.raises(InputError, match=r"several categories in this folder: '2014/Toys_and_Games', '2018/Arts_Crafts_and_Sewing'"):
        amazon.load(tmp_path, "", tmp_path / "tfds")


def test_bad_files(tmp_path):
    reviews, metadata = write(tmp_path, 2014, reviews=lines(REVIEWS) + b"nonsense\n")
    with pytest.raises(InputError, match=rf"^{reviews}: line 7: expected a review"):
        amazon.load(tmp_path, "toys", tmp_path / "tfds")
    write(tmp_path, 2014)
    metadata.write_bytes(metadata.read_bytes()[:-20])
    with pytest.raises(InputError, match=rf"^{metadata}: damaged or incomplete .*; remove {metadata} and fetch it again$"):
        amazon.load(tmp_path, "toys", tmp_path / "tfds")
    assert not [path for path in (tmp_path / "tfds").rglob("2014_Toys_and_Games/*")]


def test_download(tmp_path, monkeypatch, capsys):
    """Without a path, both addresses are requested, and no checksum is required."""
    originals = dict(zip(amazon.addresses(2014, "Toys_and_Games").values(), write(tmp_path / "web", 2014), strict=True))
    asked = []

    def download(self, url):
        asked.append(url)
        assert not self._url_infos.get(url) and not self._register_checksums
        return originals[url]

    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    for _ in range(2):
        tables = amazon.load(category="toys", data_dir=tmp_path / "tfds")
        assert tables.interactions.equals(INTERACTIONS) and tables.items.equals(ITEMS_2014)
    assert asked == list(originals) == [tables.interactions_name, tables.items_name]
    address, path = next(iter(originals.items()))
    assert f"{address}: SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}" in capsys.readouterr().out

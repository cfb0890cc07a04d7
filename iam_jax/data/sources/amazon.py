"""Amazon's product reviews, 2014 and 2018, from the original five-core reviews and metadata files.

    tables = amazon.load(category="2014/Toys_and_Games")          # or "toys"; downloads both files, once
    tables = amazon.load("~/Downloads", "2018/arts")              # from the files of a folder instead

An item's text columns are `title`, `brand` and `category`, which is a path: "Toys & Games > Puzzles > Jigsaw Puzzles" (the 2014 release
may have several; then it is the first of the longest). Text is unescaped once ("&amp;" is "&") and its white space collapsed. Prices
and descriptions are left out: many 2018 prices are page scripts, and descriptions would outweigh all other text.
"""

import ast
import gzip
import html
import json
import re
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from iam_jax.config import DataConfig
from iam_jax.data import tables as tables_lib
from iam_jax.data.sources import Source
from iam_jax.data.sources.originals import Event, Files, Originals, malformed, reading
from iam_jax.data.tables import Tables
from iam_jax.errors import InputError, quote_first

_BOTH = (
    "Automotive Books CDs_and_Vinyl Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Digital_Music Electronics "
    "Grocery_and_Gourmet_Food Home_and_Kitchen Kindle_Store Movies_and_TV Musical_Instruments Office_Products "
    "Patio_Lawn_and_Garden Pet_Supplies Sports_and_Outdoors Tools_and_Home_Improvement Toys_and_Games Video_Games"
).split()
_ONLY_2014 = "Amazon_Instant_Video Apps_for_Android Baby Beauty Health_and_Personal_Care".split()
_ONLY_2018 = (
    "AMAZON_FASHION All_Beauty Appliances Arts_Crafts_and_Sewing Gift_Cards Industrial_and_Scientific Luxury_Beauty "
    "Magazine_Subscriptions Prime_Pantry Software"
).split()
CATEGORIES = {  # release -> every category with a five-core file
    2014: sorted([*_BOTH, *_ONLY_2014]),
    2018: sorted([*_BOTH, *_ONLY_2018]),
}
_SHORT = {
    "apps": "Apps_for_Android",
    "arts": "Arts_Crafts_and_Sewing",
    "cds": "CDs_and_Vinyl",
    "cellphones": "Cell_Phones_and_Accessories",
    "clothing": "Clothing_Shoes_and_Jewelry",
    "fashion": "AMAZON_FASHION",
    "food": "Grocery_and_Gourmet_Food",
    "games": "Video_Games",
    "garden": "Patio_Lawn_and_Garden",
    "grocery": "Grocery_and_Gourmet_Food",
    "health": "Health_and_Personal_Care",
    "home": "Home_and_Kitchen",
    "instruments": "Musical_Instruments",
    "kindle": "Kindle_Store",
    "luxury": "Luxury_Beauty",
    "magazines": "Magazine_Subscriptions",
    "movies": "Movies_and_TV",
    "music": "Digital_Music",
    "office": "Office_Products",
    "pantry": "Prime_Pantry",
    "pets": "Pet_Supplies",
    "phones": "Cell_Phones_and_Accessories",
    "scientific": "Industrial_and_Scientific",
    "sports": "Sports_and_Outdoors",
    "tools": "Tools_and_Home_Improvement",
    "toys": "Toys_and_Games",
    "video": "Amazon_Instant_Video",
}
ALIASES = {2014: _SHORT, 2018: _SHORT | {"beauty": "All_Beauty"}}

LAYOUT = (
    "meta_{category}.json.gz and, for the 2014 release, reviews_{category}_5.json.gz or, for 2018, {category}_5.json.gz "
    "(also unpacked, without .gz)"
)
_SNAP = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
_UCSD = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2"  # the certificate of the older jmcauley.ucsd.edu has expired
_ADDRESSES = {  # {} is the category
    2014: {"interactions": f"{_SNAP}/reviews_{{}}_5.json.gz", "items": f"{_SNAP}/meta_{{}}.json.gz"},
    2018: {"interactions": f"{_UCSD}/categoryFilesSmall/{{}}_5.json.gz", "items": f"{_UCSD}/metaFiles2/meta_{{}}.json.gz"},
}


def resolve(category: str) -> tuple[int, str]:
    """(release, name) of a category written like "2018/Arts_Crafts_and_Sewing", "2018/arts" or "toys", in upper or lower case.

    Without a release it is 2014 if that release has the category, else 2018. Raises InputError for an unknown category.
    """
    year, _, short = category.strip().rpartition("/")

    def key(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    for release, categories in CATEGORIES.items():
        names = ALIASES[release] | {key(name): name for name in categories}
        if year in ("", str(release)) and (name := names.get(key(short))) in categories:
            return release, name
    valid = "; ".join(f"{release}: {', '.join(names)}" for release, names in CATEGORIES.items())
    short = ", ".join(sorted({*_SHORT, "beauty"}))
    raise InputError(f"unknown Amazon category {category!r}; valid are, after 2014/ or 2018/, {valid}; for short {short}")


def addresses(year: int, category: str) -> dict[str, str]:
    """The addresses of the originals. Their last parts are the file names."""
    return {split: address.format(category) for split, address in _ADDRESSES[year].items()}


def read_lines(path: Path, name: str) -> Iterator[bytes]:
    """The lines of a file, gzipped or not."""
    with open(path, "rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    with reading(path, name), gzip.open(path) if gzipped else open(path, "rb") as file:
        yield from file


def parse_record(line: bytes) -> dict:
    """A line as a dict. It is JSON or, in the 2014 metadata, a Python literal. Raises ValueError for anything else."""
    try:
        record = json.loads(line) if line[1:].lstrip().startswith(b'"') else ast.literal_eval(line.decode())
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(record, dict):
        raise ValueError("not a record")
    return record


def parse_reviews(lines: Iterable[bytes], name: str = "reviews") -> Iterator[Event]:
    """Review lines as events. Repeated (user, item) pairs stay."""
    for number, line in enumerate(lines, 1):
        try:
            review = parse_record(line)
            user, item, timestamp = review["reviewerID"], review["asin"], review["unixReviewTime"]
            fits = type(timestamp) is int and timestamp.bit_length() < 64 and user.split() == [user] and item.split() == [item]
            event = user, item, timestamp, float(review["overall"])
        except (ValueError, KeyError, TypeError, AttributeError):
            fits = False
        if not fits:
            raise malformed(name, number, "a review with reviewerID, asin, unixReviewTime and overall", line)
        yield event


_ASIN = re.compile(rb"""["']asin["']:\s*["']([^"']+)["']""")


def parse_metadata(
    lines: Iterable[bytes], wanted: Container[str], counts: dict[str, int], name: str = "metadata"
) -> dict[str, tuple[str, str, str]]:
    """Metadata lines as {item: (title, brand, category)} of the `wanted` items; missing text is "".

    Lines of other items, most of the file, are not parsed. If an item has several lines, the first counts. Some titles of the 2018 release
    are pieces of a page script (they contain `getTime`); they count as missing. `counts` receives the numbers of `repeated_metadata`
    lines and of `script_titles`.
    """
    texts: dict[str, tuple[str, str, str]] = {}
    counts |= {"repeated_metadata": 0, "script_titles": 0}
    for number, line in enumerate(lines, 1):
        found = _ASIN.findall(line)
        if found and not any(item.decode(errors="replace") in wanted for item in found):
            continue
        try:
            record = parse_record(line)
            item = record["asin"]
        except (ValueError, KeyError):
            raise malformed(name, number, "a product with asin", line) from None
        if item not in wanted:
            continue
        if item in texts:
            counts["repeated_metadata"] += 1
            continue
        title = clean(record.get("title"))
        if "getTime" in title:
            counts["script_titles"] += 1
            title = ""
        paths = record.get("categories") or [record.get("category") or []]
        texts[item] = title, clean(record.get("brand")), category_path(paths)
    return texts


def clean(text: object) -> str:
    """Text in one line, without HTML entities; "" for None."""
    text = "" if text is None else str(text).encode(errors="replace").decode()  # JSON may contain halves of surrogate pairs
    return " ".join(html.unescape(text).split())


def category_path(paths: list) -> str:
    """The first of the longest paths, "A > B > C"."""
    longest = max(([path] if isinstance(path, str) else path for path in paths), key=len)
    return " > ".join(filter(None, map(clean, longest)))


class Amazon(Originals):
    """Five-core reviews of a category, and the texts of the reviewed items. Items without metadata have empty texts."""

    name = "iam_amazon"
    text = ("title", "brand", "category")

    def __init__(self, year: int, category: str, files: Files | None = None):
        super().__init__(files)
        self.variant = f"{year}_{category}"
        self._urls = addresses(year, category)

    def urls(self) -> dict[str, str]:
        return self._urls

    def events(self, files: Files) -> Iterator[Event]:
        name = self.called("interactions")
        self._reviewed: set[str] = set()
        for event in parse_reviews(read_lines(files["interactions"], name), name):
            self._reviewed.add(event[1])
            yield event

    def items(self, files: Files) -> Iterator[tuple[str, str, str, str]]:
        name = self.called("items")
        texts = parse_metadata(read_lines(files["items"], name), self._reviewed, self.counts, name)
        rows = [(item, *texts.get(item, ("", "", ""))) for item in sorted(self._reviewed)]
        self.counts["without_metadata"] = len(rows) - len(texts)
        self.counts["without_title"] = sum(not title for _, title, _, _ in rows)
        return iter(rows)


def find(path: str, category: str) -> tuple[int, str, dict[str, Path]]:
    """(release, category, originals) in the folder `path`. If `category` is empty, it is the only one in the folder.

    Raises InputError for an unknown category, missing files, and a choice of several categories.
    """
    folder = Path(path).expanduser()

    def present(year: int, name: str) -> dict[str, Path]:
        files = {split: folder / address.rpartition("/")[2] for split, address in addresses(year, name).items()}
        files = {split: file if file.is_file() else file.with_suffix("") for split, file in files.items()}
        return {split: file for split, file in files.items() if file.is_file()}

    if category:
        candidates = [resolve(category)]
    else:
        every = [(year, name) for year, names in CATEGORIES.items() for name in names]
        candidates = [(year, name) for year, name in every if "interactions" in present(year, name)]
    if len(candidates) > 1:
        which = quote_first(f"{year}/{name}" for year, name in candidates)
        raise InputError(f"{path}: reviews of several categories in this folder: {which}; name one of them in data.category")
    if not candidates:
        raise InputError(f"{path}: no Amazon reviews in this folder; expected {LAYOUT}; or tables: {tables_lib.LAYOUT}")
    ((year, name),) = candidates
    files = present(year, name)
    if len(files) < 2:
        missing = [address.rpartition("/")[2] for split, address in addresses(year, name).items() if split not in files]
        raise InputError(f"{path}: no {' and no '.join(missing)} in this folder; expected {LAYOUT}; or tables: {tables_lib.LAYOUT}")
    return year, name, files


def load(path: str = "", category: str = "", data_dir: str = "") -> Tables:
    """A category's reviews and items (`title`, `brand`, `category`). Timestamps are unix seconds, of day resolution.

    Args:
        path: folder with the two original files; empty: they are downloaded.
        category: see `resolve`; may be empty if `path` holds one category only.
        data_dir: the folder where TFDS keeps downloads and prepared data; empty: TFDS's default.

    Raises:
        InputError: an unknown category, missing, malformed or damaged files, or a download that failed.
    """
    from iam_jax.data.sources.tfds_tables import prepared

    year, name, files = find(path, category) if path else (*resolve(category), None)
    builder = prepared(Amazon(year, name, files), data_dir)
    n = builder.facts["counts"]
    print(
        f"Amazon {year}/{name}: {n['interactions']:,} reviews, {n['items']:,} items, "
        f"{n['without_metadata']:,} of them without metadata, {n['without_title']:,} without a title "
        f"(in {n['script_titles']:,} it is a script); {n['repeated_metadata']:,} repeated metadata lines"
    )
    for split, sha256 in builder.facts["originals"].items():
        print(f"  {builder.originals.called(split)}: SHA-256 {sha256}")
    return builder.tables()


def _check(config: DataConfig) -> None:
    if not (config.category or config.path):
        raise InputError(f"config.data.category = {config.category!r}: which one? For example 2014/Toys_and_Games")


AMAZON = Source(
    name="amazon",
    meaning="a category of Amazon's product reviews of 2014 or 2018, downloaded or from its original files",
    load=lambda config, cache: load(config.path, config.category, str(cache / "tensorflow_datasets")),
    check=_check,
    layout=LAYOUT,
    accepts_tables=True,
)

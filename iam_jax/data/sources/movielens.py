"""MovieLens 1M from GroupLens's own archive.

tables = movielens.load()                       # downloads ml-1m.zip, once
tables = movielens.load(path="~/Downloads")     # from the files of a folder instead
"""

import contextlib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

from iam_jax.data import tables as tables_lib
from iam_jax.data.sources import Source
from iam_jax.data.sources.originals import Checksum, Event, Files, Originals, malformed, reading
from iam_jax.data.tables import Tables
from iam_jax.errors import InputError

URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
LAYOUT = "ml-1m.zip, or ratings.dat and movies.dat (in the folder itself or in its ml-1m/)"
MEMBERS = {"interactions": "ratings.dat", "items": "movies.dat"}


def parse_ratings(lines: Iterable[str], name: str = MEMBERS["interactions"]) -> Iterator[Event]:
    """Lines `UserID::MovieID::Rating::Timestamp` as events."""
    for number, line in enumerate(lines, 1):
        try:
            user, item, rating, timestamp = line.rstrip("\r\n").split("::")
            event = user, item, int(timestamp), float(rating)
            fits = user and item and event[2].bit_length() < 64
        except ValueError:
            fits = False
        if not fits:
            raise malformed(name, number, "UserID::MovieID::Rating::Timestamp", line)
        yield event


def parse_movies(lines: Iterable[str], name: str = MEMBERS["items"]) -> Iterator[tuple[str, str, str]]:
    """Lines `MovieID::Title::Genres` as (item, title, genres), the text unchanged."""
    for number, line in enumerate(lines, 1):
        fields = tuple(line.rstrip("\r\n").split("::"))
        if len(fields) != 3 or not fields[0]:
            raise malformed(name, number, "MovieID::Title::Genres", line)
        yield fields


def read_lines(path: Path, member: str, name: str) -> Iterator[str]:
    """The lines of `ml-1m/{member}` in the zip `path`, or of the plain file `path`; both are ISO-8859-1."""
    with reading(path, name), contextlib.ExitStack() as stack:
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            if f"ml-1m/{member}" not in archive.namelist():
                raise InputError(f"{name}: no ml-1m/{member} in this archive")
            file = stack.enter_context(archive.open(f"ml-1m/{member}"))
        else:
            file = stack.enter_context(open(path, "rb"))
        for line in file:  # not str.splitlines, which also splits at control characters of ISO-8859-1
            yield line.decode("iso-8859-1")


class MovieLens1M(Originals):
    """1,000,209 ratings of 3,883 movies (177 of them never rated) by 6,040 users."""

    name = "iam_ml1m"
    text = ("title", "genres")
    # Size and SHA-256 as TFDS publishes them for its own builder; GroupLens gives the MD5, c4d9eecfca2ab87c1945afe126590906.
    checksums: ClassVar[dict[str, Checksum]] = {
        URL: Checksum(5_917_549, "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20", "ml-1m.zip")
    }

    def urls(self) -> dict[str, str]:
        return dict.fromkeys(MEMBERS, URL)  # one archive, downloaded once

    def called(self, split: str) -> str:
        name = super().called(split)
        return f"{name} ({MEMBERS[split]})" if name.endswith(".zip") else name

    def events(self, files: Files) -> Iterator[Event]:
        name = self.called("interactions")
        return parse_ratings(read_lines(files["interactions"], MEMBERS["interactions"], name), name)

    def items(self, files: Files) -> Iterator[tuple[str, str, str]]:
        name = self.called("items")
        return parse_movies(read_lines(files["items"], MEMBERS["items"], name), name)


def find(path: str) -> dict[str, Path]:
    """The originals in the folder `path`. Raises an InputError that shows the layouts."""
    folder = Path(path).expanduser()
    if (folder / "ml-1m.zip").is_file():
        return dict.fromkeys(MEMBERS, folder / "ml-1m.zip")
    for place in (folder, folder / "ml-1m"):
        files = {split: place / member for split, member in MEMBERS.items()}
        if all(file.is_file() for file in files.values()):
            return files
    raise InputError(f"{path}: no MovieLens 1M in this folder; expected {LAYOUT}; or tables: {tables_lib.LAYOUT}")


def load(path: str = "", data_dir: str = "") -> Tables:
    """MovieLens 1M: items with `title` and `genres` ("Animation|Children's|Comedy"), timestamps in unix seconds.

    Args:
        path: folder with the original files; empty: they are downloaded.
        data_dir: the folder where TFDS keeps downloads and prepared data; empty: TFDS's default.

    Raises:
        InputError: missing, malformed or damaged files, or a download that failed.
    """
    from iam_jax.data.sources.tfds_tables import prepared

    builder = prepared(MovieLens1M(find(path) if path else None), data_dir)
    counts = builder.facts["counts"]
    print(f"MovieLens 1M: {counts['interactions']:,} ratings, {counts['items']:,} movies")
    return builder.tables()


ML1M = Source(
    name="ml1m",
    meaning="MovieLens 1M, downloaded or from its archive",
    load=lambda config, cache: load(config.path, str(cache / "tensorflow_datasets")),
    layout=LAYOUT,
    accepts_tables=True,
)

"""The MovieLens source: parsing, folder layouts, the download, and the data kept between runs."""

import functools
import hashlib
import http.server
import threading
import zipfile
from pathlib import Path

import polars as pl
import pytest
from tensorflow_datasets.core.download import checksums

from iam_jax.data.sources import movielens, tfds_tables
from iam_jax.data.sources.originals import Checksum
from iam_jax.errors import InputError

RATINGS = "1::20::5::978300760\n1::10::3::978302109\n2::10::4::978301968\n1::20::1::978300760\n"
MOVIES = "10::Misérables, Les (1995)::Drama|Musical\n20::Toy Story (1995)::Animation|Children's|Comedy\n30::Unseen (2000)::Drama\n"
INTERACTIONS = pl.DataFrame(
    {
        "user": ["1", "1", "2", "1"],
        "item": ["20", "10", "10", "20"],
        "timestamp": [978300760, 978302109, 978301968, 978300760],
    }
)
ITEMS = pl.DataFrame(
    {
        "item": ["10", "20", "30"],
        "title": ["Misérables, Les (1995)", "Toy Story (1995)", "Unseen (2000)"],
        "genres": ["Drama|Musical", "Animation|Children's|Comedy", "Drama"],
    }
)


def write_zip(folder: Path, ratings: str = RATINGS, movies: str = MOVIES) -> Path:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "ml-1m.zip", "w") as archive:
        archive.writestr("ml-1m/ratings.dat", ratings.encode("iso-8859-1"))
        archive.writestr("ml-1m/movies.dat", movies.encode("iso-8859-1"))
        archive.writestr("ml-1m/users.dat", "1::F::1::10::48067\n")
    return folder / "ml-1m.zip"


def write_plain(folder: Path, ratings: str = RATINGS, movies: str = MOVIES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ratings.dat").write_bytes(ratings.encode("iso-8859-1"))
    (folder / "movies.dat").write_bytes(movies.encode("iso-8859-1"))


def expect(tables) -> None:
    assert tables.interactions.equals(INTERACTIONS) and tables.interactions.schema == INTERACTIONS.schema
    assert tables.items.equals(ITEMS)


@pytest.fixture
def server(tmp_path):
    """A local web server for tmp_path/"web": (address, requested paths)."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    (tmp_path / "web").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "web")) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}", asked
        web.shutdown()


def test_parse_ratings():
    assert list(movielens.parse_ratings(["1::20::5::978300760\n", "6040::3::3.5::0\r\n"])) == [
        ("1", "20", 978300760, 5.0),
        ("6040", "3", 0, 3.5),
    ]


@pytest.mark.parametrize(
    "line",
    ["1::2::3", "1::2::3::4::5", "1::2::x::4", "1::2::3::4.5", "::2::3::4", "1::::3::4", "", "1,2,3,4", f"1::2::3::{2**63}"],
)
def test_malformed_rating(line):
    with pytest.raises(InputError, match=r"^here\.dat: line 2: expected UserID::MovieID::Rating::Timestamp, found "):
        list(movielens.parse_ratings(["1::2::3::4\n", line + "\n"], "here.dat"))


@pytest.mark.parametrize("line", ["1::Title", "1::Title::Drama::more", "::Title::Drama", ""])
def test_malformed_movie(line):
    with pytest.raises(InputError, match=r"^movies\.dat: line 1: expected MovieID::Title::Genres, found "):
        list(movielens.parse_movies([line]))


def test_real_movies():
    path = Path(__file__).parents[2] / "shared" / "data" / "movielens-original" / "movies.dat"
    if not path.is_file():
        pytest.skip("GroupLens's movies.dat is not here")
    movies = list(movielens.parse_movies(movielens.read_lines(path, "movies.dat", "movies.dat")))
    assert len(movies) == 3883 and len({item for item, _, _ in movies}) == 3883
    assert movies[0] == ("1", "Toy Story (1995)", "Animation|Children's|Comedy")
    assert ("73", "Misérables, Les (1995)", "Drama|Musical") in movies
    genres = {genre for _, _, genres in movies for genre in genres.split("|")}
    assert len(genres) == 18  # the number in the README of GroupLens


def test_movies_in_iso_8859_1(tmp_path):
    """What test_real_movies asserts, wherever it runs."""
    (tmp_path / "movies.dat").write_bytes("1::Toy Story (1995)::Animation|Comedy\n73::Misérables, Les (1995)::Drama\n".encode("iso-8859-1"))
    movies = list(movielens.parse_movies(movielens.read_lines(tmp_path / "movies.dat", "movies.dat", "movies.dat")))
    assert movies == [("1", "Toy Story (1995)", "Animation|Comedy"), ("73", "Misérables, Les (1995)", "Drama")]


def test_zip_and_extracted_files_are_the_same_data(tmp_path, capsys):
    archive = write_zip(tmp_path / "zip")
    write_plain(tmp_path / "plain")
    write_plain(tmp_path / "extracted" / "ml-1m")
    zipped, plain, extracted = (movielens.load(tmp_path / kind, tmp_path / "tfds") for kind in ("zip", "plain", "extracted"))
    for tables in (zipped, plain, extracted):
        expect(tables)
    assert zipped.fingerprint == plain.fingerprint == extracted.fingerprint and len(zipped.fingerprint) == 64
    assert (zipped.interactions_name, zipped.items_name) == (f"{archive} (ratings.dat)", f"{archive} (movies.dat)")
    assert plain.items_name == str(tmp_path / "plain" / "movies.dat")
    assert "MovieLens 1M: 4 ratings, 3 movies" in capsys.readouterr().out


def test_several_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_tables, "BLOCK", 3)
    write_zip(tmp_path / "zip")
    expect(movielens.load(tmp_path / "zip", tmp_path / "tfds"))


def test_prepared_once_and_by_content(tmp_path, monkeypatch):
    write_zip(tmp_path / "zip")
    first = movielens.load(tmp_path / "zip", tmp_path / "tfds")
    with monkeypatch.context() as patch:
        patch.setattr(movielens, "parse_ratings", None)  # so that parsing again fails
        again = movielens.load(tmp_path / "zip", tmp_path / "tfds")
        write_zip(tmp_path / "zip", ratings=RATINGS + "2::30::4::978301999\n")
        with pytest.raises(TypeError):
            movielens.load(tmp_path / "zip", tmp_path / "tfds")
    expect(again)
    other = movielens.load(tmp_path / "zip", tmp_path / "tfds")
    assert other.interactions.row(4) == ("2", "30", 978301999) and len(other.interactions) == 5
    assert first.fingerprint == again.fingerprint != other.fingerprint
    write_zip(tmp_path / "zip")
    expect(movielens.load(tmp_path / "zip", tmp_path / "tfds"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError])
def test_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch, error):
    def breaks(lines, name):
        yield "10", "Half", "Drama"
        raise error("stop")

    write_zip(tmp_path / "zip")
    with monkeypatch.context() as patch, pytest.raises(error, match=r"^stop$"):
        patch.setattr(movielens, "parse_movies", breaks)
        movielens.load(tmp_path / "zip", tmp_path / "tfds")
    assert not [path for path in (tmp_path / "tfds").rglob("*") if path.is_file()]
    expect(movielens.load(tmp_path / "zip", tmp_path / "tfds"))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"ratings": "1::20::5::1\nnonsense\n"},
            r"ml-1m\.zip \(ratings\.dat\): line 2: expected UserID::.*found 'nonsense\\n'$",
        ),
        ({"movies": "1::20\n"}, r"ml-1m\.zip \(movies\.dat\): line 1: expected MovieID::"),
        ({"ratings": ""}, r"ml-1m\.zip \(ratings\.dat\): no interactions in this file$"),
    ],
)
def test_bad_archive(tmp_path, change, message):
    write_zip(tmp_path / "zip", **change)
    with pytest.raises(InputError, match=message):
        movielens.load(tmp_path / "zip", tmp_path / "tfds")


def test_missing_files(tmp_path):
    (tmp_path / "ratings.dat").write_text(RATINGS)
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=rf"^{folder}: no MovieLens 1M in this folder; expected ml-1m\.zip, or ratings\.dat"):
            movielens.load(folder, tmp_path / "tfds")


def test_damaged_archive(tmp_path):
    archive = write_zip(tmp_path / "zip")
    content = archive.read_bytes()
    archive.write_bytes(content.replace(b"978302109", b"978302100"))  # stored uncompressed, so its CRC is now wrong
    assert archive.read_bytes() != content
    with pytest.raises(InputError, match=r"ratings\.dat\): damaged or incomplete \(Bad CRC-32.*; remove .*ml-1m\.zip and fetch"):
        movielens.load(tmp_path / "zip", tmp_path / "tfds")


def test_registered_checksum_is_the_published_one():
    assert checksums.UrlInfo(*movielens.MovieLens1M.checksums[movielens.URL]) == checksums.get_all_url_infos()[movielens.URL]
    assert movielens.URL == "https://files.grouplens.org/datasets/movielens/ml-1m.zip"


def test_download(tmp_path, monkeypatch, server):
    address, asked = server
    content = write_zip(tmp_path / "web").read_bytes()
    url = f"{address}/ml-1m.zip"
    monkeypatch.setattr(movielens, "URL", url)

    wrong = Checksum(len(content), "0" * 64, "ml-1m.zip")
    monkeypatch.setattr(movielens.MovieLens1M, "checksums", {url: wrong})
    with pytest.raises(InputError, match=rf"^{url}: the download failed \(NonMatchingChecksumError: .*by hand.*--config\.data\.path"):
        movielens.load(data_dir=tmp_path / "tfds")

    right = Checksum(len(content), hashlib.sha256(content).hexdigest(), "ml-1m.zip")
    monkeypatch.setattr(movielens.MovieLens1M, "checksums", {url: right})
    asked.clear()
    for _ in range(2):
        tables = movielens.load(data_dir=tmp_path / "tfds")
        expect(tables)
        assert tables.interactions_name == f"{url} (ratings.dat)"
    assert len(asked) == 1
    write_plain(tmp_path / "plain")
    assert movielens.load(tmp_path / "plain", tmp_path / "tfds").fingerprint == tables.fingerprint


def test_download_fails(tmp_path, monkeypatch, server):
    monkeypatch.setattr(movielens, "URL", f"{server[0]}/absent.zip")
    with pytest.raises(InputError, match=r"absent\.zip: the download failed \(DownloadError: .*404.*by hand"):
        movielens.load(data_dir=tmp_path / "tfds")

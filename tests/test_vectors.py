"""Content vectors: read exactly or refused, centred, whitened and computed from text as plain NumPy does it, and kept for new items."""

import dataclasses
import itertools
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from helpers import make_config, write_shop
from test_prepare import COLUMNS, EVENTS, ITEMS, write

from iam_jax.config import DataConfig, SyntheticConfig
from iam_jax.data import vectors as vectors_lib
from iam_jax.data.assumed import Assumption, assume
from iam_jax.data.catalogue import Catalogue, shuffled_rows
from iam_jax.data.prepare import prepare
from iam_jax.data.sources import synthetic
from iam_jax.data.stored import Stored, add_items, read_stored
from iam_jax.data.tfidf import fit_words, token_svd
from iam_jax.data.vectors import Vectors, read_vectors, statistics
from iam_jax.errors import InputError
from iam_jax.runs.workdir import open_workdir
from iam_jax.serving.inputs import Reader

DATA = Path(__file__).parents[2] / "shared" / "data"
IDS = ["007", "a", "b", "木 "]  # the catalogue's order
RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, 3)).astype(np.float32)


def save(path: Path, ids, x, dtype=None) -> Path:
    path.parent.mkdir(exist_ok=True)
    pl.DataFrame({"item": ids, "vector": pl.Series(x if isinstance(x, list) else list(x), dtype=dtype)}).write_parquet(path)
    return path


@pytest.fixture
def config(tmp_path):
    """Four items with vectors in a file; the vectors of items that are not in the catalogue come first."""
    write(tmp_path / "data", "interactions", COLUMNS["interactions"], EVENTS)
    write(tmp_path / "data", "items", COLUMNS["items"], ITEMS)
    save(tmp_path / "v.parquet", ["x", "y", *reversed(IDS), "a"], np.concatenate([X[:2] + 1, X[::-1], X[1:2]]), pl.List(pl.Float32))
    cache = str(tmp_path / "cache")
    return DataConfig(path=str(tmp_path / "data"), cache=cache, vocabulary=300, row_tokens=128, vectors=str(tmp_path / "v.parquet"))


def same(first: Vectors, second: Vectors):
    for field in dataclasses.fields(Vectors):
        left, right = getattr(first, field.name), getattr(second, field.name)
        if field.name == "words":
            assert (left is None) == (right is None)
            if left is not None:
                assert left.words == right.words
                np.testing.assert_array_equal(left.idf_W, right.idf_W)
                np.testing.assert_array_equal(left.right_WP, right.right_WP)
        else:
            np.testing.assert_array_equal(left, right)


# ---- files


def test_vectors_are_in_the_order_of_the_catalogue(config):
    prepared = prepare(config)
    assert prepared.events.item_ids.tolist() == IDS and prepared.vectors.dtype == np.float32
    np.testing.assert_array_equal(prepared.vectors, X)
    assert prepared.split.notes[-3:] == (
        "data.vectors: 3 numbers per item",
        "data.vectors: left out the vectors of 2 items that are not in the catalogue",
        "data.vectors: left out 1 rows that repeat an item with the same vector",
    )
    without = prepare(dataclasses.replace(config, vectors=""))
    assert without.vectors is None and without.split.sha256 == prepared.split.sha256
    assert without.catalogue.sha256 == prepared.catalogue.sha256


FLOATS = [getattr(pl, name) for name in ("Float16", "Float32", "Float64") if hasattr(pl, name)]


@pytest.mark.parametrize("dtype", [kind(x) for x in FLOATS for kind in (pl.List, lambda x: pl.Array(x, 3))], ids=str)
def test_types_of_vectors_and_ids(tmp_path, dtype):
    x = X.astype(np.float16)
    path = save(tmp_path / "v.parquet", pl.Series(["7", "8", "9", "10"], dtype=pl.Categorical), x.astype(np.float64).tolist(), dtype)
    assert pl.read_parquet(path)["vector"].dtype == dtype
    read, notes = read_vectors([path], pl.Series(["10", "7"]))
    np.testing.assert_array_equal(read, x[[3, 0]].astype(np.float32))
    assert notes == ["data.vectors: left out the vectors of 2 items that are not in the catalogue"]
    integers = save(tmp_path / "i.parquet", [7, 8, 9, 10], x.astype(np.float64).tolist(), dtype)
    np.testing.assert_array_equal(read_vectors([integers], pl.Series(["10", "7"]))[0], read)


def test_blocks_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors_lib, "_NUMBERS", 0)  # 1,024 rows at a time
    x, order = RNG.standard_normal((5000, 2)), RNG.permutation(5000)
    ids = pl.Series([f"i{n}" for n in range(5000)])
    again = [3, 4999]
    path = save(tmp_path / "v.parquet", ids.gather([*order, *again]), x[[*order, *again]], pl.Array(pl.Float64, 2))
    read, notes = read_vectors([path], ids)
    np.testing.assert_array_equal(read, x.astype(np.float32))
    assert notes == ["data.vectors: left out 2 rows that repeat an item with the same vector"]
    x[4999, 1] += 1
    path = save(tmp_path / "w.parquet", ids.gather([*order, 4999]), np.concatenate([x[order], x[4999:] + 1]), pl.Array(pl.Float64, 2))
    with pytest.raises(InputError, match=r"items with more than one vector: 'i4999' \(row .*\), 'i4999' \(row 5,001\)$"):
        read_vectors([path], ids)


def test_a_folder_of_parts(tmp_path, config):
    for name, rows in (("part-00000-of-00002", [2, 0]), ("part-00001-of-00002", [3, 1])):
        save(tmp_path / "scores" / f"{name}.parquet", [IDS[row] for row in rows], X[rows], pl.Array(pl.Float32, 3))
    (tmp_path / "scores" / ".part-00000-of-00002.parquet").write_text("unfinished")
    (tmp_path / "scores" / "request.json").write_text("{}")
    config = dataclasses.replace(config, vectors=str(tmp_path / "scores"))
    np.testing.assert_array_equal(prepare(config).vectors, X)
    (tmp_path / "scores" / "part-00001-of-00002.parquet").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"^config\.data\.vectors = .*: 1 files, but they are called part-00000-of-00002\.parquet; "):
        prepare(config)


NAN, INF = float("nan"), float("inf")
FLOAT_LISTS = "it must be a list of floats (16, 32 or 64 bits)"
A, B, C = [1.0, 2.0], [3.0, 4.0], [5.0, 6.0]
BAD = {  # columns of the file, and the end of the message
    "no item": ({"key": ["a"], "vector": [A]}, "no column 'item'; its columns are 'key', 'vector'"),
    "no vector": ({"item": ["a"], "embedding": [A]}, "no column 'vector'; its columns are 'item', 'embedding'"),
    "users": ({"user": ["a"], "vector": [A]}, "no column 'item'; its columns are 'user', 'vector'"),
    "integers": (
        {"item": ["a"], "vector": [[1, 2]]},
        f"column 'vector' is of type List(Int64); {FLOAT_LISTS}",
    ),
    "text": (
        {"item": ["a"], "vector": ["[1.0, 2.0]"]},
        f"column 'vector' is of type String; {FLOAT_LISTS}",
    ),
    "matrix": ({"item": ["a"], "vector": np.ones((1, 2, 2))}, "it must be a list of floats (16, 32 or 64 bits)"),
    "float ids": ({"item": [1.0], "vector": [A]}, "column 'item' is of type Float64; ids are text or integers"),
    "empty id": ({"item": ["a", ""], "vector": [A, B]}, "column 'item': empty ids: '' (row 2)"),
    "no rows": ({"item": pl.Series([], dtype=pl.String), "vector": pl.Series([], dtype=pl.List(pl.Float32))}, "the table has no rows"),
    "null": ({"item": ["a", "b", "c"], "vector": [A, None, C]}, "column 'item': items with null as their vector: 'b' (row 2)"),
    "all null": (
        {"item": ["a", "b"], "vector": pl.Series([None, None], dtype=pl.Array(pl.Float32, 2))},
        "column 'item': items with null as their vector: 'a' (row 1), 'b' (row 2)",
    ),
    "length": (
        {"item": ["a", "b", "c"], "vector": [A, B, [5.0]]},
        "column 'item': items whose vector has another length than the first one, 2: 'c' (row 3)",
    ),
    "empty": ({"item": ["a"], "vector": pl.Series([[]], dtype=pl.List(pl.Float32))}, "column 'vector': the vectors are empty"),
    "repeated": (
        {"item": ["a", "b", "b", "c", "a"], "vector": [A, B, C, C, A]},
        "column 'item': items with more than one vector: 'b' (row 2), 'b' (row 3)",
    ),
    "missing": ({"item": ["a"], "vector": [A]}, "no vector for 2 of 3 items: 'b', 'c'"),
}
for name, value in {"null inside": None, "nan": NAN, "infinite": INF, "beyond float32": 1e300}.items():
    what = "column 'item': items whose vector has a number that is null, NaN, infinite or beyond float32: 'x' (row 2)"
    BAD[name] = {"item": ["a", "x"], "vector": [A, [1.0, value]]}, what  # also of an item that is not in the catalogue


@pytest.mark.parametrize("case", BAD)
def test_files_that_are_refused(tmp_path, case):
    columns, message = BAD[case]
    pl.DataFrame(columns).write_parquet(tmp_path / "v.parquet")
    with pytest.raises(InputError) as caught:
        read_vectors([tmp_path / "v.parquet"], pl.Series(["a", "b", "c"]))
    assert str(caught.value).startswith(f"{tmp_path / 'v.parquet'}: ") and str(caught.value).endswith(message)
    assert "\n" not in str(caught.value)


def test_paths_that_are_refused(tmp_path, config):
    (tmp_path / "empty").mkdir()
    (tmp_path / "v.csv").write_text("item,vector\n")
    (tmp_path / "bad.parquet").write_text("no Parquet")
    for name, message in {
        "absent": r"config\.data\.vectors = '.*absent': no such file \(.*; or tfidf; or tfidf\+FILE\)",
        "v.csv": r"config\.data\.vectors = '.*v\.csv': must be a \.parquet file with .*",
        "empty": r"config\.data\.vectors = '.*empty': no \.parquet file in this folder",
        "bad.parquet": r".*bad\.parquet: not a readable Parquet file: .*",
    }.items():
        with pytest.raises(InputError, match=f"^{message}$"):
            prepare(dataclasses.replace(config, vectors=str(tmp_path / name)))
        assert name == "bad.parquet" or not Path(config.cache).exists()  # found before the tables are read


# ---- cache


def test_cached_by_content_and_settings(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, vector_transform="whiten")
    first = prepare(config)
    assert isinstance(first.vectors, np.memmap)

    def never(*_):
        raise AssertionError("a cache hit reads no vectors")

    with monkeypatch.context() as patch:
        patch.setattr(vectors_lib, "read_vectors", never)
        same(prepare(config).content, first.content)
        (tmp_path / "v.parquet").rename(tmp_path / "w.parquet")
        config = dataclasses.replace(config, vectors=str(tmp_path / "w.parquet"))
        moved = prepare(config)
        same(moved.content, first.content)
        assert moved.split.notes == first.split.notes
        changes = {"vector_transform": "center"}, {"shuffled_titles": True}, {"last_n": 1}, {"untitled": "drop", "text": "{brand}"}
        for change in changes:  # the last two: other training items, other items
            with pytest.raises(AssertionError, match="a cache hit"):
                prepare(dataclasses.replace(config, **change))
        save(tmp_path / "w.parquet", IDS, X + 1)
        with pytest.raises(AssertionError, match="a cache hit"):
            prepare(config)
    assert prepare(config).content.sha256 != first.content.sha256


def test_shuffled_titles_permute_vectors_too(config):
    config = dataclasses.replace(config, vector_transform="center")
    shuffled = prepare(dataclasses.replace(config, shuffled_titles=True)).content
    trained = prepare(config).events.train_counts > 0
    x = X[shuffled_rows(4)].astype(np.float64)
    assert trained.sum() < 4 and (shuffled_rows(4) != np.arange(4)).any()
    np.testing.assert_allclose(shuffled.of_items, x - x[trained].mean(0), atol=1e-6)


@pytest.mark.parametrize("damage", ["vectors.npy", "vectors.npz", "truncated"])
def test_damaged_files(config, tmp_path, damage):
    prepare(config).content.save(tmp_path)
    same(Vectors.load(tmp_path), prepare(config).content)
    if damage == "truncated":
        (tmp_path / "vectors.npy").write_bytes((tmp_path / "vectors.npy").read_bytes()[:-5])
    else:
        (tmp_path / damage).unlink()
    with pytest.raises(InputError, match=r": vectors\.npy or vectors\.npz cannot be read: .+$"):
        Vectors.load(tmp_path)


# ---- centred and whitened


def test_whitened_vectors_have_the_identity_as_covariance():
    x = (RNG.standard_normal((300, 6)) @ RNG.standard_normal((6, 6)) + RNG.standard_normal(6)).astype(np.float32)
    trained = np.arange(300) % 3 > 0
    for transform, deviation in (("none", None), ("center", 0), ("whiten", 0)):
        mean_P, matrix_PP, notes = statistics(x, trained, transform)
        vectors = Vectors(x, "", (), mean_P, matrix_PP)
        y = vectors.transform(x)
        assert y.dtype == np.float32 and notes == []
        if deviation is None:
            np.testing.assert_array_equal(y, x)
            continue
        np.testing.assert_allclose(y[trained].mean(0), 0, atol=1e-5)
        covariance = np.cov(y[trained], rowvar=False, bias=True)
        if transform == "whiten":
            np.testing.assert_allclose(covariance, np.eye(6), atol=1e-4)
            assert np.abs(y[~trained].mean(0)).max() > 1e-3  # the others have no part in the statistics
            # The principal axes: the first component has the largest variance of x.
            axis = np.linalg.svd(x[trained] - x[trained].mean(0), full_matrices=False)[2][0]
            np.testing.assert_allclose(abs(np.corrcoef(y[:, 0], x @ axis)[0, 1]), 1, atol=1e-5)
        else:
            np.testing.assert_allclose(y, x - x[trained].mean(0), atol=1e-5)


def test_directions_without_variance_are_not_scaled_up(monkeypatch):
    x = RNG.standard_normal((50, 3)) @ np.array([[2.0, 0, 0], [0, 1, 0], [0, 0, 1e-5]]) @ np.linalg.qr(RNG.standard_normal((3, 3)))[0]
    mean_P, matrix_PP, notes = statistics(x, np.ones(50, bool), "whiten")
    assert notes == ["data.vector_transform: 1 of 3 directions have almost no variance and are not scaled to 1"]
    y = Vectors(x, "", (), mean_P, matrix_PP).transform(x)
    assert (y[:, 2] ** 2).mean() < 1e-4 and np.allclose((y[:, :2] ** 2).mean(0), 1, atol=1e-3)
    monkeypatch.setattr(vectors_lib, "_NUMBERS", 20)  # in blocks of rows
    blocks = statistics(x, np.ones(50, bool), "whiten")
    np.testing.assert_allclose(blocks[1], matrix_PP, rtol=1e-6)
    np.testing.assert_allclose(Vectors(x, "", (), *blocks[:2]).transform(x), y, atol=1e-5)
    with pytest.raises(InputError, match=r"^config\.data\.vector_transform = 'whiten': the vectors of the 2 items with .* are equal$"):
        statistics(np.ones((3, 2)), np.array([True, True, False]), "whiten")


# ---- from text


@pytest.fixture(scope="module")
def titles():
    return synthetic.from_config(SyntheticConfig(users=20, products=60)).tables().items["title"].to_list()


def slow_tfidf(texts: list[str], all_texts: list[str], least: int = 2) -> np.ndarray:
    """[texts, words]: the definition, in loops. least: number of texts that have a word."""
    documents = [re.findall(r"\w+", text.lower()) for text in all_texts]
    words = sorted(word for word, n in Counter(itertools.chain(*map(set, documents))).items() if n >= least)
    rows = []
    for text in texts:
        counts = Counter(re.findall(r"\w+", text.lower()))
        frequency = {word: sum(word in document for document in documents) for word in words}
        idf = {word: math.log((1 + len(documents)) / (1 + frequency[word])) + 1 for word in words}
        row = np.array([(1 + math.log(counts[word])) * idf[word] if counts[word] else 0.0 for word in words])
        rows.append(row / (np.linalg.norm(row) or 1))
    return np.stack(rows)


def test_tfidf_equals_a_slow_twin(titles):
    texts = [*titles, f"{titles[0]} {titles[0].upper()} {titles[1]}"]
    words, notes = fit_words(texts, 5)
    matrix = slow_tfidf(texts, texts)
    _, values, right = np.linalg.svd(matrix)
    assert (values[:5] - values[1:6]).min() > 1e-3  # so that the singular vectors are determined
    assert notes[0].endswith(f"5 singular vectors hold {(values[:5] ** 2).sum() / len(texts):.0%} of its squared norm")
    right = right[:5].T * np.sign(right[:5].T[np.abs(right[:5].T).argmax(0), np.arange(5)])
    np.testing.assert_allclose(words.right_WP, right, atol=1e-5)
    np.testing.assert_allclose(words.vectors(texts), matrix @ right, atol=1e-5)
    new = ["unheard " + titles[3], titles[4] + "!", "unheard", ""]
    np.testing.assert_allclose(words.vectors(new), slow_tfidf(new, texts) @ right, atol=1e-5)
    assert not words.vectors(new)[2:].any()
    again, _ = fit_words(texts, 5)
    np.testing.assert_array_equal(words.right_WP, again.right_WP)
    most, notes = fit_words(texts, 61)
    found = re.fullmatch(
        r"data\.vectors: (\d+) instead of 61 singular vectors: the catalogue's 61 items with (\d+) words .* most (\d+)", notes[1]
    )
    count, of_words, limit = map(int, found.groups())
    assert count == limit == min(61, of_words) - 1 and most.right_WP.shape == (of_words, count) and len(most.words) == of_words
    with pytest.raises(
        InputError,
        match=r"^config\.data\.vectors: tf-idf has no singular vector: .*1 items with 0 words of two or more items allow at most 0$",
    ):
        fit_words(["lamp !"], 1)


@pytest.mark.parametrize("tokenizer", ["bpe", "id"])
def test_tfidf_of_the_catalogue(config, tmp_path, tokenizer):
    texts = ["blue lamp", "red lantern", "blue kettle", "red & blue lantern lamp"]
    titled = dict(zip(IDS, texts, strict=True))
    write(tmp_path / "data", "items", COLUMNS["items"], [(item, titled[item], brand) for item, _, brand in ITEMS])
    config = dataclasses.replace(config, vectors="tfidf", vector_size=2, vector_transform="center", tokenizer=tokenizer)
    prepared = prepare(config)
    trained = prepared.events.train_counts > 0
    raw = fit_words(texts, 2)[0].vectors(texts)
    np.testing.assert_allclose(prepared.vectors, raw - raw[trained].mean(0), atol=1e-6)
    prepared.content.save(tmp_path)
    stored = Vectors.load(tmp_path)
    same(stored, prepared.content)
    np.testing.assert_allclose(stored.of_new(texts[:2], None), prepared.vectors[:2], atol=1e-6)
    longer = stored.extended(stored.of_new(["red lamp"], None))
    assert longer.of_items.shape == (5, 2) and (longer.of_items[:4] == prepared.vectors).all()
    same(prepare(config).content, prepared.content)
    for change in ({"vector_size": 1}, {"text": "{title} by {brand}"}):
        assert prepare(dataclasses.replace(config, **change)).content.sha256 != prepared.content.sha256


def test_token_embeddings_of_a_catalogue(titles):
    rng = np.random.default_rng(0)
    lists = [rng.integers(20, size=rng.integers(1, 5)) for _ in range(30)]
    tokens = np.concatenate([np.append(entry, 24) for entry in lists] + [np.array([21])])  # 20 to 23 in no item; 21 is the prompt
    catalogue = Catalogue(tokens.astype(np.int32), np.cumsum([0, *(len(entry) + 1 for entry in lists), 1, 0]), 25, 0, "")
    embedding = token_svd(catalogue, 6, seed=1)
    assert embedding.shape == (25, 6) and embedding.dtype == np.float32
    texts = [" ".join(f"w{token:02}" for token in entry) for entry in lists]
    assert sorted(set(np.concatenate(lists))) == list(range(20))
    right = np.linalg.svd(slow_tfidf(texts, texts, least=1))[2][:6].T
    right *= np.sign(right[np.abs(right).argmax(0), np.arange(6)])
    np.testing.assert_allclose(embedding[:20], right / np.linalg.norm(right, axis=1, keepdims=True), atol=1e-5)
    np.testing.assert_array_equal(embedding, token_svd(catalogue, 6, seed=1))
    other = token_svd(catalogue, 6, seed=2)
    assert (other[:20] == embedding[:20]).all() and (other[20:] != embedding[20:]).all()
    assert 0.2 < embedding[20:].std() / 6**-0.5 < 2
    with pytest.raises(InputError, match=r"^config\.model\.width = 20: .* 30 items with 20 different tokens have at most 19 singular"):
        token_svd(catalogue, 20)


# ---- new items


def stored_of(config: DataConfig, folder: Path) -> Stored:
    """The catalogue as a working folder keeps it; the tables and the vectors are gone."""
    run = make_config()
    open_workdir(folder, dataclasses.replace(run, data=config), prepare(config), create=True)
    return read_stored(folder, config)


NEW = {"item": ["z", "c"], "title": ["red lamp", "blue lantern"], "vector": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.5]]}


def test_new_items_bring_vectors(config, tmp_path):
    config = dataclasses.replace(config, vector_transform="whiten")
    stored, path = stored_of(config, tmp_path / "run"), tmp_path / "new.parquet"
    np.testing.assert_array_equal(stored.vectors, prepare(config).vectors)
    pl.DataFrame(NEW | {"other": [1, 2]}).write_parquet(path)
    added, notes = add_items(stored, config, path)
    assert added.item_ids.to_list() == [*IDS, "c", "z"] and notes == []
    x = np.concatenate([X, np.float32(NEW["vector"][::-1])])
    np.testing.assert_array_equal(added.vectors, stored.content.transform(x))
    # An item without text is left out, with its vector.
    dropping = dataclasses.replace(config, untitled="drop")
    pl.DataFrame(NEW | {"title": ["red lamp", ""]}).write_parquet(path)
    added, notes = add_items(stored, dropping, path)
    np.testing.assert_array_equal(added.vectors, stored.content.transform(x[[0, 1, 2, 3, 5]]))
    assert notes == ["left out 1 added items without text"]
    for columns, message in (
        ({"vector": ["red", "blue"]}, f"column 'vector' is of type String; {FLOAT_LISTS}"),
        ({"vector": [[1.0, 2.0, 3.0], None]}, "column 'item': items with null as their vector: 'c' (row 2)"),
        ({"vector": [[1.0, 2.0], [3.0, 4.0]]}, "column 'vector' has 2 numbers, but the vectors of the model's items have 3"),
    ):
        pl.DataFrame(NEW | columns).write_parquet(path)
        with pytest.raises(InputError, match=f"^{re.escape(f'{path}: {message}')}$"):
            add_items(stored, config, path)
    pl.DataFrame(NEW).drop("vector").write_parquet(path)
    with pytest.raises(InputError, match="no column 'vector'"):
        add_items(stored, config, path)
    with pytest.raises(InputError, match=r"^new\.csv: new items of this model need a column 'vector' .*, which only \.parquet files have$"):
        add_items(stored, config, "new.csv")
    ids = dataclasses.replace(config, tokenizer="id")
    with pytest.raises(
        InputError, match=r"^new\.parquet: the model reads item ids \(config\.data\.tokenizer = 'id'\), and a new item has none"
    ):
        add_items(stored_of(ids, tmp_path / "ids"), ids, "new.parquet")


def test_vectors_of_new_texts(config, tmp_path):
    config = dataclasses.replace(config, vectors="tfidf", vector_size=1, vector_transform="center")
    stored = stored_of(config, tmp_path / "run")
    pl.DataFrame(NEW).drop("vector").write_csv(tmp_path / "new.csv")
    added, _ = add_items(stored, config, tmp_path / "new.csv")
    np.testing.assert_array_equal(added.vectors[:4], prepare(config).vectors)
    np.testing.assert_array_equal(added.vectors[4:], stored.content.of_new(["blue lantern", "red lamp"], None))
    reader = Reader(dataclasses.replace(make_config(), data=config), stored)
    read = reader.histories([["a", {"text": " red  lamp"}], [{"text": "blue lantern"}]])
    assert read.users.events.item.tolist() == [1, 4, 5]
    np.testing.assert_allclose(read.new_vectors, added.vectors[[5, 4]], atol=1e-6)
    assert reader.histories([["a"]]).new_vectors is None


def test_computed_and_given_vectors_in_a_row(config, tmp_path):
    """Each part has the variance 1 over the items with a training event, so that neither outweighs the other."""
    texts = ["blue lamp", "red lantern", "blue kettle", "red & blue lantern lamp"]
    titled = dict(zip(IDS, texts, strict=True))
    write(tmp_path / "data", "items", COLUMNS["items"], [(item, titled[item], brand) for item, _, brand in ITEMS])
    both = dataclasses.replace(config, vectors=f"tfidf+{config.vectors}", vector_size=2, vector_transform="center")
    prepared, parts = prepare(both), []
    trained = prepared.events.train_counts > 0
    for part in (fit_words(texts, 2)[0].vectors(texts).astype(np.float64), X.astype(np.float64)):
        part -= part[trained].mean(0)
        parts.append(part / np.sqrt((part[trained] ** 2).sum(1).mean()))
    np.testing.assert_allclose(prepared.vectors, np.concatenate(parts, axis=1), atol=1e-6)
    assert prepared.content.given == 3 and prepare(config).content.given == 3
    assert len({prepare(dataclasses.replace(both, vectors=one)).content.sha256 for one in (both.vectors, config.vectors, "tfidf")}) == 3

    stored = stored_of(both, tmp_path / "run")
    same(stored.content, prepared.content)
    pl.DataFrame(NEW).write_parquet(tmp_path / "new.parquet")
    added, _ = add_items(stored, both, tmp_path / "new.parquet")
    assert added.item_ids[4:].to_list() == ["c", "z"]
    expected = stored.content.of_new(["blue lantern", "red lamp"], np.array([[4, 5, 6.5], [1, 2, 3]], np.float32))
    np.testing.assert_array_equal(added.vectors[4:], expected)
    alone = stored.content.of_new(["red lamp"], np.array([[4, 5, 6.5]], np.float32))[0]  # each part depends on its own source
    np.testing.assert_allclose(alone, [*expected[1, :2], *expected[0, 2:]], atol=1e-6)
    reader = Reader(dataclasses.replace(make_config(), data=both), stored)
    read = reader.histories([["a", {"text": "blue lantern", "vector": [4.0, 5.0, 6.5]}]])
    np.testing.assert_allclose(read.new_vectors[0], expected[0], atol=1e-6)
    with pytest.raises(InputError, match=r"its vector has 2 numbers, but the vectors of the model's items have 3$"):
        reader.histories([[{"text": "lamp", "vector": [1, 2]}]])
    with pytest.raises(InputError, match=r"^new\.csv: new items of this model need a column 'vector'"):
        add_items(stored, both, "new.csv")
    with pytest.raises(InputError, match=r"config\.data\.vectors = 'absent\.parquet': no such file"):
        prepare(dataclasses.replace(config, vectors="tfidf+absent.parquet"))


def test_histories_with_new_vectors(config, tmp_path):
    stored = stored_of(config, tmp_path / "run")
    reader = Reader(dataclasses.replace(make_config(), data=config), stored)
    for vector in ([1, 2, 3], (1.0, 2.0, 3.0), np.float16([1, 2, 3])):
        read = reader.histories([["a", {"text": "red lamp", "vector": vector}]])
        np.testing.assert_array_equal(read.new_vectors, [[1, 2, 3]])
        assert read.catalogue.items == 5
    for item, error, message in (
        ({"text": "red lamp"}, TypeError, "must be {'text': '…', 'vector': […]}"),
        ({"text": "red lamp", "vector": "1, 2, 3"}, TypeError, "its vector must be a list of numbers"),
        ({"text": "red lamp", "vector": [[1, 2, 3]]}, TypeError, "its vector must be a list of numbers"),
        ({"text": "red lamp", "vector": [1, 2]}, InputError, "its vector has 2 numbers, but the vectors of the model's items have 3"),
        ({"text": "red lamp", "vector": [1, 2, NAN]}, InputError, "its vector has a number that is not finite in float32"),
        ({"text": "red lamp", "vector": [1, 2, 1e300]}, InputError, "its vector has a number that is not finite in float32"),
    ):
        with pytest.raises(error, match=rf"^histories\[1\]\[0\].*{re.escape(message)}$"):
            reader.histories([["a"], [item]])
    plain = Reader(dataclasses.replace(make_config(), data=config), dataclasses.replace(stored, content=None))
    with pytest.raises(TypeError, match=r"must be \{'text': '…'\}$"):
        plain.histories([[{"text": "red lamp", "vector": [1, 2, 3]}]])


def test_lengths_of_assumed_data(config, tmp_path):
    assumption = Assumption(items=1000, item_length=5, users=10, events=5)
    for vectors, size in ((config.vectors, 3), ("tfidf", 256), (f"tfidf+{config.vectors}", 259), ("", None)):
        prepared, _ = assume(dataclasses.replace(config, vectors=vectors), assumption, 300)
        assert (None if prepared.vectors is None else prepared.vectors.shape) == (size and (1000, size))


# ---- real vectors


def check_vectors_of_an_encoder(folder: Path, tmp_path: Path, name: str):
    config = DataConfig(
        path=str(folder), cache=str(tmp_path / "cache"), tokenizer="id", vectors=str(folder / name), vector_transform="whiten"
    )
    prepared = prepare(config)
    table = pl.read_parquet(folder / name)
    rows = {item: vector for item, vector in table.iter_rows()}
    x = np.array([rows[item] for item in prepared.events.item_ids.tolist()])
    np.testing.assert_allclose(prepared.content.transform(x.astype(np.float32)), prepared.vectors, atol=1e-4)
    trained = prepared.events.train_counts > 0
    covariance = np.cov(prepared.vectors[trained], rowvar=False, bias=True)
    small = sum("almost no variance" in note for note in prepared.content.notes) and int(prepared.content.notes[-1].split()[1])
    expected = np.eye(x.shape[1])
    expected[len(expected) - small :] = 0  # MiniLM uses 381 of its 384 dimensions
    np.testing.assert_allclose(covariance, expected, atol=1e-3)
    return prepared


SCIENTIFIC = DATA / "amazon2018-scientific"


@pytest.mark.skipif(not (SCIENTIFIC / "minilm.parquet").exists(), reason="the vectors of amazon2018-scientific are not here")
def test_real_vectors(tmp_path):
    assert check_vectors_of_an_encoder(SCIENTIFIC, tmp_path, "minilm.parquet").vectors.shape == (1585, 384)


def test_vectors_of_a_made_up_shop(tmp_path):
    """What test_real_vectors asserts, wherever it runs."""
    folder = write_shop(tmp_path / "shop")
    items = pl.read_csv(folder / "items.tsv.gz", separator="\t", infer_schema=False, quote_char=None)["item"]
    save(folder / "v.parquet", items, RNG.standard_normal((60, 8)) + 1, pl.List(pl.Float32))
    assert check_vectors_of_an_encoder(folder, tmp_path, "v.parquet").vectors.shape == (60, 8)

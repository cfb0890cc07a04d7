"""Content vectors of items (`data.vectors`): given in a Parquet file by any encoder, computed from the catalogue's text, or both.

A file has the columns `item` and `vector`, and `--mode=score --vectors` writes such files. With both, a vector is the computed one and the
given one in a row, each divided by its standard deviation, (E |x - m|^2)^(1/2) over the items that have a training event.

The vectors can be centred or whitened (`data.vector_transform`). With the mean m and the covariance C = Q diag(l) Q^T of the items that
have a training event, a vector x becomes

    center: x - m
    whiten: (x - m) Q diag(max(l, FLOOR max(l)))^(-1/2)

so that the training items' whitened vectors have the identity as their covariance. Only directions with almost no variance have less:
without the floor, rounding errors would be scaled up to the variance of the others.

`Vectors` keeps what new items need. It is stored in the cache and in the working folder.
"""

import dataclasses
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from iam_jax.config import DataConfig, vector_sources
from iam_jax.data.cache import cached_folder
from iam_jax.data.catalogue import shuffled_rows
from iam_jax.data.splits import codes
from iam_jax.data.tables import BAD_PARQUET, choose_columns, read_table, refuse
from iam_jax.data.tfidf import Words, fit_words, with_fixed_signs
from iam_jax.errors import InputError, quote_first
from iam_jax.storage import remote
from iam_jax.storage.files import write_atomically

_VERSION = 1  # of the cached files
VECTORS_FILE = "vectors.npy"  # [I, P] float32
TRANSFORM_FILE = "vectors.npz"  # everything else of `Vectors`
FLOOR = 1e-5
_PART = re.compile(r"part-\d+-of-(\d+)\.parquet")
_FLOATS = tuple(getattr(pl, name) for name in ("Float16", "Float32", "Float64") if hasattr(pl, name))
_NUMBERS = 1 << 24  # that are read or transformed at the same time


@dataclasses.dataclass(frozen=True)
class Vectors:
    """The vectors of a catalogue, and how those of new items are computed."""

    of_items: np.ndarray  # [I, P] float32, transformed, in the order of the catalogue; memory-mapped if read from a local file
    sha256: str  # hash of everything that they were computed from
    notes: tuple[str, ...] = ()  # printed lines
    mean_P: np.ndarray | None = None  # float64; None: neither centred nor whitened
    matrix_PP: np.ndarray | None = None  # float64; None: not whitened
    words: Words | None = None  # None: from a file alone
    scale_2: np.ndarray | None = None  # float64, of the computed and of the given part; None: there is one part only

    @property
    def given(self) -> int:
        """Number of numbers that a file must have for each item; 0: vectors are computed from text alone."""
        return self.of_items.shape[1] - (0 if self.words is None else self.words.right_WP.shape[1])

    def transform(self, raw: np.ndarray) -> np.ndarray:
        """[n, P] float32: vectors as a file has them, centred or whitened as those of the catalogue."""
        out = np.empty(raw.shape, np.float32)
        for rows in _blocks(raw):
            x = raw[rows].astype(np.float64)
            if self.mean_P is not None:
                x -= self.mean_P
            out[rows] = x if self.matrix_PP is None else x @ self.matrix_PP
        return out

    def check_length(self, size: int, name: str) -> None:
        """Raises InputError if a given vector must not have this length. name: of the vector, for the error."""
        if size != self.given:
            raise InputError(f"{name} has {size:,} numbers, but the vectors of the model's items have {self.given:,}")

    def of_new(self, texts: Sequence[str], given: np.ndarray | None) -> np.ndarray:
        """[n, P] float32: the vectors of new items.

        texts: theirs; ignored if no vector is computed from text. given: their vectors [n, `given`], as a file has them; None if vectors
        come from text alone.
        """
        computed = [] if self.words is None else [self.words.vectors(texts)]
        return self.transform(_joined([*computed, *([] if given is None else [given])], self.scale_2))

    def extended(self, new: np.ndarray) -> "Vectors":
        """With the vectors of further items [n, P], already transformed, after those of the catalogue."""
        return dataclasses.replace(self, of_items=np.concatenate([self.of_items, new]))

    def save(self, folder: Path) -> None:
        """Writes VECTORS_FILE and TRANSFORM_FILE. Each is complete or absent."""
        words = self.words
        facts = {"sha256": self.sha256, "notes": self.notes, "words": words and words.words}
        arrays = {
            "mean": self.mean_P,
            "matrix": self.matrix_PP,
            "scale": self.scale_2,
            "idf": words and words.idf_W,
            "right": words and words.right_WP,
        }
        arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)

        def write(path: Path, save, *args, **kwargs) -> None:
            with path.open("wb") as file:  # NumPy would add an ending to the name of a temporary file
                save(file, *args, **kwargs)

        there = {name: array for name, array in arrays.items() if array is not None}
        write_atomically(folder / TRANSFORM_FILE, lambda path: write(path, np.savez, **there))
        write_atomically(folder / VECTORS_FILE, lambda path: write(path, np.save, self.of_items))

    @classmethod
    def load(cls, folder: Path) -> "Vectors":
        """Reads what `save` wrote. Raises InputError if a file is missing or cannot be read."""
        try:
            with np.load(_source(folder / TRANSFORM_FILE)) as arrays:
                found = {name: arrays[name] for name in arrays.files}
            path = folder / VECTORS_FILE
            of_items = np.load(_source(path), mmap_mode=None if remote.is_remote(path) else "r")
            facts = json.loads(found["facts"].tobytes())
            words = None if facts["words"] is None else Words(facts["words"], found["idf"], found["right"])
            notes, arrays = tuple(facts["notes"]), (found.get("mean"), found.get("matrix"))
            return cls(of_items, facts["sha256"], notes, *arrays, words, found.get("scale"))
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            reason = str(getattr(error, "strerror", None) or error).partition("\n")[0]
            raise InputError(f"{folder}: {VECTORS_FILE} or {TRANSFORM_FILE} cannot be read: {reason}") from error


def _source(path: Path) -> Path | io.BytesIO:
    return io.BytesIO(path.read_bytes()) if remote.is_remote(path) else path


def item_vectors(config: DataConfig, ids: pl.Series, texts: Sequence[str], trained: np.ndarray, cache: Path) -> Vectors:
    """The vectors of the catalogue's items, cached under the hash of everything that they depend on.

    Args:
      config: the section `data`, with `vectors` set.
      ids: [I] String, the ids of the items in the order of the catalogue.
      texts: the items' texts, if vectors are computed from them.
      trained: [I] bool, whether an item has a training event: `center` and `whiten` use the statistics of these items.
      cache: the folder of prepared data.

    Raises:
      InputError: for a file that cannot be read as it is, an item without a vector, or texts without a common word. The error names the
        file or the field, and the first items.
    """
    order = shuffled_rows(len(ids)) if config.shuffled_titles else None
    from_text, path = vector_sources(config.vectors)
    files = vector_files(path) if path else []
    sources: list[list] = []
    if from_text:
        sources.append(["tfidf", config.vector_size, list(texts)])  # the caller has permuted the texts
    if path:
        sources.append(["file", [_file_hash(file) for file in files], order is not None])
    trained_hash = hashlib.sha256(np.ascontiguousarray(trained, bool).tobytes()).hexdigest()
    identity = [_VERSION, sources if len(sources) > 1 else sources[0], config.vector_transform, ids.to_list(), trained_hash]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def make():
        words, parts, notes = None, [], []
        if from_text:
            words, notes = fit_words(texts, config.vector_size)
            parts.append(words.vectors(texts))
        if path:
            given, more = read_vectors(files, ids)
            parts.append(given if order is None else given[order])
            notes += [f"data.vectors: {given.shape[1]:,} numbers per item", *more]
        scale_2 = np.array([_scale(part, trained) for part in parts]) if len(parts) > 1 else None
        raw = _joined(parts, scale_2)
        mean_P, matrix_PP, more = statistics(raw, trained, config.vector_transform)
        vectors = Vectors(raw, digest, (*notes, *more), mean_P, matrix_PP, words, scale_2)
        return dataclasses.replace(vectors, of_items=vectors.transform(raw)).save

    return Vectors.load(cached_folder(cache / f"vectors-{digest[:32]}", make))


def _joined(parts: Sequence[np.ndarray], scales: np.ndarray | None) -> np.ndarray:
    """[n, P] float32: the parts of vectors in a row, times their scales; a single part as it is."""
    if scales is None:
        (single,) = parts
        return single
    return np.concatenate([part * np.float32(scale) for part, scale in zip(parts, scales, strict=True)], axis=1)


def _scale(part: np.ndarray, trained: np.ndarray) -> float:
    """1 / (E |x - m|^2)^(1/2) over the items with a training event; 1 if their vectors are equal."""
    rows, (mean_P, *_) = np.flatnonzero(trained), statistics(part, trained, "center")
    variance = sum(float(np.square(part[block] - mean_P).sum()) for block in _parts(rows, part.shape[1])) / len(rows)
    return variance**-0.5 if variance > 0 else 1.0


# ---- files


def vector_files(given: str) -> list[Path]:
    """The Parquet files of a path in config.data.vectors, a file or a folder. Raises InputError if there is none, or if parts of an output
    are missing."""
    path, field = Path(given).expanduser(), f"config.data.vectors = {given!r}"
    if path.is_dir():
        files = sorted(file for file in path.glob("*.parquet") if not file.name.startswith("."))
        if not files:
            raise InputError(f"{field}: no .parquet file in this folder")
        parts = [_PART.fullmatch(file.name) for file in files]
        if any(part and int(part[1]) != len(files) for part in parts):
            raise InputError(
                f"{field}: {len(files)} files, but they are called {files[0].name}; the same --mode=score command adds the rest"
            )
        return files
    if not path.exists():
        raise InputError(
            f"{field}: no such file (a Parquet file or a folder of them, with the columns item and vector; or tfidf; or tfidf+FILE)"
        )
    if path.suffix != ".parquet":
        raise InputError(f"{field}: must be a .parquet file with the columns item and vector, a folder of them, tfidf, or tfidf+FILE")
    return [path]


def vector_length(config: DataConfig) -> int:
    """The length of the items' vectors (with tf-idf, at most), from the first row of a file. Raises InputError if there is none."""
    from_text, given = vector_sources(config.vectors)
    computed = config.vector_size if from_text else 0
    if not given:
        return computed
    path = vector_files(given)[0]
    for _, vectors in _vector_blocks(_scan(path), path, 1):
        if len(vectors) and vectors[0] is not None:
            return computed + len(vectors[0])
    raise InputError(f"{path}: column 'vector': no vector in the first row")


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def read_vectors(paths: Sequence[Path], ids: pl.Series) -> tuple[np.ndarray, list[str]]:
    """The vectors of the items `ids` [I, P] float32, from Parquet files with the columns `item` and `vector`, and notes to print.

    Items are matched by id, as text (an integer is its decimal text). Rows of other items are checked, counted and left out, as are rows
    that repeat an item with the same vector. One block of rows is in memory at a time.

    Raises InputError for a missing column or one of another type, for vectors that are missing, of unequal length or not finite in
    float32, for an item with two different vectors, and for items without a vector.
    """
    out: np.ndarray | None = None
    filled, others, repeated = np.zeros(len(ids), bool), [], 0
    for path in paths:
        scan = _scan(path)
        own = read_table(path, ("item",))["item"]
        row = codes(own, ids)
        first = own.is_first_distinct().to_numpy() & ~filled[row]
        others.append(own.filter(pl.Series(row < 0)))
        missing, unequal, infinite, different = (np.zeros(len(own), bool) for _ in range(4))
        for start, vectors in _vector_blocks(scan, path, len(own)):
            block = slice(start, start + len(vectors))
            missing[block] = vectors.is_null().to_numpy()
            lengths = (vectors.list.len() if vectors.dtype == pl.List else vectors.arr.len()).fill_null(0).to_numpy()
            if out is None and not missing[block].all():
                out = np.empty((len(ids), lengths[~missing[block]][0]), np.float32)
            unequal[block] = ~missing[block] & (lengths != (0 if out is None else out.shape[1]))
            if out is None or not out.shape[1] or missing[block].any() or unequal[block].any():
                continue
            with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite
                x = vectors.explode().to_numpy().astype(np.float32).reshape(len(vectors), -1)
            infinite[block] = ~np.isfinite(x).all(1)
            known = row[block] >= 0
            new = known & first[block]
            out[row[block][new]] = x[new]
            filled[row[block][new]] = True
            again = known & ~new
            repeated += int(again.sum())
            different[block][again] = (x[again] != out[row[block][again]]).any(1)
        size = 0 if out is None else out.shape[1]
        for bad, what in (
            (missing, "items with null as their vector"),
            (unequal, f"items whose vector has another length than the first one, {size}"),
            (infinite, "items whose vector has a number that is null, NaN, infinite or beyond float32"),
            (different, "items with more than one vector"),
        ):
            if bad.any():
                refuse(str(path), own, pl.Series(bad), what, together=bad is different)
        if not size:
            raise InputError(f"{path}: column 'vector': the vectors are empty")
    assert out is not None
    if not filled.all():
        named = str(paths[0] if len(paths) == 1 else paths[0].parent)
        lacking = ids.filter(pl.Series(~filled))
        raise InputError(f"{named}: no vector for {len(lacking):,} of {len(ids):,} items: {quote_first(lacking)}")
    notes = []
    if left_out := pl.concat(others).n_unique():
        notes.append(f"data.vectors: left out the vectors of {left_out:,} items that are not in the catalogue")
    if repeated:
        notes.append(f"data.vectors: left out {repeated:,} rows that repeat an item with the same vector")
    return out, notes


def _scan(path: Path) -> pl.LazyFrame:
    """The column `vector` of a Parquet file, not read yet. Raises InputError for other columns or types."""
    try:
        scan = pl.scan_parquet(path, glob=False, hive_partitioning=False)
        schema = scan.collect_schema()
    except BAD_PARQUET as error:
        raise InputError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from error
    choose_columns(path, schema.names(), ("item", "vector"))
    dtype = schema["vector"]
    if not (isinstance(dtype, pl.List | pl.Array) and dtype.inner in _FLOATS and len(getattr(dtype, "shape", (0,))) == 1):
        raise InputError(f"{path}: column 'vector' is of type {dtype}; it must be a list of floats (16, 32 or 64 bits)")
    return scan.select("vector")


def _vector_blocks(scan: pl.LazyFrame, path: Path, rows: int) -> Iterator[tuple[int, pl.Series]]:
    """First row and vectors of each block of rows."""
    try:
        head = scan.head(1).collect()["vector"]
        step = min(max(_NUMBERS // max(len(head.explode()), 1), 1024), 1 << 18)
        for start in range(0, rows, step):
            yield start, scan.slice(start, step).collect()["vector"]
    except BAD_PARQUET as error:
        raise InputError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from error


# ---- centred and whitened


def statistics(raw: np.ndarray, trained: np.ndarray, transform: str) -> tuple[np.ndarray | None, np.ndarray | None, list[str]]:
    """Mean [P] and matrix [P, P] of `Vectors`, float64, by config.data.vector_transform, and notes to print.

    raw [I, P] and trained [I]: as in `item_vectors`. Raises InputError if there is no variance to whiten.
    """
    if transform == "none":
        return None, None, []
    rows, size = np.flatnonzero(trained), raw.shape[1]
    mean_P = sum((raw[part].sum(0, dtype=np.float64) for part in _parts(rows, size)), np.zeros(size)) / len(rows)
    if transform == "center":
        return mean_P, None, []
    covariance_PP = np.zeros((size, size))
    for part in _parts(rows, size):
        x = raw[part].astype(np.float64) - mean_P
        covariance_PP += x.T @ x
    variance_P, axes_PP = np.linalg.eigh(covariance_PP / len(rows))
    variance_P, axes_PP = variance_P[::-1], with_fixed_signs(axes_PP[:, ::-1])  # largest first
    if variance_P[0] <= 0:
        raise InputError(f"config.data.vector_transform = 'whiten': the vectors of the {len(rows):,} items with a training event are equal")
    floor = FLOOR * variance_P[0]
    notes = []
    if small := np.count_nonzero(variance_P < floor):
        notes.append(f"data.vector_transform: {small:,} of {size:,} directions have almost no variance and are not scaled to 1")
    return mean_P, axes_PP / np.sqrt(np.maximum(variance_P, floor)), notes


def _parts(rows: np.ndarray, size: int) -> list[np.ndarray]:
    step = max(_NUMBERS // size, 1)
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def _blocks(x: np.ndarray) -> Iterator[slice]:
    step = max(_NUMBERS // max(x.shape[1], 1), 1)
    return (slice(start, start + step) for start in range(0, len(x), step))

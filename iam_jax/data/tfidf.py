"""Vectors from the catalogue's own text: tf-idf and its truncated singular value decomposition (latent semantic analysis).

The matrix has a row for each of the I items and a column for each word, or token. Its entries are

    (1 + log(count)) · (log((1 + I) / (1 + items with the word)) + 1),

and each row is scaled to norm 1. With its right singular vectors R, those with the largest singular values, a text with the row x has the
vector x R. So a new text has a vector, too.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from iam_jax.data.catalogue import Catalogue
from iam_jax.errors import InputError

Sparse = Any  # scipy.sparse.csr_array, whose types are incomplete


@dataclasses.dataclass(frozen=True)
class Words:
    """W words with their weights, and their rows of the right singular vectors."""

    words: list[str]  # sorted
    idf_W: np.ndarray  # float64
    right_WP: np.ndarray  # float32

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """[n, P] float32: the vectors of texts. Other words are left out; a text without any of these words has the vector 0."""
        row = {word: n for n, word in enumerate(self.words)}
        counts = _counts([[row[word] for word in words_of(text) if word in row] for text in texts], len(self.words))
        return (_tfidf(counts, self.idf_W).astype(np.float32) @ self.right_WP).astype(np.float32)


def words_of(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters, digits and underscores of any script."""
    return re.findall(r"\w+", text.lower())


def fit_words(texts: Sequence[str], size: int) -> tuple[Words, list[str]]:
    """The words of a catalogue with `size` right singular vectors, or all that there are, and notes to print.

    Words of one item alone are left out: they do not affect its similarity to others, and would be half of the vocabulary.

    Raises InputError if there is no singular vector.
    """
    lists = [words_of(text) for text in texts]
    items_with = Counter(word for text in lists for word in set(text))
    words = sorted(word for word, items in items_with.items() if items > 1)
    row = {word: n for n, word in enumerate(words)}
    counts = _counts([[row[word] for word in text if word in row] for text in lists], len(words))
    most = min(counts.shape) - 1
    notes = []
    if size > most:
        few = f"the catalogue's {len(texts):,} items with {len(words):,} words of two or more items allow at most {max(most, 0):,}"
        if most < 1:
            raise InputError(f"config.data.vectors: tf-idf has no singular vector: {few}")
        notes.append(f"data.vectors: {most:,} instead of {size:,} singular vectors: {few}")
        size = most
    idf_W = _idf(counts)
    matrix = _tfidf(counts, idf_W)
    values, right_WP = _right_vectors(matrix, size)
    share = (values**2).sum() / (matrix.data**2).sum()
    note = f"data.vectors: tf-idf of {len(words):,} words; {size:,} singular vectors hold {share:.0%} of its squared norm"
    return Words(words, idf_W, right_WP.astype(np.float32)), [note, *notes]


def token_svd(catalogue: Catalogue, width: int, seed: int = 0) -> np.ndarray:
    """[V, width] float32: initial token embeddings from the catalogue's own statistics.

    Tokens in similar items have similar rows: the rows are the right singular vectors of the items x tokens tf-idf matrix, each scaled to
    norm 1, which random rows have on average (standard deviation width ** -0.5). Boundary tokens, and tokens that no item has, have random
    rows, which depend on the seed only.

    Raises InputError if the catalogue has too few items or tokens for this width.
    """
    lengths = catalogue.item_lengths - 1  # without the boundary token, which every item has
    item = np.repeat(np.arange(catalogue.items), lengths)
    token = catalogue.tokens[np.arange(len(item)) + item]
    counts = _sparse_counts(item, token, (catalogue.items, catalogue.vocabulary))
    seen = np.flatnonzero(np.bincount(token, minlength=catalogue.vocabulary))
    counts = counts[:, seen]
    most = min(counts.shape) - 1
    if width > most:
        few = f"{catalogue.items:,} items with {len(seen):,} different tokens have at most {max(most, 0):,} singular vectors"
        raise InputError(f"config.model.width = {width}: token embeddings cannot start from the catalogue's statistics, because its {few}")
    out = np.random.default_rng(seed).standard_normal((catalogue.vocabulary, width)) / width**0.5
    _, right_TD = _right_vectors(_tfidf(counts, _idf(counts)), width)
    norm_T1 = np.linalg.norm(right_TD, axis=1, keepdims=True)
    found = norm_T1[:, 0] > 1e-6  # a row of zeros (of tokens outside the leading singular vectors) has no direction
    out[seen[found]] = right_TD[found] / norm_T1[found]
    return out.astype(np.float32)


def _counts(lists: Sequence[Sequence[int]], terms: int) -> Sparse:
    """[lists, terms] float64: how often each list contains each term."""
    lengths = [len(entries) for entries in lists]
    term = np.fromiter((term for entries in lists for term in entries), np.int64, sum(lengths))
    return _sparse_counts(np.repeat(np.arange(len(lists)), lengths), term, (len(lists), terms))


def _sparse_counts(row: np.ndarray, column: np.ndarray, shape: tuple[int, int]) -> Sparse:
    from scipy import sparse

    return sparse.coo_array((np.ones(len(row)), (row, column)), shape=shape).tocsr()  # adds the entries of one place


def _idf(counts: Sparse) -> np.ndarray:
    items, terms = counts.shape
    return np.log((1 + items) / (1 + np.bincount(counts.indices, minlength=terms))) + 1


def _tfidf(counts: Sparse, idf: np.ndarray) -> Sparse:
    """Rows of norm 1, or of zeros where a row counts nothing."""
    weighted = counts.copy()
    weighted.data = (1 + np.log(counts.data)) * idf[counts.indices]
    row = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    weighted.data /= np.sqrt(np.bincount(row, weighted.data**2, counts.shape[0]))[row]
    return weighted


def _right_vectors(matrix: Sparse, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The `size` largest singular values, in descending order, and their right singular vectors [columns, size], float64.

    The same matrix gives the same vectors: the start of the iteration and the signs are fixed.
    """
    from scipy.sparse.linalg import svds

    start = np.random.default_rng(0).standard_normal(min(matrix.shape))
    options: Any = {"return_singular_vectors": "vh"}  # without the left ones, which may be large
    result: Any = svds(matrix, k=size, v0=start, **options)
    _, values, right = result
    order = np.argsort(-values, kind="stable")
    return values[order], with_fixed_signs(right[order].T)


def with_fixed_signs(columns: np.ndarray) -> np.ndarray:
    """The largest entry of every column becomes positive: a singular vector or an eigenvector has no sign of its own."""
    largest = np.abs(columns).argmax(0)
    return columns * np.where(columns[largest, np.arange(columns.shape[1])] < 0, -1.0, 1.0)

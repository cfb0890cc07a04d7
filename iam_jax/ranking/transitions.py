"""Baselines that count pairs of items in users' training histories: smoothed transitions, and sequential rules.

The count C[h, a] goes over all pairs of training events of a user in which item a follows item h within W events. A pair at distance d
adds d^-power. A score is a weighted sum over the last items of the history, plus a term of the candidate alone:

    score(a) = Σ_j w_j M[h_j, a] + base(a)

    transitions   M[h, a] = log(1 + C[h, a] · I / tau), I the number of items;   base(a) = lambda · log popularity(a)
    rules         M[h, a] = C[h, a] / (number of pairs that begin with h);       base orders equal sums by popularity

The weights w_j sum to 1. They fall with the age of the item: w(age) = share · decay^age / Σ decay^age + (1 - share) / n, over the n most
recent items of the history.

All terms are rounded to integers in a common unit, with which products and sums are exact in float64. So ranks and ties do not depend on
the order of summation, on blocks, or on whether the matrix is sparse.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from scipy import sparse

from iam_jax.data.splits import TRAIN, Events, users_of
from iam_jax.ranking import baselines
from iam_jax.ranking.baselines import Pairs, expand, histories, ranks_by_entries, sums_by_key

Matrix = Any  # a sparse.csr_array, whose attributes its annotations lack

_DISTANCE = 2.0**-30  # unit of the weight of a pair
_WEIGHT = 2.0**-16  # unit of the weight of an item of the history
_LOGARITHM, _SHARE = 2.0**-30, 2.0**-35  # units of the matrices of transitions and rules
_LARGEST = 60.0  # of a term: the sum of two is below 2^53 in units of _WEIGHT x _LOGARITHM
_PAIRS = 1 << 20  # pairs that are counted at the same time
_KEPT = 1 << 26  # largest number of counts of the catalogue; above, an item keeps its largest counts
_SCORES = 1 << 21  # dense scores that exist at the same time
_COLUMNS = 256  # of a dense matrix that are multiplied at the same time: they fit into a processor's cache
_DENSE = 1 << 24  # a matrix with so few entries, of which 3 % are not 0, is multiplied as a dense one


@dataclasses.dataclass(frozen=True)
class HistorySums:
    """Scores that are sums over the last items of a history, see the module's docstring. All values are integers.

    A rank is a lookup in the sorted `base`, which is corrected for the candidates that have a count and for the seen items; there is no
    [targets, items] array, unless the matrix is small and dense. `__call__` is the dense equivalent.
    """

    base: np.ndarray  # [items] int64
    matrix: Matrix  # [items, items] float64: the row of an item of the history, the column of a candidate
    weights: np.ndarray  # [last + 1, last] float64: weights[n, age], if n items of the history count
    unit: float  # a score is this times its integer

    def __call__(self, events: Events, targets: np.ndarray) -> np.ndarray:
        """Scores [n, items] int64."""
        return (self._history(events, targets) @ self.matrix).toarray().astype(np.int64) + self.base

    def dense(self, events: Events, targets: np.ndarray) -> np.ndarray:
        """The same integers as float64 [n, items], by the faster of two ways. Items of histories from `items` on have no counts."""
        history = self._history(events, targets)
        if self._dense is None:
            scores = (history @ self.matrix).toarray()
        else:
            scores = np.empty((len(targets), len(self.base)))
            for number, columns in enumerate(self._dense):
                scores[:, number * _COLUMNS : (number + 1) * _COLUMNS] = history @ columns
        scores += self.base
        return scores

    def ranks(self, events: Events, targets: np.ndarray, filter_seen: bool) -> Pairs:
        targets = np.asarray(targets)
        if self._dense is not None:
            step = max(1, _SCORES // len(self.base))
            stops = range(step, len(targets) + step, step)
        else:  # blocks of histories whose items have at most ENTRIES counts together, or of one history
            cost = self._history(events, targets).astype(bool) @ np.diff(self.matrix.indptr)
            stops = blocks(cost, baselines.ENTRIES)
        parts, start = [], 0
        for stop in stops:
            ranks = self._sparse_ranks if self._dense is None else self._dense_ranks
            parts.append(ranks(events, targets[start:stop], filter_seen))
            start = stop
        rank, ties = zip(*parts, strict=True)
        return np.concatenate(rank), np.concatenate(ties)

    def _dense_ranks(self, events: Events, targets: np.ndarray, filter_seen: bool) -> Pairs:
        at, target, scores = np.arange(len(targets)), events.item[targets], self.dense(events, targets)
        own = scores[at, target]
        if filter_seen:
            scores[histories(events, targets)] = -np.inf
            scores[at, target] = own
        at_least, above = (np.array([np.count_nonzero(row) for row in mask]) for mask in (scores >= own[:, None], scores > own[:, None]))
        return above + 1, at_least - above - 1

    def _sparse_ranks(self, events: Events, targets: np.ndarray, filter_seen: bool) -> Pairs:
        sums = self._history(events, targets) @ self.matrix
        sums.sort_indices()
        row, item = np.repeat(np.arange(len(targets)), np.diff(sums.indptr)), sums.indices.astype(np.int64)
        score = self.base[item] + sums.data.astype(np.int64)
        return ranks_by_entries(events, targets, filter_seen, self.base, self._ordered, row * len(self.base) + item, score)

    @functools.cached_property
    def _ordered(self) -> np.ndarray:
        return np.sort(self.base)

    @functools.cached_property
    def _dense(self) -> list[np.ndarray] | None:
        """The matrix as arrays of a few columns, if it is small and that is faster."""
        items = self.matrix.shape[1]
        if items * items > min(_DENSE, 32 * self.matrix.nnz):
            return None
        dense = self.matrix.toarray()
        return [np.ascontiguousarray(dense[:, at : at + _COLUMNS]) for at in range(0, items, _COLUMNS)]

    def _history(self, events: Events, targets: np.ndarray) -> Matrix:
        """[n, items] float64: the weights of the last items of each history. A repeated item has several entries."""
        targets, last = np.asarray(targets), self.weights.shape[1]
        begin = np.maximum(events.offsets[users_of(events, targets)], targets - last)
        row, position = expand(begin, targets - begin)
        weight = self.weights[(targets - begin)[row], targets[row] - 1 - position]
        counts = (weight > 0) & (events.item[position] < len(self.base))
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row[counts], minlength=len(targets)))])
        return sparse.csr_array((weight[counts], events.item[position[counts]], indptr), (len(targets), len(self.base)))


class PairCounts:
    """C of a window and a power, from the training events of all users. It keeps what was asked for last, up to 2^26 counts.

    A pair of training events of a user at distance d, at most `window`, counts d^-power, rounded to a multiple of 2^-30, so that sums are
    exact in any order. Blocks of items, and of events of an item, bound the memory. If the catalogue is so large that 2^26 counts may not
    suffice, each item keeps its 2^26 / items largest counts (at least 50); among equal ones, the first of the catalogue.
    """

    def __init__(self, events: Events):
        self._items, self._item, self._kept = len(events.item_ids), events.item, {}
        train = np.flatnonzero(events.label == TRAIN)
        self._train = train[np.argsort(events.item[train], kind="stable")]  # by item
        self._following = events.train_ends[users_of(events, self._train)] - self._train - 1  # training events of the user
        self._ends = np.cumsum(np.bincount(events.item[train], minlength=self._items))  # of an item in `train`

    def begun(self, window: int) -> np.ndarray:
        """[items] int64: the number of pairs that begin with each item."""
        total = np.concatenate([[0], np.cumsum(np.minimum(self._following, window))])
        return np.diff(total[np.concatenate([[0], self._ends])])

    def __call__(self, window: int, power: float) -> Matrix:
        """C [items, items] float64. Raises ValueError if window is below 1."""
        if window < 1:
            raise ValueError(f"window = {window} must be 1 or more")
        counts = self._kept.pop((window, power), None)
        if counts is None:
            counts = self._count(window, np.rint(np.arange(1, window + 1) ** -float(power) / _DISTANCE) * _DISTANCE)
        while self._kept and counts.nnz + sum(other.nnz for other in self._kept.values()) > _KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[window, power] = counts
        return counts

    def _count(self, window: int, weights: np.ndarray) -> Matrix:
        indptr, columns, counts = [np.zeros(1, np.int64)], [], []
        first, most = 0, max(50, _KEPT // self._items)
        for stop in blocks(self.begun(window), _PAIRS):
            row, column, count = self._block(first, stop, window, weights)
            if len(row) and np.bincount(row).max() > most:
                order = np.lexsort((column, -count, row))
                order = np.sort(order[np.arange(len(row)) - np.searchsorted(row, row) < most])
                row, column, count = row[order], column[order], count[order]
            indptr.append(indptr[-1][-1] + np.cumsum(np.bincount(row, minlength=stop - first)))
            columns.append(column.astype(np.int32))
            counts.append(count)
            first = stop
        parts = (np.concatenate(part) for part in (counts, columns, indptr))
        return sparse.csr_array(tuple(parts), (self._items, self._items))

    def _block(self, first: int, stop: int, window: int, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(item - first, following item, count) of the items first:stop, ascending."""
        size = (stop - first) * self._items
        key, count = np.zeros(0, np.int64), np.zeros(0)
        at = slice(self._ends[first - 1] if first else 0, self._ends[stop - 1])
        train, following = self._train[at], np.minimum(self._following[at], window)
        begin = 0
        for end in blocks(following, _PAIRS):
            source, position = expand(train[begin:end] + 1, following[begin:end])
            event = train[begin:end][source]
            pair = (self._item[event].astype(np.int64) - first) * self._items + self._item[position]
            more = sums_by_key(pair, size, weights[position - event - 1])
            key, count = more if not len(key) else sums_by_key(np.append(key, more[0]), size, np.append(count, more[1]))
            begin = end
        return *np.divmod(key, self._items), count


def blocks(cost: np.ndarray, most: int) -> np.ndarray:
    """The ends of consecutive blocks of rows. A block costs at most `most`, or it is one row. cost: [n] of each row, 0 or more."""
    total, stops, stop = np.cumsum(cost), [], 0
    while stop < len(cost):
        stop = max(stop + 1, int(np.searchsorted(total, (total[stop - 1] if stop else 0) + most, "right")))
        stops.append(stop)
    return np.array(stops, np.int64)


def history_weights(last: int, decay: float, share: float) -> np.ndarray:
    """[last + 1, last]: the weight of an item by the number of items that count and by its age, in multiples of 2^-16.

    Raises ValueError if last is below 1, decay is not in (0, 1], or share is not in [0, 1].
    """
    if last < 1 or not 0 < decay <= 1 or not 0 <= share <= 1:
        raise ValueError(f"last = {last} must be 1 or more, decay = {decay} in (0, 1], share = {share} in [0, 1]")
    number, age = np.arange(1, last + 1)[:, None], np.arange(last)
    falling = np.where(age < number, decay ** age.astype(float), 0)
    weights = share * falling / falling.sum(1, keepdims=True) + (1 - share) * (age < number) / number
    return np.concatenate([np.zeros((1, last)), np.rint(weights / _WEIGHT)])


def transitions(
    events: Events, counts: PairCounts, window: int, power: float, tau: float, last: int, decay: float, share: float, popularity: float
) -> HistorySums:
    """Smoothed transition counts (see the module's docstring).

    Args:
      events: all events, of which the training events count.
      counts: of these events.
      window, power: of the pairs.
      tau: the prior, in multiples of the number of items: tau = 2 is 2·I in the formula.
      last, decay, share: of the weights (`history_weights`).
      popularity: lambda. The popularity is the number of training events; an item without one counts as an item with one.

    Raises:
      ValueError: if a setting is out of range, or a term is too large to be exact (60 or more).
    """
    if not tau > 0:
        raise ValueError(f"tau = {tau} must be above 0")
    pairs = counts(window, power)
    logs = np.log1p(pairs.data / tau)
    base = popularity * np.log(np.maximum(events.train_counts, 1))
    if max(logs.max(initial=0), np.abs(base).max(initial=0)) >= _LARGEST:
        raise ValueError(f"tau = {tau} is too small, or popularity = {popularity} too large: a term must be below {_LARGEST:g}")
    unit = _WEIGHT * _LOGARITHM
    matrix = sparse.csr_array((np.rint(logs / _LOGARITHM), pairs.indices, pairs.indptr), pairs.shape)
    return HistorySums(np.rint(base / unit).astype(np.int64), matrix, history_weights(last, decay, share), unit)


def rules(events: Events, counts: PairCounts, window: int, last: int, decay: float, share: float = 1.0) -> HistorySums:
    """Sequential rules (Kamehkhosh, Jannach and Ludewig 2017; Ludewig and Jannach 2018), with the published weight 1/d of a pair.

    The published score is of the last item alone (last = 1). Its normaliser is the same for all candidates. Here a rule's count is divided
    by the number of pairs that begin with its first item, which matters if several items of the history count. Candidates with equal
    scores, most often 0, are ordered by popularity, as with the other baselines.

    Args:
      events: all events, of which the training events count.
      counts: of these events.
      window: largest distance of a pair.
      last, decay, share: of the weights (`history_weights`).

    Raises:
      ValueError: if a setting is out of range.
    """
    pairs = counts(window, 1.0)
    confidence = pairs.data / np.repeat(counts.begun(window), np.diff(pairs.indptr))
    matrix = sparse.csr_array((np.rint(confidence / _SHARE), pairs.indices, pairs.indptr), pairs.shape)
    return HistorySums(events.train_counts, matrix, history_weights(last, decay, share), _WEIGHT * _SHARE)

"""Counting baselines, and a plain NumPy ranking for any scorer.

Both follow the evaluation protocol. The candidates of a target are all items, without the items of the user's whole history before the
target (`filter_seen`), but with the target itself. rank = 1 + #(score > target's), ties = #(other candidates with an equal score). A target
is the index of an event; its history is the events of the same user before it.

A scorer is a callable `(events, targets [n]) -> scores [n, items]` that returns finite scores. If it also has a method
`ranks(events, targets, filter_seen) -> (rank, ties)`, this method is used. The counting baselines have one, which needs no dense scores.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from scipy import sparse

from iam_jax.data.splits import TRAIN, Events, users_of

BLOCK = 1 << 23  # dense scores that exist at the same time: 64 MiB of float64
_CHUNK = 1 << 12  # targets that are ranked at the same time without dense scores
ENTRIES = 1 << 22  # pairs of items that item-kNN counts or scores at the same time

ScoreFunction = Callable[[Events, np.ndarray], np.ndarray]
Pairs = tuple[np.ndarray, np.ndarray]  # (row [m], item [m])


def rank_scores(scores: np.ndarray, target: np.ndarray, seen: Pairs | None = None) -> Pairs:
    """Computes exact ranks from dense scores.

    Args:
      scores: [n, items], finite integers or floats.
      target: [n] item of each row.
      seen: (row [m], item [m]) pairs that are no candidates, in any order; they may repeat. The target of a row is always a candidate.

    Returns:
      rank [n] from 1 and ties [n] from 0, int64.

    Raises:
      ValueError: if a score is not finite.
    """
    scores, target = np.asarray(scores), np.asarray(target)
    if np.issubdtype(scores.dtype, np.inexact) and not np.isfinite(scores).all():
        row, item = np.argwhere(~np.isfinite(scores))[0]
        raise ValueError(f"the score of item {item} in row {row} is {scores[row, item]}: scores must be finite")
    own = scores[np.arange(len(target)), target]
    above = (scores > own[:, None]).sum(1)
    equal = (scores == own[:, None]).sum(1) - 1
    if seen is not None:
        row, item = others(*seen, target, scores.shape[1])
        above, equal = _count(above, equal, -1, row, scores[row, item], own)
    return above + 1, equal


def evaluate(
    scorer: ScoreFunction,
    events: Events,
    targets: np.ndarray,
    filter_seen: bool = True,
    progress: Callable[[int], object] | None = None,
) -> Pairs:
    """Ranks each target event with a scorer, in chunks of bounded memory.

    Args:
      scorer: see the module's docstring.
      events: all events.
      targets: [n] indices into the events.
      filter_seen: whether items of the user's history before the target are no candidates (except the target).
      progress: is called after each chunk with its number of targets, for instance `tqdm.update`.

    Returns:
      rank [n] and ties [n], int64.

    Raises:
      ValueError: if a score is not finite.
    """
    targets, items = np.asarray(targets, np.int64), len(events.item_ids)
    rank, ties = np.ones(len(targets), np.int64), np.zeros(len(targets), np.int64)
    ranks = getattr(scorer, "ranks", None)
    step = _CHUNK if ranks else max(1, BLOCK // max(1, items))
    for start in range(0, len(targets), step):
        chunk = targets[start : start + step]
        if ranks:
            chunk_ranks = ranks(events, chunk, filter_seen)
        else:
            seen = histories(events, chunk) if filter_seen else None
            chunk_ranks = rank_scores(scorer(events, chunk), events.item[chunk], seen)
        rank[start : start + step], ties[start : start + step] = chunk_ranks
        if progress is not None:
            progress(len(chunk))
    return rank, ties


def histories(events: Events, targets: np.ndarray) -> Pairs:
    """The (row, item) pairs of the targets' histories: row by row in time order, with repeats."""
    begin = events.offsets[users_of(events, targets)]
    row, position = expand(begin, targets - begin)
    return row, events.item[position].astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Integer scores that do not depend on the history, except for a few items whose scores depend on its last item.

    Few items follow a given item. So a rank among the whole catalogue is a lookup in the sorted `base` scores, which is corrected for these
    items and for the seen items. There is no [targets, items] array. `__call__` is the dense equivalent.
    """

    base: np.ndarray  # [items] int64
    offsets: np.ndarray  # [items + 1]: item[offsets[a]:offsets[a + 1]] have other scores if a is the last item
    item: np.ndarray  # [m] int64, sorted within each last item
    score: np.ndarray  # [m] int64, the scores of `item`
    unit: ClassVar[float] = 1.0

    def __call__(self, events: Events, targets: np.ndarray) -> np.ndarray:
        """Scores [n, items] int64."""
        scores = np.tile(self.base, (len(targets), 1))
        row, entry = self._entries(_last(events, targets))
        scores[row, self.item[entry]] = self.score[entry]
        return scores

    def ranks(self, events: Events, targets: np.ndarray, filter_seen: bool) -> Pairs:
        target, last, ordered = events.item[targets].astype(np.int64), _last(events, targets), self._ordered
        own = self._lookup(last, target)
        left, right = np.searchsorted(ordered, own, "left"), np.searchsorted(ordered, own, "right")
        above, equal = len(ordered) - right, right - left  # as if all items had their base scores
        row, entry = self._entries(last)
        above, equal = _count(above, equal, -1, row, self.base[self.item[entry]], own)
        above, equal = _count(above, equal, +1, row, self.score[entry], own)
        if filter_seen:
            row, item = others(*histories(events, targets), target, len(self.base))
            above, equal = _count(above, equal, -1, row, self._lookup(last[row], item), own)
        return above + 1, equal - 1  # the target itself is among the equal scores

    @functools.cached_property
    def _ordered(self) -> np.ndarray:
        return np.sort(self.base)

    @functools.cached_property
    def _keys(self) -> np.ndarray:
        """Pairs (last item, item) as one number each, ascending."""
        size = len(self.base)
        return np.repeat(np.arange(size), np.diff(self.offsets)) * size + self.item

    def _entries(self, last: np.ndarray) -> Pairs:
        """(row, index into `item` and `score`) of every item that does not have its base score."""
        begin = np.where(last < 0, 0, self.offsets[last])
        return expand(begin, np.where(last < 0, 0, self.offsets[last + 1] - begin))

    def _lookup(self, last: np.ndarray, item: np.ndarray) -> np.ndarray:
        """[n] the score of `item` after `last`."""
        if not len(self.item):
            return self.base[item]
        wanted = last * len(self.base) + item
        place = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return np.where(self._keys[place] == wanted, self.score[place], self.base[item])


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Item-kNN. The score of a candidate is the sum of decay^age times similarity, over the last items of the history that have the
    candidate among their nearest neighbours. Candidates that are no neighbours of any item come after all others, ordered by popularity.

    The terms are rounded to multiples of 2^-40, so that sums and ties are exact in any order of summation. A rank is a lookup in the sorted
    `base` scores, which is corrected for the few neighbours and the seen items. `__call__` is the dense equivalent.
    """

    base: np.ndarray  # [items] int64, negative: popularity - (largest popularity + 1)
    offsets: np.ndarray  # [items + 1]: the neighbours of item a are offsets[a]:offsets[a + 1]
    item: np.ndarray  # [m] int64
    similarity: np.ndarray  # [m] float64, in (0, 1]
    decay: float  # weight of an item relative to the next item
    last: int  # number of items of the history that count
    unit: ClassVar[float] = 2.0**-40  # a score is this times its integer

    def __call__(self, events: Events, targets: np.ndarray) -> np.ndarray:
        """Scores [n, items] int64."""
        scores = np.tile(self.base, (len(targets), 1))
        key, score = self._scores(events, np.asarray(targets))
        scores.reshape(-1)[key] = score
        return scores

    def ranks(self, events: Events, targets: np.ndarray, filter_seen: bool) -> Pairs:
        step = max(1, ENTRIES // max(1, self.last * int(np.diff(self.offsets).max(initial=0))))
        parts = [self._ranks(events, targets[at : at + step], filter_seen) for at in range(0, len(targets), step)]
        rank, ties = zip(*parts, strict=True)
        return np.concatenate(rank), np.concatenate(ties)

    def _ranks(self, events: Events, targets: np.ndarray, filter_seen: bool) -> Pairs:
        return ranks_by_entries(events, targets, filter_seen, self.base, self._ordered, *self._scores(events, targets))

    @functools.cached_property
    def _ordered(self) -> np.ndarray:
        return np.sort(self.base)

    def _scores(self, events: Events, targets: np.ndarray) -> Pairs:
        """(row * items + item, score) of every candidate with a positive score, ascending."""
        begin = np.maximum(events.offsets[users_of(events, targets)], targets - self.last)
        row, position = expand(begin, targets - begin)
        weight, item = self.decay ** (targets[row] - 1.0 - position), events.item[position]
        source, entry = expand(self.offsets[item], self.offsets[item + 1] - self.offsets[item])
        score = np.rint(weight[source] * self.similarity[entry] * 2.0**40)  # sums of integers below 2^53 are exact in float64
        key, total = sums_by_key(row[source] * len(self.base) + self.item[entry], len(targets) * len(self.base), score)
        total = total.astype(np.int64)
        return key[total > 0], total[total > 0]


def popularity(events: Events) -> Counts:
    """The number of training events of each item."""
    count = np.bincount(events.item[events.label == TRAIN], minlength=len(events.item_ids))
    return Counts(count, np.zeros(len(count) + 1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))


def last_item_transitions(events: Events) -> Counts:
    """First-order Markov chain: how often the candidate directly followed the last item of the history in users' training events.

    The last item is the item of the event before the target, whatever its label (for a test target, the validation event). Equal counts,
    most often 0, are ordered by popularity. This lexicographic order is exact in int64: count·(largest popularity + 1) + popularity. It is
    a strong variant, since in the plain chain nearly the whole catalogue ties at 0. Without a history, the score is the popularity.
    """
    base, items = popularity(events).base, len(events.item_ids)
    train = events.label == TRAIN
    follows = train[1:] & train[:-1]
    starts = events.offsets[1:-1]
    follows[starts[(starts > 0) & (starts < len(train))] - 1] = False  # a user's first event follows no other
    item = events.item.astype(np.int64)
    keys, count = np.unique(item[:-1][follows] * items + item[1:][follows], return_counts=True)
    last, item = np.divmod(keys, items)
    return Counts(base, np.searchsorted(last, np.arange(items + 1)), item, count * (base.max(initial=0) + 1) + base[item])


def ranks_by_entries(
    events: Events, targets: np.ndarray, filter_seen: bool, base: np.ndarray, ordered: np.ndarray, key: np.ndarray, score: np.ndarray
) -> Pairs:
    """Ranks without dense scores: most candidates have their base score, some an entry.

    Args:
      events, targets, filter_seen: as in `evaluate`.
      base: [items] int64; ordered: the same, sorted.
      key: [m] int64, ascending: row * items + item of each entry.
      score: [m] int64, the scores of the entries.

    Returns:
      rank [n] and ties [n], int64.
    """
    target, items = events.item[targets].astype(np.int64), len(base)
    row, item = np.divmod(key, items)

    def lookup(row: np.ndarray, item: np.ndarray) -> np.ndarray:
        if not len(key):
            return base[item]
        wanted = row * items + item
        place = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
        return np.where(key[place] == wanted, score[place], base[item])

    own = lookup(np.arange(len(target)), target)
    left, right = np.searchsorted(ordered, own, "left"), np.searchsorted(ordered, own, "right")
    above, equal = _count(items - right, right - left, -1, row, base[item], own)
    above, equal = _count(above, equal, +1, row, score, own)
    if filter_seen:
        row, item = others(*histories(events, targets), target, items)
        above, equal = _count(above, equal, -1, row, lookup(row, item), own)
    return above + 1, equal - 1  # the target itself is among the equal scores


def item_knn(events: Events, k: int = 100, decay: float = 0.8, last: int = 50) -> Neighbours:
    """Item-based nearest neighbours, from the users' training events.

    The similarity of two items a and b is the cosine of their columns in the users x items matrix:
    (users with both) / sqrt((users with a) x (users with b)). Blocks of items bound the memory. The time grows with users x last².

    Args:
      events: all events, of which the training events count.
      k: number of neighbours of an item; among equally similar items, the first of the catalogue are kept.
      decay: in (0, 1], weight of an item of the history relative to the next item; 1: equal weights.
      last: number of a user's last training events that count as co-occurring, and number of items of a history that are scored; at most
        8192.

    Raises:
      ValueError: if k, decay or last is out of range.
    """
    if k < 1 or not 0 < decay <= 1 or not 1 <= last <= 1 << 13:
        raise ValueError(f"k = {k} must be 1 or more, decay = {decay} in (0, 1], last = {last} in [1, 8192]")
    count, items = popularity(events).base, len(events.item_ids)
    ends = events.train_ends
    begin = np.maximum(events.offsets[:-1], ends - last)
    user, position = expand(begin, ends - begin)
    user, item = np.divmod(np.unique(user * items + events.item[position]), items)  # each item once per user
    having = np.bincount(item, minlength=items)
    start = np.searchsorted(user, np.arange(len(ends) + 1))  # user u's items are item[start[u] : start[u + 1]]
    has_UI = sparse.csr_array((np.ones(len(item), np.int64), item, start), (len(ends), items))
    has_IU = has_UI.T.tocsr()
    pairs = np.cumsum(has_IU @ np.diff(start))  # cumulative number of pairs of an item with the items of its users
    offsets, blocks = [np.zeros(1, np.int64)], []
    first = 0
    while first < items:
        stop = max(first + 1, int(np.searchsorted(pairs, (pairs[first - 1] if first else 0) + ENTRIES, "right")))
        counts = has_IU[first:stop] @ has_UI
        counts.sort_indices()  # among equal similarities, the first of the catalogue come first
        row, other = (index.astype(np.int64) for index in counts.tocoo().coords)  # row: of the block
        similarity = counts.data / np.sqrt(having[row + first] * having[other].astype(float))
        different = row + first != other
        row, other, similarity = row[different], other[different], similarity[different]
        order = np.lexsort((-similarity, row))
        row, other, similarity = row[order], other[order], similarity[order]
        nearest = np.arange(len(row)) - np.searchsorted(row, row) < k
        blocks.append((other[nearest], similarity[nearest]))
        offsets.append(offsets[-1][-1] + np.cumsum(np.bincount(row[nearest], minlength=stop - first)))
        first = stop
    neighbour, similarity = (np.concatenate(column) for column in zip(*blocks, strict=True))
    return Neighbours(count - 1 - count.max(initial=0), np.concatenate(offsets), neighbour, similarity, decay, last)


def sums_by_key(key: np.ndarray, size: int, weight: np.ndarray) -> Pairs:
    """The distinct keys in ascending order, and the sum of the weights of each. All keys are below `size`."""
    if size <= 2 * len(key):
        distinct = np.flatnonzero(np.bincount(key, minlength=size))
        return distinct, np.bincount(key, weight, size)[distinct]
    distinct, index = np.unique(key, return_inverse=True)
    return distinct, np.bincount(index, weight, len(distinct))


def _last(events: Events, targets: np.ndarray) -> np.ndarray:
    """[n]: the item before each target; −1 for a user's first event."""
    targets = np.asarray(targets)
    first = events.offsets[users_of(events, targets)] == targets
    return np.where(first, -1, events.item[targets - 1]).astype(np.int64)


def expand(begin: np.ndarray, length: np.ndarray) -> Pairs:
    """(row, position) of the concatenated ranges begin[r] : begin[r] + length[r]."""
    row = np.repeat(np.arange(len(begin)), length)
    return row, np.arange(len(row)) + np.repeat(begin - (np.cumsum(length) - length), length)


def others(row: np.ndarray, item: np.ndarray, target: np.ndarray, items: int) -> Pairs:
    """The distinct (row, item) pairs, without the target of each row. items: number of items of the catalogue."""
    row, item = np.divmod(np.unique(row * np.int64(items) + item), items)
    different = item != target[row]
    return row[different], item[different]


def _count(above: np.ndarray, equal: np.ndarray, sign: int, row: np.ndarray, score: np.ndarray, own: np.ndarray) -> Pairs:
    """Adds candidates with the given rows and scores to the counts of each row (sign +1), or subtracts them (sign −1)."""
    own_score, rows = own[row], len(own)
    return (
        above + sign * np.bincount(row[score > own_score], minlength=rows),
        equal + sign * np.bincount(row[score == own_score], minlength=rows),
    )

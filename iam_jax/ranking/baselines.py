"""Counting baselines, and the plain NumPy ranking that every scorer can be put through.

All follow the protocol of the evaluation: the candidates of a target are all items, the user's whole history before the target
is left out except the target itself (`filter_seen`), rank = 1 + #(score > target's), ties = #(other candidates with an equal
score). A target is the index of an event; its history is the same user's events before it.

A scorer is a callable `(events, targets [n]) -> scores [n, items]`, finite. One that also has a method
`ranks(events, targets, filter_seen) -> (rank, ties)` is ranked by that: the counting baselines do, without a dense score.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from scipy import sparse

from iam_jax.data.splits import TRAIN, Events, users_of

_BLOCK = 1 << 23  # dense scores that exist at a time: 64 MiB of float64
_CHUNK = 1 << 12  # targets at a time where no dense scores exist
_ENTRIES = 1 << 22  # pairs of items that item-kNN counts or scores at a time

ScoreFunction = Callable[[Events, np.ndarray], np.ndarray]
Pairs = tuple[np.ndarray, np.ndarray]  # (row [m], item [m])


def rank_scores(scores: np.ndarray, target: np.ndarray, seen: Pairs | None = None) -> Pairs:
    """Exact ranks from dense scores.

    Args:
      scores: [n, items], integers or floats, finite.
      target: [n] item of each row.
      seen: (row [m], item [m]) pairs to leave out, in any order and with repeats; a row's own target always stays in.

    Returns:
      rank [n] from 1 and ties [n] from 0, int64.

    Raises:
      ValueError: a score is not finite.
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
    """Rank and ties of each target event under a scorer, in chunks of bounded memory.

    Args:
      scorer: see the module's docstring.
      events: all events.
      targets: [n] indices into the events.
      filter_seen: leave out the items of the user's history before the target, except the target.
      progress: called with the number of targets done by each chunk, e.g. `tqdm.update`.

    Returns:
      rank [n] and ties [n], int64.
    """
    targets, items = np.asarray(targets, np.int64), len(events.item_ids)
    rank, ties = np.ones(len(targets), np.int64), np.zeros(len(targets), np.int64)
    ranks = getattr(scorer, "ranks", None)
    step = _CHUNK if ranks else max(1, _BLOCK // max(1, items))
    for start in range(0, len(targets), step):
        chunk = targets[start : start + step]
        if ranks:
            got = ranks(events, chunk, filter_seen)
        else:
            seen = histories(events, chunk) if filter_seen else None
            got = rank_scores(scorer(events, chunk), events.item[chunk], seen)
        rank[start : start + step], ties[start : start + step] = got
        if progress is not None:
            progress(len(chunk))
    return rank, ties


def histories(events: Events, targets: np.ndarray) -> Pairs:
    """All (row, item) pairs of the targets' histories, row by row in time order, repeats included."""
    begin = events.offsets[users_of(events, targets)]
    row, position = _expand(begin, targets - begin)
    return row, events.item[position].astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Integer scores that are the same for every target, but for some items that depend on the last item of the history.

    Few items follow a given item, so a rank over the whole catalogue is a lookup among the sorted `base` scores, corrected for
    those few and for the seen items: no [targets, items] array. The dense twin is `__call__`.
    """

    base: np.ndarray  # [items] int64
    offsets: np.ndarray  # [items + 1]: what replaces the score of some items after last item a is at offsets[a]:offsets[a + 1]
    item: np.ndarray  # [m] int64, sorted within one last item
    score: np.ndarray  # [m] int64

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
        above, equal = (
            len(ordered) - right,
            right - left,
        )  # as if all had their base score
        row, entry = self._entries(last)
        above, equal = _count(above, equal, -1, row, self.base[self.item[entry]], own)
        above, equal = _count(above, equal, +1, row, self.score[entry], own)
        if filter_seen:
            row, item = others(*histories(events, targets), target, len(self.base))
            above, equal = _count(above, equal, -1, row, self._lookup(last[row], item), own)
        return above + 1, equal - 1  # the target itself is one of the equals

    @functools.cached_property
    def _ordered(self) -> np.ndarray:
        return np.sort(self.base)

    @functools.cached_property
    def _keys(self) -> np.ndarray:
        """(last item, item) as one number, ascending."""
        size = len(self.base)
        return np.repeat(np.arange(size), np.diff(self.offsets)) * size + self.item

    def _entries(self, last: np.ndarray) -> Pairs:
        """(row, index into item and score) of every replaced score."""
        begin = np.where(last < 0, 0, self.offsets[last])
        return _expand(begin, np.where(last < 0, 0, self.offsets[last + 1] - begin))

    def _lookup(self, last: np.ndarray, item: np.ndarray) -> np.ndarray:
        """[n] the score of `item` after `last`."""
        if not len(self.item):
            return self.base[item]
        wanted = last * len(self.base) + item
        place = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return np.where(self._keys[place] == wanted, self.score[place], self.base[item])


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Item-kNN: a candidate's score is the sum over the last items of the history of decay^age times its similarity to the item, where it
    is one of the item's nearest neighbours. Candidates that are no neighbour of any stand below all others, by popularity.

    Contributions are rounded to multiples of 2^-40, so that sums, and with them ties, are exact and do not depend on an order. A rank is a
    lookup among the sorted `base` scores, corrected for the few neighbours and the seen items. The dense twin is `__call__`.
    """

    base: np.ndarray  # [items] int64, negative: popularity less one more than the largest
    offsets: np.ndarray  # [items + 1]: the neighbours of item a are offsets[a]:offsets[a + 1]
    item: np.ndarray  # [m] int64
    similarity: np.ndarray  # [m] float64, in (0, 1]
    decay: float  # the weight of an item relative to that of the one after it
    last: int  # so many items of a history count

    def __call__(self, events: Events, targets: np.ndarray) -> np.ndarray:
        """Scores [n, items] int64."""
        scores = np.tile(self.base, (len(targets), 1))
        key, score = self._scores(events, np.asarray(targets))
        scores.reshape(-1)[key] = score
        return scores

    def ranks(self, events: Events, targets: np.ndarray, filter_seen: bool) -> Pairs:
        step = max(1, _ENTRIES // max(1, self.last * int(np.diff(self.offsets).max(initial=0))))
        parts = [self._ranks(events, targets[at : at + step], filter_seen) for at in range(0, len(targets), step)]
        rank, ties = zip(*parts, strict=True)
        return np.concatenate(rank), np.concatenate(ties)

    def _ranks(self, events: Events, targets: np.ndarray, filter_seen: bool) -> Pairs:
        target, items = events.item[targets].astype(np.int64), len(self.base)
        key, score = self._scores(events, targets)
        row, item = np.divmod(key, items)

        def lookup(row: np.ndarray, item: np.ndarray) -> np.ndarray:
            if not len(key):
                return self.base[item]
            wanted = row * items + item
            place = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
            return np.where(key[place] == wanted, score[place], self.base[item])

        own = lookup(np.arange(len(target)), target)
        left, right = np.searchsorted(self._ordered, own, "left"), np.searchsorted(self._ordered, own, "right")
        above, equal = _count(items - right, right - left, -1, row, self.base[item], own)
        above, equal = _count(above, equal, +1, row, score, own)
        if filter_seen:
            row, item = others(*histories(events, targets), target, items)
            above, equal = _count(above, equal, -1, row, lookup(row, item), own)
        return above + 1, equal - 1  # the target itself is one of the equals

    @functools.cached_property
    def _ordered(self) -> np.ndarray:
        return np.sort(self.base)

    def _scores(self, events: Events, targets: np.ndarray) -> Pairs:
        """(row * items + item, score) of every candidate with a positive score, ascending."""
        begin = np.maximum(events.offsets[users_of(events, targets)], targets - self.last)
        row, position = _expand(begin, targets - begin)
        weight, item = self.decay ** (targets[row] - 1.0 - position), events.item[position]
        of, entry = _expand(self.offsets[item], self.offsets[item + 1] - self.offsets[item])
        score = np.rint(weight[of] * self.similarity[entry] * 2.0**40)  # whole numbers below 2^53 have exact sums in float64
        key, total = _tally(row[of] * len(self.base) + self.item[entry], len(targets) * len(self.base), score)
        total = total.astype(np.int64)
        return key[total > 0], total[total > 0]


def popularity(events: Events) -> Counts:
    """The number of training events of each item."""
    count = np.bincount(events.item[events.label == TRAIN], minlength=len(events.item_ids))
    return Counts(count, np.zeros(len(count) + 1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))


def last_item_transitions(events: Events) -> Counts:
    """First-order Markov chain: how often the candidate directly followed the history's last item in a user's training events.

    The last item is the last before the target, whatever its label (for a test target the validation event). Equal counts, zero
    above all, are ordered by popularity: a lexicographic order, exact in int64 as count·(largest popularity + 1) + popularity.
    So it is a strong variant: the plain chain leaves nearly the whole catalogue tied at zero. Without a history it is
    popularity.
    """
    base, items = popularity(events).base, len(events.item_ids)
    train = events.label == TRAIN
    follows = train[1:] & train[:-1]
    starts = events.offsets[1:-1]
    follows[starts[(starts > 0) & (starts < len(train))] - 1] = False  # a user's first event follows nothing
    item = events.item.astype(np.int64)
    keys, count = np.unique(item[:-1][follows] * items + item[1:][follows], return_counts=True)
    last, item = np.divmod(keys, items)
    return Counts(base, np.searchsorted(last, np.arange(items + 1)), item, count * (base.max(initial=0) + 1) + base[item])


def item_knn(events: Events, k: int = 100, decay: float = 0.8, last: int = 50) -> Neighbours:
    """Item-based nearest neighbours over the users' training histories.

    Args:
      events: all events; those of training count.
      k: neighbours kept of an item, of equal ones those that stand first in the catalogue.
      decay: in (0, 1], the weight of an item of the history relative to that of the one after it; 1: all weigh the same.
      last: so many of a user's last training events count as occurring together, and so many of a history when scoring; at most 8192.

    Two items' similarity is the cosine of their columns in the users x items matrix: users who have both / sqrt(users who have the one x
    users who have the other). Memory is bounded by blocks of items; time grows with users x last².
    """
    if k < 1 or not 0 < decay <= 1 or not 1 <= last <= 1 << 13:
        raise ValueError(f"k = {k} must be 1 or more, decay = {decay} in (0, 1], last = {last} in [1, 8192]")
    count, items = popularity(events).base, len(events.item_ids)
    ends = events.train_ends
    begin = np.maximum(events.offsets[:-1], ends - last)
    user, position = _expand(begin, ends - begin)
    user, item = np.divmod(np.unique(user * items + events.item[position]), items)  # a repeated item is one
    having = np.bincount(item, minlength=items)
    start = np.searchsorted(user, np.arange(len(ends) + 1))  # user u's items are item[start[u] : start[u + 1]]
    has_UI = sparse.csr_array((np.ones(len(item), np.int64), item, start), (len(ends), items))
    has_IU = has_UI.T.tocsr()
    pairs = np.cumsum(has_IU @ np.diff(start))  # of an item with those of its users, summed up
    offsets, found = [np.zeros(1, np.int64)], []
    at = 0
    while at < items:
        stop = max(at + 1, int(np.searchsorted(pairs, (pairs[at - 1] if at else 0) + _ENTRIES, "right")))
        counted = has_IU[at:stop] @ has_UI
        counted.sort_indices()  # of equal similarities the first in the catalogue come first
        one, other = (index.astype(np.int64) for index in counted.tocoo().coords)
        both = counted.data
        similarity = both / np.sqrt(having[one + at] * having[other].astype(float))
        kept = one + at != other
        one, other, similarity = one[kept], other[kept], similarity[kept]
        order = np.lexsort((-similarity, one))
        one, other, similarity = one[order], other[order], similarity[order]
        near = np.arange(len(one)) - np.searchsorted(one, one) < k
        found.append((other[near], similarity[near]))
        offsets.append(offsets[-1][-1] + np.cumsum(np.bincount(one[near], minlength=stop - at)))
        at = stop
    neighbour, similarity = (np.concatenate(column) for column in zip(*found, strict=True))
    return Neighbours(count - 1 - count.max(initial=0), np.concatenate(offsets), neighbour, similarity, decay, last)


def _tally(key: np.ndarray, size: int, weight: np.ndarray | None = None) -> Pairs:
    """The distinct keys, all below `size`, ascending, and how often each is there (or the sum of its weights)."""
    if size <= 2 * len(key):
        total = np.bincount(key, weight, size)
        there = np.flatnonzero(np.bincount(key, minlength=size) if weight is not None else total)
        return there, total[there]
    distinct, index = np.unique(key, return_inverse=True)
    return distinct, np.bincount(index, weight, len(distinct))


def _last(events: Events, targets: np.ndarray) -> np.ndarray:
    """[n] the item before each target, −1 for a user's first event."""
    targets = np.asarray(targets)
    first = events.offsets[users_of(events, targets)] == targets
    return np.where(first, -1, events.item[targets - 1]).astype(np.int64)


def _expand(begin: np.ndarray, length: np.ndarray) -> Pairs:
    """(row, position) of the concatenated ranges begin[r] : begin[r] + length[r]."""
    row = np.repeat(np.arange(len(begin)), length)
    return row, np.arange(len(row)) + np.repeat(begin - (np.cumsum(length) - length), length)


def others(row: np.ndarray, item: np.ndarray, target: np.ndarray, items: int) -> Pairs:
    """The distinct pairs that are not their row's target: a repeated item is one candidate."""
    row, item = np.divmod(np.unique(row * np.int64(items) + item), items)
    keep = item != target[row]
    return row[keep], item[keep]


def _count(above: np.ndarray, equal: np.ndarray, sign: int, row: np.ndarray, score: np.ndarray, own: np.ndarray) -> Pairs:
    """Adds (sign +1) candidates of the given rows and scores to the counts, or takes them out (−1)."""
    own_score, rows = own[row], len(own)
    return (
        above + sign * np.bincount(row[score > own_score], minlength=rows),
        equal + sign * np.bincount(row[score == own_score], minlength=rows),
    )

"""Packs histories into rows and rows into batches. Batch k is a pure function of (seed, k), so a data position is one integer."""

import bisect
import dataclasses
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from iam_jax.data.catalogue import Catalogue
from iam_jax.data.splits import Events

# Every batch is a dict of int32 arrays. B rows, T token slots, M targets of a row at most, I items of the catalogue.
#   token_BT: token ids
#   user_BT: the token's user, numbered 1, 2, … in the row; 0 is padding
#   group_BT: the number of the token's item inside its user; 0 is the prompt; the suffix counts as an item
#   position_BT: the token's position inside its user
#   label_BT: the next token, if it belongs to a target; else -1
#   item_BT: the token's item in the catalogue; I for the prompt and padding, I + 1 for the suffix
#   within_BT: the token's position inside its item
#   identity_BT (optional): the item, at the slot of its boundary token; else -1
#   target_at_BM: the slot of the state that predicts the target: the last one of the group before it
#   target_BM: the target item; -1 for none
#   segment_BM: the index of the target's segment
# Rows by item (`Rows`, by_item) have one slot for each item, and one each for prompt and suffix: that of the last token. T is then the
# number of these slots, and `position` counts slots.
Batch = dict[str, Any]  # an array each; `leading`, which item_rows.py adds, is a batch


@dataclasses.dataclass(frozen=True)
class Segments:
    """Parts of users' histories. Each is packed whole into one row. Its input is events start:stop, its targets are events first:last.

    The prompt precedes the input. The suffix precedes the last target, event last - 1, which is predicted from the end of the suffix.
    """

    start: np.ndarray  # [n] int64, first event of the input
    stop: np.ndarray  # [n] int64, one after its last
    first: np.ndarray  # [n] int64, first target event
    last: np.ndarray  # [n] int64, one after the last target event

    def __len__(self) -> int:
        return len(self.start)


def training_segments(events: Events, catalogue: Catalogue, row_slots: int, context_items: int, whole_text: bool) -> Segments:
    """Segments in which every training event is a target once, except a user's first (unless a prompt precedes it).

    A history that does not fit in a row is cut between items into windows. The first target of a window has at least `context_items`
    items to its left. With `whole_text` (the token objective) the targets' own tokens are input too. Raises ValueError where a row is
    too small.
    """
    capacity = row_slots - catalogue.frame_tokens
    before = _tokens_before(events, catalogue)
    begin, end = events.offsets[:-1], events.train_ends
    first = begin if catalogue.prompt else begin + 1
    has_target = first < end
    begin, first, end = begin[has_target], first[has_target], end[has_target]
    input_end = end if whole_text else end - 1
    fits = before[input_end] - before[begin] <= capacity
    parts = [(begin[fits], input_end[fits], first[fits], end[fits])]
    for user in np.flatnonzero(~fits):
        target, windows = first[user], []
        while target < end[user]:
            start = max(begin[user], target - context_items) if windows else begin[user]
            stop = int(np.searchsorted(before, before[start] + capacity, side="right")) - 1  # the input that fits: start:stop
            last = min(end[user], stop if whole_text else stop + 1)
            if last <= target:
                through = target if whole_text else target - 1
                needed = catalogue.frame_tokens + before[through + 1] - before[start]
                raise ValueError(f"rows of {row_slots} slots: prompt, suffix and events {start} to {through} need {needed}")
            windows.append((start, last if whole_text else last - 1, target, last))
            target = last
        start, stop, target, last = (np.array(column) for column in zip(*windows, strict=True))
        parts.append((start, stop, target, last))
    return Segments(*(np.concatenate(columns).astype(np.int64) for columns in zip(*parts, strict=True)))


def evaluation_segments(events: Events, catalogue: Catalogue, row_slots: int, targets: np.ndarray, whole_text: bool = False) -> Segments:
    """One segment for each target event [n]: its input is as many of the most recent items before the target as fit in a row.

    With `whole_text` (for the loss of the target's tokens) the target itself is input too and has to fit. Raises ValueError where neither
    an item nor a prompt precedes a target in its row.
    """
    before = _tokens_before(events, catalogue)
    begin = events.offsets[np.searchsorted(events.offsets, targets, side="right") - 1]
    stop = targets + 1 if whole_text else targets
    start = np.searchsorted(before, before[stop] - (row_slots - catalogue.frame_tokens), side="left")
    start = np.maximum(begin, start)
    unseen = targets[start > targets if catalogue.prompt else start >= targets]
    if len(unseen):
        raise ValueError(f"rows of {row_slots} slots: no prompt or earlier item fits before event {unseen[0]}")
    return Segments(start, stop, targets, targets + 1)


def _tokens_before(events: Events, catalogue: Catalogue) -> np.ndarray:
    """[events + 1] int64: the number of item tokens before each event."""
    return np.concatenate([[0], np.cumsum(catalogue.item_lengths[events.item])])


def pack(sizes: np.ndarray, capacity: int, rng: np.random.Generator | None = None, open_rows: int = 256) -> list[np.ndarray]:
    """Packs by best fit over a bounded number of open rows, in random order (without `rng`: in the given order).

    Returns the indices in each row. Every index occurs once, and no row holds more than `capacity`.
    """
    order = rng.permutation(len(sizes)) if rng is not None else np.arange(len(sizes))
    rows: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (free slots, row), sorted
    smallest = int(sizes.min(initial=capacity))
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        at = bisect.bisect_left(space, (size, -1))
        if at == len(space):
            rows.append([])
            free, row = capacity, len(rows) - 1
        else:
            free, row = space.pop(at)
        rows[row].append(index)
        if free - size >= smallest:
            bisect.insort(space, (free - size, row))
            if len(space) > open_rows:
                space.pop(0)  # the fullest
    return [np.array(row) for row in rows]


class Rows:
    """Random access to packed rows, for Grain."""

    def __init__(
        self,
        events: Events,
        catalogue: Catalogue,
        segments: Segments,
        row_slots: int,
        rng: np.random.Generator | None = None,
        by_item: bool = False,
        identity: bool = False,
    ):
        """row_slots: T. by_item: whether an item has one slot instead of one for each token. identity: whether batches have `identity`."""
        self.events, self.catalogue, self.segments, self.row_slots = events, catalogue, segments, row_slots
        self.by_item, self.identity = by_item, identity
        self._slots = catalogue.boundaries() if by_item else catalogue
        before = _tokens_before(events, self._slots)
        self.sizes = before[segments.stop] - before[segments.start] + self._slots.frame_tokens  # [n] slots
        self.rows = pack(self.sizes, row_slots, rng)
        counts = segments.last - segments.first
        per_row = np.array([counts[row].sum() for row in self.rows])
        self.targets_per_row = int(per_row.max(initial=1))
        # At most so many tokens are in a row's items and in its targets that are not input.
        before = _tokens_before(events, catalogue)
        tokens = before[segments.stop] - before[segments.start] + catalogue.frame_tokens
        tokens += np.where(segments.last > segments.stop, catalogue.lengths[events.item[segments.last - 1]], 0)
        self.most_item_tokens = max((int(tokens[row].sum()) for row in self.rows), default=0)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fill(self) -> float:
        """The share of the slots that are used."""
        return float(self.sizes.sum() / (max(len(self.rows), 1) * self.row_slots))

    @property
    def targets(self) -> int:
        return int((self.segments.last - self.segments.first).sum())

    def __getitem__(self, row: int) -> Batch:
        T, catalogue, segments = self.row_slots, self._slots, self.segments
        index = self.rows[row]
        start, stop, first, last = segments.start[index], segments.stop[index], segments.first[index], segments.last[index]
        prompt, suffix = int(catalogue.prompt), int(catalogue.suffix)
        # One entry per group: each segment's prompt, if there is one, then its items, with the suffix before the last target.
        groups = stop - start + prompt + suffix
        segment_of = np.repeat(np.arange(len(index)), groups)
        number = count_up(groups)
        event = start[segment_of] + number - prompt
        is_prompt = number < prompt
        is_suffix = (event == last[segment_of] - 1) & (suffix > 0)
        event -= (event >= last[segment_of]) & (suffix > 0)
        item = self.events.item[np.where(is_prompt, 0, event)]
        item = np.where(is_prompt, catalogue.items, np.where(is_suffix, catalogue.items + 1, item))
        length = catalogue.lengths[item]
        ends = np.cumsum(length)
        slots = int(ends[-1])
        group_of = np.repeat(np.arange(len(item)), length)
        within = np.arange(slots) - (ends - length)[group_of]
        segment_start = (ends - length)[np.cumsum(groups) - groups]

        out = {name: np.zeros(T, np.int32) for name in ("token", "user", "group", "position", "within")}
        out["token"][:slots] = catalogue.tokens[catalogue.offsets[item][group_of] + within]
        out["user"][:slots] = segment_of[group_of] + 1
        out["group"][:slots] = (number + (1 - prompt))[group_of]
        out["position"][:slots] = np.arange(slots) - segment_start[segment_of[group_of]]
        out["item"] = np.full(T, catalogue.items, np.int32)
        out["item"][:slots] = item[group_of]
        out["within"][:slots] = self.catalogue.lengths[item] - 1 if self.by_item else within

        if self.identity:
            out["identity"] = np.full(T, -1, np.int32)
            of_item = item < catalogue.items
            out["identity"][(ends - 1)[of_item]] = item[of_item]

        # An event is predicted from the last state of the group before it.
        counts = last - first
        target_segment = np.repeat(np.arange(len(index)), counts)
        target = first[target_segment] + count_up(counts)
        group_before = (np.cumsum(groups) - groups)[target_segment] + (target - start[target_segment]) + prompt - 1
        group_before += (target == last[target_segment] - 1) * suffix
        M = self.targets_per_row
        out |= {name: np.full(M, -1, np.int32) for name in ("target_at", "target", "segment")}
        out["target_at"][: len(target)] = ends[group_before] - 1
        out["target"][: len(target)] = self.events.item[target]
        out["segment"][: len(target)] = index[target_segment]
        out["target_at"] = np.maximum(out["target_at"], 0)

        # Slot t predicts token t + 1 if that token belongs to a target event of the same user.
        out["label"] = np.full(T, -1, np.int32)
        is_target = ~is_prompt & ~is_suffix & (event >= first[segment_of]) & (event < last[segment_of])
        labelled = is_target[group_of][1:] & (segment_of[group_of][1:] == segment_of[group_of][:-1])
        out["label"][: slots - 1][labelled] = out["token"][1:slots][labelled]
        return out

    def entries(self, chosen: np.ndarray, targets: bool) -> np.ndarray:
        """The distinct catalogue entries in the rows `chosen` and, with `targets`, of their targets. The rows are not assembled for it."""
        index, segments, catalogue = np.concatenate([self.rows[row] for row in chosen]), self.segments, self.catalogue
        spans = [(segments.start[index], segments.stop[index])]
        spans += [(segments.first[index], segments.last[index])] if targets else []
        event = np.concatenate([np.repeat(begin, end - begin) + count_up(end - begin) for begin, end in spans])
        frame = [catalogue.items] * bool(catalogue.prompt) + [catalogue.items + 1] * bool(catalogue.suffix)
        return np.unique(np.concatenate([self.events.item[event], np.array(frame, self.events.item.dtype)]))


def count_up(counts: np.ndarray) -> np.ndarray:
    """[3, 2] -> [0, 1, 2, 0, 1]"""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def training_rows(
    events: Events, catalogue: Catalogue, row_slots: int, context_items: int, whole_text: bool, seed: int, **options: bool
) -> Rows:
    """The training segments in rows, in a random order. options: `by_item` and `identity`, as for `Rows`."""
    slots = catalogue.boundaries() if options.get("by_item") else catalogue
    segments = training_segments(events, slots, row_slots, context_items, whole_text)
    return Rows(events, catalogue, segments, row_slots, np.random.default_rng([seed, 0]), **options)


def evaluation_rows(
    events: Events, catalogue: Catalogue, row_slots: int, targets: np.ndarray, whole_text: bool = False, **options: bool
) -> Rows:
    """The histories of the target events [n] in rows (`evaluation_segments`). options: `by_item` and `identity`, as for `Rows`."""
    slots = catalogue.boundaries() if options.get("by_item") else catalogue
    segments = evaluation_segments(events, slots, row_slots, targets, whole_text)
    return Rows(events, catalogue, segments, row_slots, None, **options)


def training_batches(
    rows: Rows, batch_rows: int, seed: int, start: int = 0, finish: Callable[..., Batch] | None = None, here: np.ndarray | None = None
) -> "grain.DatasetIterator[Batch]":
    """An endless iterator over batches start, start + 1, …. Rows are shuffled anew every epoch, and each occurs once in an epoch.

    `here`: the rows of a batch that this process needs, by place; only they are assembled. None: all. `finish`: turns a batch into the
    model's input (item_rows.py).
    """
    source: Any = _Batches(rows, batch_rows, seed, finish, here)  # grain's protocol names the argument of __getitem__
    dataset = grain.MapDataset.source(source)
    return iter(dataset[start:].to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


class _Batches:
    """Random access to batches. The numbers of a batch's rows are known without assembling the rows."""

    def __init__(self, rows: Rows, batch_rows: int, seed: int, finish: Callable[..., Batch] | None, here: np.ndarray | None):
        self.rows, self.batch_rows, self.finish = rows, batch_rows, finish
        self.here = np.arange(batch_rows) if here is None else here
        self.order = grain.MapDataset.range(len(rows)).shuffle(seed=seed).repeat()

    def __len__(self) -> int:
        return len(self.order) // self.batch_rows

    def __getitem__(self, number: int) -> Batch:
        chosen = np.array([self.order[at] for at in range(number * self.batch_rows, (number + 1) * self.batch_rows)])
        rows = [self.rows[row] for row in chosen[self.here]]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return batch if self.finish is None else self.finish(batch, chosen, self.here)


def users_of_batch(rows: Rows, batch_rows: int, seed: int, number: int) -> list[str]:
    """The ids of the users in training batch `number`, in the order of the data."""
    segment = next(training_batches(rows, batch_rows, seed, number))["segment"]
    first = rows.segments.start[np.unique(segment[segment >= 0])]
    users = np.unique(np.searchsorted(rows.events.offsets, first, side="right") - 1)
    return rows.events.user_ids[users].tolist()


def evaluation_batches(rows: Rows, batch_rows: int, finish: Callable[[Batch], Batch] | None = None) -> "grain.DatasetIterator[Batch]":
    """All rows once, in order. Empty rows fill up the last batch, so that every batch has the same shape."""
    source: Any = _Padded(rows, -len(rows) % batch_rows)
    dataset = grain.MapDataset.source(source).batch(batch_rows)
    if finish is not None:
        dataset = dataset.map(finish)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


class _Padded:
    def __init__(self, rows: Rows, more: int):
        self.rows, self.more = rows, more

    def __len__(self) -> int:
        return len(self.rows) + self.more

    def __getitem__(self, row: int) -> Batch:
        if row < len(self.rows):
            return self.rows[row]
        empty = {name: np.zeros(self.rows.row_slots, np.int32) for name in ("token", "user", "group", "position", "within")}
        empty["item"] = np.full(self.rows.row_slots, self.rows.catalogue.items, np.int32)
        empty["label"] = np.full(self.rows.row_slots, -1, np.int32)
        if self.rows.identity:
            empty["identity"] = np.full(self.rows.row_slots, -1, np.int32)
        nothing = np.full(self.rows.targets_per_row, -1, np.int32)
        return empty | {"target_at": nothing * 0, "target": nothing, "segment": nothing}

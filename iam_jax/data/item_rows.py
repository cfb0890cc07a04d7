"""Packs distinct items into rows of their own, for the layers whose states depend on the item alone.

The states after the leading intra layers are computed once per item in these rows and copied to every occurrence of the item
(`Network.leading_states`). Axes as in batches.py; R: rows of items. Prompt and suffix (entries I and I + 1 of the catalogue) are treated
as items.
"""

import math

import numpy as np

from iam_jax.data.batches import Batch, Rows, count_up
from iam_jax.data.catalogue import Catalogue

CHUNKS = 8  # the rows are computed in at least so many parts, one after another; parts without a token are skipped


def chunks(accumulate: int) -> int:
    """The number of those parts, where a step has `accumulate` micro-batches: at most a micro-batch's share of the rows is computed at the
    same time."""
    return max(CHUNKS, accumulate)


def pack_items(catalogue: Catalogue, items: np.ndarray, row_tokens: int, rows: int | None = None) -> tuple[Batch, np.ndarray]:
    """Packs the items [n] one after another; no item crosses the end of a row. `rows`: R; None: as few as possible.

    Returns `token`, `user` (every item is its own user), `group` and `position` [R, T], and the first slot [n] of each item, counted
    through all rows. Raises ValueError if the rows are too short or too few.
    """
    length = catalogue.lengths[items]
    if length.max(initial=0) > row_tokens:
        raise ValueError(f"row_tokens = {row_tokens}: the longest item has {length.max()} tokens")
    ends = np.cumsum(length)
    first = [0]  # the first item of each row
    while first[-1] < len(items):
        begin = ends[first[-1]] - length[first[-1]]
        first.append(int(np.searchsorted(ends, begin + row_tokens, side="right")))
    row = np.repeat(np.arange(len(first) - 1), np.diff(first))
    before = (ends - length)[first[:-1]]  # tokens before each row
    start = row * row_tokens + ends - length - before[row]
    R = rows if rows is not None else len(before)
    if len(before) > R:
        raise ValueError(f"{len(items)} items need {len(before)} rows of {row_tokens} slots, not {R}")

    out = {name: np.zeros(R * row_tokens, np.int32) for name in ("token", "user", "group", "position")}
    within = count_up(length)
    slot = np.repeat(start, length) + within
    out["token"][slot] = catalogue.tokens[np.repeat(catalogue.offsets[items], length) + within]
    out["user"][slot] = np.repeat(np.arange(len(items)) + 1, length)
    out["group"][slot] = 1
    out["position"][slot] = within
    return {name: x.reshape(R, row_tokens) for name, x in out.items()}, start


class CatalogueItems:
    """The whole catalogue in rows. Replaces a batch's `item` and `within` by the `slot` of every token.

    by_item: only the boundary states are kept, one for each entry of the catalogue; the slot of an item is its number.
    """

    def __init__(self, catalogue: Catalogue, row_tokens: int, rows_at_once: int, by_item: bool = False):
        entries = np.flatnonzero(catalogue.lengths)
        rows, start = pack_items(catalogue, entries, row_tokens)
        self.chunks = math.ceil(len(rows["token"]) / rows_at_once)
        more = self.chunks * rows_at_once - len(rows["token"])
        self.rows = {name: np.pad(x, ((0, more), (0, 0))) for name, x in rows.items()}
        self.start = np.zeros(catalogue.items + 2, np.int64)  # padding is entry I, even without a prompt
        self.start[entries] = start
        self.by_item = by_item
        last = self.start + np.maximum(catalogue.lengths - 1, 0)
        self.kept = last if by_item else None  # [I + 2] the slots whose states are kept; None: all
        self.boundary_slots = np.arange(catalogue.items) if by_item else last[: catalogue.items]

    def __call__(self, batch: Batch) -> Batch:
        slot = batch["item"] if self.by_item else self.start[batch["item"]] + batch["within"]
        return without_items(batch) | {"slot": slot.astype(np.int32)}


class DistinctItems:
    """The distinct items of each batch of training, targets included.

    Adds to a batch `leading`, the rows of items; `slot` [B, T], the slot of every token in them; and `target_slot` [B, M], the slot of
    every target's boundary token. Shapes do not depend on the batch.
    """

    saving = ""  # how much work it saves, in words

    def __init__(
        self, rows: Rows, batch_rows: int, chunks: int = CHUNKS, multiple: int = 1, targets: bool = True, row_tokens: int | None = None
    ):
        """batch_rows: rows of a batch. chunks: in how many parts the rows of items are computed. multiple: the number of rows in each part
        is a multiple of it. targets: whether the targets are included; without them there is no `target_slot`. row_tokens: length of the
        rows of items; None: that of `rows`."""
        self.rows, self.catalogue, self.targets = rows, rows.catalogue, targets
        self.row_tokens = row_tokens or rows.row_slots
        # There are at most as many tokens as in all occurrences, or in all items. A row has fewer free slots than the longest item.
        tokens = min(rows.most_item_tokens * batch_rows, int(self.catalogue.lengths.sum()))
        least = math.ceil(tokens / (self.row_tokens - int(self.catalogue.lengths.max()) + 1)) + 1
        self.item_rows = math.ceil(least / (chunks * multiple)) * chunks * multiple

    def __call__(self, batch: Batch, chosen: np.ndarray | None = None, *_: np.ndarray) -> Batch:
        """chosen: the numbers of the whole batch's rows, of which `batch` may have some only. None: it has all.

        The rows of items are always those of the whole batch: with several processes each also needs the items of the others' rows.
        """
        catalogue = self.catalogue
        distinct = self.distinct(batch) if chosen is None else self.rows.entries(chosen, self.targets)
        start_I = np.zeros(catalogue.items + 2, np.int64)
        leading, start_I[distinct] = pack_items(catalogue, distinct, self.row_tokens, self.item_rows)
        slot = start_I[batch["item"]] + batch["within"]
        target = np.maximum(batch["target"], 0)
        target_slot = np.where(batch["target"] >= 0, start_I[target] + catalogue.lengths[target] - 1, 0)
        batch = without_items(batch) | {"leading": leading, "slot": slot.astype(np.int32)}
        return batch | {"target_slot": target_slot.astype(np.int32)} if self.targets else batch

    def distinct(self, batch: Batch) -> np.ndarray:
        """The distinct items of a batch and, with `targets`, of its targets; prompt and suffix included."""
        there = [batch["item"][batch["user"] > 0], batch["target"][batch["target"] >= 0]]
        return np.unique(np.concatenate(there if self.targets else there[:1]))


def entry_slots(batch: Batch, *_: np.ndarray) -> Batch:
    """A batch whose slots are the numbers of the catalogue's entries, for item states of the whole catalogue, one for each entry."""
    return without_items(batch) | {"slot": batch["item"]}


def without_items(batch: Batch, *_: np.ndarray) -> Batch:
    return {name: x for name, x in batch.items() if name not in ("item", "within")}

"""Each item once: distinct items packed into rows of their own, for the layers whose states depend on the item alone.

The states after the leading intra layers are computed for these rows, and every occurrence of an item takes them over
(`Network.leading_states`). Axes as in batches.py, and R rows of items; prompt and suffix, entries I and I + 1 of the catalogue,
are items here like the others.
"""

import math

import numpy as np

from iam_jax.data.batches import Batch, Rows, count_up
from iam_jax.data.catalogue import Catalogue

CHUNKS = 8  # parts of the rows that are computed one after another; parts without a token are skipped


def pack_items(catalogue: Catalogue, items: np.ndarray, row_tokens: int, rows: int | None = None) -> tuple[Batch, np.ndarray]:
    """The items [n], one after another, none across the end of a row: `token`, `user` (each item one of its own), `group` and
    `position` [R, T], and the slot [n] where each begins, counted through all rows. `rows`: R, if it is not to be the least."""
    length = catalogue.lengths[items]
    if length.max(initial=0) > row_tokens:
        raise ValueError(f"row_tokens = {row_tokens}: the longest item has {length.max()}")
    ends = np.cumsum(length)
    first = [0]  # of each row
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
    """All of the catalogue: takes a batch's `item` and `within` for the `slot` of every token."""

    def __init__(self, catalogue: Catalogue, row_tokens: int, rows_at_once: int):
        entries = np.flatnonzero(catalogue.lengths)
        rows, start = pack_items(catalogue, entries, row_tokens)
        self.chunks = math.ceil(len(rows["token"]) / rows_at_once)
        more = self.chunks * rows_at_once - len(rows["token"])
        self.rows = {name: np.pad(x, ((0, more), (0, 0))) for name, x in rows.items()}
        self.start = np.zeros(catalogue.items + 2, np.int64)  # without a prompt, padding still is entry I
        self.start[entries] = start
        self.boundary_slots = start[: catalogue.items] + catalogue.item_lengths - 1

    def __call__(self, batch: Batch) -> Batch:
        slot = self.start[batch["item"]] + batch["within"]
        return without_items(batch) | {"slot": slot.astype(np.int32)}


class DistinctItems:
    """The items of each micro-batch of training, targets included: adds `leading`, the rows of items, and in them the slot of every
    token, `slot` [B, T], and of every target's boundary token, `target_slot` [B, M]. Shapes do not depend on the batch."""

    saving = ""  # what it is worth, in words

    def __init__(self, rows: Rows, batch_rows: int, parts: int = 1, multiple: int = 1, targets: bool = True):
        """batch_rows in `parts` micro-batches; `multiple`: the rows of items are a multiple of so many in every chunk. Without `targets`
        only the items that are input, and no `target_slot`."""
        self.rows, self.catalogue, self.row_tokens, self.parts, self.targets = rows, rows.catalogue, rows.row_tokens, parts, targets
        # A row of items has fewer free slots than the longest item; more tokens than all occurrences, or all items, there cannot be.
        tokens = min(rows.most_item_tokens * batch_rows // parts, int(self.catalogue.lengths.sum()))
        least = math.ceil(tokens / (self.row_tokens - int(self.catalogue.lengths.max()) + 1)) + 1
        self.item_rows = math.ceil(least / (CHUNKS * multiple)) * CHUNKS * multiple

    def __call__(self, batch: Batch, chosen: np.ndarray | None = None, here: np.ndarray | None = None) -> Batch:
        """chosen, here: the whole batch's rows by number, of which `batch` has those at the places `here`; None: it has all. The rows of
        items are those of whole micro-batches in any case: a process among several needs to know what items the others' rows hold."""
        places = np.arange(len(batch["token"])) if here is None else here
        size = (len(places) if chosen is None else len(chosen)) // self.parts
        catalogue, packed = self.catalogue, []
        start_PI = np.zeros((self.parts, catalogue.items + 2), np.int64)
        for part in range(self.parts):
            if chosen is None:
                distinct = self.distinct({name: x[part * size : (part + 1) * size] for name, x in batch.items()})
            else:
                distinct = self.rows.entries(chosen[part * size : (part + 1) * size], self.targets)
            rows, start_PI[part, distinct] = pack_items(catalogue, distinct, self.row_tokens, self.item_rows)
            packed.append(rows)
        part_B1 = places[:, None] // size
        slot = start_PI[part_B1, batch["item"]] + batch["within"]
        target = np.maximum(batch["target"], 0)
        target_slot = np.where(batch["target"] >= 0, start_PI[part_B1, target] + catalogue.lengths[target] - 1, 0)
        leading = {name: np.concatenate([rows[name] for rows in packed]) for name in packed[0]}
        batch = without_items(batch) | {"leading": leading, "slot": slot.astype(np.int32)}
        return batch | {"target_slot": target_slot.astype(np.int32)} if self.targets else batch

    def distinct(self, batch: Batch) -> np.ndarray:
        """The different items of a batch and, with `targets`, of its targets; prompt and suffix are among them."""
        there = [batch["item"][batch["user"] > 0], batch["target"][batch["target"] >= 0]]
        return np.unique(np.concatenate(there if self.targets else there[:1]))


def without_items(batch: Batch, *_: np.ndarray) -> Batch:
    return {name: x for name, x in batch.items() if name not in ("item", "within")}

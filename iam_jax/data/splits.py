"""Orders, filters and splits the events that every model is trained and evaluated on.

A user's events are ordered by timestamp, and ties by `data.ties`: by the hex SHA-256 of "{user}\\t{item}" (the default), as in the file, or
by the item's id. The order of the file leaks: in the Amazon sets a third to a half of consecutive events tie, and files list ties by item.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable

import numpy as np
import polars as pl

from iam_jax.config import DataConfig
from iam_jax.data.tables import Tables, canonical_timestamps, parse_timestamps
from iam_jax.errors import InputError

TRAIN, VALIDATION, TEST = 0, 1, 2
LABELS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Events:
    """All events, sorted by user, time and `data.ties`. A target is the index of an event; its history is the user's events before it."""

    user_ids: np.ndarray  # [U] str, sorted
    item_ids: np.ndarray  # [I] str, sorted: the candidates
    item: np.ndarray  # [E] int32, index into item_ids
    offsets: np.ndarray  # [U + 1] int64: user u's events are offsets[u]:offsets[u + 1]
    timestamp: np.ndarray  # [E] int64 (also microseconds since 1970) or float64
    label: np.ndarray  # [E] uint8: TRAIN, VALIDATION or TEST, non-decreasing within a user

    @property
    def user(self) -> np.ndarray:
        """[E] int32, index into user_ids."""
        return np.repeat(np.arange(len(self.user_ids), dtype=np.int32), np.diff(self.offsets))

    @property
    def train_ends(self) -> np.ndarray:
        """[U] int64, the index after each user's last training event."""
        begin, lengths = self.offsets[:-1], np.diff(self.offsets)
        return begin + np.add.reduceat(np.append(self.label == TRAIN, False), begin) * (lengths > 0)

    @property
    def train_counts(self) -> np.ndarray:
        """[I] int64, training events of each item."""
        return np.bincount(self.item[self.label == TRAIN], minlength=len(self.item_ids))

    @functools.cached_property
    def repeated(self) -> np.ndarray:
        """[E] bool: whether the user has an earlier event with the same item."""
        pair = self.user * np.int64(len(self.item_ids)) + self.item
        order = np.argsort(pair, kind="stable")
        repeated = np.zeros(len(pair), bool)
        repeated[order[1:]] = pair[order[1:]] == pair[order[:-1]]
        return repeated

    def targets(self, label: int) -> np.ndarray:
        """[n] int64, the events with this label that have a history."""
        has_history = np.ones(len(self.item), bool)
        has_history[self.offsets[:-1][np.diff(self.offsets) > 0]] = False
        return np.flatnonzero((self.label == label) & has_history)


@dataclasses.dataclass(frozen=True)
class Split:
    """The events, the table of the items that passed the filters (in the order of events.item_ids), notes, and facts."""

    events: Events
    items: pl.DataFrame
    sha256: str
    notes: tuple[str, ...]  # printed lines: what was read, and what each filter removed
    facts: dict = dataclasses.field(
        default_factory=dict
    )  # JSON values, of `facts_of`; with data.duplicates = "drop", "duplicates" were removed


def users_of(events: Events, targets: np.ndarray) -> np.ndarray:
    """[n] the user of each event."""
    return np.searchsorted(events.offsets, targets, side="right") - 1


def subset_of_users(events: Events, label: int, most: int, seed: int) -> np.ndarray:
    """[n] int64: the targets with this label, of a fixed random subset of at most `most` users; 0: of all users."""
    targets = events.targets(label)
    users = users_of(events, targets)
    if most and most < len(np.unique(users)):
        chosen = np.random.default_rng(seed).choice(np.unique(users), most, replace=False)
        targets = targets[np.isin(users, chosen)]
    return targets


def make_split(tables: Tables, config: DataConfig, has_text: Callable[[pl.DataFrame], np.ndarray]) -> Split:
    """Filters, orders and splits the events.

    `has_text` returns for each row of the items table whether the item has text (ids that replace missing texts count). Raises InputError
    that names the file, the column and the first bad rows.
    """
    interactions, items = tables.interactions, tables.items.sort("item")
    notes = [f"read {interactions.height:,} interactions and {items.height:,} items"]
    user_ids = interactions["user"].unique().sort()
    user = codes(interactions["user"], user_ids)
    item = codes(interactions["item"], items["item"])  # -1: not in the items table (only with data.untitled = drop)
    keep = item >= 0
    if not keep.all():
        notes.append(f"removed {np.count_nonzero(~keep):,} interactions with items that are not in the items table")
    titled = has_text(items)
    if not titled.all():
        if config.untitled == "error":
            first = ", ".join(repr(i) for i in items["item"].filter(pl.Series(~titled)).head(3))
            raise InputError(
                f"{tables.items_name}: {np.count_nonzero(~titled):,} items have no text by the template {config.text!r} "
                f"(item {first}); see config.data.untitled = error | drop | id"
            )
        before = np.count_nonzero(keep)
        keep[keep] = titled[item[keep]]
        removed = before - np.count_nonzero(keep)
        notes.append(f"removed {np.count_nonzero(~titled):,} items without text, and their {removed:,} interactions")
    user, item = user[keep], item[keep]
    time_kind = interactions["timestamp"].dtype
    timestamp = interactions["timestamp"]
    timestamp = (timestamp.dt.epoch("us") if time_kind == pl.Datetime else timestamp).to_numpy()[keep]
    del interactions, tables
    surviving = titled.copy()

    dropped = {}
    if config.duplicates == "drop":
        first = first_of_duplicates(user, item, timestamp)
        dropped = {"duplicates": int(np.count_nonzero(~first))}
        what = "events that repeat an earlier one (same user, item and time)"
        notes.append(f"data.duplicates = 'drop' removed {dropped['duplicates']:,} {what}")
        user, item, timestamp = user[first], item[first], timestamp[first]

    if config.k_core:
        alive = _k_core(user, item, config.k_core, len(user_ids), items.height)
        if not alive.any():
            raise InputError(f"config.data.k_core = {config.k_core} leaves nothing of {len(user):,} interactions")
        notes.append(
            f"{config.k_core}-core removed {np.count_nonzero(~alive):,} interactions, "
            f"{len(np.unique(user)) - len(np.unique(user[alive])):,} users and "
            f"{np.count_nonzero(surviving) - len(np.unique(item[alive])):,} items"
        )
        user, item, timestamp = user[alive], item[alive], timestamp[alive]
        surviving = np.bincount(item, minlength=items.height) > 0
    if not len(user):
        raise InputError("no interaction is left after the filters")

    order = order_events(user, item, timestamp, user_ids, items["item"], config.ties)
    user, item, timestamp = user[order], item[order], timestamp[order]
    del order
    if config.last_n:
        counts = np.bincount(user, minlength=len(user_ids))
        rank_from_end = np.cumsum(counts)[user] - np.arange(len(user))  # 1: the last
        last = rank_from_end <= config.last_n
        if not last.all():
            notes.append(f"data.last_n = {config.last_n} removed {np.count_nonzero(~last):,} interactions")
        user, item, timestamp = user[last], item[last], timestamp[last]

    present = np.bincount(user, minlength=len(user_ids)) > 0
    user_ids = user_ids.filter(pl.Series(present))
    user = (np.cumsum(present) - 1)[user]
    items = items.filter(pl.Series(surviving))
    item = (np.cumsum(surviving) - 1)[item].astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=len(user_ids)))]).astype(np.int64)
    label = _leave_one_out(offsets) if config.split == "leave_one_out" else _temporal(timestamp, time_kind, config)
    if config.unseen_items:
        unseen = _drawn(items["item"], config.unseen_items)
        kept = (label != TRAIN) | ~unseen[item]
        notes.append(
            f"data.unseen_items = {config.unseen_items:g} removed the {np.count_nonzero(~kept):,} training events of {unseen.sum():,} items"
        )
        user, item, timestamp, label = user[kept], item[kept], timestamp[kept], label[kept]
        present = np.bincount(user, minlength=len(user_ids)) > 0
        user_ids = user_ids.filter(pl.Series(present))
        user = (np.cumsum(present) - 1)[user]
        offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=len(user_ids)))]).astype(np.int64)
    if not (label == TRAIN).any():
        before = f" before config.data.t1 = {config.t1!r}" if config.t1 else ""
        raise InputError(f"the split leaves no training event{before}")
    notes.append(
        f"{len(user_ids):,} users, {items.height:,} items, {len(item):,} events: "
        + ", ".join(f"{np.count_nonzero(label == i):,} {name}" for i, name in enumerate(LABELS))
    )
    digest = _sha256(user, item, timestamp, label, user_ids, items["item"], time_kind, config)
    events = Events(as_strings(user_ids), as_strings(items["item"]), item, offsets, timestamp, label)
    facts = facts_of(events) | dropped
    notes.append(note_of(facts, config))
    for i in (VALIDATION, TEST):
        left_out = np.count_nonzero(label == i) - len(events.targets(i))
        if left_out:
            notes.append(f"{left_out:,} {LABELS[i]} events have no history and are left out")
    return Split(events, items, digest, tuple(notes), facts)


def facts_of(events: Events) -> dict:
    """How much the order of ties and repeated items can matter, as JSON values; None where there is no such event.

    tied: the share of consecutive events of a user that have the same time.
    repeated: {"validation": …, "test": …}, the share of targets whose item the user had before.
    duplicates: the number of events that repeat an earlier one (same user, item and time).
    """
    consecutive = np.diff(events.user) == 0

    def share(part: np.ndarray) -> float | None:
        return float(part.mean()) if len(part) else None

    repeated = {LABELS[label]: share(events.repeated[events.targets(label)]) for label in (VALIDATION, TEST)}
    tied = share((events.timestamp[1:] == events.timestamp[:-1])[consecutive])
    duplicates = int(np.count_nonzero(~first_of_duplicates(events.user, events.item, events.timestamp)))
    return {"tied": tied, "repeated": repeated, "duplicates": duplicates}


def note_of(facts: dict, config: DataConfig) -> str:
    """The facts as a line to print."""
    shares = facts["tied"], facts["repeated"]["validation"], facts["repeated"]["test"]
    tied, validation, test = ("none" if share is None else f"{share:.1%}" for share in shares)
    kept = f", {facts['duplicates']:,} exact duplicates" if config.duplicates == "keep" else ""
    repeated = f"in the history already: {validation} of validation, {test} of test targets"
    return f"{tied} of consecutive events tie in time (order: {config.ties}){kept}; {repeated}"


def shuffle_training(split: Split) -> Split:
    """The control data.shuffled_order: the items of each user's training events in a random order, the same in every run.

    Nothing else changes. Targets keep their events, so the split's hash stays. Histories have the random order too; a validation event
    still comes last. Timestamps stay in place: those of training events are not read after the split.
    """
    events = split.events
    train = np.flatnonzero(events.label == TRAIN)
    drawn = np.random.default_rng(0).random(len(train))
    item = events.item.copy()
    item[train] = events.item[train[np.lexsort((drawn, events.user[train]))]]
    moved = np.count_nonzero(item != events.item)
    note = f"data.shuffled_order: {moved:,} of {len(train):,} training events have another item now"
    return dataclasses.replace(split, events=dataclasses.replace(events, item=item), notes=(*split.notes, note))


def _drawn(ids: pl.Series, share: float) -> np.ndarray:
    """[n] bool: whether an id's SHA-256, as a fraction, is below `share`. It does not depend on the other ids."""
    heads = b"".join(hashlib.sha256(text.encode()).digest()[:8] for text in ids)
    return np.frombuffer(heads, ">u8") < share * 2.0**64


def as_strings(series: pl.Series) -> np.ndarray:
    """[n] numpy strings of variable width."""
    return series.to_numpy().astype(np.dtypes.StringDType())


def codes(values: pl.Series, ids: pl.Series) -> np.ndarray:
    """[n] int32: the index of each value in `ids`; -1 if it is not there."""
    lookup = pl.DataFrame({"id": ids, "code": np.arange(len(ids), dtype=np.int32)})
    joined = values.to_frame("id").join(lookup, on="id", how="left", maintain_order="left")
    return joined["code"].fill_null(-1).to_numpy()


def _k_core(user: np.ndarray, item: np.ndarray, k: int, users: int, items: int) -> np.ndarray:
    """[n] bool: the events left after users and items with fewer than k events are removed repeatedly, until there are none."""
    alive = np.ones(len(user), bool)
    while True:
        enough_user = np.bincount(user[alive], minlength=users) >= k
        enough_item = np.bincount(item[alive], minlength=items) >= k
        still = alive & enough_user[user] & enough_item[item]
        if np.array_equal(still, alive):
            return alive
        alive = still


def first_of_duplicates(user: np.ndarray, item: np.ndarray, timestamp: np.ndarray) -> np.ndarray:
    """[n] bool: whether no earlier event has the same user, item and time."""
    events = pl.DataFrame({"user": user, "item": item, "time": timestamp})
    return events.select(pl.struct(pl.all()).is_first_distinct()).to_series().to_numpy()


def order_events(
    user: np.ndarray, item: np.ndarray, timestamp: np.ndarray, user_ids: pl.Series, item_ids: pl.Series, ties: str = "hash"
) -> np.ndarray:
    """[n] int64: the indices of the events sorted by user, time, and `ties`. user [n] and item [n] index user_ids and item_ids.

    ties: the order of a user's events of equal time (`data.ties`): hash | file (as given) | item (by id).
    """
    events = pl.DataFrame({"user": user, "time": timestamp})
    order = events.select(pl.arg_sort_by("user", "time", maintain_order=True)).to_series().to_numpy()
    if ties == "file":
        return order
    sorted_user, sorted_time = user[order], timestamp[order]
    same = (sorted_user[1:] == sorted_user[:-1]) & (sorted_time[1:] == sorted_time[:-1])
    tied = np.flatnonzero(np.append(same, False) | np.append(False, same))  # in blocks of equal (user, time)
    block = np.cumsum(~np.append(False, same))[tied]
    if ties == "item":
        by_id = np.empty(len(item_ids), np.int64)
        by_id[item_ids.arg_sort().to_numpy()] = np.arange(len(item_ids))
        order = order.copy()
        order[tied] = order[tied][np.lexsort((by_id[item[order[tied]]], block))]
        return order
    digest = np.empty((len(tied), 4), np.uint64)
    for start in range(0, len(tied), 1_000_000):  # ids become Python strings: a part at a time bounds the memory
        rows = order[tied[start : start + 1_000_000]]
        users, items = user_ids.gather(user[rows]).to_list(), item_ids.gather(item[rows]).to_list()
        text = b"".join([hashlib.sha256(f"{u}\t{i}".encode()).digest() for u, i in zip(users, items, strict=True)])
        # Big-endian words order like the hex text.
        digest[start : start + len(rows)] = np.frombuffer(text, ">u8").reshape(-1, 4)
    by_hash = np.lexsort((digest[:, 3], digest[:, 2], digest[:, 1], digest[:, 0], block))
    order = order.copy()
    order[tied] = order[tied][by_hash]
    return order


def _leave_one_out(offsets: np.ndarray) -> np.ndarray:
    label = np.zeros(offsets[-1], np.uint8)
    ends = offsets[1:][np.diff(offsets) >= 3]
    label[ends - 2], label[ends - 1] = VALIDATION, TEST
    return label


def _temporal(timestamp: np.ndarray, time_kind: pl.DataType, config: DataConfig) -> np.ndarray:
    bounds = []
    for field, text in (("t1", config.t1), ("t2", config.t2)):
        bound = parse_timestamps(pl.Series("timestamp", [text]), f"config.data.{field}")
        if (bound.dtype == pl.Datetime) != (time_kind == pl.Datetime):
            raise InputError(f"config.data.{field} = {text!r} is not in the format of the table's timestamps ({time_kind})")
        value = (bound.dt.epoch("us") if time_kind == pl.Datetime else bound)[0]
        # For an integer, >= 1.5 means >= 2. Comparing as floats would round large integers.
        bounds.append(math.ceil(value) if time_kind == pl.Int64 else value)
    if not bounds[0] < bounds[1]:
        raise InputError(f"config.data.t1 = {config.t1!r} must be before config.data.t2 = {config.t2!r}")
    return ((timestamp >= bounds[0]).astype(np.uint8) + (timestamp >= bounds[1])).astype(np.uint8)


def _sha256(user, item, timestamp, label, user_ids: pl.Series, item_ids: pl.Series, time_kind: pl.DataType, config: DataConfig) -> str:
    """SHA-256 of the lines "split\\tuser\\titem\\ttimestamp\\n", sorted bytewise.

    Other settings than the defaults add lines behind them: "duplicates\\tdrop\\n"; "ties\\titem\\n"; "ties\\tfile\\n" and the items' ids in
    the order of the events, one a line.
    """
    digest = hashlib.sha256()
    for name in sorted(LABELS):  # the split's name leads the line, so the parts can be sorted one by one
        part = np.flatnonzero(label == LABELS.index(name))
        times = pl.Series(timestamp[part])
        times = times.cast(pl.Datetime("us", "UTC")) if time_kind == pl.Datetime else times
        columns = user_ids.gather(user[part]), item_ids.gather(item[part]), canonical_timestamps(times) + "\n"
        lines = pl.select(pl.concat_str(pl.lit(name), *columns, separator="\t")).to_series().sort()
        for start in range(0, len(lines), 1_000_000):
            digest.update("".join(lines[start : start + 1_000_000].to_list()).encode())
    if config.duplicates != "keep":
        digest.update(f"duplicates\t{config.duplicates}\n".encode())
    if config.ties != "hash":
        digest.update(f"ties\t{config.ties}\n".encode())
    for start in range(0, len(item) if config.ties == "file" else 0, 1_000_000):
        digest.update("".join(f"{text}\n" for text in item_ids.gather(item[start : start + 1_000_000])).encode())
    return digest.hexdigest()

"""The users to score: their events in order and, where given, their candidates. Ids become integers; an event takes eight bytes."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from iam_jax.config import DataConfig
from iam_jax.data.batches import count_up
from iam_jax.data.splits import Events, codes, first_of_duplicates, order_events
from iam_jax.data.tables import INTERACTIONS, read_table, refuse
from iam_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Lists:
    """A list of items for each user. User u's items are item[offsets[u]:offsets[u + 1]]."""

    item: np.ndarray  # int32, rows of the catalogue
    offsets: np.ndarray  # [U + 1] int64

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, users: slice) -> "Lists":
        begin, end, _ = users.indices(len(self.offsets) - 1)
        end = max(begin, end)
        offsets = self.offsets[begin : end + 1]
        return Lists(self.item[offsets[0] : offsets[-1]], offsets - offsets[0])

    def of(self, users: np.ndarray) -> "Lists":
        """The lists of the given users."""
        lengths = self.lengths[users]
        item = self.item[np.repeat(self.offsets[:-1][users], lengths) + count_up(lengths)]
        return Lists(item, np.concatenate([[0], np.cumsum(lengths)]))

    def last(self, most: int) -> "Lists":
        """Each user's last `most` items; 0: all."""
        if not most:
            return self
        lengths = np.minimum(self.lengths, most)
        item = self.item[np.repeat(self.offsets[1:] - lengths, lengths) + count_up(lengths)]
        return Lists(item, np.concatenate([[0], np.cumsum(lengths)]))

    def split(self) -> list[np.ndarray]:
        return np.split(self.item, self.offsets[1:-1])

    def padded(self, width: int) -> np.ndarray:
        """[U, width] int32, filled up with -1."""
        out = np.full((len(self.offsets) - 1, width), -1, np.int32)
        out[np.arange(width) < self.lengths[:, None]] = self.item
        return out


@dataclasses.dataclass(frozen=True)
class Users:
    """The users to score, sorted by id."""

    ids: pl.Series
    events: Lists  # in order of time, ties by data.ties (splits.py)
    candidates: Lists | None  # sorted by catalogue row

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, begin: int, end: int) -> "Users":
        part = slice(begin, end)
        return Users(self.ids[part], self.events[part], None if self.candidates is None else self.candidates[part])

    def pieces(self, most: int) -> Iterator["Users"]:
        """Parts of the users, in order. In each, users x the longest list of candidates is at most `most`, or there is one user."""
        assert self.candidates is not None
        begin = width = 0
        for end, length in enumerate(self.candidates.lengths.tolist()):
            width = max(width, length)
            if end > begin and (end + 1 - begin) * width > most:
                yield self.part(begin, end)
                begin, width = end, length
        yield self.part(begin, len(self))


def read_users(path: str | Path, item_ids: pl.Series, config: DataConfig) -> tuple[Users, list[str]]:
    """The users of an interactions table and notes to print (`users_of_table`). Also raises the errors of `read_table`."""
    return users_of_table(read_table(path, INTERACTIONS), str(path), item_ids, config)


def users_of_table(table: pl.DataFrame, name: str, item_ids: pl.Series, config: DataConfig) -> tuple[Users, list[str]]:
    """The users of a checked table (`user`, `item`, `timestamp`), and notes on what was left out.

    Events are treated as in the preparation of the training data. If its filters may have removed items, events with items that are not in
    the catalogue are removed and counted; otherwise they raise InputError.

    name: of the table, in errors.
    """
    drop = config.untitled == "drop" or config.k_core > 0
    item, notes = codes(table["item"], item_ids), []
    unknown = item < 0
    if unknown.all() or (unknown.any() and not drop):
        count = table["item"].filter(pl.Series(unknown)).n_unique()
        what = f"{count:,} item{'s' * (count > 1)} that the working folder's catalogue does not have (--items=TABLE adds items)"
        refuse(name, table["item"], pl.Series(unknown), what)
    if unknown.any():
        before = table["user"].n_unique()
        table, item = table.filter(pl.Series(~unknown)), item[~unknown]
        lost = before - table["user"].n_unique()
        notes.append(f"left out {unknown.sum():,} events with items that are not in the catalogue, and {lost:,} users without other events")
    ids = table["user"].unique().sort()
    user, timestamp = codes(table["user"], ids), table["timestamp"]
    timestamp = (timestamp.dt.epoch("us") if timestamp.dtype == pl.Datetime else timestamp).to_numpy()
    if config.duplicates == "drop":
        first = first_of_duplicates(user, item, timestamp)
        if not first.all():
            notes.append(f"left out {np.count_nonzero(~first):,} events that repeat an earlier one (same user, item and time)")
        user, item, timestamp = user[first], item[first], timestamp[first]
    order = order_events(user, item, timestamp, ids, item_ids, config.ties)
    return Users(ids, Lists(item[order], _offsets(user, len(ids))), None), notes


def read_candidates(path: str | Path, users: Users, item_ids: pl.Series) -> Users:
    """The users of a table (`user`, `item`) with their candidates (`candidates_of_table`)."""
    return candidates_of_table(read_table(path, ("user", "item")), str(path), users, item_ids)


def candidates_of_table(table: pl.DataFrame, name: str, users: Users, item_ids: pl.Series) -> Users:
    """The users that occur in a checked table (`user`, `item`), with their candidates. name: of the table, in errors.

    Raises InputError for unknown users and items, and for repeated pairs.
    """
    user, item = codes(table["user"], users.ids), codes(table["item"], item_ids)
    for column, place, where in (("user", user, "--users"), ("item", item, "the catalogue (--items=TABLE adds items)")):
        if (place < 0).any():
            refuse(name, table[column], pl.Series(place < 0), f"{column}s that are not in {where}")
    twice = table.is_duplicated()
    if twice.any():
        raise InputError(f"{name}: {int(twice.sum()):,} rows repeat a pair of user and item, such as {table.row(twice.arg_true()[0])}")
    order = np.lexsort((item, user))
    chosen, lists = np.unique(user), Lists(item[order], _offsets(user, len(users)))
    return Users(users.ids.gather(chosen), users.events.of(chosen), lists.of(chosen))


def with_targets(histories: Lists) -> tuple[Events, np.ndarray]:
    """The histories as events, each followed by a placeholder for the next event, and the indices of the placeholders.

    The placeholders are targets for `evaluation_segments`. Their item is 0 and is not read.
    """
    lengths = histories.lengths
    offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
    item = np.zeros(offsets[-1], np.int32)
    item[np.repeat(offsets[:-1], lengths) + count_up(lengths)] = histories.item
    none = np.zeros(0)
    return Events(none, none, item, offsets, none, none), offsets[1:] - 1


def table_of_lists(users: Users, item_ids: pl.Series, item: np.ndarray, score: np.ndarray) -> pl.DataFrame:
    """Lists as a table with the columns `user`, `item`, `rank` (from 1) and `score`.

    item, score: [n, K], best first; a score of -inf is no item. item_ids: of the catalogue.
    """
    user, position = np.nonzero(score > -np.inf)
    ids = users.ids.gather(user).rename("user"), item_ids.gather(item[user, position]).rename("item")
    return pl.DataFrame([*ids, pl.Series("rank", position + 1, dtype=pl.Int32), pl.Series("score", score[user, position])])


def _offsets(user: np.ndarray, users: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(user, minlength=users))])

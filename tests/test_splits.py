"""Order, filters, splits and the hash of the split, compared with plain Python that follows the protocol."""

import csv
import dataclasses
import datetime
import gzip
import hashlib
import itertools
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from helpers import write_shop
from hypothesis import given, settings
from hypothesis import strategies as st

from iam_jax.config import DataConfig
from iam_jax.data.splits import LABELS, TEST, TRAIN, VALIDATION, make_split, shuffle_training
from iam_jax.data.tables import Tables, read_tables
from iam_jax.errors import InputError

DATA = Path(__file__).parents[2] / "shared" / "data"
EPOCH = datetime.datetime(2014, 7, 23, tzinfo=datetime.UTC)
TIMES = {  # kind -> timestamps that an inexact comparison or conversion would change, and t1, t2 as a user writes them
    "integer": ([-5, 0, 7, 2**53, 2**53 + 1, 10**18], "7", str(2**53 + 1)),
    "float": ([-2.5, -0.0, 0.1, 1e-7, 1.5e17, 3.0], "0", "2.9"),
    "iso": (
        [EPOCH + datetime.timedelta(**by) for by in ({}, {"microseconds": 1}, {"days": 1}, {"hours": -30})],
        "2014-07-23",
        "2014-07-24T02:00:00.000000+02:00",
    ),
}
USERS = ["u", "9", "10", "été", "a b", "U"]
ITEMS = ["i", "2", "10", "木", "x|y", "unused", "I"]


def make_tables(rows, items=ITEMS, titles=None):
    """Makes tables from (user, item, timestamp) rows. The title of an item is its id unless `titles` contains another."""
    user, item, timestamp = zip(*rows, strict=True)
    dtype = {int: pl.Int64, float: pl.Float64}.get(type(timestamp[0]), pl.Datetime("us", "UTC"))
    interactions = pl.DataFrame({"user": user, "item": item, "timestamp": pl.Series(timestamp, dtype=dtype)})
    titles = {item: item for item in items} | (titles or {})
    catalogue = pl.DataFrame({"item": items, "title": [titles[i] for i in items]})
    return Tables(interactions, catalogue, "events.csv", "items.csv", "")


def titled(items):
    return np.array([bool(title) for title in items["title"]], bool)


def split_of(rows, config=None, **tables):
    return make_split(make_tables(rows, **tables), config or DataConfig(), titled)


def text_of(timestamp):
    if isinstance(timestamp, datetime.datetime):
        return timestamp.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return repr(timestamp)


def rows_of(split):
    """(split, user, item, timestamp) of every event in the order of Events."""
    e = split.events
    times = e.timestamp.tolist()
    return [(LABELS[k], e.user_ids[u], e.item_ids[i], t) for k, u, i, t in zip(e.label, e.user, e.item, times, strict=True)]


def tie_hash(user, item):
    return hashlib.sha256(f"{user}\t{item}".encode()).hexdigest()


TIE_KEYS = {"hash": lambda row: tie_hash(row[0], row[1]), "file": lambda row: "", "item": lambda row: row[1].encode()}  # sorting is stable


def slow_split(rows, k_core=0, last_n=0, bounds=None, ties="hash", duplicates="keep"):
    """[(split, user, item, timestamp)] by user and time, from the text of the protocol, and the items that remain after its filters.
    `bounds` (t1, t2) make it temporal."""
    rows = list(dict.fromkeys(rows)) if duplicates == "drop" else list(rows)
    while True:
        users, items = Counter(u for u, _, _ in rows), Counter(i for _, i, _ in rows)
        kept = [(u, i, t) for u, i, t in rows if users[u] >= k_core and items[i] >= k_core]
        if len(kept) == len(rows):
            break
        rows = kept
    left_items = sorted({i for _, i, _ in rows} if k_core else ITEMS, key=str.encode)
    histories = defaultdict(list)
    for u, i, t in rows:
        histories[u].append((u, i, t))
    out = []
    for user in sorted(histories, key=str.encode):
        events = sorted(histories[user], key=lambda row: (row[2], TIE_KEYS[ties](row)))[-last_n:]
        for place, row in enumerate(events):
            if bounds:
                label = "train" if row[2] < bounds[0] else "validation" if row[2] < bounds[1] else "test"
            else:
                left = len(events) - place
                label = "train" if len(events) < 3 or left > 2 else "validation" if left == 2 else "test"
            out.append((label, *row))
    return out, left_items


def slow_sha256(labelled, ties="hash", duplicates="keep"):
    lines = sorted(f"{label}\t{user}\t{item}\t{text_of(t)}\n".encode() for label, user, item, t in labelled)
    lines += [b"duplicates\tdrop\n"] if duplicates == "drop" else []
    lines += [] if ties == "hash" else [f"ties\t{ties}\n".encode()]
    lines += [f"{item}\n".encode() for _, _, item, _ in labelled] if ties == "file" else []
    return hashlib.sha256(b"".join(lines)).hexdigest()


def comparable(labelled):
    """Converts datetimes to microseconds, as in Events."""
    second = datetime.timedelta(microseconds=1)
    zero = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return [(*row[:3], (row[3] - zero) // second if isinstance(row[3], datetime.datetime) else row[3]) for row in labelled]


BOUNDS = {
    "integer": (7, 2**53 + 1),
    "float": (0, 2.9),
    "iso": (EPOCH, EPOCH + datetime.timedelta(days=1)),
}


@settings(deadline=None, max_examples=150)
@given(
    st.data(),
    st.sampled_from(sorted(TIMES)),
    st.integers(0, 3),
    st.integers(0, 4),
    st.booleans(),
    st.sampled_from(sorted(TIE_KEYS)),
    st.sampled_from(["keep", "drop"]),
)
def test_every_filter_and_split_is_the_slow_one(data, kind, k_core, last_n, temporal, ties, duplicates):
    times, t1, t2 = TIMES[kind]
    row = st.tuples(st.sampled_from(USERS), st.sampled_from([i for i in ITEMS if i != "unused"]), st.sampled_from(times))
    rows = data.draw(st.lists(row, min_size=1, max_size=40))
    order = {"ties": ties, "duplicates": duplicates}
    config = DataConfig(k_core=k_core, last_n=last_n, split="temporal" if temporal else "leave_one_out", t1=t1, t2=t2, **order)
    expected, candidates = slow_split(rows, k_core, last_n, BOUNDS[kind] if temporal else None, **order)
    if not any(label == "train" for label, *_ in expected):
        with pytest.raises(InputError, match=r"leaves no training event|k_core"):
            split_of(rows, config)
        return
    split = split_of(rows, config)
    assert rows_of(split) == comparable(expected)
    assert split.sha256 == slow_sha256(expected, **order)
    assert split.events.item_ids.tolist() == split.items["item"].to_list() == candidates

    # Derived fields of Events.
    events = split.events
    places = defaultdict(list)
    for place, (label, user, *_) in enumerate(expected):
        places[user].append((place, label))
    ends = [user_places[0][0] + sum(label == "train" for _, label in user_places) for user_places in places.values()]
    assert events.train_ends.tolist() == ends
    counts = Counter(item for label, _, item, _ in expected if label == "train")
    assert events.train_counts.tolist() == [counts[item] for item in events.item_ids]
    for number, name in enumerate(LABELS):
        wanted = [p for user_places in places.values() for p, label in user_places[1:] if label == name]
        assert events.targets(number).tolist() == wanted
    before = defaultdict(list)
    repeated = [item in before[user] or before[user].append(item) or False for _, user, item, _ in expected]
    assert events.repeated.tolist() == repeated
    counted = rows if duplicates == "drop" else [row[1:] for row in expected]
    assert split.facts == slow_facts(counted, expected, places, repeated)

    if ties == "file":
        return
    again = split_of(data.draw(st.permutations(rows)), config)
    assert rows_of(again) == rows_of(split)
    assert again.sha256 == split.sha256


def slow_facts(counted, labelled, places, repeated):
    """counted: rows whose duplicates are counted. places: {user: [(place, label)]} in `labelled`."""

    def share(found):
        return sum(found) / len(found) if found else None

    tied = [labelled[a][3] == labelled[b][3] for user in places.values() for (a, _), (b, _) in itertools.pairwise(user)]
    of = {name: [repeated[p] for user in places.values() for p, label in user[1:] if label == name] for name in ("validation", "test")}
    shares = {name: share(found) for name, found in of.items()}
    return {"tied": share(tied), "repeated": shares, "duplicates": len(counted) - len(set(counted))}


def test_orders_of_ties_by_hand():
    """The hashes of 2, 10 and i for user u are 1f…, e2… and 6c…: 2, i, 10. Ids are ordered as bytes: 10 before 2."""
    rows = [("u", "i", 5), ("u", "2", 5), ("u", "10", 5), ("u", "x|y", 4), ("u", "I", 6)]
    orders = {ties: [row[2] for row in rows_of(split_of(rows, DataConfig(ties=ties)))] for ties in ("hash", "file", "item")}
    by_hash = sorted(("i", "2", "10"), key=lambda item: tie_hash("u", item))
    assert orders == {"hash": ["x|y", *by_hash, "I"], "file": ["x|y", "i", "2", "10", "I"], "item": ["x|y", "10", "2", "i", "I"]}
    assert len({split_of(rows, DataConfig(ties=ties)).sha256 for ties in orders}) == 3
    # Another order of the file is another split, even if only training events change their places.
    other = [rows[1], rows[0], *rows[2:]]
    labels = [[(row[0], row[2]) for row in rows_of(split_of(order, DataConfig(ties="file")))] for order in (rows, other)]
    assert sorted(labels[0]) == sorted(labels[1])
    one, two = (split_of(order, DataConfig(ties="file")).sha256 for order in (rows, other))
    assert one != two
    (note,) = (note for note in split_of(rows, DataConfig(ties="item")).notes if "tie in time" in note)
    assert note == (
        "50.0% of consecutive events tie in time (order: item), 0 exact duplicates; "
        "in the history already: 0.0% of validation, 0.0% of test targets"
    )


def test_duplicates_by_hand():
    rows = [("u", "i", 1), ("u", "2", 2), ("u", "i", 1), ("u", "i", 3), ("u", "i", 1), ("9", "i", 1)]
    kept, dropped = (split_of(rows, DataConfig(duplicates=duplicates)) for duplicates in ("keep", "drop"))
    assert [row[2:] for row in rows_of(kept)] == [("i", 1), ("i", 1), ("i", 1), ("i", 1), ("2", 2), ("i", 3)]
    assert [row[1:] for row in rows_of(dropped)] == [("9", "i", 1), ("u", "i", 1), ("u", "2", 2), ("u", "i", 3)]
    assert kept.facts == {"tied": 0.5, "repeated": {"validation": 0.0, "test": 1.0}, "duplicates": 2}
    assert dropped.facts == {"tied": 0.0, "repeated": {"validation": 0.0, "test": 1.0}, "duplicates": 2}
    assert "data.duplicates = 'drop' removed 2 events that repeat an earlier one (same user, item and time)" in dropped.notes
    assert any("50.0% of consecutive events tie in time (order: hash), 2 exact duplicates; " in note for note in kept.notes)
    # The k-core counts what is left: u has three events. Without duplicates, the hash still names the setting.
    with pytest.raises(InputError, match="k_core = 4 leaves nothing"):
        split_of(rows, DataConfig(duplicates="drop", k_core=4))
    unique = [("u", "i", 1), ("u", "2", 2), ("u", "10", 3)]
    assert split_of(unique, DataConfig(duplicates="drop")).sha256 != split_of(unique).sha256


def test_the_order_of_the_file_does_not_leak():
    """One user with all events on one day: the hash determines the order, not the file or the item ids."""
    items = [f"i{n}" for n in range(30)]
    rows = [("u", item, 5) for item in items]
    by_hash = sorted(items, key=lambda item: tie_hash("u", item))
    assert by_hash != items
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        events = split_of(rows, items=items).events
        assert events.item_ids[events.item].tolist() == by_hash
    # The ties of another user are ordered differently, because the user is part of the hash.
    events = split_of([("v", item, 5) for item in items], items=items).events
    assert events.item_ids[events.item].tolist() == sorted(items, key=lambda item: tie_hash("v", item)) != by_hash


def test_ties_in_parts_of_the_table_stay_with_their_times():
    rows = [("u", i, t) for t in (2, 1) for i in ("i", "2", "10")] + [("9", "i", 1)]
    events = split_of(rows).events
    tied = sorted(["i", "2", "10"], key=lambda item: tie_hash("u", item))
    assert events.item_ids[events.item].tolist() == ["i", *tied, *tied]
    assert events.timestamp.tolist() == [1, 1, 1, 1, 2, 2, 2]


def test_leave_one_out_by_hand():
    rows = [("u", "i", 4), ("u", "2", 3), ("u", "10", 2), ("u", "i", 1), ("9", "i", 1), ("9", "2", 2), ("10", "i", 0)]
    split = split_of(rows)
    assert rows_of(split) == [
        ("train", "10", "i", 0),
        ("train", "9", "i", 1),
        ("train", "9", "2", 2),  # two events: train only
        ("train", "u", "i", 1),
        ("train", "u", "10", 2),
        ("validation", "u", "2", 3),
        ("test", "u", "i", 4),  # a repeated pair stays
    ]
    events = split.events
    assert [events.targets(k).tolist() for k in (TRAIN, VALIDATION, TEST)] == [[2, 4], [5], [6]]
    assert events.offsets.tolist() == [0, 1, 3, 7] and events.train_ends.tolist() == [1, 3, 5]
    assert split.notes == (
        "read 7 interactions and 7 items",
        "3 users, 7 items, 7 events: 5 train, 1 validation, 1 test",
        "0.0% of consecutive events tie in time (order: hash), 0 exact duplicates; "
        "in the history already: 0.0% of validation, 100.0% of test targets",
    )


def test_temporal_by_hand():
    rows = [("u", "i", 9), ("u", "2", 10), ("u", "10", 19), ("u", "i", 20), ("10", "i", 25)]
    rows += [("9", "i", 10), ("9", "2", 11), ("9", "10", 30)]
    config = DataConfig(split="temporal", t1="10", t2="20")
    split = split_of(rows, config)
    assert split.events.label.tolist() == [TEST, VALIDATION, VALIDATION, TEST, TRAIN, VALIDATION, VALIDATION, TEST]
    # The only event of user 10 and the first of user 9 have no history: they are counted and left out; all others are targets.
    assert split.events.targets(VALIDATION).tolist() == [2, 5, 6]
    assert split.events.targets(TEST).tolist() == [3, 7]
    assert split.events.train_ends.tolist() == [0, 1, 5]
    assert split.notes[-2:] == tuple(f"1 {name} events have no history and are left out" for name in LABELS[1:])


def test_bounds_are_compared_exactly():
    """Nanoseconds exceed the integers of a float: 10^18 − 1 is before t1, in any notation of t1."""
    rows = [("u", "i", 10**18 - 1), ("u", "2", 10**18), ("u", "10", 10**18 + 1), ("u", "i", 2 * 10**18)]
    labels = ["train", "validation", "validation", "test"]
    for t1, t2 in (("1000000000000000000", "2000000000000000000"), ("1e18", "2e18")):
        assert [row[0] for row in rows_of(split_of(rows, DataConfig(split="temporal", t1=t1, t2=t2)))] == labels
    rows = [("u", "i", 1), ("u", "2", 2), ("u", "10", 3)]
    assert [row[0] for row in rows_of(split_of(rows, DataConfig(split="temporal", t1="1.5", t2="2.5")))] == list(LABELS)


@pytest.mark.parametrize(
    "kind,t1,t2,field,what",
    [
        ("integer", "soon", "20", "t1", "soon"),
        ("integer", "10", "later", "t2", "later"),
        ("integer", "2014-07-23", "20", "t1", "not in the format of"),
        ("iso", "10", "2014-07-23", "t1", "not in the format of"),
        ("iso", "2014-07-23", "20", "t2", "not in the format of"),
        ("integer", "20", "10", "t1", "must be before"),
        ("integer", "10", "10", "t2", "must be before"),
        ("iso", "2014-07-24", "2014-07-23", "t1", "must be before"),
        ("integer", "-100", "20", "t1", "no training event"),
    ],
)
def test_wrong_bounds(kind, t1, t2, field, what):
    rows = [("u", "i", t) for t in TIMES[kind][0]]
    with pytest.raises(InputError, match=f"config.data.{field}") as caught:
        split_of(rows, DataConfig(split="temporal", t1=t1, t2=t2))
    assert what in str(caught.value)


def test_k_core_goes_to_its_fixed_point():
    """A chain: removing item 10 (one event) leaves user v one event, whose removal leaves item 2 one event, and so on."""
    chain = [("w", "i", 1), ("w", "2", 2), ("v", "2", 3), ("v", "10", 4)]
    core = [(u, i, t) for u in ("u", "9") for t, i in enumerate(("x|y", "I"))]
    split = split_of(chain + core, DataConfig(k_core=2))
    assert {row[1] for row in rows_of(split)} == {"u", "9"}
    assert split.events.item_ids.tolist() == ["I", "x|y"]
    assert "2-core removed 4 interactions, 2 users and 5 items" in split.notes  # two of the 7 items remain
    with pytest.raises(InputError, match=r"config\.data\.k_core = 2 leaves nothing of 4 interactions"):
        split_of(chain, DataConfig(k_core=2))
    assert rows_of(split_of(chain)) != []


def test_last_n_is_counted():
    rows = [("u", i, t) for t, i in enumerate(("i", "2", "10", "I", "x|y"))] + [("9", "i", 0)]
    split = split_of(rows, DataConfig(last_n=3))
    assert [row[1:] for row in rows_of(split)] == [("9", "i", 0), ("u", "10", 2), ("u", "I", 3), ("u", "x|y", 4)]
    assert split.events.label.tolist() == [TRAIN, TRAIN, VALIDATION, TEST]
    assert "data.last_n = 3 removed 2 interactions" in split.notes
    assert not any("last_n" in note for note in split_of(rows, DataConfig(last_n=5)).notes)
    assert len(split.events.item_ids) == len(ITEMS)  # the other items stay candidates


def test_untitled_items():
    rows = [("u", i, t) for t, i in enumerate(("i", "2", "10", "2", "I", "x|y"))]
    untitled = {"2": "", "unused": ""}
    with pytest.raises(InputError) as caught:
        split_of(rows, titles=untitled)
    assert str(caught.value) == (
        "items.csv: 2 items have no text by the template '{title}' (item '2', 'unused'); see config.data.untitled = error | drop | id"
    )
    split = split_of(rows, DataConfig(untitled="drop"), titles=untitled)
    assert "removed 2 items without text, and their 2 interactions" in split.notes
    assert [row[2] for row in rows_of(split)] == ["i", "10", "I", "x|y"]
    assert split.events.item_ids.tolist() == ["10", "I", "i", "x|y", "木"]
    # The k-core counts only the events that remain after the filter.
    pairs = [(u, i, 0) for u in ("u", "9") for i in ("i", "2")]
    with pytest.raises(InputError, match="k_core = 2 leaves nothing of 2 interactions"):
        split_of(pairs, DataConfig(untitled="drop", k_core=2), titles={"2": ""})
    with pytest.raises(InputError, match="no interaction is left"):
        split_of([("u", "2", 1)], DataConfig(untitled="drop"), titles={"2": ""})


def test_unknown_items_are_dropped_and_counted():
    rows = [("u", "i", 1), ("u", "nowhere", 2), ("u", "2", 3), ("9", "nowhere", 1)]
    split = split_of(rows, DataConfig(untitled="drop"))
    assert "removed 2 interactions with items that are not in the items table" in split.notes
    assert rows_of(split) == [("train", "u", "i", 1), ("train", "u", "2", 3)]  # user 9 had no other event
    assert split.events.user_ids.tolist() == ["u"]


def test_repeated_pairs_stay():
    rows = [("u", "i", t) for t in (1, 1, 2, 3)]
    split = split_of(rows)
    assert [row[2:] for row in rows_of(split)] == [("i", 1), ("i", 1), ("i", 2), ("i", 3)]
    assert split.sha256 == slow_sha256(slow_split(rows)[0]) != split_of(rows[1:]).sha256


def test_the_hash_by_hand():
    lines = b"test\tu\t10\t3\ntrain\tu\ti\t1\nvalidation\tu\t2\t2\n"
    assert split_of([("u", "i", 1), ("u", "2", 2), ("u", "10", 3)]).sha256 == hashlib.sha256(lines).hexdigest()


def sequence(user, items):
    return [(user, item, time) for time, item in enumerate(items)]


def test_unseen_items_by_hand():
    """The first digits of the ids' SHA-256 are a .79, b .24, c .18, d .10, so a share of .2 selects c and d in every table."""
    rows = sequence("u", "acbda") + sequence("v", "cdba") + sequence("w", "dc") + sequence("x", "abca")
    config = DataConfig(unseen_items=0.2)
    split = split_of(rows, config, items=list("abcd"))
    assert rows_of(split) == [
        ("train", "u", "a", 0),
        ("train", "u", "b", 2),  # the training event with c is removed
        ("validation", "u", "d", 3),  # a target with an unseen item stays
        ("test", "u", "a", 4),
        ("validation", "v", "b", 2),  # no history remains
        ("test", "v", "a", 3),
        ("train", "x", "a", 0),  # w had no other event
        ("train", "x", "b", 1),
        ("validation", "x", "c", 2),
        ("test", "x", "a", 3),
    ]
    events = split.events
    assert events.item_ids.tolist() == list("abcd")  # all stay candidates
    assert events.train_counts.tolist() == [2, 2, 0, 0] and events.user_ids.tolist() == ["u", "v", "x"]
    assert [events.item_ids[events.item[events.targets(k)]].tolist() for k in (VALIDATION, TEST)] == [["d", "c"], ["a", "a", "a"]]
    assert split.notes[1:] == (
        "data.unseen_items = 0.2 removed the 5 training events of 2 items",
        "3 users, 4 items, 10 events: 4 train, 3 validation, 3 test",
        "0.0% of consecutive events tie in time (order: hash), 0 exact duplicates; "
        "in the history already: 0.0% of validation, 66.7% of test targets",
        "1 validation events have no history and are left out",
    )
    lines = sorted(f"{label}\t{user}\t{item}\t{time}\n" for label, user, item, time in rows_of(split))
    assert split.sha256 == hashlib.sha256("".join(lines).encode()).hexdigest() != split_of(rows, items=list("abcd")).sha256
    more = split_of([*rows, *sequence("z", "aaaee")], config, items=list("eabcd"))  # in a larger table they are the same
    assert rows_of(more)[:-5] == rows_of(split)
    with pytest.raises(InputError, match="leaves no training event"):
        split_of(rows, DataConfig(unseen_items=0.8), items=list("abcd"))


def test_shuffled_order_by_hand():
    rows = sequence("u", "abcdefgh") + sequence("v", "aabbccdd") + sequence("w", "ab") + sequence("x", "h")
    straight = split_of(rows, items=list("abcdefgh"))
    split = shuffle_training(straight)
    before, after = rows_of(straight), rows_of(split)
    assert [row for row in after if row[0] != "train"] == [row for row in before if row[0] != "train"]
    assert [(user, time) for _, user, _, time in after] == [(user, time) for _, user, _, time in before]
    for user in "uvwx":
        assert Counter(row[:3] for row in after if row[1] == user) == Counter(row[:3] for row in before if row[1] == user)
    orders = {user: "".join(row[2] for row in after if row[1] == user) for user in "uvwx"}
    assert orders["u"] != "abcdefgh" and orders["u"].endswith("gh") and orders["v"].endswith("dd") and orders["x"] == "h"
    assert split.sha256 == straight.sha256 and rows_of(shuffle_training(straight)) == after
    moved = sum(a != b for a, b in zip(after, before, strict=True))
    assert split.notes == (*straight.notes, f"data.shuffled_order: {moved} of 15 training events have another item now")
    # Every order of three items occurs about equally often (600 users, a multinomial with 100 each).
    many = split_of([row for k in range(600) for row in sequence(f"u{k:03}", "abcde")], items=list("abcde"))
    counts = Counter("".join(row[2] for row in rows_of(shuffle_training(many))[5 * k : 5 * k + 3]) for k in range(600))
    assert len(counts) == 6 and all(60 < count < 140 for count in counts.values())


def test_events_without_users_in_the_middle():
    """train_ends and targets for users without events or training events, as in a subset of users."""
    events = split_of([("u", "i", 1), ("u", "2", 2), ("9", "i", 1)]).events  # users 9, u
    events = dataclasses.replace(events, user_ids=np.array(list("abcd")), offsets=np.array([0, 1, 1, 3, 3]))
    assert events.train_ends.tolist() == [1, 1, 3, 3]
    assert events.targets(TRAIN).tolist() == [2]


@pytest.mark.parametrize(
    "folder,sha256",
    [
        ("movielens-1m", "025766db7edb016150724fd3427f0da9c13cee06a113bad2b700e08848764ac3"),
        ("amazon2014-toys", "56384689ab7a582e9e668cdddfee9a5c1c3e06aaa19fe0594284572b1d27ff92"),
    ],
)
def test_real_data(folder, sha256):
    if not (DATA / folder).is_dir():
        pytest.skip(f"{DATA / folder} is not here")
    assert hash_of_the_slow_split(DATA / folder) == sha256


def test_a_made_up_shop(tmp_path):
    """What test_real_data asserts, wherever it runs."""
    hash_of_the_slow_split(write_shop(tmp_path / "shop"))


def hash_of_the_slow_split(folder):
    """By sorting Python's tuples; the split of the tables in the folder is the same."""
    split = make_split(read_tables(folder), DataConfig(), titled)
    with gzip.open(folder / "interactions.tsv.gz", "rt", encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        assert next(rows) == ["user", "item", "timestamp"]
        histories = defaultdict(list)
        for user, item, timestamp in rows:
            histories[user].append((int(timestamp), tie_hash(user, item), item))
    lines = []
    for user, events in histories.items():
        events.sort()
        labels = ["train"] * len(events)
        if len(events) >= 3:
            labels[-2:] = ["validation", "test"]
        lines += [f"{label}\t{user}\t{item}\t{time}\n".encode() for label, (time, _, item) in zip(labels, events, strict=True)]
    assert hashlib.sha256(b"".join(sorted(lines))).hexdigest() == split.sha256
    of_user = dict(zip(split.events.user_ids, np.split(split.events.item, split.events.offsets[1:-1]), strict=True))
    for user in list(histories)[::50]:
        assert split.events.item_ids[of_user[user]].tolist() == [item for *_, item in histories[user]]
    return split.sha256

"""Packing and assembly compared with plain Python, and properties of every batch for any histories."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iam_jax.data.batches import (
    Rows,
    evaluation_segments,
    training_rows,
    training_segments,
)
from iam_jax.data.catalogue import Catalogue
from iam_jax.data.splits import TEST, TRAIN, VALIDATION, Events

PROMPT, SUFFIX = 900, 950  # the first tokens of a prompt and of a suffix; item i's tokens are 10 i + 1, 10 i + 2, …


def make_events(histories, item_count=None):
    """Events from [(items, number of training events)] per user; the last remaining event is test, the others are validation."""
    items = [item for history, _ in histories for item in history]
    label = []
    for history, train in histories:
        rest = len(history) - train
        label += [TRAIN] * train + [VALIDATION] * (rest - 1) + [TEST] * (rest > 0)
    offsets = np.cumsum([0, *(len(history) for history, _ in histories)])
    names = np.array([str(n) for n in range(len(histories))])
    ids = np.array([str(n) for n in range(item_count or max(items, default=0) + 1)])
    return Events(names, ids, np.array(items, np.int32), offsets, np.arange(len(items)), np.array(label, np.uint8))


def make_catalogue(lengths, prompt=0, suffix=0):
    tokens = [10 * item + 1 + place for item, length in enumerate(lengths) for place in range(length)]
    tokens += [first + place for first, size in ((PROMPT, prompt), (SUFFIX, suffix)) for place in range(size)]
    return Catalogue(np.array(tokens, np.int32), np.cumsum([0, *lengths, prompt, suffix]), SUFFIX + 50, 0, "")


@st.composite
def problems(draw, distinct=False):
    """Any events, catalogue, row_tokens and context_items that `prepare` accepts. With `distinct`, event e has item e."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 14), st.integers(0, 3)), min_size=1, max_size=6))
    counts = [(size, max(0, size - held_out)) for size, held_out in sizes]
    total = sum(size for size, _ in counts)
    kinds = total if distinct else draw(st.integers(1, 8))
    items = list(range(total)) if distinct else draw(st.lists(st.integers(0, kinds - 1), min_size=total, max_size=total))
    lengths = draw(st.lists(st.integers(1, 6), min_size=kinds, max_size=kinds))
    prompt, suffix, context = draw(st.integers(0, 3)), draw(st.integers(0, 2)), draw(st.integers(1, 3))
    row_tokens = prompt + suffix + (context + 1) * max(lengths) + draw(st.integers(0, 20))
    histories = [(list(itertools.islice(stream, size)), train) for stream in [iter(items)] for size, train in counts]
    return make_events(histories, kinds), make_catalogue(lengths, prompt, suffix), row_tokens, context


def slow_training_segments(events, catalogue, row_tokens, context, whole_text):
    """[(input events, target events)], each window grown one event at a time."""
    *lengths, prompt, suffix = catalogue.lengths.tolist()
    segments = []
    for user in range(len(events.user_ids)):
        history = [e for e in range(events.offsets[user], events.offsets[user + 1]) if events.label[e] == TRAIN]
        targets = history if prompt else history[1:]
        begin = 0
        while targets:
            taken, used = [], prompt + suffix
            place = begin
            while place < len(history) and used + lengths[events.item[history[place]]] <= row_tokens:
                taken.append(history[place])
                used += lengths[events.item[history[place]]]
                place += 1
            # The states of `taken` (and of prompt and suffix) predict the event that follows each.
            reach = set(taken) if whole_text else {*taken, *history[place : place + 1]}
            now = [e for e in targets if e in reach]
            segments.append(([e for e in taken if e < now[-1] or whole_text], now))
            targets = targets[len(now) :]
            begin = max(0, history.index(targets[0]) - context) if targets else 0
    return segments


def slow_row(events, catalogue, segments, members, row_tokens, width):
    """One row, token by token, from the description of the layout."""
    *texts, prompt, suffix = (text.tolist() for text in np.split(catalogue.tokens, catalogue.offsets[1:-1]))
    row = {name: [] for name in ("token", "user", "group", "position", "item", "within", "target_at", "target", "segment", "label")}
    owner = []  # (user in the row, event) of each token
    for number, index in enumerate(members, start=1):
        start, stop, first, last = (int(getattr(segments, name)[index]) for name in ("start", "stop", "first", "last"))
        groups = [(event, texts[events.item[event]]) for event in range(start, stop)]
        if suffix:
            groups.insert(last - 1 - start, ("suffix", suffix))
        groups = [("prompt", prompt), *groups]
        text = [(group, event, token) for group, (event, tokens) in enumerate(groups) for token in tokens]
        ends = {}
        for position, (group, event, token) in enumerate(text):
            ends[event] = len(row["token"])
            row["token"].append(token)
            row["user"].append(number)
            row["group"].append(group)
            row["position"].append(position)
            special = {"prompt": catalogue.items, "suffix": catalogue.items + 1}
            row["item"].append(special[event] if event in special else int(events.item[event]))
            row["within"].append(sum(owner_ == (number, event) for owner_ in owner))
            owner.append((number, event))
        for event in range(first, last):
            before = "suffix" if suffix and event == last - 1 else event - 1 if event > start else "prompt"
            row["target_at"].append(ends[before])
            row["target"].append(int(events.item[event]))
            row["segment"].append(int(index))
    targets = [(n, e) for n, i in enumerate(members, 1) for e in range(segments.first[i], segments.last[i])]
    for slot in range(len(owner)):
        follows = slot + 1 < len(owner) and owner[slot + 1][0] == owner[slot][0] and owner[slot + 1] in targets
        row["label"].append(row["token"][slot + 1] if follows else -1)
    fill = {"item": catalogue.items, "target_at": 0, "target": -1, "segment": -1, "label": -1}
    size = dict.fromkeys(row, row_tokens) | dict.fromkeys(("target_at", "target", "segment"), width)
    return {name: values + [fill.get(name, 0)] * (size[name] - len(values)) for name, values in row.items()}


def as_lists(row):
    assert all(values.dtype == np.int32 for values in row.values())
    return {name: values.tolist() for name, values in row.items()}


def as_pairs(segments):
    return [
        (list(range(start, stop)), list(range(first, last)))
        for start, stop, first, last in zip(segments.start, segments.stop, segments.first, segments.last, strict=True)
    ]


@pytest.mark.parametrize("suffix", [0, 4])
@pytest.mark.parametrize("whole_text, needed", [(False, 2 + 3 * 3), (True, 2 + 4 * 3)])
def test_a_row_too_small_for_the_context_is_refused(whole_text, needed, suffix):
    """Nine items of 3 tokens, a prompt of 2, three items of context: the context alone, or with the target's own text; a suffix of 4."""
    events, catalogue = make_events([([0], 1), (list(range(9)), 9)]), make_catalogue([3] * 9, prompt=2, suffix=suffix)
    needed += suffix
    segments = training_segments(events, catalogue, needed, 3, whole_text)
    assert sorted(target for _, targets in as_pairs(segments) for target in targets) == list(range(10))
    what = f"prompt, suffix and events 1 to {4 if whole_text else 3} need {needed}"
    with pytest.raises(ValueError, match=rf"^rows of {needed - 1} slots: {what}$"):
        training_segments(events, catalogue, needed - 1, 3, whole_text)


@settings(deadline=None, max_examples=200)
@given(problems(), st.booleans(), st.integers(0, 3))
def test_training_rows_are_the_slow_ones(problem, whole_text, seed):
    events, catalogue, row_tokens, context = problem
    rows = training_rows(events, catalogue, row_tokens, context, whole_text, seed)
    expected = slow_training_segments(events, catalogue, row_tokens, context, whole_text)
    assert sorted(as_pairs(rows.segments)) == sorted(expected)
    assert sorted(np.concatenate([*rows.rows, []]).tolist()) == list(range(len(expected)))
    assert rows.targets == sum(len(targets) for _, targets in expected)
    width = max([1, *(sum(len(as_pairs(rows.segments)[i][1]) for i in members) for members in rows.rows)])
    assert rows.targets_per_row == width
    used = 0
    for number, members in enumerate(rows.rows):
        row = as_lists(rows[number])
        assert row == slow_row(events, catalogue, rows.segments, members, row_tokens, width)
        used += np.count_nonzero(row["user"])
    assert rows.fill == pytest.approx(used / (max(len(rows), 1) * row_tokens))


@settings(deadline=None, max_examples=200)
@given(problems(distinct=True), st.booleans())
def test_what_training_must_hold(problem, whole_text):
    """The contract, checked on the arrays alone. Every event has its own item, so a token identifies its event."""
    events, catalogue, row_tokens, context = problem
    rows = training_rows(events, catalogue, row_tokens, context, whole_text, seed=1)
    user_of = events.user
    begins = events.offsets[:-1]
    prompt, suffix = (text.tolist() for text in np.split(catalogue.tokens, catalogue.offsets[1:-1])[-2:])
    predicted, labelled = [], []
    for row in (as_lists(rows[n]) for n in range(len(rows))):
        slots = sum(user > 0 for user in row["user"])
        assert row["user"] == sorted(row["user"][:slots]) + [0] * (row_tokens - slots)
        special = {PROMPT // 50: "prompt", SUFFIX // 50: "suffix"}
        event_at = [special.get(token // 50, (token - 1) // 10) for token in row["token"][:slots]]
        last_targets = {row["user"][at]: target for at, target in zip(row["target_at"], row["target"], strict=True) if target >= 0}
        inputs = {}  # user in the row -> events in order
        for number in range(1, max(row["user"]) + 1):
            place = [t for t in range(slots) if row["user"][t] == number]
            inputs[number] = list(dict.fromkeys(event_at[t] for t in place if event_at[t] not in ("prompt", "suffix")))
            order = [e for e in inputs[number] if e < last_targets[number]]  # what the last target is predicted from
            order += ["suffix"] * bool(suffix) + inputs[number][len(order) :]
            texts = {e: list(range(10 * e + 1, 10 * e + 1 + catalogue.lengths[e])) for e in inputs[number]} | {"suffix": suffix}
            assert [row["token"][t] for t in place] == prompt + [token for e in order for token in texts[e]]
            assert [row["position"][t] for t in place] == list(range(len(place)))
            groups = {"prompt": 0} | {e: k for k, e in enumerate(order, start=1)}
            assert [row["group"][t] for t in place] == [groups[event_at[t]] for t in place]
            if inputs[number]:  # contiguous training events of one user
                first, last = inputs[number][0], inputs[number][-1]
                assert inputs[number] == list(range(first, last + 1)) and user_of[first] == user_of[last]
                assert all(events.label[e] == TRAIN for e in inputs[number])
        first_target = {}
        for at, target in zip(row["target_at"], row["target"], strict=True):
            if target < 0:
                continue
            predicted.append(target)
            number, before = row["user"][at], event_at[at]
            first_target.setdefault(number, target)
            assert (before == "suffix") == (bool(suffix) and target == last_targets[number])
            if before == "suffix":  # its last token predicts a window's last target
                assert row["token"][at] == suffix[-1] and (prompt or target > begins[user_of[target]])
            elif before == "prompt":  # its last token predicts the user's first event
                assert row["position"][at] == len(prompt) - 1 and target == begins[user_of[target]]
            else:  # the boundary token of the event before
                assert before == target - 1 and user_of[before] == user_of[target]
                assert row["token"][at] == 10 * before + catalogue.lengths[before]
            left = target - (inputs[number] or [target])[0]
            assert left >= min(context, target - begins[user_of[target]])
        for slot, label in enumerate(row["label"]):
            if label >= 0:
                assert slot + 1 < slots and row["token"][slot + 1] == label and row["user"][slot + 1] == row["user"][slot]
                labelled.append(label)
        for number, target in first_target.items():  # a user who fits whole is not cut
            user = user_of[target]
            train = [e for e in range(begins[user], events.offsets[user + 1]) if events.label[e] == TRAIN]
            needed = len(prompt) + len(suffix) + sum(int(catalogue.lengths[e]) for e in (train if whole_text else train[:-1]))
            if needed <= row_tokens:
                assert inputs[number] == (train if whole_text else train[:-1])
    wanted = [e for e in range(len(events.item)) if events.label[e] == TRAIN and (prompt or e != begins[user_of[e]])]
    assert sorted(predicted) == wanted
    if whole_text:  # each target's every token is predicted once, the boundary token included
        assert sorted(labelled) == [10 * e + 1 + k for e in wanted for k in range(catalogue.lengths[e])]


@settings(deadline=None, max_examples=150)
@given(problems(), st.sampled_from([TRAIN, VALIDATION, TEST]), st.booleans())
def test_evaluation_uses_the_most_recent_items_that_fit(problem, label, whole_text):
    events, catalogue, row_tokens, _ = problem
    targets = events.targets(label)
    segments = evaluation_segments(events, catalogue, row_tokens, targets, whole_text)
    expected = []
    for target in targets.tolist():
        own = catalogue.lengths[events.item[target]] if whole_text else 0
        start, used, begin = target, int(sum(catalogue.lengths[-2:]) + own), events.offsets[events.user[target]]
        while start > begin and used + catalogue.lengths[events.item[start - 1]] <= row_tokens:
            start -= 1
            used += int(catalogue.lengths[events.item[start]])
        assert start < target
        expected.append((list(range(start, target + whole_text)), [target]))
    assert as_pairs(segments) == expected
    rows = Rows(events, catalogue, segments, row_tokens)
    seen, labelled = [], 0
    for number, members in enumerate(rows.rows):
        row = as_lists(rows[number])
        assert row == slow_row(events, catalogue, segments, members, row_tokens, rows.targets_per_row)
        labelled += sum(label >= 0 for label in row["label"])
        seen += [(s, t) for s, t in zip(row["segment"], row["target"], strict=True) if s >= 0]
    assert sorted(seen) == [(k, int(events.item[target])) for k, target in enumerate(targets)]
    # A target's own tokens are labels, each once, where they are input.
    assert labelled == (sum(int(catalogue.lengths[events.item[target]]) for target in targets) if whole_text else 0)


@pytest.mark.parametrize(
    "prompt, target, whole_text, needed", [(0, 2, True, 2 + 6), (0, 2, False, 2 + 3), (1, 0, True, 3 + 3), (1, 0, False, 3)]
)
def test_an_evaluation_with_nothing_before_the_target_is_refused(prompt, target, whole_text, needed):
    """Items of 3 tokens and a suffix of 2: without a prompt an item must precede the target, with one the target may be the first."""
    events, catalogue = make_events([([0, 1, 2], 1)]), make_catalogue([3] * 3, prompt, suffix=2)
    targets = np.array([target])
    assert len(evaluation_segments(events, catalogue, needed, targets, whole_text)) == 1
    for few in (needed - 1, 1):
        with pytest.raises(ValueError, match=f"^rows of {few} slots: no prompt or earlier item fits before event {target}$"):
            evaluation_segments(events, catalogue, few, targets, whole_text)
    if not prompt:  # the suffix alone predicts nothing
        with pytest.raises(ValueError, match="no prompt or earlier item fits before event 0"):
            evaluation_segments(events, catalogue, 99, np.array([0]), whole_text)


def test_windows_by_hand():
    """Items of 2, 3, 4, 1 tokens in turn, rows of 10 tokens, two items of context."""
    events = make_events([([0, 1, 2, 3] * 3, 11)])
    catalogue = make_catalogue([2, 3, 4, 1])
    # Lengths 2 3 4 1 | 2 3 4 1 | 2 3 (4): events 0-3 fill a row and predict 1-4. The next target, 5, has 3 and 4 to its left:
    # 1 + 2 + 3 + 4 = 10, predicting 5, 6, 7; then 6 and 7: 4 + 1 + 2 + 3, predicting 8, 9, 10. Event 11 is held out.
    segments = training_segments(events, catalogue, 10, 2, whole_text=False)
    assert as_pairs(segments) == [
        ([0, 1, 2, 3], [1, 2, 3, 4]),
        ([3, 4, 5, 6], [5, 6, 7]),
        ([6, 7, 8, 9], [8, 9, 10]),
    ]
    # With the token objective a target's own tokens must fit too.
    segments = training_segments(events, catalogue, 10, 2, whole_text=True)
    assert as_pairs(segments) == [
        ([0, 1, 2, 3], [1, 2, 3]),
        ([2, 3, 4, 5], [4, 5]),
        ([4, 5, 6, 7], [6, 7]),
        ([6, 7, 8, 9], [8, 9]),
        ([8, 9, 10], [10]),
    ]


def test_windows_with_a_suffix_by_hand():
    """The same events: a prompt of 1 and a suffix of 2 in every window leave 10 of 13 tokens, so the windows are the same, and the first
    event is a target too; each window's last target is predicted from its suffix."""
    events, catalogue = make_events([([0, 1, 2, 3] * 3, 11)]), make_catalogue([2, 3, 4, 1], prompt=1, suffix=2)
    segments = training_segments(events, catalogue, 13, 2, whole_text=False)
    assert as_pairs(segments) == [
        ([0, 1, 2, 3], [0, 1, 2, 3, 4]),
        ([3, 4, 5, 6], [5, 6, 7]),
        ([6, 7, 8, 9], [8, 9, 10]),
    ]
    row = as_lists(Rows(events, catalogue, segments, 13)[1])
    assert row["token"] == [900, 31, 1, 2, 11, 12, 13, 21, 22, 23, 24, 950, 951]
    assert row["group"] == [0, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 5, 5]
    # Events 5, 6, 7 are of items 1, 2, 3.
    assert row["target"][:3] == [1, 2, 3] and row["target_at"][:3] == [3, 6, 12]
    assert row["label"] == [-1] * 3 + [11, 12, 13, 21, 22, 23, 24] + [-1] * 3
    segments = training_segments(events, catalogue, 13, 2, whole_text=True)
    assert as_pairs(segments)[:2] == [([0, 1, 2, 3], [0, 1, 2, 3]), ([2, 3, 4, 5], [4, 5])]
    row = as_lists(Rows(events, catalogue, segments, 13)[1])
    assert row["token"] == [900, 21, 22, 23, 24, 31, 1, 2, 950, 951, 11, 12, 13]
    assert row["group"] == [0, 1, 1, 1, 1, 2, 3, 3, 4, 4, 5, 5, 5]
    assert row["target"][:2] == [0, 1] and row["target_at"][:2] == [5, 9]
    assert row["label"] == [-1] * 5 + [1, 2, -1, -1, 11, 12, 13, -1]


def test_a_row_with_a_suffix_by_hand():
    """Two users, a prompt and a suffix, items whose first token is a separator (9): in training with and without the targets' text, and
    in evaluation."""
    events = make_events([([0, 1, 0], 2), ([1, 0], 1)])
    catalogue = Catalogue(np.array([9, 1, 7, 9, 7, 900, 950, 951], np.int32), np.array([0, 3, 5, 6, 8]), 952, 0, "")
    rows = Rows(events, catalogue, training_segments(events, catalogue, 16, 1, True), 16)
    assert len(rows) == 1 and as_lists(rows[0]) == {
        "token": [900, 9, 1, 7, 950, 951, 9, 7, 900, 950, 951, 9, 7, 0, 0, 0],
        "user": [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0, 0],
        "group": [0, 1, 1, 1, 2, 2, 3, 3, 0, 1, 1, 2, 2, 0, 0, 0],
        "position": [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 0, 0, 0],
        "item": [2, 0, 0, 0, 3, 3, 1, 1, 2, 3, 3, 1, 1, 2, 2, 2],
        "within": [0, 0, 1, 2, 0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 0],
        "label": [9, 1, 7, -1, -1, 9, 7, -1, -1, -1, 9, 7, -1, -1, -1, -1],
        "target_at": [0, 5, 10],
        "target": [0, 1, 1],
        "segment": [0, 0, 1],
    }
    assert rows.fill == 13 / 16 and rows.most_item_tokens == 13  # every target is input
    rows = Rows(events, catalogue, training_segments(events, catalogue, 16, 1, False), 16)
    assert len(rows) == 1 and as_lists(rows[0]) == {
        "token": [900, 9, 1, 7, 950, 951, 900, 950, 951, 0, 0, 0, 0, 0, 0, 0],
        "user": [1, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0],
        "group": [0, 1, 1, 1, 2, 2, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        "position": [0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0],
        "item": [2, 0, 0, 0, 3, 3, 2, 3, 3, 2, 2, 2, 2, 2, 2, 2],
        "within": [0, 0, 1, 2, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        "label": [9, 1, 7] + [-1] * 13,
        "target_at": [0, 5, 8],
        "target": [0, 1, 1],
        "segment": [0, 0, 1],
    }
    assert rows.most_item_tokens == 9 + 2 + 2  # and item 1 twice, as a target
    # Evaluation of the first user's last event, item 0, where only one item of the history fits.
    plain = {
        "token": [900, 9, 7, 950, 951],
        "user": [1] * 5,
        "group": [0, 1, 1, 2, 2],
        "position": [0, 1, 2, 3, 4],
        "item": [2, 1, 1, 3, 3],
        "within": [0, 0, 1, 0, 1],
        "label": [-1] * 5,
        "target_at": [4],
        "target": [0],
        "segment": [0],
    }
    whole = plain | {
        "token": [*plain["token"], 9, 1, 7],
        "user": [1] * 8,
        "group": [*plain["group"], 3, 3, 3],
        "position": [*plain["position"], 5, 6, 7],
        "item": [*plain["item"], 0, 0, 0],
        "within": [*plain["within"], 0, 1, 2],
        "label": [-1, -1, -1, -1, 9, 1, 7, -1],
    }
    for whole_text, expected in ((False, plain), (True, whole)):
        slots = len(expected["token"])
        segments = evaluation_segments(events, catalogue, slots, np.array([2]), whole_text)
        assert as_lists(Rows(events, catalogue, segments, slots)[0]) == expected


def test_a_row_by_hand():
    """Two users, a prompt, and the token objective: every array written out."""
    events = make_events([([0, 1], 2), ([1], 1)])
    rows = Rows(events, make_catalogue([1, 2], prompt=2), training_segments(events, make_catalogue([1, 2], 2), 12, 1, True), 12)
    assert len(rows) == 1 and as_lists(rows[0]) == {
        "token": [900, 901, 1, 11, 12, 900, 901, 11, 12, 0, 0, 0],
        "user": [1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0],
        "group": [0, 0, 1, 2, 2, 0, 0, 1, 1, 0, 0, 0],
        "position": [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0],
        "item": [2, 2, 0, 1, 1, 2, 2, 1, 1, 2, 2, 2],
        "within": [0, 1, 0, 0, 1, 0, 1, 0, 1, 0, 0, 0],
        "label": [-1, 1, 11, 12, -1, -1, 11, 12, -1, -1, -1, -1],
        "target_at": [1, 2, 6],
        "target": [0, 1, 1],
        "segment": [0, 0, 1],
    }
    assert rows.fill == 9 / 12 and rows.targets == 3


def test_id_tokens():
    """One token per item: the id is the boundary token, and every slot but the last predicts."""
    events = make_events([([3, 1, 2, 1], 3)], 4)
    catalogue = Catalogue(np.arange(4, dtype=np.int32), np.array([0, 1, 2, 3, 4, 4, 4]), 4, 0, "")
    row = as_lists(training_rows(events, catalogue, 4, 1, False, 0)[0])
    assert row["token"] == [3, 1, 0, 0] and row["group"] == [1, 2, 0, 0] and row["user"] == [1, 1, 0, 0]
    assert row["target_at"] == [0, 1] and row["target"] == [1, 2]


def test_a_very_long_history():
    """Rows of 64 tokens for 5,000 events of varying length: all targets once, rows well filled, context kept."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 200)
    events = make_events([(rng.integers(0, 200, 5000).tolist(), 4998), ([1, 2, 3], 1)], 200)
    for whole_text in (False, True):
        segments = training_segments(events, make_catalogue(lengths), 64, 4, whole_text)
        targets = np.concatenate([np.arange(first, last) for first, last in zip(segments.first, segments.last, strict=True)])
        assert targets.tolist() == list(range(1, 4998))
        assert np.all(segments.first[1:] - segments.start[1:] == 4) and segments.start[0] == 0
        rows = Rows(events, make_catalogue(lengths), segments, 64)
        assert rows.sizes.max() <= 64 and rows.fill > 0.85
        for number in (0, len(rows) // 2, len(rows) - 1):
            assert as_lists(rows[number]) == slow_row(
                events, make_catalogue(lengths), segments, rows.rows[number], 64, rows.targets_per_row
            )


def test_users_without_targets():
    catalogue = make_catalogue([1, 2])
    events = make_events([([0], 1), ([1, 0, 1], 1), ([0, 1], 0)])
    assert len(training_segments(events, catalogue, 8, 1, False)) == 0
    assert training_rows(events, catalogue, 8, 1, False, 0).targets == 0
    # With a prompt a user's first event is a target too; then the prompt alone is the input.
    for suffix in (0, 2):
        segments = training_segments(events, make_catalogue([1, 2], prompt=1, suffix=suffix), 8, 1, False)
        assert as_pairs(segments) == [([], [0]), ([], [1])]
    assert len(training_segments(events, make_catalogue([1, 2], suffix=2), 8, 1, False)) == 0  # but not with a suffix alone

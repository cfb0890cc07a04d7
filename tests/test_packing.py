"""Packing of segments into rows and rows into batches: each occurs once, and a batch is a pure function of (seed, number)."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_batches import make_catalogue, make_events

from iam_jax.data.batches import (
    evaluation_batches,
    pack,
    training_batches,
    training_rows,
)


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40), st.integers(1, 8), st.booleans())
def test_pack_covers_each_index_once_within_capacity(sizes, capacity, open_rows, shuffled):
    sizes = np.array(sizes, int)
    rows = pack(sizes, capacity, np.random.default_rng(0) if shuffled else None, open_rows)
    assert sorted(i for row in rows for i in row.tolist()) == list(range(len(sizes)))
    assert all(0 < sizes[row].sum() <= capacity for row in rows)
    if len(sizes) <= open_rows:  # if all rows are open, any two rows together exceed one row, so no row is superfluous
        filled = [sizes[row].sum() for row in rows]
        assert all(a + b > capacity for a, b in itertools.combinations(filled, 2))


def test_pack_takes_the_best_fit():
    assert [row.tolist() for row in pack(np.array([5, 6, 4, 5]), 10)] == [[0, 3], [1, 2]]  # 4 goes where the least space remains
    assert [row.tolist() for row in pack(np.array([10, 10]), 10)] == [[0], [1]]
    orders = [tuple(map(tuple, pack(np.full(30, 4), 8, np.random.default_rng(seed)))) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and all(len(rows) == 15 for rows in orders)


def many_rows(seed=3):
    """Rows that their first segments identify."""
    rng = np.random.default_rng(5)
    events = make_events([(rng.integers(0, 9, n).tolist(), n - 2) for n in rng.integers(3, 9, 60).tolist()], 9)
    return training_rows(events, make_catalogue(rng.integers(1, 5, 9), 1), 40, 1, False, seed)


def test_a_batch_is_a_pure_function_of_seed_and_number():
    rows = many_rows()
    n, size = len(rows), 3
    assert n % size and n > size
    count = 3 * n // size + 3

    def take(iterator, count=count):
        return list(itertools.islice(iterator, count))

    def equal(first, second):
        assert len(first) == len(second) > 0
        return all(np.array_equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)

    batches = take(training_batches(rows, size, seed=7))
    assert set(batches[0]) == {"token", "user", "group", "position", "item", "within", "target_at", "target", "segment", "label"}
    assert all(batch["token"].shape == (size, 40) and batch["target"].dtype == np.int32 for batch in batches)
    assert equal(batches, take(training_batches(many_rows(), size, seed=7)))  # a batch depends only on the seeds
    for start in (1, n // size, n // size + 1, count - 1):  # within an epoch, across its end, and beyond
        assert equal(batches[start:], take(training_batches(rows, size, seed=7, start=start), count - start))
    assert not equal(batches, take(training_batches(rows, size, seed=8)))
    assert {tuple(row) for row in rows.rows[0:1]} != {tuple(row) for row in many_rows(seed=4).rows[0:1]}

    # Every epoch contains every row once, in another order; batches cross the ends of epochs.
    numbers = [int(segment) for batch in batches for segment in batch["segment"][:, 0]]
    epochs = [numbers[k * n : (k + 1) * n] for k in range(3)]
    firsts = sorted(int(row[0]) for row in rows.rows)
    assert all(sorted(epoch) == firsts for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    by_first = {int(rows[k]["segment"][0]): rows[k] for k in range(n)}
    for batch in batches[:3]:  # a batch consists of its rows, stacked
        for name, values in batch.items():
            np.testing.assert_array_equal(values, np.stack([by_first[int(s)][name] for s in batch["segment"][:, 0]]))


def test_processes_assemble_their_own_rows_of_the_same_batches():
    """For any shares of the rows, no row is lost, and rows that two processes need are equal."""
    rows = many_rows()
    whole = list(itertools.islice(training_batches(rows, 4, seed=7), 9))
    for shares in ([[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 2], [1, 3]], [[0, 1, 2, 3], [0, 1, 2, 3]]):
        for here in shares:
            part = list(itertools.islice(training_batches(rows, 4, seed=7, start=2, here=np.array(here)), 7))
            for batch, own in zip(whole[2:], part, strict=True):
                assert all(np.array_equal(batch[name][here], own[name]) for name in batch)


@pytest.mark.parametrize("size", [1, 4, 50])
def test_evaluation_batches_hold_every_row_once_and_nothing_else(size):
    rows = many_rows()
    batches = list(evaluation_batches(rows, size))
    assert len(batches) == -(-len(rows) // size)
    stacked = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    assert all(len(batch["token"]) == size for batch in batches)
    for number in range(len(rows)):
        for name, values in rows[number].items():
            np.testing.assert_array_equal(stacked[name][number], values)
    for name, values in stacked.items():
        padding = values[len(rows) :]
        nothing = {"item": rows.catalogue.items} | dict.fromkeys(("target", "segment", "label"), -1)
        assert values.dtype == np.int32 and np.all(padding == nothing.get(name, 0))

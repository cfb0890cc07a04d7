import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import allowed_keys, pack_row, stack
from hypothesis import given, settings
from hypothesis import strategies as st

from iam_jax.config import ModelConfig
from iam_jax.model.attention import key_ranges, rotary
from iam_jax.relations import RELATIONS

SLOTS = 16
ranges_of = jax.jit(key_ranges)


@st.composite
def rows(draw):
    users, free = [], SLOTS
    for _ in range(draw(st.integers(0, 4))):
        user = (draw(st.integers(0, 2)), draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
        if (size := user[0] + sum(user[1])) <= free:
            users.append(user)
            free -= size
    return pack_row(SLOTS, *users)


@settings(max_examples=60, deadline=None)
@given(st.lists(rows(), min_size=2, max_size=2))
def test_key_ranges_against_their_meaning(packed):
    batch = stack(packed)
    ranges = ranges_of(batch["user"], batch["group"])
    assert set(ranges) == set(RELATIONS)
    s = np.arange(SLOTS)
    for relation, (bounds, second) in ranges.items():
        assert second is None
        start, stop = (np.asarray(bound)[..., None] for bound in bounds)
        assert (start >= 0).all() and (stop <= SLOTS).all() and (start <= stop).all()
        expected = [allowed_keys(relation, *row) for row in zip(batch["user"], batch["group"], strict=True)]
        np.testing.assert_array_equal((start <= s) & (s < stop), expected, err_msg=relation)


def test_key_ranges_by_hand():
    batch = stack([pack_row(8, (1, [2]), (0, [1, 2]))] * 2)  # p a a | b c c, two slots of padding
    ranges = key_ranges(batch["user"], batch["group"])
    got = {name: [list(map(int, bound[0])) for bound in first] for name, (first, _) in ranges.items()}
    assert got == {
        "full": [[0, 0, 0, 3, 3, 3, 0, 0], [1, 2, 3, 4, 5, 6, 0, 0]],
        "intra": [[0, 1, 1, 3, 4, 4, 0, 0], [1, 2, 3, 4, 5, 6, 0, 0]],
        "inter": [[0, 0, 0, 3, 3, 3, 0, 0], [0, 1, 1, 3, 4, 4, 0, 0]],
        "intra_both": [[0, 1, 1, 3, 4, 4, 0, 0], [1, 3, 3, 4, 6, 6, 0, 0]],
    }


def test_users_apart_where_only_the_user_changes():
    """Two users with one item each: the item number is 1 on both sides of the boundary."""
    user, group = np.array([[1, 1, 2, 2]], np.int32), np.ones((1, 4), np.int32)
    for relation, ((start, _), _) in key_ranges(user, group).items():
        assert start[0].tolist() == [0, 0, 2, 2], relation


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((2, 5, 3, 8)).astype(np.float32)


def test_rotary_turns_pairs_of_halves(x):
    position = np.array([[0, 1, 2, 3, 300], [7, 0, 5, 5, 2]], np.int32)
    got = np.asarray(rotary(x, position, ModelConfig(rope_theta=100.0)))
    turn = np.exp(1j * position[..., None, None] * 100.0 ** -np.array([0, 0.25, 0.5, 0.75]))
    expected = (x[..., :4] + 1j * x[..., 4:]) * turn
    np.testing.assert_allclose(got, np.concatenate([expected.real, expected.imag], -1), atol=3e-5)
    np.testing.assert_array_equal(got[position == 0], x[position == 0])
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


def test_rotary_products_depend_on_differences_only(x):
    q, k = x[:1], x[1:]
    position = np.array([[0, 1, 4, 9, 11]], np.int32)

    def products(q_position, k_position):
        return np.einsum("BTNH,BSNH->BTSN", rotary(q, q_position, ModelConfig()), rotary(k, k_position, ModelConfig()))

    base = products(position, position)
    np.testing.assert_allclose(products(position + 37, position + 37), base, atol=2e-5)
    assert np.abs(products(position + 1, position) - base).max() > 0.1


def test_rotary_keeps_the_type(x):
    got = rotary(jnp.asarray(x, jnp.bfloat16), np.full((2, 5), 4000, np.int32), ModelConfig())
    assert got.dtype == jnp.bfloat16  # and its angles are exact: bfloat16 has no 4000.0 + 1
    exact = rotary(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32), np.full((2, 5), 4000, np.int32), ModelConfig())
    np.testing.assert_allclose(np.asarray(got, np.float32), exact, rtol=2**-8)

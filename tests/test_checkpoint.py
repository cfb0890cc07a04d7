"""Checkpoints of a small tree: which are kept, which is meant, and what an interrupted save leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.path import atomicity

from iam_jax.checkpoint import Checkpoints
from iam_jax.errors import InputError


def state_of(step, rows=3):
    return {
        "params": {"layer": {"query_DNH": jnp.arange(rows * 4.0).reshape(rows, 4) + step}, "scale": jnp.float32(1 / 3)},
        "optimizer": [{"mu": jnp.full(4, step / 7)}, jnp.int32(step)],
        "cache": jnp.ones((2, 2)),
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def make(folder, metrics, keep=2, metric="ndcg@10"):
    """Checkpoints at steps 1, 2, … with these values of the metric."""
    checkpoints = Checkpoints(folder, keep, metric)
    for step, value in enumerate(metrics, start=1):
        measured = None if value is None else {"ndcg@10": value, "hr@10": 1 - value}
        checkpoints.save(step, state_of(step), {"step": step, "window": {}}, measured)
    return checkpoints


def test_the_newest_and_the_best_stay(tmp_path):
    checkpoints = make(tmp_path, [0.1, 0.5, None, 0.4, 0.2, None])
    assert checkpoints.steps() == [2, 5, 6]
    assert [checkpoints.resolve(name) for name in ("best", "last", "5")] == [2, 6, 5]
    assert checkpoints.best() == (2, 0.5)
    again = Checkpoints(tmp_path, 1, "ndcg@10", read_only=True)
    assert again.steps() == [2, 5, 6] and again.resolve("best") == 2


def test_of_equals_the_first_is_the_best_as_training_tells_it(tmp_path):
    checkpoints = make(tmp_path, [0.1, 0.5, 0.5, 0.5, 0.2], keep=1)
    assert checkpoints.resolve("best") == 2
    assert checkpoints.steps() == [2, 5]


def test_without_a_validation_the_newest_is_the_best(tmp_path):
    checkpoints = make(tmp_path, [None, None])
    assert checkpoints.best() is None and checkpoints.resolve("best") == 2


@pytest.mark.parametrize("step", ["3", "-1", "1.5", "newest", ""])
def test_an_unknown_step_is_an_error_that_lists_the_known(tmp_path, step):
    with pytest.raises(InputError, match=rf"--step={step}: .* has 1, 2 \(or best, last\)"):
        make(tmp_path, [0.1, 0.2]).resolve(step)


def test_no_checkpoints(tmp_path):
    with pytest.raises(InputError, match="no checkpoints there"):
        Checkpoints(tmp_path, 2, "ndcg@10", read_only=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="no complete checkpoint"):
        make(tmp_path, []).resolve("last")


def test_another_metric_chooses_among_the_same_checkpoints(tmp_path):
    make(tmp_path, [0.1, 0.5, 0.4])
    assert Checkpoints(tmp_path, 2, "ndcg@10", read_only=True).resolve("best") == 2
    assert Checkpoints(tmp_path, 2, "hr@10", read_only=True).best() == (3, 0.6)  # step 1 was not kept
    other = Checkpoints(tmp_path, 2, "mrr@7", read_only=True)
    assert other.resolve("last") == 3
    with pytest.raises(InputError, match=r"eval\.metric = 'mrr@7' was not measured .* ndcg@10, hr@10"):
        other.resolve("best")


def test_everything_comes_back_bitwise(tmp_path):
    checkpoints = make(tmp_path, [])
    progress = {"step": 7, "best": 0.1 + 0.2, "best_step": None, "window": {"item_sum": 1e-45, "steps": 3}, "stopped": ""}
    checkpoints.save(7, state_of(7), progress, None)
    checkpoints.close()
    again = Checkpoints(tmp_path, 2, "ndcg@10")
    assert again.progress(7) == progress
    restored = again.restore(7, abstract(state_of(0)))
    assert jax.tree.structure(restored) == jax.tree.structure(state_of(0))
    for got, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(state_of(7)), strict=True):
        assert got.dtype == expected.dtype and got.sharding == expected.sharding
        np.testing.assert_array_equal(got, expected)
    params = again.restore_params(7, abstract(state_of(0)["params"]))
    np.testing.assert_array_equal(params["layer"]["query_DNH"], state_of(7)["params"]["layer"]["query_DNH"])


def test_a_step_saved_again_gets_its_metrics(tmp_path):
    checkpoints = make(tmp_path, [0.1, None])
    checkpoints.save(2, state_of(9), {"step": 2, "again": True}, {"ndcg@10": 0.3})
    assert checkpoints.steps() == [1, 2] and checkpoints.best() == (2, 0.3)
    assert checkpoints.progress(2) == {"step": 2, "again": True}
    params = checkpoints.restore_params(2, abstract(state_of(0)["params"]))
    np.testing.assert_array_equal(params["layer"]["query_DNH"], state_of(9)["params"]["layer"]["query_DNH"])


def test_what_an_interrupted_save_leaves_is_no_checkpoint(tmp_path, monkeypatch):
    checkpoints = make(tmp_path, [0.1, 0.2])

    async def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(3, state_of(3), {"step": 3}, {"ndcg@10": 0.9})
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert len(left) == 3 and left[:2] == ["1", "2"] and left[2].startswith("3.")

    reader = Checkpoints(tmp_path, 2, "ndcg@10", read_only=True)
    assert reader.steps() == [1, 2] and reader.resolve("best") == 2
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
    again = Checkpoints(tmp_path, 2, "ndcg@10")
    again.save(3, state_of(3), {"step": 3}, {"ndcg@10": 0.9})
    assert again.steps() == [2, 3] and again.resolve("best") == 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def wider(state):
    return state | {"params": state_of(0, rows=4)["params"]}


def narrower(state):
    return state | {"params": state_of(0, rows=2)["params"]}


def with_more(state):
    return state | {"params": state["params"] | {"bias": jnp.zeros(2)}}


def with_less(state):
    return state | {"params": {"scale": state["params"]["scale"]}}


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (wider, r"layer\.query_DNH is \(3, 4\) there, \(4, 4\) here"),
        (narrower, r"layer\.query_DNH is \(3, 4\) there, \(2, 4\) here"),
        (with_more, r"bias is absent there, \(2,\) here"),
        (with_less, r"layer\.query_DNH is \(3, 4\) there, absent here"),
    ],
)
def test_parameters_of_another_model_are_refused(tmp_path, other, named):
    checkpoints = make(tmp_path, [0.1])
    wanted = abstract(other(state_of(0)))
    for restore, tree in ((checkpoints.restore, wanted), (checkpoints.restore_params, wanted["params"])):
        with pytest.raises(InputError, match=rf"checkpoints/1: does not fit the config's model: .*{named}"):
            restore(1, tree)

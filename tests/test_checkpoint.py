"""Checkpoints of a small tree: which steps are kept, how steps are resolved, interrupted saves, and damaged checkpoints."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.path import atomicity

from iam_jax.errors import DamagedError, InputError
from iam_jax.runs import checkpoint as checkpoint_lib
from iam_jax.runs.checkpoint import Checkpoints
from iam_jax.storage.files import write_atomically


def state_of(step, rows=3):
    return {
        "params": {"layer": {"query_DNH": jnp.arange(rows * 4.0).reshape(rows, 4) + step}, "scale": jnp.float32(1 / 3)},
        "optimizer": [{"mu": jnp.full(4, step / 7)}, jnp.int32(step)],
        "cache": jnp.ones((2, 2)),
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for got, expected in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert got.dtype == expected.dtype and got.sharding == expected.sharding
        np.testing.assert_array_equal(got, expected)


def make(folder, metrics, keep=2, metric="ndcg@10"):
    """Makes checkpoints at steps 1, 2, … with these values of the metric."""
    checkpoints = Checkpoints(folder, keep, metric)
    for step, value in enumerate(metrics, start=1):
        measured = None if value is None else {"ndcg@10": value, "hr@10": 1 - value}
        checkpoints.save(step, state_of(step), {"step": step, "window": {}}, measured)
    checkpoints.wait()
    return checkpoints


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = make(tmp_path, [0.1, 0.5, None, 0.4, 0.2, None])
    assert checkpoints.steps() == [2, 5, 6]
    assert [checkpoints.resolve(name) for name in ("best", "last", "5")] == [2, 6, 5]
    assert checkpoints.best() == (2, 0.5)
    again = Checkpoints(tmp_path, 1, "ndcg@10", read_only=True)
    assert again.steps() == [2, 5, 6] and again.resolve("best") == 2


def test_the_first_of_equal_steps_is_the_best_as_in_training(tmp_path):
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
    assert_same(again.restore(7, abstract(state_of(0))), state_of(7))
    params = again.restore_params(7, abstract(state_of(0)["params"]))
    np.testing.assert_array_equal(params["layer"]["query_DNH"], state_of(7)["params"]["layer"]["query_DNH"])


def test_a_step_saved_again_gets_its_metrics(tmp_path):
    checkpoints = make(tmp_path, [0.1, None])
    checkpoints.save(2, state_of(2), {"step": 2, "again": True}, {"ndcg@10": 0.3})
    assert checkpoints.steps() == [1, 2] and checkpoints.best() == (2, 0.3)
    assert Checkpoints(tmp_path, 2, "ndcg@10", read_only=True).best() == (2, 0.3)
    checkpoints.save(3, state_of(3), {"step": 3}, {"ndcg@10": 0.2})
    checkpoints.save(4, state_of(4), {"step": 4}, {"ndcg@10": 0.2})
    assert checkpoints.steps() == [2, 3, 4]  # the best is kept because of the metrics that were added later
    assert checkpoints.progress(2) == {"step": 2, "again": True}
    assert_same(checkpoints.restore(2, abstract(state_of(0))), state_of(2))


@pytest.mark.parametrize("killed_at", ["metrics", "metadata"])
def test_killed_while_a_step_gets_its_metrics(tmp_path, monkeypatch, killed_at):
    checkpoints = make(tmp_path, [0.1, None])

    def killed(path, write):
        if path.name == killed_at:
            raise KeyboardInterrupt
        write_atomically(path, write)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_lib, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(2, state_of(2), {"step": 2, "validated": 2}, {"ndcg@10": 0.3})
    again = Checkpoints(tmp_path, 2, "ndcg@10")
    step, state, progress = again.load(abstract(state_of(0)))
    assert step == 2 and "validated" not in progress  # so that it is validated and saved again
    assert_same(state, state_of(2))
    again.save(2, state_of(2), {"step": 2, "validated": 2}, {"ndcg@10": 0.3})
    assert again.best() == (2, 0.3) and again.progress(2)["validated"] == 2


def test_a_state_is_saved_as_it_was_though_its_buffers_are_donated(tmp_path):
    state = {"params": {"table_IE": jnp.zeros((700, 700))}, "optimizer": jnp.zeros((700, 700))}
    add = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    checkpoints, shapes = Checkpoints(tmp_path, 9, "ndcg@10"), abstract(state)
    for step in range(1, 5):
        before, state = state, add(state)
        assert before["optimizer"].is_deleted()
        checkpoints.save(step, state, {}, None)
        for _ in range(10):
            state = add(state)
        state = jax.tree.map(lambda x: x - 10, state)
    checkpoints.wait()
    for step in range(1, 5):
        for x in jax.tree.leaves(checkpoints.restore(step, shapes)):
            assert (x == step).all()


def test_an_interrupted_save_leaves_no_checkpoint(tmp_path, monkeypatch, capsys):
    checkpoints = make(tmp_path, [0.1, 0.2])

    async def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", killed)
        checkpoints.save(3, state_of(3), {"step": 3}, {"ndcg@10": 0.9})
        with pytest.raises(KeyboardInterrupt):
            checkpoints.wait()
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert len(left) == 3 and left[:2] == ["1", "2"] and left[2].startswith("3.")

    reader = Checkpoints(tmp_path, 2, "ndcg@10", read_only=True)
    assert reader.steps() == [1, 2] and reader.resolve("best") == 2
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
    assert not capsys.readouterr().out
    again = Checkpoints(tmp_path, 2, "ndcg@10")
    assert "a save was interrupted, its unfinished checkpoint of step 3 is removed\n" in capsys.readouterr().out
    again.save(3, state_of(3), {"step": 3}, {"ndcg@10": 0.9})
    again.wait()
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


# ---- damaged checkpoints


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def files_of(folder):
    """One file of every kind that belongs to a step, by kind. Other files are copies that nothing reads."""
    found = {"metrics": folder / "metrics" / "metrics", "metadata": folder / "progress" / "metadata"}
    for item in ("params", "rest"):
        for name in ("_METADATA", "_sharding", "manifest.ocdbt"):
            found[f"{item} {name}"] = folder / item / name
        found[f"{item} array metadata"] = folder / item / "array_metadatas" / "process_0"
        (found[f"{item} index"],) = (folder / item / "d").iterdir()
        found[f"{item} arrays"] = max((folder / item / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().st_size)
    return found


def test_a_damaged_step_is_reported_and_the_previous_one_is_used(tmp_path, capsys):
    """For any truncated or missing file of the newest step, no wrong value is read, and the previous step is used."""

    def state_of(step):  # large enough to be in separate files
        draw = jax.random.split(jax.random.key(step))
        tables = [jax.random.normal(key, (500, 4)) for key in draw]
        return {"params": {"table_IE": tables[0], "scale": jnp.float32(step)}, "cache": tables[1]}

    checkpoints = Checkpoints(tmp_path / "whole", 2, "ndcg@10")
    for step in (1, 2):
        checkpoints.save(step, state_of(step), {"step": step}, {"ndcg@10": step / 10})
    checkpoints.close()
    shapes = abstract(state_of(0))
    kinds = files_of(tmp_path / "whole" / "checkpoints" / "2")
    missing = [kind for kind in kinds if kind in ("metrics", "metadata") or kind.endswith(("_METADATA", "arrays"))]
    for kind, damage in [*((kind, cut) for kind in kinds), *((kind, lambda path: path.unlink()) for kind in missing)]:
        workdir = tmp_path / "parts"
        shutil.copytree(tmp_path / "whole", workdir)
        damage(files_of(workdir / "checkpoints" / "2")[kind])
        step, params = Checkpoints(workdir, 2, "ndcg@10", read_only=True).load_params("best", shapes["params"])
        assert_same(params, state_of(step)["params"])
        assert not any(path.name.endswith(".damaged") for path in (workdir / "checkpoints").iterdir())
        capsys.readouterr()
        writer = Checkpoints(workdir, 2, "ndcg@10")
        step, state, progress = writer.load(shapes)
        assert_same(state, state_of(step))
        assert progress == {"step": step}
        captured = capsys.readouterr()
        assert captured.err == ""
        if kind == "metrics" and damage is not cut:  # as for a step without a validation
            assert (step, captured.out, writer.best()) == (2, "", (1, 0.1))
        else:
            (line,) = captured.out.splitlines()
            assert line.startswith(f"{workdir}/checkpoints/2 is damaged (") and line.endswith("); using step 1"), kind
            assert step == 1 and writer.steps() == [1] and writer.best() == (1, 0.1)
        if kind == "params index":
            writer.save(2, state_of(2), {"step": 2}, {"ndcg@10": 0.2})
            writer.close()
            assert Checkpoints(workdir, 2, "ndcg@10", read_only=True).best() == (2, 0.2)
        shutil.rmtree(workdir)


def test_a_requested_step_is_not_replaced_by_another(tmp_path):
    make(tmp_path, [0.1, 0.2, 0.15], keep=3)
    shapes = abstract(state_of(0)["params"])
    cut(tmp_path / "checkpoints" / "2" / "params" / "manifest.ocdbt")
    reader = Checkpoints(tmp_path, 2, "ndcg@10", read_only=True)
    with pytest.raises(DamagedError, match=r"checkpoints/2 is damaged \(params: "):
        reader.restore_params(2, shapes)
    assert reader.load_params("best", shapes)[0] == 3  # the next best
    with pytest.raises(InputError, match=r"checkpoints/2 is damaged"):
        reader.load_params("2", shapes)


def test_if_no_step_can_be_read_nothing_is_used_or_moved(tmp_path):
    make(tmp_path, [0.1, 0.2])
    for step in ("1", "2"):
        cut(tmp_path / "checkpoints" / step / "progress" / "metadata")
    for _ in range(2):
        with pytest.raises(InputError, match=r"no checkpoint can be read: .*/2 is damaged \(progress/metadata: .*/1 is damaged \("):
            Checkpoints(tmp_path, 2, "ndcg@10").load(abstract(state_of(0)))
    (tmp_path / "checkpoints" / "1").rename(tmp_path / "checkpoints" / "1.damaged")
    (tmp_path / "checkpoints" / "2").rename(tmp_path / "checkpoints" / "2.damaged")
    with pytest.raises(InputError, match=r"all checkpoints are damaged; they were set aside as '1\.damaged', '2\.damaged'"):
        Checkpoints(tmp_path, 2, "ndcg@10").load(abstract(state_of(0)))
    assert Checkpoints(tmp_path / "new", 2, "ndcg@10").load(abstract(state_of(0))) is None


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    for read_only in (False, True):
        with pytest.raises(InputError, match=r"checkpoints is not a folder"):
            Checkpoints(tmp_path, 2, "ndcg@10", read_only=read_only)
    (tmp_path / "checkpoints").unlink()
    make(tmp_path, [0.1])
    metrics = tmp_path / "checkpoints" / "1" / "metrics" / "metrics"
    metrics.write_text(json.dumps([1]))
    with pytest.raises(InputError, match=r"no checkpoint can be read: .*/1 is damaged \(metrics/metrics: "):
        Checkpoints(tmp_path, 2, "ndcg@10", read_only=True).resolve("best")

"""An interrupted run equals an uninterrupted one bitwise, and keeps the best and the last good checkpoints."""

import dataclasses
import itertools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_config, tiny_data
from helpers import metrics_lines as lines

from iam_jax.config import default_config, resolve
from iam_jax.data.prepare import prepare
from iam_jax.devices.signals import Signals, Stop
from iam_jax.errors import InputError, NonFiniteError
from iam_jax.model.parameters import name_of
from iam_jax.ranking.evaluate import Evaluator
from iam_jax.runs.checkpoint import Checkpoints
from iam_jax.training import loop as train_lib
from iam_jax.training import objectives
from iam_jax.training.loop import train
from iam_jax.training.optimizer import learning_rate
from iam_jax.training.run import make_run
from iam_jax.training.step import init_state, make_train_step

OBJECTIVES = {
    "full": {"objective.token": 0.1, "model.schedule": "full"},  # one layer: it compiles faster
    "sampled": {"objective.vectors": "both"},
    "cached": {"objective.vectors": "text", "objective.softmax": "cached", "objective.refresh_steps": 2},
}
BATCHES = train_lib.training_batches


def once(function):
    """Caches `function` of a run for all runs that compile to the same program."""
    results = {}

    def wrapped(run):
        key = (run.config.model, run.config.objective, run.config.optimizer, run.config.train.seed, run.config.eval)
        if key not in results:
            results[key] = function(run)
        return results[key]

    return wrapped


EVALUATOR = once(lambda run: Evaluator(run.model, run.config, run.prepared, run.mesh))
INITIAL, STEP = once(init_state), once(make_train_step)


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    monkeypatch.setattr(train_lib, "make_train_step", STEP)
    monkeypatch.setattr(train_lib, "init_state", lambda run: jax.tree.map(jnp.copy, INITIAL(run)))  # a step donates its buffers


@pytest.fixture(scope="module")
def make(tiny):
    def make(**changes):
        config = default_config()
        config.update_from_flattened_dict(tiny | {name.replace("__", "."): value for name, value in changes.items()})
        resolved = resolve(config)
        return make_run(resolved, prepare(resolved.data))

    return make


class Counted:
    """training_batches that counts batches, and requests a stop during a chosen step."""

    def __init__(self, signals, stop):
        self.signals, self.stop, self.drawn = signals, stop, []

    def __call__(self, rows, batch_rows, seed, start, *rest):
        for number, batch in enumerate(BATCHES(rows, batch_rows, seed, start, *rest)):
            self.drawn.append(start + number)
            self.signals.requested |= self.stop == start + number + 1
            yield batch


def go(monkeypatch, run, workdir, stop=None, evaluator=None):
    """Trains until the end, or until step `stop`; returns the batches drawn."""
    signals = Signals()
    signals.requested = stop == 0
    batches = Counted(signals, stop)
    monkeypatch.setattr(train_lib, "training_batches", batches)
    with jax.set_mesh(run.mesh):
        evaluator = evaluator or EVALUATOR(run)
        if stop is None:
            train(run, workdir, evaluator, signals)
        else:
            with pytest.raises(Stop):
                train(run, workdir, evaluator, signals)
    return batches.drawn


def saved(run, workdir, step):
    """The whole state and the progress of a checkpoint, without minutes."""
    with jax.set_mesh(run.mesh):
        checkpoints = Checkpoints(workdir, 2, "ndcg@10", read_only=True)
        state = checkpoints.restore(step, INITIAL(run))
    return state, {name: value for name, value in checkpoints.progress(step).items() if name != "minutes"}


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path), strict=True)


def differ(left, right):
    return any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


# ---- interrupted and resumed


@pytest.mark.parametrize("name", OBJECTIVES)
def test_interruptions_change_nothing(make, monkeypatch, tmp_path, name):
    run = make(**OBJECTIVES[name])
    assert run.config.softmax == name and run.config.model.dropout > 0
    assert go(monkeypatch, run, tmp_path / "whole") == list(range(6))
    whole, parts = saved(run, tmp_path / "whole", 6), tmp_path / "parts"

    # before the first step, between two steps, when a validation and a refresh of the cache are due, at the end
    for stop, drawn in ((0, []), (3, [0, 1, 2]), (4, [3]), (6, [4, 5])):
        assert go(monkeypatch, run, parts, stop) == drawn
        state, progress = saved(run, parts, stop)
        assert progress["next_batch"] == progress["step"] == stop
        assert progress["validated"] == (4 if stop == 6 else -1)
        assert differ(state["params"], whole[0]["params"]) == (stop < 6)
        if name == "cached":
            assert jax.numpy.any(state["cache"] != 0) == (stop > 0)
    assert go(monkeypatch, run, parts) == []  # only the last validation remained
    state, progress = saved(run, parts, 6)
    assert_same(state, whole[0])
    assert progress == whole[1] and progress["window"] == {}
    assert lines(parts) == lines(tmp_path / "whole")
    assert [line["step"] for line in lines(parts)] == [2, 4, 4, 6, 6]


def test_a_killed_run_continues_from_its_newest_checkpoint(make, monkeypatch, tmp_path):
    run = make(**OBJECTIVES["full"], train__save_every=2, train__keep=1, log__every=1)
    go(monkeypatch, run, tmp_path / "whole")

    class Killed(Exception):
        pass

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:  # in the validation at step 4, before its checkpoint
        patch.setattr(Evaluator, "rank", killed)
        with pytest.raises(Killed):
            go(patch, run, tmp_path / "parts")
    assert [line["step"] for line in lines(tmp_path / "parts")] == [1, 2, 3, 4]
    assert go(monkeypatch, run, tmp_path / "parts") == [2, 3, 4, 5]
    assert_same(saved(run, tmp_path / "parts", 6), saved(run, tmp_path / "whole", 6))
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_more_steps_continue_a_run_and_a_finished_run_does_nothing(make, monkeypatch, tmp_path):
    long, short = make(**OBJECTIVES["full"], train__steps=9), make(**OBJECTIVES["full"])
    go(monkeypatch, long, tmp_path / "whole")
    go(monkeypatch, short, tmp_path / "parts")
    before = lines(tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(train_lib, "make_train_step", None)
        assert go(patch, short, tmp_path / "parts") == []
    assert lines(tmp_path / "parts") == before
    assert go(monkeypatch, long, tmp_path / "parts") == [6, 7, 8]
    assert_same(saved(long, tmp_path / "parts", 9)[0], saved(long, tmp_path / "whole", 9)[0])


# ---- losses


def test_the_loss_falls(make, monkeypatch, tmp_path):
    run = make(**OBJECTIVES["full"], train__steps=80, train__eval_every=80, log__every=20, model__dropout=0.0)
    go(monkeypatch, run, tmp_path)
    train_lines = [line for line in lines(tmp_path) if "item_loss" in line]
    assert [line["step"] for line in train_lines] == [20, 40, 60, 80]
    assert train_lines[-1]["item_loss"] < train_lines[0]["item_loss"] - 0.5
    assert train_lines[-1]["token_loss"] < train_lines[0]["token_loss"] - 0.5
    assert train_lines[-1]["epoch"] == 80 * 4 / len(run.rows)
    progress = saved(run, tmp_path, 80)[1]
    batches = list(itertools.islice(BATCHES(run.rows, 4, run.config.train.seed), 80))
    assert progress["tokens"] == sum(int((batch["user"] > 0).sum()) for batch in batches)
    assert train_lines[-1]["tokens_seen"] == progress["tokens"]


def test_micro_batches_add_up_to_the_batch(make):
    batch = next(BATCHES(make().rows, 4, 0))
    results = {}
    for parts in (1, 2):
        run = make(**OBJECTIVES["full"], optimizer__accumulate=parts, model__dropout=0.0, optimizer__epsilon=1e-2)
        with jax.set_mesh(run.mesh):
            results[parts] = make_train_step(run)(init_state(run), batch, run.items, np.int32(0))
    counts = (batch["target"] >= 0).reshape(2, -1).sum(1)
    assert counts[0] != counts[1]  # so that the mean over micro-batches of their means would be wrong
    state, metrics = results[1]
    assert metrics["item_count"] == counts.sum() and metrics["token_count"] == (batch["label"] >= 0).sum()
    (mu,) = [s.mu for s in jax.tree.leaves(state["optimizer"], is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
    assert all(jnp.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(mu))
    for tree, other in zip(results[2], results[1], strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), tree, other)


# ---- kept steps, and the end of training


class Scripted:
    """An evaluator that gives every target the next rank of a list."""

    def __init__(self, ranks):
        self.ranks = iter(ranks)

    def rank(self, params, targets, poll, label):
        return np.full(len(targets), next(self.ranks)), np.zeros(len(targets), int)

    def losses(self, params, targets, poll, label):
        return {}


def scripted(make, monkeypatch, workdir, ranks, **changes):
    run = make(**OBJECTIVES["full"], train__steps=len(ranks), train__eval_every=1, log__every=1000, **changes)
    drawn = go(monkeypatch, run, workdir, evaluator=Scripted(ranks))
    return run, drawn, Checkpoints(workdir, run.config.train.keep, run.config.eval.metric, read_only=True)


def test_the_best_step_outlives_newer_ones(make, monkeypatch, tmp_path, capsys):
    run, _, checkpoints = scripted(make, monkeypatch, tmp_path, [5, 1, 3, 1, 9, 7], train__keep=2)
    assert checkpoints.steps() == [2, 5, 6]
    assert checkpoints.resolve("best") == 2 and checkpoints.resolve("last") == 6
    progress = saved(run, tmp_path, 6)[1]
    assert (progress["best"], progress["best_step"], progress["since_best"], progress["stopped"]) == (1.0, 2, 4, "")
    printed = [line.split(": ")[0] for line in capsys.readouterr().out.splitlines() if "(best)" in line]
    assert printed == ["step 1", "step 2"]


def test_patience(make, monkeypatch, tmp_path, capsys):
    changes = {"train__patience": 2, "train__keep": 1}
    run, drawn, checkpoints = scripted(make, monkeypatch, tmp_path, [5, 3, 3, 4, 1, 1], **changes)
    assert drawn == [0, 1, 2, 3] and checkpoints.steps() == [2, 4]
    assert "training ended at step 4: no better ndcg@10 in 2 validations" in capsys.readouterr().out
    assert go(monkeypatch, run, tmp_path) == []  # the same command does not continue


def test_another_metric_compares_with_its_own_best(make, monkeypatch, tmp_path):
    scripted(make, monkeypatch, tmp_path, [9, 8])  # hr@10 is 1 and ndcg@10 below 0.5
    run, drawn, checkpoints = scripted(make, monkeypatch, tmp_path, [9, 8, 8, 20], eval__metric="hr@10")
    assert drawn == [2, 3] and saved(run, tmp_path, 4)[1]["best"] == 1.0
    assert checkpoints.resolve("best") == 1  # the first of equal values


def test_time_ends_training_after_a_validation(make, monkeypatch, tmp_path):
    now, shard_batch = [0.0], train_lib.shard_batch
    monkeypatch.setattr(train_lib, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(*args):
        now[0] += 60
        return shard_batch(*args)

    monkeypatch.setattr(train_lib, "shard_batch", slow)

    def for_minutes(minutes):
        run = make(**OBJECTIVES["full"], train__steps=8, train__eval_every=2, train__max_minutes=minutes)
        drawn = go(monkeypatch, run, tmp_path, evaluator=Scripted([6, 5, 4, 3]))
        return drawn, saved(run, tmp_path, Checkpoints(tmp_path, 2, "ndcg@10").steps()[-1])[1]

    drawn, progress = for_minutes(2.5)  # a step takes a minute
    assert drawn == [0, 1, 2] and progress["stopped"] == "train.max_minutes = 2.5" and progress["validated"] == 3
    assert for_minutes(2.5)[0] == []
    drawn, progress = for_minutes(4.5)
    assert drawn == [3, 4] and progress["step"] == progress["validated"] == 5
    drawn, progress = for_minutes(0.0)
    assert drawn == [5, 6, 7] and progress["stopped"] == ""


def test_without_validation_targets_the_last_step_is_the_best(make, monkeypatch, tmp_path):
    monkeypatch.setattr(train_lib, "validation_subset", lambda *_: np.zeros(0, np.int64))
    run, _, checkpoints = scripted(make, monkeypatch, tmp_path, [1, 1, 1])
    assert checkpoints.steps() == [3] and checkpoints.resolve("best") == 3
    assert go(monkeypatch, run, tmp_path) == []


# ---- non-finite values


def with_nan_loss(value, model):
    return value * jnp.nan


def with_nan_gradient(value, model):
    return value + jnp.sqrt(0 * jnp.square(model.state_DE[...]).sum())  # zero, with the derivative inf * 0


def poisoned(patch, poison, when=lambda batch: jnp.bool_(True)):
    """Makes training steps whose losses are not finite for batches for which `when` is true."""
    real = objectives.losses

    def losses(model, config, items, batch, *rest):
        sums = real(model, config, items, batch, *rest)
        return sums | {"item": jax.lax.cond(when(batch), lambda: poison(sums["item"], model), lambda: sums["item"])}

    patch.setattr(objectives, "losses", losses)
    patch.setattr(train_lib, "make_train_step", once(make_train_step))


def is_batch(run, number):
    wanted = next(BATCHES(run.rows, run.config.train.batch_rows, run.config.train.seed, number))["target"]
    return lambda batch: (batch["target"] == wanted).all()


def users_of(run, number):
    segment = next(BATCHES(run.rows, run.config.train.batch_rows, run.config.train.seed, number))["segment"]
    events = run.prepared.events
    first = {int(run.rows.segments.start[k]) for k in segment[segment >= 0]}
    return [str(user) for k, user in enumerate(events.user_ids) if first & set(range(events.offsets[k], events.offsets[k + 1]))]


def test_the_state_is_strongly_typed(make):
    """A weakly typed leaf, such as a norm scale made from a Python number, would have the second step compiled anew."""
    assert [name_of(path) for path, x in jax.tree_util.tree_leaves_with_path(INITIAL(make(**OBJECTIVES["full"]))) if x.weak_type] == []


@pytest.mark.parametrize(("poison", "named"), [(with_nan_loss, "item_sum"), (with_nan_gradient, "gradient_norm")])
def test_a_step_that_is_not_finite_leaves_the_state_bitwise_as_it_was(make, poison, named):
    run = make(**OBJECTIVES["full"])
    with jax.set_mesh(run.mesh), pytest.MonkeyPatch.context() as patch:
        poisoned(patch, poison, is_batch(run, 1))
        step, state, before, batches = make_train_step(run), INITIAL(run), None, BATCHES(run.rows, 4, run.config.train.seed)
        state, norms = jax.tree.map(jnp.copy, state), []
        for number in range(3):
            before = jax.tree.map(np.asarray, state)
            state, metrics = step(state, next(batches), run.items, np.int32(number), {})
            norms.append(float(metrics[named]))
            assert differ(state, before) == (number != 1)
            follows = learning_rate(run.config.optimizer)([0, 1, 1][number])  # counts updates, not steps
            assert float(metrics["learning_rate"]) == pytest.approx(float(follows), rel=1e-6)
        assert np.isnan(norms[1]) and np.isfinite(norms[0]) and np.isfinite(norms[2])


def test_skipped_steps_are_counted_and_named_and_resumed_bitwise(make, monkeypatch, tmp_path, capsys):
    changes = OBJECTIVES["cached"] | {"train__steps": 8, "train__save_every": 3, "log__every": 2}
    run, limited = make(**changes, train__skip_limit=2), make(**changes, train__skip_limit=1)
    bad = is_batch(run, 2), is_batch(run, 3)
    with monkeypatch.context() as patch:
        poisoned(patch, with_nan_loss, lambda batch: bad[0](batch) | bad[1](batch))
        assert go(patch, run, tmp_path / "whole") == list(range(8))
        printed = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
        assert len(printed) == 2
        for number, count, line in ((2, 1, printed[0]), (3, 2, printed[1])):
            users = users_of(run, number)
            assert line.startswith(f"step {number + 1}: ") and f"item_sum not finite: skipped, {count} of at most 2; users" in line
            assert line.endswith(f"batch: {', '.join(map(repr, users[:3]))} and {len(users) - 3} more")
        for stop in (3, 4, 6):  # between the two, after them, later
            go(patch, run, tmp_path / "parts", stop=stop)
        go(patch, run, tmp_path / "parts")
        with pytest.raises(NonFiniteError) as caught:
            go(patch, limited, tmp_path / "limited")
    whole = saved(run, tmp_path / "whole", 8)
    assert whole[1]["skipped"] == 2 and whole[1]["next_batch"] == 8
    assert_same(saved(run, tmp_path / "parts", 8), whole)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    training = {line["step"]: line for line in lines(tmp_path / "whole") if "learning_rate" in line}
    assert {step: line["skipped"] for step, line in training.items()} == {2: 0, 4: 2, 6: 2, 8: 2}
    assert "item_loss" not in training[4] and all(np.isfinite(value) for line in training.values() for value in line.values())

    assert "step 4: " in str(caught.value) and ", after 1 skipped steps (train.skip_limit); " in str(caught.value)
    assert repr(users_of(run, 3)[0]) in str(caught.value)
    assert Checkpoints(tmp_path / "limited", 2, "ndcg@10", read_only=True).steps() == [3]
    assert go(monkeypatch, run, tmp_path / "limited") == [3, 4, 5, 6, 7]  # after the cause was removed
    assert saved(run, tmp_path / "limited", 8)[1]["skipped"] == 1


@pytest.mark.parametrize(("poison", "named"), [(with_nan_loss, "item_sum"), (with_nan_gradient, "gradient_norm")])
def test_training_stops_on_non_finite_losses(make, monkeypatch, tmp_path, poison, named):
    run = make(**OBJECTIVES["full"], train__steps=8, train__skip_limit=0)
    go(monkeypatch, run, tmp_path / "whole")
    go(monkeypatch, run, tmp_path / "parts", stop=5)
    users = re.escape(repr(users_of(run, 5)[0]))
    last_good = saved(run, tmp_path / "parts", 5)
    with monkeypatch.context() as patch:
        poisoned(patch, poison)
        with pytest.raises(NonFiniteError, match=f"step 6: .*{named}.* not finite; the last good checkpoint is step 5; users .*{users}"):
            go(patch, run, tmp_path / "parts")
        with pytest.raises(NonFiniteError, match=r"step 1: .* there is no checkpoint yet"):
            go(patch, run, tmp_path / "fresh")
    assert Checkpoints(tmp_path / "parts", 2, "ndcg@10", read_only=True).steps() == [4, 5]
    assert_same(saved(run, tmp_path / "parts", 5), last_good)
    go(monkeypatch, run, tmp_path / "parts")
    assert_same(saved(run, tmp_path / "parts", 8), saved(run, tmp_path / "whole", 8))


def test_nothing_to_train_on(make):
    run = make()
    events = run.prepared.events
    alone = dataclasses.replace(events, label=np.where(np.isin(np.arange(len(events.item)), events.offsets), 0, 2).astype(np.uint8))
    with pytest.raises(InputError, match="no user has two training events"):
        make_run(run.config, dataclasses.replace(run.prepared, split=dataclasses.replace(run.prepared.split, events=alone)))


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_kernels_of_another_platform_are_refused(name):
    """They would be interpreted, so a run from another machine would be very slow here."""
    with pytest.raises(InputError, match=rf"^config\.model\.attention = '{name}': these kernels would only be interpreted .* cpu; "):
        make_run(make_config(model={"attention": name}), tiny_data())

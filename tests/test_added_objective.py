"""Adding an objective takes one object."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_config, metrics_lines, random_params, stack, tiny_data, tiny_rows

from iam_jax.data.batches import training_batches
from iam_jax.devices.signals import Signals
from iam_jax.errors import InputError
from iam_jax.model import make_model
from iam_jax.training.loop import train
from iam_jax.training.objectives import (
    OBJECTIVES,
    Objective,
    counts,
    losses,
    make_training_items,
    register,
    unregister,
    weights,
)
from iam_jax.training.run import make_run
from iam_jax.training.step import init_state


def mean_square(network, config, items, batch, states, keys, shared):
    return jnp.square(states.x_BTD).mean(-1).sum()


@pytest.fixture
def size():
    """An objective without a field in the config: the mean square of the states, with a constant weight."""
    refused = []

    def check(config):
        if refused:
            raise InputError(refused[0])

    count = lambda batch: jnp.int32(batch["token"].size)  # noqa: E731
    yield register(Objective("size", "mean square of the states", mean_square, count, weight=lambda config: 0.5, check=check)), refused
    unregister("size")


class Unranked:
    """An evaluator without a model."""

    def rank(self, params, targets, poll, label):
        return np.ones(len(targets), int), np.zeros(len(targets), int)

    def losses(self, params, targets, poll, label):
        return {}


def test_an_objective_is_added_by_one_object(size, tmp_path):
    """It is trained with, logged, counted over micro-batches, and its gradient is the one of weight * loss / count."""
    config = make_config(
        model={"schedule": "inter", "mlp": "plain"},
        objective={"token": 0.5},
        optimizer={"accumulate": 2, "warmup_steps": 0},
        train={"steps": 2, "batch_rows": 2, "seed": 1},
        log={"every": 1, "progress": False, "tensorboard": False},
        eval={"resamples": 1},
    )
    assert weights(config) == {"item": 1.0, "token": 0.5, "size": 0.5}
    run = make_run(config, tiny_data(users=14, items=9))
    batch = next(training_batches(run.rows, 2, 1, finish=run.finish))
    with jax.set_mesh(run.mesh):
        params = init_state(run)["params"]
        train(run, tmp_path, Unranked(), Signals())
    lines = [line for line in metrics_lines(tmp_path) if "size_loss" in line]
    assert len(lines) == 2 and int(counts(batch)["size"]) == 48

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def expected(params, weight):
        network, count = run.model.bind(params), counts(batch)
        own = jnp.square(network.states(batch)).mean()
        sums = losses(network, config, run.items, batch, None, None)
        return sums["item"] / count["item"] + 0.5 * sums["token"] / count["token"] + weight * own, (own, sums["size"] / 48)

    norms = []
    for weight in (0.5, 0.0):
        (_, means), gradient = expected(params, weight)
        norms.append(np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(gradient))))
        np.testing.assert_allclose(means, lines[0]["size_loss"], rtol=1e-5)
    assert lines[0]["gradient_norm"] == pytest.approx(norms[0], rel=1e-4) != pytest.approx(norms[1], rel=1e-3)


def test_an_objective_may_refuse_a_config(size):
    size[1].append("config.model.width: too small for this objective")
    with pytest.raises(InputError, match="too small for this objective"):
        make_run(make_config(), tiny_data())


def test_objectives_of_the_package_cannot_be_replaced():
    for objective in (OBJECTIVES["item"], dataclasses.replace(OBJECTIVES["token"], weight=lambda config: 1.0)):
        with pytest.raises(ValueError, match=rf"^the objective '{objective.name}' belongs to iam_jax: choose another name$"):
            register(objective)


def test_every_objective_draws_from_keys_of_its_own(monkeypatch):
    """The keys of `item` are the second and third of a split in three: results of earlier versions stay."""
    config, prepared, seen = make_config(), tiny_data(), {}

    def spy(name):
        def loss(network, config, items, batch, states, keys, shared):
            seen[name] = keys
            return jnp.float32(0)

        return Objective(name, "", loss, lambda batch: 1, weight=lambda config: 1.0)

    monkeypatch.setattr(OBJECTIVES, "_entries", {name: spy(name) for name in ("item", "token", "third", "fourth")})
    model = make_model(config, prepared.catalogue.vocabulary, prepared.catalogue.items)
    rows = tiny_rows(prepared, config)
    items = make_training_items(prepared.catalogue, prepared.events, rows.segments, config)
    batch, params = stack([rows[0]]), random_params(model)

    @jax.jit
    def drawn(key):
        losses(model.bind(params), config, items, batch, key, None)
        return [jax.random.key_data(one) for keys in seen.values() for one in keys], jax.random.key_data(jax.random.split(key, 3))

    own, split = map(np.asarray, drawn(jax.random.key(3)))
    np.testing.assert_array_equal(own[:2], split[1:])
    assert len(own) == 8 and len(np.unique(np.concatenate([own, split[:1]]), axis=0)) == 9
    jax.eval_shape(lambda: losses(model.bind(params), config, items, batch, None, None))
    assert len(seen) == 4 and all(one is None for keys in seen.values() for one in keys)

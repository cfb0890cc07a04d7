import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import make_config

from iam_jax.config import OptimizerConfig
from iam_jax.model import make_model
from iam_jax.training.optimizer import decayed, learning_rate, make_optimizer


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # warm-up 0, 1/4, 2/4, … of the peak; then (1 + cos(pi k / 8)) / 2 from peak to floor, k steps after the warm-up
        (
            {"warmup_steps": 4, "decay_steps": 12, "final_scale": 0.0},
            {0: 0, 1: 0.5, 3: 1.5, 4: 2, 6: 1 + math.cos(math.pi / 4), 8: 1, 12: 0, 99: 0},
        ),
        ({"warmup_steps": 4, "decay_steps": 12, "final_scale": 0.1}, {4: 2, 8: 1.1, 12: 0.2, 13: 0.2, 10**6: 0.2}),
        ({"warmup_steps": 0, "decay_steps": 10, "final_scale": 0.5}, {0: 2, 5: 1.5, 10: 1, 11: 1}),
        ({"warmup_steps": 5, "decay_steps": 0}, {0: 0, 1: 0.4, 5: 2, 6: 2, 10**6: 2}),
        ({"warmup_steps": 0, "decay_steps": 0}, {0: 2, 1: 2, 10**6: 2}),
    ],
)
def test_learning_rate_by_hand(fields, expected):
    schedule = learning_rate(OptimizerConfig(learning_rate=2.0, **fields))
    assert {step: float(schedule(step)) for step in expected} == pytest.approx(expected, abs=1e-6)
    assert float(jax.jit(schedule)(jnp.int32(4))) == pytest.approx(float(schedule(4)))  # as in a training step


def names_of(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_parameters_with_weight_decay():
    """Matrices, also stacked ones, have weight decay. Biases and norm scales have none, although stacks of them have two or three axes."""
    config = make_config(
        model={
            "schedule": "(intra inter)*2 full",
            "norm": "layer",
            "positions": "learned",
            "qkv_bias": True,
            "out_bias": True,
            "mlp_bias": True,
            "qk_norm": True,
            "tie_tokens": False,
        },
        objective={"vectors": "both", "token": 1.0},
    )
    shapes = make_model(config, vocabulary=9, items=5).shapes()
    decays = names_of(decayed(shapes))
    assert set(decays) == set(names_of(shapes))
    matrices = {"query_DNH", "key_DKH", "value_DKH", "out_NHD", "up_DF", "gate_DF", "down_FD"}
    matrices |= {"embedding_VD", "position_PD", "state_DE", "table_IE", "text_DE", "output_VD"}
    others = {"query_NH", "key_KH", "value_KH", "out_D", "up_F", "gate_F", "down_D", "scale", "shift"}
    by_kind = {kind: {name.split("/")[-1] for name, decay in decays.items() if decay is kind} for kind in (True, False)}
    assert by_kind == {True: matrices, False: others}
    stacked = names_of(shapes)["decoder/blocks/0_0/attention/query_NH"]
    assert stacked.shape == (2, 2, 8) and not decays["decoder/blocks/0_0/attention/query_NH"]


PARAMS = {"up_DF": jnp.full((2, 3), 2.0), "up_F": jnp.full(3, 2.0)}


def first_step(grads, **fields):
    config = OptimizerConfig(**{"learning_rate": 0.5, "warmup_steps": 0, "decay_steps": 0, "weight_decay": 0.0, "clip_norm": 0.0, **fields})
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    return optax.apply_updates(PARAMS, updates)


def test_weight_decay_is_decoupled_and_spares_biases():
    stepped = first_step(jax.tree.map(jnp.zeros_like, PARAMS), weight_decay=0.1)
    np.testing.assert_allclose(stepped["up_DF"], 2 - 0.5 * 0.1 * 2, rtol=1e-6)
    np.testing.assert_array_equal(stepped["up_F"], PARAMS["up_F"])


def test_tables_and_content_have_a_weight_decay_of_their_own():
    """Each parameter's update with a gradient of zero is its own decay; without the two fields all have that of weight_decay."""
    config = make_config(
        data={"vectors": "tfidf"},
        model={"schedule": "intra | inter", "item_width": 8, "item_input": "own"},
        objective={"vectors": "both"},
    )
    shapes = make_model(config, vocabulary=9, items=5, vector_size=3).shapes()
    params = jax.tree.map(lambda x: jnp.full(x.shape, 2.0), shapes)
    fields = {"learning_rate": 0.5, "warmup_steps": 0, "decay_steps": 0, "clip_norm": 0.0, "weight_decay": 0.1}
    tables, content = {"table_IE", "identity_IE"}, {"text_DE", "content_DE", "input_vector_PE", "output_vector_PE"}
    assert (tables | content) < {name.split("/")[-1] for name in names_of(shapes)}
    for own, rest in (({}, 0.1), ({"table_decay": 0.4}, 0.1), ({"table_decay": 0.0, "content_decay": 0.8}, 0.1)):
        optimizer = make_optimizer(OptimizerConfig(**fields, **own))
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
        for name, update in names_of(updates).items():
            last = name.split("/")[-1]
            decay = own.get("table_decay", rest) if last in tables else own.get("content_decay", rest) if last in content else rest
            matrix = names_of(decayed(shapes))[name]
            np.testing.assert_allclose(update, -0.5 * decay * 2 * matrix, rtol=1e-6, err_msg=name)


def test_adam_by_hand():
    """The first step is g / (|g| + epsilon), since both moments are corrected for their start at 0."""
    grads = {"up_DF": jnp.full((2, 3), -3.0), "up_F": jnp.array([1.0, 4.0, 0.0])}
    stepped = first_step(grads, epsilon=1.0)
    np.testing.assert_allclose(stepped["up_DF"], 2 + 0.5 * 3 / 4, rtol=1e-6)
    np.testing.assert_allclose(stepped["up_F"], 2 - 0.5 * np.array([1 / 2, 4 / 5, 0]), rtol=1e-6)


def test_clipping_by_the_global_norm():
    """The norm over both parameters is 5 and clipped to 1, a fifth of each gradient. A large epsilon makes Adam's step linear."""
    grads = {"up_DF": jnp.zeros((2, 3)).at[0, 0].set(3.0), "up_F": jnp.array([0.0, 4.0, 0.0])}

    def moved(**fields):
        stepped = first_step(grads, epsilon=1e6, learning_rate=1e6, **fields)
        return float(2 - stepped["up_DF"][0, 0]), float(2 - stepped["up_F"][1])

    assert moved(clip_norm=0.0) == pytest.approx((3.0, 4.0), rel=1e-4)
    assert moved(clip_norm=1.0) == pytest.approx((0.6, 0.8), rel=1e-4)
    assert moved(clip_norm=6.0) == pytest.approx((3.0, 4.0), rel=1e-4)  # unchanged below the bound

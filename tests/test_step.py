"""The training step: micro-batches do not change what is minimised."""

import functools

import jax
import numpy as np
import pytest
from helpers import make_config, random_params, stack, tiny_data

from iam_jax.config import default_config, resolve
from iam_jax.data.item_rows import DistinctItems
from iam_jax.data.prepare import prepare
from iam_jax.data.tfidf import token_svd
from iam_jax.training.run import make_run
from iam_jax.training.step import init_state, make_train_step

CASES = {
    "sampled table": ("off", {"vectors": "table", "softmax": "sampled", "negatives": 6}),
    "sampled text, items once": ("on", {"vectors": "text", "softmax": "sampled", "negatives": 6}),
    "sampled text after all layers, items once": ("on", {"vectors": "both", "softmax": "sampled", "negatives": 6, "text_layers": "all"}),
    "sampled both": ("off", {"vectors": "both", "softmax": "sampled", "negatives": 6, "token": 0.5}),
    "cached both": ("off", {"vectors": "both", "softmax": "cached", "negatives": 3}),
    "cached text, items once": ("on", {"vectors": "text", "softmax": "cached", "negatives": 3}),
    "full both, items once": ("on", {"vectors": "both", "softmax": "full", "token": 0.5}),
}


@functools.cache
def run_of(name, accumulate, batch_rows=8):
    item_states, objective = CASES[name]
    config = make_config(
        model={"schedule": "intra inter", "mlp": "plain", "item_states": item_states},
        objective=objective,
        optimizer={"accumulate": accumulate, "clip_norm": 0.0, "warmup_steps": 0},
        train={"batch_rows": batch_rows},
    )
    return make_run(config, tiny_data(users=40, items=14, cold=2))


def step_of(name, accumulate):
    """(gradient, metrics) of a step."""
    run = run_of(name, accumulate)
    assert isinstance(run.finish, DistinctItems) == (CASES[name][0] == "on")
    batch = run.finish(stack([run.rows[row] for row in range(8)]))
    with jax.set_mesh(run.mesh):
        state = init_state(run)
        state["params"] = random_params(run.model)
        if "cache" in state:
            state["cache"] = jax.random.normal(jax.random.key(1), state["cache"].shape)
        state, metrics = make_train_step(run)(state, batch, run.items, np.int32(3))
    (mu,) = [s.mu for s in jax.tree.leaves(state["optimizer"], is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
    return jax.tree.map(lambda x: np.asarray(x) / (1 - run.config.optimizer.b1), mu), {name: float(x) for name, x in metrics.items()}


@pytest.mark.parametrize("name", CASES)
def test_gradients_do_not_depend_on_accumulate(name):
    """An earlier version took the in-batch negatives from each micro-batch and drew negatives for each."""
    whole, metrics = step_of(name, 1)
    assert metrics["gradient_norm"] > 0.01
    for parts in (2, 8):
        accumulated, of_parts = step_of(name, parts)
        assert of_parts == pytest.approx(metrics, rel=1e-5)
        for (path, expected), got in zip(jax.tree_util.tree_leaves_with_path(whole), jax.tree.leaves(accumulated), strict=True):
            difference = np.linalg.norm(got - expected)
            assert difference <= 1e-5 * np.linalg.norm(expected) + 1e-7 * metrics["gradient_norm"], (jax.tree_util.keystr(path), parts)


@pytest.mark.parametrize("start", ["random", "svd", "svd_frozen"])
def test_token_embeddings_from_the_catalogue(tiny, start):
    config = default_config()
    config.update_from_flattened_dict(tiny | {"model.token_embeddings": start, "objective.token": 0.5, "optimizer.weight_decay": 0.1})
    config = resolve(config)
    run = make_run(config, prepare(config.data))
    assert run.config.model.tie_tokens  # the next-token objective reads the embeddings, too
    batch = run.finish(stack([run.rows[row] for row in range(4)]))
    with jax.set_mesh(run.mesh):
        state = init_state(run)
        before = np.array(state["params"]["decoder"]["embedding_VD"])
        state, metrics = make_train_step(run)(state, batch, run.items, np.int32(0))
    expected = token_svd(run.prepared.catalogue, config.model.width, config.train.seed)
    assert np.array_equal(before, expected) == (start != "random")
    moved = np.asarray(state["params"]["decoder"]["embedding_VD"]) != before
    assert moved.any() == (start != "svd_frozen")
    assert metrics["gradient_norm"] > 0.01

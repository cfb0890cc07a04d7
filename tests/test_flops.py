import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_config, packed_batch, tiny_data

from iam_jax.devices.chips import find_chip, utilisation
from iam_jax.model import softmax
from iam_jax.training import objectives
from iam_jax.training.flops import attention_flops, matmul_flops, step_flops, traced, visible_pairs
from iam_jax.training.run import make_run

D, F, M = 16, 24, 8  # width, feed-forward, items of tiny_data
LAYER = 4 * D * D + 3 * D * F  # multiplications per token: queries, keys, values, output; a gated MLP


def flops_of(f, *shapes, dtype=jnp.float32):
    return matmul_flops(traced(f, *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)))


def test_products_by_kind():
    assert flops_of(lambda a, b: a @ b, (3, 5), (5, 7)) == {"float32": 2 * 3 * 5 * 7}
    assert flops_of(lambda a, b: a @ b, (3, 5), (5, 7), dtype=jnp.bfloat16) == {"bfloat16": 2 * 3 * 5 * 7}
    exact = flops_of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b, precision="highest"), (4, 3, 5), (4, 5, 7))
    assert exact == {"float32 highest": 4 * 2 * 3 * 5 * 7}
    assert flops_of(lambda a: jnp.sin(a).sum(), (3, 5)) == {}


def test_loops_and_conditions():
    one = 2 * 5 * 5

    def scanned(a, x):
        return jax.lax.scan(lambda x, _: (a @ x, None), x, length=6)[0]

    def either(a, x):
        return jax.lax.cond(x[0] > 0, lambda: a @ (a @ x), lambda: a @ x)

    assert flops_of(scanned, (5, 5), (5,)) == {"float32": 6 * one}
    assert flops_of(either, (5, 5), (5,)) == {"float32": 2 * one}
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((5, 5), (5,))]
    assert matmul_flops(traced(either, *shapes), taken=0.25) == {"float32": 0.5 * one}
    assert flops_of(jax.grad(lambda a, x: jax.checkpoint(scanned)(a, x).sum(), 1), (5, 5), (5,)) == {"float32": 6 * one}
    with pytest.raises(ValueError, match="loop of unknown length"):
        flops_of(lambda a, x: jax.lax.while_loop(lambda x: x[0] > 0, lambda x: a @ x, x), (5, 5), (5,))


def test_xla_counts_a_loop_once():
    """The reason for our own count."""

    def scanned(x, a_L):
        return jax.lax.scan(lambda x, a: (a @ x, None), x, a_L)[0]

    def analysed(length):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 64), (length, 64, 64))]
        return jax.jit(scanned).lower(*shapes).compile().cost_analysis()["flops"]

    assert analysed(16) < 1.01 * analysed(8)
    assert flops_of(scanned, (64, 64), (16, 64, 64)) == {"float32": 16 * 2 * 64**3}


def test_visible_pairs():
    """Rows of users (2: 2, 3; 1, 2) and (3, 1, 2; 1: 2), prompts before the colon."""
    triangles = {"intra": [3 + 3 + 6 + 1 + 3, 6 + 1 + 3 + 1 + 3], "full": [28 + 6, 21 + 6]}
    inter = [2 * 2 + 3 * 4 + 2 * 1, 1 * 3 + 2 * 4 + 2 * 1]
    both = [4 + 4 + 9 + 1 + 4, 9 + 1 + 4 + 1 + 4]
    expected = {"full": sum(triangles["full"]) / 2, "intra": sum(triangles["intra"]) / 2, "inter": sum(inter) / 2}
    assert visible_pairs(packed_batch()) == expected | {"intra_both": sum(both) / 2}
    assert visible_pairs(packed_batch(), self_key=True)["inter"] == sum(inter) / 2 + (10 + 9) / 2
    model = {"heads": 2, "head_size": 6, "dtype": "bfloat16"}
    counted = attention_flops(make_config(model=model).model, expected, ("intra", "inter", "inter"), forward=2, backward=True)
    assert counted == {"bfloat16": 4 * 2 * 6 * (2 + 2.5) * (expected["intra"] + 2 * expected["inter"])}


def run_of(batch_rows=4, accumulate=1, **sections):
    objective = {"softmax": "full"} | sections.pop("objective", {})
    model = {"item_states": "off"} | sections.pop("model", {})
    optimizer, train = {"accumulate": accumulate}, {"batch_rows": batch_rows}
    return make_run(make_config(optimizer=optimizer, train=train, objective=objective, model=model, **sections), tiny_data())


@pytest.fixture(scope="module")
def run():
    return run_of()


@pytest.fixture(scope="module")
def counted(run):
    return step_flops(run)


def test_a_step_by_hand(run, counted, monkeypatch):
    """(intra inter)*2, an item table, full softmax."""
    tokens, targets = 4 * 24, 4 * run.rows.targets_per_row
    products = 4 * tokens * LAYER + targets * (D * D + M * D)
    # The backward pass takes twice as much. The gradient of this small table is computed with the loss.
    assert counted.model["float32"] == counted.hardware["float32"] == 3 * 2 * products
    monkeypatch.setattr(softmax, "_ONE_PASS", 0)  # as for a large one: the chunk of logits is recomputed
    assert step_flops(run).hardware["float32"] == 3 * 2 * products + 2 * targets * M * D
    rows = [run.rows[row] for row in range(len(run.rows))]
    pairs = visible_pairs({name: np.stack([rows[row % len(rows)][name] for row in range(max(4, len(rows)))]) for name in rows[0]})
    attention = 4 * 2 * (pairs["intra"] + pairs["inter"]) * 4 * D * (1 + 2.5)
    assert counted.model["float32 highest"] == counted.hardware["float32 highest"] == pytest.approx(attention)


def test_settings_without_effect_on_flops(counted):
    assert step_flops(run_of(model={"scan": False})) == counted
    assert step_flops(run_of(accumulate=2)) == counted
    assert step_flops(run_of(model={"attention": "reference"})) == counted
    assert step_flops(run_of(batch_rows=8)).model["float32"] == 2 * counted.model["float32"]


def test_recomputed_layers(counted):
    again = step_flops(run_of(model={"remat": True}))
    assert again.model == counted.model
    # The last product of a layer is not recomputed, because only the sum follows it.
    tokens = 4 * 24
    assert again.hardware["float32"] - counted.hardware["float32"] == 2 * 4 * tokens * (LAYER - F * D)
    assert again.hardware["float32 highest"] / counted.hardware["float32 highest"] == pytest.approx(4.5 / 3.5)


def test_text_vectors_and_distinct_items(monkeypatch):
    """Item texts are counted if they are computed, and distinct items are counted instead of their occurrences."""
    objective = {"vectors": "text", "softmax": "sampled", "negatives": 32}
    run = run_of(objective=objective)
    occurrences = step_flops(run)
    longest, drawn = 4, 32  # tokens of a text, including its boundary
    targets = 4 * run.rows.targets_per_row
    of_texts = (targets + drawn) * (longest * LAYER + D * D) + targets * D * (targets + drawn)
    assert occurrences.model["float32"] == 3 * 2 * (4 * 4 * 24 * LAYER + targets * D * D + of_texts)

    accumulated = step_flops(run_of(accumulate=2, objective=objective))  # texts are computed once per step, and again for the gradient
    assert accumulated.model == occurrences.model and accumulated.hardware["float32"] > occurrences.hardware["float32"]

    run = run_of(objective=objective, model={"item_states": "on"})
    distinct = step_flops(run)
    assert step_flops(run_of(accumulate=2, objective=objective, model={"item_states": "on"})).model == distinct.model
    batch = run.finish({name: np.stack([run.rows[row % len(run.rows)][name] for row in range(4)]) for name in run.rows[0]})
    chunks = batch["leading"]["user"].reshape(8, -1)
    slots = (chunks > 0).any(1).sum() * chunks.shape[1]
    assert 0 < slots < chunks.size
    of_texts = drawn * (longest * LAYER + D * D) + targets * D * D + targets * D * (targets + drawn)
    expected = 3 * 2 * ((3 * 4 * 24 + slots) * LAYER + targets * D * D + of_texts)
    assert distinct.model["float32"] == pytest.approx(expected)
    # On a CPU the backward pass computes the items' layers again, elsewhere it does not.
    monkeypatch.setattr(objectives, "current_platform", lambda: "tpu")
    once, pairs = step_flops(run), visible_pairs(batch["leading"])["intra"] * len(batch["leading"]["user"])
    assert once.model == distinct.model and once.hardware["float32"] < distinct.hardware["float32"]
    assert distinct.hardware["float32 highest"] - once.hardware["float32 highest"] == pytest.approx(4 * D * pairs)


def test_utilisation(counted):
    chip = find_chip("TPU v5 lite")
    busy = {"bfloat16": 197e12, "float32 highest": 197e12 / 6}
    assert utilisation(busy, chip, devices=4, seconds=1.0) == pytest.approx(0.5)
    assert 0 < utilisation(counted.model, chip, 1, 1.0) < 1e-6


@pytest.mark.parametrize(
    ("kind", "name", "gib"),
    [
        ("TPU v4", "TPU v4", 32),
        ("TPU v5 lite", "TPU v5e", 16),
        ("TPU v5", "TPU v5p", 95),
        ("TPU v5p", "TPU v5p", 95),
        ("TPU v6 lite", "TPU v6e", 32),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100 40GB", 40),
        ("NVIDIA A100 80GB PCIe", "NVIDIA A100 80GB", 80),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM", 80),
        ("NVIDIA H200", "NVIDIA H200", 140),
    ],
)
def test_chips_by_device_kind(kind, name, gib):
    chip = find_chip(kind)
    assert (chip.name, chip.hbm_bytes) == (name, gib * 2**30)
    assert chip.flops["bfloat16"] >= chip.flops["float32"] > chip.flops["float32 highest"] > 1e13
    assert all(math.isfinite(x) and x > 0 for x in dataclasses.astuple(chip)[3:5])


def test_unknown_chips():
    assert find_chip("cpu") is None and find_chip("NVIDIA H100 PCIe") is None

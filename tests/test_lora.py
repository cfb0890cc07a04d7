"""Adapters compared with NumPy, merged and unmerged; inserted layers have no effect at the start."""

import dataclasses
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import optimized_jit
from pretrained_models import MODELS, complete, config_of, flat, load, model_of, nested, tokens, write_model

from iam_jax.config import LoraConfig
from iam_jax.errors import InputError
from iam_jax.model import lora, pretrained
from iam_jax.model.lora import merge, unmerge

RANK = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "llama3", MODELS["llama3"])


def configured(folder, **lora):
    return pretrained.configure(config_of(folder, lora=LoraConfig(**{"rank": RANK, "alpha": 6.0} | lora)))


def batch_of(token):
    """A batch with one user and items of five tokens."""
    t = np.arange(token.shape[1], dtype=np.int32)[None]
    return {"token": token, "user": np.ones_like(t), "group": 1 + t // 5, "position": t}


@cache
def start_of(config, seed=0):
    """Parameters at the start. Their type does not depend on that of the states. Drawn one by one, since configs share their shapes: each
    would have a program of its own."""
    if config.model.dtype != "float32":
        return start_of(dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32")), seed)
    return model_of(config).init(jax.random.key(seed))


@cache
def logits_of(config):
    model = model_of(config)
    return jax.jit(lambda p: model.bind(p).states(batch_of(tokens())) @ model.bind(p).output_embedding()[0].T)


def logits(config, params):
    """The logits for all parameters, or for the given ones completed with random ones."""
    return np.asarray(logits_of(config)(nested(flat(complete(config, {})) | flat(params))))


@pytest.mark.parametrize(("inputs", "outputs"), [((16,), (2, 8)), ((2, 8), (16,)), ((16,), (24,))])
def test_products_on_a_cpu_are_those_elsewhere(monkeypatch, inputs, outputs):
    """Value and both gradients, in which only the order of a sum may differ."""
    x, w, g = (
        jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate(((3, 5, *inputs), (*inputs, *outputs), (3, 5, *outputs)))
    )

    def results(platform: str):
        monkeypatch.setattr(lora, "current_platform", lambda: platform)
        y, pullback = jax.vjp(lambda x, w: lora._product(x, w, len(inputs)), x, w)
        return y, *pullback(g)

    for here, there in zip(results("cpu"), results("tpu"), strict=True):
        assert here.shape == there.shape
        np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-5)


def test_an_adapter_adds_a_product_of_two_matrices(folder):
    """Values and gradients of every linear map equal those with the adapter's product added to the matrix."""
    config = configured(folder)
    params = complete(config, load(config))
    block = {name: x[0] for name, x in flat(params["decoder"]["blocks"]["0_0"]).items()}
    by_hand = {name: np.asarray(x, np.float64) for name, x in block.items() if "_lora_" not in name}
    for name, axes in (
        ("attention.query", ("D", "NH")), ("attention.key", ("D", "KH")), ("attention.value", ("D", "KH")),
        ("attention.out", ("NH", "D")), ("mlp.up", ("D", "F")), ("mlp.gate", ("D", "F")), ("mlp.down", ("F", "D")),
    ):  # fmt: skip
        inputs, outputs = axes
        down, up = (np.asarray(block[f"{name}_lora_{letters}"], np.float64) for letters in (f"{inputs}L", f"L{outputs}"))
        assert down.shape[-1] == up.shape[0] == RANK and down.any() and up.any()
        by_hand[f"{name}_{inputs}{outputs}"] += 6.0 / RANK * np.tensordot(down, up, axes=1)
    merged = {name: x[0] for name, x in flat(merge(params, config.model.lora)["decoder"]["blocks"]["0_0"]).items()}
    assert merged.keys() == by_hand.keys()
    for name, expected in by_hand.items():
        np.testing.assert_allclose(merged[name], expected, rtol=1e-5, atol=1e-6)

    model, batch = model_of(config), batch_of(tokens())
    direction = np.random.default_rng(0).standard_normal((1, tokens().shape[1], 32)).astype(np.float32)
    value = jax.jit(jax.value_and_grad(lambda params: (model.bind(params).states(batch) * direction).sum()))
    plain = model_of(pretrained.configure(config_of(folder)))
    twin = jax.jit(jax.value_and_grad(lambda p: (plain.bind(merge(p, config.model.lora)).states(batch) * direction).sum()))
    (got, gradient), (expected, expected_gradient) = value(params), twin(params)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert flat(gradient).keys() == flat(expected_gradient).keys()
    for name, x in flat(gradient).items():
        np.testing.assert_allclose(x, flat(expected_gradient)[name], rtol=1e-4, atol=1e-4, err_msg=name)
    assert all(np.abs(x).max() > 0 for name, x in flat(gradient).items() if "_lora_" in name)


@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_merged_equals_unmerged(folder, base):
    config, plain = configured(folder), pretrained.configure(config_of(folder))
    pretrained_params = load(config)
    params = complete(config, pretrained_params)
    params = nested({name: x.astype(base) if name in flat(pretrained_params) else x for name, x in flat(params).items()})
    merged = merge(params, config.model.lora)
    assert flat(merged).keys() == flat(model_of(plain).shapes()).keys()
    here, there = (logits(c, p) for c, p in ((config, params), (plain, merged)))
    alone = logits(plain, load(plain))
    assert np.abs(here - alone).max() > 0.1
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-5 * np.abs(alone).max())
    back = unmerge(merged, params, config.model.lora)
    for name, x in flat(params).items():
        np.testing.assert_allclose(flat(back)[name], x, rtol=0, atol=1e-6, err_msg=name)


def test_untouched_at_the_start_and_only_where_the_pattern_says(folder):
    config = configured(folder, targets=r"attention\.(query|value)|down")
    made = start_of(config)
    adapters = sorted(name for name in flat(made) if "_lora_" in name)
    assert [name.removeprefix("decoder.blocks.0_0.") for name in adapters] == [
        "attention.query_lora_DL", "attention.query_lora_LNH", "attention.value_lora_DL", "attention.value_lora_LKH",
        "mlp.down_lora_FL", "mlp.down_lora_LD",
    ]  # fmt: skip
    pretrained_params = load(config)
    start = {name: x for name, x in flat(made).items() if "_lora_" in name}
    plain = pretrained.configure(config_of(folder))
    np.testing.assert_array_equal(logits(config, _join(pretrained_params, start)), logits(plain, pretrained_params))
    with pytest.raises(InputError, match=r"^config\.model\.lora\.targets = 'quer_y' matches none of attention\.query_DNH, "):
        model_of(configured(folder, targets="quer_y"))


def _join(pretrained_params, other_params):
    return nested(flat(pretrained_params) | other_params)


def test_dropout_of_the_adapters_inputs(folder):
    config = configured(folder, dropout=0.5)
    model, params, batch = model_of(config), complete(config, load(config)), batch_of(tokens())
    states = jax.jit(lambda params, key: model.bind(params).states(batch, key))
    one, again, other = (states(params, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (np.asarray(one) != other).any()
    without = {name: x * (0 if "_lora_L" in name else 1) for name, x in flat(params).items()}
    np.testing.assert_array_equal(*(states(_join({}, without), jax.random.key(seed)) for seed in (0, 1)))  # nothing else has dropout
    plain = jax.jit(lambda params: model.bind(params).states(batch))
    np.testing.assert_array_equal(plain(params), plain(params))
    assert (np.asarray(plain(params)) != one).any()


@pytest.mark.parametrize("schedule", ["(full +intra +inter)*2", "+inter full*2 +intra", "full*2 (+intra +inter)*2"])
def test_inserted_layers_leave_the_logits_as_they_were(folder, schedule):
    """Bitwise at the start, but not with nonzero output projections."""
    plain, config = (pretrained.configure(config_of(folder, schedule)) for schedule in ("full*2", schedule))
    pretrained_params = load(config)
    start = flat(start_of(config, 1))
    inserted = {name: x for name, x in start.items() if name not in flat(pretrained_params)}
    expected = logits(plain, load(plain))
    np.testing.assert_array_equal(logits(config, _join(pretrained_params, inserted)), expected)
    ends = [name for name in inserted if name.endswith(("out_NHD", "down_FD"))]
    assert ends and not any(np.asarray(inserted[name]).any() for name in ends)
    assert all(np.asarray(x).any() for name, x in inserted.items() if name.endswith(("query_DNH", "up_DF")))
    for name in ends:
        changed = logits(config, _join(pretrained_params, inserted | {name: jnp.ones_like(inserted[name])}))
        assert np.abs(changed - expected).max() > 1e-3


@pytest.mark.parametrize("schedule", ["(full*2 +intra +inter)*2", "+inter full*4 +intra"])
def test_inserted_layers_leave_bfloat16_as_it_was(deeper, schedule):
    """Independently of what XLA fuses with the states between two layers."""
    np.testing.assert_array_equal(states_in_bfloat16(deeper, schedule), states_in_bfloat16(deeper, "full*4"))


@pytest.fixture(scope="module")
def deeper(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("deeper") / "model", MODELS["llama3"] | {"num_hidden_layers": 4})


@cache
def states_in_bfloat16(folder, schedule):
    config = pretrained.configure(config_of(folder, schedule, dtype="bfloat16"))
    model = model_of(config)
    params = _join(start_of(config, 1), flat(load(config)))
    return np.asarray(optimized_jit(lambda p: model.bind(p).states(batch_of(tokens())))(params))


@pytest.mark.parametrize(("kind", "away"), [("qwen2", 0), ("qwen3", 0), ("gpt2", 1e-5)])
def test_inserted_layers_of_other_families(tmp_path, kind, away):
    """The two programs of GPT-2 round differently, as two programs of equal schedules can."""
    layers = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    at, found = write_model(tmp_path / "model", MODELS[kind] | {layers: 4}), []
    for schedule in ("full*4", "(full*2 +intra +inter)*2"):
        config = pretrained.configure(config_of(at, schedule))
        model = model_of(config)
        params = _join(start_of(config, 1), flat(load(config)))
        found.append(np.asarray(optimized_jit(lambda p, model=model: model.bind(p).states(batch_of(tokens())))(params)))
    np.testing.assert_allclose(*found, rtol=0, atol=away)


STORIES = Path(__file__).parents[2] / "shared" / "data" / "tiny-llama-stories"


@pytest.mark.skipif(not STORIES.exists(), reason="the checkpoint tiny-llama-stories is not here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("schedule", ["(full*2 +intra +inter)*2 full", "(full +intra +inter)*5"])
def test_inserted_layers_leave_a_real_checkpoint_as_it_was(schedule, dtype):
    expected = stories("full*5", dtype)
    np.testing.assert_array_equal(stories(schedule, dtype), expected)
    assert np.isfinite(expected).all() and np.std(expected.astype(np.float32)) > 1


@cache
def stories(schedule, dtype):
    """Returns the logits of a text."""
    batch = batch_of(np.random.default_rng(0).integers(3, 105, (1, 200)).astype(np.int32))
    config = pretrained.configure(config_of(STORIES, schedule, row_tokens=256, dtype=dtype))
    model = model_of(config)
    params = _join(start_of(config), flat(load(config)))
    return np.asarray(optimized_jit(lambda p: model.bind(p).states(batch) @ model.bind(p).output_embedding()[0].T)(params))


def test_inserted_layers_have_no_adapters(folder):
    config = pretrained.configure(config_of(folder, "(full +intra)*2", lora=LoraConfig(rank=2)))
    names = [name for name in flat(model_of(config).shapes()) if "_lora_" in name]
    assert names and all(name.startswith("decoder.blocks.0_0.") for name in names)

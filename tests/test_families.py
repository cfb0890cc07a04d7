"""Model families as objects: one that is added here, Gemma-like, is imported and computes what its twin in NumPy computes."""

import dataclasses

import numpy as np
import pytest
from helpers import softmax
from pretrained_models import MODELS, TOKENS, config_of, configured, flat, load, logits, model_of, tokens, weights, write_model

from iam_jax.errors import InputError
from iam_jax.model import pretrained
from iam_jax.model.pretrained.families import register, unregister
from iam_jax.model.pretrained.families.llama import LAYER, TOP, llama_shape
from iam_jax.model.pretrained.family import Family
from iam_jax.schedule import parse_schedule

# Output and input embedding are one, embeddings are scaled, norms multiply by 1 + scale, and the MLP has the tanh approximation of GELU.
OURS = Family(
    name="test_gemma",
    shape=lambda settings: llama_shape(settings, activations={"gelu": "gelu"}) | {"tie_tokens": True},
    layers="num_hidden_layers",
    prefix="model.",
    top={name: source for name, source in TOP.items() if name != "output_VD"},
    layer=LAYER,
    scale_embedding=True,
    norm_offset=1.0,
)
LLAMA = MODELS["llama2"] | {"num_key_value_heads": 2, "head_dim": 6, "rope_theta": 100.0, "tie_word_embeddings": True}
VALUES = LLAMA | {"model_type": OURS.name, "hidden_act": "gelu"}


@pytest.fixture
def family():
    yield register(OURS)
    unregister(OURS.name)


@pytest.fixture
def folder(family, tmp_path):
    tensors = weights(LLAMA)
    norms = {name: x - 1 for name, x in tensors.items() if name.endswith("norm.weight")}  # around zero
    return write_model(tmp_path / "model", VALUES, tensors | norms)


def twin(tensors: dict[str, np.ndarray], offset=1.0, scaled=True) -> np.ndarray:
    """[T, V] logits after each of `tokens()`, straight from the folder's tensors."""
    x = {name.removeprefix("model."): np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    N, K, H = LLAMA["num_attention_heads"], LLAMA["num_key_value_heads"], LLAMA["head_dim"]

    def norm(h, name):
        return h / np.sqrt((h**2).mean(-1, keepdims=True) + LLAMA["rms_norm_eps"]) * (offset + x[f"{name}.weight"])

    def rotated(y_TNH):
        turn = np.exp(1j * np.arange(TOKENS)[:, None] * LLAMA["rope_theta"] ** (-np.arange(H // 2) / (H // 2)))[:, None]
        z = (y_TNH[..., : H // 2] + 1j * y_TNH[..., H // 2 :]) * turn
        return np.concatenate([z.real, z.imag], -1)

    h = x["embed_tokens.weight"][tokens()[0]] * (LLAMA["hidden_size"] ** 0.5 if scaled else 1)
    for n in range(LLAMA["num_hidden_layers"]):
        layer = {name.removeprefix(f"layers.{n}."): y for name, y in x.items() if name.startswith(f"layers.{n}.")}
        a = norm(h, f"layers.{n}.input_layernorm")
        q, k, v = ((a @ layer[f"self_attn.{name}_proj.weight"].T).reshape(TOKENS, -1, H) for name in "qkv")
        k, v = (np.repeat(y, N // K, axis=1) for y in (rotated(k), v))
        score = np.einsum("tnh,snh->nts", rotated(q), k) / H**0.5
        score = np.where(np.tri(TOKENS, dtype=bool), score, -np.inf)
        h = h + np.einsum("nts,snh->tnh", softmax(score), v).reshape(TOKENS, -1) @ layer["self_attn.o_proj.weight"].T
        a = norm(h, f"layers.{n}.post_attention_layernorm")
        gate = a @ layer["mlp.gate_proj.weight"].T
        gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        h = h + (gate * (a @ layer["mlp.up_proj.weight"].T)) @ layer["mlp.down_proj.weight"].T
    return norm(h, "norm") @ x["embed_tokens.weight"].T


def test_logits(folder):
    tensors = weights(LLAMA)
    tensors |= {name: x - 1 for name, x in tensors.items() if name.endswith("norm.weight")}
    config = configured(folder)
    assert (config.model.scale_embedding, config.model.norm_offset, config.model.activation) == (True, 1.0, "gelu")
    expected = twin(tensors)
    assert expected.std() > 0.2
    np.testing.assert_allclose(logits(config, load(config))[0], expected, rtol=0, atol=2e-4)
    for different in ({"offset": 0.0}, {"scaled": False}):  # the twin reads both
        assert np.abs(twin(tensors, **different) - expected).max() > 0.05


def test_the_usual_family_has_neither(folders):
    model = configured(folders["llama2"]).model
    assert not model.scale_embedding and model.norm_offset == 0


def test_every_parameter_is_given_and_what_is_inserted_begins_like_it(folder):
    config = configured(folder, schedule="(full +intra)*2")
    names = pretrained.names(config)
    own = {name for name in flat(model_of(config).shapes()) if name.startswith("decoder.") and "boundary" not in name}
    assert {name for name in own if ".0_1." not in name} == names.keys() and len(parse_schedule("(full +intra)*2").own_layers) == 2


def test_export_gives_the_folder_back(folder, tmp_path):
    config = configured(folder)
    pretrained.export(config, load(config), tmp_path / "exported")
    again = configured(tmp_path / "exported")
    assert dataclasses.replace(again.model, pretrained="") == dataclasses.replace(config.model, pretrained="")
    assert pretrained.fingerprint(again) == pretrained.fingerprint(config)
    for name, x in flat(load(config)).items():
        np.testing.assert_array_equal(flat(load(again))[name], x)


def test_fingerprints_stay_what_they_were(folders, family, folder):
    """Working folders hold them. Fields that came later count where they matter."""
    assert pretrained.fingerprint(configured(folders["llama2"])) == "987763b600dbffbb1ecae40136df9d13e0ce9e72e34886497d61c5c59387ebd1"
    first, config = pretrained.fingerprint(configured(folder)), configured(folder)
    register(dataclasses.replace(OURS, norm_offset=0.5))
    assert pretrained.fingerprint(config) != first


def test_what_a_family_must_say(folder):
    with pytest.raises(ValueError, match="the model family 'llama' belongs to iam_jax"):
        register(dataclasses.replace(OURS, name="llama"))
    layer = {name: source for name, source in LAYER.items() if name != "mlp.gate_DF"}
    register(dataclasses.replace(OURS, layer=layer))
    with pytest.raises(ValueError, match=r"model family 'test_gemma' has no tensor for 'mlp\.gate_DF'"):
        load(configured(folder))


def test_a_family_is_listed_while_it_is_there(family, tmp_path):
    configured(write_model(tmp_path / "ours", VALUES, weights(LLAMA)))
    with pytest.raises(InputError, match="hidden_act = 'gelu' is not supported; supported are silu, swish, gelu_new, gelu_pytorch_tanh"):
        configured(write_model(tmp_path / "llama", LLAMA | {"hidden_act": "gelu"}))
    folder = write_model(tmp_path / "other", MODELS["llama2"] | {"model_type": "other"})
    with pytest.raises(InputError, match="supported are gpt2, llama, mistral, qwen2, qwen3, test_gemma"):
        pretrained.configure(config_of(folder))

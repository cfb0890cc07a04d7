"""Comparison with transformers (extra `parity`). `python tests/test_parity.py --write` commits its logits for tests/test_pretrained.py."""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from pretrained_models import LOGITS, MODELS, complete, config_of, load, logits, tokens, write_model

from iam_jax.errors import InputError
from iam_jax.model import pretrained

torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `parity` is not installed")

CLASSES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gpt2": transformers.GPT2Config,
}


def their_logits(folder: Path) -> np.ndarray:
    """Logits [1, T, V] float32. Asserts that transformers uses every tensor of the folder and misses none."""
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens(), dtype=torch.int64)).logits.numpy()


def our_logits(folder: Path) -> np.ndarray:
    config = pretrained.configure(config_of(folder))
    return logits(config, load(config))


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_what_transformers_saves(tmp_path, name):
    """Random models in files written by transformers, two of them in shards."""
    torch.manual_seed(0)
    values = {key: value for key, value in MODELS[name].items() if key not in ("model_type", "torch_dtype", "dtype")}
    model = transformers.AutoModelForCausalLM.from_config(CLASSES[MODELS[name]["model_type"]](**values), dtype=torch.float32)
    for parameter in model.parameters():  # initially, biases are zero and logits are almost zero
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if name in ("llama3", "gpt2") else "5GB")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert (tmp_path / "model.safetensors.index.json").exists() == (name in ("llama3", "gpt2"))
    theirs = their_logits(tmp_path)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(our_logits(tmp_path), theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_committed_logits_are_those_of_transformers(tmp_path, name):
    theirs = their_logits(write_model(tmp_path, MODELS[name]))
    np.testing.assert_allclose(json.loads(LOGITS.read_text())[name], theirs[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_an_export(tmp_path, name):
    """After an export, the logits of transformers equal those of the first folder bitwise."""
    source = write_model(tmp_path / "in", MODELS[name])
    config = pretrained.configure(config_of(source))
    shards = 2 * 10**4 if name in ("qwen2", "gpt2-untied") else 5 * 10**9
    pretrained.export(config, complete(config, load(config)), tmp_path / "out", shards)
    np.testing.assert_array_equal(their_logits(tmp_path / "out"), their_logits(source))


@pytest.mark.parametrize("kind", CLASSES)
def test_defaults_are_those_of_the_classes(tmp_path, kind):
    """A config.json with only the sizes has the defaults of transformers."""
    least = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 32}
    if kind == "gpt2":
        least = {"vocab_size": 64, "n_embd": 128, "n_layer": 2, "n_head": 32}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} | least))
    model = pretrained.configure(config_of(tmp_path)).model
    theirs = CLASSES[kind].from_pretrained(tmp_path)
    assert model.width == theirs.hidden_size and model.heads == theirs.num_attention_heads
    assert model.tie_tokens == theirs.tie_word_embeddings
    if kind == "gpt2":
        assert (model.max_positions, model.mlp_width) == (theirs.n_positions, theirs.n_inner or 4 * theirs.n_embd)
        assert model.norm_epsilon == theirs.layer_norm_epsilon and theirs.activation_function == "gelu_new" and model.activation == "gelu"
        assert theirs.scale_attn_weights and not theirs.scale_attn_by_inverse_layer_idx and not theirs.add_cross_attention
        return
    assert model.kv_heads == theirs.num_key_value_heads and model.mlp_width == theirs.intermediate_size
    assert model.head_size == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert model.norm_epsilon == theirs.rms_norm_eps and model.activation == theirs.hidden_act == "silu"
    assert (model.rope_theta, "default") == (theirs.rope_parameters["rope_theta"], theirs.rope_parameters["rope_type"])
    assert model.rope_scaling == "none" and model.max_positions == 0
    assert model.out_bias == getattr(theirs, "attention_bias", False) and model.mlp_bias == getattr(theirs, "mlp_bias", False)
    # The effective window, measured with rows that are longer than it
    window = getattr(theirs, "sliding_window", None)
    long = dataclasses.replace(config_of(tmp_path), data=dataclasses.replace(config_of(tmp_path).data, row_tokens=10**6))
    if window is None:
        pretrained.configure(long)
    else:
        with pytest.raises(InputError, match=f"sliding_window = {window:,} would apply"):
            pretrained.configure(long)


def test_rope_without_original_positions_means_the_longest(tmp_path):
    """llama3 scaling without original_max_position_embeddings."""
    values = MODELS["llama3"] | {"rope_scaling": {key: x for key, x in MODELS["llama3"]["rope_scaling"].items() if "original" not in key}}
    folder = write_model(tmp_path, values | {"max_position_embeddings": 64})
    assert pretrained.configure(config_of(folder)).model.rope_original == 64
    np.testing.assert_allclose(our_logits(folder), their_logits(folder), rtol=0, atol=2e-4)


def write() -> None:
    """Writes the logits of every model with five decimals."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = {name: their_logits(write_model(Path(folder) / name, values))[0] for name, values in MODELS.items()}
    rows = {name: [[round(float(x), 5) for x in row] for row in x_TV] for name, x_TV in theirs.items()}
    LOGITS.parent.mkdir(exist_ok=True)
    text = ",\n".join(f'"{name}": [\n' + ",\n".join(json.dumps(row, separators=(",", ":")) for row in x) + "]" for name, x in rows.items())
    LOGITS.write_text("{\n" + text + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("python tests/test_parity.py --write")
    write()

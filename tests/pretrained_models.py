"""Tiny models of every family: their config.json, and weights from a formula that gives the same values on every machine.

`write_model` makes a Hugging Face folder without torch; `python tests/test_parity.py --write` runs transformers on these
folders and commits the logits.
"""

import json
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import random_params
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from iam_jax.config import Config, DataConfig, ModelConfig
from iam_jax.errors import InputError
from iam_jax.model import make_model, pretrained

LOGITS = Path(__file__).parent / "data" / "pretrained_logits.json"
VOCABULARY, TOKENS = 37, 16
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64, "rope_type": "llama3"}

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
_GPT2 = {"model_type": "gpt2", "vocab_size": VOCABULARY, "n_positions": 48, "n_embd": 32, "n_layer": 3, "n_head": 4}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "dtype": "float32"}

MODELS: dict[str, dict] = {
    "llama2": _SIZES | {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": False},
    "llama3": _SIZES
    | {"model_type": "llama", "head_dim": 16, "rope_theta": 500000.0, "rope_scaling": LLAMA3, "tie_word_embeddings": False},
    "llama3-tied": _SIZES
    | {
        "model_type": "llama",
        "rope_parameters": LLAMA3 | {"rope_theta": 1e4, "original_max_position_embeddings": 160},
        "tie_word_embeddings": True,
    },
    "llama-linear-biases": _SIZES
    | {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}, "attention_bias": True, "mlp_bias": True},
    "mistral": _SIZES | {"model_type": "mistral", "head_dim": 6, "sliding_window": 4096, "num_key_value_heads": 1},
    "mistral-tied": _SIZES | {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": True},
    "qwen2": _SIZES | {"model_type": "qwen2", "rope_theta": 1e6, "use_sliding_window": False, "sliding_window": 8},
    "qwen2-tied": _SIZES | {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen3": _SIZES | {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6, "attention_bias": True},
    "qwen3-tied": _SIZES | {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6, "tie_word_embeddings": True},
    "gpt2": _GPT2,
    "gpt2-untied": _GPT2 | {"n_inner": 40, "activation_function": "relu", "tie_word_embeddings": False},
}


def tensor_shapes(values: dict) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the model, written down independently of the program's name tables."""
    V, tied = values["vocab_size"], values.get("tie_word_embeddings", values["model_type"] == "gpt2")
    shapes: dict[str, tuple[int, ...]] = {}
    if values["model_type"] == "gpt2":
        D = values["n_embd"]
        F = values.get("n_inner") or 4 * D
        shapes |= {"transformer.wte.weight": (V, D), "transformer.wpe.weight": (values["n_positions"], D)}
        parts = {"ln_1": (D,), "ln_2": (D,), "attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, F), "mlp.c_proj": (F, D)}
        for n in range(values["n_layer"]):
            for part, shape in parts.items():
                shapes |= {f"transformer.h.{n}.{part}.weight": shape, f"transformer.h.{n}.{part}.bias": shape[-1:]}
        shapes |= {"transformer.ln_f.weight": (D,), "transformer.ln_f.bias": (D,)}
    else:
        kind, D, F, N, K = values["model_type"], *(values[name] for name in tuple(_SIZES)[1:3]), 4, values["num_key_value_heads"]
        H = values.get("head_dim", D // N)
        shapes["model.embed_tokens.weight"] = (V, D)
        linear = {"q": (N * H, D), "k": (K * H, D), "v": (K * H, D), "o": (D, N * H)}
        biases = {"qwen2": "qkv"}.get(kind, "qkvo" if values.get("attention_bias") else "")
        for n in range(values["num_hidden_layers"]):
            at = f"model.layers.{n}."
            shapes |= {f"{at}input_layernorm.weight": (D,), f"{at}post_attention_layernorm.weight": (D,)}
            shapes |= {f"{at}self_attn.{name}_proj.weight": shape for name, shape in linear.items()}
            shapes |= {f"{at}self_attn.{name}_proj.bias": linear[name][:1] for name in biases}
            if kind == "qwen3":
                shapes |= {f"{at}self_attn.q_norm.weight": (H,), f"{at}self_attn.k_norm.weight": (H,)}
            for name, shape in {"gate": (F, D), "up": (F, D), "down": (D, F)}.items():
                shapes[f"{at}mlp.{name}_proj.weight"] = shape
                if values.get("mlp_bias"):
                    shapes[f"{at}mlp.{name}_proj.bias"] = shape[:1]
        shapes["model.norm.weight"] = (D,)
    return shapes if tied else shapes | {"lm_head.weight": (V, values.get("hidden_size") or values["n_embd"])}


def uniform(name: str, size: int) -> np.ndarray:
    """Multiples of 2 ** -23 in [-1, 1), from integer arithmetic only: splitmix64 seeded by the name."""
    with np.errstate(over="ignore"):
        x = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x += np.uint64(zlib.crc32(name.encode())) << np.uint64(32)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return ((x >> np.uint64(40)).astype(np.float32) - 2**23) * np.float32(2**-23)


def weights(values: dict) -> dict[str, np.ndarray]:
    """float32 weights: scales near one; others near zero, up to a quarter in magnitude, embeddings up to a half."""
    made = {}
    for name, shape in tensor_shapes(values).items():
        x = uniform(name, int(np.prod(shape))).reshape(shape)
        # Powers of two, so that the products are exact.
        size = 0.25 if len(shape) == 1 or "head" in name or "layers" in name or ".h." in name else 0.5
        made[name] = np.float32(name.endswith(".weight") and len(shape) == 1) + np.float32(size) * x
    return made


def write_model(folder: Path, values: dict, tensors: dict | None = None, files: int = 1, dtype=np.float32) -> Path:
    """Writes config.json, tokenizer.json, and the tensors (default: from the formula) in this many files."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.astype(dtype) for name, x in (weights(values) if tensors is None else tensors).items()}
    (folder / "config.json").write_text(json.dumps(values))
    words = {f"t{k}": k for k in range(values["vocab_size"])}
    Tokenizer(models.WordLevel(words, unk_token="t0")).save(str(folder / "tokenizer.json"))
    names = list(tensors)
    weight_map = {name: f"model-{1 + k * files // len(names):05}-of-{files:05}.safetensors" for k, name in enumerate(names)}
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def tokens() -> np.ndarray:
    """[1, TOKENS] int32"""
    return (np.arange(TOKENS, dtype=np.int32)[None] ** 2 * 7 + 3) % VOCABULARY


# ---- the folder in our model


def config_of(folder: Path, schedule: str = "", row_tokens: int = 32, **model) -> Config:
    """The config as from a config file, before `configure`. The default schedule is ordinary attention in all layers."""
    if not schedule:
        values = json.loads((folder / "config.json").read_text())
        schedule = f"full*{values.get('num_hidden_layers', values.get('n_layer'))}"
    return Config(
        data=DataConfig(source="synthetic", tokenizer="pretrained", row_tokens=row_tokens),
        model=ModelConfig(pretrained=str(folder), schedule=schedule, dropout=0.0, **model),
    )


def nested(flat: dict) -> dict:
    """{"a.b": x} -> {"a": {"b": x}}"""
    tree: dict = {}
    for name, x in flat.items():
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = x
    return tree


def flat(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": x}} -> {"a.b": x}"""
    out = {}
    for name, x in tree.items():
        out |= flat(x, f"{prefix}{name}.") if isinstance(x, dict) else {prefix + name: x}
    return out


def configured(folder: Path, **options) -> Config:
    """The config after `configure`."""
    return pretrained.configure(config_of(folder, **options))


def refused(message: str, folder: Path, **options) -> None:
    """Asserts that importing `folder` fails with one line that begins with `message`."""
    with pytest.raises(InputError) as caught:
        load(configured(folder, **options))
    text = str(caught.value)
    assert "\n" not in text and text.startswith(message.format(folder=folder)), text


def load(config: Config) -> dict:
    """The pretrained parameters in float32 on the default device. config: after `configure`."""
    shapes, pretrained_names = flat(model_of(config).shapes()), pretrained.names(config)
    return pretrained.load(config, nested({name: shapes[name] for name in pretrained_names}))


def model_of(config: Config):
    return make_model(config, vocabulary=pretrained.vocabulary(config).size + 1, items=3)


def complete(config: Config, pretrained_params: dict) -> dict:
    """All parameters; those that are not in the folder are random."""
    return nested(flat(random_params(model_of(config))) | flat(pretrained_params))


def logits(config: Config, pretrained_params: dict, token: np.ndarray | None = None) -> np.ndarray:
    """[B, T, V] float32 after each token (default: `tokens()`)."""
    token = tokens() if token is None else token
    ones = np.ones_like(token)
    batch = {"token": token, "user": ones, "group": ones, "position": np.arange(token.shape[1], dtype=np.int32) * ones}
    bound = model_of(config).bind(complete(config, pretrained_params))
    return np.asarray(jax.jit(lambda batch: bound.states(batch) @ bound.output_embedding()[0].T)(batch))

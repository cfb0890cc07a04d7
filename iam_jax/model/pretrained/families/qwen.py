"""Qwen2 and 2.5 (biases of queries, keys and values), Qwen3 (norm of queries and keys). The names are LLaMA's."""

import dataclasses

from iam_jax.model.pretrained.families.llama import LAYER, LLAMA, llama_shape
from iam_jax.model.pretrained.folder import Settings
from iam_jax.model.pretrained.table import Source

LAYER3 = LAYER | {
    "attention.query_norm.scale": Source("model.layers.{n}.self_attn.q_norm.weight", "H"),
    "attention.key_norm.scale": Source("model.layers.{n}.self_attn.k_norm.weight", "H"),
}


def _qwen2(settings: Settings) -> dict:
    return llama_shape(settings, kv_heads=32, max_positions=32768) | {"qkv_bias": True}


def _qwen3(settings: Settings) -> dict:
    biases = settings.flag("attention_bias", False)
    shape = llama_shape(settings, kv_heads=32, head_size=128, max_positions=32768)
    return shape | {"qkv_bias": biases, "out_bias": biases, "qk_norm": True}


def _window(settings: Settings) -> int | None:
    """The window, if the layers from `max_window_layers` on (or those that `layer_types` names) have it."""
    if not settings.flag("use_sliding_window", False):
        return None
    types = settings.get("layer_types", list, [], null=[])
    layers, first = settings.size("num_hidden_layers"), settings.get("max_window_layers", int, 28)
    sliding = "sliding_attention" in types if types else first < layers
    return settings.size("sliding_window", 4096, null=None) if sliding else None


QWEN2 = dataclasses.replace(LLAMA, name="qwen2", shape=_qwen2, window=_window)
QWEN3 = dataclasses.replace(QWEN2, name="qwen3", shape=_qwen3, layer=LAYER3)

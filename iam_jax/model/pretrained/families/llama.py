"""LLaMA 2 and 3.x, and Mistral."""

import dataclasses

from iam_jax.model.pretrained.family import Family
from iam_jax.model.pretrained.folder import ACTIVATIONS, Settings
from iam_jax.model.pretrained.table import Source

TOP = {
    "decoder.embedding_VD": Source("model.embed_tokens.weight", "V D"),
    "decoder.final_norm.scale": Source("model.norm.weight", "D"),
    "output_VD": Source("lm_head.weight", "V D"),
}
LAYER = {
    "attention_norm.scale": Source("model.layers.{n}.input_layernorm.weight", "D"),
    "attention.query_DNH": Source("model.layers.{n}.self_attn.q_proj.weight", "NH D"),
    "attention.query_NH": Source("model.layers.{n}.self_attn.q_proj.bias", "NH"),
    "attention.key_DKH": Source("model.layers.{n}.self_attn.k_proj.weight", "KH D"),
    "attention.key_KH": Source("model.layers.{n}.self_attn.k_proj.bias", "KH"),
    "attention.value_DKH": Source("model.layers.{n}.self_attn.v_proj.weight", "KH D"),
    "attention.value_KH": Source("model.layers.{n}.self_attn.v_proj.bias", "KH"),
    "attention.out_NHD": Source("model.layers.{n}.self_attn.o_proj.weight", "D NH"),
    "attention.out_D": Source("model.layers.{n}.self_attn.o_proj.bias", "D"),
    "mlp_norm.scale": Source("model.layers.{n}.post_attention_layernorm.weight", "D"),
    "mlp.gate_DF": Source("model.layers.{n}.mlp.gate_proj.weight", "F D"),
    "mlp.gate_F": Source("model.layers.{n}.mlp.gate_proj.bias", "F"),
    "mlp.up_DF": Source("model.layers.{n}.mlp.up_proj.weight", "F D"),
    "mlp.up_F": Source("model.layers.{n}.mlp.up_proj.bias", "F"),
    "mlp.down_FD": Source("model.layers.{n}.mlp.down_proj.weight", "D F"),
    "mlp.down_D": Source("model.layers.{n}.mlp.down_proj.bias", "D"),
}
BUFFERS = r".*\.rotary_emb\.inv_freq"  # old files hold it


def llama_shape(
    settings: Settings,
    *,
    kv_heads: int | None = None,
    head_size: int | None = None,
    max_positions: int = 2048,
    activations: dict[str, str] = ACTIVATIONS,
) -> dict:
    """The fields of ModelConfig from settings with LLaMA's names. kv_heads, head_size, max_positions: the family's defaults of
    num_key_value_heads, head_dim (None: as many as heads, width / heads) and max_position_embeddings. activations: names that hidden_act
    may have, and ours."""
    heads, width = settings.size("num_attention_heads"), settings.size("hidden_size")
    size = settings.size("head_dim", head_size, null=head_size)
    if size is None and width % heads:
        settings.fail(f"num_attention_heads = {heads} does not divide hidden_size = {width}, and there is no head_dim")
    return {
        "width": width,
        "heads": heads,
        "kv_heads": settings.size("num_key_value_heads", kv_heads or heads, null=heads),
        "head_size": size or width // heads,
        "mlp": "gated",
        "mlp_width": settings.size("intermediate_size"),
        "activation": settings.activation("hidden_act", "silu", activations),
        "norm": "rms",
        "norm_epsilon": settings.number("rms_norm_eps", 1e-6),
        "positions": "rotary",
        "tie_tokens": settings.flag("tie_word_embeddings", False),
        **settings.rope(max_positions),
    }


def _llama(settings: Settings) -> dict:
    biases = settings.flag("attention_bias", False)
    return llama_shape(settings) | {"qkv_bias": biases, "out_bias": biases, "mlp_bias": settings.flag("mlp_bias", False)}


def _mistral(settings: Settings) -> dict:
    return llama_shape(settings, kv_heads=8, max_positions=4096 * 32)


def _mistral_window(settings: Settings) -> int | None:
    return settings.size("sliding_window", 4096, null=None)


LLAMA = Family(name="llama", shape=_llama, layers="num_hidden_layers", prefix="model.", top=TOP, layer=LAYER, buffers=BUFFERS)
MISTRAL = dataclasses.replace(LLAMA, name="mistral", shape=_mistral, window=_mistral_window)

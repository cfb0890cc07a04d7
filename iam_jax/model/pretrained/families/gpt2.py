"""GPT-2: learned positions, layer norms, biases everywhere. Its matrices are stored input first, queries, keys and values side by side."""

from iam_jax.model.pretrained.family import Family
from iam_jax.model.pretrained.folder import Settings
from iam_jax.model.pretrained.table import Source

TOP = {
    "decoder.embedding_VD": Source("transformer.wte.weight", "V D"),
    "decoder.position_PD": Source("transformer.wpe.weight", "P D"),
    "decoder.final_norm.scale": Source("transformer.ln_f.weight", "D"),
    "decoder.final_norm.shift": Source("transformer.ln_f.bias", "D"),
    "output_VD": Source("lm_head.weight", "V D"),
}
LAYER = {
    "attention_norm.scale": Source("transformer.h.{n}.ln_1.weight", "D"),
    "attention_norm.shift": Source("transformer.h.{n}.ln_1.bias", "D"),
    "attention.query_DNH": Source("transformer.h.{n}.attn.c_attn.weight", "D NH", 0, 3),
    "attention.key_DKH": Source("transformer.h.{n}.attn.c_attn.weight", "D KH", 1, 3),
    "attention.value_DKH": Source("transformer.h.{n}.attn.c_attn.weight", "D KH", 2, 3),
    "attention.query_NH": Source("transformer.h.{n}.attn.c_attn.bias", "NH", 0, 3),
    "attention.key_KH": Source("transformer.h.{n}.attn.c_attn.bias", "KH", 1, 3),
    "attention.value_KH": Source("transformer.h.{n}.attn.c_attn.bias", "KH", 2, 3),
    "attention.out_NHD": Source("transformer.h.{n}.attn.c_proj.weight", "NH D"),
    "attention.out_D": Source("transformer.h.{n}.attn.c_proj.bias", "D"),
    "mlp_norm.scale": Source("transformer.h.{n}.ln_2.weight", "D"),
    "mlp_norm.shift": Source("transformer.h.{n}.ln_2.bias", "D"),
    "mlp.up_DF": Source("transformer.h.{n}.mlp.c_fc.weight", "D F"),
    "mlp.up_F": Source("transformer.h.{n}.mlp.c_fc.bias", "F"),
    "mlp.down_FD": Source("transformer.h.{n}.mlp.c_proj.weight", "F D"),
    "mlp.down_D": Source("transformer.h.{n}.mlp.c_proj.bias", "D"),
}
BUFFERS = r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"  # the causal mask


def _shape(settings: Settings) -> dict:
    for key, usual in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("reorder_and_upcast_attn", False),
        ("add_cross_attention", False),
    ):
        if settings.flag(key, usual) != usual:
            settings.fail(f"{key} = {str(not usual).lower()} is not supported; supported is {str(usual).lower()}")
    heads, width = settings.size("n_head"), settings.size("n_embd")
    if width % heads:
        settings.fail(f"n_head = {heads} does not divide n_embd = {width}")
    return {
        "width": width,
        "heads": heads,
        "kv_heads": heads,
        "head_size": width // heads,
        "mlp": "plain",
        "mlp_width": settings.size("n_inner", 4 * width, null=4 * width),
        "activation": settings.activation("activation_function", "gelu_new"),
        "norm": "layer",
        "norm_epsilon": settings.number("layer_norm_epsilon", 1e-5),
        "positions": "learned",
        "max_positions": settings.size("n_positions", 1024),
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "tie_tokens": settings.flag("tie_word_embeddings", True),
    }


GPT2 = Family(name="gpt2", shape=_shape, layers="n_layer", prefix="transformer.", top=TOP, layer=LAYER, buffers=BUFFERS)

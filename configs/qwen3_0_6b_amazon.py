"""Qwen3 0.6B with item-aware blocks inside, on Amazon 2014 Toys and Games.

    python -m iam_jax.main --config=configs/qwen3_0_6b_amazon.py --config.model.pretrained=DIR
    python -m iam_jax.main --config=configs/qwen3_0_6b_amazon.py:full --config.model.pretrained=DIR

DIR is the model's Hugging Face folder (config.json, safetensors, tokenizer.json). The data are downloaded, or read from
--config.data.path. Two variants follow the colon: `lora` (the default) trains adapters, the inserted blocks and the item table, with the
model itself frozen in bfloat16; `full` trains everything. On a slice of 8 chips add --config.mesh.fsdp=8.

Cost: memory of a device, as libtpu's compiler plans a step of 8 rows of 1,024 tokens (`python benchmarks/pretrained_memory.py`,
2026-11-24, jax 0.12.0.1, libtpu 0.0.50.1; nothing was run). On each of 8 v5e chips (16 GiB): `lora` 1.1 GiB (0.13 trained, 0.14 frozen,
0.26 optimizer, 0.60 temporaries), `full` 2.7 GiB (0.38 trained, 0.76 optimizer, 1.52 temporaries).
Result: not trained here; the weights were not at hand.
"""

from iam_jax.config import finetuning_config


def get_config(variant: str = "lora"):
    config = finetuning_config(variant)
    config.data.source = "amazon"
    config.data.category = "2014/Toys_and_Games"
    config.data.k_core = 5
    config.data.untitled = "drop"
    config.data.text = "{title}"
    config.data.prompt = "A shopper bought, in this order:"
    config.model.pretrained = "Qwen3-0.6B"
    config.model.schedule = "(full*7 +intra +inter)*4"
    return config

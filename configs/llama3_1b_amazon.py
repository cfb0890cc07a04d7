"""LLaMA 3.2 1B with item-aware blocks inside, on Amazon 2014 Toys and Games.

    python -m iam_jax.main --config=configs/llama3_1b_amazon.py --config.model.pretrained=DIR
    python -m iam_jax.main --config=configs/llama3_1b_amazon.py:full --config.model.pretrained=DIR

DIR is the model's Hugging Face folder (config.json, safetensors, tokenizer.json). The data are downloaded, or read from
--config.data.path. Two variants follow the colon: `lora` (the default) trains adapters, the inserted blocks and the item table, with the
model itself frozen in bfloat16; `full` trains everything. On a slice of 8 chips add --config.mesh.fsdp=8.

Cost: memory of a device, as libtpu's compiler plans a step of 8 rows of 1,024 tokens (`python benchmarks/pretrained_memory.py`,
2026-11-24, jax 0.12.0.1, libtpu 0.0.50.1; nothing was run). On each of 8 v5e chips (16 GiB): `lora` 2.6 GiB (0.35 trained, 0.29 frozen,
0.70 optimizer, 1.28 temporaries), `full` 5.3 GiB (0.89 trained, 1.79 optimizer, 2.62 temporaries). On one v5p (95 GiB): `lora` 16.1 GiB,
`full` 39.9 GiB.
Result: not trained here; the weights are not public domain and were not at hand.
"""

from iam_jax.config import finetuning_config


def get_config(variant: str = "lora"):
    config = finetuning_config(variant)
    config.data.source = "amazon"
    config.data.category = "2014/Toys_and_Games"
    config.data.k_core = 5
    config.data.untitled = "drop"
    config.data.text = "{title}"
    config.data.prompt = "<|begin_of_text|>A shopper bought, in this order:"
    config.model.pretrained = "Llama-3.2-1B"
    return config

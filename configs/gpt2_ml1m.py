"""GPT-2 (124 million parameters) with item-aware blocks inside, on MovieLens 1M.

    python -m iam_jax.main --config=configs/gpt2_ml1m.py --config.model.pretrained=DIR
    python -m iam_jax.main --config=configs/gpt2_ml1m.py:full --config.model.pretrained=DIR

DIR is the model's Hugging Face folder (config.json, safetensors, tokenizer.json). The data are downloaded, or read from
--config.data.path. Two variants follow the colon: `lora` (the default) trains adapters, the inserted blocks and the item table, with the
model itself frozen in bfloat16; `full` trains everything. On a slice of 8 chips add --config.mesh.fsdp=8.

Cost: memory of a device, as libtpu's compiler plans a step of 8 rows of 1,024 tokens (`python benchmarks/pretrained_memory.py`,
2026-11-24, jax 0.12.0.1, libtpu 0.0.50.1; nothing was run). On each of 8 v5e chips (16 GiB): `lora` 0.4 GiB (0.04 trained, 0.03 frozen,
0.09 optimizer, 0.26 temporaries), `full` 0.7 GiB (0.09 trained, 0.19 optimizer, 0.39 temporaries).
Result: not trained here; the weights were not at hand.
"""

from iam_jax.config import finetuning_config


def get_config(variant: str = "lora"):
    config = finetuning_config(variant)
    config.data.source = "ml1m"
    config.data.k_core = 5
    config.data.text = "{title}"
    config.data.prompt = "<|endoftext|>A viewer watched these films, in this order:"
    config.data.item_tokens = 16
    config.model.pretrained = "gpt2"
    config.model.schedule = "(full*3 +intra +inter)*4"
    config.eval.validation_users = 2000
    return config

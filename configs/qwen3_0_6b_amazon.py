"""Qwen3 0.6B with item-aware blocks inside, on Amazon 2014 Toys and Games.

    python -m iam_jax.main --config=configs/qwen3_0_6b_amazon.py --config.model.pretrained=DIR
    python -m iam_jax.main --config=configs/qwen3_0_6b_amazon.py:full --config.model.pretrained=DIR

DIR is the model's Hugging Face folder (config.json, safetensors, tokenizer.json); the data are downloaded, or read from
--config.data.path=DIR. Behind the colon: `lora`, as without it, trains adapters, the inserted blocks and the item table, with the
model itself frozen in bfloat16; `full` trains everything. On a slice of 8 chips add --config.mesh.fsdp=8.

Cost: memory of a device, as libtpu's compiler plans a step of 8 rows of 1,024 tokens (`python benchmarks/pretrained_memory.py`,
2026-11-24, jax 0.12.0.1, libtpu 0.0.50.1; nothing was run). On each of 8 chips v5e (16 GiB): `lora` 1.1 GiB (0.13 trained, 0.14 frozen,
0.26 optimizer, 0.60 temporaries), `full` 2.7 GiB (0.38 trained, 0.76 optimizer, 1.52 temporaries).
Result: not trained here; the weights were not at hand.
"""

from iam_jax.config import default_config
from iam_jax.errors import InputError


def get_config(variant: str = "lora"):
    if variant not in ("lora", "full"):
        raise InputError(f"variant {variant!r}: must be lora or full")
    config = default_config()
    config.data.source = "amazon"
    config.data.category = "2014/Toys_and_Games"
    config.data.k_core = 5
    config.data.untitled = "drop"
    config.data.text = "{title}"
    config.data.tokenizer = "pretrained"
    config.data.prompt = "A shopper bought, in this order:"
    config.data.separator = "\n"
    config.data.item_tokens = 24
    config.data.row_tokens = 1024
    config.data.context_items = 10
    config.model.pretrained = "Qwen3-0.6B"
    config.model.schedule = "(full*7 +intra +inter)*4"
    config.model.dropout = 0.0
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.objective.vectors = "table"
    config.objective.token = 0.1
    config.objective.chunk = 1024
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 100
    config.optimizer.decay_steps = 3000
    if variant == "lora":
        config.model.lora.rank = 16
        config.model.lora.alpha = 32.0
        config.model.frozen_dtype = "bfloat16"
        config.optimizer.learning_rate = 2e-4
    config.train.steps = 3000
    config.train.batch_rows = 8
    config.train.eval_every = 300
    config.train.save_every = 300
    config.train.patience = 3
    config.eval.batch_rows = 8
    config.eval.validation_users = 4000
    return config

"""LLaMA 3.2 1B with item-aware blocks inside, on Amazon 2014 Toys and Games.

    python -m iam_jax.main --config=configs/llama3_1b_amazon.py --config.model.pretrained=DIR
    python -m iam_jax.main --config=configs/llama3_1b_amazon.py:full --config.model.pretrained=DIR

DIR is the model's Hugging Face folder (config.json, safetensors, tokenizer.json); the data are downloaded, or read from
--config.data.path=DIR. Behind the colon: `lora`, as without it, trains adapters, the inserted blocks and the item table, with the
model itself frozen in bfloat16; `full` trains everything. On a slice of 8 chips add --config.mesh.fsdp=8.

Cost: memory of a device, as libtpu's compiler plans a step of 8 rows of 1,024 tokens (`python benchmarks/pretrained_memory.py`,
2026-11-24, jax 0.12.0.1, libtpu 0.0.50.1; nothing was run). On each of 8 chips v5e (16 GiB): `lora` 2.6 GiB (0.35 trained, 0.29 frozen,
0.70 optimizer, 1.28 temporaries), `full` 5.3 GiB (0.89 trained, 1.79 optimizer, 2.62 temporaries). On one v5p (95 GiB): `lora` 16.1 GiB,
`full` 39.9 GiB.
Result: not trained here; the weights are not public domain and were not at hand.
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
    config.data.prompt = "<|begin_of_text|>A shopper bought, in this order:"
    config.data.separator = "\n"
    config.data.item_tokens = 24
    config.data.row_tokens = 1024
    config.data.context_items = 10
    config.model.pretrained = "Llama-3.2-1B"
    config.model.schedule = "(full*4 +intra +inter)*4"
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

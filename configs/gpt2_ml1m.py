"""GPT-2 (124 million parameters) with item-aware blocks inside, on MovieLens 1M.

    python -m iam_jax.main --config=configs/gpt2_ml1m.py --config.model.pretrained=DIR
    python -m iam_jax.main --config=configs/gpt2_ml1m.py:full --config.model.pretrained=DIR

DIR is the model's Hugging Face folder (config.json, safetensors, tokenizer.json); the data are downloaded, or read from
--config.data.path=DIR. Behind the colon: `lora`, as without it, trains adapters, the inserted blocks and the item table, with the
model itself frozen in bfloat16; `full` trains everything. On a slice of 8 chips add --config.mesh.fsdp=8.

Cost: memory of a device, as libtpu's compiler plans a step of 8 rows of 1,024 tokens (`python benchmarks/pretrained_memory.py`,
2026-11-24, jax 0.12.0.1, libtpu 0.0.50.1; nothing was run). On each of 8 chips v5e (16 GiB): `lora` 0.4 GiB (0.04 trained, 0.03 frozen,
0.09 optimizer, 0.26 temporaries), `full` 0.7 GiB (0.09 trained, 0.19 optimizer, 0.39 temporaries).
Result: not trained here; the weights were not at hand.
"""

from iam_jax.config import default_config
from iam_jax.errors import InputError


def get_config(variant: str = "lora"):
    if variant not in ("lora", "full"):
        raise InputError(f"variant {variant!r}: must be lora or full")
    config = default_config()
    config.data.source = "ml1m"
    config.data.k_core = 5
    config.data.text = "{title}"
    config.data.tokenizer = "pretrained"
    config.data.prompt = "<|endoftext|>A viewer watched these films, in this order:"
    config.data.separator = "\n"
    config.data.item_tokens = 16
    config.data.row_tokens = 1024  # learned positions: there are no more
    config.data.context_items = 10
    config.model.pretrained = "gpt2"
    config.model.schedule = "(full*3 +intra +inter)*4"
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
    config.eval.validation_users = 2000
    return config

"""Your own two tables, and a pretrained model of your choice with item-aware blocks inside.

    python -m iam_jax.main --config=configs/table_pretrained.py --config.data.path=DIR --config.model.pretrained=MODEL
    python -m iam_jax.main --config=configs/table_pretrained.py:full --config.data.path=DIR --config.model.pretrained=MODEL

DIR holds `interactions.csv` and `items.csv`, as for table.py; MODEL is a Hugging Face folder with a LLaMA, Mistral, Qwen2, Qwen3 or GPT-2
in it. --config.model.schedule says what becomes of the model's layers: one relation each, first to last, and a `+` before each inserted
one. The default is for 16 layers; for 28 it may be "(full*7 +intra +inter)*4". With a wrong number the error tells the model's own.
--config.data.prompt is the text before a history: a model that was trained with a token at the beginning of every text wants it there,
"<|begin_of_text|>…" for LLaMA 3. `lora`, as without a colon, trains adapters, the inserted blocks and the item table, `full` everything.

Cost: llama3_1b_amazon.py, qwen3_0_6b_amazon.py and gpt2_ml1m.py tell the memory of three models. Result: that of your data.
"""

from iam_jax.config import default_config
from iam_jax.errors import InputError


def get_config(variant: str = "lora"):
    if variant not in ("lora", "full"):
        raise InputError(f"variant {variant!r}: must be lora or full")
    config = default_config()
    config.data.source = "table"
    config.data.text = "{title}"
    config.data.tokenizer = "pretrained"
    config.data.prompt = "A user chose, in this order:"
    config.data.separator = "\n"
    config.data.item_tokens = 24
    config.data.row_tokens = 1024
    config.data.context_items = 10
    config.model.pretrained = "MODEL"
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

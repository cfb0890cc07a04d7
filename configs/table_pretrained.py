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

from iam_jax.config import finetuning_config


def get_config(variant: str = "lora"):
    config = finetuning_config(variant)
    config.data.source = "table"
    config.data.text = "{title}"
    config.data.prompt = "A user chose, in this order:"
    config.model.pretrained = "MODEL"
    return config

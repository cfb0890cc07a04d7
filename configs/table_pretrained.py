"""Your own two tables, and a pretrained model of your choice with item-aware blocks inside.

    python -m iam_jax.main --config=configs/table_pretrained.py --config.data.path=DIR --config.model.pretrained=MODEL
    python -m iam_jax.main --config=configs/table_pretrained.py:full --config.data.path=DIR --config.model.pretrained=MODEL

DIR holds `interactions.csv` and `items.csv`, as for table.py. MODEL is a Hugging Face folder of a LLaMA, Mistral, Qwen2, Qwen3 or GPT-2.
--config.model.schedule gives each of the model's layers a relation, first to last, and marks each inserted layer with `+`. The default is
for 16 layers; for 28 it may be "(full*7 +intra +inter)*4". If the number of layers is wrong, the error names the model's own.
--config.data.prompt is the text before a history. A model that was trained with a token at the beginning of every text needs it there:
"<|begin_of_text|>…" for LLaMA 3. `lora` (the default) trains adapters, the inserted blocks and the item table, `full` everything.

Cost: llama3_1b_amazon.py, qwen3_0_6b_amazon.py and gpt2_ml1m.py have the memory of three models. Result: depends on your data.
"""

from iam_jax.config import finetuning_config


def get_config(variant: str = "lora"):
    config = finetuning_config(variant)
    config.data.source = "table"
    config.data.text = "{title}"
    config.data.prompt = "A user chose, in this order:"
    config.model.pretrained = "MODEL"
    return config

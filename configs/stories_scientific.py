"""A small real LLaMA, fine-tuned on Amazon 2018 Scientific: ordinary attention, item-aware attention in its own layers or in inserted
ones, and LoRA.

    python -m iam_jax.main --config=configs/stories_scientific.py:inserted --config.model.pretrained=MODEL --config.data.path=DIR
    python launch/compare.py stories --pretrained=MODEL --path=DIR        # all of them, in one table

MODEL is a Hugging Face folder of a LLaMA of five layers, DIR holds tables. Variants: `frozen` (the model without training), `full`
(ordinary attention), `schedule` (its own layers), `inserted`, `lora` (inserted layers, and adapters for the model itself). For the result
below, MODEL was a character-level LLaMA of 0.94 million parameters trained on children's stories (the public BabyLlama project,
converted), and DIR held the 2,928 users and 1,585 items of the set.

Cost: about 5 minutes of training each and 2 of ranking, on 2 CPU cores shared with other work.
Result (seed 0, 2026-11-25), test NDCG@10 with the 95 % interval over 2,928 users, and validation loss of a text token: frozen 0.0028,
5.78; full 0.0402 [0.0346, 0.0462], 2.21; schedule 0.0430 [0.0372, 0.0494], 2.21; inserted 0.0430 [0.0369, 0.0492], 2.44; lora 0.0552
[0.0482, 0.0622], 2.10; popularity 0.0234, last-item transitions 0.0782, item-kNN 0.1014.
"""

from iam_jax.config import default_config
from iam_jax.errors import InputError

SCHEDULES = {
    "frozen": "full*5",
    "full": "full*5",
    "schedule": "(intra inter)*2 full",
    "inserted": "(full*2 +intra +inter)*2 full",
    "lora": "(full*2 +intra +inter)*2 full",
}


def get_config(variant="inserted"):
    if variant not in SCHEDULES:
        raise InputError(f"stories_scientific.py:{variant}: the variants are {', '.join(SCHEDULES)}")
    config = default_config()
    config.data.path = "amazon2018-scientific"
    config.data.text = "{text}"
    config.data.tokenizer = "pretrained"
    config.data.item_tokens = 24  # characters, for this model
    config.data.row_tokens = 256
    config.data.context_items = 2
    config.model.pretrained = "tiny-llama-stories"
    config.model.schedule = SCHEDULES[variant]
    config.model.dropout = 0.0
    config.model.lora.rank = 8 if variant == "lora" else 0
    config.objective.token = 0.2
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 20
    config.optimizer.decay_steps = 150
    config.train.steps = 0 if variant == "frozen" else 150
    config.train.batch_rows = 16
    config.train.eval_every = 50
    config.train.save_every = 50
    config.eval.validation_users = 1000
    return config

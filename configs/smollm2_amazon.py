"""SmolLM2-135M as a frozen tower over the titles of Amazon 2014 Toys, and two item-level layers with the items' identity behind it.

    python -m iam_jax.main --config=configs/smollm2_amazon.py --config.model.pretrained=MODEL

MODEL is the Hugging Face folder of SmolLM2-135M, or of another LLaMA with 30 layers. No parameter of it is trained, so the states of the
catalogue are computed once and kept in the cache.

Cost: the states take about 7.5 minutes of CPU time and 1.5 GB of memory, then 1,280 steps take ten minutes on a busy core. Result
(2026-11-30, seed 0): test NDCG@10 0.0490, as SASRec (0.0491) and behind the hybrid with tf-idf (amazon_toys.py, 0.0545).
"""

from iam_jax.config import default_config


def get_config():
    config = default_config()
    config.data.source = "amazon"
    config.data.category = "2014/Toys_and_Games"
    config.data.k_core = 5
    config.data.untitled = "drop"
    config.data.text = "{title}"
    config.data.tokenizer = "pretrained"
    config.data.item_tokens = 12
    config.data.row_tokens = 256
    config.data.row_items = 64
    config.data.context_items = 10
    config.model.pretrained = "SmolLM2-135M"
    config.model.schedule = "intra*30 | inter*2"
    config.model.item_input = "table"
    config.model.content_input = "vector"
    config.model.item_width = 64
    config.model.item_heads = 1
    config.model.dropout = 0.0
    config.model.item_dropout = 0.5
    config.train.frozen = "."
    config.objective.vectors = "both"
    config.objective.chunk = 128
    config.optimizer.learning_rate = 3e-3
    config.optimizer.decay_steps = 1280
    config.optimizer.weight_decay = 0.3
    config.train.steps = 1280  # 12 epochs
    config.train.batch_rows = 16
    config.train.eval_every = 160
    config.train.save_every = 160
    config.eval.validation_users = 4000
    return config

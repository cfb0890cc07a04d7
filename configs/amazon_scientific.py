"""Amazon 2018 Industrial and Scientific, five-core: item-aware attention over title, categories and brand, sized for a laptop.

    python -m iam_jax.main --config=configs/amazon_scientific.py --config.data.path=DIR

DIR holds tables: `interactions` (user, item, timestamp) and `items` (item, text). Another text column is `--config.data.text="{title}"`.

Cost: not measured yet. Result: not measured yet.
"""

from iam_jax.config import default_config


def get_config():
    config = default_config()
    config.data.path = "amazon2018-scientific"
    config.data.text = "{text}"
    config.data.item_tokens = 24
    config.data.row_tokens = 320
    config.data.context_items = 10
    config.model.schedule = "intra inter"
    config.model.width = 64
    config.model.heads = 4
    config.model.dropout = 0.1
    config.objective.vectors = "both"
    config.objective.negatives = 256
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.decay_steps = 800
    config.train.steps = 800
    config.train.batch_rows = 16
    config.train.eval_every = 100
    config.train.save_every = 100
    config.train.patience = 3
    config.eval.validation_users = 4000
    return config

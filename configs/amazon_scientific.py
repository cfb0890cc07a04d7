"""Amazon 2018 Industrial and Scientific, five-core: a hybrid of content and identity, or item-aware attention over texts.

    python -m iam_jax.main --config=configs/amazon_scientific.py --config.data.path=DIR
    python -m iam_jax.main --config=configs/amazon_scientific.py:iam --config.data.path=DIR        # a variant: see below

DIR holds tables: `interactions` (user, item, timestamp) and `items` (item, text). The text is title, categories and brand in a row.

Variants with a state per item: `hybrid` (the default), inter layers over tf-idf of the texts plus a table row; `hybrid_full`, the same with
ordinary attention. Variant over tokens, as in the paper: `iam`.

Cost: half a minute on one CPU core. Result (2026-11-30, mean of seeds 0, 1, 2 of launch/reproduce.py), 2,928 users, 1,585 items: test
NDCG@10 0.1104, and 0.1136 with `--mode=evaluate --config.eval.fusion=transitions` after it; smoothed transitions 0.1028, item-kNN 0.1014.
"""

from iam_jax.config import default_config, hybrid_config
from iam_jax.errors import InputError

ITEM_LEVEL = {"hybrid": "| inter*2", "hybrid_full": "| full*2"}
SCHEDULES = {"iam": "intra inter"}


def get_config(variant: str = "hybrid"):
    if variant not in ITEM_LEVEL | SCHEDULES:
        raise InputError(f"amazon_scientific.py:{variant}: the variants are {', '.join(ITEM_LEVEL | SCHEDULES)}")
    config = hybrid_config(ITEM_LEVEL[variant]) if variant in ITEM_LEVEL else default_config()
    config.data.path = "amazon2018-scientific"
    config.data.text = "{text}"
    config.data.item_tokens = 24
    config.data.row_tokens = 320
    config.data.context_items = 10
    config.model.width = 64
    config.objective.vectors = "both"
    config.eval.validation_users = 4000
    if variant in ITEM_LEVEL:
        config.data.vocabulary = 512  # no layer reads the tokens
        config.optimizer.warmup_steps = 172
        config.optimizer.decay_steps = 1720
        config.train.steps = 1720  # 20 epochs
        config.train.batch_rows = 2
        config.train.eval_every = 215
        config.train.save_every = 215
        return config
    config.model.schedule = SCHEDULES[variant]
    config.model.heads = 4
    config.model.dropout = 0.1
    config.objective.negatives = 256
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.decay_steps = 800
    config.train.steps = 800
    config.train.batch_rows = 16
    config.train.eval_every = 100
    config.train.save_every = 100
    config.train.patience = 3
    return config

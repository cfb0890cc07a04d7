"""MovieLens 1M: a hybrid of content and identity over whole histories, or item-aware attention over the tokens of titles and genres.

    python -m iam_jax.main --config=configs/ml1m.py
    python -m iam_jax.main --config=configs/ml1m.py --config.train.steps=1232       # a first look: an eighth of the run
    python -m iam_jax.main --config=configs/ml1m.py:iam                             # a variant: see below

download the original zip, or read it, or tables, from --config.data.path=DIR.

Variants with a state per item, whose rows hold histories of up to 256 items: `hybrid` (the default), inter layers over tf-idf of titles and
genres plus a table row; `hybrid_full`, the same with ordinary attention.
Variant over tokens, as in the paper: `iam`, with 38 items of context. On an accelerator, first try --config.data.row_tokens=2048 (150 items
of context), --config.model.width=128 and --config.model.dtype=bfloat16.

Cost: the first command takes 18 minutes of one CPU core.
Result (2026-11-30, seed 0), 6,040 users, 3,416 items: test NDCG@10 0.1725, and 0.1781 with `--mode=evaluate
--config.eval.fusion=transitions` after it; smoothed transitions 0.1582, last-item transitions 0.1057, popularity 0.0200. `iam` has not been
trained to the end.
Measured on tables of the same data (split 025766db…) through --config.data.path, not on a download.
"""

from iam_jax.config import default_config, hybrid_config
from iam_jax.errors import InputError

ITEM_LEVEL = {"hybrid": "| inter*2", "hybrid_full": "| full*2"}
SCHEDULES = {"iam": "(intra inter)*2"}


def get_config(variant: str = "hybrid"):
    if variant not in ITEM_LEVEL | SCHEDULES:
        raise InputError(f"ml1m.py:{variant}: the variants are {', '.join(ITEM_LEVEL | SCHEDULES)}")
    config = hybrid_config(ITEM_LEVEL[variant]) if variant in ITEM_LEVEL else default_config()
    config.data.source = "ml1m"
    config.data.k_core = 5
    config.data.text = "{title} | {genres}"
    config.data.item_tokens = 24
    config.data.row_tokens = 512
    config.data.context_items = 10
    config.model.width = 64
    config.eval.batch_rows = 16
    config.eval.validation_users = 2000
    if variant in ITEM_LEVEL:
        config.data.vocabulary = 512  # no layer reads the tokens
        config.data.row_items = 256
        config.model.dropout = 0.2
        config.optimizer.warmup_steps = 985
        config.optimizer.decay_steps = 9856
        config.optimizer.weight_decay = 0.1
        config.train.steps = 9856  # 20 epochs
        config.train.batch_rows = 8
        config.train.eval_every = 1232
        config.train.save_every = 1232
        return config
    config.model.schedule = SCHEDULES[variant]
    config.model.heads = 2
    config.model.dropout = 0.1
    config.objective.vectors = "table"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.decay_steps = 20000
    config.train.steps = 20000
    config.train.batch_rows = 16
    config.train.eval_every = 1000
    config.train.save_every = 500
    config.train.patience = 5
    return config

"""Amazon 2014 Toys and Games, five-core, on a laptop: a hybrid of content and identity, or item-aware attention over titles.

    python -m iam_jax.main --config=configs/amazon_toys.py
    python -m iam_jax.main --config=configs/amazon_toys.py:iam         # a variant: see below
    python launch/compare.py toys        # item-aware attention over titles, the hybrid, ordinary attention, SASRec

download the two original files, or read them, or tables, from --config.data.path=DIR.

Variants with a state per item: `hybrid` (the default), inter layers over tf-idf of the titles plus a table row, at the input and in item
vectors; `hybrid_full`, the same with ordinary attention.
Variants over tokens, as in the paper: `iam`; `full`, ordinary attention; `no_intra` and `no_inter`, the ablations, in which ordinary layers
replace those of one kind; `hatllm`, HatLLM's order (arXiv 2510.10955), which has three layers because two cannot hold its three kinds.

Cost: the first command takes three minutes on one CPU core; the variants over tokens train for 12 minutes on two (train.max_minutes).
Result (2026-11-30, seed 0), test NDCG@10 over all 11,758 items: 0.0549, and 0.0616 with `--mode=evaluate
--config.eval.fusion=transitions` after it; smoothed transitions 0.0504, item-kNN 0.0452. Mean of three seeds of launch/reproduce.py, with
ten items of context: 0.0545; SASRec 0.0493 in 34 epochs. Over tokens, with 8 minutes on one core (2026-11-26): `iam` 0.0362, `full`
0.0321. docs/results.md has the tables with their commands.
Measured on tables of the same data (split 56384689…) through --config.data.path, not on a download.
"""

from iam_jax.config import default_config, hybrid_config
from iam_jax.errors import InputError
from iam_jax.schedule import parse_schedule

ITEM_LEVEL = {"hybrid": "| inter*2", "hybrid_full": "| full*2"}
SCHEDULES = {"iam": "intra inter", "full": "full*2", "no_intra": "full inter", "no_inter": "intra full", "hatllm": "intra full inter"}


def get_config(variant: str = "hybrid"):
    if variant not in ITEM_LEVEL | SCHEDULES:
        raise InputError(f"amazon_toys.py:{variant}: the variants are {', '.join(ITEM_LEVEL | SCHEDULES)}")
    config = hybrid_config(ITEM_LEVEL[variant]) if variant in ITEM_LEVEL else default_config()
    config.data.source = "amazon"
    config.data.category = "2014/Toys_and_Games"
    config.data.k_core = 5
    config.data.untitled = "drop"
    config.data.text = "{title}"
    config.data.item_tokens = 12
    config.data.row_tokens = 256
    config.data.context_items = 5
    config.model.width = 64
    config.objective.vectors = "both"
    config.train.batch_rows = 16
    config.eval.validation_users = 4000
    if variant in ITEM_LEVEL:
        config.data.vocabulary = 512  # no layer reads the tokens
        config.optimizer.warmup_steps = 128
        config.optimizer.decay_steps = 1280
        config.train.steps = 1280  # 12 epochs
        config.train.eval_every = 160
        config.train.save_every = 160
        return config
    config.model.schedule = SCHEDULES[variant]
    config.model.heads = 4
    config.model.dropout = 0.1
    config.objective.text_layers = "leading" if parse_schedule(SCHEDULES[variant]).leading_intra else "all"
    config.objective.negatives = 512
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.decay_steps = 2400
    config.train.steps = 2400
    config.train.eval_every = 300
    config.train.save_every = 300
    config.train.patience = 3
    config.train.max_minutes = 12.0
    return config

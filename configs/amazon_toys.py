"""Amazon 2014 Toys and Games, five-core, sized for a laptop: item-aware attention over titles.

    python -m iam_jax.main --config=configs/amazon_toys.py
    python -m iam_jax.main --config=configs/amazon_toys.py:full        # a variant: iam (the default), full, no_intra, no_inter, hatllm
    python launch/compare.py toys        # also ordinary attention and SASRec, on the same budget

download the two original files, or read them, or tables, from --config.data.path=DIR.

Variants: `iam`; `full`, ordinary attention; `no_intra` and `no_inter`, the ablations, in which ordinary layers replace those of one kind;
`hatllm`, HatLLM's order (arXiv 2510.10955), which has three layers because two cannot hold its three kinds.

Cost: 12 minutes of training (train.max_minutes) and one minute of ranking on 2 CPU cores. Result of launch/reproduce.py with 8 minutes on
one core each (its learning rates, 2026-11-26; docs/results.md has the whole table), test NDCG@10 over all 11,758 items, mean of three
seeds: 0.0362; ordinary attention 0.0321, SASRec 0.0493, item-kNN 0.0452, last-item transitions 0.0288, popularity 0.0060.
Measured on tables of the same data (split 56384689…) through --config.data.path, not on a download.
"""

from iam_jax.config import default_config
from iam_jax.errors import InputError
from iam_jax.schedule import parse_schedule

SCHEDULES = {"iam": "intra inter", "full": "full*2", "no_intra": "full inter", "no_inter": "intra full", "hatllm": "intra full inter"}


def get_config(variant: str = "iam"):
    if variant not in SCHEDULES:
        raise InputError(f"amazon_toys.py:{variant}: the variants are {', '.join(SCHEDULES)}")
    config = default_config()
    config.data.source = "amazon"
    config.data.category = "2014/Toys_and_Games"
    config.data.k_core = 5
    config.data.untitled = "drop"
    config.data.text = "{title}"
    config.data.item_tokens = 12
    config.data.row_tokens = 256
    config.data.context_items = 5
    config.model.schedule = SCHEDULES[variant]
    config.model.width = 64
    config.model.heads = 4
    config.model.dropout = 0.1
    config.objective.vectors = "both"
    config.objective.text_layers = "leading" if parse_schedule(SCHEDULES[variant]).leading_intra else "all"
    config.objective.negatives = 512
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.decay_steps = 2400
    config.train.steps = 2400
    config.train.batch_rows = 16
    config.train.eval_every = 300
    config.train.save_every = 300
    config.train.patience = 3
    config.train.max_minutes = 12.0
    config.eval.validation_users = 4000
    return config

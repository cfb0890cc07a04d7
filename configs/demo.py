"""A synthetic shop in a minute on two cores: item-aware attention over item titles, compared with the best possible score.

    python -m iam_jax.main --config=configs/demo.py
    python launch/compare.py demo        # the controls: every layer intra; titles shuffled among the items

Cost: 42 s from start to table on 2 CPU cores, without installation. Result (seed 0, CPU, 2026-11-23), test NDCG@10 over all 800
items, with the 95 % interval over 2,000 users: 0.1754 [0.1613, 0.1895]; popularity 0.0089, last-item transitions 0.0752, oracle 0.3211.
Every layer intra: 0.1265 [0.1148, 0.1391]. Shuffled titles: 0.0057 [0.0031, 0.0084].
"""

from iam_jax.config import default_config


def get_config():
    config = default_config()
    config.data.source = "synthetic"
    config.data.text = "{title}"
    config.data.item_tokens = 12
    config.data.row_tokens = 256
    config.data.vocabulary = 1024
    config.data.context_items = 8
    config.model.schedule = "intra inter"
    config.model.width = 64
    config.model.heads = 4
    config.model.dropout = 0.0
    config.objective.vectors = "text"
    config.objective.negatives = 128
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.decay_steps = 400
    config.train.steps = 400
    config.train.batch_rows = 8
    config.train.eval_every = 200
    config.train.save_every = 200
    return config

"""SASRec (arXiv 1808.09781) on Amazon 2014 Toys and Games: one id token per item, causal attention, full softmax.

    python -m iam_jax.main --config=configs/amazon_toys_sasrec.py

SASRec is a config of the same decoder: pre-layer-norm, learned positions, a ReLU MLP of the model's width, and one item table for input
and output. It differs from the original in two points: a full softmax instead of one negative per target, and no dropout inside the
attention weights.

Cost: 12 minutes of training on 2 CPU cores. Result of launch/reproduce.py with 8 minutes on one core (learning rate 0.003, 34 epochs,
2026-11-26; docs/results.md has the whole table), mean of three seeds: test NDCG@10 0.0493, HR@10 0.0840.
Measured on tables of the same data (split 56384689…) through --config.data.path, not on a download.
"""

from iam_jax.config import default_config


def get_config():
    config = default_config()
    config.data.source = "amazon"
    config.data.category = "2014/Toys_and_Games"
    config.data.k_core = 5
    config.data.untitled = "drop"
    config.data.tokenizer = "id"
    config.data.row_tokens = 64
    config.data.context_items = 10
    config.model.schedule = "full*2"
    config.model.width = 64
    config.model.heads = 1
    config.model.norm = "layer"
    config.model.norm_epsilon = 1e-8
    config.model.positions = "learned"
    config.model.mlp = "plain"
    config.model.mlp_width = 64
    config.model.activation = "relu"
    config.model.qkv_bias = config.model.out_bias = config.model.mlp_bias = True
    config.model.dropout = 0.4
    config.model.tie_items = True
    config.objective.chunk = 128  # logits that stay in a CPU's cache: over a quarter less time a step than 2,048
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.decay_steps = 0
    config.optimizer.weight_decay = 0.0
    config.train.steps = 20000
    config.train.batch_rows = 16
    config.train.eval_every = 400
    config.train.save_every = 400
    config.train.patience = 5
    config.train.max_minutes = 12.0
    config.eval.validation_users = 4000
    return config

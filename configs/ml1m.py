from iam_jax.config import default_config


def get_config():
    config = default_config()
    config.data.source = "ml1m"
    config.data.k_core = 5
    config.data.text = "{title} | {genres}"
    config.data.item_tokens = 24
    config.data.row_tokens = 512
    config.data.context_items = 10
    config.model.schedule = "(intra inter)*2"
    config.model.width = 64
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
    config.eval.batch_rows = 16
    config.eval.validation_users = 2000
    return config

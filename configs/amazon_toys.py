from iam_jax.config import default_config


def get_config():
    config = default_config()
    config.data.source = "amazon"
    config.data.category = "2014/Toys_and_Games"
    config.data.k_core = 5
    config.data.untitled = "drop"
    config.data.text = "{title}"
    config.data.item_tokens = 12
    config.data.row_tokens = 256
    config.data.context_items = 5
    config.model.schedule = "intra inter"
    config.model.width = 64
    config.model.heads = 4
    config.model.dropout = 0.1
    config.objective.vectors = "both"
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

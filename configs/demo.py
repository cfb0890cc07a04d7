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

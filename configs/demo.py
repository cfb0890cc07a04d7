from iam_jax.config import default_config


def get_config():
    config = default_config()
    config.data.source = "synthetic"
    config.data.text = "{title}"
    config.data.item_tokens = 12
    config.data.row_tokens = 256
    config.data.vocabulary = 1024
    config.data.context_items = 8
    config.model.schedule = "(intra inter)*2"
    config.model.width = 64
    config.model.heads = 4
    config.objective.vectors = "text"
    config.objective.softmax = "full"
    config.train.steps = 300
    config.train.batch_rows = 16
    config.train.eval_every = 100
    config.optimizer.decay_steps = 300
    config.optimizer.warmup_steps = 30
    config.optimizer.learning_rate = 3e-3
    return config

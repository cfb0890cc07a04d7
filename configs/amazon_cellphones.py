"""Amazon 2018 Cell Phones and Accessories, five-core: item-aware attention over title and brand, sized for an accelerator.

    python -m iam_jax.main --config=configs/amazon_cellphones.py

downloads the two original files (about 1.1 million reviews), or reads them from --config.data.path=DIR.

Cost and result: not measured yet. The data set could not be downloaded where this config was written. The loader is tested on small
files in the original format; model and objective are those of amazon_toys.py, wider and deeper.
"""

from iam_jax.config import default_config


def get_config():
    config = default_config()
    config.data.source = "amazon"
    config.data.category = "2018/Cell_Phones_and_Accessories"
    config.data.k_core = 5
    config.data.untitled = "drop"
    config.data.text = "{title} | {brand}"
    config.data.item_tokens = 24
    config.data.row_tokens = 512
    config.data.context_items = 5
    config.model.schedule = "(intra inter)*2"
    config.model.width = 128
    config.model.heads = 4
    config.model.dropout = 0.2
    config.objective.vectors = "both"
    config.objective.negatives = 2048
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 500
    config.optimizer.decay_steps = 40000
    config.optimizer.weight_decay = 0.05
    config.train.steps = 40000
    config.train.batch_rows = 32
    config.train.eval_every = 1000
    config.train.save_every = 1000
    config.train.patience = 5
    config.eval.validation_users = 10000
    return config

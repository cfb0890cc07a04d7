"""Your own two tables: item-aware attention over the items' text.

    python -m iam_jax.main --config=configs/table.py --config.data.path=DIR --workdir=runs/mine

DIR holds `interactions.csv` (user, item, timestamp) and `items.csv` (item, then text columns); .tsv, .csv.gz, .tsv.gz and
.parquet work, too. `--config.data.text="{title} | {brand}"` chooses the columns that make an item's text, and
`--config.data.item_tokens` how many tokens of it are kept. docs/tutorial.md goes through it step by step.

Cost: grows with the number of tokens in all histories. Result: depends on your data; amazon_toys.py (19,124 users, 11,758 items with
short titles, a smaller model) gives an idea of both.
"""

from iam_jax.config import default_config


def get_config():
    config = default_config()
    config.data.source = "table"
    config.data.text = "{title}"
    config.data.item_tokens = 16
    config.data.row_tokens = 256
    config.data.context_items = 5
    config.model.schedule = "intra inter"
    config.model.width = 64
    config.model.heads = 4
    config.objective.vectors = "both"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.decay_steps = 4000
    config.train.steps = 4000
    config.train.batch_rows = 16
    config.train.eval_every = 400
    config.train.save_every = 400
    config.train.patience = 3
    config.eval.validation_users = 5000
    return config

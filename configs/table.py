"""Your own two tables: a hybrid of content and identity, or item-aware attention over the tokens of the items' text.

    python -m iam_jax.main --config=configs/table.py --config.data.path=DIR --workdir=runs/mine
    python -m iam_jax.main --config=configs/table.py:iam --config.data.path=DIR --workdir=runs/mine-iam

DIR holds `interactions.csv` (user, item, timestamp) and `items.csv` (item, then text columns); .tsv, .csv.gz, .tsv.gz and
.parquet work, too. `--config.data.text="{title} | {brand}"` chooses the columns that make an item's text. docs/tutorial.md goes through it
step by step.

`hybrid` (the default): inter layers over one state per item, tf-idf of the text plus a table row. An encoder's vectors can replace tf-idf
(--config.data.vectors=FILE) or be added to it (tfidf+FILE); on two data sets they were not better. `iam`: item-aware attention over tokens,
as in the paper; `--config.data.item_tokens` is how many tokens of a text are kept.

Cost: grows with the number of events; amazon_toys.py (19,124 users, 11,758 items) and ml1m.py (a million events) give an idea. Result:
depends on your data. On Amazon Toys and on the synthetic shop the hybrid is better than the variant over tokens (docs/results.md).
"""

from iam_jax.config import default_config, hybrid_config
from iam_jax.errors import InputError


def get_config(variant: str = "hybrid"):
    if variant not in ("hybrid", "iam"):
        raise InputError(f"table.py:{variant}: the variants are hybrid, iam")
    config = hybrid_config() if variant == "hybrid" else default_config()
    config.data.source = "table"
    config.data.text = "{title}"
    config.data.item_tokens = 16
    config.data.row_tokens = 256
    config.data.context_items = 5
    config.model.width = 64
    config.objective.vectors = "both"
    config.optimizer.decay_steps = 4000
    config.train.steps = 4000
    config.train.batch_rows = 16
    config.train.eval_every = 400
    config.train.save_every = 400
    config.train.patience = 3
    config.eval.validation_users = 5000
    if variant == "iam":
        config.model.schedule = "intra inter"
        config.model.heads = 4
        config.optimizer.learning_rate = 2e-3
    return config

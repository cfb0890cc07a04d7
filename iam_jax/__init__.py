"""Item-aware attention for language-model recommenders: the public names, imported when they are first used.

    import iam_jax

    recommender = iam_jax.load("runs/demo")
    recommender.recommend([["p3", "p17"]], k=10)

Importing the package itself imports neither JAX nor the table libraries.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iam_jax.api import compare, evaluate, train
    from iam_jax.config import default_config
    from iam_jax.errors import InputError
    from iam_jax.kernels.range_attention import range_attention
    from iam_jax.model.attention import key_ranges
    from iam_jax.ranking.metrics import ranking_metrics
    from iam_jax.ranking.scores import rank_catalogue
    from iam_jax.serving.recommender import Recommendation, Recommender, load

__version__ = "0.1.0"

_HOMES = {
    "InputError": "iam_jax.errors",
    "Recommendation": "iam_jax.serving.recommender",
    "Recommender": "iam_jax.serving.recommender",
    "compare": "iam_jax.api",
    "default_config": "iam_jax.config",
    "evaluate": "iam_jax.api",
    "key_ranges": "iam_jax.model.attention",
    "load": "iam_jax.serving.recommender",
    "range_attention": "iam_jax.kernels.range_attention",
    "rank_catalogue": "iam_jax.ranking.scores",
    "ranking_metrics": "iam_jax.ranking.metrics",
    "train": "iam_jax.api",
}

__all__ = [
    "InputError",
    "Recommendation",
    "Recommender",
    "__version__",
    "compare",
    "default_config",
    "evaluate",
    "key_ranges",
    "load",
    "range_attention",
    "rank_catalogue",
    "ranking_metrics",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

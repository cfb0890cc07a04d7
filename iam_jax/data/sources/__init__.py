"""Data sources: where a run's interactions and items come from (`data.source`).

A source is one `Source` object. To add one, register it before the config is resolved, for example in the config file:

    from iam_jax.data.sources import Source, register

    register(Source("shop", "the orders of our shop", load=lambda config, cache: read_orders(config.path)))

The sources of this package are listed in `iam_jax.registry.SOURCES`, each in a module of this folder, which is imported when the source is
first used.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from iam_jax.registry import SOURCES

if TYPE_CHECKING:
    import numpy as np

    from iam_jax.config import DataConfig
    from iam_jax.data.splits import Events
    from iam_jax.data.tables import Tables

    Scorer = Callable[[Events, np.ndarray], np.ndarray]

register, unregister = SOURCES.register, SOURCES.unregister


@dataclasses.dataclass(frozen=True)
class Source:
    """One kind of data. Its functions receive the config's section `data`, and raise InputError for bad input."""

    name: str  # the value of data.source
    meaning: str  # one line for the documentation

    # (config, cache folder) -> the two tables. They are checked afterwards (`tables.check_tables`).
    load: "Callable[[DataConfig, Path], Tables]"

    # config -> what determines the tables, as JSON: the prepared data is cached under it, and the tables are only loaded if it is new.
    # None: the tables are loaded each time, and cached under their fingerprint.
    identity: "Callable[[DataConfig], list | None]" = lambda config: None

    check: "Callable[[DataConfig], None]" = lambda config: None  # called when a config is resolved: import nothing heavy
    oracle: "Callable[[DataConfig], Scorer | None]" = lambda config: None  # the true scores, if they are known
    layout: str = ""  # the files that it reads from data.path, for the documentation
    accepts_tables: bool = False  # if data.path holds the tables of the source `table`, they are read instead

"""The source `table`: the user's own two tables, in a folder."""

from pathlib import Path

from iam_jax.config import DataConfig
from iam_jax.data import tables
from iam_jax.data.sources import Source
from iam_jax.errors import InputError


def _check(config: DataConfig) -> None:
    if not config.path:
        raise InputError(f"config.data.path = {config.path!r}: the folder that holds interactions.* and items.*")


def _load(config: DataConfig, _: Path) -> tables.Tables:
    return tables.load_tables(config.path)


def _identity(config: DataConfig) -> list:
    """The hash of the files' bytes: known without parsing them."""
    return ["table", tables.fingerprint_tables(config.path)]


TABLE = Source(
    name="table",
    meaning="your own two tables, interactions and items",
    load=_load,
    identity=_identity,
    check=_check,
    layout=tables.LAYOUT,
)

"""Registries: objects by name, to which users can add their own.

A registry may hold the location of an entry ("module:attribute") instead of the entry. Its names are then known without importing the
module, so that the config can be checked before the libraries of the data sources are imported.
"""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar


class Named(Protocol):
    @property
    def name(self) -> str: ...


Entry = TypeVar("Entry", bound=Named)


class Registry(Mapping[str, Entry], Generic[Entry]):
    """A mapping from names to entries, in the order of their registration."""

    def __init__(self, kind: str, own: Mapping[str, Entry | str]):
        """kind: what an entry is, for messages. own: the package's own entries by name; "module:attribute" is imported on first use."""
        self._kind, self._own, self._entries = kind, frozenset(own), dict(own)

    def register(self, entry: Entry) -> Entry:
        """Adds an entry under its name and returns it. Raises ValueError if one of the package's own entries has this name.

        It replaces an entry that was registered under this name before, so that a config file can be read twice.
        """
        if entry.name in self._own:
            raise ValueError(f"the {self._kind} {entry.name!r} belongs to iam_jax: choose another name")
        self._entries[entry.name] = entry
        return entry

    def unregister(self, name: str) -> None:
        """Removes a registered entry. Raises ValueError for any other name, including the package's own."""
        if name in self._own or name not in self._entries:
            raise ValueError(f"{name!r} is not a registered {self._kind}")
        del self._entries[name]

    def __getitem__(self, name: str) -> Entry:
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            found: Entry = getattr(importlib.import_module(module), attribute)
            self._entries[name] = found
            return found
        return entry

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # the inherited method would import the entry

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


SOURCES: Registry[Any] = Registry(
    "data source",
    {
        "table": "iam_jax.data.sources.table:TABLE",
        "ml1m": "iam_jax.data.sources.movielens:ML1M",
        "amazon": "iam_jax.data.sources.amazon:AMAZON",
        "synthetic": "iam_jax.data.sources.synthetic:SYNTHETIC",
    },
)
"""The data sources that `data.source` can name: objects of `iam_jax.data.sources.Source`."""

"""The registry of model families. Each file of this folder defines one or more; a new file is found by itself."""

import importlib
import pkgutil

from iam_jax.model.pretrained.family import Family
from iam_jax.registry import Registry

_files = [importlib.import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__)]
_own = {family.name: family for file in _files for family in vars(file).values() if isinstance(family, Family)}

FAMILIES: Registry[Family] = Registry("model family", _own)
"""The families by the `model_type` in config.json."""

register, unregister = FAMILIES.register, FAMILIES.unregister

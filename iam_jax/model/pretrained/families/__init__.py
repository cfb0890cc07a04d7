"""One file per model family. Importing this package imports every file in it, and each registers its families."""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

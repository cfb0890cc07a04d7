"""Config files by name: those of the project, in `configs/` of a checkout and inside the installed package."""

import importlib.util
from pathlib import Path

import ml_collections

from iam_jax.errors import InputError

_HERE = Path(__file__).parent
FOLDER = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"  # in a wheel; in a checkout


def names() -> list[str]:
    """The names that `find` knows, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.py"))


def find(config: str) -> str:
    """The path of a config file, with the variant if there is one: "demo" -> ".../configs/demo.py", "name:full" -> ".../name.py:full".

    A path (with a folder or the ending `.py`) is returned as it is. Raises InputError for an unknown name, with the names that exist.
    """
    name, colon, variant = config.partition(":")
    if not name or name.endswith(".py") or Path(name).name != name:
        return config
    if name not in names():
        raise InputError(f"config {name!r}: there are {', '.join(names())}; a file of your own needs its ending .py")
    return f"{FOLDER / name}.py{colon}{variant}"


def load(config: str) -> ml_collections.ConfigDict:
    """The config of a file, as its `get_config()` or `get_config(variant)` returns it. config: as for `find`.

    Raises InputError where there is no such file, or it holds no config that starts from `default_config()`.
    """
    path, _, variant = find(config).partition(":")
    if not Path(path).is_file():
        raise InputError(f"config {config!r}: no such file")
    spec = importlib.util.spec_from_file_location("iam_jax_config_file", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        found = module.get_config(variant) if variant else module.get_config()
    except InputError:
        raise
    except Exception as error:  # a config file is a program: anything may be wrong with it
        raise InputError(f"config {config!r}: {type(error).__name__}: {error}") from error
    if not isinstance(found, ml_collections.ConfigDict) or "data" not in found:
        raise InputError(f"config {config!r}: get_config() returns no config that starts from default_config()")
    return found

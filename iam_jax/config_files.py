"""Config files by path or by name. The named ones are those of the project, in `configs/` of a checkout or in the installed package."""

import importlib.util
from pathlib import Path

import ml_collections

from iam_jax.errors import InputError

_HERE = Path(__file__).parent
FOLDER = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"  # of a wheel; of a checkout


def names() -> list[str]:
    """Returns the names of the project's config files, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.py"))


def find(config: str) -> str:
    """Returns the path of a config file, with the variant if there is one: "demo" -> ".../demo.py", "name:full" -> ".../name.py:full".

    A path (with a folder or the ending `.py`) is returned unchanged. Raises InputError for an unknown name; the message lists the names.
    """
    name, colon, variant = config.partition(":")
    if not name or name.endswith(".py") or Path(name).name != name:
        return config
    if name not in names():
        raise InputError(
            f"config {name!r}: unknown name, the names are {', '.join(names())}; the path of a file of your own must end in .py"
        )
    return f"{FOLDER / name}.py{colon}{variant}"


def load(config: str) -> ml_collections.ConfigDict:
    """Returns the config that `get_config()` or `get_config(variant)` of a config file returns. config: as for `find`.

    Raises InputError if there is no such file, if the file raises an error, or if its config does not start from `default_config()`.
    """
    path, _, variant = find(config).partition(":")
    if not Path(path).is_file():
        raise InputError(f"config {config!r}: no such file")
    spec = importlib.util.spec_from_file_location("iam_jax_config_file", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        result = module.get_config(variant) if variant else module.get_config()
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # a config file is a program, which can raise anything
        raise InputError(f"config {config!r}: {type(error).__name__}: {error}") from error
    if not isinstance(result, ml_collections.ConfigDict) or "data" not in result:
        raise InputError(f"config {config!r}: get_config() must return a config that starts from default_config()")
    return result

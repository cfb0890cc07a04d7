"""Config files by name: those of the project, in `configs/` of a checkout and inside the installed package."""

from pathlib import Path

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

"""What README, configs and CI tell must agree with the program."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from iam_jax.config import Config, resolve

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def fields(section, prefix=""):
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def test_config_reference_lists_every_field_with_its_default():
    rows = dict(re.findall(r"^\| `([a-z0-9_.]+)` \| (?:`(.+?)`|\(empty\)) \|", README, re.M))
    listed = {name: value for name, value in rows.items() if "." in name and name.partition(".")[0] in vars(Config())}
    expected = {name: value for name, value in fields(Config())}
    assert listed.keys() == expected.keys()
    for name, value in expected.items():
        shown = listed[name]
        assert (shown == value) if isinstance(value, str) else (eval(shown) == value), name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_resolve_and_tell_their_command(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    if config.data.source == "table":
        config.data.path = "somewhere"
    resolve(config)
    assert f"python -m iam_jax.main --config=configs/{path.name}" in module.__doc__
    assert "Cost" in module.__doc__ and "result" in module.__doc__.lower()


def test_ci_runs_the_readmes_test_command():
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv") and "pytest" in line]
    assert len(commands) == 1
    assert commands[0] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_where_is_what_names_every_module():
    table = README[README.index("## Where is what") :]
    missing = [path.name for path in (ROOT / "iam_jax").rglob("*.py") if path.name != "__init__.py" and path.name not in table]
    assert not missing


def test_files_the_readme_names_exist():
    named = re.findall(r"`((?:iam_jax|configs|launch|benchmarks|tests)/[\w./]+?)`", README)
    assert named and not [name for name in named if not (ROOT / name).exists()]

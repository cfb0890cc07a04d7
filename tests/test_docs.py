"""What README, configs and CI tell must agree with the program."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from iam_jax.config import Config, resolve
from iam_jax.errors import InputError

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


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_resolve_and_tell_their_command(path):
    module = load(path)
    config = module.get_config()
    if config.data.source == "table":
        config.data.path = "somewhere"
    resolve(config)
    assert f"python -m iam_jax.main --config=configs/{path.name}" in module.__doc__
    assert "Cost" in module.__doc__ and "result" in module.__doc__.lower()


@pytest.mark.parametrize("name", ["llama3_1b_amazon", "qwen3_0_6b_amazon", "gpt2_ml1m", "table_pretrained"])
def test_configs_of_pretrained_models_have_two_variants(name):
    module = load(ROOT / "configs" / f"{name}.py")
    made = {}
    for variant in ("lora", "full"):
        config = module.get_config(variant)
        config.data.path = "somewhere"
        made[variant] = resolve(config)
        # The folder has no default, and nothing is frozen or trained but by the rule of train.frozen = "auto".
        assert made[variant].model.pretrained and made[variant].train.frozen == "auto" and made[variant].train.trained == ""
        assert [stage.inserted[-2:] for stage in made[variant].schedule.stages] == [(True, True)]
    lora, full = made["lora"], made["full"]
    assert lora.model.lora.rank > 0 and lora.model.frozen_dtype == "bfloat16" and full.model.lora.rank == 0
    assert lora.optimizer.learning_rate > full.optimizer.learning_rate
    assert module.get_config() == module.get_config("lora") != module.get_config("full")
    folder = " --config.data.path=DIR" if name == "table_pretrained" else ""
    for variant in ("", ":full"):
        command = f"python -m iam_jax.main --config=configs/{name}.py{variant}{folder} --config.model.pretrained="
        assert command in module.__doc__
    with pytest.raises(InputError, match="variant 'half': must be lora or full"):
        module.get_config("half")


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

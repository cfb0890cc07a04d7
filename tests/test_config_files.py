"""Configs by name, and the command that takes them from any folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from iam_jax import config_files
from iam_jax.errors import InputError

CONFIGS = Path(__file__).parents[1] / "configs"


def test_a_name_is_a_file_of_the_project():
    assert config_files.names() == sorted(path.stem for path in CONFIGS.glob("*.py")) and "demo" in config_files.names()
    assert config_files.find("demo") == str(CONFIGS / "demo.py")
    assert config_files.find("gpt2_ml1m:full") == f"{CONFIGS / 'gpt2_ml1m.py'}:full"


@pytest.mark.parametrize("path", ["demo.py", "configs/demo.py", "./demo", "mine.py:full", "/a/b.py:/c/d", ""])
def test_a_path_stays_as_it_is(path):
    assert config_files.find(path) == path


def test_an_unknown_name_is_refused_with_the_names_that_there_are():
    with pytest.raises(
        InputError, match=r"config .dmeo.: unknown name, the names are .*, demo, .*; the path of a file of your own must end in \.py"
    ):
        config_files.find("dmeo:full")


@pytest.mark.parametrize("flags", [["--config=dmeo"], ["--config", "dmeo"]])
def test_the_command_refuses_an_unknown_name_in_one_line(tmp_path, flags):
    done = subprocess.run([sys.executable, "-m", "iam_jax", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and list(tmp_path.iterdir()) == []
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: config 'dmeo': unknown name, the names are amazon_arts, ")


@pytest.mark.parametrize("flags", [["--config=demo"], ["--config", "demo"]])
def test_the_command_finds_a_config_from_any_folder(tmp_path, flags):
    # A value that the config refuses: the error shows that the config and the override were read.
    command = [sys.executable, "-m", "iam_jax.main", *flags, "--workdir", "demo", "--config.train.steps=-1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: config.train.steps = -1: must be 0 or more\n")

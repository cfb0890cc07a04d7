"""Runs as functions: the same files and figures as the command line, and one clear error each."""

import json
import signal

import pytest
from helpers import make_config, metrics_lines
from test_main import config_text, run

import iam_jax
from iam_jax import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("api")
    (folder / "tiny.py").write_text(config_text(tiny))
    run(folder, "--config=tiny.py", "--workdir=command")
    return folder


def test_train_evaluate_and_compare(folder, capsys):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    evaluation = iam_jax.train(folder / "tiny.py", folder / "call")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert evaluation == json.loads((folder / "call" / "evaluation.json").read_text())
    assert evaluation == json.loads((folder / "command" / "evaluation.json").read_text())
    assert metrics_lines(folder / "call") == metrics_lines(folder / "command")
    assert (folder / "call" / "ranks.parquet").read_bytes() == (folder / "command" / "ranks.parquet").read_bytes()

    with pytest.raises(InputError, match=r"eval\.metric = 'hr@7' was not measured") as kept:
        iam_jax.train(folder / "tiny.py", folder / "call", {"eval.metric": "hr@7", "eval.ks": (7,)})
    assert kept.tb is not None  # as a notebook keeps it: a failed call leaves no lock
    longer = iam_jax.train(folder / "tiny.py", folder / "call", {"train.steps": 8})  # goes on
    assert "continuing from step 6" in capsys.readouterr().out and longer["split_sha256"] == evaluation["split_sha256"]
    unfiltered = iam_jax.evaluate(folder / "call", step="last", overrides={"eval.filter_seen": False})
    assert unfiltered["step"] == 8 and unfiltered["protocol"]["filter_seen"] is False
    with pytest.raises(InputError, match=r"protocol\.filter_seen"):
        iam_jax.compare([folder / "command", folder / "call"])
    iam_jax.evaluate(folder / "call")
    comparison = iam_jax.compare([folder / "command", folder / "call"])
    assert "command" in str(comparison) and "NDCG@10" in str(comparison)
    comparison.write(folder / "table")
    assert (folder / "table" / "comparison.txt").read_text() == str(comparison)


def test_configs_of_every_kind(folder, tiny, monkeypatch):
    """A name, a dataclass and a ConfigDict; what is passed is left as it was."""
    monkeypatch.chdir(folder)
    overrides = {name: value for name, value in tiny.items() if name != "data.source"}
    expected = json.loads((folder / "command" / "evaluation.json").read_text())
    config = iam_jax.default_config()
    config.data.source = "synthetic"
    before = config.to_json()
    assert iam_jax.train(config, "dict", overrides) == expected and config.to_json() == before
    overrides |= {"train.steps": 0, "eval.baselines": False}
    assert iam_jax.train("demo", "name", overrides)["split_sha256"] == expected["split_sha256"]
    assert iam_jax.train(make_config(), "dataclass", overrides)["step"] == 0


@pytest.mark.parametrize(
    ("config", "overrides", "error", "named"),
    [
        ("dmeo", None, InputError, "config 'dmeo': unknown name, the names are .*demo"),
        ("absent.py", None, InputError, r"config 'absent\.py': no such file"),
        (7, None, TypeError, "config must be the path .* of a config file, a ConfigDict or a Config, not int"),
        ("demo", {"train.stesp": 1}, InputError, r"config\.train\.stesp: no such field"),
        ("demo", {"train.steps": "many"}, InputError, r"config\.train\.steps = 'many'"),
        ("demo", {"model.heads": 0}, InputError, r"config\.model\.heads"),
    ],
)
def test_bad_configs(tmp_path, config, overrides, error, named):
    with pytest.raises(error, match=named):
        iam_jax.train(config, tmp_path / "run", overrides)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(InputError, match=r"config\.json: cannot read the config of a run"):
        iam_jax.evaluate(tmp_path)
    with pytest.raises(InputError, match="a comparison needs two working folders or more"):
        iam_jax.compare([tmp_path])
    with pytest.raises(TypeError, match=r"runs is 'runs/a': give a list of working folders"):
        iam_jax.compare("runs/a")

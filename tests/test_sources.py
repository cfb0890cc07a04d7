"""Data sources: adding one takes one object, and the cached data of the built-in ones keep their names."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import polars as pl
import pytest

from iam_jax.config import DataConfig, SyntheticConfig, default_config, resolve
from iam_jax.data.prepare import prepare, read_split
from iam_jax.data.sources import Source, register, unregister
from iam_jax.data.tables import Tables
from iam_jax.devices.signals import Signals
from iam_jax.errors import InputError
from iam_jax.ranking.evaluate import Evaluator, evaluate_all
from iam_jax.registry import SOURCES, Registry
from iam_jax.training.loop import train
from iam_jax.training.run import make_run


@pytest.fixture
def add():
    """`register`, undone after the test."""
    added = []

    def add(source: Source) -> None:
        added.append(register(source).name)

    yield add
    for name in added:
        unregister(name)


def letters(config: DataConfig, users: int = 8) -> Tables:
    """Every user goes once through an alphabet, from a letter of their own."""
    alphabet = [*"abcdefghij"]
    rows = [(f"u{user}", alphabet[(user + step) % 10], step) for user in range(users) for step in range(6)]
    interactions = pl.DataFrame(rows, schema={"user": pl.String, "item": pl.String, "timestamp": pl.Int64}, orient="row")
    items = pl.DataFrame({"item": alphabet, "title": [f"the letter {letter}" for letter in alphabet]})
    return Tables(interactions, items, "letters", "the alphabet", hashlib.sha256(str(rows).encode()).hexdigest())


def next_letter(events, targets):
    return np.float64(np.arange(10) == (events.item[targets - 1][:, None] + 1) % 10)


def test_a_source_is_added_by_one_object(add, tiny, tmp_path):
    def configured():
        config = default_config()
        config.update_from_flattened_dict(tiny | {"data.source": "letters", "data.cache": str(tmp_path / "cache")})
        config.update_from_flattened_dict({"data.tokenizer": "id", "model.schedule": "full", "train.steps": 2, "log.tensorboard": False})
        return resolve(config)

    with pytest.raises(InputError, match=r"^config\.data\.source = 'letters': must be one of table, ml1m, amazon, synthetic$"):
        configured()
    loaded, refused = [], []

    def load(config, cache):
        loaded.append(cache)
        return letters(config)

    def check(config):
        if refused:
            raise InputError(refused[0])

    add(Source("letters", "letters in order", load, check=check, oracle=lambda config: next_letter))
    config = configured()
    refused.append("not today")
    with pytest.raises(InputError, match=r"^not today$"):
        configured()

    prepared = prepare(config.data)
    assert prepared.events.item_ids.tolist() == [*"abcdefghij"] and len(prepared.events.item) == 48
    assert loaded == [tmp_path / "cache"] and prepare(config.data).split.sha256 == prepared.split.sha256
    run = make_run(config, prepared)
    with jax.set_mesh(run.mesh):
        evaluator = Evaluator(run.model, config, prepared, run.mesh)
        checkpoints = train(run, tmp_path / "run", evaluator, Signals())
        step, params = checkpoints.load_params("best", run.abstract_trained)
        results = evaluate_all(evaluator, params, step, tmp_path / "run", SOURCES[config.data.source].oracle(config.data))["results"]
    assert step == 2 and results["model"]["test"]["events"] == 8
    assert results["oracle"]["test"]["ndcg@10"] == 1.0  # its scores are those of the source


def test_an_identity_saves_the_loading(add, tmp_path):
    loaded = []

    def load(config, _):
        loaded.append(config.category)
        return letters(config)

    config = DataConfig(source="letters", category="a", cache=str(tmp_path), vocabulary=300)
    add(Source("letters", "letters in order", load, identity=lambda config: ["letters", config.category]))
    first, second = prepare(config), prepare(config)
    assert first.split.sha256 == second.split.sha256 and loaded == ["a"]
    prepare(dataclasses.replace(config, category="b"))
    assert loaded == ["a", "b"] and len([*tmp_path.glob("split-*")]) == 2


def test_what_a_source_loads_is_checked(add, tmp_path):
    add(
        Source(
            "letters", "letters in order", lambda config, cache: dataclasses.replace(letters(config), items=letters(config).items.head(9))
        )
    )
    with pytest.raises(InputError, match=r"^letters: column 'item': 1 unknown item, absent from the alphabet: 'j' \(row 30\), "):
        prepare(DataConfig(source="letters", cache=str(tmp_path / "cache")))
    assert not (tmp_path / "cache").exists()


def test_a_registry():
    one, again = Source("one", "", letters), Source("one", "again", letters)
    registry = Registry("data source", {"two": "iam_jax.nowhere:TWO"})
    assert registry.register(one) is one and registry["one"] is one
    assert [*registry] == ["two", "one"] and "two" in registry and "three" not in registry  # known without being imported
    with pytest.raises(ModuleNotFoundError):
        registry["two"]
    registry.register(again)
    assert registry["one"] is again and len(registry) == 2
    with pytest.raises(ValueError, match=r"^the data source 'two' belongs to iam_jax: choose another name$"):
        registry.register(dataclasses.replace(one, name="two"))
    registry.unregister("one")
    assert "one" not in registry
    for name in ("one", "two"):
        with pytest.raises(ValueError, match=f"^'{name}' is not a registered data source$"):
            registry.unregister(name)
    with pytest.raises(KeyError):
        registry["one"]


def test_every_source_is_described():
    for name, source in SOURCES.items():
        assert source.name == name and source.meaning and "\n" not in source.meaning


IMPORTS = """
import json, sys
from iam_jax.config import default_config, resolve
heavy = "polars", "jax", "tensorflow_datasets", "flax"
after = [[name for name in heavy if name in sys.modules]]
for fields in ({"source": "amazon", "category": "toys"}, {"source": "ml1m"}, {"source": "synthetic"}, {"path": "tables"}):
    config = default_config()
    config.data.update(fields)
    resolve(config)
after.append([name for name in heavy if name in sys.modules])
print(json.dumps(after))
"""


def test_a_config_is_checked_without_heavy_libraries():
    out = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True).stdout
    imported, resolved = json.loads(out)
    assert imported == [] and not {"jax", "tensorflow_datasets", "flax"} & set(resolved)


# ---- what is cached


def cached(config: DataConfig, cache: Path) -> tuple[str, str, str]:
    """The names of a source's two folders of prepared data, and the split's hash."""
    prepared = prepare(dataclasses.replace(config, cache=str(cache), vocabulary=300, row_tokens=128, context_items=1))
    split, catalogue = ([path.name for path in cache.glob(f"{kind}-*")] for kind in ("split", "catalogue"))
    return *split, *catalogue, prepared.split.sha256


@pytest.fixture
def written(tmp_path):
    """Files of every source that reads files, as their own tests write them."""
    import test_amazon
    import test_movielens
    import test_prepare

    test_prepare.write(tmp_path / "tables", "interactions", test_prepare.COLUMNS["interactions"], test_prepare.EVENTS)
    test_prepare.write(tmp_path / "tables", "items", test_prepare.COLUMNS["items"], test_prepare.ITEMS)
    test_movielens.write_zip(tmp_path / "ml1m")
    test_amazon.write(tmp_path / "amazon", 2014)
    return tmp_path


# Prepared data of earlier versions are found again: these are the names that version 0.1.0 gave.
NAMES = {
    "table": (
        "split-6c1e7bff141bd28fcdd5b83393f57f03", "catalogue-aebda7883c77446b28c3d36f1c448bb9",
        "50711fe9050a22d21b49928bec552eb396e7ac5673d4123054ec36e64286331f",
    ),
    "ml1m": (
        "split-b2f0fd42dab6df33dcc9d790f07d151a", "catalogue-48822338ecfbe1499e5a2b5f8c66c1a7",
        "7605b78cba34730148c559b98b6b8b6d1ff80843ac9eb121cbbccbb3a4181890",
    ),
    "amazon": (
        "split-60afdc554dc8736720aa8e767d0df10b", "catalogue-8091bff0bab273b6202f61a51f36a334",
        "7e7d04c9de57013fc3176a14e1216472eabc29b62e3ea9eff47b6ceb7fea83fd",
    ),
    "synthetic": (
        "split-26805f0488cc25564a4cd5b9f100ed40", "catalogue-67ddce42e339d8cda5d934a62d8fc7d4",
        "efcb83aa84d9dc63dabbca9e24aed744e062753c9ab7bc30f845ff5e6a3a2a7d",
    ),
}  # fmt: skip


@pytest.mark.parametrize("source", NAMES)
def test_cached_data_keep_their_names(written, source):
    path = written / ("tables" if source == "table" else source)
    fields = {"amazon": {"category": "toys", "untitled": "id"}, "synthetic": {"synthetic": SyntheticConfig(users=20, products=60)}}
    config = DataConfig(source=source, path="" if source == "synthetic" else str(path), **fields.get(source, {}))
    assert cached(config, written / "cache") == NAMES[source]


def test_prepared_data_of_a_version_without_facts(written, tmp_path):
    config = DataConfig(source="table", path=str(written / "tables"), cache=str(tmp_path))
    fresh = read_split(config)
    (file,) = tmp_path.glob("split-*/split.json")
    saved = json.loads(file.read_text())
    assert saved.pop("facts") == fresh.facts and saved["notes"].pop() == fresh.notes[-1]
    file.write_text(json.dumps(saved))
    again = read_split(config)
    assert (again.facts, again.notes, again.sha256) == (fresh.facts, fresh.notes, fresh.sha256)
    for change in ({"ties": "file"}, {"ties": "item"}, {"duplicates": "drop"}):
        read_split(dataclasses.replace(config, **change))
    assert len([*tmp_path.glob("split-*")]) == 4


@pytest.mark.parametrize("source", ["ml1m", "amazon"])
def test_tables_stand_in_for_the_originals_of_a_public_source(written, source):
    assert cached(DataConfig(source=source, path=str(written / "tables")), written / "cache") == NAMES["table"]

"""From tables on disk to prepared data: checked completely, cached by content, never partly written."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from iam_jax.config import DataConfig, SyntheticConfig
from iam_jax.data import prepare as prepare_lib
from iam_jax.data import tables as tables_lib
from iam_jax.data.prepare import prepare
from iam_jax.data.tokenizer import Vocabulary
from iam_jax.errors import InputError

ITEMS = [("a", "red lantern", "Orlo"), ("b", "blue kettle", ""), ("木 ", "red &amp; blue", "Venn"), ("007", "lamp", "")]
EVENTS = [("u", "a", "1"), ("u", "b", "2"), ("u", "木 ", "3"), ("v", "a", "9")]
EVENTS += [("NA", "b", "2"), ("NA", "a", "5"), ("NA", "007", "4")]
COLUMNS = {"interactions": ("user", "item", "timestamp"), "items": ("item", "title", "brand")}


def write(folder: Path, name: str, columns: tuple, rows) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.tsv").write_text("".join("\t".join(row) + "\n" for row in [columns, *rows]), encoding="utf-8")


@pytest.fixture
def config(tmp_path):
    write(tmp_path / "data", "interactions", COLUMNS["interactions"], EVENTS)
    write(tmp_path / "data", "items", COLUMNS["items"], ITEMS)
    return DataConfig(path=str(tmp_path / "data"), cache=str(tmp_path / "cache"), vocabulary=300, row_tokens=128)


def same(first, second):
    events, again = first.events, second.events
    for field in dataclasses.fields(events):
        left, right = getattr(events, field.name), getattr(again, field.name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    assert first.split.items.equals(second.split.items)
    assert (first.split.sha256, first.split.notes) == (second.split.sha256, second.split.notes)
    assert first.catalogue.sha256 == second.catalogue.sha256


def test_events_and_catalogue_agree(config):
    prepared = prepare(config)
    events, catalogue = prepared.events, prepared.catalogue
    assert events.user_ids.tolist() == ["NA", "u", "v"] and events.item_ids.tolist() == ["007", "a", "b", "木 "]
    assert events.item_ids[events.item].tolist() == ["b", "007", "a", "a", "b", "木 ", "a"]
    assert events.timestamp.tolist() == [2, 4, 5, 1, 2, 3, 9]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(catalogue.tokenizer_json)
    texts = [tokenizer.decode(list(tokens[:-1])).strip() for tokens in np.split(catalogue.tokens, catalogue.offsets[1:-1])[:4]]
    assert texts == ["lamp", "red lantern", "blue kettle", "red & blue"]  # in the order of item_ids


def test_the_second_call_parses_nothing(config, monkeypatch, tmp_path):
    first = prepare(config)

    def never(*_, **__):
        raise AssertionError("a cache hit parses, splits and tokenises nothing")

    with monkeypatch.context() as patch:
        for module, name in [
            (tables_lib, "load_tables"),
            (tables_lib, "read_table"),
            (prepare_lib, "make_split"),
            (prepare_lib, "_load"),
        ]:
            patch.setattr(module, name, never)
        patch.setattr("iam_jax.data.tokenizer.train_bpe", never)
        patch.setattr("iam_jax.data.tokenizer.encode", never)
        same(first, prepare(config))
        # Settings that affect neither the split nor the tokens are not part of the key, nor is the name of the folder.
        same(first, prepare(dataclasses.replace(config, row_tokens=500, context_items=2)))
        (tmp_path / "data").rename(tmp_path / "moved")
        moved = dataclasses.replace(config, path=str(tmp_path / "moved"))
        same(first, prepare(moved))
        # Any other content or setting is read again, so the patches above are effective.
        with pytest.raises(AssertionError, match="a cache hit"):
            prepare(dataclasses.replace(moved, last_n=2))
    write(tmp_path / "moved", "interactions", COLUMNS["interactions"], [*EVENTS, ("v", "b", "10")])
    changed = prepare(moved)
    assert changed.split.sha256 != first.split.sha256 and len(changed.events.item) == 8
    write(tmp_path / "moved", "interactions", COLUMNS["interactions"], EVENTS)
    write(tmp_path / "moved", "items", COLUMNS["items"], [("a", "green lantern", "Orlo"), *ITEMS[1:]])
    retitled = prepare(moved)
    assert retitled.split.sha256 == first.split.sha256 and retitled.catalogue.sha256 != first.catalogue.sha256


TEMPORAL = {"split": "temporal", "t1": "3", "t2": "5"}


CHANGES = [{"last_n": 2}, {"k_core": 2}, TEMPORAL, TEMPORAL | {"t2": "9"}]
CHANGES += [{"untitled": "id"}, {"tokenizer": "id", "untitled": "error"}, {"text": "{brand}"}, {"unseen_items": 0.3}]


@pytest.mark.parametrize("change", CHANGES)
def test_every_setting_that_affects_a_split_is_in_its_key(config, change):
    write(Path(config.path), "interactions", COLUMNS["interactions"], [*EVENTS, ("v", "z", "3")])
    write(Path(config.path), "items", COLUMNS["items"], [*ITEMS, ("z", "", "Orlo")])
    config = dataclasses.replace(config, untitled="drop", **(TEMPORAL if "t2" in change else {}))
    change = {"split": "leave_one_out"} if change == TEMPORAL else change
    first, second = prepare(config), prepare(dataclasses.replace(config, **change))
    assert first.split.sha256 != second.split.sha256
    same(second, prepare(dataclasses.replace(config, **change, cache=config.cache + "2")))  # and in an empty cache


def test_shuffled_order_shares_the_prepared_data(config):
    first, second = prepare(config), prepare(dataclasses.replace(config, shuffled_order=True))
    assert first.split.sha256 == second.split.sha256 and first.catalogue.sha256 == second.catalogue.sha256
    assert len([*Path(config.cache).glob("split-*")]) == 1
    assert second.split.notes[-1].startswith("data.shuffled_order: ") and len(second.split.notes) == len(first.split.notes) + 1
    targets = first.events.label > 0
    assert (first.events.item == second.events.item)[targets].all()


def test_with_drop_id_tokens_have_the_candidates_of_text_tokens(config):
    write(Path(config.path), "interactions", COLUMNS["interactions"], [*EVENTS, ("v", "z", "3")])
    write(Path(config.path), "items", COLUMNS["items"], [*ITEMS, ("z", "", "Orlo")])
    config = dataclasses.replace(config, untitled="drop")
    text, ids = prepare(config), prepare(dataclasses.replace(config, tokenizer="id"))
    assert "z" not in text.events.item_ids
    assert text.split.sha256 == ids.split.sha256 and text.events.item_ids.tolist() == ids.events.item_ids.tolist()


BAD = {  # error -> changes of the config, tables that replace the valid ones, and parts of the message
    "unknown item": ({}, {"interactions": [("u", "nowhere", "1")]}, "nowhere"),
    "bad timestamp": ({}, {"interactions": [("u", "a", "soon")]}, "soon"),
    "no events": ({}, {"interactions": []}, "no rows"),
    "duplicate item": ({}, {"items": [*ITEMS, ITEMS[0]]}, "more than once"),
    "untitled item": ({}, {"items": [*ITEMS, ("z", "", "Orlo")]}, "untitled"),
    "no such column": ({"text": "{name}"}, {}, "{name}"),
    "no such column, ids as text": ({"text": "{name}", "untitled": "id"}, {}, "{name}"),
    "no template": ({"text": "{title", "untitled": "id"}, {}, "is not a template"),
    "no such folder": ({"path": "/nowhere"}, {}, "/nowhere: no such folder"),
    "no such tokenizer": ({"tokenizer": "/nowhere.json"}, {}, "/nowhere.json"),
    "k-core": ({"k_core": 9}, {}, "config.data.k_core = 9"),
    "bounds": ({"split": "temporal", "t1": "3", "t2": "3"}, {}, "config.data.t1"),
    "nothing left": ({"untitled": "drop"}, {"interactions": [("u", "nowhere", "1")]}, "no interaction is left"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_writes_nothing(config, case):
    change, tables, what = BAD[case]
    for name, rows in tables.items():
        write(Path(config.path), name, COLUMNS[name], rows)
    with pytest.raises(InputError) as caught:
        prepare(dataclasses.replace(config, **change))
    assert what in str(caught.value) and "\n" not in str(caught.value)
    assert not Path(config.cache).exists()


def test_rows_that_cannot_hold_the_context(config):
    longest = int(prepare(config).catalogue.lengths.max())
    exact = dataclasses.replace(config, context_items=2, row_tokens=3 * longest)
    prepare(exact)
    with pytest.raises(InputError, match=rf"config\.data\.row_tokens = {3 * longest - 1} is too small.* need {3 * longest}$"):
        prepare(dataclasses.replace(exact, row_tokens=3 * longest - 1))
    # A prompt and a suffix are needed once per row, a separator once per item.
    long = "a long text around the history of every single user: "
    framed = dataclasses.replace(config, prompt=long, suffix="and " + long, separator=" - ", context_items=2, row_tokens=500)
    catalogue = prepare(framed).catalogue
    size, item = catalogue.prompt_tokens + catalogue.suffix_tokens, int(catalogue.item_lengths.max())
    assert catalogue.suffix_tokens > catalogue.prompt_tokens > item > longest
    prepare(dataclasses.replace(framed, row_tokens=size + 3 * item))
    what = rf"too small: prompt, suffix and 2 \+ 1 items .* of up to {item} tokens need {size + 3 * item}$"
    with pytest.raises(InputError, match=what):
        prepare(dataclasses.replace(framed, row_tokens=size + 3 * item - 1))


def test_a_pretrained_tokenizer_is_checked_before_the_data_is_read(config, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["red", "lantern", "blue", "kettle", "&", "lamp", "next"]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    given = Vocabulary(tmp_path / "tokenizer.json", 7)
    config = dataclasses.replace(config, tokenizer="pretrained", separator="next")
    elsewhere = dataclasses.replace(config, path="/nowhere")
    with pytest.raises(InputError, match=r"tokenizer\.json: tokenizer of another vocabulary size: .* 7 rows, .* has 9$"):
        prepare(elsewhere, given._replace(size=9))
    with pytest.raises(InputError, match=r"absent\.json: no such file"):
        prepare(elsewhere, given._replace(path=tmp_path / "absent.json"))
    with pytest.raises(InputError, match="/nowhere: no such folder"):
        prepare(elsewhere, given)
    assert not Path(config.cache).exists()
    catalogue = prepare(config, given).catalogue  # lamp, red lantern, blue kettle, red & blue
    assert catalogue.tokens.tolist() == [6, 5, 7, 6, 0, 1, 7, 6, 2, 3, 7, 6, 0, 4, 2, 7] and catalogue.vocabulary == 8
    assert prepare(config, given).catalogue.sha256 == catalogue.sha256


def test_an_interrupted_preparation_leaves_nothing(config, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    assert list(Path(config.cache).iterdir()) == []
    monkeypatch.undo()
    assert prepare(config).events.item.size == 7


def test_unknown_items_only_where_they_are_dropped(config):
    write(Path(config.path), "interactions", COLUMNS["interactions"], [*EVENTS, ("u", "nowhere", "9")])
    with pytest.raises(InputError, match="nowhere"):
        prepare(config)
    dropped = prepare(dataclasses.replace(config, untitled="drop"))
    assert "removed 1 interactions with items that are not in the items table" in dropped.split.notes
    assert len(dropped.events.item) == 7


def test_synthetic(config, monkeypatch):
    config = dataclasses.replace(config, source="synthetic", synthetic=SyntheticConfig(users=20, products=60))
    first = prepare(config)
    assert len(first.events.user_ids) == 20 and first.catalogue.items == 60
    assert prepare(dataclasses.replace(config, synthetic=SyntheticConfig(20, 60, seed=1))).split.sha256 != first.split.sha256
    monkeypatch.setattr(prepare_lib, "_load", None)
    same(first, prepare(config))

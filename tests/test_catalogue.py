"""Items as text and tokens, the tokenizers, and the cache of prepared data."""

import dataclasses
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from iam_jax.config import DataConfig
from iam_jax.data import catalogue as catalogue_lib
from iam_jax.data import tokenizer as tokens_lib
from iam_jax.data.cache import cache_root, cached_folder
from iam_jax.data.catalogue import has_text, item_texts, make_catalogue
from iam_jax.data.tokenizer import Vocabulary
from iam_jax.errors import InputError
from iam_jax.storage.files import write_atomically

TITLES = ["red lantern", "blue lantern", "red kettle", "a very long title about a blue kettle", "Café 木", "red lantern"]
ITEMS = pl.DataFrame({"item": list("abcdef"), "title": TITLES, "brand": ["Orlo", "", "Venn", "Orlo", "", ""]})
CONFIG = DataConfig(vocabulary=300, item_tokens=16)


def tokens_of(catalogue):
    """The tokens of each item, then the prompt's and the suffix's."""
    return [tokens.tolist() for tokens in np.split(catalogue.tokens, catalogue.offsets[1:-1])]


def word_tokenizer(path, words, ids=None):
    """A tokenizer.json that knows only `words`, one token each."""
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)} if ids is None else ids))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return str(path)


def texts(template, **columns):
    items = pl.DataFrame({"item": ["x"], **{name: [value] for name, value in columns.items()}})
    return item_texts(items, DataConfig(text=template))


@pytest.mark.parametrize(
    "template,columns,text",
    [
        ("{title}", {"title": "red lantern"}, "red lantern"),
        ("{title} by {brand}", {"title": "lamp", "brand": "Orlo"}, "lamp by Orlo"),
        ("{title} | {brand}", {"title": "lamp", "brand": ""}, "lamp"),  # the separator goes with the empty column
        ("{title} | {brand}", {"title": "", "brand": "Orlo"}, "Orlo"),
        ("Item: {title}, {brand}.", {"title": "lamp", "brand": ""}, "Item: lamp."),
        ("{title} | {brand}", {"title": "", "brand": " "}, ""),  # literal text alone does not count as text
        ("{{{title}}} {item}", {"title": "lamp"}, "{lamp} x"),
        ("{a.b}", {"a.b": "dotted", "a": "not this"}, "dotted"),
        ("{title}", {"title": "Fisher &amp; Price&nbsp;&#39;new&#39;\t  &lt;toy&gt;\n"}, "Fisher & Price 'new' <toy>"),
        ("{title}", {"title": "&nbsp;"}, ""),
        ("{title}{title}", {"title": "ab"}, "abab"),
    ],
)
def test_template(template, columns, text):
    assert texts(template, **columns) == [text]


@pytest.mark.parametrize(
    "template,what",
    [
        ("{name}", "uses {name}; the items table has item, title"),
        ("{title} {0}", "uses {0}"),
        ("no column", "uses no column; the items table has item, title"),
        ("", "uses no column"),
        ("{{title}}", "uses no column"),
        ("{title", "is not a template"),
        ("title}", "is not a template"),
        ("{}", "is not a template"),
        ("{title!r}", "is not a template"),
        ("{title:>9}", "is not a template"),
    ],
)
def test_wrong_template(template, what):
    with pytest.raises(InputError, match=r"^config\.data\.text = ") as caught:
        texts(template, title="lamp")
    assert what in str(caught.value) and repr(template) in str(caught.value)
    if "item" not in template:
        with pytest.raises(InputError):  # also where every item counts
            has_text(pl.DataFrame({"item": ["x"], "title": ["t"]}), DataConfig(text=template, untitled="id"))


def test_has_text():
    items = pl.DataFrame({"item": ["x", "y"], "title": ["lamp", "&nbsp; "]})
    assert has_text(items, DataConfig()).tolist() == [True, False]
    assert has_text(items, DataConfig(untitled="id")).tolist() == [True, True]
    assert has_text(items, DataConfig(tokenizer="id", text="{nowhere}")).tolist() == [True, True]  # text is never read


def test_tokens_spell_the_titles(tmp_path):
    catalogue = make_catalogue(ITEMS, CONFIG, tmp_path)
    *items, prompt, suffix = tokens_of(catalogue)
    tokenizer = Tokenizer.from_str(catalogue.tokenizer_json)
    boundary = tokenizer.get_vocab_size()
    for title, tokens in zip(TITLES, items, strict=True):
        assert tokens[-1] == boundary and boundary not in tokens[:-1]
        if tokens[:-1] and len(tokens) <= CONFIG.item_tokens:
            assert tokenizer.decode(tokens[:-1]).strip() == title
    assert prompt == suffix == [] and not catalogue.prompt and not catalogue.suffix
    assert catalogue.vocabulary == boundary + 1 and catalogue.items == 6
    assert items[0] == items[5]
    # The first word of a title is the same token as inside one.
    assert set(tokenizer.encode("lantern").ids) <= set(items[0])
    assert tokens_lib.encode(tokenizer, ["lantern"])[0] == items[0][-1 - len(tokenizer.encode("lantern").ids) : -1]

    padded, lengths = catalogue.padded()
    assert padded.shape == (6, max(map(len, items))) and padded.dtype == lengths.dtype == np.int32
    for row, length, tokens in zip(padded, lengths, items, strict=True):
        assert row.tolist() == tokens + [0] * (padded.shape[1] - len(tokens)) and length == len(tokens)


def test_long_texts_are_truncated_and_counted(tmp_path):
    whole = make_catalogue(ITEMS, dataclasses.replace(CONFIG, item_tokens=100), tmp_path)
    cut = make_catalogue(ITEMS, dataclasses.replace(CONFIG, item_tokens=3), tmp_path)
    long = sum(len(tokens) > 4 for tokens in tokens_of(whole))
    assert whole.truncated == 0 and cut.truncated == long > 0
    for full, short in zip(tokens_of(whole)[:6], tokens_of(cut)[:6], strict=True):
        assert short == full[:-1][:3] + full[-1:]
    exact = make_catalogue(ITEMS, dataclasses.replace(CONFIG, item_tokens=int(whole.lengths.max()) - 1), tmp_path)
    assert exact.truncated == 0 and exact.sha256 == whole.sha256 != cut.sha256


def test_prompt(tmp_path):
    catalogue = make_catalogue(ITEMS, dataclasses.replace(CONFIG, prompt="red things:", item_tokens=2), tmp_path)
    plain = make_catalogue(ITEMS, dataclasses.replace(CONFIG, item_tokens=2), tmp_path)
    assert tokens_of(catalogue)[:6] == tokens_of(plain)[:6]
    prompt = tokens_of(catalogue)[6]  # whole, and without boundary token
    assert Tokenizer.from_str(catalogue.tokenizer_json).decode(prompt).strip() == "red things:"
    assert catalogue.prompt and catalogue.prompt_tokens == len(prompt) > 2 and catalogue.items == 6
    assert not catalogue.suffix and catalogue.frame_tokens == len(prompt) and plain.frame_tokens == 0
    assert catalogue.padded()[0].tolist() == plain.padded()[0].tolist()


def test_separator_and_suffix(tmp_path):
    """Each is encoded separately, so its ids do not depend on adjacent text."""
    words = ["red", "lantern", "kettle", "item", "next", "buys"]  # 0, 1, …; the boundary is 6
    path = word_tokenizer(tmp_path / "tokenizer.json", words)
    items = pl.DataFrame({"item": list("ab"), "title": ["red lantern kettle", "kettle"]})
    config = DataConfig(tokenizer=path, prompt="buys", separator="next item", suffix="item item next", item_tokens=2)
    catalogue = make_catalogue(items, config, tmp_path)
    # Two text tokens, the separator's two not counted; the first item has one too.
    assert tokens_of(catalogue) == [[4, 3, 0, 1, 6], [4, 3, 2, 6], [5], [3, 3, 4]]
    assert catalogue.truncated == 1 and catalogue.vocabulary == 7 and catalogue.items == 2
    assert catalogue.lengths.tolist() == [5, 4, 1, 3] and catalogue.item_lengths.tolist() == [5, 4]
    assert (catalogue.prompt_tokens, catalogue.suffix_tokens, catalogue.frame_tokens) == (1, 3, 4)
    assert catalogue.prompt and catalogue.suffix
    padded, lengths = catalogue.padded()
    assert padded.tolist() == [[4, 3, 0, 1, 6], [4, 3, 2, 6, 0]] and lengths.tolist() == [5, 4]
    # The same tokens as prompt and as suffix give different catalogues.
    front, back = (make_catalogue(items, DataConfig(tokenizer=path, **{field: "buys"}), tmp_path) for field in ("prompt", "suffix"))
    assert front.tokens.tolist() == back.tokens.tolist() and front.sha256 != back.sha256
    assert (front.prompt, front.suffix, back.prompt, back.suffix) == (True, False, False, True)


def test_id_tokens(tmp_path):
    catalogue = make_catalogue(ITEMS.select("item"), DataConfig(tokenizer="id"), tmp_path / "never")
    assert tokens_of(catalogue) == [[0], [1], [2], [3], [4], [5], [], []]
    assert catalogue.vocabulary == catalogue.items == 6 and not catalogue.prompt and catalogue.tokenizer_json == ""
    assert not (tmp_path / "never").exists()


def test_item_ids_as_text(tmp_path):
    items = pl.DataFrame({"item": ["B007", "x"], "title": ["", "lamp"]})
    catalogue = make_catalogue(items, dataclasses.replace(CONFIG, untitled="id"), tmp_path)
    tokenizer = Tokenizer.from_str(catalogue.tokenizer_json)
    assert [tokenizer.decode(tokens[:-1]).strip() for tokens in tokens_of(catalogue)[:2]] == ["B007", "lamp"]


def test_given_tokenizer(tmp_path):
    words = ["red", "lantern", "kettle", "blue"]
    path = word_tokenizer(tmp_path / "tokenizer.json", words)
    items = pl.DataFrame({"item": list("abc"), "title": ["red lantern", "blue kettle kettle", "red"]})
    config = DataConfig(tokenizer=path, prompt="blue red", item_tokens=2)
    catalogue = make_catalogue(items, config, tmp_path)
    assert tokens_of(catalogue) == [[0, 1, 4], [3, 2, 4], [0, 4], [3, 0], []]
    assert catalogue.vocabulary == 5 and catalogue.truncated == 1
    assert json.loads(catalogue.tokenizer_json)["model"]["vocab"]["lantern"] == 1
    # The content of the file counts, not its name: another vocabulary at the same path gives another catalogue.
    word_tokenizer(tmp_path / "tokenizer.json", words[::-1])
    assert tokens_of(make_catalogue(items, config, tmp_path)) == [[3, 2, 4], [0, 1, 4], [3, 4], [0, 3], []]


def test_a_vocabulary_with_gaps(tmp_path):
    """The boundary token is larger than every token, also if the vocabulary is not 0, 1, 2, …"""
    path = word_tokenizer(tmp_path / "gaps.json", [], {"red": 0, "lantern": 7})
    catalogue = make_catalogue(pl.DataFrame({"item": ["a"], "title": ["red lantern"]}), DataConfig(tokenizer=path), tmp_path)
    assert tokens_of(catalogue)[0] == [0, 7, 8] and catalogue.vocabulary == 9


def llama_tokenizer(path, added=()):
    """A tokenizer.json of words that adds <s> (id 1) before every input, as LLaMA's do."""
    words = ["<unk>", "<s>", "</s>", "once", "upon", "a", "time", "lamp"]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # would cut "<s>" into three
    tokenizer.add_special_tokens(words[:3] + list(added))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(path))
    return Vocabulary(path, 8)


def test_a_pretrained_tokenizer(tmp_path):
    given = llama_tokenizer(tmp_path / "tokenizer.json")
    items = pl.DataFrame({"item": list("ab"), "title": ["lamp time", "lamp"]})
    config = DataConfig(tokenizer="pretrained", prompt="<s>once upon", separator="a", suffix="a time", item_tokens=1)
    catalogue = make_catalogue(items, config, tmp_path / "cache", given)
    # <s> only where it is spelled out; the boundary token is the first row beyond the embedding.
    assert tokens_of(catalogue) == [[5, 7, 8], [5, 7, 8], [1, 3, 4], [5, 6]] and catalogue.vocabulary == 9
    assert tokens_of(make_catalogue(items, dataclasses.replace(config, prompt="once"), tmp_path / "cache", given))[2] == [3]
    assert json.loads(catalogue.tokenizer_json)["model"]["vocab"]["lamp"] == 7
    with pytest.raises(ValueError, match="needs the pretrained model's Vocabulary"):
        make_catalogue(items, config, tmp_path / "cache")


def test_a_padded_embedding_puts_the_boundary_beyond_it(tmp_path):
    """An embedding may have up to 5 % more rows than the tokenizer has ids (special tokens counted), never fewer."""
    path = tmp_path / "tokenizer.json"
    llama_tokenizer(path, added=[f"<{n}>" for n in range(87)])  # highest id 94
    items = pl.DataFrame({"item": ["a"], "title": ["lamp"]})
    config = DataConfig(tokenizer="pretrained")
    for size in (95, 100):
        catalogue = make_catalogue(items, config, tmp_path / "cache", Vocabulary(path, size))
        assert tokens_of(catalogue)[0] == [7, size] and catalogue.vocabulary == size + 1
    for size in (94, 101, 9500):
        what = rf"tokenizer\.json: tokenizer of another vocabulary size: .* 95 rows, .* has {size:,}$"
        with pytest.raises(InputError, match=what):
            make_catalogue(items, config, tmp_path / "cache", Vocabulary(path, size))
    with pytest.raises(InputError, match=r"nowhere\.json: no such file"):
        make_catalogue(items, config, tmp_path / "cache", Vocabulary(tmp_path / "nowhere.json", 8))


STORIES = Path(__file__).parents[2] / "shared" / "data" / "tiny-llama-stories" / "tokenizer.json"


@pytest.mark.skipif(not STORIES.exists(), reason="the checkpoint tiny-llama-stories is not here")
def test_a_real_llama_tokenizer(tmp_path):
    tokenizer = tokens_lib.load_pretrained(Vocabulary(STORIES, 105))
    (title,) = tokens_lib.encode(tokenizer, ["<s>Once upon a time"])
    assert 1 not in title and tokenizer.decode(title) == "<s>Once upon a time"  # titles are text, not special tokens
    (spelled,), (plain,) = (tokens_lib.encode(tokenizer, [text], special=True) for text in ("<s>Once upon a time", "Once upon a time"))
    assert spelled == [1, *plain] == tokenizer.encode("Once upon a time").ids and 1 not in plain


def test_no_special_tokens_no_truncation_no_padding(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "red": 1, "lantern": 2, "<pad>": 3}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(pad_id=3, pad_token="<pad>", length=8)
    assert tokenizer.encode("red lantern red").ids == [0, 1, 3, 3, 3, 3, 3, 3]
    assert tokens_lib.encode(tokenizer, ["red lantern red", "lantern"]) == [[1, 2, 1], [2]]


def test_wrong_tokenizers(tmp_path):
    with pytest.raises(InputError, match=r"config\.data\.tokenizer = .*nowhere\.json'?: no such file"):
        tokens_lib.load_tokenizer(tmp_path / "nowhere.json")
    for content in (b"no json", b"\xff", b'{"a": 1}'):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.json: not a tokenizer\.json"):
            tokens_lib.load_tokenizer(tmp_path / "bad.json")
    items = pl.DataFrame({"item": ["a", "b"], "title": ["red", "木"]})
    cache = tmp_path / "cache"
    path = word_tokenizer(tmp_path / "words.json", ["red"])
    with pytest.raises(InputError, match=r"config\.data\.tokenizer cannot encode"):
        make_catalogue(items, DataConfig(tokenizer=path), cache)
    path = str(tmp_path / "letters.json")
    Tokenizer(models.BPE({"r": 0, "e": 1, "d": 2}, [])).save(path)  # drops what it does not know
    with pytest.raises(InputError, match=r"produces no token for the text of 1 items \(item 'b'\)"):
        make_catalogue(items, DataConfig(tokenizer=path), cache)
    for field in ("prompt", "separator", "suffix"):
        with pytest.raises(InputError, match=rf"produces no token for config\.data\.{field} = '木'"):
            make_catalogue(items[:1], DataConfig(tokenizer=path, **{field: "木"}), cache)
    assert not cache.exists()


def test_bpe_is_the_same_every_time_and_for_any_order_of_the_items():
    words = ["red", "blue", "lantern", "lamp", "kettle", "Orlo", "Café", "木", "24in", "x"]
    rng = np.random.default_rng(0)
    corpus = [" ".join(rng.choice(words, 4)) for _ in range(200)]
    first = tokens_lib.train_bpe(corpus, 400).to_str()
    assert all(tokens_lib.train_bpe(corpus, 400).to_str() == first for _ in range(3))
    assert tokens_lib.train_bpe(corpus[:100], 400).to_str() != first
    small = tokens_lib.train_bpe(corpus, 256)
    assert small.get_vocab_size() == 256  # bytes alone: any text can still be encoded
    assert small.decode(tokens_lib.encode(small, ["日本 \x00 é"])[0]).strip(" ") == "日本 \x00 é"
    assert 256 < Tokenizer.from_str(first).get_vocab_size() <= 400


def test_the_order_of_the_items_does_not_matter(tmp_path):
    order = [3, 1, 5, 0, 2, 4]
    straight, mixed = (make_catalogue(ITEMS[rows], CONFIG, tmp_path) for rows in (range(6), order))
    assert straight.tokenizer_json == mixed.tokenizer_json
    assert tokens_of(mixed)[:6] == [tokens_of(straight)[k] for k in order]


def test_shuffled_titles_are_a_permutation(tmp_path):
    titles = [f"title {n}" for n in range(50)]
    items = pl.DataFrame({"item": [f"{n:03}" for n in range(50)], "title": titles})
    straight = make_catalogue(items, CONFIG, tmp_path)
    shuffled, again = (make_catalogue(items, dataclasses.replace(CONFIG, shuffled_titles=True), tmp_path) for _ in range(2))
    before, after = tokens_of(straight)[:50], tokens_of(shuffled)[:50]
    assert Counter(map(tuple, before)) == Counter(map(tuple, after))
    assert sum(a == b for a, b in zip(before, after, strict=True)) < 10
    assert shuffled.tokenizer_json == straight.tokenizer_json and shuffled.sha256 == again.sha256 != straight.sha256


def test_cache_hit_by_content(tmp_path, monkeypatch):
    first = make_catalogue(ITEMS, CONFIG, tmp_path)
    calls = []
    train = tokens_lib.train_bpe
    monkeypatch.setattr(catalogue_lib.tokens_lib, "train_bpe", lambda *a: calls.append(a) or train(*a))
    again = make_catalogue(ITEMS.with_columns(pl.lit("not in the template").alias("new")), CONFIG, tmp_path)
    assert not calls and len(list(tmp_path.iterdir())) == 1
    for field in dataclasses.fields(first):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(first, field.name))
    changed = ITEMS.with_columns(pl.col("title").str.replace("kettle", "teapot"))
    for number, (items, config) in enumerate(
        [
            (changed, CONFIG),
            (ITEMS, dataclasses.replace(CONFIG, item_tokens=5)),
            (ITEMS, dataclasses.replace(CONFIG, vocabulary=290)),
            (ITEMS, dataclasses.replace(CONFIG, prompt="red")),
            (ITEMS, dataclasses.replace(CONFIG, separator="red")),
            (ITEMS, dataclasses.replace(CONFIG, suffix="red")),
            (ITEMS, dataclasses.replace(CONFIG, text="{title} {brand}")),
            (ITEMS[::-1], CONFIG),
        ]
    ):
        assert make_catalogue(items, config, tmp_path).sha256 != first.sha256 or config.vocabulary == 290
        assert len(calls) == number + 1 and len(list(tmp_path.iterdir())) == number + 2


def test_an_interrupted_build_leaves_nothing(tmp_path):
    folder = tmp_path / "cache" / "catalogue"

    def interrupted(temporary: Path):
        assert temporary.parent == folder.parent and not folder.exists()
        (temporary / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder(folder, lambda: interrupted)
    assert list(folder.parent.iterdir()) == []
    assert cached_folder(folder, lambda: lambda temporary: (temporary / "whole").write_text("y")) == folder
    assert [path.name for path in folder.iterdir()] == ["whole"] and list(folder.parent.iterdir()) == [folder]

    def never():
        raise AssertionError("a hit makes nothing")

    assert cached_folder(folder, never) == folder


def test_bad_input_is_found_before_anything_is_written(tmp_path):
    def bad():
        raise InputError("bad")

    with pytest.raises(InputError):
        cached_folder(tmp_path / "cache" / "x", bad)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_at_once_keep_the_first_result(tmp_path):
    folder = tmp_path / "catalogue"

    def late(temporary: Path):
        (temporary / "file").write_text("second")
        folder.mkdir()  # another process finishes meanwhile
        (folder / "file").write_text("first")

    cached_folder(folder, lambda: late)
    assert (folder / "file").read_text() == "first" and list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o755), (0o027, 0o750), (0o077, 0o700)])
def test_prepared_data_can_be_read_by_whom_the_umask_lets(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        folder = cached_folder(tmp_path / "new" / "catalogue", lambda: lambda temporary: (temporary / "file").write_text("x"))
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [mode, mode]


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_root("") == Path("/home/someone/.cache/iam_jax")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch")
    assert cache_root("") == Path("/scratch/iam_jax")
    assert cache_root("~/prepared") == Path("/home/someone/prepared")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write prepared data there .*config\.data\.cache"):
        cached_folder(tmp_path / "file" / "cache" / "x", lambda: lambda temporary: None)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "config.json"
    write_atomically(path, lambda file: file.write_text("first"))

    def fails(file: Path):
        file.write_text("half")
        assert path.read_text() == "first"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fails)
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda file: file.write_text("second"))
    assert path.read_text() == "second" and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644

"""The catalogue: every item's text and tokens.

An item consists of the tokens of the separator, if there is one, those of its text, and one boundary token. The final state of the boundary
token is the item's state. An item has the same tokens in every history. With one id token per item (`data.tokenizer = "id"`) the id is the
boundary token. With a pretrained model's tokenizer the boundary token is the first id beyond the model's embedding.
"""

import dataclasses
import hashlib
import html
import json
import string
from pathlib import Path

import numpy as np
import polars as pl

from iam_jax.config import DataConfig
from iam_jax.data import tokenizer as tokens_lib
from iam_jax.data.cache import cached_folder
from iam_jax.errors import InputError

_VERSION = 2  # of the cached files
_FRAME = ("prompt", "separator", "suffix")  # of DataConfig


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Tokens of I items, of the prompt as entry I, and of the suffix as entry I + 1."""

    tokens: np.ndarray  # [sum of lengths] int32; an item ends with its boundary token, prompt and suffix do not
    offsets: np.ndarray  # [I + 3] int64: entry i's tokens are offsets[i]:offsets[i + 1]
    vocabulary: int  # all token ids are smaller
    truncated: int  # items whose text was longer than data.item_tokens
    tokenizer_json: str  # "" for id tokens

    @property
    def items(self) -> int:
        return len(self.offsets) - 3

    @property
    def sha256(self) -> str:
        """Hash of what the model reads: two catalogues with the same hash are the same for the model."""
        return hashlib.sha256(self.tokens.tobytes() + self.offsets.tobytes()).hexdigest()

    @property
    def lengths(self) -> np.ndarray:
        """[I + 2] int64: tokens of every entry; 0 for a missing prompt or suffix."""
        return np.diff(self.offsets)

    @property
    def item_lengths(self) -> np.ndarray:
        """[I] int64: tokens of every item, separator and boundary token included."""
        return self.lengths[:-2]

    @property
    def prompt_tokens(self) -> int:
        return int(self.lengths[-2])

    @property
    def suffix_tokens(self) -> int:
        return int(self.lengths[-1])

    @property
    def prompt(self) -> bool:
        return self.prompt_tokens > 0

    @property
    def suffix(self) -> bool:
        return self.suffix_tokens > 0

    @property
    def frame_tokens(self) -> int:
        """Tokens of prompt and suffix together, which every history has besides its items."""
        return self.prompt_tokens + self.suffix_tokens

    def padded(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [I, longest item] int32 (zeros after the boundary token) and lengths [I] int32."""
        lengths = self.item_lengths
        padded = np.zeros((self.items, int(lengths.max())), np.int32)
        padded[np.arange(padded.shape[1]) < lengths[:, None]] = self.tokens[: self.offsets[self.items]]
        return padded, lengths.astype(np.int32)

    def boundaries(self) -> "Catalogue":
        """The catalogue with only the last token of every entry, for rows that have one slot for each item."""
        there = self.lengths > 0
        tokens = self.tokens[self.offsets[1:][there] - 1]
        return dataclasses.replace(self, tokens=tokens, offsets=np.concatenate([[0], np.cumsum(there)]))

    def extended(self, entries: list[list[int]]) -> "Catalogue":
        """The catalogue with more items after its own, each given by its tokens."""
        end = self.offsets[self.items]
        new = np.fromiter((token for entry in entries for token in entry), np.int32)
        lengths = np.concatenate([self.item_lengths, np.array([len(entry) for entry in entries], np.int64), self.lengths[-2:]])
        tokens = np.concatenate([self.tokens[:end], new, self.tokens[end:]])
        return dataclasses.replace(self, tokens=tokens, offsets=np.concatenate([[0], np.cumsum(lengths)]))


def item_texts(items: pl.DataFrame, config: DataConfig) -> list[str]:
    """Each item's text: the template filled in, HTML entities unescaped, white space collapsed. "" if all its columns are empty.

    Raises InputError for a template that names a column that is not in the table.
    """
    parts = list(_parse(config.text))
    there = f"the items table has {', '.join(items.columns)}"
    columns = [name for _, name in parts if name is not None]
    for name in columns:
        if name not in items.columns:
            raise InputError(f"config.data.text = {config.text!r} uses {{{name}}}; {there}")
    if not columns:
        raise InputError(f"config.data.text = {config.text!r} uses no column; {there}")
    clean = {name: [" ".join(html.unescape(value or "").split()) for value in items[name].to_list()] for name in set(columns)}
    texts = []
    for row in range(items.height):
        if any(clean[name][row] for name in columns):
            text = ""
            for place, (literal, name) in enumerate(parts):
                if name is None:
                    text += literal
                elif clean[name][row]:  # an empty column is left out, with the separator before it
                    text += (literal if text or place == 0 else "") + clean[name][row]
            texts.append(text.strip())
        else:
            texts.append("")
    return texts


def catalogue_texts(items: pl.DataFrame, config: DataConfig) -> list[str]:
    """Each item's text as the model reads it: `item_texts`, with data.untitled = "id" and data.shuffled_titles."""
    texts = item_texts(items, config)
    if config.untitled == "id":
        texts = [text or item for text, item in zip(texts, items["item"].to_list(), strict=True)]
    return [texts[row] for row in shuffled_rows(len(texts))] if config.shuffled_titles else texts


def shuffled_rows(items: int) -> np.ndarray:
    """[items]: the item from which each item gets its content with data.shuffled_titles. The same in every run."""
    return np.random.default_rng(0).permutation(items)


def _parse(template: str):
    try:
        for literal, name, spec, conversion in string.Formatter().parse(template):
            if name == "" or spec or conversion:
                raise ValueError("fields are written {column}")
            yield literal, name
    except ValueError as error:
        raise InputError(f"config.data.text = {template!r} is not a template: {error}") from error


def has_text(items: pl.DataFrame, config: DataConfig) -> np.ndarray:
    """[rows] bool: whether each item has text. All have if ids replace missing texts or are the tokens themselves."""
    if config.tokenizer == "id" and config.untitled != "drop":  # with drop, models of ids have the same candidates as models of text
        return np.ones(items.height, bool)
    texts = item_texts(items, config)  # even if all items count: a wrong template is found before anything is written
    return np.array([bool(text) or config.untitled == "id" for text in texts], bool)


def make_catalogue(items: pl.DataFrame, config: DataConfig, cache: Path, given: tokens_lib.Vocabulary | None = None) -> Catalogue:
    """Tokenises the items, in the given order. The result is cached under the hash of the texts and of the tokenizer's settings.

    `given`: the pretrained model's vocabulary, with config.tokenizer = "pretrained". Raises InputError for a tokenizer of another model,
    and for a text that the tokenizer turns into no token.
    """
    if config.tokenizer == "id":
        ids = np.arange(items.height, dtype=np.int32)
        return Catalogue(ids, np.append(np.arange(items.height + 1), [items.height] * 2), items.height, 0, "")
    texts = catalogue_texts(items, config)
    loaded = tokens_lib.load_given(config.tokenizer, given)
    fixed = {field: getattr(config, field) for field in _FRAME}
    size = given.size if given is not None and config.tokenizer == "pretrained" else None
    identity = [_VERSION, config.vocabulary if loaded is None else loaded.to_str(), size, config.item_tokens, fixed]
    digest = hashlib.sha256(json.dumps([identity, texts]).encode()).hexdigest()

    def make():
        tokenizer = loaded or tokens_lib.train_bpe(sorted(texts), config.vocabulary)  # sorted: the order of the items does not matter
        ids = tokens_lib.encode(tokenizer, texts)
        empty = [item for item, tokens in zip(items["item"], ids, strict=True) if not tokens]
        if empty:
            which = f"the text of {len(empty):,} items (item {empty[0]!r})"
            raise InputError(f"config.data.tokenizer = {config.tokenizer!r} produces no token for {which}")
        boundary = tokens_lib.highest_id(tokenizer) + 1 if size is None else size
        around = frame_entries(tokenizer, config)
        entries = [*item_entries(ids, around["separator"], boundary, config.item_tokens), around["prompt"], around["suffix"]]
        truncated = sum(len(tokens) > config.item_tokens for tokens in ids)

        def write(folder: Path) -> None:
            np.save(folder / "tokens.npy", np.fromiter((t for tokens in entries for t in tokens), np.int32))
            np.save(folder / "offsets.npy", np.cumsum([0, *map(len, entries)], dtype=np.int64))
            (folder / "catalogue.json").write_text(json.dumps({"vocabulary": boundary + 1, "truncated": truncated}))
            (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")

        return write

    folder = cached_folder(cache / f"catalogue-{digest[:32]}", make)
    facts = json.loads((folder / "catalogue.json").read_text())
    return Catalogue(
        tokens=np.load(folder / "tokens.npy"),
        offsets=np.load(folder / "offsets.npy"),
        tokenizer_json=(folder / "tokenizer.json").read_text(encoding="utf-8"),
        **facts,
    )


def item_entries(tokens: list[list[int]], separator: list[int], boundary: int, most: int) -> list[list[int]]:
    """Each item's tokens, given those of its text, of which the first `most` are kept."""
    return [[*separator, *text[:most], boundary] for text in tokens]


def frame_entries(tokenizer: tokens_lib.Tokenizer, config: DataConfig) -> dict[str, list[int]]:
    """Tokens of prompt, separator and suffix, by name. Raises InputError for a text that the tokenizer turns into no token."""
    found = {}
    for field in _FRAME:
        text = getattr(config, field)
        found[field] = tokens_lib.encode(tokenizer, [text], special=True)[0] if text else []
        if text and not found[field]:
            raise InputError(f"config.data.tokenizer = {config.tokenizer!r} produces no token for config.data.{field} = {text!r}")
    return found

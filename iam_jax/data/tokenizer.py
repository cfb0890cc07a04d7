"""Tokenizers: a byte-level BPE trained on the catalogue, any tokenizer.json, or a pretrained model's."""

import json
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from iam_jax.errors import InputError
from iam_jax.storage.files import to_path


class Vocabulary(NamedTuple):
    """The path of a pretrained model's tokenizer.json, and the number of token ids in the model's embedding."""

    path: Path
    size: int


def train_bpe(texts: list[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of at most `vocabulary` tokens. It can encode any text. The same texts give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    # With a space in front, the first word of a title has the same token as elsewhere.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer.json. Raises InputError if it is missing or not a tokenizer."""
    path = to_path(path)
    if not path.is_file():
        raise InputError(f"config.data.tokenizer = {str(path)!r}: no such file (bpe, id, or the path of a tokenizer.json)")
    try:
        text = path.read_bytes().decode("utf-8")
        json.loads(text)
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exceptions
        raise InputError(f"{path}: not a tokenizer.json ({error})") from error


def load_given(name: str, pretrained: Vocabulary | None) -> Tokenizer | None:
    """The tokenizer that config.data.tokenizer names, None for "bpe" and "id". Raises InputError for a file that is not a tokenizer."""
    if name == "pretrained":
        if pretrained is None:
            raise ValueError("config.data.tokenizer = 'pretrained' needs the pretrained model's Vocabulary")
        return load_pretrained(pretrained)
    return None if name in ("bpe", "id") else load_tokenizer(name)


def load_pretrained(vocabulary: Vocabulary) -> Tokenizer:
    """Reads a pretrained model's tokenizer. Raises InputError if the file is missing or belongs to another model.

    An embedding may have a few more rows than there are tokens: Qwen2.5's has 151,936 for 151,665.
    """
    path, size = vocabulary
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file (the pretrained model's tokenizer: config.data.tokenizer = 'pretrained')")
    tokenizer = load_tokenizer(path)
    ids = 1 + highest_id(tokenizer)
    if not 0.95 * size <= ids <= size:
        raise InputError(
            f"{path}: tokenizer of another vocabulary size: its token ids need {ids:,} rows, the model's embedding has {size:,}"
        )
    return tokenizer


def highest_id(tokenizer: Tokenizer) -> int:
    """The highest token id. It may be larger than the number of tokens: ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1)


def encode(tokenizer: Tokenizer, texts: list[str], special: bool = False) -> list[list[int]]:
    """Token ids of each text, without the special tokens that a tokenizer may add around an input.

    `special`: "<s>" in a text is encoded as the special token, as templates may need it. Otherwise it is plain text, as in a title.
    Raises InputError for texts that the tokenizer cannot encode.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = not special
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception as error:  # the library raises bare Exceptions, for example for an unknown word without an unknown token
        where = "the items' texts, config.data.prompt, config.data.separator or config.data.suffix"
        raise InputError(f"config.data.tokenizer cannot encode {where}: {error}") from error

"""Text to tokens: a byte-level BPE trained on the catalogue, or any tokenizer.json."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from iam_jax.errors import InputError


def train_bpe(texts: list[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of at most `vocabulary` tokens; any text can be encoded. The same texts give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    # With a space before it, a title's first word is the same token as inside.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    path = Path(path)
    if not path.is_file():
        raise InputError(f"config.data.tokenizer = {str(path)!r}: no such file (bpe, id, or the path of a tokenizer.json)")
    try:
        json.loads(path.read_text(encoding="utf-8"))
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise InputError(f"{path}: not a tokenizer.json ({error})") from error


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without the special tokens a tokenizer may add around a whole input. Raises InputError for texts
    that the tokenizer cannot express."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception as error:  # the library raises bare Exceptions, for example for an unknown word without an unknown token
        raise InputError(f"config.data.tokenizer cannot encode the items' texts or config.data.prompt: {error}") from error

"""Writes docs/configuration.md: every config field with its default and the comment that stands beside it in iam_jax/config.py.

    python docs/make_configuration.py

tests/test_docs.py compares the committed page with what this script makes.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from iam_jax.config import Config

PAGE = Path(__file__).parent / "configuration.md"
SECTIONS = {
    "data": "Where the data come from, how they are filtered and split, and how text becomes tokens and rows.",
    "model": "The decoder: its layers and their relations, its shape, adapters, and how it is computed.",
    "objective": "What is learned: the next item, the next token, or both.",
    "optimizer": "AdamW and its learning rate.",
    "train": "How long a run trains, what it trains, and when it validates and saves.",
    "mesh": "How a run is spread over devices, and how long a job waits for a silent process ([devices](devices.md)).",
    "eval": "How targets are ranked ([evaluation protocol](protocol.md)).",
    "score": "Batches and files of `--mode=score` ([top-K lists](scoring.md)).",
    "log": "What a run reports.",
}
INTRODUCTION = """\
<!-- Made by docs/make_configuration.py from iam_jax/config.py: change the comments there. -->

# Configuration

A config file is Python. Its `get_config()` starts from `iam_jax.config.default_config()`, sets what differs, and returns the result.
`--config=FILE` chooses the file, and `--config.section.key=value` overrides a field on the command line. An unknown field or a value
out of range ends the program with exit code 2 and the name of the field.

Three fields decide memory and time: `data.row_tokens`, `model.width` and `train.batch_rows`.
"""


def make_page() -> str:
    parts = [INTRODUCTION]
    for section in dataclasses.fields(Config):
        rows = [f"| `{name}` | {shown} | {meaning} |" for name, shown, meaning in _rows(section.default, f"{section.name}.")]
        parts += [f"\n## {section.name}\n", f"{SECTIONS[section.name]}\n", "| field | default | meaning |\n|---|---|---|", *rows]
    return "\n".join(parts) + "\n"


def _rows(section: object, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Name, default and comment of each field of a section, nested sections included, in the order of the source."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(type(section)), re.M))
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _rows(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", _show(value), _escape(comments[field.name])


def _escape(comment: str) -> str:
    """Markdown that shows the comment as it is, inside a table; code between backticks stays code."""
    pieces = comment.replace("|", "\\|").split("`")
    return "`".join(piece if code % 2 else piece.replace("*", "\\*") for code, piece in enumerate(pieces))


def _show(value: object) -> str:
    return "(empty)" if value == "" else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
    print(f"wrote {PAGE}")

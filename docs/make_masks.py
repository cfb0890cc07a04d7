"""Draws docs/images/relations.svg: which tokens each relation lets a token see, from the program's own key ranges.

    python docs/make_masks.py

A small row with two users is laid out token by token. `key_ranges` gives the keys of every token; a square is coloured where the row's
token may see the column's token. tests/test_docs.py compares the committed picture with what this script makes.
"""

from html import escape
from pathlib import Path

import numpy as np

import iam_jax
from iam_jax.kernels.range_attention import range_mask

PICTURE = Path(__file__).parent / "images" / "relations.svg"
USERS = ((("teal", "vase"), ("red", "clay", "lamp"), ("navy", "rug")), (("oak", "bowl"),))  # the words of each user's items
BOUNDARY = "■"
RELATIONS = {
    "full": "the user's tokens so far",
    "intra": "its own item so far",
    "inter": "all earlier items",
    "intra_both": "its own item, both directions",
}
CELL, GAP, LEFT, TOP, PAD = 15, 22, 62, 78, 20
SQUARE = f"h{CELL - 4}v{CELL - 4}h{4 - CELL}z"  # one cell's path; a stroke of its own colour rounds the corners


def layout() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """User and item number of every token of the row, [T] int32 each, and what the token says."""
    tokens = [
        (user, item, word)
        for user, items in enumerate(USERS, start=1)
        for item, words in enumerate(items, start=1)
        for word in (*words, BOUNDARY)
    ]
    users, items, words = zip(*tokens, strict=True)
    return np.array(users, np.int32), np.array(items, np.int32), list(words)


def masks() -> dict[str, np.ndarray]:
    """Relation -> [T, T] bool: which key (column) each query (row) may see."""
    user_T, item_T, _ = layout()
    ranges = iam_jax.key_ranges(user_T[None], item_T[None])
    T = len(user_T)
    return {name: np.asarray(range_mask(T, T, (ranges[name].first,), include_self=False))[0] for name in RELATIONS}


def draw() -> str:
    user_T, item_T, words = layout()
    T = len(words)
    kind_T = np.cumsum(np.diff(user_T * 100 + item_T, prepend=0) != 0) - 1  # items of the row, numbered from 0: their colour
    side = T * CELL
    width = 2 * PAD + LEFT + len(RELATIONS) * side + (len(RELATIONS) - 1) * GAP
    height = TOP + side + 58
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        'aria-labelledby="title description">',
        '<title id="title">What a token may see in each relation</title>',
        f'<desc id="description">{escape(_description())}</desc>',
        STYLE,
        f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10"/>',
    ]
    for row, word in enumerate(words):
        y = TOP + (row + 0.5) * CELL + 4
        out.append(f'<text class="word c{kind_T[row]}" x="{PAD + LEFT - 10}" y="{y:g}" text-anchor="end">{escape(word)}</text>')
    for place, (name, mask_TT) in enumerate(masks().items()):
        x0 = PAD + LEFT + place * (side + GAP)
        out.append(f'<text class="name" x="{x0}" y="28">{name}</text><text class="note" x="{x0}" y="45">{RELATIONS[name]}</text>')
        for kind in range(kind_T[-1] + 1):
            (at,) = np.nonzero(kind_T == kind)
            x, length = x0 + at[0] * CELL, len(at) * CELL
            out.append(f'<text class="tick" x="{x + length / 2:g}" y="{TOP - 11}" text-anchor="middle">item {item_T[at[0]]}</text>')
            out.append(f'<rect class="bar b{kind}" x="{x + 1}" y="{TOP - 7}" width="{length - 2}" height="4" rx="2"/>')
        style_TT = np.where(mask_TT, kind_T, -1)  # the colour of every square, -1 where the token may not look
        for kind in range(-1, kind_T[-1] + 1):
            corners = (f"M{x0 + column * CELL + 2} {TOP + row * CELL + 2}{SQUARE}" for row, column in np.argwhere(style_TT == kind))
            out.append(f'<path class="{"off" if kind < 0 else f"b{kind}"} cell" d="{"".join(corners)}"/>')
        (cut,) = np.nonzero(np.diff(user_T))
        for at in cut + 1:
            y, x = TOP + at * CELL, x0 + at * CELL
            out.append(f'<path class="cut" d="M{x0} {y}H{x0 + side}M{x} {TOP}V{TOP + side}"/>')
    notes = (
        f"Row: the token that attends. Column: a token it may see, in the colour of its item. {BOUNDARY} ends an item; its state "
        "predicts the next item.",
        "Dashed lines separate two users packed into one row. A row without colour has no keys; its attention output is exactly zero.",
    )
    for line, text in enumerate(notes):
        out.append(f'<text class="note" x="{PAD}" y="{TOP + side + 28 + 17 * line}">{escape(text)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def _description() -> str:
    """The masks in words, for readers who do not see the picture."""
    items = "; ".join(
        f"user {number}: " + ", ".join(f"item {n} ({' '.join(words)})" for n, words in enumerate(user, start=1))
        for number, user in enumerate(USERS, start=1)
    )
    return f"Four square masks over one row of tokens ({items}). " + " ".join(f"{name}: {what}." for name, what in RELATIONS.items())


COLOURS = (("#2a78b8", "#5aa9e6"), ("#c8611c", "#f0964f"), ("#3d8f4e", "#6cc47f"), ("#8a56b0", "#bd8fe0"))  # light, dark: one an item


def _style() -> str:
    def rules(scheme: int, card: str, edge: str, text: str, note: str, off: str) -> str:
        items = "".join(f".b{k}{{fill:{c[scheme]};stroke:{c[scheme]}}}.c{k}{{fill:{c[scheme]}}}" for k, c in enumerate(COLOURS))
        words = f".card{{fill:{card};stroke:{edge}}}.name{{fill:{text}}}.note,.tick{{fill:{note}}}"
        return f"{words}.off{{fill:{off};stroke:{off}}}.cut{{stroke:{note}}}{items}"

    light = rules(0, "#ffffff", "#d5dae0", "#1c2126", "#56606b", "#eceff2")
    dark = rules(1, "#15191e", "#343b44", "#e9edf1", "#a5afba", "#262c33")
    shared = (
        "text{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,'DejaVu Sans',sans-serif;font-size:12.5px}"
        ".name{font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;font-size:16px;font-weight:700}"
        ".word{font-size:12px}.tick{font-size:10.5px}"
        ".bar{stroke:none}.cell{stroke-width:2;stroke-linejoin:round}.cut{stroke-dasharray:3 3;fill:none}"
    )
    return f"<style>{shared}{light}@media (prefers-color-scheme:dark){{{dark}}}</style>"


STYLE = _style()

if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(f"wrote {PICTURE}")

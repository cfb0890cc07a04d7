"""A history with many candidates in one row. Each candidate is scored as if it were the only one."""

from collections.abc import Sequence

import numpy as np

from iam_jax.data.batches import Batch, count_up
from iam_jax.data.catalogue import Catalogue


def candidate_rows(
    catalogue: Catalogue,
    histories: Sequence[np.ndarray],
    candidates: Sequence[np.ndarray],
    max_tokens: int,
    row_tokens: int | None = None,
) -> Batch:
    """One row per user: the prompt, the items of the history, the suffix, then every candidate as an item of its own.

    The positions of every candidate begin where the history ends, and its group is the one after the history's last, wherever it is in the
    row. The suffix counts as the history's last group.

    Args:
      histories: for each user, catalogue rows [n].
      candidates: for each user, catalogue rows [C]; C may differ between users.
      max_tokens: the most tokens of prompt, history, suffix and the longest candidate together, as in training. Of a longer history the
        most recent items are kept.
      row_tokens: T; None: as few as possible.

    Returns:
      int32 arrays [B, T]: `token`, `user`, `group`, `position` and `candidate` (1, 2, … in the given order; 0 before the candidates).

    Raises:
      ValueError: neither a prompt nor an item precedes the candidates, or the row does not fit.
    """
    lengths = catalogue.lengths
    rows = []
    for number, (history, items) in enumerate(zip(histories, candidates, strict=True)):
        free = max_tokens - catalogue.frame_tokens - int(lengths[items].max(initial=0))
        if free < 0:
            raise ValueError(f"user {number}: the longest candidate does not fit in {max_tokens} tokens beside prompt and suffix")
        kept = np.cumsum(lengths[history][::-1]) <= free
        history = np.asarray(history)[len(history) - int(kept.sum()) :]
        before = catalogue.frame_tokens + int(lengths[history].sum())
        if not (catalogue.prompt or len(history)):
            raise ValueError(f"user {number}: no prompt, and no item of the history fits before the candidates in {max_tokens} tokens")
        prompt = [catalogue.items] * catalogue.prompt
        suffix = [catalogue.items + 1] * catalogue.suffix
        entry = np.concatenate([prompt, history, suffix, items]).astype(np.int64)
        length = lengths[entry]
        place = np.repeat(np.arange(len(entry)), length)  # the place of a token's group in the row
        within = count_up(length)
        last = len(prompt) + len(history) + len(suffix)  # groups before the candidates
        group = np.minimum(place, last) + (0 if prompt else 1)
        begin = np.where(np.arange(len(entry)) < last, np.cumsum(length) - length, before)
        rows.append(
            {
                "token": catalogue.tokens[catalogue.offsets[entry][place] + within],
                "user": np.ones(len(place)),
                "group": group,
                "position": begin[place] + within,
                "candidate": np.maximum(place - last + 1, 0),
            }
        )
    if not rows:
        raise ValueError("there is no history")
    longest = max(len(row["token"]) for row in rows)
    row_tokens = row_tokens or longest
    if longest > row_tokens:
        raise ValueError(f"row_tokens = {row_tokens}: a history with its candidates needs {longest}")
    return {name: np.stack([np.pad(row[name], (0, row_tokens - len(row[name]))) for row in rows]).astype(np.int32) for name in rows[0]}

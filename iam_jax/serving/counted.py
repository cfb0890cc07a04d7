"""Top-K lists of a baseline, for offline scoring: the methods of `Recommender` that it needs, without a model."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from iam_jax.config import Config
from iam_jax.data.histories import Lists, Users, table_of_lists, with_targets
from iam_jax.data.stored import Stored
from iam_jax.errors import InputError
from iam_jax.ranking import baselines
from iam_jax.ranking.choice import BASELINES, choose_or_read, describe
from iam_jax.ranking.core import ItemsAndScores, Report, no_report
from iam_jax.serving.loading import run_split


class CountedLists:
    """Lists of a baseline, which is counted from the training events of a run.

    Attributes:
      record: the choice of its settings (`choice.choose`).
      description: its name and its settings in one line.
    """

    def __init__(self, name: str, workdir: Path, config: Config, stored: Stored):
        """Reads the run's data. The settings are those of the last evaluation; without one they are chosen here.

        Raises InputError for an unknown name, and if the data are not the run's.
        """
        if name not in BASELINES:
            raise InputError(f"--baseline={name}: must be one of {', '.join(BASELINES)}")
        split = run_split(workdir, config, stored.item_ids)
        self._name, self._last_n, self._item_ids = name, config.data.last_n, stored.item_ids
        self.record = choose_or_read(BASELINES[name], split, config, workdir)
        self._scorer = BASELINES[name].make(split.events)(**self.record["settings"])
        self._unit = getattr(self._scorer, "unit", 1.0)
        self.description = describe(name, self.record) if BASELINES[name].grid else name

    def top(self, users: Users, k: int, filter_seen: bool, _tokens: int | None = None, report: Report = no_report) -> ItemsAndScores:
        """The k best items of the catalogue for each user: item [n, K] int32 and score [n, K] float32, -1 and -inf where no candidate is
        left. Among equal scores, the first item of the catalogue comes first. Blocks of users bound the memory."""
        k = min(k, len(self._item_ids))
        item_nK, score_nK = np.full((len(users), k), -1, np.int32), np.full((len(users), k), -np.inf, np.float32)
        for at, scores in self._scores(users.events):
            seen = users.events[at]
            if filter_seen:
                scores[np.repeat(np.arange(len(seen)), seen.lengths), seen.item] = -np.inf
            least = np.partition(scores, -k, axis=1)[:, -k]
            row, item = np.nonzero((scores >= least[:, None]) & (scores > -np.inf))
            order = np.lexsort((-scores[row, item], row))  # stable: among equal scores, the first of the catalogue
            row, item = row[order], item[order]
            place = np.arange(len(row)) - np.searchsorted(row, row)
            row, item, place = row[place < k], item[place < k], place[place < k]
            item_nK[at.start + row, place], score_nK[at.start + row, place] = item, scores[row, item] * self._unit
            report(len(seen))
        return item_nK, score_nK

    def score_candidates(self, users: Users, k: int, _tokens: int | None = None, report: Report = no_report) -> ItemsAndScores:
        """The k best of each user's candidates, including seen items, as `top` returns them."""
        assert users.candidates is not None
        candidates = users.candidates
        item = candidates.padded(int(candidates.lengths.max()))
        score = np.empty(item.shape)
        for at, scores in self._scores(users.events):
            score[at] = np.where(item[at] >= 0, np.take_along_axis(scores, np.maximum(item[at], 0), axis=1), -np.inf)
            report(at.stop - at.start)
        order = np.argsort(-score, axis=1, kind="stable")[:, :k]
        score = np.take_along_axis(score, order, axis=1) * self._unit
        return np.take_along_axis(item, order, axis=1), score.astype(np.float32)

    def table(self, users: Users, item: np.ndarray, score: np.ndarray) -> pl.DataFrame:
        """The result of `top` or `score_candidates` as a table with the columns `user`, `item`, `rank` and `score`."""
        return table_of_lists(users, self._item_ids, item, score)

    def _scores(self, histories: Lists) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields users as a slice and their scores [n, items] float64 in the scorer's unit, in blocks.

        Raises FloatingPointError for a score that is not finite (of a baseline that was registered).
        """
        step = max(1, baselines.BLOCK // len(self._item_ids))
        for start in range(0, len(histories), step):
            at = slice(start, min(start + step, len(histories)))
            events, targets = with_targets(histories[at].last(self._last_n))
            scores = np.asarray(self._scorer(events, targets)).astype(np.float64)
            if not np.isfinite(scores).all():
                raise FloatingPointError(f"a score of the baseline {self._name!r} is not finite")
            yield at, scores

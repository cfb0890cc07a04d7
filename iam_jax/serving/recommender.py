"""A trained model at work: recommendations, scores and ranks for histories, and the vectors behind them.

`Recommender` is the Python API's object, and offline scoring (`--mode=score`) calls the same methods part by part.
"""

import functools
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl

from iam_jax.config import Config, get_config, override, resolve
from iam_jax.data.batches import Rows, evaluation_segments
from iam_jax.data.catalogue import Catalogue
from iam_jax.data.histories import Lists, Users, with_targets
from iam_jax.data.stored import Stored, decoded_texts, read_stored
from iam_jax.devices.mesh import batch_shards
from iam_jax.errors import InputError
from iam_jax.model import Model, Params
from iam_jax.ranking.baselines import rank_scores
from iam_jax.ranking.core import Found, Ranker, Report, keeps_item_states, nothing, power_of_two
from iam_jax.runs.checkpoint import Checkpoints
from iam_jax.serving import loading
from iam_jax.serving.inputs import Histories, Reader, convert_table, is_list, to_lists
from iam_jax.storage.files import to_path


class Recommendation(NamedTuple):
    item: str
    score: float


def load(workdir: str | Path, step: str | int = "best", overrides: Mapping[str, Any] | None = None) -> "Recommender":
    """The model of a working folder, from one of its checkpoints.

    Args:
      workdir: the folder of a trained run: a local path, gs:// or s3://.
      step: "best" by validation, "last", or the number of a step.
      overrides: fields that may change between two runs of one folder, by dotted name: `{"mesh.data": 1}`, `{"model.pretrained": "…"}` if
        the pretrained model has moved, `{"eval.ranking": "likelihood"}` for a model with both objectives.

    Raises:
      InputError: no run there, a damaged or missing checkpoint, files that do not belong together, an override that makes another model.
    """
    folder = to_path(str(workdir))
    config = resolve(override(get_config(str(folder)), overrides))
    config = loading.shape_from_folder(folder, config, saved=True)
    stored = read_stored(folder, config.data)
    checkpoints = Checkpoints(folder, config.train.keep, config.selection, read_only=True)
    model, mesh = loading.model_of(config, stored), loading.serving_mesh(config)
    with jax.set_mesh(mesh):
        found, params = loading.restore(checkpoints, str(step), config, model, mesh)
    checkpoints.close()
    return Recommender(config, stored, model, params, mesh, found)


class Recommender:
    """A model with its catalogue and one checkpoint's parameters. Compiled functions are kept from call to call.

    Attributes:
      config: the run's config (`iam_jax.config.Config`).
      params: the parameters, a nested dict of arrays.
      step: the step of the checkpoint.
    """

    def __init__(self, config: Config, stored: Stored, model: Model, params: Params, mesh: jax.sharding.Mesh, step: int):
        self.config, self.params, self.step = config, params, step
        self._stored, self._model, self._mesh = stored, model, mesh
        self.ranker = Ranker(config, stored.catalogue, stored.trained, model, mesh, config.score.batch_rows)

    # ---- the Python API

    @functools.cached_property
    def items(self) -> pl.DataFrame:
        """The catalogue in the order of its rows: `item`; `text`, decoded from at most `data.item_tokens` tokens (null for a model of ids);
        `trained`, whether the item has a training event."""
        texts = decoded_texts(self._stored.catalogue, self.config.data)
        text = pl.Series("text", texts, dtype=pl.String) if texts else pl.Series("text", [None] * len(self.item_ids), pl.String)
        return pl.DataFrame([self.item_ids.rename("item"), text, pl.Series("trained", self._stored.trained)])

    def recommend(self, histories: Any, k: int = 10, filter_seen: bool = True) -> Any:
        """The k best items for each history, best first.

        Args:
          histories: a list of histories, each a list of item ids in the order of time; an item that is not in the catalogue is
            `{"text": "…"}` (models of text). Or a table of polars or pandas with the columns `user`, `item` and `timestamp`.
          k: items of a list. A list is shorter where fewer items are left.
          filter_seen: leave out the items of the history.

        Returns:
          For lists, a list of `Recommendation(item, score)` for each history; for a table, a table of the same kind with the columns
          `user`, `item`, `rank` (from 1) and `score`, sorted by user and rank.

        Raises:
          InputError: unknown items, an empty history, k below 1.
          TypeError: neither lists nor a table.
        """
        _check_k(k)
        read = self._read(histories)
        found = self.top(read.users, k, filter_seen, catalogue=read.catalogue)
        return convert_table(self.table(read.users, *found), read.table) if read.table else self._lists(*found)

    def score(self, histories: Any, candidates: Any) -> Any:
        """The scores of given candidates, whether seen or not.

        Args:
          histories: as in `recommend`.
          candidates: a list of item ids for each history; or a table with the columns `user` and `item`.

        Returns:
          For lists, a float32 array for each history, in the order of its candidates; for tables, a table of the same kind with the
          columns `user`, `item`, `rank` and `score`.

        Raises:
          InputError: unknown items or users, an empty history, no candidate.
          TypeError: neither lists nor tables.
        """
        read = self._read(histories)
        users, rows = self._reader.candidates(candidates, read)
        found = self.given(users, len(self.item_ids), catalogue=read.catalogue)
        if rows is None:
            return convert_table(self.table(users, *found), read.table)
        scores = [dict(zip(item.tolist(), score, strict=True)) for item, score in zip(*found, strict=True)]
        return [np.array([score[item] for item in items], np.float32) for score, items in zip(scores, rows, strict=True)]

    def rank(self, histories: Any, targets: Sequence[str], filter_seen: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """The exact rank of one target for each history among the whole catalogue.

        Args:
          histories: a list of histories, as in `recommend`.
          targets: an item id for each history.
          filter_seen: the items of the history, except the target, are no candidates.

        Returns:
          rank [n] int64, 1 + the candidates that score higher, and ties [n] int64, the other candidates that score the same.

        Raises:
          InputError: unknown items, an empty history, another number of targets.
          TypeError: wrong types.
        """
        read = self._read(histories)
        if read.table:
            raise TypeError("rank takes lists of histories, with one target for each")
        users = read.users
        if not is_list(targets):
            raise TypeError(f"targets is a {type(targets).__name__}: give a list of item ids")
        if len(targets) != len(users):
            raise InputError(f"{len(targets):,} targets for {len(users):,} histories: give one item id for each")
        target = np.array([self._reader.row(item, f"targets[{n}]") for n, item in enumerate(targets)], np.int64)
        seen = _below(users.events, len(self.item_ids)) if filter_seen else None
        if self.config.eval.ranking == "likelihood":
            with jax.set_mesh(self._mesh):
                ranker = self._ranker_of(read.catalogue)
                scores = ranker.likelihoods(self.params, self._last(users), None, catalogue=read.catalogue)
            self._check_finite(np.isfinite(scores).all(1), users.ids)
            return rank_scores(scores, target, None if seen is None else (np.repeat(np.arange(len(seen)), seen.lengths), seen.item))
        h_nE = self._history_vectors(users, catalogue=read.catalogue)
        without = None if seen is None else (lambda at: _others(seen.of(at), target[at]))
        with jax.set_mesh(self._mesh):
            rank, ties, finite = self.ranker.rank(h_nE, self._item_vectors, target, without)
        self._check_finite(finite, users.ids)
        return rank, ties

    def similar(self, item: str | dict, k: int = 10) -> list[Recommendation]:
        """The k items whose vectors are nearest to that of `item` by cosine, nearest first, `item` itself left out.

        item: an id, or `{"text": "…"}` for a model that reads text.

        Raises:
          InputError: an unknown item, k below 1, a model without item vectors.
          TypeError: neither a string nor a text.
        """
        _check_k(k)
        self._check_vectors("similar")
        with jax.set_mesh(self._mesh):
            if isinstance(item, dict):
                h_1E, seen = self._text_vector(item), to_lists([[]])
            else:
                row = self._reader.row(item)
                h_1E, seen = self._item_vectors[row : row + 1], to_lists([[row]])
            h_1E, v_IE, k = np.asarray(_unit(h_1E)), _unit(self._item_vectors), min(k, len(self.item_ids))
            item_1K, cosine_1K, finite = self.ranker.top(h_1E, v_IE, seen, k)
        if not finite.all():
            raise FloatingPointError(f"a cosine of item {item!r} is not finite")
        return self._lists(item_1K, cosine_1K)[0]

    def item_vectors(self) -> np.ndarray:
        """[I, E] float32: the vector of every item, in the order of `items`. Raises InputError for a model without item vectors."""
        self._check_vectors("item_vectors")
        return self.vectors_of(slice(0, len(self.item_ids)))

    def user_vectors(self, histories: Any) -> np.ndarray:
        """[n, E] float32: the vector of every history (of a table: of its users, sorted by id). A score is the product of a history's
        vector and an item's. Raises as `recommend`, and InputError for a model without vectors."""
        self._check_vectors("user_vectors")
        read = self._read(histories)
        return self.history_vectors(read.users, catalogue=read.catalogue)

    # ---- the same for users that are read already, as offline scoring calls it

    @property
    def item_ids(self) -> pl.Series:
        """The ids of the catalogue in the order of its rows."""
        return self._stored.item_ids

    def vectors_of(self, rows: slice) -> np.ndarray:
        """[n, E] float32: the vectors of a stretch of the catalogue. Raises FloatingPointError for a value that is not finite."""
        with jax.set_mesh(self._mesh):
            v_nE = np.asarray(self._item_vectors[rows])
        if not np.isfinite(v_nE).all():
            raise FloatingPointError(f"the vector of item {self.item_ids[rows][int(np.argmin(np.isfinite(v_nE).all(1)))]!r} is not finite")
        return v_nE

    def history_vectors(
        self, users: Users, history_tokens: int | None = None, report: Report = nothing, catalogue: Catalogue | None = None
    ) -> np.ndarray:
        """[n, E] float32: the projected state behind all of a user's events (`data.last_n`), of which the most recent that fit are read.
        Raises FloatingPointError for a value that is not finite.

        history_tokens: of all histories of the request, which decide whether the catalogue's states are used (`keeps_item_states`); None:
        of these. report: called after each batch with its number of users. catalogue: the model's own with more items behind.
        """
        h_nE = self._history_vectors(users, history_tokens, report, catalogue)
        self._check_finite(np.isfinite(h_nE).all(1), users.ids, "the vector")
        return h_nE

    def top(
        self,
        users: Users,
        k: int,
        filter_seen: bool,
        history_tokens: int | None = None,
        report: Report = nothing,
        catalogue: Catalogue | None = None,
    ) -> Found:
        """Each user's k best items of the catalogue; the keywords are those of `history_vectors`. Raises FloatingPointError for a score
        that is not finite."""
        items = len(self.item_ids)
        k, seen = min(k, items), _below(users.events, items) if filter_seen else None
        if self.config.eval.ranking == "likelihood":
            left_out = seen.split() if seen is not None else [np.zeros(0, np.int32)] * len(users)
            with jax.set_mesh(self._mesh):
                return self.ranker.likeliest(self.params, self._last(users), left_out, k, report, catalogue)
        h_nE = self._history_vectors(users, history_tokens, report, catalogue)
        with jax.set_mesh(self._mesh):
            item, score, finite = self.ranker.top(h_nE, self._item_vectors, seen, k)
        self._check_finite(finite, users.ids)
        return item, score

    def given(
        self,
        users: Users,
        k: int,
        history_tokens: int | None = None,
        report: Report = nothing,
        catalogue: Catalogue | None = None,
    ) -> Found:
        """Each user's k best of the given candidates, whether seen or not; of equal scores the first of the catalogue is first. The
        keywords are those of `history_vectors`. Raises FloatingPointError for a score that is not finite."""
        assert users.candidates is not None
        item = users.candidates.padded(power_of_two(int(users.candidates.lengths.max())))
        if self.config.eval.ranking == "likelihood":
            with jax.set_mesh(self._mesh):
                ranker = self._ranker_of(catalogue or self._stored.catalogue)
                found = ranker.likelihoods(self.params, self._last(users), users.candidates.split(), report, catalogue)
            score = np.pad(found, ((0, 0), (0, item.shape[1] - found.shape[1])), constant_values=-np.inf)
        else:
            h_nE = self._history_vectors(users, history_tokens, report, catalogue)
            with jax.set_mesh(self._mesh):
                score = self.ranker.scores(h_nE, self._item_vectors, item)
        self._check_finite(np.isfinite(score).all(1, where=item >= 0), users.ids)
        order = np.argsort(-score, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(item, order, axis=1), np.take_along_axis(score, order, axis=1)

    def table(self, users: Users, item: np.ndarray, score: np.ndarray) -> pl.DataFrame:
        """What `top` or `given` found, as rows `user`, `item`, `rank`, `score`."""
        user, place = np.nonzero(score > -np.inf)
        ids = users.ids.gather(user).rename("user"), self.item_ids.gather(item[user, place]).rename("item")
        return pl.DataFrame([*ids, pl.Series("rank", place + 1, dtype=pl.Int32), pl.Series("score", score[user, place])])

    # ----

    @functools.cached_property
    def _reader(self) -> Reader:
        return Reader(self.config, self._stored)

    def _read(self, histories: Any) -> Histories:
        read = self._reader.histories(histories)
        for note in read.notes:
            warnings.warn(note, stacklevel=3)
        return read

    def _history_vectors(
        self, users: Users, history_tokens: int | None = None, report: Report = nothing, catalogue: Catalogue | None = None
    ) -> np.ndarray:
        """As `history_vectors`; its scores are checked instead."""
        catalogue, row_tokens = catalogue or self._stored.catalogue, self.config.data.row_tokens
        events, targets = with_targets(users.events.last(self.config.data.last_n))
        rows = Rows(events, catalogue, evaluation_segments(events, catalogue, row_tokens, targets), row_tokens)
        tokens = int(catalogue.lengths[users.events.item].sum()) if history_tokens is None else history_tokens
        own = catalogue is self._stored.catalogue and keeps_item_states(self.config, catalogue, tokens)
        shards = batch_shards(self._mesh)
        few = -(-min(power_of_two(len(rows)), self.config.score.batch_rows) // shards) * shards  # a single history is no whole batch
        with jax.set_mesh(self._mesh):
            return self._ranker_of(catalogue).history_vectors(self.params, rows, self._leading_states if own else None, few, report)

    def _last(self, users: Users) -> list[np.ndarray]:
        return users.events.last(self.config.data.last_n).split()

    @functools.cached_property
    def _leading_states(self) -> jax.Array | None:
        """Of the catalogue, where the config keeps them for many histories."""
        return self.ranker.leading_states(self.params, sys.maxsize)

    @functools.cached_property
    def _item_vectors(self) -> jax.Array:
        """v_IE spread over the mesh."""
        return self.ranker.item_vectors(self.params, self._leading_states if self.config.leading_vectors else None)

    def _text_vector(self, item: dict) -> jax.Array:
        """[1, E]: the vector of an item with this text and without a row of the table."""
        if not self.config.uses_text:
            raise InputError(f"item = {item!r}: the model's item vectors do not come from text (config.objective.vectors)")
        entry = self._reader.text_entries([item], ["item"])[0]
        token_1T = np.zeros((1, power_of_two(len(entry))), np.int32)
        token_1T[0, : len(entry)] = entry
        ranker = self._ranker_of(self._stored.catalogue.extended([entry]))
        return ranker.text_vectors(self.params, token_1T, np.array([len(entry)], np.int32))

    def _ranker_of(self, catalogue: Catalogue) -> Ranker:
        """The ranker for histories of this catalogue. The usual one is compiled for items no longer than those of the model's own."""
        longest = self._stored.catalogue.lengths.max()
        return self.ranker if catalogue.lengths.max() <= longest else self._ranker_of_any_length

    @functools.cached_property
    def _ranker_of_any_length(self) -> Ranker:
        model = loading.model_of(self.config, self._stored, bounded=False)
        return Ranker(self.config, self._stored.catalogue, self._stored.trained, model, self._mesh, self.config.score.batch_rows)

    def _lists(self, item: np.ndarray, score: np.ndarray) -> list[list[Recommendation]]:
        ids = self._item_ids
        return [
            [Recommendation(ids[i], float(s)) for i, s in zip(items, scores, strict=True) if s > -np.inf]
            for items, scores in zip(item.tolist(), score.tolist(), strict=True)
        ]

    @functools.cached_property
    def _item_ids(self) -> list[str]:
        return self.item_ids.to_list()

    def _check_vectors(self, what: str) -> None:
        if self.config.eval.ranking == "likelihood":
            raise InputError(f"{what}: a model with config.eval.ranking = 'likelihood' has no vectors")

    def _check_finite(self, finite_n: np.ndarray | np.bool, ids: pl.Series, what: str = "a score") -> None:
        if not finite_n.all():
            raise FloatingPointError(f"{what} of user {ids[int(np.argmin(finite_n))]!r} is not finite")


@jax.jit
def _unit(v_IE: jax.Array) -> jax.Array:
    return v_IE / jnp.maximum(jnp.linalg.norm(v_IE, axis=1, keepdims=True), 1e-12)


def _check_k(k: object) -> None:
    if not isinstance(k, int | np.integer) or isinstance(k, bool):
        raise TypeError(f"k is {k!r} ({type(k).__name__}): give a whole number")
    if k < 1:
        raise InputError(f"k = {k}: must be 1 or more")


def _below(lists: Lists, items: int) -> Lists:
    """Without the rows from `items` on, which are no candidates."""
    if not (lists.item >= items).any():
        return lists
    return to_lists([row[row < items] for row in lists.split()])


def _others(lists: Lists, target: np.ndarray) -> Lists:
    """The distinct items of each list, without its target."""
    return to_lists([np.setdiff1d(row, [one]) for row, one in zip(lists.split(), target, strict=True)])

"""Recommendations, scores, ranks and vectors from a trained model.

`Recommender` belongs to the Python API. Offline scoring (`--mode=score`) uses it, too, for one part of the users at a time.
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
from iam_jax.data.batches import evaluation_rows
from iam_jax.data.catalogue import Catalogue
from iam_jax.data.histories import Lists, Users, table_of_lists, with_targets
from iam_jax.data.stored import Stored, decoded_texts, read_stored
from iam_jax.devices.memory import keep_freed_memory
from iam_jax.devices.mesh import batch_shards
from iam_jax.errors import InputError
from iam_jax.model import Model, Params
from iam_jax.ranking.baselines import rank_scores
from iam_jax.ranking.core import Bonus, ItemsAndScores, Ranker, Report, keeps_item_states, no_report, power_of_two
from iam_jax.ranking.fusion import Fusion
from iam_jax.runs.checkpoint import Checkpoints
from iam_jax.serving import loading
from iam_jax.serving.inputs import Histories, Reader, convert_table, is_list, to_lists
from iam_jax.storage.files import to_path


class Recommendation(NamedTuple):
    """A recommended item.

    Attributes:
      item: its id.
      score: the score by which it was ranked.
    """

    item: str
    score: float


def load(workdir: str | Path, step: str | int = "best", overrides: Mapping[str, Any] | None = None) -> "Recommender":
    """Loads a trained model from a working folder. On a CPU, the process keeps freed memory from then on (docs/devices.md).

    Args:
      workdir: the working folder of a trained run: a local path, gs:// or s3://.
      step: "best" (by validation), "last", or a step number.
      overrides: values of single fields by dotted name: `{"mesh.data": 1}`, `{"model.pretrained": "…"}` if the pretrained model has moved,
        `{"eval.ranking": "likelihood"}` for a model with both objectives, `{"eval.fusion": "transitions"}` for scores that are fused with a
        baseline (which needs the run's data, and an evaluation of this step with the same override). Fields that change the model or the
        data cannot be overridden.

    Raises:
      InputError: if the folder has no run or no such checkpoint, if its files are damaged or do not belong together, if an override is
        not allowed, or if the weight of a fusion is missing.
    """
    keep_freed_memory()
    folder = to_path(str(workdir))
    config = resolve(override(get_config(str(folder)), overrides))
    config = loading.shape_from_folder(folder, config, saved=True)
    stored = read_stored(folder, config.data)
    checkpoints = Checkpoints(folder, config.train.keep, config.selection, read_only=True)
    model, mesh = loading.model_of(config, stored), loading.serving_mesh(config)
    with jax.set_mesh(mesh):
        number, params = loading.restore(checkpoints, str(step), config, model, mesh)
        tower_XD = loading.tower_of(folder, config, stored, model, params, mesh)
    checkpoints.close()
    fusion = loading.fusion_of(folder, config, stored, number)
    return Recommender(config, stored, model, params, mesh, number, tower_XD, fusion)


class Recommender:
    """A trained model with its catalogue. `iam_jax.load` makes it. The first call of a method compiles; later calls reuse the result.

    Attributes:
      config: the run's config (`iam_jax.config.Config`).
      params: the parameters, a nested dict of arrays.
      step: the step number of the checkpoint.
    """

    def __init__(
        self,
        config: Config,
        stored: Stored,
        model: Model,
        params: Params,
        mesh: jax.sharding.Mesh,
        step: int,
        tower_XD: np.ndarray | None = None,
        fusion: Fusion | None = None,
    ):
        self.config, self.params, self.step = config, params, step
        self._stored, self._model, self._mesh, self._fusion = stored, model, mesh, fusion
        self.ranker = Ranker(config, stored.catalogue, stored.trained, model, mesh, config.score.batch_rows, stored.vectors, tower_XD)

    # ---- the Python API

    @functools.cached_property
    def items(self) -> pl.DataFrame:
        """The catalogue as a polars table, one row per item.

        Its columns are `item`; `text`, decoded from at most `data.item_tokens` tokens (null if the model reads ids); and `trained`, whether
        the item has a training event.
        """
        texts = decoded_texts(self._stored.catalogue, self.config.data)
        text = pl.Series("text", texts, dtype=pl.String) if texts else pl.Series("text", [None] * len(self.item_ids), pl.String)
        return pl.DataFrame([self.item_ids.rename("item"), text, pl.Series("trained", self._stored.trained)])

    def recommend(self, histories: Any, k: int = 10, filter_seen: bool = True) -> Any:
        """Recommends the k best items for each history, best first.

        Args:
          histories: a list of histories, each a list of item ids, oldest first. If the model reads text, `{"text": "…"}` is an item that is
            not in the catalogue. Or a polars or pandas table with the columns `user`, `item` and `timestamp`.
          k: length of a list. A list is shorter if fewer items are left.
          filter_seen: whether to leave out the items of the history.

        Returns:
          For lists, a list of `Recommendation(item, score)` for each history. For a table, a table of the same library with the columns
          `user`, `item`, `rank` (from 1) and `score`, sorted by user and rank.

        Raises:
          InputError: if an item is unknown, a history is empty, or k is below 1.
          TypeError: if an argument has a wrong type.
          FloatingPointError: if a score is not finite.
        """
        _check_k(k)
        read = self._read(histories)
        item_nK, score_nK = self.top(read.users, k, filter_seen, catalogue=read.catalogue, new_vectors=read.new_vectors)
        if read.table:
            return convert_table(self.table(read.users, item_nK, score_nK), read.table)
        return self._lists(item_nK, score_nK)

    def score(self, histories: Any, candidates: Any) -> Any:
        """Scores given candidates, including items of the history.

        Args:
          histories: as in `recommend`.
          candidates: a list of item ids for each history, which may repeat; or, if the histories are a table, a table with the columns
            `user` and `item`.

        Returns:
          For lists, a float32 array for each history, in the order of its candidates. For tables, a table of the same library as the
          histories, with the columns `user`, `item`, `rank` (from 1) and `score`, sorted by user and rank.

        Raises:
          InputError: if an item or a user is unknown, if a history or a list of candidates is empty, or if a table repeats a pair.
          TypeError: if an argument has a wrong type.
          FloatingPointError: if a score is not finite.
        """
        read = self._read(histories)
        users, rows = self._reader.candidates(candidates, read)
        item_nK, score_nK = self.score_candidates(users, len(self.item_ids), catalogue=read.catalogue, new_vectors=read.new_vectors)
        if rows is None:
            return convert_table(self.table(users, item_nK, score_nK), read.table)
        scores = [dict(zip(item.tolist(), score, strict=True)) for item, score in zip(item_nK, score_nK, strict=True)]
        return [np.array([score[item] for item in items], np.float32) for score, items in zip(scores, rows, strict=True)]

    def rank(self, histories: Any, targets: Sequence[str], filter_seen: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Ranks one target per history exactly among the whole catalogue.

        Args:
          histories: a list of histories, as in `recommend`.
          targets: an item id for each history.
          filter_seen: whether the items of the history, except the target, are no candidates.

        Returns:
          rank [n] int64, 1 + the number of candidates with a higher score; and ties [n] int64, the number of other candidates with an equal
          score.

        Raises:
          InputError: if an item is unknown, a history is empty, or the number of targets is not that of the histories.
          TypeError: if an argument has a wrong type, including tables.
          FloatingPointError: if a score is not finite.
        """
        read = self._read(histories)
        if read.table:
            raise TypeError("histories is a table: `rank` needs a list of histories and a list with one target for each")
        users = read.users
        if not is_list(targets):
            raise TypeError(f"targets is a {type(targets).__name__}: it must be a list of item ids")
        if len(targets) != len(users):
            raise InputError(f"{len(targets):,} targets for {len(users):,} histories: each history needs one")
        target = np.array([self._reader.row(item, f"targets[{n}]") for n, item in enumerate(targets)], np.int64)
        seen = _below(users.events, len(self.item_ids)) if filter_seen else None
        if self.config.eval.ranking == "likelihood":
            with jax.set_mesh(self._mesh):
                ranker = self._ranker_of(read.catalogue)
                scores = ranker.likelihoods(self.params, self._last(users), None, catalogue=read.catalogue)
            self._check_finite(np.isfinite(scores).all(1), users.ids)
            return rank_scores(scores, target, None if seen is None else (np.repeat(np.arange(len(seen)), seen.lengths), seen.item))
        h_nE = self._history_vectors(users, catalogue=read.catalogue, new_vectors=read.new_vectors)
        excluded = None if seen is None else (lambda at: _without_targets(seen.of(at), target[at]))
        with jax.set_mesh(self._mesh):
            rank, ties, finite = self.ranker.rank(h_nE, self._item_vectors, target, excluded, bonus=self._bonus(users))
        self._check_finite(finite, users.ids)
        return rank, ties

    def similar(self, item: str | dict, k: int = 10) -> list[Recommendation]:
        """Finds the k items whose vectors have the largest cosine similarity to that of `item`, without `item` itself.

        Args:
          item: an item id; or `{"text": "…"}`, if item vectors come from text.
          k: length of the list. It is shorter if the catalogue has fewer items.

        Returns:
          A list of `Recommendation(item, score)`, most similar first. The score is the cosine; it is 0 for items whose vector is 0 (without
          text vectors, the items without a training event).

        Raises:
          InputError: if the item is unknown, k is below 1, or the model has no item vectors.
          TypeError: if an argument has a wrong type.
          FloatingPointError: if a cosine is not finite.
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
        """Returns the vectors of all items.

        Returns:
          [I, E] float32, in the order of `items`. The score of an item is the inner product of its vector and the history's vector (plus
          the score of the baseline, if the model is fused with one).

        Raises:
          InputError: if the model has no item vectors (`eval.ranking` = "likelihood").
          FloatingPointError: if a vector is not finite.
        """
        self._check_vectors("item_vectors")
        return self.vectors_of(slice(0, len(self.item_ids)))

    def user_vectors(self, histories: Any) -> np.ndarray:
        """Returns the vector of each history.

        Args:
          histories: as in `recommend`.

        Returns:
          [n, E] float32, in the order of the histories; for a table, in the order of the sorted user ids.

        Raises:
          InputError: if an item is unknown, a history is empty, or the model has no vectors (`eval.ranking` = "likelihood").
          TypeError: if `histories` has a wrong type.
          FloatingPointError: if a vector is not finite.
        """
        self._check_vectors("user_vectors")
        read = self._read(histories)
        return self.history_vectors(read.users, catalogue=read.catalogue, new_vectors=read.new_vectors)

    # ---- the same for `Users`, as offline scoring needs it

    @property
    def item_ids(self) -> pl.Series:
        """The item ids, in the order of the catalogue."""
        return self._stored.item_ids

    def vectors_of(self, rows: slice) -> np.ndarray:
        """[n, E] float32: the vectors of these items. rows: of the catalogue. Raises FloatingPointError for a value that is not finite."""
        with jax.set_mesh(self._mesh):
            v_nE = np.asarray(self._item_vectors[rows])
        if not np.isfinite(v_nE).all():
            raise FloatingPointError(f"the vector of item {self.item_ids[rows][int(np.argmin(np.isfinite(v_nE).all(1)))]!r} is not finite")
        return v_nE

    def history_vectors(
        self,
        users: Users,
        history_tokens: int | None = None,
        report: Report = no_report,
        catalogue: Catalogue | None = None,
        new_vectors: np.ndarray | None = None,
    ) -> np.ndarray:
        """[n, E] float32: the projected state at the end of each user's history. The model reads the most recent events that fit into a
        row, at most `data.last_n`.

        Args:
          users: the users with their events.
          history_tokens: number of tokens of all histories of the request, for `keeps_item_states`; None: of these histories.
          report: is called after each batch with its number of users.
          catalogue: the model's catalogue, followed by further items that only histories contain; None: the model's catalogue.
          new_vectors: the given vectors of those further items, if the model reads vectors.

        Raises:
          FloatingPointError: if a vector is not finite.
        """
        h_nE = self._history_vectors(users, history_tokens, report, catalogue, new_vectors)
        self._check_finite(np.isfinite(h_nE).all(1), users.ids, "the vector")
        return h_nE

    def top(
        self,
        users: Users,
        k: int,
        filter_seen: bool,
        history_tokens: int | None = None,
        report: Report = no_report,
        catalogue: Catalogue | None = None,
        new_vectors: np.ndarray | None = None,
    ) -> ItemsAndScores:
        """The k best items of the catalogue for each user. All other arguments: as in `history_vectors`.

        Raises FloatingPointError for a score that is not finite.
        """
        items = len(self.item_ids)
        k, seen = min(k, items), _below(users.events, items) if filter_seen else None
        if self.config.eval.ranking == "likelihood":
            excluded = seen.split() if seen is not None else [np.zeros(0, np.int32)] * len(users)
            with jax.set_mesh(self._mesh):
                return self.ranker.likeliest(self.params, self._last(users), excluded, k, report, catalogue)
        h_nE = self._history_vectors(users, history_tokens, report, catalogue, new_vectors)
        with jax.set_mesh(self._mesh):
            item, score, finite = self.ranker.top(h_nE, self._item_vectors, seen, k, self._bonus(users))
        self._check_finite(finite, users.ids)
        return item, score

    def score_candidates(
        self,
        users: Users,
        k: int,
        history_tokens: int | None = None,
        report: Report = no_report,
        catalogue: Catalogue | None = None,
        new_vectors: np.ndarray | None = None,
    ) -> ItemsAndScores:
        """The k best of each user's candidates, including seen items. Among equal scores, the first item of the catalogue comes first.
        All other arguments: as in `history_vectors`.

        Raises FloatingPointError for a score that is not finite.
        """
        assert users.candidates is not None
        item = users.candidates.padded(power_of_two(int(users.candidates.lengths.max())))
        if self.config.eval.ranking == "likelihood":
            with jax.set_mesh(self._mesh):
                ranker = self._ranker_of(catalogue or self._stored.catalogue)
                likelihoods = ranker.likelihoods(self.params, self._last(users), users.candidates.split(), report, catalogue)
            score = np.pad(likelihoods, ((0, 0), (0, item.shape[1] - likelihoods.shape[1])), constant_values=-np.inf)
        else:
            h_nE = self._history_vectors(users, history_tokens, report, catalogue, new_vectors)
            with jax.set_mesh(self._mesh):
                score = self.ranker.scores(h_nE, self._item_vectors, item, self._bonus(users))
        self._check_finite(np.isfinite(score).all(1, where=item >= 0), users.ids)
        order = np.argsort(-score, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(item, order, axis=1), np.take_along_axis(score, order, axis=1)

    def table(self, users: Users, item: np.ndarray, score: np.ndarray) -> pl.DataFrame:
        """The result of `top` or `score_candidates` as a table with the columns `user`, `item`, `rank` and `score`."""
        return table_of_lists(users, self.item_ids, item, score)

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
        self,
        users: Users,
        history_tokens: int | None = None,
        report: Report = no_report,
        catalogue: Catalogue | None = None,
        new_vectors: np.ndarray | None = None,
    ) -> np.ndarray:
        """As `history_vectors`, but the caller checks the scores instead."""
        catalogue, config = catalogue or self._stored.catalogue, self.config
        events, targets = with_targets(users.events.last(self.config.data.last_n))
        rows = evaluation_rows(events, catalogue, config.row_slots, targets, **config.row_options)
        tokens = int(catalogue.lengths[users.events.item].sum()) if history_tokens is None else history_tokens
        leading = catalogue is self._stored.catalogue and keeps_item_states(self.config, catalogue, tokens)
        shards = batch_shards(self._mesh)
        # Few histories are a smaller batch.
        batch_rows = -(-min(power_of_two(len(rows)), self.config.score.batch_rows) // shards) * shards
        with jax.set_mesh(self._mesh):
            leading_XD, ranker = self._leading_states if leading else None, self._ranker_of(catalogue)
            new = catalogue.items - self._stored.catalogue.items
            items = ranker.items.extended(new_vectors, new) if new else None
            if config.item_level and not leading:
                assert self._leading_states is not None
                leading_XD = ranker.with_items(self.params, self._leading_states, catalogue)
            return ranker.history_vectors(self.params, rows, leading_XD, batch_rows, report, items)

    def _bonus(self, users: Users) -> Bonus | None:
        """What is added to the model's scores of these users; None: nothing."""
        if self._fusion is None:
            return None
        return self._fusion.bonus(*with_targets(users.events.last(self.config.data.last_n)), len(self.item_ids))

    def _last(self, users: Users) -> list[np.ndarray]:
        return users.events.last(self.config.data.last_n).split()

    @functools.cached_property
    def _leading_states(self) -> jax.Array | None:
        """The states of the catalogue after the leading intra layers; None if they are not kept for any number of histories."""
        return self.ranker.leading_states(self.params, sys.maxsize)

    @functools.cached_property
    def _item_vectors(self) -> jax.Array:
        """v_IE float32, sharded over the mesh by rows."""
        return self.ranker.item_vectors(self.params, self._leading_states if self.config.leading_vectors else None)

    def _text_vector(self, item: dict) -> jax.Array:
        """[1, E] float32: the vector of an item with this text and without a table row."""
        if not self.config.uses_text:
            raise InputError(f"item = {item!r}: the model's item vectors do not come from text (config.objective.vectors)")
        entry = self._reader.text_entries([item], ["item"])[0]
        token_1T = np.zeros((1, power_of_two(len(entry))), np.int32)
        token_1T[0, : len(entry)] = entry
        ranker = self._ranker_of(self._stored.catalogue.extended([entry]))
        vectors = self._reader.new_vectors([item], ["item"])
        return ranker.text_vectors(self.params, token_1T, np.array([len(entry)], np.int32), vectors)

    def _ranker_of(self, catalogue: Catalogue) -> Ranker:
        """The ranker for histories of items of this catalogue. `self.ranker` only reads items as long as those of the model's catalogue."""
        longest = self._stored.catalogue.lengths.max()
        return self.ranker if catalogue.lengths.max() <= longest else self._ranker_of_any_length

    @functools.cached_property
    def _ranker_of_any_length(self) -> Ranker:
        model = loading.model_of(self.config, self._stored, bounded=False)
        stored, batch_rows = self._stored, self.config.score.batch_rows
        return Ranker(self.config, stored.catalogue, stored.trained, model, self._mesh, batch_rows, stored.vectors)

    def _lists(self, item: np.ndarray, score: np.ndarray) -> list[list[Recommendation]]:
        ids = self._item_ids
        return [
            [Recommendation(ids[i], float(s)) for i, s in zip(items, scores, strict=True) if s > -np.inf]
            for items, scores in zip(item.tolist(), score.tolist(), strict=True)
        ]

    @functools.cached_property
    def _item_ids(self) -> list[str]:
        return self.item_ids.to_list()

    def _check_vectors(self, method: str) -> None:
        if self.config.eval.ranking == "likelihood":
            raise InputError(f"{method}: a model with config.eval.ranking = 'likelihood' has no vectors")

    def _check_finite(self, finite_n: np.ndarray | np.bool, ids: pl.Series, value: str = "a score") -> None:
        if not finite_n.all():
            raise FloatingPointError(f"{value} of user {ids[int(np.argmin(finite_n))]!r} is not finite")


@jax.jit
def _unit(v_IE: jax.Array) -> jax.Array:
    return v_IE / jnp.maximum(jnp.linalg.norm(v_IE, axis=1, keepdims=True), 1e-12)


def _check_k(k: object) -> None:
    if not isinstance(k, int | np.integer) or isinstance(k, bool):
        raise TypeError(f"k is {k!r} ({type(k).__name__}): it must be an integer")
    if k < 1:
        raise InputError(f"k = {k}: must be 1 or more")


def _below(lists: Lists, items: int) -> Lists:
    """The lists without rows of the catalogue from `items` on, which are no candidates."""
    if not (lists.item >= items).any():
        return lists
    return to_lists([row[row < items] for row in lists.split()])


def _without_targets(lists: Lists, target: np.ndarray) -> Lists:
    """The distinct items of each list, without its target."""
    return to_lists([np.setdiff1d(items, [item]) for items, item in zip(lists.split(), target, strict=True)])

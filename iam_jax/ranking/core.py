"""The ranking core: it turns histories into vectors, and vectors into ranks or lists; it also computes likelihoods of items' texts.

Evaluation, offline scoring, export, planning and the Python API all rank with this class. On a mesh, the item vectors are sharded over all
devices, and each device scores all histories against its own items; histories are sharded by rows. On a mesh of several processes, all
processes must call the same methods with the same arguments.

Axes: n histories, X histories ranked at the same time, C items of a chunk or given candidates, I items, E item vectors, S seen items,
K items of a list, D model.

A bonus (`Bonus`) is an additional score of all items for each history, which is added to the model's (fusion.py).
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from iam_jax.config import Config
from iam_jax.data.batches import Batch, Rows, evaluation_batches
from iam_jax.data.candidates import candidate_rows
from iam_jax.data.catalogue import Catalogue
from iam_jax.data.histories import Lists
from iam_jax.data.item_rows import CatalogueItems, pack_items, without_items
from iam_jax.devices.mesh import batch_shards, shard_batch, spread_rows
from iam_jax.model import Model, Params
from iam_jax.model.items import Items, item_vectors, make_items
from iam_jax.ranking.beam import beam_search, history_rows, make_trie
from iam_jax.ranking.likelihood import log_likelihoods
from iam_jax.ranking.scores import bonus_sharding, over_items, pair_scores, ranking_program, top_program

_SCORES = 1 << 21  # scores that exist at the same time: 8 MiB, which fit partly into a CPU's cache
_PAIR_NUMBERS = 1 << 23  # numbers in the vectors of given candidates that exist at the same time: 32 MiB
_BONUS = 1 << 23  # scores of a bonus that exist at the same time: 32 MiB, and twice as much in float64

ItemsAndScores = tuple[np.ndarray, np.ndarray]  # items [n, K] int32, best first, and scores [n, K] float32, -inf for none
Bonus = Callable[[np.ndarray], np.ndarray]  # maps indices [m] of histories to finite scores [m, I] float32
Report = Callable[[int], None]  # is called after each batch with its number of histories


def no_report(_: int) -> None:
    """A `Report` that does nothing."""


def keeps_item_states(config: Config, catalogue: Catalogue, history_tokens: int) -> bool:
    """Whether the states of the whole catalogue after the leading intra layers are computed once, and all histories use them.

    The schedule and `model.item_states` must allow it, and the states must fit into `eval.item_states_gib`. With `auto`, they must also be
    no additional work: text vectors need them anyway, or the histories have at least as many tokens as the catalogue.

    history_tokens: number of tokens of all histories together.
    """
    model = config.model
    if config.item_level:  # its layers read nothing but one state of each item
        return True
    if not config.states_by_item or model.item_states == "off" or item_states_gib(config, catalogue) > config.eval.item_states_gib:
        return False
    return model.item_states == "on" or config.leading_vectors or int(catalogue.lengths.sum()) <= history_tokens


def item_states_gib(config: Config, catalogue: Catalogue) -> float:
    """Size in GiB of the catalogue's states after the leading intra layers."""
    states = catalogue.items if config.item_level else float(catalogue.lengths.sum())
    return states * config.model.width * jnp.dtype(config.model.dtype).itemsize / 2**30


class Ranker:
    """A model with its catalogue, compiled for one mesh. Parameters are arguments, so one object serves a whole training run.

    Args:
      config: the run's config.
      catalogue: the items; the row of an item is its number.
      trained_I: bool, whether each item has a training event.
      model: the model.
      mesh: the device mesh.
      batch_rows: number of rows of histories that are computed at the same time.
      vector_IP: the items' given vectors (`data.vectors`); None: there are none.
      tower_XD: the states of a constant tower (tower.py); None: there is none.
    """

    def __init__(
        self,
        config: Config,
        catalogue: Catalogue,
        trained_I: np.ndarray,
        model: Model,
        mesh: jax.sharding.Mesh,
        batch_rows: int,
        vector_IP: np.ndarray | None = None,
        tower_XD: jax.Array | np.ndarray | None = None,
    ):
        self.config, self.catalogue, self.model, self.mesh, self.batch_rows = config, catalogue, model, mesh, batch_rows
        self.items = make_items(catalogue, trained_I, vector_IP, tower_XD)
        whole = functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))  # the host of every process reads them
        chunk, count = config.eval.chunk_items, catalogue.items

        @whole
        def history_states(params: Params, batch: dict, leading_XD: jax.Array | None, items: Items) -> jax.Array:
            network = model.bind(params)
            x_BTD = network.states(batch, leading_XD=leading_XD, items=items)
            return network.project(jnp.take_along_axis(x_BTD, batch["target_at"][..., None], axis=1))

        @jax.jit
        def vectors(params: Params, items: Items, leading_XD: jax.Array | None) -> jax.Array:
            boundary_XD = None if leading_XD is None else leading_XD[self.catalogue_items.boundary_slots]
            return spread_rows(mesh, item_vectors(model.bind(params), config, items, boundary_XD))

        # The jitted functions, which `planning` compiles, too.
        self.history_states, self.vectors = history_states, vectors
        self.text_vectors = whole(
            lambda params, token_CT, length_C, vector_CP=None: model.bind(params).text_vectors(token_CT, length_C, None, vector_CP)
        )

        @functools.partial(jax.jit, static_argnums=2)
        def leading(params: Params, rows: Batch, chunks: int) -> jax.Array:
            x_XD = model.bind(params).leading_states(rows, chunks)
            return x_XD if self.catalogue_items.kept is None else x_XD[self.catalogue_items.kept]

        self.leading = leading
        self.entry_inputs = whole(self._entry_inputs)
        self.all_states = whole(lambda params, rows: model.bind(params).leading_states(rows, 1))
        self.ranks = ranking_program(mesh, chunk, count)
        self.ranks_with_bonus = ranking_program(mesh, chunk, count, bonus=True)
        self.pairs = over_items(mesh, pair_scores, arrays=3)
        size, normalize = config.objective.chunk, config.eval.length_normalized
        self.log_likelihoods = whole(
            lambda params, batch, count: log_likelihoods(model.bind(params), batch, count, size, normalize=normalize), static_argnums=2
        )
        self._top: dict[tuple[int, bool, bool], Callable] = {}

    # ---- item states and vectors

    @functools.cached_property
    def catalogue_items(self) -> CatalogueItems:
        """The catalogue packed into rows for the leading intra layers."""
        shards = batch_shards(self.mesh)
        at_once = math.ceil(self.batch_rows / shards) * shards
        return CatalogueItems(self.catalogue, self.config.data.row_tokens, at_once, self.config.item_level)

    def leading_states(self, params: Params, history_tokens: int) -> jax.Array | None:
        """States of the catalogue after the leading intra layers [slots, D]; None if `keeps_item_states` is False."""
        if self.items.tower_XD is not None:
            return self.items.tower_XD
        if not keeps_item_states(self.config, self.catalogue, history_tokens):
            return None
        return self.leading(params, shard_batch(self.mesh, self.catalogue_items.rows), self.catalogue_items.chunks)

    def item_vectors(self, params: Params, leading_XD: jax.Array | None) -> jax.Array:
        """v_IE float32, sharded over the mesh by rows. Rows of zeros follow the items if the number of items is not divisible.

        leading_XD: from `leading_states`.
        """
        return self.vectors(params, self.items, leading_XD)

    def _entry_inputs(self, params: Params, leading_XD: jax.Array, items: Items) -> jax.Array:
        """[I + 2, E]: the input of the item-level layers of every entry of the catalogue."""
        number = jnp.arange(self.catalogue.items + 2)[:, None]
        batch = {"slot": number}
        if self.config.row_options["identity"]:
            batch["identity"] = jnp.where(number < self.catalogue.items, number, -1)
        return self.model.bind(params).inputs(batch, None, leading_XD, items)[:, 0]

    def with_items(self, params: Params, leading_XD: jax.Array, catalogue: Catalogue) -> jax.Array:
        """`leading_states` with those of further items behind the catalogue's items, for item-level layers.

        catalogue: the ranker's catalogue, followed by the further items.
        """
        items = self.catalogue.items
        new = np.arange(items, catalogue.items)
        rows, start = pack_items(catalogue, new, self.config.data.row_tokens)
        x_XD = self.all_states(params, shard_batch(self.mesh, rows))[start + catalogue.lengths[new] - 1]
        return jnp.concatenate([leading_XD[:items], x_XD, leading_XD[items:]])

    # ---- histories

    def batch(self, batch: Batch, width: int, leading: bool) -> Batch:
        """The arrays of a batch that `history_states` needs, padded to `width` targets per row; also `segment`, -1 for none.

        leading: whether the states of the leading intra layers are given.
        """
        target_at, segment = batch["target_at"], batch["segment"]
        padding = (0, 0), (0, width - target_at.shape[1])
        batch = self.catalogue_items(batch) if leading else without_items(batch)
        arrays = {name: batch[name] for name in ("token", "user", "group", "position", "slot", "identity") if name in batch}
        return arrays | {"target_at": np.pad(target_at, padding), "segment": np.pad(segment, padding, constant_values=-1)}

    def history_vectors(
        self,
        params: Params,
        rows: Rows,
        leading_XD: jax.Array | None,
        batch_rows: int | None = None,
        report: Report = no_report,
        items: Items | None = None,
    ) -> np.ndarray:
        """h_nE float32: the projected state at the end of each segment of the rows, from which the next item is predicted.

        Args:
          params: the parameters.
          rows: packed histories, with one target per segment.
          leading_XD: from `leading_states`.
          batch_rows: number of rows that are computed at the same time; None: that of the ranker.
          report: is called after each batch.
          items: the catalogue's items, followed by further items that only histories contain; None: the catalogue's items.
        """
        items = items or self.items
        width, n = power_of_two(rows.targets_per_row), len(rows.segments)  # few shapes are compiled
        h_nE = np.zeros((n, 0 if n else self.config.vector_width), np.float32)
        finish = functools.partial(self.batch, width=width, leading=leading_XD is not None)
        for batch in evaluation_batches(rows, batch_rows or self.batch_rows, finish):
            segment = batch.pop("segment")
            h = np.asarray(self.history_states(params, shard_batch(self.mesh, batch), leading_XD, items))
            h_nE = h_nE if h_nE.size else np.zeros((n, h.shape[-1]), np.float32)
            h_nE[segment[segment >= 0]] = h[segment >= 0]
            report(int((segment >= 0).sum()))
        return h_nE

    # ---- vectors to ranks and lists

    @property
    def at_once(self) -> int:
        """The number of histories that are ranked at the same time."""
        return max(8, min(1024, _SCORES // min(self.config.eval.chunk_items, self.catalogue.items)))

    @property
    def at_once_with_bonus(self) -> int:
        """The same with a bonus, which bounds the memory of its scores."""
        return min(self.at_once, max(8, _BONUS // self.catalogue.items))

    def _spread_bonus(self, bonus_nI: np.ndarray, rows: int, v_IE: jax.Array) -> jax.Array:
        """A bonus with rows and columns of zeros behind it, sharded over the mesh as v_IE is. rows: the number of rows."""
        bonus_XI = np.pad(bonus_nI, ((0, rows - bonus_nI.shape[0]), (0, v_IE.shape[0] - bonus_nI.shape[1])))
        return jax.make_array_from_callback(bonus_XI.shape, bonus_sharding(self.mesh), lambda at: bonus_XI[at])

    def rank(
        self,
        h_nE: np.ndarray,
        v_IE: jax.Array,
        target_n: np.ndarray,
        seen: Callable[[np.ndarray], Lists] | None,
        report: Report = no_report,
        bonus: Bonus | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The exact rank of one target per history among the whole catalogue.

        Args:
          h_nE: history vectors.
          v_IE: from `item_vectors`.
          target_n: rows of the targets.
          seen: maps indices [m] of histories to their items that are no candidates (distinct, without the target); None: there are none.
          report: is called after each batch.
          bonus: is added to the scores; None: there is none.

        Returns:
          rank [n] int64, ties [n] int64, and finite [n] bool, whether all scores of the history are finite.
        """
        n, X = len(target_n), self.at_once if bonus is None else self.at_once_with_bonus
        program = self.ranks if bonus is None else self.ranks_with_bonus
        rank, ties, finite = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n, bool)
        # Sorted by item, so that the targets of a batch are in few chunks, and few chunks are computed twice.
        order = np.argsort(target_n, kind="stable")
        for start in range(0, n, X):
            at = order[start : start + X]
            missing = X - len(at)
            seen_XS = padded(seen(at), X) if seen else np.full((X, 1), -1, np.int32)
            more = [] if bonus is None else [self._spread_bonus(bonus(at), X, v_IE)]
            target_X = np.pad(target_n[at], (0, missing), mode="edge")
            results = program(np.pad(h_nE[at], ((0, missing), (0, 0))), v_IE, target_X, seen_XS, *more)
            rank[at], ties[at], finite[at] = (np.asarray(result)[: len(at)] for result in results)
            report(len(at))
        return rank, ties, finite

    def top_program(self, k: int, filter_seen: bool = True, bonus: bool = False) -> Callable:
        """`scores.top_program` for this catalogue. Each one is made once."""
        key = k, filter_seen, bonus
        if key not in self._top:
            self._top[key] = top_program(self.mesh, k, self.config.eval.chunk_items, self.catalogue.items, filter_seen, bonus)
        return self._top[key]

    def top(
        self, h_nE: np.ndarray, v_IE: jax.Array, seen: Lists | None, k: int, bonus: Bonus | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The k best items of each history, without the seen items.

        Args:
          h_nE: history vectors.
          v_IE: from `item_vectors`.
          seen: for each history, the items that are no candidates; None: there are none.
          k: length of a list, at most the number of items.
          bonus: is added to the scores; None: there is none.

        Returns:
          items [n, k] int32, best first; scores [n, k] float32; -1 and -inf where no candidate is left; finite [n] bool, whether all scores
          of the history are finite.
        """
        n = len(h_nE)
        X = min(power_of_two(n), self.at_once if bonus is None else self.at_once_with_bonus)
        item, score, finite = np.full((n, k), -1, np.int32), np.full((n, k), -np.inf, np.float32), np.ones(n, bool)
        program = self.top_program(k, seen is not None, bonus is not None)
        for begin in range(0, n, X):
            at = slice(begin, min(begin + X, n))
            h_XE = np.pad(h_nE[at], ((0, X - (at.stop - begin)), (0, 0)))
            more = [] if bonus is None else [self._spread_bonus(bonus(np.arange(at.start, at.stop)), X, v_IE)]
            results = program(h_XE, v_IE, *([] if seen is None else [padded(seen[at], X)]), *more)
            item[at], score[at], finite[at] = (np.asarray(x)[: at.stop - begin] for x in results)
        return item, score, finite

    def scores(self, h_nE: np.ndarray, v_IE: jax.Array, item_nC: np.ndarray, bonus: Bonus | None = None) -> np.ndarray:
        """[n, C] float32: the scores of given items, -inf where item_nC is -1. bonus: is added to the scores; None: there is none."""
        n, C = item_nC.shape
        X = min(power_of_two(n), max(1, _PAIR_NUMBERS // (C * h_nE.shape[1])))
        score = np.zeros((n, C), np.float32)
        for begin in range(0, n, X):
            h, item = h_nE[begin : begin + X], item_nC[begin : begin + X]
            padding = (0, X - len(h)), (0, 0)
            h_XE, item_XC = np.pad(h, padding), np.pad(item, padding, constant_values=-1)
            score[begin : begin + X] = np.asarray(self.pairs(h_XE, v_IE, item_XC))[: len(h)]
        if bonus is not None:
            for begin in range(0, n, self.at_once_with_bonus):
                at = np.arange(begin, min(begin + self.at_once_with_bonus, n))
                score[at] += np.take_along_axis(bonus(at), np.maximum(item_nC[at], 0), axis=1)
        return score

    # ---- text generators

    @property
    def generations_at_once(self) -> int:
        """The number of histories for which likelihoods or beams are computed at the same time."""
        shards = batch_shards(self.mesh)
        return math.ceil(self.batch_rows / 5 / shards) * shards

    @functools.cached_property
    def _texts(self) -> tuple[np.ndarray, np.ndarray]:
        """The distinct token sequences of the catalogue: one item of each sequence, and the number of each item's sequence [I].

        Each sequence is scored once, because equal texts must tie, and rounding depends on the position in a row.
        """
        token, length = self.catalogue.padded()
        _, first, text_I = np.unique(np.column_stack([length, token]), axis=0, return_index=True, return_inverse=True)
        return first, text_I.reshape(-1)

    @functools.cached_property
    def _trie(self):
        return make_trie(self.catalogue)

    def fitting(self, histories: Sequence[np.ndarray], catalogue: Catalogue) -> list[np.ndarray]:
        """The most recent items of each history that leave room in a row for the longest item of the ranker's catalogue.

        catalogue: as in `likelihoods`.
        """
        room = self.config.data.row_tokens - catalogue.frame_tokens - int(self.catalogue.item_lengths.max())
        return [items[len(items) - int((np.cumsum(catalogue.lengths[items][::-1]) <= room).sum()) :] for items in histories]

    def likelihoods(
        self,
        params: Params,
        histories: Sequence[np.ndarray],
        candidates: Sequence[np.ndarray] | None,
        report: Report = no_report,
        catalogue: Catalogue | None = None,
    ) -> np.ndarray:
        """log p(text of candidate | history) for the candidates of each history.

        Args:
          params: the parameters.
          histories: rows of the catalogue, oldest first.
          candidates: rows of the catalogue for each history; None: all items for every history.
          report: is called often, with the number of histories that have been finished since the last call.
          catalogue: the ranker's catalogue, followed by further items that only histories contain; None: the ranker's catalogue.

        Returns:
          [n, C] float32, in the order of the candidates; -inf after the last one.
        """
        first, text_I = self._texts
        catalogue, B, n = catalogue or self.catalogue, self.generations_at_once, len(histories)
        all_texts = np.arange(len(first)), text_I
        width = len(text_I) if candidates is None else max(map(len, candidates), default=0)
        longest = int(self.catalogue.item_lengths.max())
        # A row contains a history, and about four times as many tokens of candidates.
        C = min(math.ceil(4 * self.config.data.row_tokens / longest), width)
        T = self.config.data.row_tokens + C * longest
        histories, scores = self.fitting(histories, catalogue), np.full((n, width), -np.inf, np.float32)
        for begin in range(0, n, B):
            batch_histories = histories[begin : begin + B]
            missing = B - len(batch_histories)
            if candidates is None:
                texts = [all_texts] * len(batch_histories)
            else:
                texts = [np.unique(text_I[items], return_inverse=True) for items in candidates[begin : begin + B]]
            found = np.zeros((B, max(len(text) for text, _ in texts) + C), np.float32)
            for c in range(0, found.shape[1] - C, C):
                items = [first[text[c : c + C]] for text, _ in texts]
                batch = candidate_rows(catalogue, batch_histories + batch_histories[:1] * missing, items + items[:1] * missing, T, T)
                found[:, c : c + C] = np.asarray(self.log_likelihoods(params, shard_batch(self.mesh, batch), C))
                report(0)
            for row, (_, text) in enumerate(texts):
                scores[begin + row, : len(text)] = found[row, text.reshape(-1)]
            report(len(texts))
        return scores

    def likeliest(
        self,
        params: Params,
        histories: Sequence[np.ndarray],
        seen: Sequence[np.ndarray],
        k: int,
        report: Report = no_report,
        catalogue: Catalogue | None = None,
    ) -> ItemsAndScores:
        """The k most likely items of each history by beam search, without the seen items.

        The beams are wide enough for k items and the seen ones. Raises FloatingPointError for a score that is not finite.

        Args:
          params, histories, report, catalogue: as in `likelihoods`.
          seen: for each history, the items that are no candidates.
          k: length of a list, at most the number of items.
        """
        B, T, n = self.generations_at_once, self.config.data.row_tokens, len(histories)
        size, normalize = self.config.objective.chunk, self.config.eval.length_normalized
        catalogue = catalogue or self.catalogue
        histories = self.fitting(histories, catalogue)
        longer = int(catalogue.item_lengths.max() - self.catalogue.item_lengths.max())  # no candidate is that long
        found = np.full((n, k), -1, np.int32), np.full((n, k), -np.inf, np.float32)
        for begin in range(0, n, B):
            part = histories[begin : begin + B]
            batch = history_rows(catalogue, part + part[:1] * (B - len(part)), T + longer, T)
            excluded = [np.unique(items) for items in seen[begin : begin + B]]
            beams = min(self.catalogue.items, math.ceil((k + max(map(len, excluded))) / 16) * 16)
            batch = shard_batch(self.mesh, batch)
            item, score = beam_search(self.model, params, self._trie, batch, beams, normalize=normalize, chunk=size)
            for row, items in enumerate(excluded):
                kept = np.flatnonzero(~np.isin(item[row], items))[:k]
                found[0][begin + row, : len(kept)], found[1][begin + row, : len(kept)] = item[row, kept], score[row, kept]
            report(len(part))
        return found


def padded(items: Lists, rows: int) -> np.ndarray:
    """Lists as an array [rows, S] int32 with -1 after each list. S is a power of two, so that few shapes are compiled."""
    out_XS = items.padded(max(16, power_of_two(int(items.lengths.max(initial=1)))))
    return np.pad(out_XS, ((0, rows - len(out_XS)), (0, 0)), constant_values=-1)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()

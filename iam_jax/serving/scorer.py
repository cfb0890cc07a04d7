"""A trained model at work: users' vectors, the best items of the whole catalogue, scores of given candidates.

Axes as in evaluate.py: X users scored at one time, C items of a chunk (or candidates), J chunks, I items, E vectors, S seen items, K items
of a list.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl

from iam_jax.config import Config
from iam_jax.data.batches import Batch, Rows, evaluation_batches, evaluation_segments
from iam_jax.data.candidates import candidate_rows
from iam_jax.data.histories import Lists, Users, with_targets
from iam_jax.data.item_rows import CatalogueItems, without_items
from iam_jax.data.stored import Stored
from iam_jax.devices.distributed import alive
from iam_jax.devices.mesh import batch_shards, shard_batch
from iam_jax.model import Model, Params
from iam_jax.model.items import Items, item_vectors
from iam_jax.ranking.beam import beam_search, history_rows, make_trie
from iam_jax.ranking.likelihood import log_likelihoods

_SCORES = 1 << 23  # scores, or numbers of candidates' vectors, that exist at one time: 32 MiB

Found = tuple[np.ndarray, np.ndarray]  # items [n, K] best first, and scores [n, K] float32, -inf behind the last


@functools.partial(jax.jit, static_argnums=(3, 4))
def top_items(h_XE: jax.Array, v_JCE: jax.Array, seen_XS: jax.Array, items: int, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The k best items [X, K], their scores, and whether all scores are finite [X]. seen_XS: left out, -1 for none. Of equal scores the
    item that comes first in the catalogue is first; -inf behind the last. Scores exist for one chunk at a time."""
    X, (J, C, _) = len(h_XE), v_JCE.shape
    x = jnp.arange(X)[:, None]

    def step(carry, xs):
        best_XK, item_XK, finite_X = carry
        j, v_CE = xs
        scores_XC = jnp.einsum("XE,CE->XC", h_XE, v_CE, precision="highest")
        real_C = j * C + jnp.arange(C) < items
        finite_X &= (jnp.isfinite(scores_XC) | ~real_C).all(1)
        seen_here_XS = seen_XS - j * C
        scores_XC = jnp.where(real_C, scores_XC, -jnp.inf)
        scores_XC = scores_XC.at[x, jnp.where(seen_here_XS < 0, C, seen_here_XS)].set(-jnp.inf, mode="drop")
        here_XK, at_XK = jax.lax.top_k(scores_XC, min(k, C))
        # Those of earlier chunks come first, and of equal ones top_k takes the first.
        best_XK, place_XK = jax.lax.top_k(jnp.concatenate([best_XK, here_XK], axis=1), k)
        item_XK = jnp.take_along_axis(jnp.concatenate([item_XK, j * C + at_XK], axis=1), place_XK, axis=1)
        return (best_XK, item_XK, finite_X), None

    start = jnp.full((X, k), -jnp.inf, jnp.float32), jnp.zeros((X, k), jnp.int32), jnp.ones(X, bool)
    (best_XK, item_XK, finite_X), _ = jax.lax.scan(step, start, (jnp.arange(J), v_JCE))
    return item_XK, best_XK, finite_X


@jax.jit
def _pair_scores(h_XE: jax.Array, v_IE: jax.Array, item_XC: jax.Array) -> jax.Array:
    scores_XC = jnp.einsum("XE,XCE->XC", h_XE, v_IE[jnp.maximum(item_XC, 0)], precision="highest")
    return jnp.where(item_XC >= 0, scores_XC, -jnp.inf)


class Scorer:
    """A model with its catalogue. tokens: of all histories of the request, which decide whether item states are computed once; report: is
    given, batch by batch, the number of users that are through the model."""

    def __init__(
        self,
        config: Config,
        stored: Stored,
        model: Model,
        params: Params,
        mesh: jax.sharding.Mesh,
        tokens: int,
        report: Callable[[int], None] = lambda users: None,
    ):
        self._report = report
        self.config, self.stored, self.model, self.params, self.mesh = config, stored, model, params, mesh
        catalogue = stored.catalogue
        self._items = self._leading = None
        if config.states_by_item and config.model.item_states != "off":
            gib = catalogue.lengths.sum() * config.model.width * jnp.dtype(config.model.dtype).itemsize / 2**30
            less = config.model.item_states == "on" or catalogue.lengths.sum() <= tokens
            if less and gib <= config.eval.item_states_gib:
                shards = batch_shards(mesh)
                at_once = math.ceil(config.score.batch_rows / shards) * shards
                self._items = CatalogueItems(catalogue, config.data.row_tokens, at_once)
                leading = jax.jit(lambda params, rows: model.bind(params).leading_states(rows, self._items.chunks))
                self._leading = leading(params, shard_batch(mesh, self._items.rows))

        @jax.jit
        def states(params: Params, batch: dict, leading_XD: jax.Array | None) -> jax.Array:
            network = model.bind(params)
            x_BTD = network.states(batch, leading_XD=leading_XD)
            return network.project(jnp.take_along_axis(x_BTD, batch["target_at"][..., None], axis=1))

        self._states = states
        size, normalize = config.objective.chunk, config.eval.length_normalized
        self._log_likelihoods = jax.jit(
            lambda params, batch, count: log_likelihoods(model.bind(params), batch, count, size, normalize=normalize), static_argnums=2
        )

    @functools.cached_property
    def item_vectors(self) -> jax.Array:
        """v_IE: table, text or both; an added item's row of the table counts as zero."""
        token, length = self.stored.catalogue.padded()
        items = Items(jnp.asarray(token), jnp.asarray(length), jnp.asarray(self.stored.trained))
        known = self._leading is not None and self.config.leading_vectors
        boundary = self._leading[self._items.boundary_slots] if known else None
        return jax.jit(lambda params, items, boundary: item_vectors(self.model.bind(params), self.config, items, boundary))(
            self.params, items, boundary
        )

    @functools.cached_property
    def _chunks(self) -> jax.Array:
        v_IE = self.item_vectors
        J = math.ceil(len(v_IE) / self.config.eval.chunk_items)
        C = math.ceil(len(v_IE) / J)
        return jnp.pad(v_IE, ((0, J * C - len(v_IE)), (0, 0))).reshape(J, C, -1)

    def user_vectors(self, histories: Lists) -> np.ndarray:
        """[n, E] float32: the projected state behind all of a user's events, of which the most recent that fit are read."""
        events, targets = with_targets(histories)
        catalogue, row_tokens = self.stored.catalogue, self.config.data.row_tokens
        rows = Rows(events, catalogue, evaluation_segments(events, catalogue, row_tokens, targets), row_tokens)
        width = _power_of_two(rows.targets_per_row)  # few shapes are compiled

        def finish(batch: Batch) -> Batch:
            at, segment = batch["target_at"], batch["segment"]
            more = (0, 0), (0, width - at.shape[1])
            batch = without_items(batch) if self._items is None else self._items(batch)
            kept = {name: batch[name] for name in ("token", "user", "group", "position", "slot") if name in batch}
            return kept | {"target_at": np.pad(at, more), "segment": np.pad(segment, more, constant_values=-1)}

        h_nE = np.zeros((len(targets), self.config.model.width), np.float32)
        for batch in evaluation_batches(rows, self.config.score.batch_rows, finish):
            alive("a batch of histories")
            segment = batch.pop("segment")
            h = np.asarray(self._states(self.params, shard_batch(self.mesh, batch), self._leading))
            h_nE[segment[segment >= 0]] = h[segment >= 0]
            self._report(int((segment >= 0).sum()))
        return h_nE

    def top(self, users: Users, k: int) -> Found:
        """Each user's k best items of the catalogue, without those of the history (eval.filter_seen)."""
        if self.config.eval.ranking == "likelihood":
            return self._likeliest(users, k)
        h_nE = self.user_vectors(users.events.last(self.config.data.last_n))
        n, items = len(users), len(self.stored.item_ids)
        most = int(users.events.lengths.max(initial=1))
        X = lists_at_once(n, max(self._chunks.shape[1], most))
        found = np.zeros((n, k), np.int32), np.full((n, k), -np.inf, np.float32)
        for begin in range(0, n, X):
            seen = users.events[begin : begin + X] if self.config.eval.filter_seen else Lists(np.zeros(0, np.int32), np.zeros(1, np.int64))
            seen = seen.padded(max(16, _power_of_two(int(seen.lengths.max(initial=1)))))
            seen = np.pad(seen, ((0, X - len(seen)), (0, 0)), constant_values=-1)
            h = np.pad(h_nE[begin : begin + X], ((0, max(0, begin + X - n)), (0, 0)))
            item, score, finite = (np.asarray(x)[: n - begin] for x in top_items(h, self._chunks, seen, items, k))
            self._check(finite, users.ids[begin : begin + X])
            found[0][begin : begin + X], found[1][begin : begin + X] = item, score
        return found

    def given(self, users: Users, k: int) -> Found:
        """Each user's k best of the given candidates, whether seen or not; of equal scores the first of the catalogue is first."""
        C = _power_of_two(int(users.candidates.lengths.max()))
        item = users.candidates.padded(C)
        if self.config.eval.ranking == "likelihood":
            score = self._pair_likelihoods(users, C)
        else:
            h_nE = self.user_vectors(users.events.last(self.config.data.last_n))
            X, score = max(1, _SCORES // (C * h_nE.shape[1])), np.zeros(item.shape, np.float32)
            X = min(_power_of_two(len(users)), X)
            for begin in range(0, len(users), X):
                h, of = h_nE[begin : begin + X], item[begin : begin + X]
                more = (0, X - len(h)), (0, 0)
                got = _pair_scores(np.pad(h, more), self.item_vectors, np.pad(of, more, constant_values=-1))
                score[begin : begin + X] = np.asarray(got)[: len(h)]
        self._check(np.isfinite(score).all(1, where=item >= 0), users.ids)
        order = np.argsort(-score, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(item, order, axis=1), np.take_along_axis(score, order, axis=1)

    def _check(self, finite_X: np.ndarray, ids: pl.Series) -> None:
        if not finite_X.all():
            raise FloatingPointError(f"a score of user {ids[int(np.argmin(finite_X))]!r} is not finite")

    # ---- text generators

    def _histories(self, users: Users) -> list[np.ndarray]:
        """The most recent items that leave room for the longest item of the catalogue."""
        catalogue = self.stored.catalogue
        room = self.config.data.row_tokens - catalogue.frame_tokens - int(catalogue.item_lengths.max())
        histories = users.events.last(self.config.data.last_n).split()
        return [some[len(some) - int((np.cumsum(catalogue.lengths[some][::-1]) <= room).sum()) :] for some in histories]

    @property
    def _at_once(self) -> int:
        shards = batch_shards(self.mesh)
        return math.ceil(self.config.score.batch_rows / 5 / shards) * shards

    @functools.cached_property
    def _trie(self):
        return make_trie(self.stored.catalogue)

    def _likeliest(self, users: Users, k: int) -> Found:
        """By beam search: as many hypotheses as keep k items when the seen ones are left out."""
        B, T, items = self._at_once, self.config.data.row_tokens, len(self.stored.item_ids)
        histories, seen = self._histories(users), users.events.split()
        found = np.zeros((len(users), k), np.int32), np.full((len(users), k), -np.inf, np.float32)
        for begin in range(0, len(users), B):
            alive("a beam search")
            some = histories[begin : begin + B]
            batch = history_rows(self.stored.catalogue, some + [some[0]] * (B - len(some)), T, T)
            leave = [np.unique(x) if self.config.eval.filter_seen else x[:0] for x in seen[begin : begin + B]]
            beams = min(items, math.ceil((k + max(map(len, leave))) / 16) * 16)
            size, normalize = self.config.objective.chunk, self.config.eval.length_normalized
            batch = shard_batch(self.mesh, batch)
            item, score = beam_search(self.model, self.params, self._trie, batch, beams, normalize=normalize, chunk=size)
            for row, out in enumerate(leave):
                kept = np.flatnonzero(~np.isin(item[row], out))[:k]
                found[0][begin + row, : len(kept)], found[1][begin + row, : len(kept)] = item[row, kept], score[row, kept]
            self._report(len(leave))
        return found

    def _pair_likelihoods(self, users: Users, width: int) -> np.ndarray:
        """[n, width] float32; equal texts are scored once, since rounding depends on the place in a row and they must tie."""
        catalogue, B = self.stored.catalogue, self._at_once
        token, length = catalogue.padded()
        _, first, text_I = np.unique(np.column_stack([length, token]), axis=0, return_index=True, return_inverse=True)
        C = min(math.ceil(4 * self.config.data.row_tokens / int(length.max())), width)
        T = self.config.data.row_tokens + C * int(length.max())
        histories, scores = self._histories(users), np.full((len(users), width), -np.inf, np.float32)
        for begin in range(0, len(users), B):
            some = histories[begin : begin + B]
            texts = [np.unique(text_I.reshape(-1)[x], return_inverse=True) for x in users.candidates[begin : begin + B].split()]
            found = np.zeros((B, max(len(text) for text, _ in texts) + C), np.float32)
            for c in range(0, found.shape[1] - C, C):
                alive("a batch of candidates")
                items = [first[text[c : c + C]] for text, _ in texts]
                batch = candidate_rows(catalogue, some + [some[0]] * (B - len(some)), items + [items[0]] * (B - len(some)), T, T)
                found[:, c : c + C] = np.asarray(self._log_likelihoods(self.params, shard_batch(self.mesh, batch), C))
            for row, (_, text) in enumerate(texts):
                scores[begin + row, : len(text)] = found[row, text.reshape(-1)]
            self._report(len(texts))
        return scores


def lists_at_once(users: int, chunk: int) -> int:
    """Users whose lists are made at one time, with so many items of a chunk."""
    return min(_power_of_two(users), max(8, min(1024, _SCORES // chunk)))


def _power_of_two(n: int) -> int:
    """The least that is at least n."""
    return 1 << max(n - 1, 0).bit_length()

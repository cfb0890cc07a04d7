"""The jitted ranking evaluator: every target against the whole catalogue (README, "Evaluation protocol").

Axes: X targets scored at one time, C items of a chunk, J chunks, I items, E item vectors, S seen items. On a mesh every device ranks all
targets among its own part of the items, and the counts are added up. On a mesh of several processes all of them evaluate together, from
the same parameters and all of the data (every process assembles every batch, and gives its devices their rows): each ends with all results,
and the first one writes them. `poll`, called between batches, is where they agree to stop.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from iam_jax.config import Config
from iam_jax.data.batches import Rows, evaluation_batches, evaluation_segments
from iam_jax.data.candidates import candidate_rows
from iam_jax.data.item_rows import CatalogueItems, without_items
from iam_jax.data.prepare import Prepared
from iam_jax.data.splits import LABELS, TEST, VALIDATION, Events, users_of
from iam_jax.devices.mesh import batch_shards, shard_batch, spread_rows
from iam_jax.model import Model, Params
from iam_jax.model.items import Items, item_vectors, make_items
from iam_jax.model.softmax import label_log_probs
from iam_jax.ranking import baselines, metrics
from iam_jax.ranking.likelihood import log_likelihoods
from iam_jax.storage.files import write_atomically

_SCORES = 1 << 21  # scores that exist at one time: 8 MiB, which a CPU's cache holds in part

Ranks = tuple[np.ndarray, np.ndarray]


def rank_chunked(
    h_XE: jax.Array, v_IE: jax.Array, target_X: jax.Array, seen_XS: jax.Array, chunk: int, items: int = 0, axes: tuple[str, ...] = ()
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rank, ties and whether all scores are finite, of each target among the items.

    rank = 1 + the candidates that score higher, ties = the other candidates that score the same. seen_XS: distinct items that are no
    candidates, the target not among them, -1 for none. At most X times `chunk` scores exist at one time.

    Inside a shard_map over mesh axes `axes`, v_IE is this device's part of the catalogue: of all parts together the first `items` rows
    are items, and the results are those over all of them.
    """
    I = len(v_IE)  # noqa: E741
    J = math.ceil(I / chunk)
    C = math.ceil(I / J)
    part = jax.lax.axis_index(axes) * I if axes else 0
    target_X, seen_XS, stop = target_X - part, seen_XS - part, (items or I) - part
    chunk_X, chunk_XS = (jnp.where((i >= 0) & (i < I), i // C, -1) for i in (target_X, seen_XS))  # -1: of another part, or none
    i_C = jnp.arange(C)
    holds_J = (chunk_X == jnp.arange(J)[:, None]).any(1)
    holders_first_J = jnp.argsort(~holds_J, stable=True)

    # A target's own score is taken from the catalogue's scores: computed apart, the last bits could differ. So the chunks that hold a
    # target are computed twice, by one and the same product of the program: first for the targets' own scores, then to compare with them.
    def sweep(comparing, carry):
        def step(n, carry):
            c = jnp.where(comparing, n, holders_first_J[n])
            start = jnp.minimum(c * C, I - C)
            scores_XC = jnp.einsum("XE,CE->XC", h_XE, jax.lax.dynamic_slice_in_dim(v_IE, start, C), precision="highest")

            def scores_of(item_X):  # whatever, for items of other chunks
                return jnp.take_along_axis(scores_XC, jnp.clip(item_X - start, 0, C - 1), axis=1)

            def find(here_X, own_X, *counts):
                return jnp.where(chunk_X == c, scores_of(target_X[:, None])[:, 0], here_X), own_X, *counts

            def compare(here_X, own_X, above_X, equal_X, finite_X):
                own_X1 = own_X[:, None]
                real_C = (start + i_C >= c * C) & (start + i_C < stop)
                seen_here_XS, seen_scores_XS = chunk_XS == c, scores_of(seen_XS)
                above_X += ((scores_XC > own_X1) & real_C).sum(1) - ((seen_scores_XS > own_X1) & seen_here_XS).sum(1)
                equal_X += ((scores_XC == own_X1) & real_C).sum(1) - ((seen_scores_XS == own_X1) & seen_here_XS).sum(1)
                return here_X, own_X, above_X, equal_X, finite_X & (jnp.isfinite(scores_XC) | ~real_C).all(1)

            return jax.lax.cond(comparing, compare, find, *carry)

        here_X, _, *counts = jax.lax.fori_loop(0, jnp.where(comparing, J, holds_J.sum()), step, carry)
        return here_X, jax.lax.psum(here_X, axes) if axes else here_X, *counts

    zero_X, none_X = jnp.zeros(len(h_XE)), jnp.zeros(len(h_XE), jnp.int32)
    carry = (zero_X, zero_X, none_X, none_X, jnp.ones(len(h_XE), bool))
    _, _, above_X, equal_X, finite_X = jax.lax.fori_loop(0, 2, lambda n, carry: sweep(n > 0, carry), carry)
    if axes:
        above_X, equal_X, broken_X = (jax.lax.psum(x, axes) for x in (above_X, equal_X, (~finite_X).astype(jnp.int32)))
        finite_X = broken_X == 0
    return 1 + above_X, equal_X - 1, finite_X


def make_ranker(mesh: jax.sharding.Mesh, chunk: int, items: int) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """(h_XE, v_IE, target_X, seen_XS) -> rank, ties, finite: `rank_chunked`, jitted, with v_IE spread over the mesh (`spread_rows`)."""
    axes = mesh.axis_names if mesh.size > 1 else ()

    def rank(h_XE, v_IE, target_X, seen_XS):
        return rank_chunked(h_XE, v_IE, target_X, seen_XS, chunk, items, axes)

    everywhere, parts = PartitionSpec(), PartitionSpec(axes)
    specs = {"in_specs": (everywhere, parts, everywhere, everywhere), "out_specs": everywhere}
    return jax.jit(jax.shard_map(rank, mesh=mesh, check_vma=False, **specs) if axes else rank)


class Evaluator:
    """Ranks target events by a model. Compiled functions are kept, so that one evaluator serves a whole training run."""

    def __init__(self, model: Model, config: Config, prepared: Prepared, mesh: jax.sharding.Mesh):
        self.config, self.prepared, self.mesh = config, prepared, mesh
        self.items = make_items(prepared.catalogue, prepared.events.train_counts > 0)
        self._rows: dict[tuple[bytes, bool], Rows] = {}
        self._catalogue = self._catalogue_items()
        chunk = config.eval.chunk_items
        read = functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))  # by the host: whole in every process

        @read
        def history_vectors(params: Params, batch: dict, leading_XD: jax.Array | None) -> jax.Array:
            network = model.bind(params)
            x_BTD = network.states(batch, leading_XD=leading_XD)
            return network.project(jnp.take_along_axis(x_BTD, batch["target_at"][..., None], axis=1))

        @jax.jit
        def vectors(params: Params, items: Items, leading_XD: jax.Array | None) -> jax.Array:
            boundary_XD = None if leading_XD is None else leading_XD[self._catalogue.boundary_slots]
            return spread_rows(mesh, item_vectors(model.bind(params), config, items, boundary_XD))

        @read
        def token_sums(params: Params, batch: dict) -> jax.Array:
            network = model.bind(params)
            x_BTD, label_X = network.states(batch), batch["label"].reshape(-1)
            embedding = network.output_embedding()
            loss_X = -label_log_probs(x_BTD.reshape(-1, x_BTD.shape[-1]), embedding, label_X, chunk=config.objective.chunk)
            text_X = (label_X >= 0) & (label_X != prepared.catalogue.vocabulary - 1)
            return jnp.stack([loss_X.sum(), (label_X >= 0).sum(), (loss_X * text_X).sum(), text_X.sum()])

        self._history_vectors, self._item_vectors, self._token_sums = history_vectors, vectors, token_sums
        self._leading_states = jax.jit(lambda params, rows, chunks: model.bind(params).leading_states(rows, chunks), static_argnums=2)
        normalize, size = config.eval.length_normalized, config.objective.chunk
        self._log_likelihoods = read(
            lambda params, batch, count: log_likelihoods(model.bind(params), batch, count, size, normalize=normalize), static_argnums=2
        )
        self._rank = make_ranker(mesh, chunk, len(prepared.events.item_ids))

    def _catalogue_items(self) -> CatalogueItems | None:
        """The whole catalogue for the leading intra layers, if model.item_states has it and the states fit."""
        model = self.config.model
        if not self.config.states_by_item or model.item_states == "off":
            return None
        gib = self.prepared.catalogue.lengths.sum() * model.width * jnp.dtype(model.dtype).itemsize / 2**30
        if gib > self.config.eval.item_states_gib:
            if model.item_states == "on":
                print(f"ranking computes the leading intra layers for every history: the catalogue's states take {gib:.1f} GiB", flush=True)
            return None
        shards = batch_shards(self.mesh)
        at_once = math.ceil(self.config.eval.batch_rows / shards) * shards
        return CatalogueItems(self.prepared.catalogue, self.config.data.row_tokens, at_once)

    def leading_items(self, rows: Rows) -> CatalogueItems | None:
        """The catalogue, where its states after the leading intra layers are less work than to compute them for the rows."""
        items = self._catalogue
        if items is None or (self.config.model.item_states == "auto" and items.rows["token"].size > len(rows) * rows.row_tokens):
            return None
        return items

    def leading_states(self, params: Params, rows: Rows) -> jax.Array | None:
        """The states of `leading_items`."""
        items = self.leading_items(rows)
        return None if items is None else self._leading_states(params, shard_batch(self.mesh, items.rows), items.chunks)

    def rows(self, targets: np.ndarray, whole_text: bool = False) -> Rows:
        """The histories of the target events, packed; with `whole_text` followed by the targets' own text."""
        key = targets.tobytes(), whole_text
        if key not in self._rows:
            events, catalogue, row_tokens = self.prepared.events, self.prepared.catalogue, self.config.data.row_tokens
            segments = evaluation_segments(events, catalogue, row_tokens, targets, whole_text)
            self._rows[key] = Rows(events, catalogue, segments, row_tokens)
        return self._rows[key]

    def losses(
        self, params: Params, targets: np.ndarray, poll: Callable[[], None] = lambda: None, label: str = "evaluation"
    ) -> dict[str, float]:
        """With the token objective: token_loss, the mean of -log p of the targets' tokens given their histories, and text_loss, that of
        the tokens that are no boundary tokens."""
        if not self.config.objective.token or not len(targets):
            return {}
        rows, batch_rows = self.rows(targets, whole_text=True), self.config.eval.batch_rows
        batches, sums = evaluation_batches(rows, batch_rows, without_items), np.zeros(4)
        for batch in self._progress(batches, math.ceil(len(rows) / batch_rows), f"{label}: loss"):
            poll()
            sums += np.asarray(self._token_sums(params, shard_batch(self.mesh, batch)), np.float64)
        return {"token_loss": sums[0] / sums[1], "text_loss": sums[2] / max(sums[3], 1)}

    def history_vectors(
        self, params: Params, targets: np.ndarray, leading_XD: jax.Array | None, poll: Callable[[], None], label: str
    ) -> np.ndarray:
        """[n, E] float32: the projected state from which each target event is predicted."""
        rows = self.rows(targets)
        batches = math.ceil(len(rows) / self.config.eval.batch_rows)
        out = None
        finish = without_items if leading_XD is None else self._catalogue
        for batch in self._progress(evaluation_batches(rows, self.config.eval.batch_rows, finish), batches, f"{label}: histories"):
            poll()
            h = np.asarray(self._history_vectors(params, shard_batch(self.mesh, batch), leading_XD))
            out = np.zeros((len(targets), h.shape[-1]), np.float32) if out is None else out
            there = batch["segment"] >= 0
            out[batch["segment"][there]] = h[there]
        return out if out is not None else np.zeros((0, 1), np.float32)

    def rank(self, params: Params, targets: np.ndarray, poll: Callable[[], None] = lambda: None, label: str = "evaluation") -> Ranks:
        """Rank [n] and ties [n] of the target events. Raises FloatingPointError on a score that is not finite."""
        events = self.prepared.events
        if self.config.eval.ranking == "likelihood":
            with self._progress(None, len(targets), f"{label}: ranking by likelihood") as bar:
                scorer = functools.partial(self._likelihoods, params, poll)
                return baselines.evaluate(scorer, events, targets, self.config.eval.filter_seen, bar.update)
        leading_XD = self.leading_states(params, self.rows(targets))
        h_nE = self.history_vectors(params, targets, leading_XD, poll, label)
        v_IE = self._item_vectors(params, self.items, leading_XD)
        X = self.at_once
        rank, ties = np.zeros(len(targets), np.int64), np.zeros(len(targets), np.int64)
        # By item: then few chunks hold the targets of a batch, and few are computed twice.
        order = np.argsort(events.item[targets], kind="stable")
        for start in self._progress(range(0, len(targets), X), math.ceil(len(targets) / X), f"{label}: ranking"):
            poll()
            at = order[start : start + X]
            part, more = targets[at], X - len(at)
            target = np.pad(events.item[part], (0, more), mode="edge")
            seen = padded_seen(events, part, X) if self.config.eval.filter_seen else np.full((X, 1), -1, np.int32)
            results = self._rank(np.pad(h_nE[at], ((0, more), (0, 0))), v_IE, target, seen)
            rank[at], ties[at], finite = (np.asarray(result)[: len(at)] for result in results)
            if not finite.all():
                user = events.user_ids[users_of(events, part[~finite].min())]
                raise FloatingPointError(f"a score of user {user!r} is not finite")
        return rank, ties

    def _likelihoods(self, params: Params, poll: Callable[[], None], events: Events, targets: np.ndarray) -> np.ndarray:
        """[n, I] float32: the log-likelihood of every item's text as each target's (a `baselines.Scorer`)."""
        catalogue, config = self.prepared.catalogue, self.config
        row_tokens, longest = config.data.row_tokens, int(catalogue.item_lengths.max())
        # A row holds a history and a few times as many tokens of candidates; a batch is about the size of the others.
        C = min(math.ceil(4 * row_tokens / longest), catalogue.items)
        # Equal texts once: they must tie, and rounding depends on the place in a row.
        token, length = catalogue.padded()
        _, first, text_I = np.unique(np.column_stack([length, token]), axis=0, return_index=True, return_inverse=True)
        shards = batch_shards(self.mesh)
        T, B = row_tokens + C * longest, math.ceil(config.eval.batch_rows / 5 / shards) * shards
        begin = events.offsets[users_of(events, targets)]
        histories = [events.item[first:target] for first, target in zip(begin, targets, strict=True)]
        scores = np.zeros((len(targets), len(first)), np.float32)
        for x in range(0, len(targets), B):
            some = histories[x : x + B] + [histories[x]] * max(0, x + B - len(targets))
            for c in range(0, len(first), C):
                poll()
                items = first[c : c + C]
                # Whatever the candidates, the history is the one that leaves room for the longest.
                most = row_tokens - longest + int(catalogue.item_lengths[items].max())
                batch = candidate_rows(catalogue, some, [items] * B, most, T)
                found = np.asarray(self._log_likelihoods(params, shard_batch(self.mesh, batch), C))
                if not np.isfinite(found).all():
                    raise FloatingPointError("a log-likelihood is not finite")
                scores[x : x + B, c : c + C] = found[: len(targets) - x, : len(items)]
        return scores[:, text_I.reshape(-1)]

    @property
    def at_once(self) -> int:
        """Targets that are ranked at one time."""
        return max(8, min(1024, _SCORES // min(self.config.eval.chunk_items, len(self.prepared.events.item_ids))))

    def _progress(self, iterable, total: int, label: str):
        shown = self.config.log.progress and total >= 4 and not jax.process_index()
        return tqdm(iterable, label, total, leave=False, disable=not shown, mininterval=1)


def padded_seen(events: Events, targets: np.ndarray, rows: int) -> np.ndarray:
    """[rows, S] int32, -1 for none: the distinct items before each target except its own; S is a power of two, so that few shapes are
    compiled."""
    row, item = baselines.others(*baselines.histories(events, targets), events.item[targets], len(events.item_ids))
    counts = np.bincount(row, minlength=rows)
    width = max(16, 1 << int(counts.max(initial=1) - 1).bit_length())
    seen = np.full((rows, width), -1, np.int32)
    seen[row, np.arange(len(row)) - (np.cumsum(counts) - counts)[row]] = item
    return seen


def validation_subset(events: Events, config: Config) -> np.ndarray:
    """The targets that select the best step: all of validation, or those of a fixed random subset of users."""
    targets = events.targets(VALIDATION)
    users = users_of(events, targets)
    if config.eval.validation_users and config.eval.validation_users < len(np.unique(users)):
        chosen = np.random.default_rng(config.eval.seed).choice(np.unique(users), config.eval.validation_users, replace=False)
        targets = targets[np.isin(users, chosen)]
    return targets


def summarize(prepared: Prepared, config: Config, targets: np.ndarray, ranks: Ranks) -> dict:
    events = prepared.events
    cold = events.train_counts[events.item[targets]] == 0
    users = users_of(events, targets)
    return metrics.summarize(users, *ranks, cold, config.eval.ks, config.eval.resamples, config.eval.seed)


def protocol(prepared: Prepared, config: Config) -> dict:
    return {
        "split": config.data.split,
        "filter_seen": config.eval.filter_seen,
        "candidates": len(prepared.events.item_ids),
        "k_core": config.data.k_core,
        "ks": list(config.eval.ks),
        "context_items": config.data.context_items,
        "ranking": config.metric_prefix.strip() or "item",
    }


def evaluate_all(
    evaluator: Evaluator,
    params: Params,
    step: int,
    workdir: Path,
    oracle: baselines.Scorer | None = None,
    poll: Callable[[], None] = lambda: None,
) -> dict:
    """Ranks validation and, unless eval.test is off, test by the model and the baselines; writes `evaluation.json`, `ranks.parquet`
    and the baselines' ranks, in the same order, as `baselines.parquet`; prints the table."""
    prepared, config = evaluator.prepared, evaluator.config
    events = prepared.events
    scorers: dict[str, baselines.Scorer] = {}
    if config.eval.baselines:
        scorers = {"popularity": baselines.popularity(events), "last_item": baselines.last_item_transitions(events)}
        scorers["item_knn"] = baselines.item_knn(events)
    if oracle is not None:
        scorers["oracle"] = oracle
    results: dict[str, dict] = {"model": {}} | {name: {} for name in scorers}
    frames, others = [], {name: [] for name in scorers}
    for label in (VALIDATION, TEST) if config.eval.test else (VALIDATION,):
        targets = events.targets(label)
        if not len(targets):
            continue
        ranks = evaluator.rank(params, targets, poll, LABELS[label])
        losses = evaluator.losses(params, targets, poll, LABELS[label])
        results["model"][LABELS[label]] = summarize(prepared, config, targets, ranks) | losses
        frames.append(_frame(events, label, targets, ranks))
        for name, scorer in scorers.items():
            ranks = baselines.evaluate(scorer, events, targets, config.eval.filter_seen, progress=lambda _: poll())
            results[name][LABELS[label]] = summarize(prepared, config, targets, ranks)
            others[name].append(_frame(events, label, targets, ranks).select(pl.lit(name).alias("name"), "split", "rank", "ties"))
    evaluation = {
        "split_sha256": prepared.split.sha256,
        "protocol": protocol(prepared, config),
        "bootstrap": {"resamples": config.eval.resamples, "seed": config.eval.seed},
        "step": step,
        "results": results,
    }
    if jax.process_index():
        return evaluation
    if frames:
        write_atomically(workdir / "ranks.parquet", pl.concat(frames).write_parquet)
    if frames and scorers:
        write_atomically(workdir / "baselines.parquet", pl.concat(itertools.chain(*others.values())).write_parquet)
    else:
        (workdir / "baselines.parquet").unlink(missing_ok=True)  # of an earlier evaluation
    text = json.dumps(evaluation, indent=2) + "\n"
    write_atomically(workdir / "evaluation.json", lambda path: path.write_text(text, encoding="utf-8"))
    print(format_results(evaluation), flush=True)
    return evaluation


def format_results(evaluation: dict) -> str:
    """The printed table: test where there is one."""
    results = evaluation["results"]
    split = LABELS[TEST] if LABELS[TEST] in results["model"] else LABELS[VALIDATION]
    rows = {name: summary[split] for name, summary in results.items() if split in summary}
    if not rows:
        return "no event to evaluate: no user has a validation or test event"
    first = next(iter(rows.values()))
    ks = evaluation["protocol"]["ks"]
    shown = [k for k in (10, 50) if k in ks] or ks[:2]
    names = [f"{name}@{k}" for k in shown for name in ("hr", "ndcg")]
    sizes = f"{first['users']:,} users, {first['events']:,} events, {evaluation['protocol']['candidates']:,} candidates"
    title = f"{split}: {sizes}, step {evaluation['step']:,}"
    return f"{title}\n{metrics.format_table(rows, names, names[:2])}"


def _frame(events: Events, label: int, targets: np.ndarray, ranks: Ranks) -> pl.DataFrame:
    cold = events.train_counts[events.item[targets]] == 0
    return pl.DataFrame(
        {
            "split": [LABELS[label]] * len(targets),
            "user": pl.Series(events.user_ids[users_of(events, targets)].tolist(), dtype=pl.String),
            "timestamp": events.timestamp[targets],
            "target": pl.Series(events.item_ids[events.item[targets]].tolist(), dtype=pl.String),
            "rank": ranks[0],
            "ties": ranks[1],
            "cold": cold,
        }
    )

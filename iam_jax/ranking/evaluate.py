"""Evaluation: ranks every target event among the whole catalogue (docs/protocol.md).

On a mesh of several processes, all processes evaluate together, with the same parameters and all of the data: every process assembles every
batch and passes its devices their rows. All processes get all results, and the first one writes them. `poll` is called after each batch; it
lets the processes agree to stop.
"""

import contextlib
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from iam_jax.config import Config
from iam_jax.data.batches import Rows, evaluation_batches, evaluation_rows
from iam_jax.data.histories import Lists
from iam_jax.data.item_rows import without_items
from iam_jax.data.prepare import Prepared
from iam_jax.data.splits import LABELS, TEST, VALIDATION, Events, subset_of_users, users_of
from iam_jax.devices import distributed
from iam_jax.devices.mesh import shard_batch
from iam_jax.model import Model, Params
from iam_jax.model.items import Items
from iam_jax.model.softmax import label_log_probs
from iam_jax.ranking import baselines, fusion, metrics
from iam_jax.ranking.choice import BASELINES, choose_or_read, describe, read_records, targets_of_choice, write_records
from iam_jax.ranking.core import Bonus, Ranker, Report, item_states_gib
from iam_jax.ranking.transitions import HistorySums
from iam_jax.storage.files import write_atomically

Ranks = tuple[np.ndarray, np.ndarray]


def no_poll() -> None:
    """A `poll` that never stops the evaluation."""


class Evaluator:
    """Ranks target events with a model. It keeps compiled functions, so one evaluator serves a whole training run."""

    def __init__(
        self, model: Model, config: Config, prepared: Prepared, mesh: jax.sharding.Mesh, tower_XD: jax.Array | np.ndarray | None = None
    ):
        """tower_XD: the states of a constant tower (tower.py)."""
        self.config, self.prepared, self.mesh = config, prepared, mesh
        trained_I = prepared.events.train_counts > 0
        batch_rows = config.eval.batch_rows
        self.ranker = Ranker(config, prepared.catalogue, trained_I, model, mesh, batch_rows, prepared.vectors, tower_XD)
        self._rows: dict[tuple[bytes, bool], Rows] = {}
        gib = item_states_gib(config, prepared.catalogue)
        if config.states_by_item and not config.item_level and config.model.item_states == "on" and gib > config.eval.item_states_gib:
            limit = f"the states of the catalogue need {gib:.1f} GiB, more than config.eval.item_states_gib"
            print(f"ranking computes the leading intra layers for every history, because {limit}", flush=True)

        @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))  # the host of every process reads them
        def token_sums(params: Params, batch: dict, leading_XD: jax.Array | None, items: Items) -> jax.Array:
            network = model.bind(params)
            x_BTD, label_X = network.states(batch, None, leading_XD, items), batch["label"].reshape(-1)
            embedding = network.output_embedding()
            loss_X = -label_log_probs(x_BTD.reshape(-1, x_BTD.shape[-1]), embedding, label_X, chunk=config.objective.chunk)
            text_X = (label_X >= 0) & (label_X != prepared.catalogue.vocabulary - 1)
            return jnp.stack([loss_X.sum(), (label_X >= 0).sum(), (loss_X * text_X).sum(), text_X.sum()])

        self._token_sums = token_sums

    def rows(self, targets: np.ndarray, whole_text: bool = False) -> Rows:
        """The histories of the target events, packed into rows. whole_text: whether the text of the target follows its history."""
        key = targets.tobytes(), whole_text
        if key not in self._rows:
            events, catalogue, config = self.prepared.events, self.prepared.catalogue, self.config
            self._rows[key] = evaluation_rows(events, catalogue, config.row_slots, targets, whole_text, **config.row_options)
        return self._rows[key]

    def leading_states(self, params: Params, rows: Rows) -> jax.Array | None:
        """States of the catalogue after the leading intra layers, for these histories; None if they are not kept (`keeps_item_states`)."""
        return self.ranker.leading_states(params, int(rows.sizes.sum()))

    def losses(
        self, params: Params, targets: np.ndarray, poll: Callable[[], None] = no_poll, label: str = "evaluation"
    ) -> dict[str, float]:
        """The losses of the token objective on the target events; {} without this objective.

        token_loss is the mean of -log p over all tokens of the targets, given their histories. text_loss is the mean over their tokens
        without the boundary tokens.
        """
        if not self.config.objective.token or not len(targets):
            return {}
        rows, batch_rows = self.rows(targets, whole_text=True), self.config.eval.batch_rows
        leading_XD, sums = self.leading_states(params, rows), np.zeros(4)
        finish = without_items if leading_XD is None else self.ranker.catalogue_items
        with self._progress(math.ceil(len(rows) / batch_rows), f"{label}: loss", poll) as report:
            for batch in evaluation_batches(rows, batch_rows, finish):
                results = self._token_sums(params, shard_batch(self.mesh, batch), leading_XD, self.ranker.items)
                sums += np.asarray(results, np.float64)
                report(1)
        return {"token_loss": sums[0] / sums[1], "text_loss": sums[2] / max(sums[3], 1)}

    def rank(self, params: Params, targets: np.ndarray, poll: Callable[[], None] = no_poll, label: str = "evaluation") -> Ranks:
        """Rank [n] and ties [n] of the target events, int64. Raises FloatingPointError for a score that is not finite.

        label: is shown with the progress bars.
        """
        if self.config.eval.ranking == "likelihood":
            events, filter_seen = self.prepared.events, self.config.eval.filter_seen
            with self._progress(len(targets), f"{label}: ranking by likelihood", poll) as report:
                return baselines.evaluate(functools.partial(self._likelihoods, params, poll), events, targets, filter_seen, report)
        return self.rank_vectors(*self.all_vectors(params, targets, poll, label), targets, None, poll, label)

    def all_vectors(
        self, params: Params, targets: np.ndarray, poll: Callable[[], None] = no_poll, label: str = "evaluation"
    ) -> tuple[np.ndarray, jax.Array]:
        """h_nE of `history_vectors` and v_IE of `item_vectors`."""
        leading_XD = self.leading_states(params, self.rows(targets))
        return self.history_vectors(params, targets, leading_XD, poll, label), self.item_vectors(params, leading_XD)

    def rank_vectors(
        self,
        h_nE: np.ndarray,
        v_IE: jax.Array,
        targets: np.ndarray,
        bonus: Bonus | None = None,
        poll: Callable[[], None] = no_poll,
        label: str = "evaluation",
    ) -> Ranks:
        """As `rank`, from the vectors of `all_vectors`. bonus: is added to the scores; None: there is none."""
        events = self.prepared.events
        seen = (lambda at: seen_lists(events, targets[at])) if self.config.eval.filter_seen else None
        with self._progress(len(targets), f"{label}: ranking", poll) as report:
            rank, ties, finite = self.ranker.rank(h_nE, v_IE, events.item[targets], seen, report, bonus)
        if not finite.all():
            user = events.user_ids[users_of(events, targets[~finite].min())]
            raise FloatingPointError(f"a score of user {user!r} is not finite")
        return rank, ties

    def history_vectors(
        self,
        params: Params,
        targets: np.ndarray,
        leading_XD: jax.Array | None,
        poll: Callable[[], None] = no_poll,
        label: str = "evaluation",
    ) -> np.ndarray:
        """h_nE float32: the projected state from which each target event is predicted."""
        with self._progress(len(targets), f"{label}: histories", poll) as report:
            return self.ranker.history_vectors(params, self.rows(targets), leading_XD, report=report)

    def item_vectors(self, params: Params, leading_XD: jax.Array | None) -> jax.Array:
        """v_IE float32, sharded over the mesh by rows."""
        return self.ranker.item_vectors(params, leading_XD)

    def _likelihoods(self, params: Params, poll: Callable[[], None], events: Events, targets: np.ndarray) -> np.ndarray:
        """[n, I] float32: the log-likelihood of every item's text, given the history of each target (a `baselines.ScoreFunction`)."""
        begin = events.offsets[users_of(events, targets)]
        histories = [events.item[first:target] for first, target in zip(begin, targets, strict=True)]
        scores = self.ranker.likelihoods(params, histories, None, lambda _: poll())
        if not np.isfinite(scores).all():
            raise FloatingPointError("a log-likelihood is not finite")
        return scores

    @contextlib.contextmanager
    def _progress(self, total: int, label: str, poll: Callable[[], None]) -> Iterator[Report]:
        """Shows a progress bar, and yields the function to call after each batch, with the progress that it made. It also calls `poll`."""
        shown = self.config.log.progress and total >= 4 and not jax.process_index()
        with tqdm(desc=label, total=total, leave=False, disable=not shown, mininterval=1) as bar:

            def report(done: int) -> None:
                bar.update(done)
                poll()

            poll()
            yield report


def seen_lists(events: Events, targets: np.ndarray) -> Lists:
    """For each target event, the distinct items of its history, without the target's own item."""
    row, item = baselines.others(*baselines.histories(events, targets), events.item[targets], len(events.item_ids))
    return Lists(item.astype(np.int32), np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(targets)))]))


def validation_subset(events: Events, config: Config) -> np.ndarray:
    """The validation targets that select the best step: all of them, or those of a fixed random subset of users."""
    return subset_of_users(events, VALIDATION, config.eval.validation_users, config.eval.seed)


def summarize(prepared: Prepared, config: Config, targets: np.ndarray, ranks: Ranks) -> dict:
    """The metrics of the target events, as `metrics.summarize` returns them."""
    events = prepared.events
    cold = events.train_counts[events.item[targets]] == 0
    users = users_of(events, targets)
    settings = config.eval.ks, config.eval.resamples, config.eval.seed
    return metrics.summarize(users, *ranks, cold, *settings, repeated=events.repeated[targets])


def protocol(prepared: Prepared, config: Config) -> dict:
    """The protocol of the evaluation as JSON values. Runs with different protocols cannot be compared."""
    return {
        "split": config.data.split,
        "filter_seen": config.eval.filter_seen,
        "candidates": len(prepared.events.item_ids),
        "k_core": config.data.k_core,
        "ties": config.data.ties,
        "duplicates": config.data.duplicates,
        "ks": list(config.eval.ks),
        "context_items": config.data.context_items,
        "ranking": config.metric_prefix.strip() or "item",
    }


def evaluate_all(
    evaluator: Evaluator,
    params: Params,
    step: int,
    workdir: Path,
    oracle: baselines.ScoreFunction | None = None,
    poll: Callable[[], None] = no_poll,
) -> dict:
    """Ranks the validation events, and with eval.test the test events, by the model and the baselines. The first process prints the table
    and writes `evaluation.json`, `ranks.parquet` and, with the same order of events, `baselines.parquet`; the settings of the baselines and
    how they were chosen to `baselines.json` (choice.py). With eval.fusion, the fusion of the model with a baseline is ranked, too, as one
    more baseline named `fusion`; the choice of its weight is written to `fusion.json` (fusion.py).

    Args:
      evaluator: of the run.
      params: all parameters.
      step: the step of the parameters.
      workdir: the working folder.
      oracle: a scorer that knows how the data were made, if the data source has one.
      poll: see the module's docstring.

    Returns:
      The content of `evaluation.json`.

    Raises:
      FloatingPointError: for a score that is not finite.
    """
    prepared, config = evaluator.prepared, evaluator.config
    events = prepared.events
    scorers: dict[str, baselines.ScoreFunction] = {}
    records: dict[str, dict] = {}
    for name, baseline in BASELINES.items():
        if not config.eval.baselines and name != config.eval.fusion:
            continue
        records[name] = choose_or_read(baseline, prepared.split, config, workdir, poll)
        scorers[name] = baseline.make(events)(**records[name]["settings"])
        if baseline.grid and not jax.process_index():
            print(describe(name, records[name]), flush=True)
    fused = weight = None
    if config.eval.fusion:
        sums = scorers[config.eval.fusion]
        assert isinstance(sums, HistorySums)
        weight = choose_weight(evaluator, params, step, workdir, sums, records[config.eval.fusion]["settings"], poll)
        fused = fusion.Fusion(sums, weight["weight"])
        if not jax.process_index():
            print(fusion.describe(weight), flush=True)
    if oracle is not None:
        scorers["oracle"] = oracle
    results: dict[str, dict] = {name: {} for name in ("model", *["fusion"] * bool(fused), *scorers)}
    frames, baseline_frames = [], {name: [] for name in results if name != "model"}
    for label in (VALIDATION, TEST) if config.eval.test else (VALIDATION,):
        targets = events.targets(label)
        if not len(targets):
            continue
        other_ranks: dict[str, Callable[[], Ranks]] = {}
        if fused is None:
            ranks = evaluator.rank(params, targets, poll, LABELS[label])
        else:
            vectors = evaluator.all_vectors(params, targets, poll, LABELS[label])
            ranks = evaluator.rank_vectors(*vectors, targets, None, poll, LABELS[label])
            bonus = fused.bonus(events, targets, len(events.item_ids))
            other_ranks["fusion"] = functools.partial(evaluator.rank_vectors, *vectors, targets, bonus, poll, f"{LABELS[label]}: fusion")
        losses = evaluator.losses(params, targets, poll, LABELS[label])
        results["model"][LABELS[label]] = summarize(prepared, config, targets, ranks) | losses
        frames.append(_frame(events, label, targets, ranks))
        for name, scorer in scorers.items():
            other_ranks[name] = functools.partial(
                baselines.evaluate, scorer, events, targets, config.eval.filter_seen, progress=lambda _: poll()
            )
        for name, rank in other_ranks.items():
            ranks = rank()
            results[name][LABELS[label]] = summarize(prepared, config, targets, ranks)
            baseline_frames[name].append(_frame(events, label, targets, ranks).select(pl.lit(name).alias("name"), "split", "rank", "ties"))
    evaluation = {
        "split_sha256": prepared.split.sha256,
        "protocol": protocol(prepared, config),
        "data": prepared.split.facts,
        "baselines": {name: {"settings": record["settings"], "validation": record["value"]} for name, record in records.items()},
        "bootstrap": {"resamples": config.eval.resamples, "seed": config.eval.seed},
        "step": step,
        "results": results,
    }
    if weight:
        evaluation["fusion"] = {"baseline": weight["baseline"], "weight": weight["weight"], "validation": weight["value"]}
    if jax.process_index():
        return evaluation
    if frames:
        write_atomically(workdir / "ranks.parquet", pl.concat(frames).write_parquet)
    if frames and baseline_frames:
        write_atomically(workdir / "baselines.parquet", pl.concat(itertools.chain(*baseline_frames.values())).write_parquet)
    else:
        (workdir / "baselines.parquet").unlink(missing_ok=True)  # of an earlier evaluation
    if records:
        write_records(read_records(prepared.split, workdir) | records, prepared.split, workdir)
    if weight:
        fusion.write_record(weight, prepared.split, workdir)
    text = json.dumps(evaluation, indent=2) + "\n"
    write_atomically(workdir / "evaluation.json", lambda path: path.write_text(text, encoding="utf-8"))
    print(format_results(evaluation), flush=True)
    return evaluation


def choose_weight(
    evaluator: Evaluator,
    params: Params,
    step: int,
    workdir: Path,
    sums: HistorySums,
    settings: dict,
    poll: Callable[[], None] = no_poll,
) -> dict:
    """Chooses the weight of the fusion on validation. Returns `fusion.identity` and the result of `fusion.choose` as one record.

    An earlier evaluation's record in the working folder is returned instead, if it has the same identity. All processes of a job use the
    record that the first one reads.

    Args:
      evaluator, params, step, workdir, poll: as in `evaluate_all`.
      sums: the baseline.
      settings: of the baseline.
    """
    config, events, split = evaluator.config, evaluator.prepared.events, evaluator.prepared.split
    identity = fusion.identity(config, step, settings)
    record = distributed.gather(fusion.read_record(split, workdir))[0]
    if record and identity.items() <= record.items():
        return record
    targets, label = targets_of_choice(events, config), "weight of the fusion"
    if not len(targets):
        return identity | fusion.NOT_CHOSEN
    h_nE, v_IE = evaluator.all_vectors(params, targets, poll, label)
    name, _, k = config.eval.metric.partition("@")

    def metric(bonus: Bonus | None) -> float:
        ranks = evaluator.rank_vectors(h_nE, v_IE, targets, bonus, poll, label)
        return float(np.mean(metrics.ranking_metrics(*ranks, [int(k)])[f"{name}@{k}"]))

    return identity | fusion.choose(sums, evaluator.ranker, h_nE, v_IE, events, targets, metric, config.eval.seed)


def format_results(evaluation: dict) -> str:
    """Formats the table of an evaluation: of the test events if they were ranked, else of the validation events."""
    results = evaluation["results"]
    split = LABELS[TEST] if LABELS[TEST] in results["model"] else LABELS[VALIDATION]
    rows = {name: summary[split] for name, summary in results.items() if split in summary}
    if not rows:
        return "nothing was evaluated: no user has a validation or test event"
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
            "repeated": events.repeated[targets],
        }
    )

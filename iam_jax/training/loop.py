"""The training loop, from top to bottom: validate, save, get the next batch, step, log the previous step."""

import contextlib
import dataclasses
import math
import time
from pathlib import Path

import jax
import numpy as np

from iam_jax.data.batches import training_batches, users_of_batch
from iam_jax.data.item_rows import DistinctItems
from iam_jax.devices import distributed
from iam_jax.devices.chips import find_chip
from iam_jax.devices.mesh import local_rows, per_process, shard_batch
from iam_jax.devices.signals import Signals, Stop
from iam_jax.errors import InputError, NonFiniteError, quote_first
from iam_jax.model.items import all_text_vectors
from iam_jax.model.parameters import join
from iam_jax.ranking.evaluate import Evaluator, summarize, validation_subset
from iam_jax.runs.checkpoint import Checkpoints
from iam_jax.runs.logs import METRICS_FILE, MetricsLog, progress_bar
from iam_jax.training.flops import step_flops
from iam_jax.training.objectives import OBJECTIVES
from iam_jax.training.run import Run
from iam_jax.training.step import abstract_state, init_state, make_train_step
from iam_jax.training.telemetry import Meter, Profile


@dataclasses.dataclass
class Progress:
    """The progress of a run, saved with every checkpoint."""

    step: int = 0
    next_batch: int = 0  # the data position
    validated: int = -1  # step of the last validation
    best: float | None = None
    best_step: int | None = None
    since_best: int = 0  # validations since the best one
    minutes: float = 0.0  # of training, validations included
    tokens: int = 0  # real tokens seen
    window: dict = dataclasses.field(default_factory=dict)  # sums since the last line of metrics.jsonl
    stopped: str = ""  # why training ended before train.steps
    skipped: int = 0  # steps whose loss or gradient was not finite; they did not change the state

    @classmethod
    def read(cls, saved: dict) -> "Progress":
        """The progress saved in a checkpoint, which may come from an earlier version. Raises InputError for one of a later version."""
        if unknown := sorted(saved.keys() - {field.name for field in dataclasses.fields(cls)}):
            raise InputError(f"the checkpoint was written by a later version of this program: its progress has {quote_first(unknown)}")
        return cls(**saved)


def make_meter(run: Run) -> Meter:
    """A meter, with model FLOPs utilisation if the peak of the chip is known and the operations of the step can be counted."""
    chip = find_chip(jax.devices()[0].device_kind)
    try:
        return Meter(step_flops(run).model, chip) if chip else Meter()
    except ValueError as error:
        print(f"no model FLOPs utilisation in metrics.jsonl: {error}", flush=True)
        return Meter()


def train(run: Run, workdir: Path, evaluator: Evaluator, signals: Signals) -> Checkpoints:
    """Trains to train.steps, from the working folder's newest checkpoint if there is one, and returns the checkpoints.

    Raises Stop when interrupted, after everything is saved, and NonFiniteError when the losses or gradients of more than train.skip_limit
    steps are not finite (the last good checkpoint stays).
    """
    config = run.config
    cfg, metric = config.train, config.selection
    checkpoints = Checkpoints(workdir, cfg.keep, metric)

    # ---- state: from the newest checkpoint, else from scratch
    saved_step = -1
    if found := checkpoints.load(abstract_state(run)):
        saved_step, state, saved = found
        progress = Progress.read(saved)
        progress.best_step, progress.best = checkpoints.best() or (None, None)  # eval.metric may have changed
        print(f"continuing from step {progress.step:,}", flush=True)
    else:
        if (workdir / METRICS_FILE).exists():
            print("no checkpoint yet: starting from step 0", flush=True)
        state, progress = init_state(run), Progress()
    trained, frozen = (sum(math.prod(x.shape) for x in jax.tree.leaves(params)) for params in (state["params"], run.frozen))
    print(
        f"{trained:,} parameters{f' trained, {frozen:,} frozen' if frozen else ''}; {run.rows.targets:,} targets in {len(run.rows):,} rows "
        f"of {config.row_slots} slots ({run.rows.fill:.1%} real tokens), {len(run.rows) / cfg.batch_rows:.1f} batches an epoch",
        flush=True,
    )
    if isinstance(run.finish, DistinctItems):
        print(f"leading intra layers once per distinct item: {run.finish.saving}", flush=True)
    if progress.stopped.startswith("train.max_minutes") and (not cfg.max_minutes or cfg.max_minutes > progress.minutes):
        progress.stopped = ""
    if progress.stopped:
        print(f"training ended at step {progress.step:,}: {progress.stopped}", flush=True)
    if progress.stopped or (progress.step >= cfg.steps and progress.validated == progress.step):
        return checkpoints

    # ---- the loop: validate, save, get the next batch, step, log the previous step
    train_step = make_train_step(run)
    refresh = jax.jit(lambda params, frozen, items: all_text_vectors(run.model.bind(join(params, frozen)), items))
    validation = validation_subset(run.prepared.events, config)
    log = MetricsLog(workdir, progress.step, config.log, progress.validated)
    here = local_rows(run.mesh, cfg.batch_rows)
    batches = training_batches(run.rows, cfg.batch_rows, cfg.seed, progress.next_batch, run.finish, here)
    bar = progress_bar(config.log, cfg.steps, progress.step)
    meter, profile = make_meter(run), Profile(workdir, config.log.profile)
    pending: tuple[int, dict] | None = None
    several, agreed_late = distributed.processes() > 1, False
    clock = time.monotonic()

    def settle() -> None:
        """Reads the metrics of the step dispatched last. Only here the host waits for the device."""
        nonlocal pending, agreed_late
        if pending is None:
            return
        (step, values), pending = pending, None
        distributed.report_progress(f"step {step}")
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        distributed.report_progress(f"what follows step {step}")
        if several:  # all processes settle a step at the same point, so they get the same votes at the same time
            signals.agree(values.pop("stopping") > 0)
            agreed_late |= values.pop("late") > 0
        progress.tokens += int(values["tokens"])
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            skip(step, bad)
        else:
            for name, value in (values | {"steps": 1}).items():
                progress.window[name] = progress.window.get(name, 0) + value
        meter.step(values["tokens"], values["item_count"])
        if step % config.log.every and step != cfg.steps:
            return
        window, progress.window = progress.window, {}
        line = {f"{name}_loss": window[f"{name}_sum"] / max(window[f"{name}_count"], 1) for name in OBJECTIVES if f"{name}_sum" in window}
        if window:  # empty if all its steps were skipped
            line["gradient_norm"] = window["gradient_norm"] / window["steps"]
        line |= {
            "learning_rate": values["learning_rate"],
            "epoch": step * cfg.batch_rows / len(run.rows),
            "tokens_seen": progress.tokens,
            "skipped": progress.skipped,
        }
        line |= meter.take()
        log.write(step, line)
        if window:
            bar.set_postfix_str(f"loss {next(iter(line.values())):.3f}, {line['tokens_per_second']:,.0f} tokens/s")

    def skip(step: int, bad: list[str]) -> None:
        """Reports and counts a step that did not change the state. Raises NonFiniteError beyond train.skip_limit."""
        progress.skipped += 1
        what = f"step {step:,}: {', '.join(bad)} not finite"
        users = f"users of its batch: {quote_first(users_of_batch(run.rows, cfg.batch_rows, cfg.seed, step - 1))}"
        if progress.skipped > cfg.skip_limit:
            checkpoints.wait()
            last = f"the last good checkpoint is step {saved_step}" if saved_step >= 0 else "there is no checkpoint yet"
            more = f", after {progress.skipped - 1:,} skipped steps (train.skip_limit)" if cfg.skip_limit else ""
            raise NonFiniteError(f"{what}{more}; {last}; {users}")
        bar.write(f"{what}: skipped, {progress.skipped:,} of at most {cfg.skip_limit:,}; {users}")

    def validate() -> dict:
        params = join(state["params"], run.frozen)
        ranks = evaluator.rank(params, validation, signals.poll, "validation")
        summary = summarize(run.prepared, config, validation, ranks)
        kept = {name: value for name, value in summary.items() if "@" in name and not name.endswith("_ci")}
        kept |= evaluator.losses(params, validation, signals.poll, "validation")
        return {f"{config.metric_prefix}{name}": value for name, value in kept.items()}

    with signals.deferred():
        with contextlib.ExitStack() as last:  # all of these are called, however training ends
            for end in (checkpoints.wait, profile.close, log.close, bar.close):
                last.callback(end)
            while True:
                step = progress.step
                late = bool(cfg.max_minutes) and progress.minutes + (time.monotonic() - clock) / 60 >= cfg.max_minutes
                out_of_time, stopping = agreed_late if several else late, signals.stopping
                ending = step >= cfg.steps or out_of_time or stopping
                validating = len(validation) > 0 and not stopping and step > progress.validated
                validating &= step >= cfg.steps or out_of_time or (step > 0 and step % cfg.eval_every == 0)
                metrics = None
                if validating or ending or (step > saved_step and step > 0 and step % cfg.save_every == 0):
                    settle()
                    if validating:
                        try:
                            metrics = validate()
                        except Stop:  # saved without a validation; the resumed run validates first
                            validating = False
                    if metrics is not None:
                        value, progress.validated = metrics[metric], step
                        better = progress.best is None or value > progress.best
                        progress.best, progress.best_step = (value, step) if better else (progress.best, progress.best_step)
                        progress.since_best = 0 if better else progress.since_best + 1
                        log.write(step, {f"validation/{name}": value for name, value in metrics.items()})
                        bar.write(f"step {step:,}: validation {metric} {value:.4f}{' (best)' if better else ''}")
                        if cfg.patience and progress.since_best >= cfg.patience:
                            progress.stopped = f"no better {metric} in {cfg.patience} validations"
                    if out_of_time and step < cfg.steps and (progress.validated == step or not len(validation)):
                        progress.stopped = f"train.max_minutes = {cfg.max_minutes:g}"
                    if step > saved_step or validating:  # a checkpoint that was interrupted before its validation gets its metrics now
                        now = time.monotonic()
                        progress.minutes, clock = progress.minutes + (now - clock) / 60, now
                        log.upload()
                        checkpoints.save(step, state, dataclasses.asdict(progress), metrics)
                        saved_step = step
                    meter.resume()
                    if signals.stopping or ending or progress.stopped:
                        break
                if config.softmax == "cached" and step % config.objective.refresh_steps == 0:
                    state["cache"] = refresh(state["params"], run.frozen, run.items.catalogue)
                if profile.due(step):
                    settle()  # so that the trace has whole steps
                    profile.turn()
                    meter.resume()
                with meter.waiting():
                    batch = next(batches)
                batch = shard_batch(run.mesh, batch, cfg.batch_rows)
                if several:
                    votes = {"stopping": signals.requested, "late": late and distributed.is_first()}
                    batch["votes"] = {name: per_process(run.mesh, np.int32(vote)) for name, vote in votes.items()}
                state, values = train_step(state, batch, run.items, np.int32(step), run.frozen)
                settle()
                progress.step = progress.next_batch = step + 1
                pending = (step + 1, values)
                bar.update()
    if progress.stopped:
        print(f"training ended at step {progress.step:,}: {progress.stopped}", flush=True)
    signals.poll()
    return checkpoints

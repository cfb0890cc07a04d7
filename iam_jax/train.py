"""A training run, told from top to bottom."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from iam_jax import distributed, objective
from iam_jax.checkpoint import Checkpoints
from iam_jax.chips import find_chip
from iam_jax.config import Config
from iam_jax.data.batches import Batch, Rows, training_batches, training_rows, users_of_batch
from iam_jax.data.item_rows import DistinctItems, without_items
from iam_jax.data.prepare import Prepared
from iam_jax.errors import InputError, NonFiniteError, some
from iam_jax.evaluate import Evaluator, summarize, validation_subset
from iam_jax.flops import step_flops
from iam_jax.interrupt import Signals, Stop
from iam_jax.kernels.range_attention import choose
from iam_jax.logs import METRICS_FILE, MetricsLog, progress_bar
from iam_jax.model import Model, Params, make_model, pretrained
from iam_jax.optimizer import learning_rate, make_optimizer, updates_made
from iam_jax.parameters import EMBEDDINGS, abstract, frozen_names, join, mean_rows, name_of, select
from iam_jax.sharding import batch_shards, make_mesh, param_sharding, per_process, rows_here, shard_batch, split_rows
from iam_jax.telemetry import Meter, Profile


@dataclasses.dataclass
class Progress:
    """Where a run stands, besides its parameters: saved with every checkpoint."""

    step: int = 0
    next_batch: int = 0  # the data position
    validated: int = -1  # step of the last validation
    best: float | None = None
    best_step: int | None = None
    since_best: int = 0  # validations without a better one
    minutes: float = 0.0
    tokens: int = 0  # real tokens seen
    window: dict = dataclasses.field(default_factory=dict)  # sums since the last line of metrics.jsonl
    stopped: str = ""  # why training ended before train.steps
    skipped: int = 0  # steps that left the state as it was: their loss or gradient was not finite

    @classmethod
    def read(cls, saved: dict) -> "Progress":
        """Of a checkpoint, perhaps one of an earlier version. Raises InputError for one of a later version."""
        if unknown := sorted(saved.keys() - {field.name for field in dataclasses.fields(cls)}):
            raise InputError(f"the checkpoint was written by a later version of this program: its progress has {some(unknown)}")
        return cls(**saved)


@dataclasses.dataclass(frozen=True)
class Run:
    """What training and evaluation share, made once."""

    config: Config
    prepared: Prepared
    mesh: jax.sharding.Mesh
    model: Model
    rows: Rows
    items: objective.Items
    finish: Callable[..., Batch] = without_items  # what becomes of a batch before the model reads it
    frozen_names: frozenset[str] = frozenset()  # of the parameters that are not trained

    @functools.cached_property
    def abstract_trained(self) -> Params:
        """Shapes, types and shardings of the parameters that are trained, and that checkpoints hold."""
        return abstract(self.mesh, select(self.model.shapes(), lambda name: name not in self.frozen_names))

    def cost(self, progress: dict) -> dict:
        """What the run took so far: parameters, steps, real tokens seen, minutes of training with its validations."""
        sizes = {name_of(path): math.prod(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(self.model.shapes())}
        trained = sum(size for name, size in sizes.items() if name not in self.frozen_names)
        done = {"steps": progress["step"], "tokens_seen": progress["tokens"], "minutes": progress["minutes"]}
        return {"parameters": sum(sizes.values()), "trained": trained, **done}

    @functools.cached_property
    def frozen(self) -> Params:
        """The parameters that are not trained, read from config.model.pretrained when first asked for."""
        if not self.frozen_names:
            return {}
        shapes = select(self.model.shapes(), lambda name: name in self.frozen_names)
        return pretrained.load(self.config, abstract(self.mesh, shapes, self.config.model.frozen_dtype))


def make_run(config: Config, prepared: Prepared, devices: Sequence[jax.Device] | None = None) -> Run:
    """devices: None for those that are here."""
    catalogue, data = prepared.catalogue, config.data
    _check_attention(config, jax.default_backend() if devices is None else devices[0].platform)
    rows = training_rows(
        prepared.events,
        catalogue,
        data.row_tokens,
        data.context_items,
        whole_text=config.objective.token > 0,
        seed=config.train.seed,
    )
    if not rows.targets:
        raise InputError("there is nothing to train on: no user has two training events")
    model = make_model(config, catalogue.vocabulary, catalogue.items, int(catalogue.lengths.max()))
    items = objective.make_items(catalogue, prepared.events, rows.segments, config)
    mesh = make_mesh(config.mesh, devices)
    frozen = frozenset(frozen_names(config, model.shapes()))
    return Run(config, prepared, mesh, model, rows, items, _distinct_items(config, rows, mesh) or without_items, frozen)


def _check_attention(config: Config, platform: str) -> None:
    """Raises InputError where model.attention names kernels that cannot do the work here."""
    model = config.model
    if model.attention not in ("tpu", "gpu"):
        return
    q = jax.ShapeDtypeStruct((1, config.data.row_tokens, model.heads, model.head_size or model.width // model.heads), model.dtype)
    try:
        if platform != model.attention:
            raise ValueError(f"there is a {platform} here, on which these kernels are only interpreted; auto takes what is there")
        choose(q, q, None, model.attention)
    except ValueError as error:
        raise InputError(f"config.model.attention = {model.attention!r}: {error}") from error


def _distinct_items(config: Config, rows: Rows, mesh: jax.sharding.Mesh) -> DistinctItems | None:
    """Whether a batch's items go through the leading intra layers once each (model.item_states)."""
    model, parts = config.model, config.optimizer.accumulate
    if not config.states_by_item or model.item_states == "off" or (model.item_states == "auto" and config.drops):
        return None
    text = config.leading_vectors and config.softmax != "full"
    items = DistinctItems(rows, config.train.batch_rows, parts, batch_shards(mesh), targets=text)
    # The first micro-batch, in the plan's order, stands for all.
    some = [rows[row] for row in range(min(len(rows), config.train.batch_rows // parts))]
    batch = {name: np.stack([row[name] for row in some]) for name in some[0]}
    distinct = items.distinct(batch)
    tokens, slots = int(rows.catalogue.lengths[distinct].sum()), batch["token"].size
    if text:  # the targets' vectors come from the same states
        slots += batch["target"].size * int(rows.catalogue.item_lengths.max())
    items.saving = f"{tokens:,} tokens instead of {slots:,} slots in a micro-batch"
    return items if model.item_states == "on" or tokens <= 0.6 * slots else None


def make_train_step(run: Run):
    """(state, batch, items, step, frozen) -> (state, metrics), jitted, the state's buffers donated. A batch is split into
    optimizer.accumulate micro-batches whose gradients add up to that of the whole. frozen: the parameters that are not trained. The batch's
    `votes`, of every device, come back in the metrics as sums. A step whose loss or gradient is not finite, as its metrics then tell,
    returns the state as it was."""
    config, model = run.config, run.model
    optimizer, schedule = make_optimizer(config.optimizer), learning_rate(config.optimizer)
    parts = config.optimizer.accumulate
    weights = {"item": config.objective.item, "token": config.objective.token}

    def train_step(state: dict, batch: dict, items: objective.Items, step: jax.Array, frozen: Params = {}):  # noqa: B006
        params, cache = state["params"], state.get("cache")
        batch = dict(batch)
        votes = {name: votes.sum() for name, votes in batch.pop("votes", {}).items()}
        # rbg: threefry's dropout masks take longer than the layers on a CPU
        key = jax.random.fold_in(jax.random.key(config.train.seed, impl="rbg"), step)
        count = objective.counts(batch)

        def loss(params, micro, key):
            sums = objective.losses(model.bind(join(params, frozen)), config, items, micro, key, cache)
            return sum(weights[name] * value / jnp.maximum(count[name], 1) for name, value in sums.items()), sums

        gradient = jax.value_and_grad(loss, has_aux=True)
        if parts == 1:
            (_, sums), grads = gradient(params, batch, key)
        else:
            micros = split_rows(jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch), axis=1)

            def add(total, xs):
                (_, sums), grads = gradient(params, *xs)
                return jax.tree.map(jnp.add, total, (sums, grads)), None

            names = [name for name, weight in weights.items() if weight]
            zero = ({name: jnp.zeros(()) for name in names}, jax.tree.map(jnp.zeros_like, params))
            (sums, grads), _ = jax.lax.scan(add, zero, (micros, jax.random.split(key, parts)))
        updates, opt_state = optimizer.update(grads, state["optimizer"], params)
        metrics = {f"{name}_sum": value for name, value in sums.items()} | {"gradient_norm": optax.global_norm(grads)}
        finite = jnp.isfinite(jnp.stack(list(metrics.values()))).all()
        metrics |= {f"{name}_count": value for name, value in count.items()} | {"learning_rate": schedule(updates_made(state["optimizer"]))}
        metrics |= {"tokens": (batch["user"] > 0).sum()} | votes
        new = {"params": optax.apply_updates(params, updates), "optimizer": opt_state}
        state = state | jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, {name: state[name] for name in new})
        # Left to XLA, norm scales would come back sharded: then their buffers are not reused, and the second step compiles again.
        return jax.lax.with_sharding_constraint(state, param_sharding(run.mesh, state)), metrics

    return jax.jit(train_step, donate_argnums=0)


def rest_of_state(run: Run, trained: Params) -> dict:
    """What the state holds beside the trained parameters, at the start: the optimizer's state and (objective.softmax = "cached") the
    text vectors' cache."""
    config = run.config
    rest = {"optimizer": make_optimizer(config.optimizer).init(trained)}
    if config.softmax == "cached":
        rest["cache"] = jnp.zeros((run.prepared.catalogue.items, config.model.width))
    return rest


def abstract_state(run: Run) -> dict:
    """Shapes, types and shardings of the state, without allocating it."""
    trained = run.abstract_trained
    return {"params": trained} | abstract(run.mesh, jax.eval_shape(functools.partial(rest_of_state, run), trained))


def make_meter(run: Run) -> Meter:
    """With model FLOPs utilisation where the chip's peak is known and the step can be counted."""
    chip = find_chip(jax.devices()[0].device_kind)
    try:
        return Meter(step_flops(run).model, chip) if chip else Meter()
    except ValueError as error:
        print(f"no model FLOPs utilisation in metrics.jsonl: {error}", flush=True)
        return Meter()


def init_state(run: Run) -> dict:
    """The state at the start, created on its shards; what is pretrained is read."""
    config = run.config
    given = pretrained.names(config).keys() - run.frozen_names if config.model.pretrained else set()

    def fresh(key: jax.Array) -> Params:
        return select(run.model.init(key), lambda name: name not in given | run.frozen_names)

    def place(make: Callable, *args) -> dict:
        # XLA's default level compiles the generators of a CPU for many seconds, and they run no faster
        options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
        return jax.jit(make, out_shardings=param_sharding(run.mesh, jax.eval_shape(make, *args)), compiler_options=options)(*args)

    trained = place(fresh, jax.random.key(config.train.seed))
    if config.model.pretrained:
        trained = join(trained, pretrained.load(config, select(run.abstract_trained, lambda name: name in given)))
        boundaries = place(mean_rows, select(join(trained, run.frozen), lambda name: name in EMBEDDINGS))
        trained = join(select(trained, lambda name: name not in EMBEDDINGS.values()), boundaries)
    return {"params": trained} | place(functools.partial(rest_of_state, run), trained)


def train(run: Run, workdir: Path, evaluator: Evaluator, signals: Signals) -> Checkpoints:
    """Trains to train.steps, or goes on where the working folder's newest checkpoint stands. Raises Stop when interrupted (all saved)
    and NonFiniteError when more losses or gradients than train.skip_limit are not finite (the last good checkpoint stays)."""
    config = run.config
    cfg, metric = config.train, config.selection
    checkpoints = Checkpoints(workdir, cfg.keep, metric)

    # ---- state: from the newest checkpoint, else from scratch
    saved_step = -1
    if found := checkpoints.load(abstract_state(run)):
        saved_step, state, saved = found
        progress = Progress.read(saved)
        progress.best_step, progress.best = checkpoints.best() or (None, None)  # eval.metric may be another now
        print(f"continuing from step {progress.step:,}", flush=True)
    else:
        if (workdir / METRICS_FILE).exists():
            print("no checkpoint yet: starting from step 0", flush=True)
        state, progress = init_state(run), Progress()
    trained, frozen = (sum(math.prod(x.shape) for x in jax.tree.leaves(params)) for params in (state["params"], run.frozen))
    print(
        f"{trained:,} parameters{f' trained, {frozen:,} frozen' if frozen else ''}; {run.rows.targets:,} targets in {len(run.rows):,} rows "
        f"of {config.data.row_tokens} slots ({run.rows.fill:.1%} real tokens), {len(run.rows) / cfg.batch_rows:.1f} batches an epoch",
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

    # ---- the loop: validate, save, next batch, step, log the step before
    train_step = make_train_step(run)
    refresh = jax.jit(lambda params, frozen, items: objective.all_text_vectors(run.model.bind(join(params, frozen)), items))
    validation = validation_subset(run.prepared.events, config)
    log = MetricsLog(workdir, progress.step, config.log, progress.validated)
    here = rows_here(run.mesh, cfg.batch_rows)
    batches = training_batches(run.rows, cfg.batch_rows, cfg.seed, progress.next_batch, run.finish, here)
    bar = progress_bar(config.log, cfg.steps, progress.step)
    meter, profile = make_meter(run), Profile(workdir, config.log.profile)
    pending: tuple[int, dict] | None = None
    several, agreed_late = distributed.processes() > 1, False
    clock = time.monotonic()

    def settle() -> None:
        """Reads the metrics of the step dispatched last; only now does the host wait for the device."""
        nonlocal pending, agreed_late
        if pending is None:
            return
        (step, values), pending = pending, None
        distributed.alive(f"step {step}")
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        distributed.alive(f"what follows step {step}")
        if several:  # all processes settle a step at the same point, and so learn the same at the same time
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
        line = {
            f"{name}_loss": window[f"{name}_sum"] / max(window[f"{name}_count"], 1) for name in ("item", "token") if f"{name}_sum" in window
        }
        if window:  # a step of it was not skipped
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
        """Tells and counts a step that left the state as it was. Raises NonFiniteError when it is one too many."""
        progress.skipped += 1
        what = f"step {step:,}: {', '.join(bad)} not finite"
        users = f"users of its batch: {some(users_of_batch(run.rows, cfg.batch_rows, cfg.seed, step - 1))}"
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
        with contextlib.ExitStack() as last:  # all of it, whatever ends training
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
                        except Stop:  # saved without it; the resumed run validates first
                            validating = False
                    if validating:
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
                    if step > saved_step or validating:  # interrupted before its validation, a checkpoint gets its metrics now
                        now = time.monotonic()
                        progress.minutes, clock = progress.minutes + (now - clock) / 60, now
                        log.upload()
                        checkpoints.save(step, state, dataclasses.asdict(progress), metrics)
                        saved_step = step
                    meter.resume()
                    if signals.stopping or ending or progress.stopped:
                        break
                if config.softmax == "cached" and step % config.objective.refresh_steps == 0:
                    state["cache"] = refresh(state["params"], run.frozen, run.items)
                if profile.due(step):
                    settle()  # the trace has whole steps
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

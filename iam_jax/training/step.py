"""The training state and the step that updates it."""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from iam_jax.data.tfidf import token_svd
from iam_jax.devices.mesh import param_sharding, split_rows
from iam_jax.model import Params, pretrained
from iam_jax.model.items import left_out
from iam_jax.model.parameters import EMBEDDINGS, abstract, join, mean_rows, select
from iam_jax.training import objectives
from iam_jax.training.optimizer import learning_rate, make_optimizer, updates_made
from iam_jax.training.run import Run


def init_state(run: Run) -> dict:
    """The initial state, created on its shards. Pretrained parameters are read."""
    config = run.config
    given = pretrained.names(config).keys() - run.frozen_names if config.model.pretrained else set()

    def fresh(key: jax.Array) -> Params:
        return select(run.model.init(key), lambda name: name not in given | run.frozen_names)

    def place(make: Callable, *args) -> dict:
        # On a CPU, XLA's default level takes many seconds to compile the random generators, and they run no faster. A level in XLA_FLAGS
        # is the user's choice.
        chosen = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
        options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" and not chosen else None
        return jax.jit(make, out_shardings=param_sharding(run.mesh, jax.eval_shape(make, *args)), compiler_options=options)(*args)

    trained = place(fresh, jax.random.key(config.train.seed))
    if config.model.token_embeddings != "random":
        old_VD = trained["decoder"]["embedding_VD"]
        new_VD = token_svd(run.prepared.catalogue, config.model.width, config.train.seed)
        trained["decoder"]["embedding_VD"] = jax.make_array_from_callback(old_VD.shape, old_VD.sharding, lambda index: new_VD[index])
    if config.model.pretrained:
        trained = join(trained, pretrained.load(config, select(run.abstract_trained, lambda name: name in given)))
        boundaries = place(mean_rows, select(join(trained, run.frozen), lambda name: name in EMBEDDINGS))
        own = select(boundaries, lambda name: name not in run.frozen_names)
        trained = join(select(trained, lambda name: name not in EMBEDDINGS.values()), own)
    return {"params": trained} | place(functools.partial(rest_of_state, run), trained)


def make_train_step(run: Run):
    """Returns the jitted step (state, batch, items, step, frozen) -> (state, metrics). The state's buffers are donated.

    A batch is split into optimizer.accumulate micro-batches, whose gradients add up to that of the whole batch. frozen: the parameters that
    are not trained. The batch's `votes` of all devices are summed in the metrics. If the loss or the gradient is not finite, which the
    metrics show, the state is returned unchanged.
    """
    config, model = run.config, run.model
    optimizer, schedule = make_optimizer(config.optimizer), learning_rate(config.optimizer)
    parts, frozen_tokens = config.optimizer.accumulate, config.model.token_embeddings == "svd_frozen"
    weights = objectives.weights(config)

    def train_step(state: dict, batch: dict, items: objectives.TrainingItems, step: jax.Array, frozen: Params = {}):  # noqa: B006
        params, cache = state["params"], state.get("cache")
        batch = dict(batch)
        votes = {name: votes.sum() for name, votes in batch.pop("votes", {}).items()}
        # rbg: on a CPU, threefry's dropout masks take longer than the layers
        key = jax.random.fold_in(jax.random.key(config.train.seed, impl="rbg"), step)
        if config.model.drop_identity or config.model.drop_content:  # the same items in all micro-batches
            shares = config.model.drop_identity, config.model.drop_content
            items = dataclasses.replace(items, catalogue=left_out(items.catalogue, *shares, jax.random.fold_in(key, 1)))
        count = objectives.counts(batch)

        def loss(params, learned, micro, key, given=None):
            shared = None if learned is None else objectives.Shared(learned, given)
            sums = objectives.losses(model.bind(join(params, frozen)), config, items, micro, key, cache, shared)
            return sum(weights[name] * value / jnp.maximum(count[name], 1) for name, value in sums.items()), sums

        def accumulated():
            """Sums and gradients by micro-batches. What they share is computed once: their gradients with respect to it are added, and go
            through the model in one backward pass (GradCache, arXiv 2101.06983)."""

            def share(params):
                return objectives.share(model.bind(join(params, frozen)), config, items, batch, key, cache)

            learned, backward, given = jax.vjp(share, params, has_aux=True)
            rows = {name: x for name, x in batch.items() if name != "leading"}
            rows["target_place"] = jnp.arange(batch["target"].size, dtype=jnp.int32).reshape(batch["target"].shape)
            micros = split_rows(jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), rows), axis=1)

            def add(total, xs):
                (_, sums), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, learned, *xs, given)
                return jax.tree.map(jnp.add, total, (sums, grads)), None

            # in float32, also for bfloat16 states
            zero = {name: jnp.zeros(()) for name in weights}, jax.tree.map(lambda x: jnp.zeros(x.shape), (params, learned))
            keys = jax.random.split(jax.random.fold_in(key, 0), parts)
            (sums, (grads, of_learned)), _ = jax.lax.scan(add, zero, (micros, keys))
            (more,) = backward(jax.tree.map(lambda g, x: g.astype(x.dtype), of_learned, learned))
            return sums, jax.tree.map(jnp.add, grads, more)

        if parts == 1:
            (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, None, batch, key)
        else:
            sums, grads = accumulated()
        if frozen_tokens:  # also where the next-token objective reads them
            grads = _without_tokens(grads)
        updates, opt_state = optimizer.update(grads, state["optimizer"], params)
        if frozen_tokens:  # no weight decay
            updates = _without_tokens(updates)
        metrics = {f"{name}_sum": value for name, value in sums.items()} | {"gradient_norm": optax.global_norm(grads)}
        finite = jnp.isfinite(jnp.stack(list(metrics.values()))).all()
        metrics |= {f"{name}_count": value for name, value in count.items()} | {"learning_rate": schedule(updates_made(state["optimizer"]))}
        metrics |= {"tokens": (batch["user"] > 0).sum()} | votes
        new = {"params": optax.apply_updates(params, updates), "optimizer": opt_state}
        state = state | jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, {name: state[name] for name in new})
        # Without the constraint XLA would shard norm scales. Their buffers would not be reused, and the second step would compile again.
        return jax.lax.with_sharding_constraint(state, param_sharding(run.mesh, state)), metrics

    return jax.jit(train_step, donate_argnums=0)


def _without_tokens(tree: Any) -> Any:
    """Gradients or updates that are zero for the token embeddings."""
    decoder = tree["decoder"]
    return tree | {"decoder": decoder | {"embedding_VD": jnp.zeros_like(decoder["embedding_VD"])}}


def rest_of_state(run: Run, trained: Params) -> dict:
    """The initial state without the trained parameters: the optimizer's state and, if objective.softmax is "cached", the cache of text
    vectors."""
    config = run.config
    rest = {"optimizer": make_optimizer(config.optimizer).init(trained)}
    if config.softmax == "cached":
        rest["cache"] = jnp.zeros((run.prepared.catalogue.items, config.vector_width))
    return rest


def abstract_state(run: Run) -> dict:
    """Shapes, types and shardings of the state, without allocating it."""
    trained = run.abstract_trained
    return {"params": trained} | abstract(run.mesh, jax.eval_shape(functools.partial(rest_of_state, run), trained))

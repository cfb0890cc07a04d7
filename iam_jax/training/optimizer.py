"""AdamW with gradient clipping; the learning rate has a linear warm-up and a cosine decay of its own length."""

import jax
import optax

from iam_jax.config import OptimizerConfig
from iam_jax.devices.mesh import axes_of

TABLES = ("table_IE", "identity_IE")
CONTENT = ("text_DE", "content_DE", "input_vector_PE", "output_vector_PE")


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine decay to final_scale x peak at decay_steps. It does not depend on the length of the run."""
    start = 0.0 if config.warmup_steps else config.learning_rate
    if config.decay_steps == 0:
        return optax.linear_schedule(start, config.learning_rate, max(config.warmup_steps, 1))
    return optax.warmup_cosine_decay_schedule(
        init_value=start,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.decay_steps,
        end_value=config.learning_rate * config.final_scale,
    )


def updates_made(state: optax.OptState) -> jax.Array:
    """int32: the number of updates, on which the learning rate depends: steps of the run minus skipped ones."""
    return optax.tree.get(state, "ScaleByScheduleState").count


def decayed(params: dict) -> dict:
    """Whether each parameter is decayed: matrices from or to the model width or an adapter's rank are, biases and norm scales are not."""

    def is_matrix(path, _) -> bool:
        axes = axes_of(path)
        return len(axes) >= 2 and bool(set("DEL") & set(axes))

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def decays(config: OptimizerConfig, params: dict) -> dict:
    """The weight decay of each parameter; 0 where it is not `decayed`."""
    own = {name: config.table_decay for name in TABLES} | {name: config.content_decay for name in CONTENT}

    def decay(path, is_decayed: bool) -> float:
        value = own.get(jax.tree_util.keystr(path, simple=True), -1.0)
        return is_decayed * (config.weight_decay if value == -1 else value)

    return jax.tree_util.tree_map_with_path(decay, decayed(params))


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping, then AdamW."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    if config.table_decay == config.content_decay == -1:
        adamw = optax.adamw(
            learning_rate(config), b1=config.b1, b2=config.b2, eps=config.epsilon, weight_decay=config.weight_decay, mask=decayed
        )
        return optax.chain(clip, adamw)

    def add(updates, params):
        return jax.tree.map(lambda update, decay, x: update + decay * x, updates, decays(config, params), params)

    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)
    return optax.chain(clip, adam, optax.stateless(add), optax.scale_by_learning_rate(learning_rate(config)))

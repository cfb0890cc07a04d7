"""The parts of a run that training, evaluation and planning share: the model, the packed rows and the items."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from iam_jax.config import Config
from iam_jax.data.batches import Batch, Rows, training_rows
from iam_jax.data.item_rows import DistinctItems, chunks, entry_slots, without_items
from iam_jax.data.prepare import Prepared
from iam_jax.devices.mesh import batch_shards, make_mesh
from iam_jax.errors import InputError
from iam_jax.kernels.range_attention import choose_implementation
from iam_jax.model import Model, Params, make_model
from iam_jax.model.parameters import abstract, frozen_names, load_frozen, select
from iam_jax.training import objectives


@dataclasses.dataclass(frozen=True)
class Run:
    """The model, the data and the mesh of a run."""

    config: Config
    prepared: Prepared
    mesh: jax.sharding.Mesh
    model: Model
    rows: Rows
    items: objectives.TrainingItems
    finish: Callable[..., Batch] = without_items  # turns a batch into the model's input
    frozen_names: frozenset[str] = frozenset()  # of the parameters that are not trained

    @functools.cached_property
    def abstract_trained(self) -> Params:
        """Shapes, types and shardings of the trained parameters, which checkpoints hold."""
        return abstract(self.mesh, select(self.model.shapes(), lambda name: name not in self.frozen_names))

    def with_tower(self, tower_XD: np.ndarray) -> "Run":
        """The run with the states of a constant tower (`config.constant_tower`)."""
        catalogue = dataclasses.replace(self.items.catalogue, tower_XD=jnp.asarray(tower_XD))
        return dataclasses.replace(self, items=dataclasses.replace(self.items, catalogue=catalogue))

    def cost(self, progress: dict) -> dict:
        """The cost of the run so far: parameters, steps, real tokens seen, minutes of training (validations included)."""
        shapes: dict[str, Any] = flatten_dict(self.model.shapes(), sep=".")
        sizes = {name: math.prod(x.shape) for name, x in shapes.items()}
        trained = sum(size for name, size in sizes.items() if name not in self.frozen_names)
        done = {"steps": progress["step"], "tokens_seen": progress["tokens"], "minutes": progress["minutes"]}
        return {"parameters": sum(sizes.values()), "trained": trained, **done}

    @functools.cached_property
    def frozen(self) -> Params:
        """The parameters that are not trained. They are read from config.model.pretrained on first use."""
        if not self.frozen_names:
            return {}
        shapes = select(self.model.shapes(), lambda name: name in self.frozen_names)
        return load_frozen(self.config, abstract(self.mesh, shapes, self.config.model.frozen_dtype))


def make_run(config: Config, prepared: Prepared, devices: Sequence[jax.Device] | None = None) -> Run:
    """Makes the run of a config and its prepared data. devices: None for those of this machine.

    Raises InputError if there is nothing to train on, or if the config does not suit the devices or an objective.
    """
    catalogue, data = prepared.catalogue, config.data
    objectives.check(config)
    _check_attention(config, jax.default_backend() if devices is None else devices[0].platform)
    rows = training_rows(
        prepared.events,
        catalogue,
        config.row_slots,
        data.context_items,
        whole_text=any(objectives.OBJECTIVES[name].whole_text for name in objectives.weights(config)),
        seed=config.train.seed,
        **config.row_options,
    )
    if not rows.targets:
        raise InputError("there is nothing to train on: no user has two training events")
    size = 0 if prepared.vectors is None else prepared.vectors.shape[1]
    model = make_model(config, catalogue.vocabulary, catalogue.items, int(catalogue.lengths.max()), size)
    items = objectives.make_training_items(catalogue, prepared.events, rows.segments, config, prepared.vectors)
    mesh = make_mesh(config.mesh, devices)
    frozen = frozenset(frozen_names(config, model.shapes()))
    finish = entry_slots if config.constant_tower else _distinct_items(config, rows, mesh) or without_items
    return Run(config, prepared, mesh, model, rows, items, finish, frozen)


def _check_attention(config: Config, platform: str) -> None:
    """Raises InputError if model.attention names kernels that do not run on this platform or do not support the model."""
    model = config.model
    if model.attention not in ("tpu", "gpu"):
        return
    q = jax.ShapeDtypeStruct((1, config.data.row_tokens, model.heads, model.head_size or model.width // model.heads), model.dtype)
    try:
        if platform != model.attention:
            raise ValueError(f"these kernels would only be interpreted on this platform, {platform}; auto chooses kernels that fit")
        choose_implementation(q, q, None, model.attention)
    except ValueError as error:
        raise InputError(f"config.model.attention = {model.attention!r}: {error}") from error


def _distinct_items(config: Config, rows: Rows, mesh: jax.sharding.Mesh) -> DistinctItems | None:
    """The distinct items of batches, if they go through the leading intra layers once each (model.item_states); else None."""
    model, batch_rows = config.model, config.train.batch_rows
    always = config.item_level or model.item_states == "on"
    if not config.states_by_item or model.item_states == "off" or (config.drops and not always):
        return None
    text = config.leading_vectors and config.softmax != "full"
    items = DistinctItems(rows, batch_rows, chunks(config.optimizer.accumulate), batch_shards(mesh), text, config.data.row_tokens)
    # One batch, of the first rows, represents all.
    first = [rows[row] for row in range(min(len(rows), batch_rows))]
    batch = {name: np.stack([row[name] for row in first]) for name in first[0]}
    distinct = items.distinct(batch)
    tokens, slots = int(rows.catalogue.lengths[distinct].sum()), batch["token"].size
    if text:  # the targets' vectors are computed from the same states
        slots += batch["target"].size * int(rows.catalogue.item_lengths.max())
    if config.item_level:
        items.saving = f"{tokens:,} tokens in a batch"
        return items
    items.saving = f"{tokens:,} tokens instead of {slots:,} slots in a batch"
    return items if always or tokens <= 0.6 * slots else None

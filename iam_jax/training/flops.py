"""FLOPs of a training step, for plans (plan.py) and for model FLOPs utilisation.

Matrix products are counted in the jaxpr: 2 FLOPs per multiplication and addition, times the lengths of the loops around the product. XLA's
`cost_analysis` counts the body of a loop once, so it would count only one of the stacked layers. Padding slots count, since they are
computed. Only matrix products are counted.

Attention is counted separately, because its kernels compute only the blocks that the ranges need: 4 x visible (query, key) pairs x heads x
head size for the forward pass, and 2.5 times that for the backward pass, which computes the logits again (the convention of
FlashAttention, arXiv 2205.14135).
"""

import dataclasses
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun, jaxprs_in_params
from jax.interpreters import partial_eval

from iam_jax.config import Config, ModelConfig
from iam_jax.data.batches import Batch
from iam_jax.data.item_rows import chunks
from iam_jax.devices.chips import Flops
from iam_jax.model import Params
from iam_jax.model.attention import key_ranges
from iam_jax.model.parameters import abstract, join, select
from iam_jax.relations import RELATIONS
from iam_jax.training import objectives
from iam_jax.training.run import Run

_SAMPLE = 64  # visible pairs are counted in this many rows


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one optimizer step, on all devices together."""

    model: Flops  # without recomputation
    hardware: Flops  # with recomputation for the backward pass (model.remat, items' states, the chunks of logits)


# ---- matrix products


def _shape(x: Any) -> tuple[int, ...]:
    """Of a variable of a jaxpr."""
    return x.aval.shape


def matmul_flops(jaxpr: Jaxpr, taken: float = 1.0) -> Flops:
    """Counts the FLOPs of a jaxpr's matrix products outside range attention.

    taken: how often conditional work is done, as a share; a condition counts as its most expensive branch. Raises ValueError for a product
    in a loop whose length is not in the jaxpr, and for primitives that it cannot count.
    """
    total: Flops = Counter()
    for eqn in jaxpr.eqns:
        if "range_attention" in str(eqn.source_info.name_stack):
            continue
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            factor, product = (_shape(x) for x in (eqn.invars[0], eqn.outvars[0]))
            total[_kind(eqn)] += 2 * math.prod(factor[axis] for axis in contracted) * math.prod(product)
            continue
        if name in ("conv_general_dilated", "ragged_dot_general", "pallas_call"):
            raise ValueError(f"flops: {name} is not counted")
        inner = [matmul_flops(body, taken) for body in jaxprs_in_params(params)]
        if name == "cond":
            most = max(inner, key=Counter.total)
            total.update({kind: taken * count for kind, count in most.items()})
            continue
        if name == "while" and any(inner):
            raise ValueError("flops: a product in a loop of unknown length")
        times = params["length"] if name == "scan" else 1
        if name == "shard_map":  # every device runs its body
            times = math.prod(params["mesh"].shape[axis] for axis in params["manual_axes"])
        for counts in inner:
            total.update({kind: times * count for kind, count in counts.items()})
    return total


def _kind(eqn) -> str:
    if all(x.aval.dtype.itemsize == 2 for x in eqn.invars):
        return "bfloat16"
    precision = eqn.params["precision"]
    highest = precision is not None and jax.lax.Precision.HIGHEST in precision
    return "float32 highest" if highest else "float32"


def traced(f, *args) -> Jaxpr:
    """Returns the jaxpr of f without dead code. args: arrays or `jax.ShapeDtypeStruct`s."""
    jaxpr = jax.make_jaxpr(f)(*args).jaxpr
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def _saving_everything(jaxpr: Jaxpr) -> Jaxpr:
    """Makes every checkpoint in the jaxpr save all values, so that its gradient recomputes nothing."""

    def inner(value):
        if isinstance(value, ClosedJaxpr):
            return value.replace(jaxpr=_saving_everything(value.jaxpr))
        return _saving_everything(value) if isinstance(value, Jaxpr) else value

    eqns = []
    for eqn in jaxpr.eqns:
        params = {name: tuple(map(inner, x)) if type(x) is tuple else inner(x) for name, x in eqn.params.items()}
        if "policy" in params and "prevent_cse" in params:
            params["policy"] = jax.checkpoint_policies.everything_saveable
        eqns.append(eqn.replace(params=params))
    return jaxpr.replace(eqns=eqns)


# ---- attention


def visible_pairs(batch: Batch, self_key: bool = False) -> dict[str, float]:
    """Returns the mean number of visible (query, key) pairs per row, by relation.

    batch: needs `user` and `group`, [B, T]. self_key: whether queries of inter layers see their own key.
    """
    user_BT = np.asarray(batch["user"])
    pairs = {}
    for name, ranges in key_ranges(jnp.asarray(user_BT), jnp.asarray(batch["group"])).items():
        bounds = [(np.asarray(start, np.int64), np.asarray(stop, np.int64)) for start, stop in filter(None, ranges)]
        count = sum(np.maximum(stop - start, 0).sum() for start, stop in bounds)
        count += (self_key and RELATIONS[name].other_items_only) * (user_BT > 0).sum()
        pairs[name] = float(count) / len(user_BT)
    return pairs


def attention_flops(
    model: ModelConfig, pairs: dict[str, float], relations: tuple[str, ...], forward: int = 1, backward: bool = False
) -> Flops:
    """FLOPs of attention in layers of these relations.

    model: the shape of the layers. pairs: visible pairs by relation; if they are per row, the result is per row. forward: how often the
    forward pass is computed. backward: whether there is a backward pass.
    """
    size = model.heads * (model.head_size or model.width // model.heads)
    kind = "bfloat16" if model.dtype == "bfloat16" else "float32 highest"
    return Counter({kind: 4 * size * (forward + 2.5 * backward) * sum(pairs[relation] for relation in relations)})


def text_pairs(config: Config, length_I: np.ndarray) -> dict[str, float]:
    """As `visible_pairs`, for rows that hold the text of one item each. length_I: tokens of each item."""
    real_IT = (np.arange(length_I.max()) < length_I[:, None]).astype(np.int32)
    return visible_pairs({"user": real_IT, "group": real_IT}, config.model.self_key)


# ---- a training step


def step_flops(run: Run) -> StepFlops:
    """Counts the FLOPs of one optimizer step of `run`. Counts that depend on the batch (visible pairs, distinct items) use a few rows."""
    config, rows = run.config, run.rows
    batch_rows, parts = config.train.batch_rows, config.optimizer.accumulate

    def sample_batch(count: int) -> Batch:
        chosen = [rows[row % len(rows)] for row in range(count)]
        return {name: np.stack([row[name] for row in chosen]) for name in chosen[0]}

    batch = run.finish(sample_batch(batch_rows))
    taken = 1.0
    if "leading" in batch:
        taken = float((batch["leading"]["user"].reshape(chunks(parts), -1) > 0).any(1).mean())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    model, hardware, backward = _loss_flops(run, shapes, taken)

    pairs = visible_pairs(sample_batch(max(batch_rows, min(_SAMPLE, len(rows)))), config.model.self_key)
    again = 1 + config.model.remat
    leading = config.schedule.leading_intra if "leading" in batch else 0
    layers = config.schedule.relations
    shape = config.model.item_shape if config.item_level else config.model
    calls = [(shape, pairs, batch_rows, layers[leading:], again)]
    if leading:
        item_rows = len(batch["leading"]["user"])
        calls.append(
            (config.model, visible_pairs(batch["leading"]), item_rows, layers[:leading], again + objectives.recomputes_items(config))
        )
    count, checkpointed = _texts(config, run.items, batch)
    if count:
        of_text = layers[: config.schedule.leading_intra] if config.objective.text_layers == "leading" else layers
        calls.append((config.model, text_pairs(config, np.asarray(run.items.catalogue.length_I)), count, of_text, again + checkpointed))
    for shape, pairs, times, relations, forward in calls:
        for total, computed in ((model, 1), (hardware, forward if backward else 1)):
            one = attention_flops(shape, pairs, relations, computed, backward)
            total.update({kind: times * flops for kind, flops in one.items()})
    return StepFlops(model, hardware)


def _loss_flops(run: Run, batch: Batch, taken: float) -> tuple[Flops, Flops, bool]:
    """FLOPs of a batch's loss and gradient without and with recomputation, and whether attention has a backward pass."""
    config, parts = run.config, run.config.optimizer.accumulate
    cache = (
        jax.ShapeDtypeStruct((run.items.catalogue.length_I.shape[0], config.vector_width), np.float32)
        if config.softmax == "cached"
        else None
    )
    frozen = abstract(run.mesh, select(run.model.shapes(), lambda name: name in run.frozen_names), config.model.frozen_dtype)
    key = jax.random.key(0, impl="rbg")

    def share(params: Params, batch: Batch, frozen: Params, items: objectives.TrainingItems, cache):
        return objectives.share(run.model.bind(join(params, frozen)), config, items, batch, key, cache)

    def loss(learned: tuple, batch: Batch, frozen: Params, items: objectives.TrainingItems, cache, given: dict):
        params, shared = learned
        shared = shared and objectives.Shared(shared, given)
        return sum(objectives.losses(run.model.bind(join(params, frozen)), config, items, batch, key, cache, shared).values())

    params, rest = run.abstract_trained, (frozen, run.items, cache)
    if parts == 1:
        return _gradient_flops(loss, (params, None), (batch, *rest, {}), taken)
    # What the micro-batches share, once; then each of them
    learned, given = jax.eval_shape(share, params, batch, *rest)

    def total(*args):
        return sum((x.sum() for x in jax.tree.leaves(share(*args).learned)), jnp.zeros(()))

    once = _gradient_flops(total, params, (batch, *rest), taken)
    rows = {name: x for name, x in batch.items() if name != "leading"} | {"target_place": batch["target"]}
    micro = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] // parts, *x.shape[1:]), x.dtype), rows)
    each = _gradient_flops(loss, (params, learned), (micro, *rest, given), taken)
    for counts, of_micro in zip(once[:2], each[:2], strict=True):
        counts.update({kind: parts * flops for kind, flops in of_micro.items()})
    return *once[:2], once[2] or each[2]


def _gradient_flops(loss, learned, rest: tuple, taken: float) -> tuple[Flops, Flops, bool]:
    """FLOPs of loss(learned, *rest) and its gradient with respect to `learned` without and with recomputation, and whether attention has a
    backward pass."""
    closed, leaves = jax.make_jaxpr(loss)(learned, *rest), jax.tree.leaves(learned)

    def gradient(closed: ClosedJaxpr) -> Jaxpr:
        f = jax.value_and_grad(lambda learned, rest: jaxpr_as_fun(closed)(*learned, *rest)[0])
        return traced(f, leaves, jax.tree.leaves(rest))

    once, recomputing = gradient(closed.replace(jaxpr=_saving_everything(closed.jaxpr))), gradient(closed)
    return matmul_flops(once, taken), matmul_flops(recomputing, taken), _holds_backward_attention(recomputing)


def _holds_backward_attention(jaxpr: Jaxpr, transposed: bool = False) -> bool:
    for eqn in jaxpr.eqns:
        scope = str(eqn.source_info.name_stack)
        inside = transposed or "transpose" in scope
        if "range_attention" in scope:
            if inside:
                return True
        elif any(_holds_backward_attention(body, inside) for body in jaxprs_in_params(eqn.params)):
            return True
    return False


def _texts(config: Config, items: objectives.TrainingItems, batch: Batch) -> tuple[int, bool]:
    """The number of item texts that a step encodes besides those of `leading`, and whether each is recomputed for its gradient."""
    if not config.reads_text:
        return 0, False
    if config.softmax == "full":
        return items.catalogue.length_I.shape[0], True
    targets = 0 if config.leading_vectors and "leading" in batch else math.prod(batch["target"].shape)
    return targets + config.objective.negatives, config.optimizer.accumulate > 1

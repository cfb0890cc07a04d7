"""Matrices and their low-rank adapters (LoRA, arXiv 2106.09685): x W + (alpha / rank) x A B, with B zero at the start.

The axis letters in a matrix's name say what it maps: query_DNH from D to N, H; out_NHD from N, H to D. The bias of query_DNH, if it has
one, is query_NH, and its adapter is query_lora_DL and query_lora_LNH (L: the adapter's rank).
"""

import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from iam_jax.config import LoraConfig
from iam_jax.devices.mesh import current_platform
from iam_jax.errors import InputError

_ADAPTER = re.compile(r"(.+)_lora_([A-Z]+)L$")


class Keys:
    """Random keys for parameters, one after the other. nnx.Rngs counts in an array, which would take most of the time to trace a model."""

    def __init__(self, key: jax.Array):
        self._key, self._count = key, itertools.count()

    def __call__(self) -> jax.Array:
        return jax.random.fold_in(self._key, next(self._count))


def weight(keys: Keys, shape: tuple[int, ...], fan_in: int, scale: float = 1.0) -> nnx.Param:
    """A float32 matrix whose product keeps the variance of its input, times `scale` ** 2."""
    return nnx.Param(scale * jax.random.truncated_normal(keys(), -2, 2, shape) / (0.87962566 * fan_in**0.5))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; none if `key` is None."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def _maps(name: str) -> tuple[str, str, str, str]:
    """ "query_DNH" -> "query", "DNH", "D", "NH"."""
    stem, axes = name.rsplit("_", 1)
    return (stem, axes, "D", axes[1:]) if axes[0] == "D" else (stem, axes, axes[:-1], axes[-1])


def _product(x: jax.Array, matrix: jax.Array, inputs: int) -> jax.Array:
    """x [B, T, …] times a matrix, summed over the last `inputs` axes of x and the first ones of the matrix."""
    if current_platform() != "cpu":
        return jnp.tensordot(x, matrix, inputs)
    # For the gradient of a matrix, XLA on CPUs would first transpose an operand with several axes, which takes longer than the product.
    size = math.prod(matrix.shape[:inputs])
    y = x.reshape(-1, size) @ matrix.reshape(size, -1)
    return y.reshape(*x.shape[: x.ndim - inputs], *matrix.shape[inputs:])


def linear(module: Any, name: str, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """x [B, T, …] times the module's matrix `name`, plus its bias and its adapter if there are any. key: for the adapter's dropout."""
    stem, _, inputs, outputs = _maps(name)
    y = _product(x, getattr(module, name)[...].astype(x.dtype), len(inputs))
    if (bias := getattr(module, f"{stem}_{outputs}", None)) is not None:
        y = y + bias[...].astype(x.dtype)
    if (down := getattr(module, f"{stem}_lora_{inputs}L", None)) is not None:
        up, config = getattr(module, f"{stem}_lora_L{outputs}"), module.config.lora
        x = dropout(x, config.dropout, None if key is None else jax.random.fold_in(key, sum(map(ord, stem))))
        y_BTL = jnp.einsum(f"BT{inputs},{inputs}L->BTL", x, down[...].astype(x.dtype))
        y = y + jnp.einsum(f"BTL,L{outputs}->BT{outputs}", y_BTL, up[...].astype(x.dtype)) * (config.alpha / config.rank)
    return y


def add_adapters(config: LoraConfig, keys: Keys, **modules: nnx.Module) -> None:
    """Adds adapters to the matrices whose names ("attention.query_DNH") match config.targets. Raises InputError if none matches."""
    if not config.rank:
        return
    matrices = [(kind, name) for kind, module in modules.items() for name in vars(module) if re.search(r"_[A-Z]{2,}$", name)]
    matrices = [(kind, name) for kind, name in matrices if isinstance(getattr(modules[kind], name), nnx.Param)]
    matrices = [(kind, name) for kind, name in matrices if "D" in name.rsplit("_", 1)[1]]  # the others are biases
    found = [(kind, name) for kind, name in matrices if re.search(config.targets, f"{kind}.{name}")]
    if not found:
        names = ", ".join(f"{kind}.{name}" for kind, name in matrices)
        raise InputError(f"config.model.lora.targets = {config.targets!r} matches none of {names}")
    for kind, name in found:
        module, (stem, axes, inputs, outputs) = modules[kind], _maps(name)
        shape = dict(zip(axes, getattr(module, name).shape, strict=True))
        fan_in = 1
        for letter in inputs:
            fan_in *= shape[letter]
        setattr(module, f"{stem}_lora_{inputs}L", weight(keys, (*(shape[a] for a in inputs), config.rank), fan_in))
        setattr(module, f"{stem}_lora_L{outputs}", nnx.Param(jnp.zeros((config.rank, *(shape[a] for a in outputs)))))


def merge(params: dict, config: LoraConfig) -> dict:
    """The parameters with every adapter added to its matrix, and without adapters. The sum has the wider of the two types: bfloat16 would
    round most of a small adapter away."""
    merged = {name: merge(x, config) if isinstance(x, dict) else x for name, x in params.items() if "_lora_" not in name}
    return _add(merged, params, config.alpha / max(config.rank, 1))


def unmerge(merged: dict, adapters: dict, config: LoraConfig) -> dict:
    """The inverse of `merge`: matrices and adapters. adapters: a nested dict that contains the adapters."""
    out = {
        name: unmerge(x, adapters[name], config) if isinstance(x, dict) and isinstance(adapters.get(name), dict) else x
        for name, x in merged.items()
    }
    return _add(out, adapters, -config.alpha / max(config.rank, 1)) | {name: x for name, x in adapters.items() if "_lora_" in name}


def _add(matrices: dict, adapters: dict, scale: float) -> dict:
    for name, down in adapters.items():
        if found := _ADAPTER.match(name):
            stem, inputs = found.groups()
            up_name = next(other for other in adapters if other.startswith(f"{stem}_lora_L"))
            outputs = up_name.rsplit("_", 1)[1][1:]
            matrix = matrices[f"{stem}_{inputs}{outputs}"]
            product = jnp.einsum(f"...{inputs}L,...L{outputs}->...{inputs}{outputs}", down, adapters[up_name])
            matrices = matrices | {f"{stem}_{inputs}{outputs}": matrix + scale * product}
    return matrices

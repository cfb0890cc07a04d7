"""The name tables' language: which tensor of a model folder holds a parameter, and how its axes are laid out there.

A table maps our name to a Source: `"attention.query_DNH": Source("model.layers.{n}.self_attn.q_proj.weight", "NH D")` says that the tensor
has two axes, heads times head size and model width. The letters are those of the parameters' names (model/decoder.py).
"""

import math
import re
from typing import NamedTuple

import numpy as np

from iam_jax.config import ModelConfig

PIECE_BYTES = 64 * 2**20  # bytes read at a time: a tensor that is cast or transposed never exists twice

_NAME = re.compile(r"_([A-Z]+)$")


class Source(NamedTuple):
    tensor: str  # the tensor's name; {n} is the layer's number
    axes: str  # the tensor's axes, first to last; each is written as the letters of the parameter's axes that it holds
    piece: int = 0  # the tensor's last axis holds `pieces` parameters side by side; this is the number of this parameter
    pieces: int = 1


def axis_sizes(model: ModelConfig, vocabulary: int) -> dict[str, int]:
    """The size of each axis, by letter."""
    N, H = model.heads, model.head_size
    return {"V": vocabulary, "D": model.width, "P": model.max_positions, "N": N, "K": model.kv_heads, "H": H, "F": model.mlp_width}


def param_axes(name: str, source: Source) -> str:
    """The parameter's axes, first to last, without the repeats: the letters in its name, or the tensor's axes."""
    match = _NAME.search(name)
    return match[1] if match else source.axes.replace(" ", "")


def param_shape(name: str, source: Source, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[letter] for letter in param_axes(name, source))


def tensor_shape(source: Source, sizes: dict[str, int]) -> tuple[int, ...]:
    shape = [math.prod(sizes[letter] for letter in group) for group in source.axes.split()]
    return (*shape[:-1], shape[-1] * source.pieces)


def read_part(view, source: Source, axes: str, sizes: dict[str, int], index: tuple[slice, ...], dtype) -> np.ndarray:
    """The part `index` of a parameter, in the parameter's axes. view: the tensor, as safetensors' `get_slice` returns it. Only the bytes
    of that part are read, a piece at a time."""
    groups = source.axes.split()
    bounds = {letter: s.indices(sizes[letter])[:2] for letter, s in zip(axes, index, strict=True)}
    part = np.empty([stop - start for start, stop in (bounds[letter] for letter in axes)], dtype)
    lead = groups[0][0]
    start, stop = bounds[lead]
    row_bytes = 4 * part.size // max(stop - start, 1)
    step = max(PIECE_BYTES // max(row_bytes, 1), 1)
    for at in range(start, stop, step):
        these = bounds | {lead: (at, min(at + step, stop))}
        place = [slice(None)] * part.ndim
        place[axes.index(lead)] = slice(at - start, these[lead][1] - start)
        part[tuple(place)] = _read(view, groups, source, axes, sizes, these)
    return part


def _read(view, groups: list[str], source: Source, axes: str, sizes: dict[str, int], bounds: dict[str, tuple[int, int]]) -> np.ndarray:
    slices, shape, cuts = [], [], []
    for g, group in enumerate(groups):
        inner = math.prod(sizes[letter] for letter in group[1:])
        offset = source.piece * inner * sizes[group[0]] if g == len(groups) - 1 else 0
        start, stop = bounds[group[0]]
        slices.append(slice(offset + start * inner, offset + stop * inner))
        shape += [stop - start, *(sizes[letter] for letter in group[1:])]
        cuts += [slice(None), *(slice(*bounds[letter]) for letter in group[1:])]
    x = view[tuple(slices)].reshape(shape)[tuple(cuts)]
    order = "".join(groups)
    return x.transpose([order.index(letter) for letter in axes])


def to_tensor(x: np.ndarray, source: Source, axes: str) -> np.ndarray:
    """The tensor (or its piece) that holds the parameter x, which has no repeats."""
    order = source.axes.replace(" ", "")
    x = x.transpose([axes.index(letter) for letter in order])
    shape, at = [], 0
    for group in source.axes.split():
        shape.append(math.prod(x.shape[at : at + len(group)]))
        at += len(group)
    return np.ascontiguousarray(x.reshape(shape))

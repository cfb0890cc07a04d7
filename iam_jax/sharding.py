"""The device mesh, and one table from the axes in parameter names to mesh axes."""

import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from iam_jax.config import MeshConfig
from iam_jax.errors import InputError

# D model: sharded by fsdp. N heads, F feed-forward, V vocabulary, I items: by tensor. K key-value heads may be too few.
AXES = {"D": "fsdp", "N": "tensor", "F": "tensor", "V": "tensor", "I": "tensor"}
BATCH_AXES, HEADS_AXIS = ("data", "fsdp"), AXES["N"]
BATCH = PartitionSpec(BATCH_AXES)

_NAME = re.compile(r"_([A-Z]+)$")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """devices: None for those that are here."""
    sizes = mesh_sizes(config, jax.device_count() if devices is None else len(devices))
    return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """data, fsdp and tensor, with -1 replaced by what remains. Raises InputError where the product is not the number of devices."""
    given = config.data, config.fsdp, config.tensor
    rest = math.prod(size for size in given if size > 0)
    sizes = tuple(size if size > 0 else devices // rest for size in given)
    if math.prod(sizes) != devices:
        product = f"data x fsdp x tensor = {' x '.join(map(str, sizes))}"
        raise InputError(f"config.mesh: {product}, but there are {devices} devices")
    return sizes


def axes_of(path: tuple) -> str:
    """The axis letters at the end of a parameter's name, without the leading R of a stack: query_DNH: "DNH"; scale: ""."""
    match = _NAME.search(jax.tree_util.keystr(path[-1:], simple=True))
    return match[1] if match else ""


def param_sharding(mesh: Mesh, tree):
    """A NamedSharding for every leaf: by the letters in the name of the parameter it belongs to (optimizer states share their
    parameter's name), replicated where there are none or where the size does not divide."""

    def leaf(path, x):
        axes = axes_of(path)
        if not axes or x.ndim < len(axes):
            return NamedSharding(mesh, PartitionSpec())
        names: list[str | None] = [None] * (x.ndim - len(axes))  # stacked repeats
        for letter, size in zip(axes, x.shape[x.ndim - len(axes) :], strict=True):
            name = AXES.get(letter)
            taken = name in names or name is None or size % mesh.shape[name]
            names.append(None if taken else name)
        return NamedSharding(mesh, PartitionSpec(*names))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def batch_shards(mesh) -> int:
    """How many parts the rows of a batch are split into."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)


def shards_here() -> int:
    """Inside jit: `batch_shards` of the current mesh, 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or not set(BATCH_AXES) <= set(mesh.axis_names) else batch_shards(mesh)


def split_rows(tree, axis: int):
    """Inside jit: rows along `axis` over the data and fsdp axes of the current mesh. A reshape of sharded rows into parts would leave
    the parts sharded, and a loop over them then computes every part on every device."""
    shards, spec = shards_here(), PartitionSpec(*[None] * axis, BATCH_AXES)
    if shards == 1:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec) if x.shape[axis] % shards == 0 else x, tree)


def spread_rows(mesh: Mesh, x: jax.Array) -> jax.Array:
    """Inside jit: rows [I, …] over all devices of the mesh, rows of zeros behind them where they do not divide."""
    if mesh.size == 1:
        return x
    x = jnp.pad(x, ((0, -len(x) % mesh.size), *[(0, 0)] * (x.ndim - 1)))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


def shard_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Rows over the data and fsdp axes; replicated where they do not divide. On a mesh of several processes each gives the same batch
    and keeps its own devices' part."""
    parts = batch_shards(mesh)

    def place(x: np.ndarray) -> jax.Array:
        sharding = NamedSharding(mesh, BATCH if x.shape[0] % parts == 0 else PartitionSpec())
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)  # device_put would compare the processes' batches each time

    return jax.tree.map(place, batch)

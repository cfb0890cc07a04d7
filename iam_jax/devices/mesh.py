"""The device mesh, the table from axis letters in parameter names to mesh axes, and sharding of parameters, batches and activations."""

import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from iam_jax.config import MeshConfig
from iam_jax.errors import InputError

# fsdp shards D model. tensor shards N heads, K key-value heads (if there are enough), F feed-forward, V vocabulary and I items.
AXES = {"D": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor", "I": "tensor"}
BATCH_AXES = ("data", "fsdp")  # kernels/range_attention.py uses the same names
BATCH = PartitionSpec(BATCH_AXES)

_NAME = re.compile(r"_([A-Z]+)$")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh with axes data, fsdp and tensor. devices defaults to all devices of the job. Raises InputError as `mesh_sizes`."""
    sizes = mesh_sizes(config, jax.device_count() if devices is None else len(devices))
    return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Returns the sizes of the axes data, fsdp and tensor. A size of -1 becomes the number of devices divided by the other sizes.

    Raises InputError if the product of the sizes is not the number of devices.
    """
    given = config.data, config.fsdp, config.tensor
    fixed = math.prod(size for size in given if size > 0)
    data, fsdp, tensor = sizes = tuple(size if size > 0 else devices // fixed for size in given)
    if math.prod(sizes) != devices:
        product = f"data x fsdp x tensor = {' x '.join(map(str, sizes))}"
        raise InputError(f"config.mesh: {product}, but there are {devices} devices")
    return data, fsdp, tensor


def axes_of(path: tuple) -> str:
    """Returns the axis letters at the end of a parameter's name, for instance "DNH" for query_DNH and "" for scale.

    A stack of layers has a leading axis R, which is not in the name.
    """
    match = _NAME.search(jax.tree_util.keystr(path[-1:], simple=True))
    return match[1] if match else ""


def param_sharding(mesh: Mesh | AbstractMesh, tree):
    """Returns a NamedSharding for every leaf of a tree of parameters or optimizer states, which have the names of their parameters.

    The letters in the name select the mesh axes (AXES). An axis is replicated if it has no letter in AXES, if the mesh axis is already
    used, or if the size is not divisible by that of the mesh axis.
    """

    def leaf(path, x):
        axes = axes_of(path)
        if not axes or x.ndim < len(axes):
            return NamedSharding(mesh, PartitionSpec())
        names: list[str | None] = [None] * (x.ndim - len(axes))  # axis of stacked layers
        for letter, size in zip(axes, x.shape[x.ndim - len(axes) :], strict=True):
            name = AXES.get(letter)
            replicated = name in names or name is None or size % mesh.shape[name]
            names.append(None if replicated else name)
        return NamedSharding(mesh, PartitionSpec(*names))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def batch_shards(mesh) -> int:
    """The number of shards of a batch's rows on this mesh."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)


def current_batch_shards() -> int:
    """For use inside jit: `batch_shards` of the current mesh, or 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or not set(BATCH_AXES) <= set(mesh.axis_names) else batch_shards(mesh)


def current_platform() -> str:
    """For use inside jit: the platform of the current mesh's devices, which need not be here; without a mesh, JAX's default."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


def split_rows(tree, axis: int):
    """For use inside jit: shards the rows along `axis` over the data and fsdp axes of the current mesh, if they are divisible.

    Without this constraint, reshaping sharded rows into parts leaves the axis of parts sharded, and a loop over the parts then computes
    every part on every device.
    """
    shards, spec = current_batch_shards(), PartitionSpec(*[None] * axis, BATCH_AXES)
    if shards == 1:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec) if x.shape[axis] % shards == 0 else x, tree)


def constrain_activations(x_BTD: jax.Array) -> jax.Array:
    """For use inside jit: shards the rows over the data and fsdp axes of the current mesh and replicates T and D, if B is divisible.

    Without this constraint, XLA may give activations the sharding of a parameter, and every device then works on all rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not set(BATCH_AXES) <= set(mesh.axis_names) or len(x_BTD) % batch_shards(mesh):
        return x_BTD
    return jax.lax.with_sharding_constraint(x_BTD, BATCH)


def constrain_lookup_table(table_VD: jax.Array) -> jax.Array:
    """For use inside jit: replicates a table along D before its rows are looked up.

    Without this constraint, XLA shards the looked-up rows along D like the table, and every device needs all of them to shard them by rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get(AXES["D"], 1) == 1:
        return table_VD
    name = AXES["V"] if len(table_VD) % mesh.shape[AXES["V"]] == 0 else None
    return jax.lax.with_sharding_constraint(table_VD, PartitionSpec(name, None))


def spread_rows(mesh: Mesh, x: jax.Array) -> jax.Array:
    """For use inside jit: shards rows [I, …] over all devices of the mesh. Rows of zeros are appended until they are divisible."""
    if mesh.size == 1:
        return x
    x = jnp.pad(x, ((0, -len(x) % mesh.size), *[(0, 0)] * (x.ndim - 1)))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


def _row_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Shards rows over the data and fsdp axes, or replicates them if they are not divisible."""
    return NamedSharding(mesh, BATCH if rows % batch_shards(mesh) == 0 else PartitionSpec())


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Returns the indices of a batch's rows that the devices of this process hold, in ascending order.

    With tensor parallelism, several processes may hold the same rows.
    """
    held = _row_sharding(mesh, rows).addressable_devices_indices_map((rows,))
    return np.unique(np.concatenate([np.arange(rows)[index] for index in held.values()]))


def shard_batch(mesh: Mesh, batch: dict, rows: int | None = None) -> dict:
    """Moves a batch of arrays [rows, …] to the devices: rows are sharded over data and fsdp, or replicated if they are not divisible.

    Args:
      mesh: the device mesh.
      batch: arrays by name; a value may be a dict of arrays again.
      rows: the number of rows in the global batch. `batch` then holds only the `local_rows` of this process. If None, every process passes
        all rows, and its devices keep their own. Nested arrays always hold all rows.
    """

    def place(x: np.ndarray, rows: int) -> jax.Array:
        sharding = _row_sharding(mesh, rows)
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, x, (rows, *x.shape[1:]))

    return {
        name: jax.tree.map(lambda x: place(x, len(x)), x) if isinstance(x, dict) else place(x, len(x) if rows is None else rows)
        for name, x in batch.items()
    }


def per_process(mesh: Mesh, values: np.ndarray | np.generic) -> jax.Array:
    """Returns an array [devices, …] in which the row of each device is the `values` of its process."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.make_array_from_callback((mesh.size, *values.shape), sharding, lambda _: np.asarray(values)[None])

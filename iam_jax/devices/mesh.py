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

# D model: sharded by fsdp. N heads, K key-value heads (which may be too few), F feed-forward, V vocabulary, I items: by tensor.
AXES = {"D": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor", "I": "tensor"}
BATCH_AXES = ("data", "fsdp")  # kernels/range_attention.py splits by the same names
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


def at_block_boundary(x_BTD: jax.Array) -> jax.Array:
    """Inside jit: rows over the data and fsdp axes of the current mesh, whole along T and D, where they divide. Left to XLA, activations
    may take over the sharding of a parameter, and every device then works on all rows."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not set(BATCH_AXES) <= set(mesh.axis_names) or len(x_BTD) % batch_shards(mesh):
        return x_BTD
    return jax.lax.with_sharding_constraint(x_BTD, BATCH)


def looked_up(table_VD: jax.Array) -> jax.Array:
    """Inside jit: a table whose rows are looked up, whole along D. Left to XLA, what is looked up would be split along D like the table,
    and to split it by rows every device would need all of it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get(AXES["D"], 1) == 1:
        return table_VD
    name = AXES["V"] if len(table_VD) % mesh.shape[AXES["V"]] == 0 else None
    return jax.lax.with_sharding_constraint(table_VD, PartitionSpec(name, None))


def spread_rows(mesh: Mesh, x: jax.Array) -> jax.Array:
    """Inside jit: rows [I, …] over all devices of the mesh, rows of zeros behind them where they do not divide."""
    if mesh.size == 1:
        return x
    x = jnp.pad(x, ((0, -len(x) % mesh.size), *[(0, 0)] * (x.ndim - 1)))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


def _row_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Rows over the data and fsdp axes; replicated where they do not divide."""
    return NamedSharding(mesh, BATCH if rows % batch_shards(mesh) == 0 else PartitionSpec())


def rows_here(mesh: Mesh, rows: int) -> np.ndarray:
    """Which rows of a batch the devices of this process hold, ascending. Processes that share rows (tensor parallelism) hold the same."""
    held = _row_sharding(mesh, rows).addressable_devices_indices_map((rows,))
    return np.unique(np.concatenate([np.arange(rows)[index] for index in held.values()]))


def shard_batch(mesh: Mesh, batch: dict, rows: int | None = None) -> dict:
    """Rows over the data and fsdp axes; replicated where they do not divide. rows: those of the whole batch, of which this process gives
    its `rows_here`. None: every process gives all rows, and keeps those of its devices; so with what is nested in the batch in any case."""

    def place(x: np.ndarray, rows: int) -> jax.Array:
        sharding = _row_sharding(mesh, rows)
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, x, (rows, *x.shape[1:]))

    return {
        name: jax.tree.map(lambda x: place(x, len(x)), x) if isinstance(x, dict) else place(x, len(x) if rows is None else rows)
        for name, x in batch.items()
    }


def per_process(mesh: Mesh, values: np.ndarray) -> jax.Array:
    """[devices, …]: each device has the values of its process."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.make_array_from_callback((mesh.size, *values.shape), sharding, lambda _: values[None])

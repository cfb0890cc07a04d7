"""Which parameters are trained. A run's state keeps them apart from the frozen ones, which have no gradients and no optimizer state and
are not in checkpoints. A parameter's name is its path in the nested dict: "decoder.blocks.0_1.attention.query_DNH"."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from iam_jax.config import Config
from iam_jax.devices.mesh import param_sharding
from iam_jax.errors import InputError
from iam_jax.model import Params, pretrained

# The embeddings of a pretrained model, and the parameter that holds the row of the boundary token, which they lack.
EMBEDDINGS = {"decoder.embedding_VD": "decoder.boundary_D", "output_VD": "output_boundary_D"}


def name_of(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def select(params: Params, wanted: Callable[[str], bool]) -> Params:
    """The part of a nested dict whose leaves' names are wanted, without empty branches."""
    return unflatten_dict({name: x for name, x in flatten_dict(params, sep=".").items() if wanted(name)}, sep=".")


def join(a: Params, b: Params) -> Params:
    """Two nested dicts without a common leaf as one: the inverse of `select`."""
    return unflatten_dict(flatten_dict(a, sep=".") | flatten_dict(b, sep="."), sep=".")


def frozen_names(config: Config, params: Params) -> set[str]:
    """The names of the parameters that are not trained. Raises InputError if a pattern matches none of the pretrained parameters."""
    if not config.model.pretrained:
        return set()
    given = flatten_dict(params, sep=".").keys() & pretrained.names(config).keys()
    pattern, trained = config.train.frozen, config.train.trained
    frozen = {name for name in given if (config.model.lora.rank if pattern == "auto" else pattern and re.search(pattern, name))}
    exceptions = {name for name in frozen if trained and re.search(trained, name)}
    for field, value, found in (("frozen", pattern, frozen), ("trained", trained, exceptions)):
        if value not in ("", "auto") and not found:
            raise InputError(
                f"config.train.{field} = {value!r} matches none of the pretrained parameters, such as {', '.join(sorted(given)[:3])}"
            )
    frozen -= exceptions
    if not config.objective.token:
        frozen |= given & {"output_VD"}  # nothing reads it
    if config.model.item_width:
        frozen |= {name for name in given if name.startswith("decoder.final_norm.")}  # nor this
    if config.constant_tower:
        frozen |= {EMBEDDINGS["decoder.embedding_VD"]}
    return frozen


def load_frozen(config: Config, shapes: Params) -> Params:
    """The parameters that are not trained, read from the folder of the pretrained model. shapes: as of `abstract`."""
    own = set(EMBEDDINGS.values())
    given = pretrained.load(config, select(shapes, lambda name: name not in own))
    wanted: Params = select(shapes, lambda name: name in own)
    if not wanted:
        return given
    rows: dict = flatten_dict(mean_rows(select(given, lambda name: name in EMBEDDINGS)), sep=".")
    places: dict = flatten_dict(wanted, sep=".")
    leaves = {name: jax.device_put(rows[name].astype(x.dtype), x.sharding) for name, x in places.items()}
    return join(given, unflatten_dict(leaves, sep="."))


def abstract(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, tree, dtype: str | None = None):
    """The shapes, types and shardings of a tree of parameters, or of states with the same names. dtype: replaces the types."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s), tree, param_sharding(mesh, tree))


def mean_rows(embeddings: Params) -> Params:
    """The first values of the boundary token's rows. A pretrained model does not know this token, so each row starts as the mean of its
    embedding. embeddings: those of EMBEDDINGS that the model has."""
    out = {"decoder": {"boundary_D": embeddings["decoder"]["embedding_VD"].mean(0, dtype=jnp.float32)}}
    return out | ({"output_boundary_D": embeddings["output_VD"].mean(0, dtype=jnp.float32)} if "output_VD" in embeddings else {})

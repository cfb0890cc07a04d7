"""Which parameters are trained: a run's state holds them apart from the frozen ones, which have no gradients, no optimizer state and
no place in checkpoints. Names are the paths of the nested dict, with dots: "decoder.blocks.0_1.attention.query_DNH"."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from iam_jax.config import Config
from iam_jax.devices.mesh import param_sharding
from iam_jax.errors import InputError
from iam_jax.model import Params, pretrained

# A pretrained model's embeddings, and where the row of the boundary token is that each lacks.
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
    """The names of the parameters that are not trained. Raises InputError for a pattern that finds nothing."""
    if not config.model.pretrained:
        return set()
    given = flatten_dict(params, sep=".").keys() & pretrained.names(config).keys()
    pattern, trained = config.train.frozen, config.train.trained
    frozen = {name for name in given if (config.model.lora.rank if pattern == "auto" else pattern and re.search(pattern, name))}
    exceptions = {name for name in frozen if trained and re.search(trained, name)}
    for field, value, found in (("frozen", pattern, frozen), ("trained", trained, exceptions)):
        if value not in ("", "auto") and not found:
            raise InputError(
                f"config.train.{field} = {value!r} finds none of the pretrained parameters, such as {', '.join(sorted(given)[:3])}"
            )
    frozen -= exceptions
    if not config.objective.token:
        frozen |= given & {"output_VD"}  # nothing reads it
    return frozen


def abstract(mesh: jax.sharding.Mesh, tree, dtype: str | None = None):
    """Shapes, types (`dtype`, where it is given) and shardings of a tree of parameters or of states named like them."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s), tree, param_sharding(mesh, tree))


def mean_rows(embeddings: Params) -> Params:
    """The boundary token's rows at the start, of the EMBEDDINGS that there are: a pretrained model does not know it, so it begins as the
    mean of its tokens."""
    out = {"decoder": {"boundary_D": embeddings["decoder"]["embedding_VD"].mean(0, dtype=jnp.float32)}}
    return out | ({"output_boundary_D": embeddings["output_VD"].mean(0, dtype=jnp.float32)} if "output_VD" in embeddings else {})

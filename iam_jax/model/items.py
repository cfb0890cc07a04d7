"""The catalogue on the device, and the vectors of its items: rows of the table, computed from the items' text, or their sum.

Axes: I items, T token slots, E item vectors, D model.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from iam_jax.config import Config
from iam_jax.data.catalogue import Catalogue
from iam_jax.model.network import Network
from iam_jax.model.softmax import strided, unstrided


@partial(jax.tree_util.register_dataclass, data_fields=("token_IT", "length_I", "trained_I"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Items:
    """What item vectors are computed from."""

    token_IT: jax.Array  # int32 text tokens, padded
    length_I: jax.Array  # int32, how many there are
    trained_I: jax.Array  # bool: has a training event; the table rows of the others count as zero


def make_items(catalogue: Catalogue, trained_I: np.ndarray) -> Items:
    """trained_I: bool, whether each item has a training event."""
    token, length = catalogue.padded()
    return Items(jnp.asarray(token), jnp.asarray(length), jnp.asarray(trained_I))


def all_text_vectors(model: Network, items: Items, chunk: int = 1024, key: jax.Array | None = None) -> jax.Array:
    """v_IE of every item's text, `chunk` items at a time."""
    return text_vectors_in_chunks(model, items.token_IT, items.length_I, chunk, key)


def text_vectors_in_chunks(model: Network, token_CT: jax.Array, length_C: jax.Array, chunk: int, key: jax.Array | None = None) -> jax.Array:
    """`Network.text_vectors`, about `chunk` items at a time, each computed again for the backward pass."""
    token, length = strided(token_CT, chunk), strided(length_C, chunk, fill=1)
    keys = None if key is None else jax.random.split(key, len(token))
    vectors = jax.lax.map(jax.checkpoint(lambda xs: model.text_vectors(*xs)), (token, length, keys))
    return unstrided(vectors, len(token_CT))


def item_vectors(model: Network, config: Config, items: Items, boundary_ID: jax.Array | None = None) -> jax.Array:
    """v_IE of the whole catalogue as ranking uses them: table, text or their sum. boundary_ID: the items' boundary states after the
    leading intra layers, where they are known."""
    if not config.uses_text:
        return model.table(items.trained_I)
    if boundary_ID is not None and config.leading_vectors:
        text_IE = model.text_head(boundary_ID)
    else:
        text_IE = all_text_vectors(model, items)
    return text_IE if config.objective.vectors == "text" else text_IE + model.table(items.trained_I)

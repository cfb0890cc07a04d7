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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("token_IT", "length_I", "trained_I", "vector_IP", "vector_norm", "tower_XD", "identity_I", "content_I"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Items:
    """What item vectors are computed from."""

    token_IT: jax.Array  # int32 text tokens, padded
    length_I: jax.Array  # int32, how many there are
    trained_I: jax.Array  # bool: has a training event; the table rows of the others count as zero
    vector_IP: jax.Array | None = None  # float32: the given vectors (`data.vectors`), divided by vector_norm
    vector_norm: np.ndarray | None = None  # float32: the root mean square of the norms of the catalogue's given vectors
    tower_XD: jax.Array | None = None  # [I + 2, D]: states of all entries after the leading intra layers, where they are constants
    identity_I: jax.Array | None = None  # bool: has identity in this training step (`left_out`); None: nothing is left out
    content_I: jax.Array | None = None  # bool: has content in this training step, likewise

    @property
    def row_I(self) -> jax.Array:
        """bool: whether the item has a row in the item table."""
        return self.trained_I if self.identity_I is None else self.trained_I & self.identity_I

    def extended(self, vectors: np.ndarray | None, count: int) -> "Items":
        """For histories with `count` further items, which have no training event. vectors: their given vectors, if there are any."""
        trained_I = jnp.concatenate([self.trained_I, jnp.zeros(count, bool)])
        vector_IP = None
        if self.vector_IP is not None:
            assert vectors is not None and self.vector_norm is not None
            vector_IP = jnp.concatenate([self.vector_IP, jnp.asarray(np.asarray(vectors, np.float32) / self.vector_norm)])
        return dataclasses.replace(self, trained_I=trained_I, vector_IP=vector_IP)


def make_items(
    catalogue: Catalogue, trained_I: np.ndarray, vector_IP: np.ndarray | None = None, tower_XD: jax.Array | np.ndarray | None = None
) -> Items:
    """trained_I: bool, whether each item has a training event. vector_IP: the given vectors; None: there are none.
    tower_XD: the states of a constant tower; None: there is none."""
    token, length = catalogue.padded()
    tower = None if tower_XD is None else jnp.asarray(tower_XD)
    vectors = norm = None
    if vector_IP is not None:
        # Encoders' vectors have very different norms. Within one encoder a small norm has a meaning: tf-idf knows few of the words.
        norm = np.asarray(max(np.sqrt(np.einsum("IP,IP->I", vector_IP, vector_IP, dtype=np.float64).mean()), 1e-12), np.float32)
        vectors = jnp.asarray(np.asarray(vector_IP, np.float32) / norm)
    return Items(jnp.asarray(token), jnp.asarray(length), jnp.asarray(trained_I), vectors, norm, tower)


def left_out(items: Items, identity: float, content: float, key: jax.Array) -> Items:
    """The items of one training step. A share `identity` of them, drawn at random, has no row in the item table, as if they had no training
    event, and another share `content` has no content."""
    draw_I = jax.random.uniform(key, items.trained_I.shape)
    return dataclasses.replace(items, identity_I=draw_I >= identity, content_I=draw_I < 1 - content)


def all_text_vectors(model: Network, items: Items, chunk: int = 1024, key: jax.Array | None = None) -> jax.Array:
    """v_IE of every item's content, the text of `chunk` items at a time."""
    if not model.config.reads_text:
        return model.content(None, items.vector_IP)
    if items.tower_XD is not None:
        return model.content(items.tower_XD[: len(items.token_IT)], items.vector_IP)
    return text_vectors_in_chunks(model, items.token_IT, items.length_I, chunk, key, items.vector_IP)


def text_vectors_in_chunks(
    model: Network,
    token_CT: jax.Array,
    length_C: jax.Array,
    chunk: int,
    key: jax.Array | None = None,
    vector_CP: jax.Array | None = None,
) -> jax.Array:
    """`Network.text_vectors`, about `chunk` items at a time, each computed again for the backward pass."""
    token, length = strided(token_CT, chunk), strided(length_C, chunk, fill=1)
    keys = None if key is None else jax.random.split(key, len(token))
    given = None if vector_CP is None else strided(vector_CP, chunk)
    vectors = jax.lax.map(jax.checkpoint(lambda xs: model.text_vectors(*xs)), (token, length, keys, given))
    return unstrided(vectors, len(token_CT))


def item_vectors(model: Network, config: Config, items: Items, boundary_ID: jax.Array | None = None) -> jax.Array:
    """v_IE of the whole catalogue as ranking uses them: table, text or their sum. boundary_ID: the items' boundary states after the
    leading intra layers, where they are known."""
    if not config.uses_text:
        return model.table(items.row_I)
    if boundary_ID is not None and config.leading_vectors:
        text_IE = model.content(boundary_ID, items.vector_IP)
    else:
        text_IE = all_text_vectors(model, items)
    return text_IE if config.objective.vectors == "text" else text_IE + model.table(items.row_I)

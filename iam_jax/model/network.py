"""The network: the decoder and its heads, which turn states into item scores and token logits."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from iam_jax.config import Config
from iam_jax.devices.mesh import constrain_activations, split_rows
from iam_jax.model.decoder import Cache, Decoder, Norm
from iam_jax.model.lora import Keys, dropout, weight

if TYPE_CHECKING:
    from iam_jax.model.items import Items


class Network(nnx.Module):
    """Scores are products of projected history states h_XE and item vectors v_CE, both float32."""

    def __init__(self, config: Config, vocabulary: int, items: int, longest: int | None, vector_size: int, keys: Keys):
        model, D = config.model, config.model.width
        E = model.item_width or D
        self.config = config
        self.decoder = Decoder(model, config.schedule, vocabulary, config.data.row_tokens, longest, keys)
        one_map = model.content_input == "vector"  # content at the input is the normalised content of the item's vector
        self.projects = bool(config.objective.item) and not (model.tie_items or one_map)
        if self.projects:
            # The projections start as the identity, so that an untrained model prefers items whose text is like the last item's. With
            # random projections the text has no effect during the first epochs (configs/demo.py: validation NDCG@10 0.03 instead of
            # 0.19).
            self.state_DE = nnx.Param(jnp.eye(E))
        if config.has_table:
            self.table_IE = weight(keys, (items, E), E)
        if config.objective.item and config.reads_text:
            # A projection of its own: without it a user's first item state would equal its own vector.
            self.text_norm = Norm(model, D)
            # Vectors of the size of a table row. With one map, states are scaled to the norm 1, as given vectors are: the map then changes
            # slower than the table, and over-fits less.
            start = 1.0 if one_map else D**-0.5
            self.text_DE = nnx.Param(jnp.eye(D) * start) if E == D else weight(keys, (D, E), D, 1.0 if one_map else E**-0.5)
        if (config.objective.token or model.pretrained) and not model.tie_tokens:
            self.output_VD = weight(keys, (vocabulary - bool(model.pretrained), D), D)
            if model.pretrained:
                self.output_boundary_D = nnx.Param(jnp.zeros(D))
        if one_map:
            self.input_norm = Norm(model, E)
        if model.item_width and not (one_map and config.reads_text):  # from the text's stream of states to that of the item-level layers
            self.content_norm = Norm(model, D)
            self.content_DE = weight(keys, (D, E), D)
        if vector_size:
            if not one_map:
                self.input_vector_PE = weight(keys, (vector_size, E), vector_size, vector_size**0.5)  # of vectors with the norm 1
            if config.uses_text:
                self.output_vector_PE = weight(keys, (vector_size, E), vector_size)
        if model.item_input == "own":
            self.identity_IE = weight(keys, (items, E), E)
        if model.item_input != "none":
            self.identity_scale = nnx.Param(jnp.full((), E**0.5, jnp.float32))  # rows of the size of a token's embedding

    def states(
        self, batch: dict, key: jax.Array | None = None, leading_XD: jax.Array | None = None, items: "Items | None" = None
    ) -> jax.Array:
        """x_BTD float32 after the final norm, from `token`, `user`, `group`, `position` and optionally `candidate` [B, T].

        Args:
          batch: see above; with `model.item_input` or `data.vectors` also `identity` [B, T], the item at its boundary token, else -1.
          key: for dropout; None: no dropout.
          leading_XD: states after the leading intra layers, computed once per item (`leading_states`); the batch's `slot` [B, T] then holds
            the row of each token (data/item_rows.py).
          items: needed if the batch has `identity`.
        """
        if leading_XD is None and not self.config.item_level and "identity" not in batch:
            return self.decoder.normed(self.decoder(batch, key=key))
        x_BTE = self.inputs(batch, key, leading_XD, items)
        if self.config.item_level:
            x_BTE = dropout(x_BTE, self.config.model.item_shape.dropout, None if key is None else jax.random.fold_in(key, 0))
        return self.from_inputs(x_BTE, batch, key)

    def from_inputs(self, x_BTE: jax.Array, batch: dict, key: jax.Array | None = None) -> jax.Array:
        """`states` from the input of the layers behind the leading intra layers."""
        return self.decoder.normed(self.decoder(batch, key=key, first=self.config.schedule.leading_intra, x_BTD=x_BTE))

    def inputs(self, batch: dict, key: jax.Array | None, leading_XD: jax.Array | None, items: "Items | None") -> jax.Array:
        """x_BTE: the input of the layers behind the leading intra layers: content, and the item's identity and given vector in the state of
        its boundary token. Arguments: as in `states`."""
        config = self.config
        first = config.schedule.leading_intra
        if leading_XD is None and config.item_level and first:
            raise ValueError("item-level layers need the states of whole items")
        x_BTE = self.decoder(batch, key=key, last=first) if leading_XD is None else self.taken(leading_XD, batch["slot"])
        if "identity" not in batch:
            return constrain_activations(self._content_inputs(x_BTE))
        assert items is not None
        there_BT1 = ((batch["identity"] >= 0) & (batch["identity"] < len(items.trained_I)))[..., None]
        item_BT = jnp.where(there_BT1[..., 0], batch["identity"], 0)
        vector_BTP = None if items.vector_IP is None else jnp.where(there_BT1, items.vector_IP[item_BT], 0)
        x_BTE = self._content_inputs(x_BTE, vector_BTP, there_BT1)
        if items.content_I is not None:
            x_BTE = jnp.where(items.content_I[item_BT][..., None] | ~there_BT1, x_BTE, 0)
        if config.model.item_input != "none":
            table_IE = self.table(items.row_I) if config.model.item_input == "table" else _rows(self.identity_IE[...], items.row_I)
            x_BTE = x_BTE + jnp.where(there_BT1, table_IE[item_BT] * self.identity_scale[...], 0).astype(x_BTE.dtype)
        return constrain_activations(x_BTE)

    def _content_inputs(self, x_BTD: jax.Array, vector_BTP: jax.Array | None = None, there_BT1: jax.Array | None = None) -> jax.Array:
        """x_BTE: the content part of `inputs`. x_BTD: states after the leading intra layers. vector_BTP: given vectors, zero outside the
        boundary tokens there_BT1."""
        model, reads_text = self.config.model, self.config.reads_text
        x_BTE = x_BTD
        if model.item_width and not (model.content_input == "vector" and reads_text):
            x_BTE = self.content_norm(x_BTD) @ self.content_DE[...].astype(x_BTD.dtype)
        if model.content_input == "vector":
            content_BTE = self.input_norm(self.content(x_BTD if reads_text else None, vector_BTP)).astype(x_BTD.dtype)
            return content_BTE if reads_text or there_BT1 is None else jnp.where(there_BT1, content_BTE, x_BTE)
        return x_BTE if vector_BTP is None else x_BTE + (vector_BTP @ self.input_vector_PE[...]).astype(x_BTE.dtype)

    @staticmethod
    def taken(leading_XD: jax.Array, slot: jax.Array) -> jax.Array:
        """The states at `slot`, which has any shape. Gradients are summed in float32, since an item may occur hundreds of times."""
        return leading_XD.astype(jnp.float32)[slot].astype(leading_XD.dtype)

    def leading_states(self, rows: dict, chunks: int, key: jax.Array | None = None, recompute: bool = False) -> jax.Array:
        """x_XD: states of all slots of items packed into rows (data/item_rows.py), after the leading intra layers. The rows are computed in
        `chunks` parts, one after another; a part without a token is skipped. recompute: whether the backward pass computes each part again
        instead of storing the activations of all parts."""
        layers = self.config.schedule.leading_intra
        parts = split_rows(jax.tree.map(lambda x: x.reshape(chunks, -1, *x.shape[1:]), rows), axis=1)

        def part(batch, key):
            return self.decoder(batch, key=key, last=layers)

        def unless_empty(xs):
            skipped = jnp.zeros(jax.eval_shape(part, *xs).shape, self.config.model.dtype)
            return jax.lax.cond((xs[0]["user"] > 0).any(), part, lambda *_: skipped, *xs)

        unless_empty = jax.checkpoint(unless_empty) if recompute else unless_empty
        x = jax.lax.map(unless_empty, (parts, None if key is None else jax.random.split(key, chunks)))
        return x.reshape(-1, x.shape[-1])

    def project(self, x_XD: jax.Array) -> jax.Array:
        return x_XD @ self.state_DE[...] if self.projects else x_XD

    def table(self, trained_I: jax.Array) -> jax.Array:
        """v_IE. Rows of items without a training event are zero, and so are those of items added after training."""
        return _rows((self.decoder.embedding_VD if self.config.model.tie_items else self.table_IE)[...], trained_I)

    def text_vectors(
        self, token_CT: jax.Array, length_C: jax.Array, key: jax.Array | None = None, vector_CP: jax.Array | None = None
    ) -> jax.Array:
        """v_CE from the items' content: the boundary state of each item alone, without a prompt, after the leading intra layers or all
        layers, and its given vector.

        token_CT: ids, arbitrary after the boundary token. length_C: number of tokens, including the boundary token. vector_CP: the given
        vectors (`data.vectors`); None: there are none."""
        if not self.config.reads_text:
            return self.content(None, vector_CP)
        t = jnp.broadcast_to(jnp.arange(token_CT.shape[1]), token_CT.shape)
        real_CT = (t < length_C[:, None]).astype(jnp.int32)
        leading = self.config.objective.text_layers == "leading"
        batch = {"token": token_CT, "user": real_CT, "group": real_CT, "position": t}
        x_CTD = self.decoder(batch, key=key, last=self.config.schedule.leading_intra if leading else None)
        return self.content(jnp.take_along_axis(x_CTD, (length_C - 1)[:, None, None], axis=1)[:, 0], vector_CP)

    def content(self, x_CD: jax.Array | None, vector_CP: jax.Array | None) -> jax.Array:
        """v_CE from the items' boundary states, their given vectors, or the sum of both."""
        parts = []
        if x_CD is not None:
            scale = x_CD.shape[-1] ** -0.5 if self.config.model.content_input == "vector" else 1
            parts.append(self.text_norm(x_CD.astype(jnp.float32)) * scale @ self.text_DE[...])
        if vector_CP is not None:
            parts.append(vector_CP @ self.output_vector_PE[...])
        return sum(parts[1:], parts[0])

    def cached_states(self, batch: dict, cache: Cache, slot_BT: jax.Array, ranges: dict | None = None) -> tuple[jax.Array, Cache]:
        """x_BTD float32 after the final norm, with the keys and values of earlier tokens (`Decoder.cached`)."""
        x_BTD, cache = self.decoder.cached(batch, cache, slot_BT, ranges)
        return self.decoder.normed(x_BTD), cache

    def output_embedding(self) -> tuple[jax.Array, ...]:
        """(e_VD,): the token objective's logits are x_XD e_VD^T. For a pretrained model (e_VD, e_1D): the boundary token's row comes last.
        Raises ValueError if the model has no output embedding."""
        model = self.config.model
        if model.tie_tokens:
            embedding, boundary = self.decoder.embedding_VD, self.decoder.boundary_D
        elif self.config.objective.token or model.pretrained:
            embedding, boundary = self.output_VD, self.output_boundary_D if model.pretrained else None
        else:
            raise ValueError("config.model.tie_tokens = False without objective.token: the model has no output embedding")
        return (embedding[...],) if boundary is None else (embedding[...], boundary[...][None])


def _rows(table_IE: jax.Array, trained_I: jax.Array) -> jax.Array:
    """The rows of a table; zero for items without a training event, also for items that were added after training."""
    if more := len(trained_I) - len(table_IE):
        table_IE = jnp.pad(table_IE, ((0, more), (0, 0)))
    return jnp.where(trained_I[:, None], table_IE, 0)

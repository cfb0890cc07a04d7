"""The decoder: one stack of layers. The schedule gives each layer's attention relation.

Axes, here and in parameter names: B batch, T query positions, S key positions, D model, N heads, K key-value heads, H head
size, F feed-forward, V vocabulary, P positions, L rank of an adapter, I items, E item vectors, C candidates, M targets, R repeats
of a stage (always the first axis).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from iam_jax.config import ModelConfig
from iam_jax.devices.mesh import constrain_activations, constrain_lookup_table
from iam_jax.kernels.range_attention import range_attention
from iam_jax.model.attention import Ranges, key_ranges, rotary
from iam_jax.model.lora import Keys, add_adapters, dropout, linear, weight
from iam_jax.relations import RELATIONS
from iam_jax.schedule import Schedule

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu, "relu": jax.nn.relu}

# By a block's name: keys and values of earlier tokens, [R, B, S, K, H] each.
Cache = dict[str, tuple[jax.Array, ...]]


class Norm(nnx.Module):
    """RMS or layer norm over the last axis, computed in float32."""

    def __init__(self, config: ModelConfig, width: int):
        self.epsilon, self.offset, self.center = config.norm_epsilon, config.norm_offset, config.norm == "layer"
        self.scale = nnx.Param(jnp.full(width, 1 - self.offset, jnp.float32))
        self.shift = nnx.Param(jnp.zeros(width)) if self.center else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.center:
            y = y - y.mean(-1, keepdims=True)
        scale = self.scale[...] + self.offset if self.offset else self.scale[...]
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon) * scale
        return (y if self.shift is None else y + self.shift[...]).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, out_scale: float, keys: Keys):
        D, N = config.width, config.heads
        K, H = config.kv_heads or N, config.head_size or D // N
        self.config = config
        self.query_DNH = weight(keys, (D, N, H), D)
        self.key_DKH = weight(keys, (D, K, H), D)
        self.value_DKH = weight(keys, (D, K, H), D)
        self.out_NHD = weight(keys, (N, H, D), N * H, out_scale)
        if config.qkv_bias:
            self.query_NH, self.key_KH, self.value_KH = (nnx.Param(jnp.zeros((heads, H))) for heads in (N, K, K))
        if config.out_bias:
            self.out_D = nnx.Param(jnp.zeros(D))
        if config.qk_norm:
            self.query_norm, self.key_norm = Norm(config, H), Norm(config, H)

    def __call__(self, x_BTD, ranges: Ranges, position_BT, reach: tuple[int, int] | None, include_self: bool, key=None, cache=None):
        """cache: keys and values [B, S, K, H], and the slots [B, T] of these tokens in them. Returns the output, keys and values."""
        config = self.config
        q_BTNH, k_BSKH, v_BSKH = (linear(self, name, x_BTD, key) for name in ("query_DNH", "key_DKH", "value_DKH"))
        if config.qk_norm:
            q_BTNH, k_BSKH = self.query_norm(q_BTNH), self.key_norm(k_BSKH)
        if config.positions == "rotary":
            q_BTNH, k_BSKH = (rotary(y, position_BT, config) for y in (q_BTNH, k_BSKH))
        if cache is not None:
            *before, slot_BT = cache
            b = jnp.arange(len(slot_BT))[:, None]
            k_BSKH, v_BSKH = (old.at[b, slot_BT].set(new) for old, new in zip(before, (k_BSKH, v_BSKH), strict=True))
        o_BTNH = range_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            *ranges.first,
            include_self=include_self,
            second=ranges.second,
            reach=reach,
            implementation=None if config.attention == "auto" else config.attention,
        )
        return linear(self, "out_NHD", o_BTNH, key), (k_BSKH, v_BSKH)


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, out_scale: float, keys: Keys):
        D, gated = config.width, config.mlp == "gated"
        F = config.mlp_width or (3 if gated else 4) * D
        self.config, self.gated = config, gated
        self.up_DF = weight(keys, (D, F), D)
        if gated:
            self.gate_DF = weight(keys, (D, F), D)
        self.down_FD = weight(keys, (F, D), F, out_scale)
        if config.mlp_bias:
            self.up_F, self.down_D = nnx.Param(jnp.zeros(F)), nnx.Param(jnp.zeros(D))
            if gated:
                self.gate_F = nnx.Param(jnp.zeros(F))

    def __call__(self, x_BTD, key=None):
        activation = _ACTIVATIONS[self.config.activation]
        h_BTF = linear(self, "up_DF", x_BTD, key)
        h_BTF = h_BTF * activation(linear(self, "gate_DF", x_BTD, key)) if self.gated else activation(h_BTF)
        return linear(self, "down_FD", h_BTF, key)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). An inserted block adds nothing at first: its output projections start at zero."""

    def __init__(self, config: ModelConfig, layers: int, inserted: bool, keys: Keys):
        self.config = config
        # This scale keeps the size of the residual stream independent of the depth.
        out_scale = 0.0 if inserted else (2 * layers) ** -0.5
        self.attention_norm, self.mlp_norm = Norm(config, config.width), Norm(config, config.width)
        self.attention, self.mlp = Attention(config, out_scale, keys), MLP(config, out_scale, keys)
        if not inserted:
            add_adapters(config.lora, keys, attention=self.attention, mlp=self.mlp)

    def __call__(self, x_BTD, ranges, position_BT, reach, include_self: bool, key: jax.Array | None, cache=None):
        rate = self.config.dropout
        keys = (None, None) if key is None else jax.random.split(key)
        y_BTD, cache = self.attention(self.attention_norm(x_BTD), ranges, position_BT, reach, include_self, key, cache)
        x_BTD = _rounded(x_BTD + dropout(y_BTD, rate, keys[0]))
        return _rounded(x_BTD + dropout(self.mlp(self.mlp_norm(x_BTD), key), rate, keys[1])), cache


class Decoder(nnx.Module):
    """Token ids to states. Each layer of a stage holds its parameters for all repeats, stacked along a leading axis."""

    def __init__(self, config: ModelConfig, schedule: Schedule, vocabulary: int, max_positions: int, longest: int | None, keys: Keys):
        """longest: number of tokens of the longest item or prompt; None: not known."""
        self.config, self.schedule = config, schedule
        D, layers = config.width, len(schedule.relations)
        of_items = config.item_shape
        if config.pretrained:  # its embedding keeps its rows; the boundary token, the highest id, has a parameter of its own
            self.embedding_VD, self.boundary_D = weight(keys, (vocabulary - 1, D), D), nnx.Param(jnp.zeros(D))
        else:
            self.embedding_VD, self.boundary_D = weight(keys, (vocabulary, D), D), None
        self.position_PD = weight(keys, (config.max_positions or max_positions, D), D) if config.positions == "learned" else None
        # A pretrained model keeps its own norm, which nothing reads if the item-level layers have another width.
        self.final_norm = Norm(config, D) if config.pretrained or not config.item_width else None
        self.item_norm = Norm(of_items, config.item_width) if config.item_width else None
        self.longest = longest

        def stacked(stage: int, repeats: int, inserted: bool) -> Block:
            graphs = []
            shape = of_items if schedule.item_level and stage >= (schedule.token_stages or 0) else config

            def state(key: jax.Array) -> nnx.State:
                graph, state = nnx.split(Block(shape, layers, inserted, Keys(key)))
                graphs.append(graph)
                return state

            states = jax.vmap(state)(jax.random.split(keys(), repeats))
            return nnx.merge(graphs[0], states)

        self.blocks = nnx.Dict(
            {
                f"{s}_{i}": stacked(s, stage.repeats, inserted)
                for s, stage in enumerate(schedule.stages)
                for i, inserted in enumerate(stage.inserted)
            }
        )

    def normed(self, x_BTD: jax.Array) -> jax.Array:
        """The states after the last layer, float32, through the final norm."""
        norm = self.item_norm or self.final_norm
        assert norm is not None
        return norm(x_BTD.astype(jnp.float32))

    def __call__(
        self, batch: dict, *, key: jax.Array | None = None, first: int = 0, last: int | None = None, x_BTD: jax.Array | None = None
    ) -> jax.Array:
        """States x_BTD after layers first, …, last - 1 (None: all), before the final norm.

        batch: int32 [B, T]. `token`: ids; `user`: segments 1, 2, …, 0 for padding; `group`: item number in the user, 0 for the prompt;
        `position`: position in the user; `candidate` (optional): 1, 2, … for the candidates after a user's history, 0 for the history.
        Every candidate has the group and the positions that follow the history. key: for dropout; None: no dropout. x_BTD: states before
        layer `first`; None: the embeddings.
        """
        ranges = key_ranges(batch["user"], batch["group"], batch.get("candidate"), self.schedule.relations)
        if x_BTD is None:
            x_BTD = constrain_activations(self._embed(batch["token"], batch["position"], key))
        return self._layers(x_BTD, batch, ranges, first=first, last=last, key=key)[0]

    def cache(self, rows: int, slots: int) -> Cache:
        """An empty cache for `rows` rows of `slots` tokens."""
        config = self.config
        K, H = config.kv_heads or config.heads, config.head_size or config.width // config.heads
        return {
            f"{s}_{i}": (jnp.zeros((stage.repeats, rows, slots, K, H), config.dtype),) * 2
            for s, stage in enumerate(self.schedule.stages)
            for i in range(len(stage.relations))
        }

    def cached(self, batch: dict, cache: Cache, slot_BT: jax.Array, ranges: dict[str, Ranges] | None = None) -> tuple[jax.Array, Cache]:
        """The states as `__call__` computes them, and the cache with the keys and values of this batch in its slots slot_BT. ranges: key
        ranges in slots, by relation, including the self key; None: the batch's own, for a batch that fills the cache's first slots."""
        x_BTD = self._embed(batch["token"], batch["position"], None)
        self_keys = ranges is None
        ranges = key_ranges(batch["user"], batch["group"], relations=self.schedule.relations) if ranges is None else ranges
        return self._layers(x_BTD, batch, ranges, cache=cache, slot_BT=slot_BT, self_keys=self_keys)

    def _layers(self, x_BTD, batch, ranges, *, first=0, last=None, key=None, cache=None, slot_BT=None, self_keys=True) -> tuple:
        config = self.config
        last = len(self.schedule.relations) if last is None else last
        for s, stage in enumerate(self.schedule.stages):
            unit = len(stage.relations)
            names = [f"{s}_{i}" for i in range(unit)]
            split = [nnx.split(self.blocks[name]) for name in names]
            keys = None if key is None else jax.random.split(jax.random.fold_in(key, s + 1), (stage.repeats, unit))
            stacked = [state for _, state in split], keys, None if cache is None else [cache[name] for name in names]

            def layer(i, x_BTD, params, key, cache, split=split, stage=stage):
                relation = RELATIONS[stage.relations[i]]
                by_item = config.inter_positions == "item" and relation.other_items_only
                position = batch["group"] if by_item else batch["position"]
                include_self = self_keys and config.self_key and relation.other_items_only
                reach = None if cache is not None else relation.reach(self.longest)
                block = nnx.merge(split[i][0], params)
                slots = None if cache is None else (*cache, slot_BT)
                x_BTD, new = block(x_BTD, ranges[relation.name], position, reach, include_self, key, slots)
                return constrain_activations(x_BTD), None if cache is None else new

            if config.remat:
                layer = jax.checkpoint(layer, static_argnums=0)

            def repeat(x_BTD, xs, places=range(unit), layer=layer):
                params, keys, caches = xs
                made = []
                for i in places:
                    x_BTD, new = layer(i, x_BTD, params[i], None if keys is None else keys[i], None if caches is None else caches[i])
                    made.append(new)
                return x_BTD, made

            # Layers begin, …, end - 1 of this stage: part of a repeat, whole repeats, part of a repeat.
            begin, end = (min(max(n, 0), unit * stage.repeats) for n in (first, last))
            first, last = first - unit * stage.repeats, last - unit * stage.repeats
            whole = range(math.ceil(begin / unit), max(end // unit, math.ceil(begin / unit)))
            made: Any = []
            if begin % unit:
                r = begin // unit
                x_BTD, _ = repeat(x_BTD, _take(stacked, r), places=range(begin % unit, min(end - r * unit, unit)))
            if config.scan and len(whole) > 1:
                x_BTD, made = jax.lax.scan(repeat, x_BTD, jax.tree.map(lambda x, n=whole: x[n.start : n.stop], stacked))
            else:
                for r in whole:
                    x_BTD, new = repeat(x_BTD, _take(stacked, r))
                    made.append(new)
                made = jax.tree.map(lambda *x: jnp.stack(x), *made) if made else None
            if end % unit and end // unit >= whole.start:
                x_BTD, _ = repeat(x_BTD, _take(stacked, end // unit), places=range(end % unit))
            if cache is not None:
                cache = cache | dict(zip(names, made, strict=True))
        return x_BTD, cache

    def _embed(self, token_BT, position_BT, key: jax.Array | None) -> jax.Array:
        config = self.config
        if self.boundary_D is None:
            embedding_VD = self.embedding_VD[...]
            if config.token_embeddings == "svd_frozen":
                embedding_VD = jax.lax.stop_gradient(embedding_VD)
            x_BTD = constrain_lookup_table(embedding_VD)[token_BT]
        else:
            V = len(self.embedding_VD[...])
            x_BTD = constrain_lookup_table(self.embedding_VD[...])[jnp.minimum(token_BT, V - 1)]
            x_BTD = jnp.where((token_BT == V)[..., None], self.boundary_D[...], x_BTD)
        if config.scale_embedding:
            x_BTD = x_BTD * config.width**0.5
        if self.position_PD is not None:
            x_BTD = x_BTD + self.position_PD[...][position_BT]
        return _rounded(dropout(x_BTD.astype(config.dtype), config.dropout, key))


def _rounded(x: jax.Array) -> jax.Array:
    """x rounded to its type. XLA may skip the rounding inside a fusion ("excess precision"): the states between two layers would then
    depend on the rest of the program, and inserted layers that add nothing would change the logits."""
    info = jnp.finfo(x.dtype)
    return x if x.dtype == jnp.float32 else jax.lax.reduce_precision(x, info.nexp, info.nmant)


def _take(stacked, r: int):
    return jax.tree.map(lambda x: x[r], stacked)

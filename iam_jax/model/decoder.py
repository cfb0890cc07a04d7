"""The decoder: one stack of layers whose attention relation is given by the schedule.

Axes, here and in parameter names: B batch, T query positions, S key positions, D model, N heads, K key-value heads, H head
size, F feed-forward, V vocabulary, P positions, I items, E item vectors, C candidates, M targets, R repeats of a stage (always
in front).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from iam_jax.config import ModelConfig
from iam_jax.kernels.range_attention import range_attention
from iam_jax.model.attention import Ranges, key_ranges, rotary
from iam_jax.schedule import Schedule

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu, "relu": jax.nn.relu}


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, scale: float = 1.0) -> nnx.Param:
    """A float32 matrix whose product keeps the variance of its input, times `scale` ** 2."""
    return nnx.Param(scale * jax.random.truncated_normal(rngs.params(), -2, 2, shape) / (0.87962566 * fan_in**0.5))


class Norm(nnx.Module):
    """RMS or layer norm over the last axis, computed in float32."""

    def __init__(self, config: ModelConfig, width: int):
        self.epsilon, self.center = config.norm_epsilon, config.norm == "layer"
        self.scale = nnx.Param(jnp.ones(width))
        self.shift = nnx.Param(jnp.zeros(width)) if self.center else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.center:
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon) * self.scale[...]
        return (y + self.shift[...] if self.center else y).astype(x.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; off where `key` is None."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, layers: int, rngs: nnx.Rngs):
        D, N = config.width, config.heads
        K, H = config.kv_heads or N, config.head_size or D // N
        self.config = config
        self.query_DNH = weight(rngs, (D, N, H), D)
        self.key_DKH = weight(rngs, (D, K, H), D)
        self.value_DKH = weight(rngs, (D, K, H), D)
        # Scaled so that the residual stream keeps its size whatever the depth.
        self.out_NHD = weight(rngs, (N, H, D), N * H, (2 * layers) ** -0.5)
        if config.bias:
            self.query_NH, self.key_KH = nnx.Param(jnp.zeros((N, H))), nnx.Param(jnp.zeros((K, H)))
            self.value_KH, self.out_D = nnx.Param(jnp.zeros((K, H))), nnx.Param(jnp.zeros(D))
        if config.qk_norm:
            self.query_norm, self.key_norm = Norm(config, H), Norm(config, H)

    def __call__(self, x_BTD, ranges: Ranges, position_BT, reach: tuple[int, int] | None, include_self: bool):
        config, dtype = self.config, x_BTD.dtype
        q_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, self.query_DNH[...].astype(dtype))
        k_BSKH = jnp.einsum("BSD,DKH->BSKH", x_BTD, self.key_DKH[...].astype(dtype))
        v_BSKH = jnp.einsum("BSD,DKH->BSKH", x_BTD, self.value_DKH[...].astype(dtype))
        if config.bias:
            q_BTNH, k_BSKH, v_BSKH = (
                y + b[...].astype(dtype) for y, b in ((q_BTNH, self.query_NH), (k_BSKH, self.key_KH), (v_BSKH, self.value_KH))
            )
        if config.qk_norm:
            q_BTNH, k_BSKH = self.query_norm(q_BTNH), self.key_norm(k_BSKH)
        if config.positions == "rotary":
            q_BTNH, k_BSKH = (rotary(y, position_BT, config.rope_theta) for y in (q_BTNH, k_BSKH))
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
        o_BTD = jnp.einsum("BTNH,NHD->BTD", o_BTNH, self.out_NHD[...].astype(dtype))
        return o_BTD + self.out_D[...].astype(dtype) if config.bias else o_BTD


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, layers: int, rngs: nnx.Rngs):
        D, gated = config.width, config.mlp == "gated"
        F = config.mlp_width or (3 if gated else 4) * D
        self.activation = _ACTIVATIONS[config.activation]
        self.up_DF = weight(rngs, (D, F), D)
        self.gate_DF = weight(rngs, (D, F), D) if gated else None
        self.down_FD = weight(rngs, (F, D), F, (2 * layers) ** -0.5)
        self.up_F = nnx.Param(jnp.zeros(F)) if config.bias else None
        self.gate_F = nnx.Param(jnp.zeros(F)) if config.bias and gated else None
        self.down_D = nnx.Param(jnp.zeros(D)) if config.bias else None

    def __call__(self, x_BTD):
        def linear(x, w, b):
            y = x @ w[...].astype(x.dtype)
            return y if b is None else y + b[...].astype(x.dtype)

        h_BTF = linear(x_BTD, self.up_DF, self.up_F)
        if self.gate_DF is None:
            h_BTF = self.activation(h_BTF)
        else:
            h_BTF = h_BTF * self.activation(linear(x_BTD, self.gate_DF, self.gate_F))
        return linear(h_BTF, self.down_FD, self.down_D)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layers: int, rngs: nnx.Rngs):
        self.rate = config.dropout
        self.attention_norm, self.mlp_norm = Norm(config, config.width), Norm(config, config.width)
        self.attention, self.mlp = Attention(config, layers, rngs), MLP(config, layers, rngs)

    def __call__(self, x_BTD, ranges, position_BT, reach, include_self: bool, key: jax.Array | None):
        keys = (None, None) if key is None else jax.random.split(key)
        y_BTD = self.attention(self.attention_norm(x_BTD), ranges, position_BT, reach, include_self)
        x_BTD = x_BTD + dropout(y_BTD, self.rate, keys[0])
        return x_BTD + dropout(self.mlp(self.mlp_norm(x_BTD)), self.rate, keys[1])


class Decoder(nnx.Module):
    """Token ids to states. Each layer of a stage holds its parameters for all repeats, stacked along a leading axis."""

    def __init__(self, config: ModelConfig, schedule: Schedule, vocabulary: int, max_positions: int, longest: int | None, rngs: nnx.Rngs):
        """longest: tokens of the longest group, item or prompt; None: not known."""
        self.config, self.schedule = config, schedule
        D, layers = config.width, len(schedule.relations)
        self.embedding_VD = weight(rngs, (vocabulary, D), D)
        self.position_PD = weight(rngs, (max_positions, D), D) if config.positions == "learned" else None
        self.final_norm = Norm(config, D)
        self.longest = longest

        def stacked(repeats: int) -> Block:
            graph, _ = nnx.split(nnx.eval_shape(lambda: Block(config, layers, nnx.Rngs(0))))
            keys = jax.random.split(rngs.params(), repeats)
            return nnx.merge(graph, jax.vmap(lambda key: nnx.split(Block(config, layers, nnx.Rngs(params=key)))[1])(keys))

        self.blocks = nnx.Dict(
            {f"{s}_{i}": stacked(stage.repeats) for s, stage in enumerate(schedule.stages) for i in range(len(stage.relations))}
        )

    def __call__(
        self, batch: dict, *, key: jax.Array | None = None, first: int = 0, last: int | None = None, x_BTD: jax.Array | None = None
    ) -> jax.Array:
        """States x_BTD after layers first, …, last - 1 (None: all), before the final norm.

        batch: int32 [B, T]; `token`: ids; `user`: segments 1, 2, …, 0 for padding; `group`: item number in the user, 0 for the prompt;
        `position`: position in the user; optional `candidate`: 1, 2, … for the candidates behind a user's history, each with the group and
        the positions that follow the history; 0 for the history. key: of dropout, None for none. x_BTD: states before layer `first`; None:
        the embeddings.
        """
        config = self.config
        ranges = key_ranges(batch["user"], batch["group"], batch.get("candidate"))
        if x_BTD is None:
            x_BTD = self._embed(batch["token"], batch["position"], key)
        last = len(self.schedule.relations) if last is None else last

        for s, stage in enumerate(self.schedule.stages):
            unit = len(stage.relations)
            split = [nnx.split(self.blocks[f"{s}_{i}"]) for i in range(unit)]
            params = [state for _, state in split]
            keys = None if key is None else jax.random.split(jax.random.fold_in(key, s + 1), (stage.repeats, unit))

            def layer(i, x_BTD, params, key, split=split, stage=stage):
                relation = stage.relations[i]
                by_item = config.inter_positions == "item" and relation == "inter"
                position = batch["group"] if by_item else batch["position"]
                include_self = config.self_key and relation == "inter"
                block = nnx.merge(split[i][0], params)
                return block(x_BTD, ranges[relation], position, self._reach(relation), include_self, key)

            if config.remat:
                layer = jax.checkpoint(layer, static_argnums=0)

            def repeat(x_BTD, xs, places=range(unit), layer=layer):
                params, keys = xs
                for i in places:
                    x_BTD = layer(i, x_BTD, params[i], None if keys is None else keys[i])
                return x_BTD, None

            # The stage's own layers begin, …, end - 1: whole repeats in the middle, parts of a repeat at both ends.
            begin, end = (min(max(n, 0), unit * stage.repeats) for n in (first, last))
            first, last = first - unit * stage.repeats, last - unit * stage.repeats
            whole = range(-(-begin // unit), end // unit)
            places = [(r, range(max(begin - r * unit, 0), min(end - r * unit, unit))) for r in range(begin // unit, -(-end // unit))]
            for r, part in places:
                if config.scan and len(whole) > 1 and r in whole:
                    if r == whole[0]:
                        x_BTD, _ = jax.lax.scan(repeat, x_BTD, jax.tree.map(lambda a, n=whole: a[n[0] : n[-1] + 1], (params, keys)))
                else:
                    x_BTD, _ = repeat(x_BTD, jax.tree.map(lambda a, r=r: a[r], (params, keys)), places=part)
        return x_BTD

    def _embed(self, token_BT, position_BT, key: jax.Array | None) -> jax.Array:
        config = self.config
        x_BTD = self.embedding_VD[...][token_BT]
        if config.scale_embedding:
            x_BTD = x_BTD * config.width**0.5
        if self.position_PD is not None:
            x_BTD = x_BTD + self.position_PD[...][position_BT]
        return dropout(x_BTD.astype(config.dtype), config.dropout, key)

    def _reach(self, relation: str) -> tuple[int, int] | None:
        """How many slots before and behind a token its keys may lie."""
        if self.longest is None or not relation.startswith("intra"):
            return None
        return self.longest - 1, self.longest - 1 if relation == "intra_both" else 0

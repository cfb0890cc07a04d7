"""Tiny configs, histories and batches for the tests of the model, and a second implementation of the model: NumPy loops in float64."""

import dataclasses
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from iam_jax.config import Config, ModelConfig, SyntheticConfig, resolve
from iam_jax.data.batches import Batch, Rows, training_segments
from iam_jax.data.catalogue import Catalogue
from iam_jax.data.prepare import Prepared
from iam_jax.data.sources import synthetic
from iam_jax.data.splits import TEST, TRAIN, VALIDATION, Events, Split
from iam_jax.model import Model
from iam_jax.schedule import parse_schedule
from iam_jax.training.telemetry import is_timing


def optimized_jit(function: Callable) -> Callable:
    """jax.jit with the optimizations that conftest.py disables."""
    emitters = {"xla_cpu_use_fusion_emitters": True} if "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", "") else {}
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 3} | emitters)


def on_devices(count: int) -> dict[str, str]:
    """Environment variables for a program with this many CPU devices."""
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}", "JAX_PLATFORMS": "cpu"}


def make_config(**sections: dict) -> Config:
    """A tiny validated config without dropout, for example make_config(model={"norm": "layer"})."""
    tiny = {
        "data": {"source": "synthetic", "row_tokens": 24, "context_items": 1},
        "model": {"schedule": "(intra inter)*2", "width": 16, "heads": 2, "mlp_width": 24, "dropout": 0.0},
    }
    config = ml_collections.ConfigDict(dataclasses.asdict(Config()))
    for fields in (tiny, sections):
        for section, values in fields.items():
            config[section].update(values)
    return resolve(config)


def metrics_lines(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl, without the fields that differ between two runs of the same command."""
    all_lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not is_timing(name)} for line in all_lines]


def write_shop(folder: Path) -> Path:
    """Tables of a made-up shop as gzipped TSV files, which real data sets beside the checkout are, too."""
    tables = synthetic.from_config(SyntheticConfig(users=200, products=60)).tables()
    folder.mkdir()
    for name, table in (("interactions", tables.interactions), ("items", tables.items)):
        (folder / f"{name}.tsv.gz").write_bytes(gzip.compress(table.write_csv(separator="\t", quote_style="never").encode()))
    return folder


# ---- batches


def pack_row(slots: int, *users: tuple[int, list[int]]) -> Batch:
    """user, group and position [slots] for users given as (tokens of the prompt, tokens of each item), followed by padding."""
    out = {name: np.zeros(slots, np.int32) for name in ("user", "group", "position")}
    at = 0
    for number, (prompt, items) in enumerate(users, start=1):
        first = at
        for group, length in enumerate([prompt, *items]):
            out["user"][at : at + length], out["group"][at : at + length] = number, group
            at += length
        out["position"][first:at] = np.arange(at - first)
    assert at <= slots
    return out


def stack(rows: list[Batch]) -> Batch:
    return jax.tree.map(lambda *parts: np.stack(parts), *rows)


def packed_batch() -> Batch:
    """Two rows of 12 slots: prompts, several users, items of one to three tokens, padding. Every slot has a token id of its
    own, so that a row of the embedding is the input of one slot."""
    batch = stack([pack_row(12, (2, [2, 3]), (0, [1, 2])), pack_row(12, (0, [3, 1, 2]), (1, [2]))])
    return batch | {"token": np.arange(24, dtype=np.int32).reshape(2, 12)}


def tiny_data(
    seed: int = 0, users: int = 9, items: int = 8, vocabulary: int = 13, cold: int = 1, prompt: int = 0, suffix: int = 0
) -> Prepared:
    """Random histories of four to seven events, the last two for validation and test; the last `cold` items are in none of the
    training events. The highest token id is the boundary."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 8, users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    label = np.full(offsets[-1], TRAIN, np.uint8)
    label[offsets[1:] - 2], label[offsets[1:] - 1] = VALIDATION, TEST
    item = rng.integers(items - cold, size=offsets[-1]).astype(np.int32)
    ids = [np.array([f"{kind}{k:03}" for k in range(count)], object) for kind, count in (("u", users), ("i", items))]
    events = Events(*ids, item, offsets, np.arange(offsets[-1]), label)
    texts = [[*rng.integers(vocabulary - 1, size=rng.integers(1, 4)), vocabulary - 1] for _ in range(items)]
    texts += [rng.integers(vocabulary - 1, size=size).tolist() for size in (prompt, suffix)]
    tokens = np.array([token for text in texts for token in text], np.int32)
    catalogue = Catalogue(tokens, np.cumsum([0, *map(len, texts)]), vocabulary, 0, "")
    return Prepared(Split(events, None, "", ()), catalogue)


def tiny_rows(prepared: Prepared, config: Config) -> Rows:
    data = config.data
    segments = training_segments(prepared.events, prepared.catalogue, data.row_tokens, data.context_items, config.objective.token > 0)
    return Rows(prepared.events, prepared.catalogue, segments, data.row_tokens)


# ---- parameters


def random_params(model: Model, seed: int = 0) -> dict:
    """Random parameters, including biases and norm scales, so that each has an effect. Nothing is compiled."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        ones = jax.tree_util.keystr(path[-1:], simple=True) == "scale"
        return jnp.asarray(ones + 0.25 * rng.standard_normal(x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, model.shapes())


def layer_params(decoder: dict, schedule: str) -> list[dict]:
    """The parameters of each layer, first to last."""
    return [
        jax.tree.map(lambda x, r=r: x[r], decoder["blocks"][f"{s}_{i}"])
        for s, stage in enumerate(parse_schedule(schedule).stages)
        for r in range(stage.repeats)
        for i in range(len(stage.relations))
    ]


# ---- a second implementation of attention


class Attention(NamedTuple):
    """o [B, T, N, H], lse [B, T, N], dq [B, T, N, H], dk and dv [B, S, K, H], float64."""

    o: np.ndarray
    lse: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def range_mask(keys: int, ranges: list[tuple[np.ndarray, np.ndarray]], include_self: bool = False) -> np.ndarray:
    """[B, T, S] bool: which keys are in one of the ranges (start, stop), [B, T] each."""
    s = np.arange(keys)
    allowed = sum((s >= np.asarray(start)[..., None]) & (s < np.asarray(stop)[..., None]) for start, stop in ranges) > 0
    return allowed | np.eye(allowed.shape[1], keys, dtype=bool) if include_self else allowed


def dense_attention(q, k, v, do, allowed_BTS, lse=None, delta=None) -> Attention:
    """Values, and gradients for the cotangent `do`. lse and delta = sum_H do o [B, T, N]: if given, those of a merge with further keys."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    (B, S, K, H), G = k.shape, q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, G, axis=2) for x in (k, v))
    logits = np.where(allowed_BTS[:, :, None], np.einsum("BTNH,BSNH->BTNS", q, k) / H**0.5, -np.inf)
    top = np.maximum(logits.max(-1, keepdims=True, initial=-np.inf), -1e300)
    with np.errstate(divide="ignore"):
        own_lse = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    p = np.exp(logits - np.maximum(own_lse, -1e300)[..., None])
    o = np.einsum("BTNS,BSNH->BTNH", p, v)
    if lse is not None:
        p = np.exp(logits - np.maximum(np.asarray(lse, np.float64), -1e300)[..., None])
    delta = (do * o).sum(-1) if delta is None else np.asarray(delta, np.float64)
    ds = p * (np.einsum("BTNH,BSNH->BTNS", do, v) - delta[..., None]) / H**0.5
    dk, dv = (np.einsum("BTNS,BTNH->BSNH", x, y).reshape(B, S, K, G, H).sum(3) for x, y in ((ds, q), (p, do)))
    return Attention(o, own_lse, np.einsum("BTNS,BSNH->BTNH", ds, k), dk, dv)


def attention_arrays(shape: tuple[int, ...], seed: int, dtype=np.float32) -> list[jax.Array]:
    """q, k, v and do of a shape (B, T, S, N, K, H)."""
    B, T, S, N, K, H = shape
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(size), dtype) for size in ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))]


# ---- a second implementation of the model


# Which key s token t may see, from the definition of the relations. Arguments: whether the user is the same, groups of t and s, t, s.
MEANINGS: dict[str, Callable] = {
    "full": lambda same, group_t, group_s, t, s: same & (s <= t),
    "intra": lambda same, group_t, group_s, t, s: same & (group_t == group_s) & (s <= t),
    "inter": lambda same, group_t, group_s, t, s: same & (group_t != group_s) & (s < t),
    "intra_both": lambda same, group_t, group_s, t, s: same & (group_t == group_s),
}
SELF_KEY = {"inter"}  # the relations that `model.self_key` and `model.inter_positions` apply to


def allowed_keys(relation: str, user_T: np.ndarray, group_T: np.ndarray) -> np.ndarray:
    """[T, S] bool."""
    t, s = np.indices((len(user_T), len(user_T)))
    same_user = (user_T[t] == user_T[s]) & (user_T[t] > 0)
    return MEANINGS[relation](same_user, group_T[t], group_T[s], t, s)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _norm(model: ModelConfig, p: dict, x: np.ndarray) -> np.ndarray:
    scale = p["scale"] + model.norm_offset
    if model.norm == "layer":
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + model.norm_epsilon) * scale + p["shift"]
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + model.norm_epsilon) * scale


def _frequencies(model: ModelConfig, half: int) -> np.ndarray:
    frequency = model.rope_theta ** (-np.arange(half) / half)
    if model.rope_scaling == "linear":
        frequency = frequency / model.rope_factor
    if model.rope_scaling == "llama3":
        for i, f in enumerate(frequency):
            turns = model.rope_original * f / (2 * np.pi)
            if turns < model.rope_low:
                frequency[i] = f / model.rope_factor
            elif turns < model.rope_high:
                share = (turns - model.rope_low) / (model.rope_high - model.rope_low)
                frequency[i] = (1 - share) * f / model.rope_factor + share * f
    return frequency


def _rotate(x_TNH: np.ndarray, position_T: np.ndarray, model: ModelConfig) -> np.ndarray:
    half = x_TNH.shape[-1] // 2
    turn = np.exp(1j * position_T[:, None, None] * _frequencies(model, half))
    z = (x_TNH[..., :half] + 1j * x_TNH[..., half:]) * turn
    return np.concatenate([z.real, z.imag], axis=-1)


def _attention(model: ModelConfig, p: dict, x_TD: np.ndarray, allowed_TS: np.ndarray, position_T: np.ndarray) -> np.ndarray:
    q, k, v = (np.einsum("TD,DNH->TNH", x_TD, p[name]) for name in ("query_DNH", "key_DKH", "value_DKH"))
    if model.qkv_bias:
        q, k, v = q + p["query_NH"], k + p["key_KH"], v + p["value_KH"]
    if model.qk_norm:
        q, k = _norm(model, p["query_norm"], q), _norm(model, p["key_norm"], k)
    if model.positions == "rotary":
        q, k = (_rotate(y, position_T, model) for y in (q, k))
    o = np.zeros_like(q)
    for t, keys in enumerate(allowed_TS):
        for n in range(q.shape[1] if keys.any() else 0):
            kv = n * k.shape[1] // q.shape[1]
            o[t, n] = softmax(k[keys, kv] @ q[t, n] / q.shape[-1] ** 0.5) @ v[keys, kv]
    return np.einsum("TNH,NHD->TD", o, p["out_NHD"]) + (p["out_D"] if model.out_bias else 0)


def _mlp(model: ModelConfig, p: dict, x_TD: np.ndarray) -> np.ndarray:
    activation = {"relu": lambda x: np.maximum(x, 0), "silu": lambda x: x / (1 + np.exp(-x)), "gelu": jax.nn.gelu}[model.activation]
    bias = (lambda name: p[name]) if model.mlp_bias else (lambda name: 0)
    h = x_TD @ p["up_DF"] + bias("up_F")
    h = h * activation(x_TD @ p["gate_DF"] + bias("gate_F")) if model.mlp == "gated" else activation(h)
    return h @ p["down_FD"] + bias("down_D")


def reference_states(model: ModelConfig, decoder: dict, batch: Batch, layers: int | None = None) -> np.ndarray:
    """The decoder's states x_BTD after this many layers, float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), decoder)
    relations = parse_schedule(model.schedule).relations
    stack_of_layers = list(zip(relations, layer_params(p, model.schedule), strict=True))
    rows = []
    for token, user, group, position in zip(*(batch[name] for name in ("token", "user", "group", "position")), strict=True):
        x = p["embedding_VD"][token] * (model.width**0.5 if model.scale_embedding else 1)
        if model.positions == "learned":
            x = x + p["position_PD"][position]
        for relation, layer in stack_of_layers[:layers]:
            allowed = allowed_keys(relation, user, group)
            if relation in SELF_KEY and model.self_key:
                allowed = allowed | np.eye(len(user), dtype=bool)
            at = group if relation in SELF_KEY and model.inter_positions == "item" else position
            x = x + _attention(model, layer["attention"], _norm(model, layer["attention_norm"], x), allowed, at)
            x = x + _mlp(model, layer["mlp"], _norm(model, layer["mlp_norm"], x))
        rows.append(x)
    return np.stack(rows)

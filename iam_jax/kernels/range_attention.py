"""Attention where each query sees one contiguous range of keys, or two: the operation behind every relation.

    o_t = sum_s p_ts v_s,  p_ts = softmax over the keys of t of q_t k_s / sqrt(H)

The keys of query t are [start, stop), those of a disjoint second range, and with `include_self` t itself, counted once. Each part
is computed by a backend; the parts are merged exactly by their log-sum-exp, forward and backward, inside one custom_vjp.

`implementation` chooses the backend:

    reference  the mask, dense, through `jax.nn.dot_product_attention` (cuDNN where `cudnn_refuses` has no objection): any platform
    local      plain XLA over blocks of neighbours, for ranges of bounded length (`reach`), cost linear in T: any platform
    blocked    plain XLA that visits the needed pairs of blocks one after another, memory linear in T: for CPUs
    tpu        Pallas kernels for TPU that visit the needed blocks only (kernels/tpu.py); elsewhere interpreted, for tests
    gpu        Pallas kernels for NVIDIA GPUs that visit the needed blocks only (kernels/gpu.py); elsewhere interpreted, for tests
    None       on TPU and GPU the platform's kernel; on a CPU `local` if `reach` is at most 128 keys and half a row, else `blocked` for rows
               of 512 tokens or more, else the reference; where a kernel refuses, `local` or the reference

A backend that is asked for by name and cannot do the work raises ValueError; where None falls back from the platform's kernel, that is
said once, with the reason. All compute logits and softmax in float32, and multiply float32 inputs in float32 (the default on TPU and GPU is
less).

Axes: B batch, T query positions, S key positions, N heads, K key-value heads, G query heads of a key-value head, H head size.
"""

import functools
import math
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from iam_jax.kernels import blocked, gpu, local, tpu

# Mesh axes over which a kernel is split, where the current mesh has them: the rows of a batch, and the heads.
BATCH_AXES, HEADS_AXIS = ("data", "fsdp"), "tensor"

IMPLEMENTATIONS = ("reference", "local", "blocked", "tpu", "gpu")
LOCAL_KEYS = 128  # the longest reach for which None may mean `local`
BLOCKED_KEYS = 512  # the shortest row for which None may mean `blocked`: it goes through rows one by one

_BACKENDS: dict[str, ModuleType] = {"local": local, "blocked": blocked, "tpu": tpu, "gpu": gpu}

Range = tuple[jax.Array, jax.Array]
Reach = tuple[int, int]


def range_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    key_start_BT: jax.Array,
    key_stop_BT: jax.Array,
    *,
    include_self: bool = False,
    second: Range | None = None,
    reach: Reach | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """o_BTNH in q's type, of float32, bfloat16 or float16 inputs; N is a multiple of K.

    key_start_BT, key_stop_BT: int32. second: start and stop of a second range, disjoint from the first. reach: (keys before t, keys
    after t) that no range of t goes beyond, a promise that makes `local` possible; where it is broken, `local` gives NaN.

    A query without a key gets exactly zero, and gives exactly zero gradients. (`jax.nn.dot_product_attention` alone would give it the
    mean of *all* values: other users' and later ones too.)
    """
    ranges = ((key_start_BT, key_stop_BT),) if second is None else ((key_start_BT, key_stop_BT), tuple(second))
    _check(q_BTNH, k_BSKH, v_BSKH, ranges)
    name = choose(q_BTNH, k_BSKH, reach, implementation)
    with jax.named_scope("range_attention"):  # flops.py and profiles know it by this name
        if name == "reference":
            return reference(q_BTNH, k_BSKH, v_BSKH, ranges, include_self)
        static = _Static(name, include_self, reach)
        return _merged(static, q_BTNH, k_BSKH, v_BSKH, ranges)


def choose(q: jax.Array, k: jax.Array, reach: Reach | None, implementation: str | None = None, platform: str | None = None) -> str:
    """The backend's name; see the module's docstring. Raises ValueError where the one asked for refuses."""
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation = {implementation!r}: must be one of {', '.join(IMPLEMENTATIONS)}")
        if implementation != "reference" and (reason := _BACKENDS[implementation].refuses(q, k, reach)):
            raise ValueError(f"range_attention: implementation {implementation!r} {reason}")
        return implementation
    bounded = not local.refuses(q, k, reach) and sum(reach) < LOCAL_KEYS and 2 * (1 + sum(reach)) <= q.shape[1]
    otherwise = "local" if bounded else "reference"
    platform = platform or jax.default_backend()
    if platform == "cpu" and not bounded and max(q.shape[1], k.shape[1]) >= BLOCKED_KEYS:
        return "blocked"
    if platform not in _BACKENDS:
        return otherwise
    if reason := _BACKENDS[platform].refuses(q, k, reach):
        cost = "" if bounded else ", with memory in the square of the length"
        _say_once(f"range_attention: {otherwise!r} is used{cost}: {platform!r} {reason}")
        return otherwise
    return platform


@functools.cache
def _say_once(message: str) -> None:
    logging.warning(message)


def _check(q, k, v, ranges) -> None:
    B, T, N, H = q.shape
    if k.shape != v.shape or k.ndim != 4 or (k.shape[0], k.shape[3]) != (B, H) or N % k.shape[2]:
        raise ValueError(f"range_attention: q {q.shape} does not fit k {k.shape} and v {v.shape}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"range_attention: q, k and v are of different types: {q.dtype}, {k.dtype}, {v.dtype}")
    for bound in (bound for pair in ranges for bound in pair):
        if bound.shape != (B, T):
            raise ValueError(f"range_attention: ranges of shape {bound.shape} for queries of shape {(B, T)}")


# ---- the reference


def allowed(T: int, S: int, ranges: tuple[Range, ...], include_self: bool) -> jax.Array:
    """[B, T, S] bool: the mask that the ranges stand for."""
    s = jnp.arange(S)
    allowed_BTS = functools.reduce(jnp.logical_or, [(s >= start[..., None]) & (s < stop[..., None]) for start, stop in ranges])
    return allowed_BTS | (jnp.arange(T)[:, None] == s) if include_self else allowed_BTS


def reference(q, k, v, ranges: tuple[Range, ...], include_self: bool) -> jax.Array:
    allowed_BTS = allowed(q.shape[1], k.shape[1], ranges, include_self)
    cudnn = jax.default_backend() == "gpu" and not cudnn_refuses(q, k) and not gpu.refuses(q, k, None)  # Ampere, as our kernels
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
        mask = allowed_BTS[:, None]
        o = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn" if cudnn else "xla")
    return jnp.where(allowed_BTS.any(-1)[..., None, None], o, 0)


def cudnn_refuses(q: jax.Array, k: jax.Array) -> str:
    """Why cuDNN's attention does not take queries and keys; "" where it does."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"has no {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"has no head size {q.shape[3]}"
    return "needs even lengths" if q.shape[1] % 2 or k.shape[1] % 2 else ""


# ---- the merged parts


class _Static(NamedTuple):
    name: str
    include_self: bool
    reach: Reach | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _merged(static: _Static, q, k, v, ranges):
    return _merged_forward(static, q, k, v, ranges)[0]


def _merged_forward(static: _Static, q, k, v, ranges):
    alone = len(ranges) == 1 and not static.include_self
    dtype = q.dtype if alone else jnp.float32
    forward = functools.partial(_BACKENDS[static.name].forward, reach=static.reach, dtype=dtype)
    parts = [_on_shards(static.name, forward, q, k, v, *bounds, outputs="qn") for bounds in ranges]
    if static.include_self:
        _, v_self, logit_BTN = _self(q, k, v, ranges)
        parts.append((v_self, logit_BTN))
    if alone:
        o, lse_BTN = parts[0]
    else:
        lse_PBTN = jnp.stack([lse for _, lse in parts])
        top_BTN = jnp.maximum(lse_PBTN.max(0), -1e30)  # finite in empty rows
        lse_BTN = top_BTN + jnp.log(jnp.exp(lse_PBTN - top_BTN).sum(0))
        weight_PBTN = jnp.where(lse_BTN > -jnp.inf, jnp.exp(lse_PBTN - lse_BTN), 0)
        o = sum(w[..., None] * o for w, (o, _) in zip(weight_PBTN, parts, strict=True)).astype(q.dtype)
    return o, (q, k, v, ranges, o, lse_BTN)


def _merged_backward(static: _Static, residuals, do):
    q, k, v, ranges, o, lse_BTN = residuals
    delta_BTN = jnp.einsum("BTNH,BTNH->BTN", do, o, preferred_element_type=jnp.float32, precision="highest")
    backward = functools.partial(_BACKENDS[static.name].backward, reach=static.reach)
    grads = [_on_shards(static.name, backward, q, k, v, *bounds, do, lse_BTN, delta_BTN, outputs="qkk") for bounds in ranges]
    if static.include_self:
        k_self, v_self, logit_BTN = _self(q, k, v, ranges)
        do, q32 = do.astype(jnp.float32), q.astype(jnp.float32)
        p_BTN = jnp.where(lse_BTN > -jnp.inf, jnp.exp(logit_BTN - lse_BTN), 0)
        ds_BTN = p_BTN * ((do * v_self).sum(-1) - delta_BTN) * q.shape[-1] ** -0.5

        def of_keys(x_BTNH):
            B, T, _, H = x_BTNH.shape
            x_BTKH = x_BTNH.reshape(B, T, k.shape[2], -1, H).sum(3)[:, : k.shape[1]]
            return jnp.pad(x_BTKH, ((0, 0), (0, k.shape[1] - x_BTKH.shape[1]), (0, 0), (0, 0)))

        grads.append((ds_BTN[..., None] * k_self, of_keys(ds_BTN[..., None] * q32), of_keys(p_BTN[..., None] * do)))
    dq, dk, dv = (sum(parts).astype(q.dtype) for parts in zip(*grads, strict=True))
    return dq, dk, dv, None


_merged.defvjp(_merged_forward, _merged_backward)


def _self(q, k, v, ranges):
    """Key and value of each query itself, [B, T, N, H] float32, and its logit [B, T, N]: -inf where a range has it already, or where
    there is no such key."""
    T, S, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]

    def own(x_BSKH):
        x_BTKH = jnp.pad(x_BSKH[:, :T], ((0, 0), (0, max(T - S, 0)), (0, 0), (0, 0)))
        return jnp.repeat(x_BTKH, G, axis=2).astype(jnp.float32)

    k_self, v_self = own(k), own(v)
    t = jnp.arange(T)
    new_BT = functools.reduce(jnp.logical_and, [(t < start) | (t >= stop) for start, stop in ranges]) & (t < S)
    logit_BTN = (q.astype(jnp.float32) * k_self).sum(-1) * q.shape[-1] ** -0.5
    return k_self, v_self, jnp.where(new_BT[..., None], logit_BTN, -jnp.inf)


# ---- several devices


def _on_shards(name: str, f, q, k, v, start, stop, *of_queries, outputs: str):
    """f, a backend's part, on each device's rows and heads: XLA cannot split a kernel by itself (`local` it can). `outputs`: a letter
    each, q [B, T, N, H], k [B, S, K, H], n [B, T, N]."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True)) if not mesh.empty else {}
    if name == "local" or math.prod(sizes.values()) == 1 or any(kind == AxisType.Manual for kind in mesh.axis_types):
        return f(q, k, v, start, stop, *of_queries)
    N, K = q.shape[2], k.shape[2]
    rows = tuple(axis for axis in BATCH_AXES if axis in sizes)
    rows = rows if q.shape[0] % math.prod(sizes[axis] for axis in rows) == 0 else None
    heads = HEADS_AXIS if HEADS_AXIS in sizes and N % sizes[HEADS_AXIS] == 0 else None
    more = N // K if heads and K % sizes[heads] else 1  # too few key-value heads: one for every query head
    k, v = (jnp.repeat(x, more, axis=2) if more > 1 else x for x in (k, v))
    specs = {4: P(rows, None, heads, None), 3: P(rows, None, heads), 2: P(rows, None)}
    arrays = (q, k, v, start, stop, *of_queries)
    out_specs = tuple(specs[3 if output == "n" else 4] for output in outputs)
    split = jax.shard_map(f, in_specs=tuple(specs[x.ndim] for x in arrays), out_specs=out_specs, check_vma=False)

    def merge(x, output):
        return x.reshape(*x.shape[:2], K, more, -1).sum(3) if output == "k" and more > 1 else x

    return tuple(merge(x, output) for x, output in zip(split(*arrays), outputs, strict=True))

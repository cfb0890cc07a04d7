"""Attention in which each query sees one or two contiguous ranges of keys. Every relation between tokens is such a range.

    o_t = sum_s p_ts v_s,  p_ts = softmax over the keys s of query t of q_t k_s / sqrt(H)

The keys of query t are those in [start, stop), those in an optional second range that is disjoint from the first, and, with
`include_self`, key t itself (counted once). A backend computes each part. The parts are merged exactly by their log-sum-exp, forward and
backward, inside one custom_vjp.

`implementation` selects the backend:

    reference  dense mask with `jax.nn.dot_product_attention` (cuDNN if it supports the inputs), on any platform
    local      plain XLA over blocks of neighbours, for ranges of bounded length (`reach`); cost linear in T, on any platform
    blocked    plain XLA, one needed pair of blocks after another; memory linear in T, for CPUs
    tpu        Pallas kernels for TPU that visit only the needed blocks (tpu.py); interpreted on other platforms, for tests
    gpu        Pallas kernels for NVIDIA GPUs that visit only the needed blocks (gpu.py); interpreted on other platforms, for tests
    None       on TPU and GPU the kernel of the platform, or `local` or `reference` if the kernel does not support the inputs.
               On a CPU `local` if `reach` covers at most 128 keys and at most half a row, else `blocked` for rows of 512 tokens or more,
               else `reference`.

A backend that is requested by name raises ValueError if it does not support the inputs. If None falls back from the kernel of the
platform, the logger "iam_jax" prints one warning with the reason. All backends compute logits and softmax in float32, and multiply float32
inputs in full float32 (the defaults of TPU and GPU are less precise).

Axes: B batch, T query positions, S key positions, N heads, K key-value heads, G query heads per key-value head, H head size.
"""

import functools
import logging
import math
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from iam_jax.kernels import blocked, gpu, local, tpu

# If the current mesh has these axes, a kernel is split over them: rows of the batch over the first two, heads over the third.
BATCH_AXES, HEADS_AXIS = ("data", "fsdp"), "tensor"

IMPLEMENTATIONS = ("reference", "local", "blocked", "tpu", "gpu")
LOCAL_KEYS = 128  # None selects `local` only up to this many keys in reach
BLOCKED_KEYS = 512  # None selects `blocked` only for rows at least this long, since it processes rows one by one

_BACKENDS: dict[str, ModuleType] = {"local": local, "blocked": blocked, "tpu": tpu, "gpu": gpu}
# Not absl's logger, which other libraries silence. Without any configured handler, Python prints warnings to stderr.
_LOGGER = logging.getLogger("iam_jax")

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
    """Attention over one or two ranges of keys per query; see the module docstring for the definition and the backends.

    A query without keys gets exactly zero, and its gradients are exactly zero. (`jax.nn.dot_product_attention` alone would return the mean
    of *all* values for it, including those of other users and of later positions.)

    Args:
      q_BTNH: queries; float32, bfloat16 or float16. N must be a multiple of K.
      k_BSKH: keys, of the same dtype.
      v_BSKH: values, of the same dtype.
      key_start_BT: int32, first key of each query's range.
      key_stop_BT: int32, one past the last key of the range. A stop at or below the start means an empty range.
      include_self: whether query t also sees key t. A key that is already in a range counts once.
      second: (start, stop) of a second range per query, shaped like the first and disjoint from it.
      reach: (keys before t, keys after t), a bound that no range of query t exceeds. `local` needs it and returns NaN for queries that
        exceed it; other backends may use it to choose block sizes.
      implementation: one of IMPLEMENTATIONS; None selects a backend for the platform.

    Returns:
      o_BTNH in the dtype of q.

    Raises:
      ValueError: if shapes or dtypes do not match, if the implementation is unknown, or if it does not support the inputs.
    """
    first: Range = key_start_BT, key_stop_BT
    ranges: tuple[Range, ...] = (first,) if second is None else (first, (second[0], second[1]))
    _check(q_BTNH, k_BSKH, v_BSKH, ranges)
    name = choose_implementation(q_BTNH, k_BSKH, reach, implementation)
    with jax.named_scope("range_attention"):  # profiles and FLOP counters find attention by this name
        if name == "reference":
            return reference(q_BTNH, k_BSKH, v_BSKH, ranges, include_self)
        static = _Static(name, include_self, reach)
        return _merged(static, q_BTNH, k_BSKH, v_BSKH, ranges)


def choose_implementation(
    q: jax.Array | jax.ShapeDtypeStruct,
    k: jax.Array | jax.ShapeDtypeStruct,
    reach: Reach | None,
    implementation: str | None = None,
    platform: str | None = None,
) -> str:
    """Returns the name of the backend that `range_attention` uses; see the module docstring.

    q and k may be `jax.ShapeDtypeStruct`s. platform defaults to `jax.default_backend()`. Raises ValueError if a requested implementation is
    unknown or does not support the inputs.
    """
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation = {implementation!r}: must be one of {', '.join(IMPLEMENTATIONS)}")
        if implementation != "reference" and (reason := _BACKENDS[implementation].unsupported_reason(q, k, reach)):
            raise ValueError(f"range_attention: implementation {implementation!r} {reason}")
        return implementation
    bounded = False
    if reach is not None and not local.unsupported_reason(q, k, reach):
        bounded = sum(reach) < LOCAL_KEYS and 2 * (1 + sum(reach)) <= q.shape[1]
    fallback = "local" if bounded else "reference"
    platform = platform or jax.default_backend()
    if platform == "cpu" and not bounded and max(q.shape[1], k.shape[1]) >= BLOCKED_KEYS:
        return "blocked"
    if platform not in _BACKENDS:
        return fallback
    if reason := _BACKENDS[platform].unsupported_reason(q, k, reach):
        cost = "" if bounded else ", whose memory grows with the square of the length"
        _warn_once(f"range_attention: implementation {platform!r} {reason}; falling back to {fallback!r}{cost}")
        return fallback
    return platform


@functools.cache
def _warn_once(message: str) -> None:
    _LOGGER.warning(message)


def _check(q, k, v, ranges) -> None:
    B, T, N, H = q.shape
    if k.shape != v.shape or k.ndim != 4 or (k.shape[0], k.shape[3]) != (B, H) or N % k.shape[2]:
        raise ValueError(f"range_attention: the shapes of q {q.shape}, k {k.shape} and v {v.shape} do not match")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"range_attention: q, k and v have different dtypes: {q.dtype}, {k.dtype}, {v.dtype}")
    for bound in (bound for pair in ranges for bound in pair):
        if bound.shape != (B, T):
            raise ValueError(f"range_attention: ranges have shape {bound.shape}, but queries have shape {(B, T)}")


# ---- the reference


def range_mask(T: int, S: int, ranges: tuple[Range, ...], include_self: bool) -> jax.Array:
    """The dense mask of the ranges, [B, T, S] bool: True if the query at t sees the key at s."""
    s = jnp.arange(S)
    mask_BTS = functools.reduce(jnp.logical_or, [(s >= start[..., None]) & (s < stop[..., None]) for start, stop in ranges])
    return mask_BTS | (jnp.arange(T)[:, None] == s) if include_self else mask_BTS


def reference(q, k, v, ranges: tuple[Range, ...], include_self: bool) -> jax.Array:
    mask_BTS = range_mask(q.shape[1], k.shape[1], ranges, include_self)
    # cuDNN's attention needs Ampere or later, as do our GPU kernels.
    cudnn = jax.default_backend() == "gpu" and not cudnn_unsupported_reason(q, k) and not gpu.unsupported_reason(q, k, None)
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
        mask = mask_BTS[:, None]
        o = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn" if cudnn else "xla")
    return jnp.where(mask_BTS.any(-1)[..., None, None], o, 0)


def cudnn_unsupported_reason(q: jax.Array, k: jax.Array) -> str:
    """Returns why cuDNN's attention does not support the queries and keys, or "" if it does."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"does not support {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"does not support head size {q.shape[3]}"
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
    single_part = len(ranges) == 1 and not static.include_self
    dtype = q.dtype if single_part else jnp.float32
    forward = functools.partial(_BACKENDS[static.name].forward, reach=static.reach, dtype=dtype)
    parts = [_on_shards(static.name, forward, q, k, v, *bounds, outputs="qn") for bounds in ranges]
    if static.include_self:
        _, v_self, logit_BTN = _self_key(q, k, v, ranges)
        parts.append((v_self, logit_BTN))
    if single_part:
        o, lse_BTN = parts[0]
    else:
        lse_PBTN = jnp.stack([lse for _, lse in parts])
        top_BTN = jnp.maximum(lse_PBTN.max(0), -1e30)  # finite in empty rows
        lse_BTN = top_BTN + jnp.log(jnp.exp(lse_PBTN - top_BTN).sum(0))
        weight_PBTN = jnp.where(lse_BTN > -jnp.inf, jnp.exp(lse_PBTN - lse_BTN), 0)
        o = jnp.asarray(sum(w[..., None] * o for w, (o, _) in zip(weight_PBTN, parts, strict=True))).astype(q.dtype)
    return o, (q, k, v, ranges, o, lse_BTN)


def _merged_backward(static: _Static, residuals, do):
    q, k, v, ranges, o, lse_BTN = residuals
    delta_BTN = jnp.einsum("BTNH,BTNH->BTN", do, o, preferred_element_type=jnp.float32, precision="highest")
    backward = functools.partial(_BACKENDS[static.name].backward, reach=static.reach)
    grads = [_on_shards(static.name, backward, q, k, v, *bounds, do, lse_BTN, delta_BTN, outputs="qkk") for bounds in ranges]
    if static.include_self:
        k_self, v_self, logit_BTN = _self_key(q, k, v, ranges)
        do, q32 = do.astype(jnp.float32), q.astype(jnp.float32)
        p_BTN = jnp.where(lse_BTN > -jnp.inf, jnp.exp(logit_BTN - lse_BTN), 0)
        ds_BTN = p_BTN * ((do * v_self).sum(-1) - delta_BTN) * q.shape[-1] ** -0.5

        def to_keys(x_BTNH):
            B, T, _, H = x_BTNH.shape
            x_BTKH = x_BTNH.reshape(B, T, k.shape[2], -1, H).sum(3)[:, : k.shape[1]]
            return jnp.pad(x_BTKH, ((0, 0), (0, k.shape[1] - x_BTKH.shape[1]), (0, 0), (0, 0)))

        grads.append((ds_BTN[..., None] * k_self, to_keys(ds_BTN[..., None] * q32), to_keys(p_BTN[..., None] * do)))
    dq, dk, dv = (jnp.asarray(sum(parts)).astype(q.dtype) for parts in zip(*grads, strict=True))
    return dq, dk, dv, None


_merged.defvjp(_merged_forward, _merged_backward)


def _self_key(q, k, v, ranges):
    """Key and value at each query's own position, [B, T, N, H] float32, and the logit [B, T, N] of that key.

    The logit is -inf if a range already contains the key, or if T > S and there is no such key.
    """
    T, S, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]

    def at_query_positions(x_BSKH):
        x_BTKH = jnp.pad(x_BSKH[:, :T], ((0, 0), (0, max(T - S, 0)), (0, 0), (0, 0)))
        return jnp.repeat(x_BTKH, G, axis=2).astype(jnp.float32)

    k_self, v_self = at_query_positions(k), at_query_positions(v)
    t = jnp.arange(T)
    outside_BT = functools.reduce(jnp.logical_and, [(t < start) | (t >= stop) for start, stop in ranges]) & (t < S)
    logit_BTN = (q.astype(jnp.float32) * k_self).sum(-1) * q.shape[-1] ** -0.5
    return k_self, v_self, jnp.where(outside_BT[..., None], logit_BTN, -jnp.inf)


# ---- several devices


def _on_shards(name: str, f, q, k, v, start, stop, *query_arrays, outputs: str):
    """Calls f, the forward or backward function of a backend, on the rows and heads of each device.

    XLA cannot partition a kernel by itself. (It can partition `local`.) query_arrays: further arrays [B, T, …]. outputs: the kind of each
    output, "q" [B, T, N, H], "k" [B, S, K, H] or "n" [B, T, N].
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True)) if not mesh.empty else {}
    if name == "local" or math.prod(sizes.values()) == 1 or any(kind == AxisType.Manual for kind in mesh.axis_types):
        return f(q, k, v, start, stop, *query_arrays)
    N, K = q.shape[2], k.shape[2]
    rows = tuple(axis for axis in BATCH_AXES if axis in sizes)
    rows = rows if q.shape[0] % math.prod(sizes[axis] for axis in rows) == 0 else None
    heads = HEADS_AXIS if HEADS_AXIS in sizes and N % sizes[HEADS_AXIS] == 0 else None
    repeats = N // K if heads and K % sizes[heads] else 1  # too few key-value heads to split: repeat them for every query head
    k, v = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (k, v))
    specs = {4: P(rows, None, heads, None), 3: P(rows, None, heads), 2: P(rows, None)}
    arrays = (q, k, v, start, stop, *query_arrays)
    out_specs = tuple(specs[3 if output == "n" else 4] for output in outputs)
    sharded_f = jax.shard_map(f, in_specs=tuple(specs[x.ndim] for x in arrays), out_specs=out_specs, check_vma=False)

    def sum_repeats(x, output):
        return x.reshape(*x.shape[:2], K, repeats, -1).sum(3) if output == "k" and repeats > 1 else x

    return tuple(sum_repeats(x, output) for x, output in zip(sharded_f(*arrays), outputs, strict=True))

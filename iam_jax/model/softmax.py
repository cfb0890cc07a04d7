"""Softmax over many candidates in chunks: logits of at most a few thousand positions exist at one time, in the backward pass too.

Axes: X positions of any kind, C candidates, E vectors of candidates.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from iam_jax.devices.mesh import current_batch_shards, current_platform, split_rows

_ONE_PASS = 1 << 22  # numbers in a gradient that is kept from the forward pass to the backward pass: 16 MiB of float32


def cross_entropy(
    h_XE: jax.Array,
    v_CE: jax.Array | tuple[jax.Array, ...],
    label_X: jax.Array,
    *,
    allowed_C: jax.Array | None = None,
    chunk: int = 2048,
) -> jax.Array:
    """Sum of -log softmax(h v^T)[label] over the positions with a label >= 0, in float32; as `label_log_probs`.

    On one CPU device, if the candidates' gradient is small, it is computed together with the value: the logits are computed once, not
    twice. (On accelerators neither the time nor the memory of this has been measured.)"""
    parts = v_CE if isinstance(v_CE, tuple) else (v_CE,)
    if len(parts) == 1 and parts[0].size <= _ONE_PASS and current_batch_shards() == 1 and current_platform() == "cpu":
        allowed = jnp.ones(len(parts[0]), bool) if allowed_C is None else allowed_C
        return _one_pass(*map(jnp.asarray, (h_XE, parts[0], label_X, allowed)), chunk)
    return -label_log_probs(h_XE, v_CE, label_X, allowed_C=allowed_C, chunk=chunk).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _one_pass(h_XE: jax.Array, v_CE: jax.Array, label_X: jax.Array, allowed_C: jax.Array, chunk: int) -> jax.Array:
    return -label_log_probs(h_XE, v_CE, label_X, allowed_C=allowed_C, chunk=chunk).sum()


def _value_and_gradients(h_XE, v_CE, label_X, allowed_C, chunk):
    """The value, and its gradients with respect to h_XE and v_CE, chunk by chunk."""

    def part(total, xs):
        (loss, dv_CE), (label_x, h_xE) = total, xs
        logits_xC = jnp.where(allowed_C, jnp.einsum("xE,CE->xC", h_xE, v_CE, preferred_element_type=jnp.float32), -jnp.inf)
        real_x, safe_x = label_x >= 0, jnp.maximum(label_x, 0)
        most_x = logits_xC.max(1)
        e_xC = jnp.exp(logits_xC - most_x[:, None])
        sum_x = e_xC.sum(1)
        picked_x = jnp.take_along_axis(logits_xC, safe_x[:, None], axis=1)[:, 0]
        loss = loss + jnp.where(real_x, most_x + jnp.log(sum_x) - picked_x, 0).sum()
        # softmax - one-hot, as two parts: another pass over all logits would only change one in each row
        scale_x1 = jnp.where(real_x, 1 / sum_x, 0)[:, None]
        own_x1 = real_x[:, None].astype(h_xE.dtype)
        dh_xE = scale_x1 * jnp.einsum("xC,CE->xE", e_xC, v_CE, preferred_element_type=jnp.float32) - own_x1 * v_CE[safe_x]
        dv_CE = dv_CE + jnp.einsum("xC,xE->CE", e_xC, scale_x1 * h_xE, preferred_element_type=jnp.float32)
        return (loss, dv_CE.at[safe_x].add(-own_x1 * h_xE)), dh_xE

    zero = jnp.zeros(()), jnp.zeros(v_CE.shape, jnp.float32)
    if len(label_X) <= chunk:
        (loss, dv_CE), dh_XE = part(zero, (label_X, h_XE))
    else:
        (loss, dv_CE), dh = jax.lax.scan(part, zero, (strided(label_X, chunk, -1), strided(h_XE, chunk)))
        dh_XE = unstrided(dh, len(label_X))
    return loss, (dh_XE.astype(h_XE.dtype), dv_CE.astype(v_CE.dtype))


def _scaled(_, gradients, factor):
    return *((factor * gradient).astype(gradient.dtype) for gradient in gradients), None, None


_one_pass.defvjp(_value_and_gradients, _scaled)


def logits(h_XE: jax.Array, v_CE: jax.Array | tuple[jax.Array, ...]) -> jax.Array:
    """[X, C] float32: h v^T; v_CE may come in parts."""
    parts = v_CE if isinstance(v_CE, tuple) else (v_CE,)
    return jnp.concatenate([jnp.einsum("xE,CE->xC", h_XE, v, preferred_element_type=jnp.float32) for v in parts], axis=1)


def label_log_probs(
    h_XE: jax.Array,
    v_CE: jax.Array | tuple[jax.Array, ...],
    label_X: jax.Array,
    *,
    allowed_C: jax.Array | None = None,
    chunk: int = 2048,
) -> jax.Array:
    """[X] float32: log softmax(h v^T)[label], 0 where the label is below 0. At most `chunk` positions' logits exist at one time, in
    the backward pass too. v_CE: in parts, where it is several. allowed_C: candidates that take part."""

    parts = v_CE if isinstance(v_CE, tuple) else (v_CE,)
    allowed = (None,) * len(parts) if allowed_C is None else jnp.split(allowed_C, np.cumsum([len(v) for v in parts])[:-1])

    def part(label_x, h_xE):
        # Each part by itself: logits in one piece would be copied, and a sharded vocabulary moved between devices.
        start, picked_x, sums = 0, 0, []
        for v, may in zip(parts, allowed, strict=True):
            logits_xC = jnp.einsum("xE,CE->xC", h_xE, v, preferred_element_type=jnp.float32)
            if may is not None:
                logits_xC = jnp.where(may, logits_xC, -jnp.inf)
            inside_x = (label_x >= start) & (label_x < start + len(v))
            found_x = jnp.take_along_axis(logits_xC, jnp.clip(label_x - start, 0, len(v) - 1)[:, None], axis=1)[:, 0]
            picked_x = jnp.where(inside_x, found_x, picked_x)
            sums.append(jax.nn.logsumexp(logits_xC, axis=1))
            start += len(v)
        return jnp.where(label_x >= 0, picked_x - functools.reduce(jnp.logaddexp, sums), 0)

    return _over_chunks(part, chunk, label_X, h_XE)


def sampled_cross_entropy(
    h_XE: jax.Array,
    target_X: jax.Array,
    candidate_C: jax.Array,
    v_CE: jax.Array,
    vt_XE: jax.Array,
    log_expected_C: jax.Array,
    chunk: int = 2048,
) -> jax.Array:
    """Sum over the positions with a target >= 0 of -log(e^s_y / (e^s_y + sum over sampled c != y of e^s_c / E_c)).

    E_c is how often item c is expected among the candidates, so that the denominator's expectation is that of the full softmax
    (log-q correction, Bengio and Senécal 2008). Candidates that equal the target are left out; candidate_C is -1 for none.
    vt_XE: vectors of the targets."""

    def part(target_x, h_xE, vt_xE):
        positive_x = (h_xE * vt_xE).sum(-1)
        logits_xC = jnp.einsum("xE,CE->xC", h_xE, v_CE) - log_expected_C
        negative_xC = (candidate_C >= 0) & (candidate_C != target_x[:, None])
        logits_xC = jnp.where(negative_xC, logits_xC, -jnp.inf)
        total_x = jax.nn.logsumexp(jnp.concatenate([positive_x[:, None], logits_xC], axis=1), axis=1)
        return jnp.where(target_x >= 0, total_x - positive_x, 0)

    return _over_chunks(part, chunk, target_X, h_XE, vt_XE).sum()


def cached_cross_entropy(
    h_XE: jax.Array,
    target_X: jax.Array,
    v_IE: jax.Array,
    allowed_I: jax.Array,
    fresh_CE: jax.Array,
    stale_CE: jax.Array,
    vt_XE: jax.Array,
    weight_C: jax.Array,
    chunk: int = 2048,
) -> jax.Array:
    """Sum over the positions with a target >= 0 of log Z - h f_y + sum_c w_c (e^(h f_c) - e^(h v_c)) / Z, with Z = sum_i e^(h v_i).

    v_IE: vectors of all items, computed some steps ago, and allowed_I: which of them take part. fresh_CE and stale_CE: vectors f of some
    items, computed now, and their rows of v_IE. weight_C: their weights, of expectation 1 for every item that takes part. vt_XE: f_y.

    The expectation of the last term is Z' / Z - 1, where Z' is the sum over fresh vectors of all items, and log Z + Z' / Z - 1 >= log Z',
    because the logarithm is concave. So the expected loss is never below the full softmax's with fresh vectors, and the model cannot
    improve it by telling fresh from stale ones. Its expected gradient is that of this bound at constant Z. If v is fresh, the loss is that
    of the full softmax, whatever was drawn, and the expected gradient is the full softmax's. (The bound with auxiliary variables is that of
    Fagan and Iyengar 2018, arXiv 1803.08577; here the cache gives the variables, log Z, and is a control variate.)"""

    def part(target_x, h_xE, vt_xE):
        logits_xI = jnp.where(allowed_I, jnp.einsum("xE,IE->xI", h_xE, v_IE), -jnp.inf)
        log_Z_x = jax.nn.logsumexp(logits_xI, axis=1)
        fresh_xC, stale_xC = (jnp.einsum("xE,CE->xC", h_xE, y) - jax.lax.stop_gradient(log_Z_x)[:, None] for y in (fresh_CE, stale_CE))
        more_x = (weight_C * (jnp.exp(fresh_xC) - jnp.exp(stale_xC))).sum(-1)
        return jnp.where(target_x >= 0, log_Z_x - (h_xE * vt_xE).sum(-1) + more_x, 0)

    return _over_chunks(part, chunk, target_X, h_XE, vt_XE).sum()


def _over_chunks(part: Callable[..., jax.Array], chunk: int, label_X: jax.Array, *y_XE: jax.Array) -> jax.Array:
    """[X]: part(label, *y) of chunks of at most `chunk` positions, each computed again for the backward pass. What fills up the last
    chunk has the label -1."""
    part = jax.checkpoint(part)
    if len(label_X) <= chunk:
        return part(label_X, *y_XE)
    values = jax.lax.map(lambda xs: part(*xs), (strided(label_X, chunk, -1), *(strided(y, chunk) for y in y_XE)))
    return unstrided(values, len(label_X))


def strided(y: jax.Array, chunk: int, fill: int = 0) -> jax.Array:
    """[X, …] as [parts, size, …]: the fewest parts of about `chunk` rows, of the same size, filled up at the end. A part is every parts-th
    row, so that rows that are spread over devices stay where they are and every part is spread over all of them."""
    shards = current_batch_shards()
    parts = math.ceil(len(y) / chunk)
    size = math.ceil(len(y) / parts / shards) * shards
    widths = ((0, parts * size - len(y)), *[(0, 0)] * (y.ndim - 1))
    y = jnp.pad(y, widths, constant_values=fill).reshape(size, parts, *y.shape[1:])
    return split_rows(y.swapaxes(0, 1), axis=1)


def unstrided(y: jax.Array, rows: int) -> jax.Array:
    """[parts, size, …] as [rows, …]: `strided` undone."""
    return y.swapaxes(0, 1).reshape(-1, *y.shape[2:])[:rows]

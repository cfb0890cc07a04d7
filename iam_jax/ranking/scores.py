"""Scores of a whole catalogue as pure functions of arrays: exact ranks, the best K items, and the scores of given pairs.

A score is the inner product of a history vector and an item vector, in float32 at the highest precision, plus a given bonus if there is one
(`Bonus` in core.py). At most X times `chunk` scores exist at the same time. Inside a `jax.shard_map` over the mesh axes `axes`, `v_IE` is
the device's shard of the catalogue, and the results are those of all shards together. `over_items` makes such a function.

Axes: X histories, C items of a chunk (or given candidates), J chunks, I items, E item vectors, S seen items, K items of a list.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

CHUNK = 8192  # items of one matrix product


def rank_catalogue(
    h_XE: jax.Array,
    v_IE: jax.Array,
    target_X: jax.Array,
    seen_XS: jax.Array | None = None,
    bonus_XI: jax.Array | None = None,
    *,
    chunk: int = CHUNK,
    items: int = 0,
    axes: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the exact rank of each target among all items. Traceable by JAX.

    Args:
      h_XE: history vectors, float32.
      v_IE: item vectors, float32.
      target_X: int32, row of each target in v_IE.
      seen_XS: int32, for each history the rows of items that are no candidates, -1 for none. They must be distinct, and the target must not
        be among them. None: every item is a candidate.
      bonus_XI: float32, is added to the scores; its columns are the rows of v_IE (of the same shard). None: there is none.
      chunk: number of items in one matrix product.
      items: number of items, if further rows of v_IE are padding; 0: every row is an item.
      axes: mesh axes over which v_IE is sharded, inside a `shard_map`.

    Returns:
      rank [X] int32, 1 + the number of candidates with a higher score; ties [X] int32, the number of other candidates with an equal score;
      finite [X] bool, whether all scores are finite.
    """
    seen_XS = jnp.full((len(h_XE), 1), -1, jnp.int32) if seen_XS is None else seen_XS
    I = len(v_IE)  # noqa: E741
    J = math.ceil(I / chunk)
    C = math.ceil(I / J)
    offset = jax.lax.axis_index(axes) * I if axes else 0
    target_X, seen_XS, stop = target_X - offset, seen_XS - offset, (items or I) - offset
    chunk_X, chunk_XS = (jnp.where((i >= 0) & (i < I), i // C, -1) for i in (target_X, seen_XS))  # -1: in another shard, or none
    i_C = jnp.arange(C)
    holds_J = (chunk_X == jnp.arange(J)[:, None]).any(1)
    holders_first_J = jnp.argsort(~holds_J, stable=True)

    # A target's own score is taken from the scores of the catalogue, because the last bits of a separate computation could differ. So
    # chunks with a target are computed twice, by the same matrix product of the program: first for the targets' scores, then to compare.
    def sweep(comparing, carry):
        def step(n, carry):
            c = jnp.where(comparing, n, holders_first_J[n])
            start = jnp.minimum(c * C, I - C)
            scores_XC = _chunk_scores(h_XE, v_IE, bonus_XI, start, C)

            def scores_of(item_X):  # arbitrary for items of other chunks
                return jnp.take_along_axis(scores_XC, jnp.clip(item_X - start, 0, C - 1), axis=1)

            def find(here_X, own_X, *counts):
                return jnp.where(chunk_X == c, scores_of(target_X[:, None])[:, 0], here_X), own_X, *counts

            def compare(here_X, own_X, above_X, equal_X, finite_X):
                own_X1 = own_X[:, None]
                real_C = (start + i_C >= c * C) & (start + i_C < stop)
                seen_here_XS, seen_scores_XS = chunk_XS == c, scores_of(seen_XS)
                above_X += ((scores_XC > own_X1) & real_C).sum(1) - ((seen_scores_XS > own_X1) & seen_here_XS).sum(1)
                equal_X += ((scores_XC == own_X1) & real_C).sum(1) - ((seen_scores_XS == own_X1) & seen_here_XS).sum(1)
                return here_X, own_X, above_X, equal_X, finite_X & (jnp.isfinite(scores_XC) | ~real_C).all(1)

            return jax.lax.cond(comparing, compare, find, *carry)

        here_X, _, *counts = jax.lax.fori_loop(0, jnp.where(comparing, J, holds_J.sum()), step, carry)
        return here_X, jax.lax.psum(here_X, axes) if axes else here_X, *counts

    zero_X, none_X = jnp.zeros(len(h_XE)), jnp.zeros(len(h_XE), jnp.int32)
    carry = (zero_X, zero_X, none_X, none_X, jnp.ones(len(h_XE), bool))
    _, _, above_X, equal_X, finite_X = jax.lax.fori_loop(0, 2, lambda n, carry: sweep(n > 0, carry), carry)
    if axes:
        above_X, equal_X = jax.lax.psum((above_X, equal_X), axes)
    return 1 + above_X, equal_X - 1, _all_shards(finite_X, axes)


def top_items(
    h_XE: jax.Array,
    v_IE: jax.Array,
    seen_XS: jax.Array | None,
    k: int,
    bonus_XI: jax.Array | None = None,
    *,
    chunk: int = CHUNK,
    items: int = 0,
    axes: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds the K items with the highest scores, best first. Among equal scores, the first item of v_IE comes first. Traceable by JAX.

    Args:
      h_XE, v_IE, bonus_XI, chunk, items, axes: as in `rank_catalogue`.
      seen_XS: int32, for each history the rows of items that are no candidates, -1 for none; they may repeat. None: every item is one.
      k: K, a Python integer.

    Returns:
      items [X, K] int32 and scores [X, K] float32, -1 and -inf where no candidate is left; finite [X] bool, whether all scores are finite.
    """
    X, I = h_XE.shape[0], len(v_IE)  # noqa: E741
    J = math.ceil(I / chunk)
    C = math.ceil(I / J)
    offset = jax.lax.axis_index(axes) * I if axes else 0
    stop, x = (items or I) - offset, jnp.arange(X)[:, None]

    def step(best, c):
        item_XK, score_XK, finite_X = best
        start = jnp.minimum(c * C, I - C)
        scores_XC = _chunk_scores(h_XE, v_IE, bonus_XI, start, C)
        i_C = start + jnp.arange(C, dtype=jnp.int32)
        real_C = (i_C >= c * C) & (i_C < stop)  # the last chunk overlaps the one before it
        finite_X &= (jnp.isfinite(scores_XC) | ~real_C).all(1)
        scores_XC = jnp.where(real_C, scores_XC, -jnp.inf)
        if seen_XS is not None:
            at_XS = seen_XS - offset - start
            scores_XC = scores_XC.at[x, jnp.where(at_XS >= 0, at_XS, C)].set(-jnp.inf, mode="drop")
        found_XK, at_XK = jax.lax.top_k(scores_XC, min(k, C))
        # Items of earlier chunks come first, and among equal scores top_k takes the first.
        return (*_best(k, item_XK, score_XK, offset + i_C[at_XK], found_XK), finite_X), None

    none = jnp.full((X, k), -1, jnp.int32), jnp.full((X, k), -jnp.inf), jnp.ones(X, bool)
    (item_XK, score_XK, finite_X), _ = jax.lax.scan(step, none, jnp.arange(J))
    if axes:
        parts = (jax.lax.all_gather(x_XK, axes, axis=1, tiled=True) for x_XK in (item_XK, score_XK))
        item_XK, score_XK = _best(k, *parts)
    return jnp.where(score_XK == -jnp.inf, -1, item_XK), score_XK, _all_shards(finite_X, axes)


def pair_scores(h_XE: jax.Array, v_IE: jax.Array, item_XC: jax.Array, *, axes: tuple[str, ...] = ()) -> jax.Array:
    """[X, C] float32: the scores of given items, -inf where item_XC is -1. Traceable by JAX.

    Args:
      h_XE, v_IE, axes: as in `rank_catalogue`.
      item_XC: int32, rows of v_IE; -1 for none.
    """
    at_XC = item_XC - (jax.lax.axis_index(axes) * len(v_IE) if axes else 0)
    here_XC = (item_XC >= 0) & (at_XC >= 0) & (at_XC < len(v_IE))
    scores_XC = jnp.einsum("XE,XCE->XC", h_XE, v_IE[jnp.where(here_XC, at_XC, 0)], precision="highest")
    scores_XC = jnp.where(here_XC, scores_XC, 0)
    scores_XC = jax.lax.psum(scores_XC, axes) if axes else scores_XC
    return jnp.where(item_XC >= 0, scores_XC, -jnp.inf)


def bonus_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of a bonus [X, I]: by items, as that of v_IE."""
    return NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))


def over_items(mesh: jax.sharding.Mesh, function: Callable, arrays: int, bonus: bool = False) -> Callable:
    """Jits `function(h_XE, v_IE, *others, axes=…)` for a mesh: v_IE is sharded over all devices (`devices.mesh.spread_rows`), all other
    arguments and the results are replicated.

    Args:
      mesh: the device mesh.
      function: traceable by JAX.
      arrays: number of array arguments.
      bonus: whether one more array argument is a bonus [X, I] (`bonus_sharding`), the last one.
    """
    axes = mesh.axis_names if mesh.size > 1 else ()

    def call(*args):
        return function(*args, axes=axes)

    replicated, sharded = PartitionSpec(), PartitionSpec(axes)
    bonus_specs = [PartitionSpec(None, axes)] * bonus
    specs = {"in_specs": (replicated, sharded, *[replicated] * (arrays - 2), *bonus_specs), "out_specs": replicated}
    return jax.jit(jax.shard_map(call, mesh=mesh, check_vma=False, **specs) if axes else call)


def ranking_program(
    mesh: jax.sharding.Mesh, chunk: int, items: int, bonus: bool = False
) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """`rank_catalogue` jitted for a mesh: (h_XE, v_IE, target_X, seen_XS) -> rank, ties, finite. With bonus, bonus_XI follows."""
    return over_items(mesh, functools.partial(rank_catalogue, chunk=chunk, items=items), arrays=4, bonus=bonus)


def top_program(
    mesh: jax.sharding.Mesh, k: int, chunk: int, items: int, filter_seen: bool = True, bonus: bool = False
) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """`top_items` jitted for a mesh: (h_XE, v_IE, seen_XS) -> items, scores, finite. Without filter_seen there is no argument seen_XS. With
    bonus, bonus_XI follows."""

    def top(h_XE, v_IE, *others, axes):
        seen_XS, bonus_XI = others[0] if filter_seen else None, others[-1] if bonus else None
        return top_items(h_XE, v_IE, seen_XS, k, bonus_XI, chunk=chunk, items=items, axes=axes)

    return over_items(mesh, top, arrays=2 + filter_seen, bonus=bonus)


def _chunk_scores(h_XE: jax.Array, v_IE: jax.Array, bonus_XI: jax.Array | None, start: jax.Array, count: int) -> jax.Array:
    """[X, C] float32: the scores of `count` items from `start`."""
    scores_XC = jnp.einsum("XE,CE->XC", h_XE, jax.lax.dynamic_slice_in_dim(v_IE, start, count), precision="highest")
    return scores_XC if bonus_XI is None else scores_XC + jax.lax.dynamic_slice_in_dim(bonus_XI, start, count, axis=1)


def _best(k: int, *parts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The k best of items and their scores, given in one or more parts: (items, scores, items, scores, …)."""
    item_XC, score_XC = parts if len(parts) == 2 else (jnp.concatenate(part, axis=1) for part in (parts[::2], parts[1::2]))
    score_XK, at_XK = jax.lax.top_k(score_XC, k)
    return jnp.take_along_axis(item_XC, at_XK, axis=1), score_XK


def _all_shards(finite_X: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Whether the values are True in all shards."""
    return jax.lax.psum((~finite_X).astype(jnp.int32), axes) == 0 if axes else finite_X

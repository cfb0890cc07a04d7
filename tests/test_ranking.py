"""Ranks of a catalogue that is sharded over devices and processes and ranked in chunks equal those of plain loops exactly. Other numbers of
devices run in separate processes, which print or write their results as JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forks import python
from helpers import on_devices, optimized_jit, tiny_data
from jobs import join_job, two_processes
from test_evaluate import history_of, integers, make_evaluator, recent, tokens_of

from iam_jax.config import MeshConfig
from iam_jax.data.splits import TEST, VALIDATION
from iam_jax.devices.mesh import make_mesh, spread_rows
from iam_jax.ranking.evaluate import seen_lists
from iam_jax.ranking.metrics import ranking_metrics
from iam_jax.ranking.scores import rank_catalogue, ranking_program

USERS, ITEMS = 53, 12_501  # neither is divisible by 8 or by a chunk
CHUNKS = (64, 1000, 4096, 12_000)
ENDS = CHUNKS[:1] + CHUNKS[-1:]
MESHES = ((1, 1, 1), (8, 1, 1), (2, 2, 2))
JOBS = {1: (2, 1, 1), 2: (2, 1, 2)}  # two processes, by their devices


def large_data():
    """Most targets are items of other users' histories; the last items are cold."""
    return tiny_data(users=USERS, items=ITEMS, cold=5)


def targets_of(prepared) -> np.ndarray:
    return np.concatenate([prepared.events.targets(label) for label in (VALIDATION, TEST)])


def ranks_on(shape: tuple[int, int, int], chunks: tuple[int, ...] = CHUNKS) -> dict:
    prepared = large_data()
    params, targets = integers(prepared), targets_of(prepared)
    mesh, results = make_mesh(MeshConfig(*shape)), {}
    for chunk in chunks:
        evaluator = make_evaluator(prepared, eval={"chunk_items": chunk, "batch_rows": 8}, mesh=mesh)
        with jax.set_mesh(mesh):
            rank, ties = evaluator.rank(params, targets)
            v = evaluator.ranker.item_vectors(params, None)
            h = evaluator.history_vectors(params, targets[:40], None)
            lists = evaluator.ranker.top(h, v, seen_lists(prepared.events, targets[:40]), 9)
        results[str(chunk)] = [rank.tolist(), ties.tolist(), *(found.tolist() for found in lists)]
        held = [int(np.prod(shard.data.shape[:1])) for shard in v.addressable_shards]
    try:
        evaluator.rank({**params, "table": params["table"].at[ITEMS - 1].set(jnp.nan)}, targets)
    except FloatingPointError as error:
        results["nan"] = str(error)
    return results | {"held": held, "errors": not_finite_on(mesh)}


def not_finite_on(mesh) -> list:
    """The targets that are reported for a NaN in one state."""
    h, v = np.ones((5, 3), np.float32), np.ones((21, 3), np.float32)
    h[3, 1] = np.nan
    v = jax.jit(lambda v: spread_rows(mesh, v))(v)
    _, _, finite = ranking_program(mesh, 4, 21)(h, v, np.array([0, 5, 20, 11, 7]), np.full((5, 1), -1))
    return np.asarray(finite).tolist()


@pytest.fixture(scope="module")
def expected():
    prepared = large_data()
    params, targets = {name: np.asarray(x, int) for name, x in integers(prepared).items()}, targets_of(prepared)
    ranks, lists = [], []
    for target in targets:
        history, own = history_of(prepared.events, target), prepared.events.item[target]
        tokens = [token for item in recent(prepared, history, 24) for token in tokens_of(prepared, item)]
        score = params["table"] @ params["embedding"][tokens].sum(0)
        others = np.setdiff1d(np.arange(ITEMS), [*history, own])
        ranks.append([int(1 + (score[others] > score[own]).sum()), int((score[others] == score[own]).sum())])
        candidates = np.union1d(others, [own])
        best = candidates[np.argsort(-score[candidates], kind="stable")][:9]
        lists.append([best.tolist(), score[best].tolist()])
    assert min(ties for _, ties in ranks) > 0 and len({rank for rank, _ in ranks}) > 50
    return [list(column) for column in (*zip(*ranks, strict=True), *zip(*lists[:40], strict=True))] + [[True] * 40]


@pytest.fixture(scope="module")
def eight():
    env = os.environ | on_devices(8)
    done = subprocess.run([python(), __file__], capture_output=True, text=True, env=env, cwd=Path(__file__).parents[1], timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(MESHES[1:], json.loads(done.stdout), strict=True))


def check(found, expected, held, chunks=CHUNKS):
    for chunk in chunks:
        assert found[str(chunk)] == expected, chunk
    assert found["held"] == held  # a device holds only its own part
    assert "is not finite" in found["nan"]
    assert found["errors"] == [True, True, True, False, True]


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_ranks_depend_on_no_chunk_and_no_device(expected, request, shape):
    found = ranks_on(shape) if shape == MESHES[0] else request.getfixturevalue("eight")[shape]
    check(found, expected, [ITEMS] if shape == MESHES[0] else [-(-ITEMS // 8)] * 8)


@pytest.mark.parametrize("devices", JOBS)
def test_ranks_depend_on_no_process(expected, tmp_path, devices):
    """Both processes return all ranks and raise the same error."""
    two_processes([__file__, str(devices), str(tmp_path)], devices)
    for process in (0, 1):
        check(json.loads((tmp_path / f"{process}.json").read_text()), expected, [-(-ITEMS // (2 * devices))] * devices, ENDS)


@pytest.mark.parametrize(
    ("users", "items", "width", "chunk"), [(64, 5000, 128, 512), (33, 3001, 60, 700), (5, 1111, 128, 300), (300, 257, 16, 64)]
)
def test_a_targets_score_is_one_of_the_catalogues(users, items, width, chunk):
    """With inexact numbers, the target always ties with itself, and never with an item whose score differs."""
    rng = np.random.default_rng(0)
    h, v = (rng.standard_normal((n, width)).astype(np.float32) for n in (users, items))
    target = rng.integers(items, size=users)
    ranker = optimized_jit(
        lambda *arrays: rank_catalogue(*arrays, chunk=chunk)
    )  # with the usual compilation, which may fuse products with other operations
    rank, ties, finite = ranker(h, v, target, np.full((users, 1), -1))
    assert finite.all() and not np.asarray(ties).any()  # it would be -1 otherwise
    score = h.astype(np.float64) @ v.T.astype(np.float64)
    own = score[np.arange(users), target][:, None]
    exact = 1 + (score > own).sum(1)
    near = (np.abs(score - own) < 1e-5 * np.abs(own).clip(1)).sum(1) - 1
    assert (np.abs(rank - exact) <= near).all() and (near == 0).mean() > 0.5


def test_memory_does_not_grow_with_the_catalogue():
    def temporary_bytes(items):
        h, v = jax.ShapeDtypeStruct((64, 16), np.float32), jax.ShapeDtypeStruct((items, 16), np.float32)
        target, seen = jax.ShapeDtypeStruct((64,), np.int32), jax.ShapeDtypeStruct((64, 16), np.int32)
        ranker = ranking_program(make_mesh(MeshConfig()), 256, items)
        return ranker.lower(h, v, target, seen).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(4_000), temporary_bytes(64_000)
    assert large < small + 64_000  # the scores of all items would be 16 MB, a copy of their vectors 4 MB
    assert small > 64 * 256 * 4


# ---- a second implementation of the metrics, from scores to means


def slow_metrics(scores: np.ndarray, target: np.ndarray, k: int) -> dict[str, float]:
    """Means over all users, with the position of the target in a sorted list."""
    places = [1 + sorted(range(len(row)), key=lambda i, row=row: -row[i]).index(t) for row, t in zip(scores, target, strict=True)]
    inside = [place for place in places if place <= k]
    sums = {
        "hr": len(inside),
        "precision": len(inside) / k,
        "ndcg": sum(1 / np.log2(place + 1) for place in inside),
        "mrr": sum(1 / place for place in inside),
    }
    return {f"{name}@{k}": value / len(places) for name, value in sums.items()}


def random_ranking(users=40, items=120):
    rng = np.random.default_rng(1)
    scores = rng.permuted(np.tile(np.arange(items), (users, 1)), axis=1)  # no ties, and exact
    return scores, rng.integers(items, size=users)


def metrics_of(scores, target, ks):
    """From the evaluator's function, with scores as products with unit vectors."""
    found = jax.jit(rank_catalogue, static_argnames="chunk")(jnp.float32(scores), jnp.eye(scores.shape[1]), target, chunk=50)
    return {name: float(value.mean()) for name, value in ranking_metrics(np.asarray(found[0]), np.asarray(found[1]), ks).items()}


def test_metrics_are_those_of_sorted_lists():
    scores, target = random_ranking()
    found = metrics_of(scores, target, (1, 5, 10, 20, 50))
    for k in (1, 5, 10, 20, 50):
        for name, value in slow_metrics(scores, target, k).items():
            assert found[name] == pytest.approx(value, rel=1e-12), name
    assert 0 < found["ndcg@5"] < found["ndcg@50"] < 1


if __name__ == "__main__":
    if sys.argv[1:]:
        devices, folder, *flags = sys.argv[1:]
        process = join_job(flags)
        (Path(folder) / f"{process}.json").write_text(json.dumps(ranks_on(JOBS[int(devices)], ENDS)))
    else:
        json.dump([ranks_on(shape) for shape in MESHES[1:]], sys.stdout)

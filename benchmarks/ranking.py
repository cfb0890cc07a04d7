"""Measures time and memory to rank targets among a whole catalogue, and compares them with PyTorch.

    pip install -e '.[parity]'                          # PyTorch; without it only iam_jax is measured
    python benchmarks/ranking.py                        # 10,000 users x 1,000,000 items x 128 dimensions: minutes
    python benchmarks/ranking.py --users=1000 --items=100_000

The vectors are small random integers, so that every score is exact. Rank and ties must therefore be equal in all ways; otherwise the exit
code is 1. The three ways are: the function of the ranking core (iam_jax/ranking/scores.py: the scores of the targets and the numbers of
higher and of equal scores, in chunks, without the seen items); the same in PyTorch; and products and `topk` of 50 in PyTorch, chunk by
chunk, which gives no rank beyond 50. Every way runs in its own process, one after another, with as many threads as there are cores.

seconds: the best of --repeats runs over all users, without compilation (first s: seconds of the first batch). MiB: peak resident memory of
the process in these runs, minus the bytes of the item vectors; it contains Python and its libraries, users and scores. Prints one table and
writes one JSON file.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path

import harness
import numpy as np

WAYS = {"iam_jax": "iam_jax: ranks", "torch": "torch: ranks", "torch_topk": "torch: top 50"}
TOP = 50
PARTS = 1 << 16  # number of item vectors that are drawn at one time


def make(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Draws vectors of integers from -3 to 3, targets, and seen items per user: distinct, without the target, padded with -1."""
    rng = np.random.default_rng(0)
    items = np.empty((args.items, args.width), np.float32)
    for start in range(0, args.items, PARTS):
        part = items[start : start + PARTS]
        part[:] = rng.integers(-3, 4, part.shape, np.int8)
    users = rng.integers(-3, 4, (args.users, args.width)).astype(np.float32)
    target = rng.integers(args.items, size=args.users).astype(np.int32)
    seen = np.sort(rng.integers(args.items, size=(args.users, args.seen)).astype(np.int32), axis=1)
    seen[:, 1:][seen[:, 1:] == seen[:, :-1]] = -1
    seen[seen == target[:, None]] = -1
    return {"items": items, "users": users, "target": target, "seen": seen}


def resident() -> int:
    """The resident memory of this process in bytes, or 0 if the system does not provide it."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0


def batches(target: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yields batches of rows, sorted by target as in the evaluator."""
    order = np.argsort(target, kind="stable")
    for start in range(0, len(order), size):
        yield order[start : start + size]


def with_jax(data: dict, args: argparse.Namespace) -> Callable[[int], dict]:
    """Returns a function that ranks the first n targets."""
    import jax
    from jax.sharding import Mesh

    from iam_jax.ranking.scores import ranking_program

    ranker = ranking_program(Mesh(np.array(jax.devices()[:1]), ("data",)), args.chunk, args.items)
    items_IE = jax.block_until_ready(jax.device_put(data.pop("items")))

    def run(first: int) -> dict:
        rank, ties = np.zeros(first, np.int64), np.zeros(first, np.int64)
        for at in batches(data["target"][:first], args.batch):
            rows = np.pad(at, (0, args.batch - len(at)), mode="edge")  # so that all batches have the same shape
            results = ranker(data["users"][rows], items_IE, data["target"][rows], data["seen"][rows])
            rank[at], ties[at], finite = (np.asarray(result)[: len(at)] for result in results)
            assert finite.all()
        return {"rank": rank, "ties": ties}

    return run


def with_torch(data: dict, args: argparse.Namespace, topk: bool) -> Callable[[int], dict]:
    import torch

    torch.set_num_threads(harness.cores())
    items, users = torch.from_numpy(data.pop("items")), torch.from_numpy(data["users"])
    target, seen = torch.from_numpy(data["target"]).long(), torch.from_numpy(data["seen"]).long()
    starts = range(0, args.items, args.chunk)

    def ranks(at):
        h, y, s = users[at], target[at], seen[at]
        # Scores are integers, so this product gives exactly the score of the target in the chunks below.
        target_scores = (h * items[y]).sum(1, keepdim=True)
        seen_scores = torch.stack([(h * items[s[:, j].clamp(min=0)]).sum(1) for j in range(s.shape[1])], 1)
        above, equal = (-(compare(seen_scores, target_scores) & (s >= 0)).sum(1) for compare in (torch.gt, torch.eq))
        finite = True
        for start in starts:
            scores = h @ items[start : start + args.chunk].T
            above += (scores > target_scores).sum(1)
            equal += (scores == target_scores).sum(1)
            finite &= bool(torch.isfinite(scores).all())
        assert finite
        return 1 + above, equal - 1

    def top(at):
        h = users[at]
        best, best_items = torch.full((len(at), TOP), -torch.inf), torch.zeros((len(at), TOP), dtype=torch.long)
        for start in starts:
            scores = h @ items[start : start + args.chunk].T
            found, index = scores.topk(min(TOP, scores.shape[1]), dim=1)
            best, order = torch.cat([best, found], 1).topk(TOP, dim=1)
            best_items = torch.cat([best_items, index + start], 1).gather(1, order)
        return best, best_items

    @torch.inference_mode()
    def run(first: int) -> dict:
        order = batches(data["target"][:first], args.batch)
        if topk:
            for at in order:
                top(torch.from_numpy(at))
            return {}
        rank, ties = np.zeros(first, np.int64), np.zeros(first, np.int64)
        for at in order:
            rank[at], ties[at] = (x.numpy() for x in ranks(torch.from_numpy(at)))
        return {"rank": rank, "ties": ties}

    return run


def measure(way: str, args: argparse.Namespace) -> dict:
    """Measures one way, in its own process."""
    data = make(args)
    run = with_jax(data, args) if way == "iam_jax" else with_torch(data, args, way == "torch_topk")
    with harness.Peak(resident) as peak:
        started = time.perf_counter()
        run(args.batch)  # compiles
        compiled, samples = time.perf_counter() - started, []
        for _ in range(args.repeats):
            started = time.perf_counter()
            results = run(args.users)
            samples.append(time.perf_counter() - started)
    if results:
        np.savez(args.results, **results)
    return {"first_batch_seconds": compiled, "samples": samples, "peak_bytes": peak.most or None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seen", type=int, default=32, help="seen items per user, which are not candidates")
    parser.add_argument("--batch", type=int, default=256, help="users scored at the same time")
    parser.add_argument("--chunk", type=int, default=8192, help="items scored at the same time")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/ranking.json"))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args)))
        return 0

    settings = {name: getattr(args, name) for name in ("users", "items", "width", "seen", "batch", "chunk", "repeats")}
    has_torch = util.find_spec("torch") is not None
    facts = harness.environment("iam_jax", "jax", "jaxlib", "numpy", *["torch"] * has_torch)
    gib, operations = args.items * args.width * 4 / 2**30, 2 * args.users * args.items * args.width
    print(f"{args.users:,} users x {args.items:,} items x {args.width} dimensions, float32, on {facts['device']}, {facts['date']}")
    print(f"batches of {args.batch:,} users, chunks of {args.chunk:,} items; the item vectors take {gib:.2f} GiB")
    print(harness.listed(facts["versions"]))
    if not has_torch:
        print("torch is not installed (extra `parity`), so there is no comparison")
    print(f"{'way':<16}{'seconds':>10}{'users/s':>10}{'GFLOP/s':>10}{'first s':>11}{'MiB':>9}{'relative':>10}")
    results, ranks = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for way, label in WAYS.items():
            if way != "iam_jax" and not has_torch:
                continue
            file = Path(folder) / f"{way}.npz"
            flags = [f"--{name}={value}" for name, value in settings.items()] + [f"--way={way}", f"--results={file}"]
            env = os.environ | {"JAX_PLATFORMS": "cpu"}
            done = subprocess.run([sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True, env=env, check=True)
            result = json.loads(done.stdout)
            beyond = result["peak_bytes"] and result["peak_bytes"] - args.items * args.width * 4
            result["bytes_beyond_item_vectors"] = beyond
            result["best_seconds"] = best = min(result["samples"])
            result["relative_to_iam_jax"] = best / results.get("iam_jax", result)["best_seconds"]
            results[way] = result
            if file.exists():
                ranks[way] = dict(np.load(file))
            memory = "-" if beyond is None else f"{beyond / 2**20:,.0f}"
            line = f"{label:<16}{best:>10,.2f}{args.users / best:>10,.0f}{operations / best / 1e9:>10,.0f}"
            line += f"{result['first_batch_seconds']:>11,.2f}{memory:>9}{result['relative_to_iam_jax']:>10.2f}"
            print(line, flush=True)
    first = ranks["iam_jax"]
    equal = all((found[name] == first[name]).all() for found in ranks.values() for name in first)
    median = int(np.median(first["rank"]))
    verdict = "equal" if equal else "NOT EQUAL"
    print(f"median rank {median:,}, {np.mean(first['ties'] > 0):.0%} with ties: {verdict} in all ways that give ranks")
    facts |= {"settings": settings, "equal": bool(equal), "median_rank": median}
    harness.save(args.output, facts | {"results": results})
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())

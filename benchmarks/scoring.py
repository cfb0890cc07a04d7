"""How much is saved by scoring many candidates in one pass over a user's history, rather than in one pass each?

    python benchmarks/scoring.py                        # 100 candidates of 12 tokens behind 25 items of 12 tokens
    python benchmarks/scoring.py --schedule='full*2' --candidates=20 --repeats=3

Log-likelihoods of the candidates' text by a small decoder with random parameters: all candidates behind one history in one row,
against a row with the history for each candidate, one row after another, and all of those rows as one batch. The three take turns.

ms: the median, compilation and the making of the rows left out; times: relative to one pass. MiB: temporaries of one call.
difference, relative: the largest over the candidates, against one by one; beyond 1e-5 of a score the exit code is 1. Prints one table
and writes one JSON.
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import jax
import ml_collections
import numpy as np

from iam_jax.config import Config, resolve
from iam_jax.data.candidates import candidate_rows
from iam_jax.data.catalogue import Catalogue
from iam_jax.likelihood import log_likelihoods
from iam_jax.model import Model, make_model

SCHEDULES = ["(intra inter)*2", "full*4", "(full full intra inter)*1"]
TOLERANCE = 1e-5  # of the score
ONE_PASS, ONE_BY_ONE = "one pass", "one by one"


def make_catalogue(items: int, item_tokens: int, vocabulary: int) -> Catalogue:
    """Items of random tokens, the last of each the boundary; no prompt, no suffix."""
    tokens = np.random.default_rng(0).integers(vocabulary - 1, size=(items, item_tokens), dtype=np.int32)
    tokens[:, -1] = vocabulary - 1
    return Catalogue(tokens.reshape(-1), np.append(np.arange(items + 1), [items] * 2) * item_tokens, vocabulary, 0, "")


def make_decoder(schedule: str, args: argparse.Namespace, row_tokens: int) -> Model:
    config = ml_collections.ConfigDict(dataclasses.asdict(Config()))
    config.data.update({"source": "synthetic", "row_tokens": row_tokens})
    config.model.update({"schedule": schedule, "width": args.width, "heads": args.heads, "dropout": 0.0})
    return make_model(resolve(config), args.vocabulary, args.history_items + args.candidates, args.item_tokens)


def random_params(model: Model, width: int) -> dict:
    """Normal numbers that keep the size of the states, around 1 in the norms' scales; drawn by NumPy: nothing to compile."""
    rng = np.random.default_rng(0)

    def leaf(path, x):
        is_scale = jax.tree_util.keystr(path[-1:], simple=True) == "scale"
        return (is_scale + width**-0.5 * rng.standard_normal(x.shape)).astype(x.dtype)

    return jax.device_put(jax.tree_util.tree_map_with_path(leaf, model.shapes()))


def ways_of(catalogue: Catalogue, args: argparse.Namespace) -> dict[str, list[dict]]:
    """The batches of each way; the candidates are in the same order in all."""
    history, candidates = np.split(np.arange(catalogue.items), [args.history_items])
    rows = functools.partial(candidate_rows, catalogue, max_tokens=(args.history_items + 1) * args.item_tokens)
    return {
        ONE_PASS: [rows([history], [candidates])],
        ONE_BY_ONE: [rows([history], [[candidate]]) for candidate in candidates],
        "one batch": [rows([history] * len(candidates), candidates[:, None])],
    }


def prepare(model: Model, params: dict, batches: list[dict]) -> tuple[Callable[[], np.ndarray], int]:
    """A function that gives the scores [candidates] by one compiled call for each batch, and the bytes of a call's temporaries."""
    batches = jax.device_put(batches)
    in_row = int(batches[0]["candidate"].max())
    call = jax.jit(lambda params, batch: log_likelihoods(model.bind(params), batch, in_row)).lower(params, batches[0]).compile()

    def run() -> np.ndarray:
        scores = [jax.block_until_ready(call(params, batch)) for batch in batches]
        return np.concatenate([np.asarray(x).reshape(-1) for x in scores])

    return run, call.memory_analysis().temp_size_in_bytes


def measure(schedule: str, args: argparse.Namespace) -> dict:
    catalogue = make_catalogue(args.history_items + args.candidates, args.item_tokens, args.vocabulary)
    ways = ways_of(catalogue, args)
    model = make_decoder(schedule, args, (args.history_items + 1) * args.item_tokens)
    params = random_params(model, args.width)
    prepared = {name: prepare(model, params, batches) for name, batches in ways.items()}
    scores = {name: run() for name, (run, _) in prepared.items()}  # the first run warms up
    samples = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, (run, _) in prepared.items():
            start = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - start)
    median = {name: statistics.median(seconds) for name, seconds in samples.items()}
    result = {"schedule": schedule, "ways": []}
    for name, batches in ways.items():
        difference = np.abs(scores[name] - scores[ONE_BY_ONE])
        way = {"way": name, "calls": len(batches), "row_tokens": batches[0]["token"].shape[1]}
        way |= {"tokens": sum(int((batch["user"] > 0).sum()) for batch in batches), "samples": samples[name]}
        way |= {"median_seconds": median[name], "relative_to_one_pass": median[name] / median[ONE_PASS]}
        way |= {"temporary_bytes": prepared[name][1], "largest_difference": float(difference.max())}
        way["largest_relative_difference"] = float((difference / np.abs(scores[ONE_BY_ONE])).max())
        result["ways"].append(way)
    result |= {"least_score": float(scores[ONE_BY_ONE].min()), "greatest_score": float(scores[ONE_BY_ONE].max())}
    result["equal"] = all(way["largest_relative_difference"] <= TOLERANCE for way in result["ways"])  # false for NaN
    return result


def print_result(result: dict) -> None:
    for number, way in enumerate(result["ways"]):
        line = f"{result['schedule'] if not number else '':<28}{way['way']:<12}{way['calls']:>6,}{way['tokens']:>9,}"
        line += f"{way['median_seconds'] * 1e3:>10,.1f}{way['relative_to_one_pass']:>8.1f}{way['temporary_bytes'] / 2**20:>9,.2f}"
        print(line + f"{way['largest_difference']:>12.1e}{way['largest_relative_difference']:>10.1e}")
    verdict = "equal" if result["equal"] else "NOT EQUAL"
    print(f"{'':<28}scores from {result['least_score']:.2f} to {result['greatest_score']:.2f}: {verdict} within {TOLERANCE:g} of the score")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", action="append", help=f"may be given several times; default: {', '.join(SCHEDULES)}")
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--history_items", type=int, default=25)
    parser.add_argument("--item_tokens", type=int, default=12, help="of every item, boundary included")
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/scoring.json"))
    args = parser.parse_args()
    args.schedule = args.schedule or SCHEDULES

    device, cores = jax.devices()[0], len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    where = device.device_kind if device.platform != "cpu" else f"CPU ({platform.machine()}, {cores} cores)"
    date = datetime.now(UTC).isoformat(timespec="seconds")
    names = ("iam_jax", "jax", "jaxlib", "flax", "numpy")
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in names}
    behind = f"{args.candidates:,} candidates behind {args.history_items:,} items of {args.item_tokens} tokens"
    print(f"log-likelihoods of {behind}, float32, on {where}, {date}")
    print(f"width {args.width}, {args.heads} heads, vocabulary {args.vocabulary:,}; median of {args.repeats} runs")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"{'schedule':<28}{'way':<12}{'calls':>6}{'tokens':>9}{'ms':>10}{'times':>8}{'MiB':>9}{'difference':>12}{'relative':>10}")
    results = []
    for schedule in args.schedule:
        results.append(measure(schedule, args))
        print_result(results[-1])
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    equal = all(result["equal"] for result in results)
    facts = {"device": where, "platform": device.platform, "date": date, "versions": versions, "settings": settings}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(facts | {"equal": equal, "results": results}, indent=2) + "\n")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())

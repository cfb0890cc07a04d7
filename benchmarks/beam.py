"""What does beam search over a catalogue's titles cost, beside the likelihood of every title in one pass?

    python benchmarks/beam.py                         # 1,000 items of 12 tokens behind 25 items of 12 tokens, 20 beams
    python benchmarks/beam.py --schedule='full*2' --items=200 --beams=10 --repeats=3

A small decoder with random parameters; the titles are random tokens in which a Zipf distribution makes beginnings common to many. Both
take the same users and take turns. The score of an item that beam search finds is exact, but it may miss items whose beginning is
unlikely: most of them here, where no training made beginnings tell of what follows.

ms: per user, the median, compilation and the making of the rows left out; times: relative to beam search. MiB: temporaries of one call.
found: of the items that the exhaustive ranking puts first, as many as there are beams, the share that the beam search has. relative:
the largest difference of an item's two scores, of the score; beyond 1e-5 the exit code is 1. Prints one table and writes one JSON.
"""

import argparse
import dataclasses
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

from iam_jax.beam import history_rows, make_trie, search
from iam_jax.config import Config, resolve
from iam_jax.data.candidates import candidate_rows
from iam_jax.data.catalogue import Catalogue
from iam_jax.likelihood import log_likelihoods
from iam_jax.model import Model, make_model

SCHEDULES = ["(intra inter)*2", "full*4", "(full full intra inter)*1"]
TOLERANCE = 1e-5  # of the score
BEAM, EXHAUSTIVE = "beam search", "exhaustive"


def make_catalogue(items: int, item_tokens: int, vocabulary: int) -> Catalogue:
    """Items of random tokens, the lower the commoner, the last of each the boundary; no prompt, no suffix."""
    tokens = (np.random.default_rng(0).zipf(1.3, (items, item_tokens)) % (vocabulary - 1)).astype(np.int32)
    tokens[:, -1] = vocabulary - 1
    return Catalogue(tokens.reshape(-1), np.append(np.arange(items + 1), [items] * 2) * item_tokens, vocabulary, 0, "")


def make_decoder(schedule: str, args: argparse.Namespace) -> Model:
    config = ml_collections.ConfigDict(dataclasses.asdict(Config()))
    config.data.update({"source": "synthetic", "row_tokens": (args.history_items + 1) * args.item_tokens})
    config.model.update({"schedule": schedule, "width": args.width, "heads": args.heads, "dropout": 0.0})
    return make_model(resolve(config), args.vocabulary, args.items, args.item_tokens)


def random_params(model: Model, width: int) -> dict:
    """Normal numbers that keep the size of the states, around 1 in the norms' scales; drawn by NumPy: nothing to compile."""
    rng = np.random.default_rng(0)

    def leaf(path, x):
        is_scale = jax.tree_util.keystr(path[-1:], simple=True) == "scale"
        return (is_scale + width**-0.5 * rng.standard_normal(x.shape)).astype(x.dtype)

    return jax.device_put(jax.tree_util.tree_map_with_path(leaf, model.shapes()))


def prepare(f: Callable, *inputs) -> tuple[Callable[[], tuple], int]:
    """A function that runs f compiled for the inputs, and the bytes of a call's temporaries."""
    inputs = jax.device_put(inputs)
    call = jax.jit(f).lower(*inputs).compile()
    return lambda: jax.block_until_ready(call(*inputs)), call.memory_analysis().temp_size_in_bytes


def measure(schedule: str, args: argparse.Namespace) -> dict:
    catalogue = make_catalogue(args.items, args.item_tokens, args.vocabulary)
    model = make_decoder(schedule, args)
    params = random_params(model, args.width)
    histories = list(np.random.default_rng(1).integers(args.items, size=(args.users, args.history_items)))
    max_tokens = (args.history_items + 1) * args.item_tokens
    every = candidate_rows(catalogue, histories, [np.arange(args.items)] * args.users, max_tokens)
    trie, before = make_trie(catalogue), history_rows(catalogue, histories, max_tokens)
    prepared = {
        BEAM: prepare(lambda params, trie, batch: search(model.bind(params), trie, batch, args.beams), params, trie, before),
        EXHAUSTIVE: prepare(lambda params, batch: log_likelihoods(model.bind(params), batch, args.items), params, every),
    }
    made = {name: run() for name, (run, _) in prepared.items()}  # the first run warms up
    samples = {name: [] for name in prepared}
    for _ in range(args.repeats):
        for name, (run, _) in prepared.items():
            start = time.perf_counter()
            run()
            samples[name].append((time.perf_counter() - start) / args.users)
    median = {name: statistics.median(seconds) for name, seconds in samples.items()}
    ways = [
        {
            "way": name,
            "seconds_per_user": median[name],
            "relative_to_beam_search": median[name] / median[BEAM],
            "temporary_bytes": prepared[name][1],
            "samples": samples[name],
        }
        for name in prepared
    ]
    items, scores = map(np.asarray, made[BEAM])
    likelihoods = np.asarray(made[EXHAUSTIVE])
    expected = np.take_along_axis(likelihoods, items, axis=1)
    best = np.argsort(-likelihoods, axis=1, kind="stable")[:, : args.beams]
    result = {"schedule": schedule, "ways": ways, "nodes": len(trie.edge_token) + 1, "sequences": trie.sequences, "degree": trie.degree}
    result["found"] = float(np.mean([np.isin(*pair).mean() for pair in zip(best, items, strict=True)]))
    result["largest_relative_difference"] = float((np.abs(scores - expected) / np.abs(expected)).max())
    result["equal"] = result["largest_relative_difference"] <= TOLERANCE  # false for NaN
    return result


def print_result(result: dict) -> None:
    for number, way in enumerate(result["ways"]):
        line = f"{result['schedule'] if not number else '':<28}{way['way']:<12}{way['seconds_per_user'] * 1e3:>10,.1f}"
        line += f"{way['relative_to_beam_search']:>8.2f}{way['temporary_bytes'] / 2**20:>9,.2f}"
        if not number:
            line += f"{result['found']:>8.2f}{result['largest_relative_difference']:>10.1e}{'' if result['equal'] else '  NOT EQUAL'}"
        print(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", action="append", help=f"may be given several times; default: {', '.join(SCHEDULES)}")
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--beams", type=int, default=20)
    parser.add_argument("--users", type=int, default=4, help="in one call")
    parser.add_argument("--history_items", type=int, default=25)
    parser.add_argument("--item_tokens", type=int, default=12, help="of every item, boundary included")
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/beam.json"))
    args = parser.parse_args()
    args.schedule = args.schedule or SCHEDULES

    device, cores = jax.devices()[0], len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    where = device.device_kind if device.platform != "cpu" else f"CPU ({platform.machine()}, {cores} cores)"
    date = datetime.now(UTC).isoformat(timespec="seconds")
    names = ("iam_jax", "jax", "jaxlib", "flax", "numpy")
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in names}
    behind = f"{args.items:,} items behind {args.history_items:,} items of {args.item_tokens} tokens"
    print(f"{args.beams} beams over {behind}, {args.users} users at a time, float32, on {where}, {date}")
    print(f"width {args.width}, {args.heads} heads, vocabulary {args.vocabulary:,}; median of {args.repeats} runs")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"{'schedule':<28}{'way':<12}{'ms':>10}{'times':>8}{'MiB':>9}{'found':>8}{'relative':>10}")
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

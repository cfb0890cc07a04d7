"""Measures how much time it saves to score many candidates in one pass over a user's history instead of one pass per candidate.

    python benchmarks/scoring.py                        # 100 candidates of 12 tokens after 25 items of 12 tokens
    python benchmarks/scoring.py --schedule='full*2' --candidates=20 --repeats=3

A small decoder with random parameters computes the log-likelihoods of the candidates' text in three ways, which take turns: all candidates
after one history in one row ("one pass"); one row with the history per candidate, one after another ("one by one"); all these rows in one
batch ("one batch").

ms: median, without compilation and without making the rows; times: relative to one pass. MiB: temporaries of one call. difference and
relative: the largest absolute and relative difference to one by one over the candidates; above 1e-5 of the score the exit code is 1. Prints
one table and writes one JSON file.
"""

import argparse
import functools
import sys
from collections.abc import Callable

import harness
import jax
import numpy as np

from iam_jax.data.candidates import candidate_rows
from iam_jax.data.catalogue import Catalogue
from iam_jax.model import Model
from iam_jax.ranking.likelihood import log_likelihoods

TOLERANCE = 1e-5  # relative to the score
ONE_PASS, ONE_BY_ONE = "one pass", "one by one"


def make_catalogue(args: argparse.Namespace) -> Catalogue:
    """Makes items of random tokens: those of the history, then the candidates."""
    size = args.history_items + args.candidates, args.item_tokens
    return harness.make_catalogue(np.random.default_rng(0).integers(args.vocabulary - 1, size=size, dtype=np.int32), args.vocabulary)


def ways_of(catalogue: Catalogue, args: argparse.Namespace) -> dict[str, list[dict]]:
    """Returns the batches of each way. The order of the candidates is the same in all."""
    history, candidates = np.split(np.arange(catalogue.items), [args.history_items])
    rows = functools.partial(candidate_rows, catalogue, max_tokens=(args.history_items + 1) * args.item_tokens)
    return {
        ONE_PASS: [rows([history], [candidates])],
        ONE_BY_ONE: [rows([history], [[candidate]]) for candidate in candidates],
        "one batch": [rows([history] * len(candidates), candidates[:, None])],
    }


def prepare(model: Model, params: dict, batches: list[dict]) -> tuple[Callable[[], np.ndarray], int]:
    """Returns a function that computes the scores [candidates] with one compiled call per batch, and the bytes of a call's temporaries."""
    batches = jax.device_put(batches)
    candidates = int(batches[0]["candidate"].max())
    call = jax.jit(lambda params, batch: log_likelihoods(model.bind(params), batch, candidates)).lower(params, batches[0]).compile()

    def run() -> np.ndarray:
        scores = [jax.block_until_ready(call(params, batch)) for batch in batches]
        return np.concatenate([np.asarray(x).reshape(-1) for x in scores])

    return run, call.memory_analysis().temp_size_in_bytes


def measure(schedule: str, args: argparse.Namespace) -> dict:
    catalogue = make_catalogue(args)
    ways = ways_of(catalogue, args)
    model = harness.make_decoder(schedule, args, catalogue.items)
    params = harness.random_params(model, args.width)
    prepared = {name: prepare(model, params, batches) for name, batches in ways.items()}
    timed = harness.take_turns({name: run for name, (run, _) in prepared.items()}, args.repeats)
    scores = {name: timing.first for name, timing in timed.items()}
    result = {"schedule": schedule, "ways": []}
    for name, batches in ways.items():
        difference = np.abs(scores[name] - scores[ONE_BY_ONE])
        way = {"way": name, "calls": len(batches), "row_tokens": batches[0]["token"].shape[1]}
        way |= {"tokens": sum(int((batch["user"] > 0).sum()) for batch in batches), "samples": timed[name].samples}
        way |= {"median_seconds": timed[name].median, "relative_to_one_pass": timed[name].median / timed[ONE_PASS].median}
        way |= {"temporary_bytes": prepared[name][1], "largest_difference": float(difference.max())}
        way["largest_relative_difference"] = float((difference / np.abs(scores[ONE_BY_ONE])).max())
        result["ways"].append(way)
    result |= {"least_score": float(scores[ONE_BY_ONE].min()), "greatest_score": float(scores[ONE_BY_ONE].max())}
    result["equal"] = all(way["largest_relative_difference"] <= TOLERANCE for way in result["ways"])  # False for NaN
    return result


def print_result(result: dict) -> None:
    for number, way in enumerate(result["ways"]):
        line = f"{result['schedule'] if not number else '':<28}{way['way']:<12}{way['calls']:>6,}{way['tokens']:>9,}"
        line += f"{way['median_seconds'] * 1e3:>10,.1f}{way['relative_to_one_pass']:>8.1f}{way['temporary_bytes'] / 2**20:>9,.2f}"
        print(line + f"{way['largest_difference']:>12.1e}{way['largest_relative_difference']:>10.1e}")
    verdict = "equal" if result["equal"] else "NOT EQUAL"
    print(f"{'':<28}scores from {result['least_score']:.2f} to {result['greatest_score']:.2f}: {verdict} within {TOLERANCE:g} of the score")


def main() -> int:
    args = harness.parse(__doc__, "scoring", candidates=(100, None))
    title = f"log-likelihoods of {args.candidates:,} candidates after {args.history_items:,} items of {args.item_tokens} tokens"
    columns = f"{'schedule':<28}{'way':<12}{'calls':>6}{'tokens':>9}{'ms':>10}{'times':>8}{'MiB':>9}{'difference':>12}{'relative':>10}"
    return harness.compare(args, title, columns, measure, print_result)


if __name__ == "__main__":
    sys.exit(main())

"""Compares the cost of beam search over a catalogue's titles with the likelihood of every title in one pass.

    python benchmarks/beam.py                         # 1,000 items of 12 tokens after 25 items of 12 tokens, 20 beams
    python benchmarks/beam.py --schedule='full*2' --items=200 --beams=10 --repeats=3

The decoder is small and has random parameters. The titles are random tokens from a Zipf distribution, so that many titles begin alike. Both
ways get the same users and take turns. The scores of the items that beam search finds are exact, but it may miss items whose first tokens
are unlikely. It misses most of them here, because without training the first tokens say nothing about the rest.

ms: median per user, without compilation and without making the rows; times: relative to beam search. MiB: temporaries of one call. found:
share of the best items by exhaustive ranking (as many as there are beams) that beam search finds. relative: largest difference between an
item's two scores, relative to the score; above 1e-5 the exit code is 1. Prints one table and writes one JSON file.
"""

import argparse
import sys
from collections.abc import Callable

import harness
import jax
import numpy as np

from iam_jax.data.candidates import candidate_rows
from iam_jax.data.catalogue import Catalogue
from iam_jax.ranking.beam import history_rows, make_trie, search
from iam_jax.ranking.likelihood import log_likelihoods

TOLERANCE = 1e-5  # relative to the score
BEAM, EXHAUSTIVE = "beam search", "exhaustive"


def make_catalogue(args: argparse.Namespace) -> Catalogue:
    """Makes items of random tokens; smaller tokens are more common."""
    tokens = np.random.default_rng(0).zipf(1.3, (args.items, args.item_tokens)) % (args.vocabulary - 1)
    return harness.make_catalogue(tokens, args.vocabulary)


def prepare(f: Callable, *inputs) -> tuple[Callable[[], tuple], int]:
    """Compiles f for the inputs. Returns a function that runs it, and the bytes of its temporaries."""
    inputs = jax.device_put(inputs)
    call = jax.jit(f).lower(*inputs).compile()
    return lambda: jax.block_until_ready(call(*inputs)), call.memory_analysis().temp_size_in_bytes


def measure(schedule: str, args: argparse.Namespace) -> dict:
    catalogue = make_catalogue(args)
    model = harness.make_decoder(schedule, args, args.items)
    params = harness.random_params(model, args.width)
    histories = list(np.random.default_rng(1).integers(args.items, size=(args.users, args.history_items)))
    max_tokens = (args.history_items + 1) * args.item_tokens
    all_candidates = candidate_rows(catalogue, histories, [np.arange(args.items)] * args.users, max_tokens)
    trie, history_batch = make_trie(catalogue), history_rows(catalogue, histories, max_tokens)
    prepared = {
        BEAM: prepare(lambda params, trie, batch: search(model.bind(params), trie, batch, args.beams), params, trie, history_batch),
        EXHAUSTIVE: prepare(lambda params, batch: log_likelihoods(model.bind(params), batch, args.items), params, all_candidates),
    }
    timed = harness.take_turns({name: run for name, (run, _) in prepared.items()}, args.repeats)
    ways = [
        {
            "way": name,
            "seconds_per_user": timed[name].median / args.users,
            "relative_to_beam_search": timed[name].median / timed[BEAM].median,
            "temporary_bytes": prepared[name][1],
            "samples": [seconds / args.users for seconds in timed[name].samples],
        }
        for name in prepared
    ]
    items, scores = map(np.asarray, timed[BEAM].first)
    likelihoods = np.asarray(timed[EXHAUSTIVE].first)
    expected = np.take_along_axis(likelihoods, items, axis=1)
    best = np.argsort(-likelihoods, axis=1, kind="stable")[:, : args.beams]
    result = {"schedule": schedule, "ways": ways, "nodes": len(trie.edge_token) + 1, "sequences": trie.sequences, "degree": trie.degree}
    result["found"] = float(np.mean([np.isin(*pair).mean() for pair in zip(best, items, strict=True)]))
    result["largest_relative_difference"] = float((np.abs(scores - expected) / np.abs(expected)).max())
    result["equal"] = result["largest_relative_difference"] <= TOLERANCE  # False for NaN
    return result


def print_result(result: dict) -> None:
    for number, way in enumerate(result["ways"]):
        line = f"{result['schedule'] if not number else '':<28}{way['way']:<12}{way['seconds_per_user'] * 1e3:>10,.1f}"
        line += f"{way['relative_to_beam_search']:>8.2f}{way['temporary_bytes'] / 2**20:>9,.2f}"
        if not number:
            line += f"{result['found']:>8.2f}{result['largest_relative_difference']:>10.1e}{'' if result['equal'] else '  NOT EQUAL'}"
        print(line)


def main() -> int:
    args = harness.parse(__doc__, "beam", items=(1000, None), beams=(20, None), users=(4, "users per call"))
    items = f"{args.items:,} items after {args.history_items:,} items of {args.item_tokens} tokens"
    title = f"{args.beams} beams over {items}, {args.users} users at a time"
    columns = f"{'schedule':<28}{'way':<12}{'ms':>10}{'times':>8}{'MiB':>9}{'found':>8}{'relative':>10}"
    return harness.compare(args, title, columns, measure, print_result)


if __name__ == "__main__":
    sys.exit(main())

"""Compares training steps on MovieLens-1M that compute the leading intra layers once per distinct item or once per token.

    python benchmarks/item_states.py --path=DIR                   # the folder with ratings.dat and movies.dat
    python benchmarks/item_states.py --path=DIR --rows=16 --schedule="intra*2 inter*2"

Both ways have the same parameters and batches, and no dropout. Loss and gradients must agree within rounding; otherwise the exit code is 1.
Steps of the two ways alternate. The result is the ratio of the medians. Prints one table and writes one JSON file.
"""

import argparse
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import harness
import jax
import numpy as np

from iam_jax.config import default_config, resolve
from iam_jax.data.batches import training_batches
from iam_jax.data.item_rows import DistinctItems, without_items
from iam_jax.data.prepare import prepare
from iam_jax.devices.mesh import shard_batch
from iam_jax.training import objectives
from iam_jax.training.run import make_run
from iam_jax.training.step import init_state, make_train_step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", required=True, help="folder of MovieLens-1M")
    parser.add_argument("--schedule", default="intra*4 inter*4")
    parser.add_argument("--vectors", choices=("table", "text", "both"), default="table", help="objective.vectors")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--row_tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batches", type=int, default=5, help="number of timed batches, after one warm-up batch")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/item_states.json"))
    args = parser.parse_args()

    config = default_config()
    config.data.update(source="ml1m", path=args.path, row_tokens=args.row_tokens)
    config.model.update(schedule=args.schedule, width=args.width, dropout=0.0, item_states="off")
    config.objective.vectors = args.vectors
    config.train.batch_rows = args.rows
    config = resolve(config)
    run = make_run(config, prepare(config.data))
    shards = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    finishes = {
        "per token": without_items,
        "per item": DistinctItems(run.rows, args.rows, multiple=shards, targets=args.vectors != "table"),
    }

    with jax.set_mesh(run.mesh):
        params = init_state(run)["params"]
        raw = list(zip(range(args.batches + 1), training_batches(run.rows, args.rows, seed=0), strict=False))
        batches = {way: [shard_batch(run.mesh, finish(batch)) for _, batch in raw] for way, finish in finishes.items()}

        @jax.jit
        def gradient(params, batch, items):
            key = jax.random.key(0, impl="rbg")

            def loss(params):
                sums = objectives.losses(run.model.bind(params), config, items, batch, key, None)
                return sums["item"] / objectives.counts(batch)["item"]

            return jax.value_and_grad(loss)(params)

        losses, gradients = zip(*(jax.device_get(gradient(params, batches[way][0], run.items)) for way in finishes), strict=True)
        difference = max(
            float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in zip(*(jax.tree.leaves(g) for g in gradients), strict=True)
        )
        step = make_train_step(run)

        def make_next_step(way: str) -> Callable[[], None]:
            """Returns a function that does the next training step."""
            state, numbered = init_state(run), enumerate(batches[way])

            def next_step() -> None:
                nonlocal state
                number, batch = next(numbered)
                state, _ = step(state, batch, run.items, np.int32(number))
                jax.block_until_ready(state)

            return next_step

        timed = harness.take_turns({way: make_next_step(way) for way in finishes}, args.batches)

    batch = raw[0][1]
    distinct = finishes["per item"].distinct(batch)
    groups = ((np.diff(batch["group"], prepend=-1) != 0) | (np.diff(batch["user"], prepend=-1) != 0)) & (batch["user"] > 0)
    counts = {
        "slots": int(batch["token"].size),
        "tokens": int((batch["user"] > 0).sum()),
        "occurrences": int(groups.sum()),
        "distinct items": len(distinct),
        "tokens of distinct items": int(run.prepared.catalogue.lengths[distinct].sum()),
    }
    ratio = timed["per token"].median / timed["per item"].median
    print(f"\n{args.schedule}, width {args.width}, objective.vectors {args.vectors}, {args.rows} rows of {args.row_tokens} slots")
    print("; ".join(f"{value:,} {name}" for name, value in counts.items()))
    print(f"loss {losses[0]:.6f} per token, {losses[1]:.6f} per item")
    print(f"gradients differ by at most {difference:.1e} of each array's largest value")
    for way, timing in timed.items():
        spread = f"median of {len(timing.samples)}; {min(timing.samples) * 1e3:,.0f} to {max(timing.samples) * 1e3:,.0f}"
        print(f"{way:10} {timing.median * 1e3:10,.0f} ms per step ({spread})")
    print(f"ratio      {ratio:10.2f}")
    agree = abs(losses[0] - losses[1]) <= 1e-5 * abs(losses[0]) and difference <= 1e-3
    record = {
        "arguments": harness.settings(args, "path"),
        "batch": counts, "loss": [float(x) for x in losses], "gradients_apart": difference,
        "seconds": {way: timing.samples for way, timing in timed.items()}, "ratio": ratio, "agree": agree,
        "device": jax.devices()[0].device_kind, "jax": metadata.version("jax"), "python": platform.python_version(),
    }  # fmt: skip
    harness.save(args.output, record)
    print(f"wrote {args.output}")
    if not agree:
        print("error: loss or gradients do not agree", file=sys.stderr)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())

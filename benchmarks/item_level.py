"""Compares item-level layers with layers over tokens, and with SASRec: events a second in training and in scoring.

    python benchmarks/item_level.py --path=DIR                         # a folder with interactions.* and items.*
    python benchmarks/item_level.py --path=DIR --row_items=256         # longer histories, as those of MovieLens-1M

All ways have the same width, number of heads and loss (the exact softmax over the item table). The ways over text differ in the schedule
only: `(intra inter)*2` over tokens and `intra*2 | inter*2`. `| inter*2` with given vectors (tf-idf) is compared with SASRec, `full*2` over
one id token per item. Steps and calls of the two ways of a ratio alternate. The results are the ratios of the medians. Prints one table
and writes one JSON file.
"""

from iam_jax.devices.memory import keep_freed_memory

keep_freed_memory()  # as the command line does, before the other imports start threads

import argparse  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import harness  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402

from iam_jax.config import default_config, resolve  # noqa: E402
from iam_jax.data.batches import Rows, training_batches  # noqa: E402
from iam_jax.data.prepare import prepare  # noqa: E402
from iam_jax.data.splits import TEST  # noqa: E402
from iam_jax.devices.mesh import shard_batch  # noqa: E402
from iam_jax.model.parameters import join  # noqa: E402
from iam_jax.ranking.evaluate import Evaluator  # noqa: E402
from iam_jax.training.run import make_run  # noqa: E402
from iam_jax.training.step import init_state, make_train_step  # noqa: E402

WAYS = {
    "tokens": {"model.schedule": "(intra inter)*2"},
    "items": {"model.schedule": "intra*2 | inter*2"},
    "items, given vectors": {
        "model.schedule": "| inter*2", "model.item_input": "table", "data.vectors": "tfidf", "objective.vectors": "both",
    },
    "SASRec": {"model.schedule": "full*2", "data.tokenizer": "id", "model.tie_items": True},
}  # fmt: skip
RATIOS = (("items", "tokens"), ("items, given vectors", "SASRec"))


def config_of(args: argparse.Namespace, way: str):
    config = default_config()
    config.data.update(source="table", path=args.path, untitled="drop", text=args.text, item_tokens=args.item_tokens, context_items=10)
    # A row of tokens holds about as many items as a row of items.
    per_item = 1 if way == "SASRec" else args.item_tokens
    config.data.update(row_items=args.row_items, row_tokens=args.row_items * per_item, vector_size=args.vector_size)
    config.model.update(width=args.width, heads=args.heads, dropout=0.0)
    config.objective.chunk = args.chunk
    config.train.batch_rows = args.rows
    config.log.progress = False
    config.update_from_flattened_dict(WAYS[way])
    return resolve(config)


def training(run, batches: int) -> tuple[Callable[[], int], float]:
    """A function that does the next training step, and the mean number of targets of a step."""
    config = run.config
    raw = list(zip(range(batches + 1), training_batches(run.rows, config.train.batch_rows, 0, finish=run.finish), strict=False))
    targets = float(np.mean([(batch["target"] >= 0).sum() for _, batch in raw[1:]]))
    placed = iter([(number, shard_batch(run.mesh, batch)) for number, batch in raw])
    step, state = make_train_step(run), init_state(run)

    def next_step() -> int:
        nonlocal state
        number, batch = next(placed)
        state, _ = step(state, batch, run.items, np.int32(number), run.frozen)
        jax.block_until_ready(state)
        return number

    return next_step, targets


def scoring(run, params, users: int) -> tuple[Callable[[], np.ndarray], int]:
    """A function that computes the vectors of some histories, and the number of events in them."""
    evaluator = Evaluator(run.model, run.config, run.prepared, run.mesh)
    targets = run.prepared.events.targets(TEST)[:users]
    rows: Rows = evaluator.rows(targets)
    leading_XD = jax.block_until_ready(evaluator.leading_states(params, rows))
    events = int((rows.segments.stop - rows.segments.start).sum())
    return lambda: evaluator.ranker.history_vectors(params, rows, leading_XD), events


def on_mesh(call: Callable, mesh: jax.sharding.Mesh) -> Callable:
    def called():
        with jax.set_mesh(mesh):
            return call()

    return called


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", required=True, help="folder with interactions.* and items.*")
    parser.add_argument("--text", default="{title}", help="data.text")
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch")
    parser.add_argument("--row_items", type=int, default=64, help="item slots of a row; rows of tokens are item_tokens times as long")
    parser.add_argument("--item_tokens", type=int, default=10)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--vector_size", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=128, help="objective.chunk")
    parser.add_argument("--users", type=int, default=1024, help="histories that are scored")
    parser.add_argument("--batches", type=int, default=5, help="number of timed steps and calls, after one warm-up")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/item_level.json"))
    args = parser.parse_args()

    results: dict[str, dict[str, float]] = {way: {} for way in WAYS}
    counts: dict[str, dict[str, float]] = {}
    for pair in RATIOS:  # only two ways are in memory at a time: others would slow them down
        steps, calls = {}, {}
        for way in pair:
            config = config_of(args, way)
            run = make_run(config, prepare(config.data))
            with jax.set_mesh(run.mesh):
                params = join(init_state(run)["params"], run.frozen)
                step, targets = training(run, args.batches)
                call, events = scoring(run, params, args.users)
            steps[way], calls[way] = on_mesh(step, run.mesh), on_mesh(call, run.mesh)
            counts[way] = {"targets a step": targets, "events scored": events}
        for what, functions, count in (("training", steps, "targets a step"), ("scoring", calls, "events scored")):
            for way, timed in harness.take_turns(functions, args.batches).items():
                results[way][what] = counts[way][count] / timed.median
    print(f"\nevents a second; width {args.width}, {args.rows} rows of {args.row_items} items, {args.users} histories scored")
    for way, row in results.items():
        print(f"{way:22} {row['training']:10,.0f} training {row['scoring']:10,.0f} scoring")
    ratios = {f"{a} : {b}": {what: results[a][what] / results[b][what] for what in results[a]} for a, b in RATIOS}
    for name, row in ratios.items():
        print(f"{name:30} {row['training']:6.2f} training {row['scoring']:6.2f} scoring")
    record = harness.environment("iam_jax", "jax", device=jax.devices()[0]) | {"settings": harness.settings(args)}
    harness.save(args.output, record | {"counts": counts, "events_per_second": results, "ratios": ratios})
    return 0


if __name__ == "__main__":
    sys.exit(main())

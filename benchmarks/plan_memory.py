"""Compares the planned memory of a training step with measured memory: the compiler's temporaries, and the growth of the process.

    python benchmarks/plan_memory.py
    python benchmarks/plan_memory.py --rows=128 --schedule='full*4'

This runs on the CPU, where device memory is the memory of the process. `--mode=plan --topology=local` reads the same analysis of the
compiler. The step is compiled, its state and batch are made, and resident memory is sampled while the step runs once. Prints one line and
writes one JSON file.
"""

import argparse
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import harness
import jax
import numpy as np

from iam_jax.config import default_config, resolve
from iam_jax.data.assumed import Assumption, assume
from iam_jax.devices.mesh import shard_batch
from iam_jax.planning.plan import batch_of_rows, training, training_arguments
from iam_jax.training.run import make_run
from iam_jax.training.step import init_state, make_train_step


def resident() -> int:
    """The resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--row_tokens", type=int, default=1024)
    parser.add_argument("--schedule", default="(intra inter)*2")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/plan_memory.json"))
    args = parser.parse_args()

    config = default_config()
    config.data.update(source="synthetic", row_tokens=args.row_tokens)
    config.model.update(schedule=args.schedule, dropout=0.0, item_states="off")
    config.train.batch_rows = args.rows
    config = resolve(config)
    prepared, _ = assume(config.data, Assumption(items=1000, item_length=12, users=2000, events=50), vocabulary=1000)
    run = make_run(config, prepared)
    (program,) = training(run)
    with jax.set_mesh(run.mesh):
        step = make_train_step(run).lower(*training_arguments(run)).compile()
        state = init_state(run)
        batch = shard_batch(run.mesh, run.finish(batch_of_rows(run.rows, args.rows)))
        arguments = jax.block_until_ready((state, batch, run.items, np.int32(0), run.frozen))
        del state
        with harness.Peak(resident) as peak:
            jax.block_until_ready(step(*arguments))
    growth = peak.most - peak.before
    share = growth / program.temporaries
    sizes = f"{program.temporaries / 2**30:.2f} GiB planned, resident memory grows by {growth / 2**30:.2f} GiB"
    print(f"{args.schedule}, {args.rows} rows of {args.row_tokens:,}: {sizes}, ratio {share:.2f} ({peak.samples} samples)")
    facts = harness.environment("jax", "jaxlib")
    harness.save(args.output, facts | {"settings": harness.settings(args), "planned": program.temporaries, "grown": growth})
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()

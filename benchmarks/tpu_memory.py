"""Compares the temporary memory of a whole training step on a TPU with the Pallas kernel and with the dense reference, without a TPU.

    python benchmarks/tpu_memory.py                              # v5p, rows of 2,048 to 16,384 tokens; about three minutes
    python benchmarks/tpu_memory.py --chip=v6e --lengths=2048,4096

libtpu (extra `tpu`) compiles the step (decoder, objectives, gradients, AdamW) ahead of time on any machine, and the benchmark reads the
memory analysis of the compiler. Nothing runs. The temporaries of the kernel should grow linearly with the length, those of the reference
quadratically. Prints one table and writes one JSON file. Only one process at a time can use libtpu.
"""

import argparse
import os
import platform
from importlib import metadata
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import harness
import jax
import ml_collections

from iam_jax.config import Config, default_config, resolve
from iam_jax.data.assumed import Assumption, assume
from iam_jax.devices import topology
from iam_jax.planning.plan import training_arguments
from iam_jax.training.run import Run, make_run
from iam_jax.training.step import make_train_step

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
ITEM = 12  # tokens per item
MODEL = {"schedule": "intra inter full", "width": 256, "heads": 4, "kv_heads": 2, "mlp_width": 512, "dtype": "bfloat16"}


def make_config(row_tokens: int, rows: int, **model) -> ml_collections.ConfigDict:
    config = default_config()
    config.data.update(source="synthetic", row_tokens=row_tokens)
    config.model.update(MODEL | model)
    config.objective.update(token=1.0, chunk=1024)
    config.train.batch_rows = rows
    return config


def compile_step(chip: str, mesh_shape: tuple[int, int, int], row_tokens: int, rows: int, **model):
    """Returns the compiled training step (jax.stages.Compiled) for the first devices of a slice. model: fields that override MODEL."""
    config = make_config(row_tokens, rows, **model)
    config.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh_shape, strict=True)))
    return compile_run(assumed_run(resolve(config), CHIPS[chip], items=1000, vocabulary=1000))


def assumed_run(config: Config, slice_name: str, items: int, vocabulary: int) -> Run:
    """Makes a run with assumed data, on as many of the first devices of a TPU slice as the mesh of the config has."""
    mesh = config.mesh
    topology.prepare(slice_name)
    devices = topology.devices(slice_name)[: mesh.data * mesh.fsdp * mesh.tensor]
    events = max(20, config.data.row_tokens // ITEM)  # per user, so that the items of a user fill a row
    prepared, _ = assume(config.data, Assumption(items, ITEM, users=100, events=events), vocabulary)
    return make_run(config, prepared, devices)


def compile_run(run: Run):
    with jax.set_mesh(run.mesh):
        return make_train_step(run).lower(*training_arguments(run)).compile()


def temporaries(compiled) -> int:
    """Returns the bytes of temporaries."""
    return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=CHIPS, default="v5p")
    parser.add_argument("--lengths", default="2048,4096,8192,16384", help="tokens per row, separated by commas")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/tpu_memory.json"))
    args = parser.parse_args()
    lengths = [int(length) for length in args.lengths.split(",")]

    results: dict[str, dict[int, float | None]] = {}
    for implementation in ("tpu", "reference"):
        results[implementation] = {}
        for length in lengths:
            try:
                size = temporaries(compile_step(args.chip, (1, 1, 1), length, args.rows, attention=implementation)) / 2**20
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                size = None
            results[implementation][length] = size
            print(f"{implementation}, {length:,} tokens: {'does not fit' if size is None else f'{size:,.0f} MiB'}", flush=True)

    print(f"\ntemporaries of a training step on one {args.chip}, {args.rows} rows, MiB; {MODEL}")
    print(f"{'':12}" + "".join(f"{length:>12,}" for length in lengths) + f"{'growth':>12}")
    for implementation, sizes in results.items():
        first, last = sizes[lengths[0]], sizes[lengths[-1]]
        growth = "" if first is None or last is None else f"{last / first:.1f}"
        print(f"{implementation:12}" + "".join(f"{'-' if x is None else f'{x:,.0f}':>12}" for x in sizes.values()) + f"{growth:>12}")
    versions = {name: metadata.version(name) for name in ("jax", "libtpu")}
    record = {
        "chip": args.chip,
        "rows": args.rows,
        "model": MODEL,
        "mib": results,
        "versions": versions,
        "python": platform.python_version(),
    }
    harness.save(args.output, record)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()

"""Shows the memory per device for training pretrained models: the configs of real models, compiled for TPUs that are not attached.

    python benchmarks/pretrained_memory.py
    python benchmarks/pretrained_memory.py --configs=gpt2_ml1m --variants=lora --slices=v5p:2x2x1

Only the shape of a model is needed: its public config.json is written into a temporary folder. libtpu (extra `tpu`) compiles the whole
training step (train.batch_rows rows of data.row_tokens, gradients, AdamW) ahead of time on any machine, and the benchmark reads the memory
analysis of the compiler. The code of the program, 0.15 GiB for a 1B model, is not included. Nothing is allocated or run. Prints one table
and writes one JSON file. Only one process at a time can use libtpu.
"""

import argparse
import json
import platform
import runpy
import tempfile
from importlib import metadata
from pathlib import Path

from tpu_memory import assumed_run  # isort: skip  (must come first, because it sets the platform)

import harness

from iam_jax.config import Config, resolve
from iam_jax.model import pretrained
from iam_jax.model.pretrained.importing import read_pretrained
from iam_jax.planning.plan import Program, training

CONFIGS = Path(__file__).parents[1] / "configs"
SLICES = {"v5e:2x4": (1, 8, 1), "v5p:2x2x1": (1, 1, 1)}  # slice: mesh of data x fsdp x tensor on its first chips
ITEMS = {"llama3_1b_amazon": 11_758, "qwen3_0_6b_amazon": 11_758, "gpt2_ml1m": 3_416}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHAPES: dict[str, dict] = {
    "llama3_1b_amazon": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192},
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
    },
    "qwen3_0_6b_amazon": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": True,
    },
    "gpt2_ml1m": {"model_type": "gpt2", "vocab_size": 50_257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
}


def write_shape(name: str, folder: Path, shape: dict | None = None) -> None:
    """Writes the model's config.json. shape: values that replace the public ones."""
    (folder / "config.json").write_text(json.dumps(SHAPES[name] | (shape or {})))


def make_config(name: str, variant: str, folder: Path, mesh_shape: tuple[int, int, int], shape: dict | None = None, **model) -> Config:
    """Makes the config of a config file, with the model's config.json in `folder`.

    shape: values that replace those of the public config.json. model: further fields of config.model.
    """
    write_shape(name, folder, shape)
    config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](variant)
    config.model.update(pretrained=str(folder), attention="tpu", **model)
    config.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh_shape, strict=True)))
    return pretrained.configure(resolve(config))


def measure(config: Config, chips: str, items: int) -> Program:
    (program,) = training(assumed_run(config, chips, items, read_pretrained(config).vocabulary + 1))
    return program


def facts(program: Program) -> dict:
    """Returns bytes per device. Those from the compiler are None if the step does not fit."""
    result = {kind.replace("parameters, ", ""): size for kind, size in program.held.items()}
    total = program.total if program.temporaries is None else program.total - program.code
    result |= {"temporaries": program.temporaries, "total": total, "fits": program.temporaries is not None}
    return result | {"compile_seconds": program.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", default=",".join(SHAPES))
    parser.add_argument("--variants", default="lora,full")
    parser.add_argument("--slices", default=",".join(SLICES))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/pretrained_memory.json"))
    args = parser.parse_args()

    columns = ("trained", "frozen", "optimizer", "temporaries", "total")
    rows = []
    print(f"GiB per device\n{'config':20}{'variant':9}{'slice':11}{'rows':>5}" + "".join(f"{column:>13}" for column in columns))
    for name in args.configs.split(","):
        for variant in args.variants.split(","):
            for chips in args.slices.split(","):
                with tempfile.TemporaryDirectory() as folder:
                    config = make_config(name, variant, Path(folder), SLICES[chips])
                    row = {"config": name, "variant": variant, "slice": chips, "mesh": SLICES[chips]}
                    row |= {"rows": config.train.batch_rows, "row_tokens": config.data.row_tokens}
                    row |= facts(measure(config, chips, ITEMS[name]))
                rows.append(row)
                sizes = ("-" if row[column] is None else f"{row[column] / 2**30:.2f}" for column in columns)
                shown = "".join(f"{size:>13}" for size in sizes) + ("" if row["fits"] else "   does not fit")
                print(f"{name:20}{variant:9}{chips:11}{row['rows']:>5}{shown}", flush=True)
    record = {"rows": rows, "versions": {package: metadata.version(package) for package in ("jax", "libtpu")}}
    harness.save(args.output, record | {"python": platform.python_version()})
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()

"""Measures how much anonymous memory the import of a pretrained model needs in addition to its parameters.

    python benchmarks/import_memory.py                           # a billion parameters: 2 GB of disk and of memory, one minute
    python benchmarks/import_memory.py --parameters=2e6 --dtype=float32

Writes a LLaMA-shaped checkpoint in bf16 and several files into a temporary folder, imports it in a separate process, and samples the
RssAnon of that process (Linux: /proc/self/status) every two milliseconds. The import may add at most 1.1 times the bytes of the parameters
plus twice those of the largest tensor; otherwise the exit code is 1. Prints one table and writes one JSON file.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import harness
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from iam_jax.config import Config, DataConfig, ModelConfig
from iam_jax.model import make_model, pretrained
from iam_jax.model.parameters import select
from iam_jax.model.pretrained.importing import read_pretrained

FILES, BOUND = 4, 1.1
_VOCABULARY, _WIDTH, _LAYERS = 128_256, 2048, 16  # as in LLaMA 3.2 1B (1.24 billion parameters), except for the MLP


def settings(parameters: float) -> dict:
    """Returns the values of a config.json for about this many parameters."""
    scale = (parameters / 1e9) ** 0.5  # both V x D and D x D are proportional to its square
    D = max(int(_WIDTH * scale) // 64, 1) * 64
    values = {"model_type": "llama", "vocab_size": int(_VOCABULARY * scale) + 1, "hidden_size": D, "num_hidden_layers": _LAYERS}
    values |= {"num_attention_heads": D // 64, "num_key_value_heads": D // 64, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    return values | {"intermediate_size": int((parameters - values["vocab_size"] * D) / _LAYERS / (3 * D) - 4 * D / 3)}


def make_config(folder: str) -> Config:
    model = ModelConfig(pretrained=folder, schedule=f"full*{_LAYERS}")
    return pretrained.configure(Config(data=DataConfig(source="synthetic", tokenizer="pretrained"), model=model))


def write_checkpoint(folder: Path, parameters: float) -> None:
    (folder / "config.json").write_text(json.dumps(settings(parameters)))
    shapes = read_pretrained(make_config(str(folder))).shapes()
    names, weight_map = list(shapes), {}
    for k in range(FILES):
        file_names = names[k * len(names) // FILES : (k + 1) * len(names) // FILES]
        file = f"model-{k + 1:05}-of-{FILES:05}.safetensors"
        tensors = {name: np.full(shapes[name], 1 + k, ml_dtypes.bfloat16) for name in file_names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(file_names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def anonymous_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon:"))


def measure(folder: str, dtype: str) -> dict:
    """Imports the checkpoint, in a separate process, and returns the bytes before, at the peak and after."""
    config = make_config(folder)
    shapes = make_model(config, vocabulary=settings_of(folder)["vocab_size"] + 1, items=2).shapes()
    names = pretrained.names(config)
    abstract = select(shapes, lambda name: name in names)
    jax.block_until_ready(jax.jit(lambda: jnp.zeros(8))())  # initialises the platform before memory is measured
    with harness.Peak(anonymous_bytes) as peak:
        start = time.perf_counter()
        params = jax.block_until_ready(pretrained.load(config, abstract, dtype))
        seconds = time.perf_counter() - start
    leaves = jax.tree.leaves(params)
    largest = max(int(np.prod(shape)) for shape in read_pretrained(config).shapes().values()) * leaves[0].dtype.itemsize
    return {
        "parameters": sum(x.size for x in leaves),
        "parameter_bytes": sum(x.nbytes for x in leaves),
        "largest_tensor_bytes": largest,
        "before_bytes": peak.before,
        "peak_bytes": peak.most,
        "after_bytes": anonymous_bytes(),
        "samples": peak.samples,
        "seconds": seconds,
    }


def settings_of(folder: str) -> dict:
    return json.loads((Path(folder) / "config.json").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the parameters; the files are bf16")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/import_memory.json"))
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.dtype)))
        return 0

    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), args.parameters)
        command = [sys.executable, __file__, f"--measure={folder}", f"--dtype={args.dtype}"]
        result = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
    result["added_bytes"] = result["peak_bytes"] - result["before_bytes"]
    result["bound_bytes"] = int(BOUND * result["parameter_bytes"]) + 2 * result["largest_tensor_bytes"]
    result["share_of_bound"] = result["added_bytes"] / result["bound_bytes"]
    result |= {"files": FILES, "file_dtype": "bfloat16", "dtype": args.dtype, "holds": result["share_of_bound"] <= 1}
    result |= {"versions": {name: metadata.version(name) for name in ("jax", "safetensors")}, "python": platform.python_version()}

    print(f"import of {result['parameters']:,} parameters, bf16 in {FILES} files, to {args.dtype}: {result['seconds']:.1f} s")
    rows = {
        "parameters": "parameter_bytes",
        "largest tensor": "largest_tensor_bytes",
        "anonymous memory before": "before_bytes",
        "added, at most": "added_bytes",
        "bound: 1.1 x parameters + 2 x largest": "bound_bytes",
    }
    for label, key in rows.items():
        print(f"{label:40}{result[key] / 2**20:>10,.1f} MiB")
    print(f"{'added / bound':40}{result['share_of_bound']:>10.3f}{'' if result['holds'] else '   EXCEEDED'}")
    harness.save(args.output, result)
    print(f"wrote {args.output}")
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())

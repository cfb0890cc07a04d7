"""Plans training of LLaMA 3 with 1B and 8B parameters on TPU slices, without the slices. Makes the table of docs/planning.md.

    python benchmarks/planning.py
    python benchmarks/planning.py --models=8b --variants=lora --slices=v5p:2x4x4

A model is given by its public shape, a config.json in --folder without weights. Every plan is one `--mode=plan` command of
configs/llama3_1b_amazon.py with the model's own layers in the schedule and one row of 1,024 tokens per chip. The commands are printed.
Prints one table and writes one JSON file. Needs libtpu (extra `tpu`); a plan takes minutes.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import harness
from pretrained_memory import LLAMA3, SHAPES

CONFIG = Path(__file__).parents[1] / "configs" / "llama3_1b_amazon.py"
ONE_B = SHAPES["llama3_1b_amazon"]
MODELS = {
    "1b": ONE_B,
    "8b": ONE_B
    | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "head_dim": 128, "tie_word_embeddings": False}
    | {"rope_scaling": LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 8192}},
}
SLICES = {"v5e:2x4": 8, "v6e:4x4": 16, "v5p:2x4x4": 32}
COLUMNS = ("trained", "frozen", "optimizer", "temporaries", "total", "ms per step", "tokens/s", "USD per epoch")


def command(model: str, variant: str, slice_name: str, folder: Path, items: int, output: Path) -> list[str]:
    layers, chips = MODELS[model]["num_hidden_layers"], SLICES[slice_name]
    flags = {
        "config": f"{CONFIG}:{variant}",
        "topology": slice_name,
        "programs": "training",
        "num_items": items,
        "output": output,
        "config.model.pretrained": folder / f"llama3_{model}",
        "config.model.schedule": f"(intra inter)*{layers // 2}",
        "config.mesh.data": 1,
        "config.mesh.fsdp": -1,
        "config.train.batch_rows": chips,
    }
    return ["-m", "iam_jax.main", "--mode=plan", *(f"--{name}={value}" for name, value in flags.items())]


def cells(facts: dict) -> list[str]:
    (step,) = facts["programs"]["training"]

    def gib(size: int | None) -> str:
        return "" if size is None else f"{size / 2**30:.2f}"

    sizes = [step["bytes"]["parameters, trained"], step["bytes"]["parameters, frozen"], step["bytes"]["optimizer"]]
    row = [*(gib(size) for size in (*sizes, step["temporaries"])), gib(step["total"]) or f"> {gib(sum(step['bytes'].values()))}"]
    if not facts["fits"]["training"]:
        return [*row, "does not fit", "", ""]
    times = facts["step"]
    bounds = ([1e3 * x for x in times["bounds"]], times["tokens_per_second"][::-1], times["dollars_per_epoch"])
    return row + [" to ".join(f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in pair) for pair in bounds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--variants", default="full,lora")
    parser.add_argument("--slices", default=",".join(SLICES))
    parser.add_argument("--items", type=int, default=11_758)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/planning"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/planning.json"))
    args = parser.parse_args()

    results, table = [], [["model", "variant", "slice", *COLUMNS]]
    for model in args.models.split(","):
        folder = args.folder / f"llama3_{model}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(MODELS[model], indent=2) + "\n")
        for variant in args.variants.split(","):
            for slice_name in args.slices.split(","):
                output = args.folder / f"{model}-{variant}-{slice_name.replace(':', '-')}.json"
                flags = command(model, variant, slice_name, args.folder, args.items, output)
                print(f"python {shlex.join(flags)}", flush=True)
                done = subprocess.run([sys.executable, *flags], capture_output=True, text=True)
                if done.returncode not in (0, 3):
                    sys.exit(done.stderr)
                facts = json.loads(output.read_text())
                print(f"exit {done.returncode}: {facts['verdict'] or 'fits'}", flush=True)
                results.append({"model": model, "variant": variant, "command": flags, "exit": done.returncode, "plan": facts})
                table.append([model, variant, slice_name, *cells(facts)])
    print()
    for row in (table[0], ["---"] * len(table[0]), *table[1:]):
        print(f"| {' | '.join(row)} |")
    harness.save(args.output, harness.environment("jax", "libtpu") | {"results": results})
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()

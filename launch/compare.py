"""Trains the variants of one comparison, one after another, and prints a table (iam_jax/runs/compare.py).

    python launch/compare.py demo                     # item-aware attention, without inter layers, with shuffled titles
    python launch/compare.py toys --path=DIR          # item-aware attention, the hybrid, ordinary attention, SASRec on Toys
    python launch/compare.py stories --path=DIR --pretrained=MODEL    # an existing LLaMA: ordinary attention, three ways to IAM, untrained

After an interruption, run the same command again: it keeps finished variants and continues the others. Flags after `--` are passed to
every training command. Writes FOLDER/<variant>/ (working folders) and FOLDER/comparison.json, .md and .txt.
"""

import argparse
import sys
from pathlib import Path

import commands

from iam_jax.errors import InputError
from iam_jax.runs import compare

# name -> config file and overrides; the other variants are compared with the first
COMPARISONS = {
    "demo": {
        "intra-inter": ("demo.py",),
        "every layer intra": ("demo.py", "--config.model.schedule=intra*2"),
        "shuffled titles": ("demo.py", "--config.data.shuffled_titles=true"),
    },
    "toys": {
        "intra-inter": ("amazon_toys.py:iam",),
        "hybrid": ("amazon_toys.py:hybrid",),
        "ordinary attention": ("amazon_toys.py:full",),
        "SASRec": ("amazon_toys_sasrec.py", "--config.data.context_items=5"),  # as for the others, since it is part of the protocol
    },
    "stories": {
        "ordinary attention": ("stories_scientific.py:full",),
        "schedule": ("stories_scientific.py:schedule",),
        "inserted": ("stories_scientific.py:inserted",),
        "inserted, LoRA": ("stories_scientific.py:lora",),
        "not trained": ("stories_scientific.py:frozen",),
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--folder", type=Path, help="folder of the results; default: runs/compare-<comparison>")
    parser.add_argument("--path", help="--config.data.path of every variant")
    parser.add_argument("--pretrained", help="--config.model.pretrained of every variant")
    own, rest = commands.split_rest(sys.argv[1:])
    args = parser.parse_args(own)
    folder = args.folder or Path("runs") / f"compare-{args.comparison}"
    given = {"data.path": args.path, "model.pretrained": args.pretrained}
    shared = [*(f"--config.{name}={value}" for name, value in given.items() if value), *rest]

    try:
        return run_all(args.comparison, folder, shared)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_all(comparison: str, folder: Path, shared: list[str]) -> int:
    """Runs all variants and writes the table. Returns 0, or the exit code of the command that failed."""
    workdirs = {name: folder / name.replace(",", "").replace(" ", "-") for name in COMPARISONS[comparison]}
    for name, (config, *overrides) in COMPARISONS[comparison].items():
        flags = commands.command(workdirs[name], config, [*overrides, *shared])
        if commands.finished(workdirs[name], flags):
            if commands.diverged(workdirs[name]):
                print(f"== {name}: diverged earlier; remove {workdirs[name]}.command to try again", flush=True)
                return commands.NON_FINITE
            print(f"== {name}: already finished", flush=True)
            continue
        print(f"== {name}: {commands.shell_line(flags)}", flush=True)
        if code := commands.run(workdirs[name], flags):
            return code
    found = compare.collect(workdirs)
    compare.write(found, folder)
    print(f"\n{compare.format_text(found)}wrote {folder / 'comparison.md'}, .txt and .json")
    return 0


if __name__ == "__main__":
    sys.exit(main())

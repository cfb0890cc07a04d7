"""Trains the variants of one comparison, one after another, and prints one table.

    python launch/compare.py demo                     # item-aware attention, without inter layers, with shuffled titles
    python launch/compare.py toys --path=DIR          # item-aware attention, ordinary attention, SASRec on Amazon Toys
    python launch/compare.py stories --path=DIR --pretrained=MODEL    # an existing LLaMA: ordinary attention, three ways to IAM, untrained

Run again after an interruption: finished variants are kept, the others go on. What stands behind `--` goes to every training
command. Writes FOLDER/<variant>/ (working folders) and FOLDER/comparison.json.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl

from iam_jax import metrics
from iam_jax.files import write_atomically

CONFIGS = Path(__file__).parents[1] / "configs"

# name -> config file and overrides; the first variant is what the others are compared with
COMPARISONS = {
    "demo": {
        "intra-inter": ("demo.py",),
        "every layer intra": ("demo.py", "--config.model.schedule=intra*2"),
        "shuffled titles": ("demo.py", "--config.data.shuffled_titles=true"),
    },
    "toys": {
        "intra-inter": ("amazon_toys.py",),
        "ordinary attention": ("amazon_toys.py", "--config.model.schedule=full*2", "--config.objective.text_layers=all"),
        "SASRec": ("amazon_toys_sasrec.py",),
    },
    "stories": {
        "ordinary attention": ("stories_scientific.py:full",),
        "schedule": ("stories_scientific.py:schedule",),
        "inserted": ("stories_scientific.py:inserted",),
        "inserted, LoRA": ("stories_scientific.py:lora",),
        "not trained": ("stories_scientific.py:frozen",),
    },
}
METRIC = "ndcg@10"
LOSSES = ("token_loss", "text_loss")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--folder", type=Path, help="runs/compare-<comparison> by default")
    parser.add_argument("--path", help="--config.data.path of every variant")
    parser.add_argument("--pretrained", help="--config.model.pretrained of every variant")
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    args, rest = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    folder = args.folder or Path("runs") / f"compare-{args.comparison}"
    given = {"data.path": args.path, "model.pretrained": args.pretrained}
    shared = [*(f"--config.{name}={value}" for name, value in given.items() if value), *rest]

    for name, (config, *overrides) in COMPARISONS[args.comparison].items():
        workdir = folder / _folder_name(name)
        flags = [f"--config={CONFIGS / config}", f"--workdir={workdir}", *overrides, *shared]
        command = [sys.executable, "-m", "iam_jax.main", *flags]
        done = workdir.with_name(f"{workdir.name}.command")  # what was run to its end there
        if done.exists() and done.read_text() == shlex.join(flags):
            print(f"== {name}: finished before", flush=True)
            continue
        print(f"== {name}: {shlex.join(command)}", flush=True)
        process = subprocess.Popen(command)
        signal.signal(signal.SIGINT, lambda *_: None)  # the terminal signals the child too, and the child saves before it ends
        signal.signal(signal.SIGTERM, lambda number, _, process=process: process.send_signal(number))
        code = process.wait()
        if code:
            return code
        write_atomically(done, lambda path, flags=flags: path.write_text(shlex.join(flags)))
    summary = collect(folder, list(COMPARISONS[args.comparison]))
    write_atomically(folder / "comparison.json", lambda path: path.write_text(json.dumps(summary, indent=2) + "\n"))
    print(f"\n{format_summary(summary)}\nwrote {folder / 'comparison.json'}")
    return 0


def _folder_name(variant: str) -> str:
    return variant.replace(",", "").replace(" ", "-")


def collect(folder: Path, names: list[str]) -> dict:
    """Test metrics of every variant, and the paired difference of each to the first."""
    evaluations, ranks = {}, {}
    for name in names:
        workdir = folder / _folder_name(name)
        evaluations[name] = json.loads((workdir / "evaluation.json").read_text())
        ranks[name] = pl.read_parquet(workdir / "ranks.parquet").filter(pl.col("split") == "test")
    first = evaluations[names[0]]
    for name, evaluation in evaluations.items():
        if evaluation["split_sha256"] != first["split_sha256"]:
            raise SystemExit(f"error: {name} was evaluated on another split than {names[0]}")
    rows = {name: evaluation["results"]["model"]["test"] for name, evaluation in evaluations.items()}
    rows |= {name: result["test"] for name, result in first["results"].items() if name != "model"}
    per_event = {name: metrics.ranking_metrics(r["rank"].to_numpy(), r["ties"].to_numpy()) for name, r in ranks.items()}
    users = ranks[names[0]]["user"].to_numpy()
    differences = {name: metrics.paired_difference(users, per_event[name], per_event[names[0]]) for name in names[1:]}
    steps = {name: evaluation["step"] for name, evaluation in evaluations.items()}
    validation = {name: evaluation["results"]["model"].get("validation", {}) for name, evaluation in evaluations.items()}
    losses = {name: {loss: result[loss] for loss in LOSSES if loss in result} for name, result in validation.items()}
    return {
        "split_sha256": first["split_sha256"],
        "steps": steps,
        "test": rows,
        "difference": differences,
        "validation_loss": {name: loss for name, loss in losses.items() if loss},
    }


def format_summary(summary: dict) -> str:
    base = next(iter(summary["test"].values()))[METRIC]
    lines = [metrics.format_table(summary["test"]), "", f"{METRIC.upper()} minus that of {next(iter(summary['test']))}:"]
    for name, difference in summary["difference"].items():
        low, high = difference[f"{METRIC}_ci"]
        lines.append(f"  {name}: {difference[METRIC]:+.4f} [{low:+.4f}, {high:+.4f}], {difference[METRIC] / base:+.1%}")
    if summary["validation_loss"]:
        lines += ["", "validation, -log p of a token (all tokens; boundary tokens left out):"]
        lines += [f"  {name}: " + "; ".join(f"{value:.4f}" for value in loss.values()) for name, loss in summary["validation_loss"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

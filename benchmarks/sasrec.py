"""Compares our SASRec with that of RecTools 0.19 (PyTorch): training speed and ranking quality.

    pip install -e '.[rectools]' && pip install --no-deps rectools==0.19.0      # its numpy<2 is not needed (setup.py)
    python benchmarks/sasrec.py speed --path=DIR                     # Amazon 2014 Toys and Games: ten minutes of windows
    python benchmarks/sasrec.py quality --path=DIR --minutes=60 --seeds 0 1 2 --runs runs/sasrec-0 runs/sasrec-1 runs/sasrec-2

Both sides have the width, layers, heads, learning rate and dropout of configs/amazon_toys_sasrec.py (or of --config, with --set
section.field=value; RecTools may try other learning rates), full softmax over the items, Adam with betas 0.9 and 0.98, float32, a CPU, and
the training events of the same split. All other settings of RecTools are its defaults. RecTools reads the last --session events of each
user (and trains on the last --session + 1), left-padded. Ours reads rows of data.row_tokens = 64 slots, which hold several users and whole
histories of up to 64 events. These differences remain: RecTools also applies dropout to attention weights and inside the MLP, counts
positions from the end, and normalises only queries; ours clips gradients and has the warm-up of its config.

speed: each side runs in its own process, limited to the same --threads cores (CPU affinity; torch.set_num_threads). The sides take turns in
windows of --seconds; one waits while the other works. RecTools trains with Lightning's Trainer as its `fit` does, with the data loader in
the training process (workers: 0, its default), without logger, progress bar, checkpoints and validation, and with passive OpenMP threads.
Ours trains with the loop of iam_jax.training.loop, without log and validations. If several batch sizes are given, each side uses its
fastest one, found in one window per size. The first steps, in which XLA compiles, are reported separately, and two steps before every
window are not measured. A real event is a training target, that is, a position with a label; per epoch there is one for each training event
except the first of a user. A slot is a position that the layers compute, real or padding. RecTools computes the softmax for all slots, ours
for the targets, padded to the largest number per row. cores: CPU seconds per second of the process.

quality: RecTools trains until --minutes, --epochs or --patience. It is validated every --eval_epochs like our runs (validation_users,
metric), with the best of several --learning_rate (default: those that launch/reproduce.py tries for ours), each tried for --trial_minutes
with seed 0. Then its best epoch ranks all validation and test events with iam_jax/ranking/evaluate.py: all items are candidates, ties and
seen items are treated as for ours, and items without training events get the score 0. Its own `recommend` must return the same top 10 for
--check users; otherwise the exit code is 1. FOLDER/seed<n> is like a working folder (evaluation.json, ranks.parquet, run.json) and works
with --mode=compare. Finished seeds are kept. --runs are working folders of our SASRec, whose config and protocol are then used; the table
shows means over seeds and the difference over common seeds, with the bootstrap over users. Each subcommand prints one table and writes one
JSON file.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

import harness
from sasrec_quality import quality
from sasrec_speed import SIDES, Meter, speed, train_here, train_peer

from iam_jax.config import Config, get_config, resolve
from iam_jax.errors import InputError
from iam_jax.relations import ORDINARY

CONFIG = Path(__file__).parents[1] / "configs" / "amazon_toys_sasrec.py"
# Passive OpenMP threads: if other work shares the cores, spinning threads make torch's steps up to 60 times slower.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "PASSIVE"}


def config_of(args: argparse.Namespace) -> Config:
    """Returns the config of --config, or of the first of --runs, with --path and --set."""
    if getattr(args, "runs", None):
        config = get_config(str(args.runs[0]))
    else:
        if not args.config.is_file():
            raise InputError(f"--config={args.config}: no such file")
        spec = importlib.util.spec_from_file_location("benchmarked_config", args.config)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config()
    config.data.path = args.path
    for change in args.set:
        name, _, text = change.partition("=")
        section, _, field = name.partition(".")
        try:
            kind = type(config[section][field])
            config[section][field] = {"true": True, "false": False}[text] if kind is bool else kind(text)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"--set {change}: must be section.field=value of the config ({error})") from error
    config = resolve(config)
    if config.data.tokenizer != "id" or config.softmax != "full" or config.uses_text or set(config.schedule.relations) != {ORDINARY}:
        raise InputError("the config is not SASRec, which needs data.tokenizer id, an item table, full softmax and `full` layers")
    return config


def limit_threads(threads: int | None) -> int:
    """Limits this process and its children to some cores (default: all) and returns their number."""
    if not hasattr(os, "sched_setaffinity"):
        if threads not in (None, os.cpu_count()):
            raise InputError("--threads: this system cannot limit a process to a number of cores")
        return os.cpu_count()
    cores = sorted(os.sched_getaffinity(0))
    if threads is not None and not 0 < threads <= len(cores):
        raise InputError(f"--threads={threads}: must be from 1 to the number of cores, {len(cores)}")
    os.sched_setaffinity(0, cores[:threads])
    return threads or len(cores)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--path", required=True, help="folder of the data set, as config.data.path")
    shared.add_argument("--config", type=Path, default=CONFIG)
    shared.add_argument("--set", nargs="*", default=[], metavar="SECTION.FIELD=VALUE", help="overrides of the config")
    shared.add_argument("--threads", type=int, help="cores of each side; default: all")
    shared.add_argument("--session", type=int, default=50, help="session_max_len of RecTools, the most events that it reads per user")
    shared.add_argument("--dropout", type=float, help="dropout of RecTools; default: the one of the config")
    rate_help = "learning rates of RecTools; speed uses the first (default: the one of the config), quality the best"
    shared.add_argument("--learning_rate", type=float, nargs="+", help=rate_help)
    shared.add_argument("--output", type=Path)
    commands = parser.add_subparsers(dest="command", required=True)
    speed_parser = commands.add_parser("speed", parents=[shared])
    speed_parser.add_argument("--batch_rows", type=int, nargs="+", help="our batch sizes to try; default: the one of the config")
    speed_parser.add_argument("--batch_size", type=int, nargs="+", default=[128], help="batch sizes of RecTools to try")
    speed_parser.add_argument("--windows", type=int, default=5, help="windows per side")
    speed_parser.add_argument("--seconds", type=float, default=60.0, help="minimum seconds per window")
    speed_parser.add_argument("--trial_seconds", type=float, default=30.0, help="minimum seconds of the window that tries a batch size")
    speed_parser.add_argument("--warmup_steps", type=int, default=5)
    speed_parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    speed_parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    quality_parser = commands.add_parser("quality", parents=[shared])
    minutes_help = "time limit for training RecTools, including validations; 0: no limit"
    quality_parser.add_argument("--minutes", type=float, default=60.0, help=minutes_help)
    quality_parser.add_argument("--trial_minutes", type=float, default=15.0, help="minutes per learning rate, if several are tried")
    quality_parser.add_argument("--epochs", type=int, default=0, help="limit of epochs; 0: no limit")
    quality_parser.add_argument("--patience", type=int, default=10, help="stop after this many validations without improvement; 0: off")
    quality_parser.add_argument("--eval_epochs", type=int, default=1, help="epochs between validations")
    quality_parser.add_argument("--batch_size", type=int, nargs=1, default=[128])
    quality_parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    quality_parser.add_argument("--check", type=int, default=200, help="number of users whose top 10 is compared with RecTools' own")
    quality_parser.add_argument("--runs", type=Path, nargs="*", default=[], help="working folders of our SASRec, one per seed")
    quality_parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/sasrec"))
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    try:
        if importlib.util.find_spec("rectools") is None:
            raise InputError("rectools is not installed: pip install -e '.[rectools]' && pip install --no-deps rectools==0.19.0")
        args.threads = limit_threads(args.threads)
        os.environ |= ENVIRONMENT | {"OMP_NUM_THREADS": str(args.threads)}  # before torch is loaded
        config = config_of(args)
        if args.command == "speed" and args.side:
            replies = os.fdopen(os.dup(1), "w")  # the output of libraries goes to stderr instead
            os.dup2(2, 1)
            {"iam_jax": train_here, "rectools": train_peer}[args.side](config, args, Meter(replies, args.warmup_steps))
            return 0
        facts = harness.environment("iam_jax", "jax", "jaxlib", "flax", "numpy", "rectools", "torch", "pytorch-lightning")
        facts |= {"command": args.command, "load": os.getloadavg(), "settings": harness.settings(args)}
        sizes = f"{len(config.schedule.relations)} layers of width {config.model.width}, {config.model.heads} head(s)"
        print(f"SASRec, {sizes}, on {facts['device']}, {facts['date']}")
        print(harness.listed(facts["versions"]), flush=True)
        result, code = {"speed": speed, "quality": quality}[args.command](config, args)
        harness.save(args.output or Path(f"runs/benchmarks/sasrec_{args.command}.json"), facts | result)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())

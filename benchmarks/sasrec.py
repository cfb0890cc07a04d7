"""SASRec here and in RecTools 0.19 (PyTorch): how fast do they train, and how well do they rank?

    pip install -e '.[rectools]' && pip install --no-deps rectools==0.19.0      # its numpy<2 is not needed (setup.py)
    python benchmarks/sasrec.py speed --path=DIR                     # Amazon 2014 Toys and Games: ten minutes of windows
    python benchmarks/sasrec.py quality --path=DIR --minutes=60 --seeds 0 1 2 --runs runs/sasrec-0 runs/sasrec-1 runs/sasrec-2

Both sides have the width, layers, heads, learning rate and dropout of configs/amazon_toys_sasrec.py (or --config, with --set
section.field=value; other rates may be tried for RecTools), full softmax over the items, Adam with betas 0.9 and 0.98, float32, CPU, and
the training events of one split. RecTools' further settings are its defaults; it reads each user's last --session events (and trains the
last --session + 1), left-padded; ours reads rows of data.row_tokens = 64 slots, in which several users lie side by side and a history of
up to 64 events is whole. What stays different: RecTools also drops attention weights and inside the MLP, counts positions from the end,
and normalises queries only; ours clips gradients and warms its learning rate up as the config says.

speed: each side in a process of its own, limited to the same --threads cores (CPU affinity; torch.set_num_threads), taking turns in windows
of --seconds; while one works the other waits. RecTools is trained by Lightning's Trainer as its `fit` does it, its data loader in the
training process (workers: 0, its default), without logger, progress bar, checkpoints and validation, OpenMP's threads passive; ours by the
loop of iam_jax.training.loop without its log and validations. Of several batch sizes each side gets its fastest, found before in one window
each. The first steps, in which XLA compiles, are apart, and two steps before every window count for nothing.
A real event is a training target: a position with a label, of which each training event but a user's first is one an epoch. A slot is a
position that the layers compute, real or padding; RecTools computes the softmax for all slots, ours for the targets, padded to the most
that a row holds. cores: CPU seconds per second of the process.

quality: RecTools trained until --minutes, --epochs or --patience ends it, validated every --eval_epochs as our runs are (validation_users,
metric), with the best of several --learning_rate (by default those that launch/reproduce.py tries for ours), each tried for
--trial_minutes with seed 0; then the best epoch ranks all validation and test events by iam_jax/ranking/evaluate.py: every item a
candidate, ties and seen items as ours, items without a training event scored 0. Its own `recommend` must give the same top 10 for --check
users, or the exit code is 1.
FOLDER/seed<n> is like a working folder (evaluation.json, ranks.parquet, run.json), for --mode=compare too; finished seeds are kept. With
--runs, working folders of ours (whose config, with its protocol, is then taken): means over the seeds and the difference, seed with seed,
with the bootstrap over users. Each subcommand prints one table and writes one JSON.
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
# OpenMP's threads wait asleep: where other work shares the cores, torch's steps take up to 60 times longer with threads that spin.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "PASSIVE"}


def config_of(args: argparse.Namespace) -> Config:
    """--config, or what made the first of --runs, with --path and --set."""
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
            raise InputError(f"--set {change}: not section.field=value of the config ({error})") from error
    config = resolve(config)
    if config.data.tokenizer != "id" or config.softmax != "full" or config.uses_text or set(config.schedule.relations) != {ORDINARY}:
        raise InputError("the config is no SASRec: data.tokenizer id, item table, full softmax and `full` layers")
    return config


def limit_threads(threads: int | None) -> int:
    """This process and its children to so many cores; all of them by default."""
    if not hasattr(os, "sched_setaffinity"):
        if threads not in (None, os.cpu_count()):
            raise InputError("--threads: this system cannot limit a process to some cores")
        return os.cpu_count()
    cores = sorted(os.sched_getaffinity(0))
    if threads is not None and not 0 < threads <= len(cores):
        raise InputError(f"--threads={threads}: there are {len(cores)} cores")
    os.sched_setaffinity(0, cores[:threads])
    return threads or len(cores)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--path", required=True, help="folder of the data set, as config.data.path")
    both.add_argument("--config", type=Path, default=CONFIG)
    both.add_argument("--set", nargs="*", default=[], metavar="SECTION.FIELD=VALUE", help="overrides of the config")
    both.add_argument("--threads", type=int, help="cores of each side; all by default")
    both.add_argument("--session", type=int, default=50, help="events that RecTools reads at most, its session_max_len")
    both.add_argument("--dropout", type=float, help="of RecTools; the config's by default")
    both.add_argument(
        "--learning_rate", type=float, nargs="+", help="of RecTools; speed: the config's by default; quality: the best of several"
    )
    both.add_argument("--output", type=Path)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("speed", parents=[both])
    one.add_argument("--batch_rows", type=int, nargs="+", help="ours, tried; the config's by default")
    one.add_argument("--batch_size", type=int, nargs="+", default=[128], help="RecTools', tried")
    one.add_argument("--windows", type=int, default=5, help="of each side")
    one.add_argument("--seconds", type=float, default=60.0, help="of a window, at least")
    one.add_argument("--trial_seconds", type=float, default=30.0)
    one.add_argument("--warmup_steps", type=int, default=5)
    one.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    one.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    two = commands.add_parser("quality", parents=[both])
    two.add_argument("--minutes", type=float, default=60.0, help="of RecTools' training, validations included; 0: no limit")
    two.add_argument("--trial_minutes", type=float, default=15.0, help="of each of several learning rates")
    two.add_argument("--epochs", type=int, default=0, help="0: no limit")
    two.add_argument("--patience", type=int, default=10, help="validations without a better one; 0: off")
    two.add_argument("--eval_epochs", type=int, default=1, help="epochs between validations")
    two.add_argument("--batch_size", type=int, nargs=1, default=[128])
    two.add_argument("--seeds", type=int, nargs="+", default=[0])
    two.add_argument("--check", type=int, default=200, help="users whose top 10 is compared with RecTools' own")
    two.add_argument("--runs", type=Path, nargs="*", default=[], help="working folders of our SASRec, a seed each")
    two.add_argument("--folder", type=Path, default=Path("runs/benchmarks/sasrec"))
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
            replies = os.fdopen(os.dup(1), "w")  # whatever libraries print goes elsewhere
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

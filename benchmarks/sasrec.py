"""SASRec here and in RecTools 0.19 (PyTorch): how fast do they train, and how well do they rank?

    pip install -e '.[rectools]' && pip install --no-deps rectools==0.19.0      # its numpy<2 is not needed (setup.py)
    python benchmarks/sasrec.py speed --path=DIR                     # Amazon 2014 Toys and Games: ten minutes of windows
    python benchmarks/sasrec.py quality --path=DIR --minutes=60 --seeds 0 1 2 --runs runs/sasrec-0 runs/sasrec-1 runs/sasrec-2

Both sides have the width, layers, heads, learning rate and dropout of configs/amazon_toys_sasrec.py (or --config, with --set
section.field=value), full softmax over the items, Adam with betas 0.9 and 0.98, float32, CPU, and the training events of one split.
RecTools' further settings are its defaults; it reads each user's last 50 events (and trains the last 51), left-padded; ours reads rows of
data.row_tokens = 64 slots, in which several users lie side by side and a history of up to 64 events is whole. What stays different:
RecTools also drops attention weights and inside the MLP, counts positions from the end, and normalises queries only; ours clips gradients
and warms its learning rate up as the config says.

speed: each side in a process of its own, limited to the same --threads cores (CPU affinity; torch.set_num_threads), taking turns in windows
of --seconds; while one works the other waits. RecTools is trained by Lightning's Trainer as its `fit` does it, its data loader in the
training process (workers: 0, its default), without logger, progress bar, checkpoints and validation, OpenMP's threads passive; ours by the
loop of iam_jax.train without its log and validations. Of several batch sizes each side gets its fastest, found before in one window each.
The first steps, in which XLA compiles, are apart, and two steps before every window count for nothing.
A real event is a training target: a position with a label, of which each training event but a user's first is one an epoch. A slot is a
position that the layers compute, real or padding; RecTools computes the softmax for all slots, ours for the targets, padded to the most
that a row holds. cores: CPU seconds per second of the process.

quality: RecTools trained until --minutes, --epochs or --patience ends it, validated every --eval_epochs as our runs are (validation_users,
metric); then the best epoch ranks all validation and test events by iam_jax/evaluate.py: every item a candidate, ties and seen items as
ours, items without a training event scored 0. Its own `recommend` must give the same top 10 for --check users, or the exit code is 1.
FOLDER/seed<n> is like a working folder (evaluation.json, ranks.parquet, run.json), for --mode=compare too; finished seeds are kept. With
--runs, working folders of ours (whose config, with its protocol, is then taken): means over the seeds and the difference, seed with seed,
with the bootstrap over users. Each subcommand prints one table and writes one JSON.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np

from iam_jax.config import Config, get_config, resolve
from iam_jax.errors import InputError

CONFIG = Path(__file__).parents[1] / "configs" / "amazon_toys_sasrec.py"
SIDES = {"iam_jax": "iam_jax", "rectools": "RecTools"}
# OpenMP's threads wait asleep: where other work shares the cores, torch's steps take up to 60 times longer with threads that spin.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "PASSIVE"}
LEAD_IN = 2  # steps before every window that are not measured


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
    if config.data.tokenizer != "id" or config.softmax != "full" or config.uses_text or set(config.schedule.relations) != {"full"}:
        raise InputError("the config is no SASRec: data.tokenizer id, item table, full softmax and `full` layers")
    return config


# ---- speed, in the process of one side


class Meter:
    """Told of every finished step, it measures the windows that it is asked for: a line of seconds in, a line of JSON out."""

    def __init__(self, replies, warmup_steps: int):
        self._replies, self._left, self._seconds = replies, warmup_steps, None
        self._start = time.perf_counter()
        self._sums: dict | None = None

    def tick(self, counts: dict[str, int]) -> bool:
        """counts: of the step that is finished. False: training ends."""
        now = time.perf_counter()
        if self._sums is not None:
            for name, value in ({"steps": 1} | counts).items():
                self._sums[name] = self._sums.get(name, 0) + value
            if now - self._start < self._seconds:
                return True
            return self._reply({"seconds": now - self._start, "cpu_seconds": time.process_time() - self._cpu} | self._sums)
        self._left -= 1
        if self._left > 0:
            return True
        if self._seconds is None:
            return self._reply({"warmup_seconds": now - self._start})
        self._start, self._cpu, self._sums = now, time.process_time(), {}
        return True

    def _reply(self, result: dict) -> bool:
        print(json.dumps(result), file=self._replies, flush=True)
        line = sys.stdin.readline().strip()
        self._sums, self._left, self._seconds = None, LEAD_IN, float(line or 0)
        return bool(line)


def train_here(config: Config, args: argparse.Namespace, meter: Meter) -> None:
    import jax

    from iam_jax.data.batches import training_batches
    from iam_jax.data.prepare import prepare
    from iam_jax.sharding import shard_batch
    from iam_jax.train import init_state, make_run, make_train_step

    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_rows=args.batch))
    run = make_run(config, prepare(config.data))
    with jax.set_mesh(run.mesh):
        state, train_step, pending = init_state(run), make_train_step(run), None
        for step, batch in enumerate(training_batches(run.rows, args.batch, config.train.seed, 0, run.finish)):
            counts = {"events": int((batch["target"] >= 0).sum()), "slots": batch["user"].size, "softmax": batch["target"].size}
            counts["tokens"] = int((batch["user"] > 0).sum())
            state, values = train_step(state, shard_batch(run.mesh, batch), run.items, np.int32(step), run.frozen)
            if pending is not None:  # as in iam_jax.train: the host waits for the step before
                jax.block_until_ready(pending[0])
                if not meter.tick(pending[1]):
                    return
            pending = values, counts


def train_peer(config: Config, args: argparse.Namespace, meter: Meter) -> None:
    import rectools_peer

    from iam_jax.data.prepare import prepare

    class Ticks(rectools_peer.Told):
        def on_train_batch_end(self, trainer, module, outputs, batch, number) -> None:
            x = batch["x"]
            counts = {"events": int((batch["y"] != 0).sum()), "slots": x.numel(), "softmax": x.numel(), "tokens": int((x != 0).sum())}
            trainer.should_stop |= not meter.tick(counts)

    rectools_peer.fit(config, args, prepare(config.data).events, Ticks(), args.batch, config.train.seed)


# ---- speed, in the process that asks


@contextlib.contextmanager
def side(name: str, batch: int, args: argparse.Namespace) -> Iterator[Callable[[float], dict]]:
    """A process that trains one side. Yields a function that measures a window; its attribute `warmup` says how the start was."""
    flags = [f"--path={args.path}", f"--config={args.config}", f"--threads={args.threads}", f"--batch={batch}", f"--side={name}"]
    flags += [f"--{flag}={getattr(args, flag)}" for flag in ("dropout", "learning_rate") if getattr(args, flag) is not None]
    flags += [f"--warmup_steps={args.warmup_steps}", *(["--set", *args.set] if args.set else [])]
    with tempfile.TemporaryFile("w+") as noise:
        command = [sys.executable, __file__, "speed", *flags]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, text=True)

        def read() -> dict:
            line = process.stdout.readline()
            if not line:
                process.wait()
                noise.seek(0)
                lines = noise.read().strip().splitlines() or ["no message"]
                if process.returncode == 2:
                    raise InputError(lines[-1].removeprefix("error: "))
                raise RuntimeError("\n".join([f"{SIDES[name]} ended with exit code {process.returncode}:", *lines[-20:]]))
            return json.loads(line)

        def window(seconds: float) -> dict:
            print(seconds, file=process.stdin, flush=True)
            result = read()
            for what in ("events", "slots", "softmax"):
                result[f"{what}_per_second"] = result[what] / result["seconds"]
            return result | {"cores": result["cpu_seconds"] / result["seconds"], "load": os.getloadavg()[0]}

        try:
            window.warmup = read()
            yield window
        finally:
            process.stdin.close()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def summary(batch: int, warmup: dict, samples: list[dict]) -> dict:
    out = {"batch": batch, "samples": samples} | warmup
    for what in ("events", "slots", "softmax"):
        rates = [sample[f"{what}_per_second"] for sample in samples]
        out[f"{what}_per_second"], out[f"{what}_spread"] = statistics.median(rates), [min(rates), max(rates)]
    total = {name: sum(sample[name] for sample in samples) for name in ("slots", "tokens", "seconds", "steps", "cpu_seconds")}
    out |= {"padding": 1 - total["tokens"] / total["slots"], "seconds_per_step": total["seconds"] / total["steps"]}
    return out | {"cores": total["cpu_seconds"] / total["seconds"]}


def print_side(label: str, result: dict) -> None:
    low, high = result["events_spread"]
    line = f"{label:<18}{result['batch']:>6,}{result['events_per_second']:>11,.0f}{f'[{low:,.0f}, {high:,.0f}]':>18}"
    line += f"{result['slots_per_second']:>10,.0f}{result['softmax_per_second']:>11,.0f}{result['padding']:>9.1%}"
    print(line + f"{result['seconds_per_step'] * 1e3:>11,.1f}{result['cores']:>7.2f}{result['warmup_seconds']:>10.1f}", flush=True)


def speed(config: Config, args: argparse.Namespace) -> tuple[dict, int]:
    sizes = {"iam_jax": args.batch_rows or [config.train.batch_rows], "rectools": args.batch_size}
    header = f"{'side':<18}{'batch':>6}{'events/s':>11}{'[least, most]':>18}{'slots/s':>10}{'softmax/s':>11}{'padding':>9}"
    print(header + f"{'ms a step':>11}{'cores':>7}{'warm-up s':>10}", flush=True)
    trials, best = [], {}
    for name, batches in sizes.items():
        for batch in batches:
            if len(batches) > 1:
                with side(name, batch, args) as window:
                    found = summary(batch, window.warmup, [window(args.trial_seconds)])
                trials.append({"side": name} | found)
                print_side(f"{SIDES[name]}, tried", found)
        tried = {trial["batch"]: trial["events_per_second"] for trial in trials if trial["side"] == name}
        best[name] = max(tried, key=tried.get) if tried else batches[0]
    samples = {name: [] for name in SIDES}
    with contextlib.ExitStack() as stack:
        windows = {name: stack.enter_context(side(name, best[name], args)) for name in SIDES}
        for _ in range(args.windows):
            for name, window in windows.items():
                samples[name].append(window(args.seconds))
        results = {name: summary(best[name], windows[name].warmup, samples[name]) for name in SIDES}
    for name, result in results.items():
        print_side(SIDES[name], result)
    ours, theirs = results["iam_jax"], results["rectools"]
    pairs = [a["events_per_second"] / b["events_per_second"] for a, b in zip(samples["iam_jax"], samples["rectools"], strict=True)]
    ratios = {f"{what}_ratio": ours[f"{what}_per_second"] / theirs[f"{what}_per_second"] for what in ("events", "slots", "softmax")}
    ratios["events_ratio_spread"] = [min(pairs), max(pairs)]
    text = f"{ratios['events_ratio']:.2f} times RecTools' real events a second (pairs of windows: {min(pairs):.2f} to {max(pairs):.2f})"
    print(f"{text}, {ratios['slots_ratio']:.2f} times its slots a second; padding included")
    return {"trials": trials, "results": results} | ratios, 0


# ---- quality


def settings_of(config: Config, args: argparse.Namespace) -> dict:
    """What a finished seed must have been made with."""
    names = ("minutes", "epochs", "patience", "eval_epochs", "dropout", "learning_rate", "batch_size", "threads")
    own = {"model": dataclasses.asdict(config.model), "learning_rate": config.optimizer.learning_rate}
    return {name: getattr(args, name) for name in names} | {"config": own, "rectools": metadata.version("rectools")}


def quality(config: Config, args: argparse.Namespace) -> tuple[dict, int]:
    from rectools_peer import train_seed

    from iam_jax import compare
    from iam_jax.data.prepare import prepare
    from iam_jax.evaluate import protocol

    if not args.minutes and not args.epochs:
        raise InputError("--minutes=0 --epochs=0: nothing ends the training")
    ours = {}
    for folder in args.runs:
        seed = get_config(str(folder)).train.seed
        if seed in ours:
            raise InputError(f"--runs: two of them have train.seed = {seed}")
        ours[seed] = compare.read(folder)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, baselines=False))
    prepared = prepare(config.data)
    identity = {"split_sha256": prepared.split.sha256, "protocol": protocol(prepared, config)}
    for folder, run in zip(args.runs, ours.values(), strict=True):
        if differing := [name for name, value in identity.items() if run.evaluation[name] != value]:
            raise InputError(f"{folder} is no run beside which RecTools can be ranked here: another {' and '.join(differing)}")
    settings = json.loads(json.dumps(settings_of(config, args) | identity))
    theirs, facts = {}, {}
    for seed in args.seeds:
        folder = args.folder / f"seed{seed}"
        done = folder / "rectools.json"
        if done.exists():
            facts[seed] = json.loads(done.read_text(encoding="utf-8"))
            if differing := [name for name, value in settings.items() if facts[seed]["settings"].get(name) != value]:
                raise InputError(f"{folder} was made with another {', '.join(differing)}; choose another --folder")
            print(f"seed {seed}: finished before", flush=True)
        else:
            facts[seed] = {"settings": settings} | train_seed(config, prepared, args, seed, folder)
            done.write_text(json.dumps(facts[seed], indent=2) + "\n")
        theirs[seed] = compare.read(folder)
    result = identity | {"seeds": facts, "means": {}}
    print(f"{'side':<12}{'seeds':<12}{'NDCG@10':>9}{'HR@10':>9}{'by seed: NDCG@10':>20}")
    for name, runs in (("iam_jax", ours), ("rectools", theirs)):
        tests = {seed: run.evaluation["results"]["model"]["test"] for seed, run in runs.items()}
        if not tests:
            continue
        mean = {metric: statistics.mean(test[metric] for test in tests.values()) for metric in ("ndcg@10", "hr@10")}
        result["means"][name] = mean | {"by_seed": {seed: {m: test[m] for m in mean} for seed, test in tests.items()}}
        values = ", ".join(f"{test['ndcg@10']:.4f}" for test in tests.values())
        print(f"{SIDES[name]:<12}{', '.join(map(str, tests)):<12}{mean['ndcg@10']:>9.4f}{mean['hr@10']:>9.4f}    {values}")
    if ours:
        result["difference"] = difference = compare.over_seeds(ours, theirs)
        if difference is None:
            print("no seed is on both sides: no difference")
        else:
            low, high = difference["ndcg@10_ci"]
            verdict = "significantly below" if high < 0 else "significantly above" if low > 0 else "no significant difference"
            seeds = ", ".join(map(str, difference["seeds"]))
            print(f"NDCG@10, ours minus RecTools', seeds {seeds}: {difference['ndcg@10']:+.4f} [{low:+.4f}, {high:+.4f}]: {verdict}")
    checks = [fact["recommend"] for fact in facts.values()]
    equal = all(check["equal"] for check in checks)
    users, same = (sum(check[name] for check in checks) for name in ("users", "identical"))
    print(f"RecTools' own recommend: {same:,} of {users:,} top tens identical, {'equal' if equal else 'NOT EQUAL'} within rounding")
    return result | {"equal": equal}, 0 if equal else 1


# ---- the command line


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
    both.add_argument("--dropout", type=float, help="of RecTools; the config's by default")
    both.add_argument("--learning_rate", type=float, help="of RecTools; the config's by default")
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
        facts = {"device": f"CPU ({platform.machine()}, {args.threads} cores)", "date": datetime.now(UTC).isoformat(timespec="seconds")}
        names = ("iam_jax", "jax", "jaxlib", "flax", "numpy", "rectools", "torch", "pytorch-lightning")
        facts["versions"] = {"python": platform.python_version()} | {name: metadata.version(name) for name in names}
        facts |= {"command": args.command, "load": os.getloadavg(), "settings": {k: v for k, v in vars(args).items() if k != "output"}}
        sizes = f"{len(config.schedule.relations)} layers of width {config.model.width}, {config.model.heads} head(s)"
        print(f"SASRec, {sizes}, on {facts['device']}, {facts['date']}")
        print(", ".join(f"{name} {version}" for name, version in facts["versions"].items()), flush=True)
        result, code = {"speed": speed, "quality": quality}[args.command](config, args)
        output = args.output or Path(f"runs/benchmarks/sasrec_{args.command}.json")
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(facts | result, indent=2, default=str) + "\n")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())

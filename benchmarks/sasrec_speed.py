"""Measures the training speed of SASRec, for sasrec.py: two processes take turns in time windows of training steps."""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from iam_jax.config import Config
from iam_jax.errors import InputError

SIDES = {"iam_jax": "iam_jax", "rectools": "RecTools"}
LEAD_IN = 2  # steps before every window that are not measured


# ---- inside the process of one side


class Meter:
    """Measures time windows of training, on request: it reads a line with seconds from stdin and writes a line of JSON to `replies`."""

    def __init__(self, replies, warmup_steps: int):
        self._replies, self._steps_left, self._seconds = replies, warmup_steps, None
        self._start = time.perf_counter()
        self._sums: dict | None = None

    def tick(self, counts: dict[str, int]) -> bool:
        """Must be called after every step with its counts. Returns False if training must end."""
        now = time.perf_counter()
        if self._sums is not None:
            for name, value in ({"steps": 1} | counts).items():
                self._sums[name] = self._sums.get(name, 0) + value
            if now - self._start < self._seconds:
                return True
            return self._reply({"seconds": now - self._start, "cpu_seconds": time.process_time() - self._cpu} | self._sums)
        self._steps_left -= 1
        if self._steps_left > 0:
            return True
        if self._seconds is None:
            return self._reply({"warmup_seconds": now - self._start})
        self._start, self._cpu, self._sums = now, time.process_time(), {}
        return True

    def _reply(self, result: dict) -> bool:
        print(json.dumps(result), file=self._replies, flush=True)
        line = sys.stdin.readline().strip()
        self._sums, self._steps_left, self._seconds = None, LEAD_IN, float(line or 0)
        return bool(line)


def train_here(config: Config, args: argparse.Namespace, meter: Meter) -> None:
    import jax

    from iam_jax.data.batches import training_batches
    from iam_jax.data.prepare import prepare
    from iam_jax.devices.mesh import shard_batch
    from iam_jax.training.run import make_run
    from iam_jax.training.step import init_state, make_train_step

    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_rows=args.batch))
    run = make_run(config, prepare(config.data))
    with jax.set_mesh(run.mesh):
        state, train_step, pending = init_state(run), make_train_step(run), None
        for step, batch in enumerate(training_batches(run.rows, args.batch, config.train.seed, 0, run.finish)):
            counts = {"events": int((batch["target"] >= 0).sum()), "slots": batch["user"].size, "softmax": batch["target"].size}
            counts["tokens"] = int((batch["user"] > 0).sum())
            state, values = train_step(state, shard_batch(run.mesh, batch), run.items, np.int32(step), run.frozen)
            if pending is not None:  # as in iam_jax.training.loop, the host waits for the previous step
                jax.block_until_ready(pending[0])
                if not meter.tick(pending[1]):
                    return
            pending = values, counts


def train_peer(config: Config, args: argparse.Namespace, meter: Meter) -> None:
    import rectools_peer

    from iam_jax.data.prepare import prepare

    class MeterCallback(rectools_peer.SharedCallback):
        def on_train_batch_end(self, trainer, module, outputs, batch, number) -> None:
            x = batch["x"]
            counts = {"events": int((batch["y"] != 0).sum()), "slots": x.numel(), "softmax": x.numel(), "tokens": int((x != 0).sum())}
            trainer.should_stop |= not meter.tick(counts)

    rate = args.learning_rate[0] if args.learning_rate else config.optimizer.learning_rate
    rectools_peer.fit(config, args, prepare(config.data).events, MeterCallback(), args.batch, config.train.seed, rate)


# ---- in the main process


@contextlib.contextmanager
def side(name: str, batch: int, args: argparse.Namespace) -> Iterator[Callable[[float], dict]]:
    """Starts a process that trains one side. Yields a function that measures a window of some seconds.

    The attribute `warmup` of the function contains the time of the warm-up steps.
    """
    flags = [f"--path={args.path}", f"--config={args.config}", f"--threads={args.threads}", f"--batch={batch}", f"--side={name}"]
    flags += [f"--dropout={args.dropout}"] * (args.dropout is not None)
    flags += [f"--learning_rate={rate}" for rate in (args.learning_rate or [])[:1]]
    flags += [f"--warmup_steps={args.warmup_steps}", *(["--set", *args.set] if args.set else [])]
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, Path(__file__).with_name("sasrec.py"), "speed", *flags]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)

        def read() -> dict:
            line = process.stdout.readline()
            if not line:
                process.wait()
                errors.seek(0)
                lines = errors.read().strip().splitlines() or ["no message"]
                if process.returncode == 2:
                    raise InputError(lines[-1].removeprefix("error: "))
                raise RuntimeError("\n".join([f"{SIDES[name]} ended with exit code {process.returncode}:", *lines[-20:]]))
            return json.loads(line)

        def window(seconds: float) -> dict:
            print(seconds, file=process.stdin, flush=True)
            result = read()
            for unit in ("events", "slots", "softmax"):
                result[f"{unit}_per_second"] = result[unit] / result["seconds"]
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
    """Combines the samples of one side. samples: results of windows."""
    out = {"batch": batch, "samples": samples} | warmup
    for unit in ("events", "slots", "softmax"):
        rates = [sample[f"{unit}_per_second"] for sample in samples]
        out[f"{unit}_per_second"], out[f"{unit}_spread"] = statistics.median(rates), [min(rates), max(rates)]
    total = {name: sum(sample[name] for sample in samples) for name in ("slots", "tokens", "seconds", "steps", "cpu_seconds")}
    out |= {"padding": 1 - total["tokens"] / total["slots"], "seconds_per_step": total["seconds"] / total["steps"]}
    return out | {"cores": total["cpu_seconds"] / total["seconds"]}


def print_side(label: str, result: dict) -> None:
    low, high = result["events_spread"]
    line = f"{label:<18}{result['batch']:>6,}{result['events_per_second']:>11,.0f}{f'[{low:,.0f}, {high:,.0f}]':>18}"
    line += f"{result['slots_per_second']:>10,.0f}{result['softmax_per_second']:>11,.0f}{result['padding']:>9.1%}"
    print(line + f"{result['seconds_per_step'] * 1e3:>11,.1f}{result['cores']:>7.2f}{result['warmup_seconds']:>10.1f}", flush=True)


def speed(config: Config, args: argparse.Namespace) -> tuple[dict, int]:
    """Runs the subcommand `speed`. Returns the record and the exit code."""
    sizes = {"iam_jax": args.batch_rows or [config.train.batch_rows], "rectools": args.batch_size}
    header = f"{'side':<18}{'batch':>6}{'events/s':>11}{'[least, most]':>18}{'slots/s':>10}{'softmax/s':>11}{'padding':>9}"
    print(header + f"{'ms/step':>11}{'cores':>7}{'warm-up s':>10}", flush=True)
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
    ratios = {f"{unit}_ratio": ours[f"{unit}_per_second"] / theirs[f"{unit}_per_second"] for unit in ("events", "slots", "softmax")}
    ratios["events_ratio_spread"] = [min(pairs), max(pairs)]
    text = f"{ratios['events_ratio']:.2f} times RecTools' real events per second (pairs of windows: {min(pairs):.2f} to {max(pairs):.2f})"
    print(f"{text}, {ratios['slots_ratio']:.2f} times its slots per second, padding included")
    return {"trials": trials, "results": results} | ratios, 0

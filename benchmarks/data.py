"""Measures time and peak memory from two Parquet tables to the first training batch.

    python benchmarks/data.py                                    # 20 million events, a million users, 200,000 items, 2 cores
    python benchmarks/data.py --users=50000 --items=20000 --events=1000000

The tables are random, with a fixed seed. The pipeline runs in its own process with an empty cache, so that the peak resident memory is that
of the pipeline alone. Above --limit_gb the exit code is 1. Prints one table and writes one JSON file.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

# Functions import numpy, polars and iam_jax themselves, to keep this process small: on Linux the ru_maxrss of a child process starts at the
# value of its parent.


def generate(folder: Path, users: int, items: int, events: int) -> None:
    """Writes interactions.parquet (user, item, int64 seconds) and items.parquet (item, title). Equal sizes give equal tables.

    Every user has at least one event; the other events follow power laws over users and items. The events of a user form sessions, and half
    of the events of a session have the time of the session, so that there are ties as in real logs. The order in the file is random.
    """
    import numpy as np
    import polars as pl

    rng = np.random.default_rng(0)

    def draw(n: int, size: int, power: float) -> np.ndarray:
        """Draws `size` integers below n. The probability of k is proportional to (k + 10) ** -power."""
        edges = np.cumsum((np.arange(n) + 10.0) ** -power)
        drawn = np.empty(size, np.int32)
        for start in range(0, size, 1_000_000):  # in parts, to limit the memory
            uniform = rng.random(min(1_000_000, size - start))
            drawn[start : start + 1_000_000] = np.searchsorted(edges, uniform * edges[-1], side="right")
        return np.minimum(drawn, n - 1)

    def text_id(prefix: str, column: str) -> pl.Expr:
        return pl.concat_str(pl.lit(prefix), pl.col(column).cast(pl.String).str.zfill(8)).alias(column)

    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "ar", "en", "il", "os", "um")]
    words = ["".join(syllables[i] for i in rng.integers(len(syllables), size=rng.integers(1, 4))) for _ in range(5_000)]
    lengths = rng.integers(4, 11, size=items)  # 7 words on average
    drawn = iter(draw(len(words), int(lengths.sum()), 1.0).tolist())
    titles = [" ".join(words[next(drawn)] for _ in range(n)).capitalize() for n in lengths.tolist()]
    ids = pl.Series("item", rng.permutation(items), dtype=pl.Int32)  # so that ids do not depend on popularity
    pl.DataFrame({"item": ids, "title": titles}).with_columns(text_id("i", "item")).write_parquet(folder / "items.parquet")

    user = np.concatenate([np.arange(users, dtype=np.int32), draw(users, max(events - users, 0), 0.5)])[:events]
    rng.shuffle(user)
    session = user.astype(np.int64) * 16 + rng.integers(0, 12, size=events, dtype=np.int8)
    seconds = 1_400_000_000 + session * 2_654_435_761 % (5 * 365 * 86_400)  # sessions are spread over five years
    del session
    seconds += np.where(rng.random(events, dtype=np.float32) < 0.5, 0, rng.integers(0, 3_600, size=events, dtype=np.int32))
    item = ids.to_numpy()[draw(items, events, 0.9)]
    frame = pl.LazyFrame({"user": user, "item": item, "timestamp": seconds})
    frame = frame.with_columns(text_id("u", "user"), text_id("i", "item"))
    frame.sink_parquet(folder / "interactions.parquet", row_group_size=1_000_000)  # streams, to limit the memory


def first_batch(folder: Path) -> list[tuple[str, float]]:
    """Runs the pipeline on the tables of `folder` up to the first training batch. Returns the stages in order with their seconds."""
    start = time.perf_counter()
    from iam_jax.config import DataConfig, TrainConfig
    from iam_jax.data.batches import training_batches, training_rows
    from iam_jax.data.prepare import prepare

    times = [("import", start), ("read, check, split, tokenise", time.perf_counter())]
    with tempfile.TemporaryDirectory() as cache:
        data, train = DataConfig(source="table", path=str(folder), cache=cache), TrainConfig()
        prepared = prepare(data)
        times.append(("pack", time.perf_counter()))
        rows = training_rows(prepared.events, prepared.catalogue, data.row_tokens, data.context_items, whole_text=False, seed=train.seed)
        times.append(("first batch", time.perf_counter()))
        next(training_batches(rows, train.batch_rows, train.seed))
        times.append(("end", time.perf_counter()))
    return [(name, after - before) for (name, before), (_, after) in itertools.pairwise(times)]


def measure(folder: Path, cores: int) -> dict:
    """Runs `first_batch` on `cores` cores in this process. Returns the stages and the peak resident memory in bytes."""
    os.environ["POLARS_MAX_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(cores)  # before the libraries are imported
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    stages = first_batch(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"stages": [{"stage": name, "seconds": seconds} for name, seconds in stages], "peak_rss_bytes": peak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--limit_gb", type=float, default=8.0, help="largest allowed peak of resident memory, in units of 1e9 bytes")
    parser.add_argument("--folder", type=Path, help="folder in which the tables are kept (default: a temporary folder)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/data.json"))
    parser.add_argument("--step", choices=["generate", "measure"], help=argparse.SUPPRESS)  # the task of a child process
    args = parser.parse_args()
    if args.step == "generate":
        generate(args.folder, args.users, args.items, args.events)
        return 0
    if args.step == "measure":
        args.output.write_text(json.dumps(measure(args.folder, args.cores)))
        return 0

    with tempfile.TemporaryDirectory() as temporary:
        folder, output = args.folder or Path(temporary), Path(temporary) / "measured.json"
        folder.mkdir(parents=True, exist_ok=True)
        sizes = [f"--{name}={getattr(args, name)}" for name in ("users", "items", "events", "cores")]
        for step in ("generate", "measure"):
            child = [sys.executable, __file__, f"--step={step}", f"--folder={folder}", f"--output={output}", *sizes]
            subprocess.run(child, check=True)
        measured = json.loads(output.read_text())
    seconds, peak = sum(stage["seconds"] for stage in measured["stages"]), measured["peak_rss_bytes"]
    fits = peak <= args.limit_gb * 1e9
    total = {"stage": "total", "seconds": seconds}
    print(f"{args.events:,} events, {args.users:,} users, {args.items:,} items, {args.cores} cores")
    print(f"{'stage':<30}{'seconds':>10}{'events/s':>14}{'peak RSS, GB':>14}")
    for stage in [*measured["stages"], total]:
        memory = f"{peak / 1e9:>14.2f}" if stage is total else ""
        print(f"{stage['stage']:<30}{stage['seconds']:>10.2f}{args.events / stage['seconds']:>14,.0f}{memory}")
    if not fits:
        print(f"error: the peak is above {args.limit_gb:g} GB", file=sys.stderr)
    settings = {name: getattr(args, name) for name in ("users", "items", "events", "cores", "limit_gb")}
    result = settings | measured | {"seconds": seconds, "events_per_second": args.events / seconds, "fits": fits}
    result["versions"] = harness.versions("numpy", "polars", "grain")
    harness.save(args.output, result)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())

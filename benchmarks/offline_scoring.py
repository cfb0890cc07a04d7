"""Measures time and memory of top-K lists for the users of a data set and for many synthetic users, and the effect of a kill.

    python benchmarks/offline_scoring.py --workdir=runs/toys --path=DIR        # DIR: the interactions.* that the run was trained on

Scores the users of the table, and --users synthetic users (histories as long as in the table, items drawn by their frequency there, seed 0)
with `--mode=score` in separate processes. Every request runs three times: without interruption; into another folder until that contains
--parts files, when the process is killed (SIGKILL); and once more with the same command. The files of both folders must be equal byte for
byte; otherwise the exit code is 1. seconds and users/s are those that the uninterrupted run prints, with compilation and without loading.
peak: the largest resident memory of the three runs. kept: number of files after the kill. Prints one table and writes one JSON file.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import polars as pl

from iam_jax.data.tables import find_tables, read_table
from iam_jax.errors import InputError

COMMAND = [sys.executable, "-m", "iam_jax.main", "--mode=score"]


def synthetic_users(table: pl.DataFrame, users: int) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    lengths = rng.choice(table.group_by("user").len().sort("user")["len"].to_numpy(), users)
    rows = int(lengths.sum())
    item = table["item"].gather(rng.integers(0, len(table), rows))
    user = np.repeat(np.arange(users), lengths)
    made = pl.DataFrame({"user": user, "item": item, "timestamp": rng.integers(1_300_000_000, 1_400_000_000, rows)})
    return made.with_columns(user=pl.format("synthetic{}", pl.col("user").cast(pl.String).str.zfill(9))).unique(
        ["user", "item"], maintain_order=True
    )


def run(flags: list[str], output: Path, stop_at: int | None = None) -> tuple[str, int]:
    """Runs one command. Returns its standard output and its peak resident bytes. stop_at: kill it when this many parts exist."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([*COMMAND, *flags, f"--output={output}"], stdout=out, stderr=err)
        while stop_at is not None and process.poll() is None and len(list(output.glob("part-*"))) < stop_at:
            time.sleep(0.02)
        if stop_at is not None:
            process.send_signal(signal.SIGKILL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        if process.returncode not in ((0, -signal.SIGKILL) if stop_at is not None else (0,)):
            sys.exit(f"{' '.join(process.args)} ended with {process.returncode}:\n{err.read()[-2000:]}")
        return out.read(), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(name: str, flags: list[str], folder: Path, parts: int) -> dict:
    whole, killed = folder / f"{name}-whole", folder / f"{name}-killed"
    printed, peak = run(flags, whole)
    users, seconds = re.search(r"([\d,]+) users in ([\d.]+) s", printed).groups()
    _, at_kill = run(flags, killed, parts)
    kept = len(list(killed.glob("part-*")))
    _, after = run(flags, killed)
    files = [{path.name: path.read_bytes() for path in sorted(output.glob("part-*"))} for output in (whole, killed)]
    users, seconds = int(users.replace(",", "")), float(seconds)
    rows = sum(len(pl.read_parquet(path, columns=["rank"])) for path in whole.glob("part-*"))
    record = {
        "users": users,
        "rows": rows,
        "seconds": seconds,
        "users_per_second": users / seconds,
        "peak_bytes": max(peak, at_kill, after),
    }
    return record | {"parts": len(files[0]), "kept": kept, "equal": files[0] == files[1]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="working folder of a trained run")
    parser.add_argument("--path", type=Path, required=True, help="folder with its interactions.*")
    parser.add_argument("--users", type=int, default=100_000, help="number of synthetic users")
    parser.add_argument("--top_k", type=int, default=100)
    parser.add_argument("--part_users", type=int, default=2048, help="users per file")
    parser.add_argument("--parts", type=int, default=3, help="number of files that exist when the process is killed")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/offline_scoring.json"))
    args = parser.parse_args(argv)
    try:
        own = find_tables(args.path)[0]
        events = read_table(own, ["user", "item", "timestamp"])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    facts = harness.environment("iam_jax", "jax", "jaxlib") | {"load": os.getloadavg(), "settings": harness.settings(args)}
    print(f"top {args.top_k} on {facts['device']}, {facts['date']}\n{harness.listed(facts['versions'])}")
    print(f"{'users':>12}{'rows':>12}{'seconds':>10}{'users/s':>10}{'peak MiB':>10}{'parts':>8}{'kept':>6}  equal")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tables = {"own": own, "synthetic": folder / "synthetic.parquet"}
        synthetic_users(events, args.users).write_parquet(tables["synthetic"])
        for name, table in tables.items():
            flags = [
                f"--workdir={args.workdir}",
                f"--users={table}",
                f"--top_k={args.top_k}",
                f"--config.score.part_users={args.part_users}",
            ]
            rows[name] = row = measure(name, flags, folder, args.parts)
            line = f"{row['users']:>12,}{row['rows']:>12,}{row['seconds']:>10.1f}{row['users_per_second']:>10,.0f}"
            print(f"{line}{row['peak_bytes'] / 2**20:>10,.0f}{row['parts']:>8}{row['kept']:>6}  {row['equal']}", flush=True)
    harness.save(args.output, facts | {"results": rows})
    return 0 if all(row["equal"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

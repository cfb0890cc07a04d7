"""What the scripts beside this one share: where a figure was taken, functions that take turns, watched memory, a small random decoder.

Importing this imports the standard library alone, the rest where it is used: some of the scripts measure processes whose memory counts.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import jax
    import numpy as np

    from iam_jax.data.catalogue import Catalogue
    from iam_jax.model import Model

SCHEDULES = ["(intra inter)*2", "full*4", "(full full intra inter)*1"]


# ---- where and with what


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    installed = {"python": platform.python_version()}
    for name in packages:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def environment(*packages: str, device: "jax.Device | None" = None) -> dict[str, Any]:
    """The head of a record: device (of a CPU, the default, architecture and cores), platform of a given device, date, versions."""
    on_cpu = device is None or device.platform == "cpu"
    where = {"device": f"CPU ({platform.machine()}, {cores()} cores)" if on_cpu else device.device_kind}
    if device is not None:
        where["platform"] = device.platform
    return where | {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions(*packages)}


def settings(args: argparse.Namespace, *without: str) -> dict[str, Any]:
    """The flags by name, but for `output` and those of `without`."""
    return {name: value for name, value in vars(args).items() if name not in ("output", *without)}


def save(output: Path, record: dict) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2, default=str) + "\n")  # paths as text


# ---- time and memory


class Timed(NamedTuple):
    first: Any  # what the first run gave
    samples: list[float]  # seconds of the others

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def take_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Timed]:
    """Each function once, to warm up, and then `repeats` times in turn, so that what slows the machine slows them all.

    A function returns when its work is done: what JAX has sent off must be waited for inside.
    """
    timed = {name: Timed(run(), []) for name, run in runs.items()}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            timed[name].samples.append(time.perf_counter() - start)
    return timed


class Peak:
    """Memory within a `with` block, looked at every two milliseconds: bytes `before`, the `most`, and the number of `samples`."""

    def __init__(self, look: Callable[[], int]):
        self._look = look

    def __enter__(self) -> "Peak":
        self.before = self.most = self._look()
        self.samples, self._done = 1, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.most = max(self.most, self._look())
            self.samples += 1

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()


# ---- schedules of a small decoder


def parse(doc: str, name: str, **sizes: tuple[int, str | None]) -> argparse.Namespace:
    """The flags of a script that compares ways of using a small decoder. sizes: its own flags, the default and the help of each."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", action="append", help=f"may be given several times; default: {', '.join(SCHEDULES)}")
    shared = {"history_items": 25, "item_tokens": 12, "vocabulary": 2000, "width": 64, "heads": 4, "repeats": 7}
    helps = {"item_tokens": "of every item, boundary included"}
    for flag, (default, text) in (sizes | {flag: (default, helps.get(flag)) for flag, default in shared.items()}).items():
        parser.add_argument(f"--{flag}", type=int, default=default, help=text)
    parser.add_argument("--output", type=Path, default=Path(f"runs/benchmarks/{name}.json"))
    args = parser.parse_args()
    args.schedule = args.schedule or SCHEDULES
    return args


def make_catalogue(tokens: "np.ndarray", vocabulary: int) -> "Catalogue":
    """Items of these tokens [items, tokens of an item], the last of each replaced by the boundary; no prompt, no suffix."""
    import numpy as np

    from iam_jax.data.catalogue import Catalogue

    items, item_tokens = tokens.shape
    tokens = tokens.astype(np.int32)
    tokens[:, -1] = vocabulary - 1
    return Catalogue(tokens.reshape(-1), np.append(np.arange(items + 1), [items] * 2) * item_tokens, vocabulary, 0, "")


def make_decoder(schedule: str, args: argparse.Namespace, items: int) -> "Model":
    """With rows for one item behind a history, by the flags of `parse`."""
    import ml_collections

    from iam_jax.config import Config, resolve
    from iam_jax.model import make_model

    config = ml_collections.ConfigDict(dataclasses.asdict(Config()))
    config.data.update({"source": "synthetic", "row_tokens": (args.history_items + 1) * args.item_tokens})
    config.model.update({"schedule": schedule, "width": args.width, "heads": args.heads, "dropout": 0.0})
    return make_model(resolve(config), args.vocabulary, items, args.item_tokens)


def random_params(model: "Model", width: int) -> dict:
    """Normal numbers that keep the size of the states, around 1 in the norms' scales; drawn by NumPy: nothing to compile."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)

    def leaf(path, x):
        is_scale = jax.tree_util.keystr(path[-1:], simple=True) == "scale"
        return (is_scale + width**-0.5 * rng.standard_normal(x.shape)).astype(x.dtype)

    return jax.device_put(jax.tree_util.tree_map_with_path(leaf, model.shapes()))


def compare(args: argparse.Namespace, title: str, columns: str, measure: Callable, print_result: Callable[[dict], None]) -> int:
    """Measures every schedule, prints the table and saves the record; the exit code, 1 where a result is not "equal".

    measure: schedule, args -> result.
    """
    import jax

    facts = environment("iam_jax", "jax", "jaxlib", "flax", "numpy", device=jax.devices()[0])
    print(f"{title}, float32, on {facts['device']}, {facts['date']}")
    print(f"width {args.width}, {args.heads} heads, vocabulary {args.vocabulary:,}; median of {args.repeats} runs")
    print(listed(facts["versions"]))
    print(columns)
    results = []
    for schedule in args.schedule:
        results.append(measure(schedule, args))
        print_result(results[-1])
    equal = all(result["equal"] for result in results)
    save(args.output, facts | {"settings": settings(args), "equal": equal, "results": results})
    return 0 if equal else 1

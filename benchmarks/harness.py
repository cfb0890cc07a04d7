"""Shared functions of the benchmarks: facts about the machine, fair timing, peak memory, and a small decoder with random parameters.

Importing this module imports only the standard library. Other libraries are imported inside the functions that need them, because some
benchmarks measure the memory of their processes.
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


# ---- facts about the machine


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def versions(*packages: str) -> dict[str, str]:
    """Returns the versions of Python and of those packages that are installed."""
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
    """Returns the first fields of a record: device, platform (if a device is given), date and versions.

    Without a device, and for CPUs, the field "device" contains the architecture and the number of cores.
    """
    on_cpu = device is None or device.platform == "cpu"
    facts = {"device": f"CPU ({platform.machine()}, {cores()} cores)" if on_cpu else device.device_kind}
    if device is not None:
        facts["platform"] = device.platform
    return facts | {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions(*packages)}


def settings(args: argparse.Namespace, *excluded: str) -> dict[str, Any]:
    """Returns the values of the flags by name, except `output` and the excluded ones."""
    return {name: value for name, value in vars(args).items() if name not in ("output", *excluded)}


def save(output: Path, record: dict) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2, default=str) + "\n")  # paths as text


# ---- time and memory


class Timed(NamedTuple):
    first: Any  # the result of the first run
    samples: list[float]  # seconds of the other runs

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def take_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Timed]:
    """Calls each function once as a warm-up, then `repeats` times in turn, so that other load on the machine affects all of them.

    A function must wait for its results before it returns, because JAX dispatches work asynchronously.
    """
    timed = {name: Timed(run(), []) for name, run in runs.items()}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            timed[name].samples.append(time.perf_counter() - start)
    return timed


class Peak:
    """Samples memory every two milliseconds inside a `with` block.

    Fields: `before`, bytes on entry; `most`, the largest sample; `samples`, the number of samples. look: returns the bytes in use.
    """

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


# ---- a small decoder


def parse(doc: str, name: str, **sizes: tuple[int, str | None]) -> argparse.Namespace:
    """Parses the flags of a script that compares ways to use a small decoder. sizes: (default, help) of the script's own flags."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", action="append", help=f"may be given several times; default: {', '.join(SCHEDULES)}")
    shared = {"history_items": 25, "item_tokens": 12, "vocabulary": 2000, "width": 64, "heads": 4, "repeats": 7}
    helps = {"item_tokens": "tokens per item, including the boundary"}
    for flag, (default, text) in (sizes | {flag: (default, helps.get(flag)) for flag, default in shared.items()}).items():
        parser.add_argument(f"--{flag}", type=int, default=default, help=text)
    parser.add_argument("--output", type=Path, default=Path(f"runs/benchmarks/{name}.json"))
    args = parser.parse_args()
    args.schedule = args.schedule or SCHEDULES
    return args


def make_catalogue(tokens: "np.ndarray", vocabulary: int) -> "Catalogue":
    """Makes a catalogue without prompt and suffix. tokens: [items, tokens per item]; the last token of each is replaced by the boundary."""
    import numpy as np

    from iam_jax.data.catalogue import Catalogue

    items, item_tokens = tokens.shape
    tokens = tokens.astype(np.int32)
    tokens[:, -1] = vocabulary - 1
    return Catalogue(tokens.reshape(-1), np.append(np.arange(items + 1), [items] * 2) * item_tokens, vocabulary, 0, "")


def make_decoder(schedule: str, args: argparse.Namespace, items: int) -> "Model":
    """Makes the decoder for the flags of `parse`. Its rows have space for a history and one more item."""
    import ml_collections

    from iam_jax.config import Config, resolve
    from iam_jax.model import make_model

    config = ml_collections.ConfigDict(dataclasses.asdict(Config()))
    config.data.update({"source": "synthetic", "row_tokens": (args.history_items + 1) * args.item_tokens})
    config.model.update({"schedule": schedule, "width": args.width, "heads": args.heads, "dropout": 0.0})
    return make_model(resolve(config), args.vocabulary, items, args.item_tokens)


def random_params(model: "Model", width: int) -> dict:
    """Draws parameters from normal distributions that preserve the scale of the states; the mean is 1 for the scales of norms.

    NumPy draws them, so that nothing is compiled.
    """
    import jax
    import numpy as np

    rng = np.random.default_rng(0)

    def leaf(path, x):
        is_scale = jax.tree_util.keystr(path[-1:], simple=True) == "scale"
        return (is_scale + width**-0.5 * rng.standard_normal(x.shape)).astype(x.dtype)

    return jax.device_put(jax.tree_util.tree_map_with_path(leaf, model.shapes()))


def compare(args: argparse.Namespace, title: str, columns: str, measure: Callable, print_result: Callable[[dict], None]) -> int:
    """Measures every schedule, prints the table and saves the record. measure: (schedule, args) -> result.

    Returns the exit code, which is 1 if a result is not "equal".
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

"""What an accelerator can do at most, by its maker's data sheet: for plans (plan.py) and for model FLOPs utilisation.

TPU figures are those of Google Cloud's architecture pages, GPU figures those of NVIDIA's data sheets (dense, without sparsity). The
bandwidth of links is what a chip can send, all its links together: half of what the sheets call bidirectional. Prices are what Google
Cloud lists on demand in its cheapest region of the United States, for a chip an hour, as of 2025: they move, and `--price` takes another.
"""

import dataclasses
import re
from collections import Counter

_GIB = 2**30

Flops = Counter  # by what is multiplied, as in Chip.flops


@dataclasses.dataclass(frozen=True)
class Chip:
    """flops: multiplications and additions a second, by what is multiplied. "float32": a product as JAX does it by default, with inputs
    rounded to bfloat16 on a TPU and to TF32 on a GPU; "float32 highest": with nothing rounded, six passes on a TPU."""

    name: str
    flops: dict[str, float]  # "bfloat16", "float32", "float32 highest"
    hbm_bytes: int
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    dollars_per_hour: float | None  # None: not listed
    source: str  # of the price


def _tpu(name: str, teraflops: float, gib: int, hbm: float, link: float, dollars: float) -> Chip:
    flops = {"bfloat16": teraflops * 1e12, "float32": teraflops * 1e12, "float32 highest": teraflops * 1e12 / 6}
    return Chip(name, flops, gib * _GIB, hbm * 1e9, link * 1e9, dollars, "Google Cloud, on demand, 2025")


def _gpu(name: str, teraflops: tuple[float, float, float], gib: int, hbm: float, link: float, dollars: float | None) -> Chip:
    flops = dict(zip(("bfloat16", "float32", "float32 highest"), (1e12 * x for x in teraflops), strict=True))
    return Chip(name, flops, gib * _GIB, hbm * 1e9, link * 1e9, dollars, "Google Cloud, on demand, an eighth of a machine, 2025")


# By what jax.Device.device_kind says.
_CHIPS = {
    r"TPU v4": _tpu("TPU v4", 275, 32, 1228, 300, 3.22),
    r"TPU v5( lite|e)": _tpu("TPU v5e", 197, 16, 819, 200, 1.20),
    r"TPU v5p?": _tpu("TPU v5p", 459, 95, 2765, 600, 4.20),
    r"TPU v6( lite|e)": _tpu("TPU v6e", 918, 32, 1638, 400, 2.70),
    r"NVIDIA A100-(SXM4|PCIE)-40GB": _gpu("NVIDIA A100 40GB", (312, 156, 19.5), 40, 1555, 300, 3.67),
    r"NVIDIA A100(-SXM4-80GB| 80GB PCIe)": _gpu("NVIDIA A100 80GB", (312, 156, 19.5), 80, 2039, 300, 5.07),
    r"NVIDIA H100 80GB HBM3": _gpu("NVIDIA H100 SXM", (989, 494, 67), 80, 3350, 450, 11.06),
    r"NVIDIA H200": _gpu("NVIDIA H200", (989, 494, 67), 140, 4800, 450, 10.60),
    r"NVIDIA B200": _gpu("NVIDIA B200", (2250, 1120, 75), 179, 7700, 900, None),
}


def find_chip(device_kind: str) -> Chip | None:
    """The chip that calls itself so (`jax.Device.device_kind`); None where it is not in the table, like a CPU."""
    return next((chip for kind, chip in _CHIPS.items() if re.fullmatch(kind, device_kind)), None)


def seconds_at_peak(flops: Flops, chip: Chip) -> float:
    """What one chip would need, every product at the peak of its kind."""
    return sum(count / chip.flops[kind] for kind, count in flops.items())


def utilisation(flops: Flops, chip: Chip, devices: int, seconds: float) -> float:
    """Model FLOPs utilisation: the share of a step's seconds that its products would take at the devices' peak."""
    return seconds_at_peak(flops, chip) / devices / seconds

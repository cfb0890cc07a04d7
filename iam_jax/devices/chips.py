"""Peak performance of accelerators from their data sheets, for plans (plan.py) and for model FLOPs utilisation.

TPU figures come from the architecture pages of Google Cloud, GPU figures from the data sheets of NVIDIA (dense, without sparsity). The
link bandwidth is what a chip can send over all its links together, which is half of the bidirectional figure in the sheets. Prices are
those of Google Cloud per chip and hour, on demand, in its cheapest region of the United States, as of 2025. Prices change; `--price` sets
another one.
"""

import dataclasses
import re
from collections import Counter

_GIB = 2**30

Flops = Counter  # FLOPs by dtype and precision, with the keys of Chip.flops


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak performance and price of one chip.

    flops holds FLOP/s by dtype and precision: "bfloat16"; "float32", a product at JAX's default precision, which rounds inputs to bfloat16
    on a TPU and to TF32 on a GPU; "float32 highest", without rounding, which takes six passes on a TPU.
    """

    name: str
    flops: dict[str, float]
    hbm_bytes: int
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    dollars_per_hour: float | None  # None if no price is listed
    price_source: str


def _tpu(name: str, teraflops: float, gib: int, hbm: float, link: float, dollars: float) -> Chip:
    flops: dict[str, float] = {"bfloat16": teraflops * 1e12, "float32": teraflops * 1e12, "float32 highest": teraflops * 1e12 / 6}
    return Chip(name, flops, gib * _GIB, hbm * 1e9, link * 1e9, dollars, "Google Cloud, on demand, 2025")


def _gpu(name: str, teraflops: tuple[float, float, float], gib: int, hbm: float, link: float, dollars: float | None) -> Chip:
    flops: dict[str, float] = dict(zip(("bfloat16", "float32", "float32 highest"), (1e12 * x for x in teraflops), strict=True))
    return Chip(name, flops, gib * _GIB, hbm * 1e9, link * 1e9, dollars, "Google Cloud, on demand, an eighth of a machine, 2025")


# Patterns of jax.Device.device_kind.
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
    """Returns the chip with this `jax.Device.device_kind`, or None if the table does not contain it (a CPU, for instance)."""
    return next((chip for kind, chip in _CHIPS.items() if re.fullmatch(kind, device_kind)), None)


def seconds_at_peak(flops: Flops, chip: Chip) -> float:
    """Seconds that one chip would take if every product ran at the peak of its dtype and precision."""
    return sum(count / chip.flops[kind] for kind, count in flops.items())


def utilisation(flops: Flops, chip: Chip, devices: int, seconds: float) -> float:
    """Model FLOPs utilisation: the time that a step's FLOPs would take at the devices' peak, as a share of the step's actual seconds."""
    return seconds_at_peak(flops, chip) / devices / seconds

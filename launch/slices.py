"""TPU slices by the names that `--mode=plan --topology=` takes, such as v5e:4x4, and what the clouds call them."""

import dataclasses
import math
import re

from iam_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Kind:
    api: str  # Cloud TPU's name, in accelerator types
    cores: int  # of a chip, as accelerator types count them
    axes: int  # of a topology
    label: str  # of GKE's nodes
    runtime: str  # software of Cloud TPU VMs


KINDS = {
    "v4": Kind("v4", 2, 3, "tpu-v4-podslice", "tpu-ubuntu2204-base"),
    "v5e": Kind("v5litepod", 1, 2, "tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite"),
    "v5p": Kind("v5p", 2, 3, "tpu-v5p-slice", "v2-alpha-tpuv5"),
    "v6e": Kind("v6e", 1, 2, "tpu-v6e-slice", "v2-alpha-tpuv6e"),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    kind: Kind
    shape: str  # "4x4", in chips
    chips: int

    @property
    def accelerator_type(self) -> str:
        return f"{self.kind.api}-{self.chips * self.kind.cores}"


def parse(text: str) -> Slice:
    """Raises InputError where there is no such slice."""
    name, _, shape = text.partition(":")
    sizes = shape.split("x")
    if name not in KINDS or not all(re.fullmatch("[1-9][0-9]*", size) for size in sizes):
        raise InputError(f"--topology={text}: no TPU slice, such as v5e:4x4 or v5p:2x4x4 (there are {', '.join(KINDS)})")
    kind = KINDS[name]
    if len(sizes) != kind.axes:
        raise InputError(f"--topology={text}: a {name} slice has {kind.axes} axes")
    return Slice(kind, shape, math.prod(map(int, sizes)))

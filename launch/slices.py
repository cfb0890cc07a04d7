"""TPU slices by the names of `--mode=plan --topology=`, such as v5e:4x4, and their names in Cloud TPU and GKE."""

import dataclasses
import math
import re

from iam_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Kind:
    """A generation of TPUs."""

    api: str  # the name in Cloud TPU's accelerator types
    cores: int  # cores per chip in accelerator types
    axes: int  # number of axes of a topology
    label: str  # label of GKE nodes
    runtime: str  # default software version of Cloud TPU VMs


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
    """Parses a name such as v5e:4x4. Raises InputError if it is not the name of a slice."""
    name, _, shape = text.partition(":")
    sizes = shape.split("x")
    if name not in KINDS or not all(re.fullmatch("[1-9][0-9]*", size) for size in sizes):
        raise InputError(f"--topology={text}: must be a TPU slice of {', '.join(KINDS)}, such as v5e:4x4 or v5p:2x4x4")
    kind = KINDS[name]
    if len(sizes) != kind.axes:
        raise InputError(f"--topology={text}: a {name} slice has {kind.axes} axes")
    return Slice(kind, shape, math.prod(map(int, sizes)))

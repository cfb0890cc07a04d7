"""Devices that are not here: the chips of a TPU slice, for which libtpu compiles on any machine."""

import importlib.util
import math
import os
import re

from iam_jax.errors import InputError

LOCAL = "local"
_TPU = re.compile(r"(v4|v5e|v5p|v6e):(\d+)x(\d+)(?:x(\d+))?")


def prepare(topology: str) -> None:
    """To be called before JAX is used: the environment in which it compiles for `topology`. Raises InputError for a name that is none."""
    if topology == LOCAL:
        return
    if not _TPU.fullmatch(topology):
        raise InputError(f"--topology={topology}: must be {LOCAL} or a TPU slice, such as v5e:2x4, v5p:2x4x4 or v6e:4x4")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(f"--topology={topology} needs libtpu: pip install 'iam_jax[tpu]'")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU machine to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing runs: other processes may hold it


def devices(topology: str) -> list:
    """The slice's chips; for "local" the devices that are here. Raises InputError where there is no such slice."""
    import jax
    from jax.experimental import topologies

    if topology == LOCAL:
        return jax.devices()
    chip, *sizes = _TPU.fullmatch(topology).groups()
    sides = [int(size or 1) for size in sizes]
    # Machines of four chips, or fewer where there are not so many; with both cores of a v4 as one device, as JAX has them.
    options = {"chips_per_host_bounds": (*(min(side, 2) for side in sides[:2]), 1)}
    options |= {"chip_config_name": "megacore"} if chip == "v4" else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except Exception as error:  # of several types
        raise InputError(f"--topology={topology}: libtpu has no such slice ({str(error).splitlines()[0]})") from error
    if len(found) != math.prod(sides):
        raise InputError(f"--topology={topology}: libtpu makes {len(found)} devices of it")
    return list(found)

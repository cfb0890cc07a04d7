"""Devices that are not attached to this machine: the chips of a TPU slice, for which libtpu can compile anywhere."""

import importlib.util
import math
import os
import re

from iam_jax.errors import InputError

LOCAL = "local"
_TPU = re.compile(r"(v4|v5e|v5p|v6e):(\d+)x(\d+)(?:x(\d+))?")


def prepare(topology: str) -> None:
    """Sets the environment variables that JAX needs to compile for `topology`. Call it before the first use of JAX.

    topology: "local" or a TPU slice, such as v5e:2x4. Raises InputError for any other name, and if libtpu is missing.
    """
    if topology == LOCAL:
        return
    if not _TPU.fullmatch(topology):
        raise InputError(f"--topology={topology}: must be {LOCAL} or a TPU slice, such as v5e:2x4, v5p:2x4x4 or v6e:4x4")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(f"--topology={topology} needs libtpu: pip install 'iam_jax[tpu]'")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server of a TPU machine
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing runs on a TPU, so other processes may use libtpu too


def devices(topology: str) -> list:
    """Returns the devices of the slice, or for "local" those of this machine. Raises InputError if there is no such slice."""
    import jax
    from jax.experimental import topologies

    if topology == LOCAL:
        return jax.devices()
    matched = _TPU.fullmatch(topology)
    assert matched is not None, "prepare checks the name"
    chip, *sizes = matched.groups()
    sides = [int(size or 1) for size in sizes]
    # Hosts have four chips, or all chips of a smaller slice. JAX presents both cores of a v4 chip as one device.
    options = {"chips_per_host_bounds": (*(min(side, 2) for side in sides[:2]), 1)}
    options |= {"chip_config_name": "megacore"} if chip == "v4" else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except Exception as error:  # the type depends on the cause
        raise InputError(f"--topology={topology}: libtpu has no such slice ({str(error).splitlines()[0]})") from error
    if len(found) != math.prod(sides):
        raise InputError(f"--topology={topology}: libtpu finds {len(found)} devices in it instead of {math.prod(sides)}")
    return list(found)

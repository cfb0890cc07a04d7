"""Memory of a process that computes on a CPU."""

import ctypes
import importlib.util
import os

# Parameters of mallopt(3): M_MMAP_MAX, no array has a mapping of its own; M_TRIM_THRESHOLD, the heap never shrinks; M_ARENA_MAX, one heap,
# since the arenas of XLA's threads hold at most 64 MiB.
_OPTIONS = {-4: 0, -1: -1, -8: 1}
_VARIABLES = (  # of users who set them otherwise
    "GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX",
)  # fmt: skip


def keep_freed_memory() -> bool:
    """Keeps freed memory for the next arrays, if JAX has only CPUs to compute on. Returns whether it does.

    XLA allocates the intermediate arrays of a CPU program anew in every call. By default glibc gives large ones back to the system at once,
    and then each of their pages costs a fault again, which can take half of a training step. Call it before libraries start threads, since
    arenas that exist stay in use. It changes nothing with another C library, or if the environment sets one of these options. Afterwards
    the process keeps the most memory that it has used.
    """
    if not _only_cpus() or any(name in os.environ for name in _VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return all(mallopt(option, value) for option, value in _OPTIONS.items())


def _only_cpus() -> bool:
    """Whether JAX will find no accelerator, as far as can be seen without starting it."""
    chosen = os.environ.get("JAX_PLATFORMS")
    return chosen == "cpu" if chosen else not any(importlib.util.find_spec(name) for name in ("libtpu", "jax_plugins"))

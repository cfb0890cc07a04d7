"""Freed memory is kept for the next arrays: counted by the page faults of a process that computes."""

import os
import platform
import subprocess
import sys

import pytest

from iam_jax.devices import memory

# A call allocates several arrays of 32 MiB. XLA runs it in a thread of its own.
CODE = """
import resource
from iam_jax.devices.memory import keep_freed_memory
print(keep_freed_memory())
import jax, jax.numpy as jnp
call = jax.jit(lambda x: jnp.sort(jnp.sort(jnp.sort(x, axis=0), axis=1), axis=0).sum())
x = jnp.arange(2**23, dtype=jnp.float32).reshape(2**10, -1)
counts = []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call(x).block_until_ready()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(counts))
"""


def faults(**env) -> tuple[bool, int]:
    env = {name: value for name, value in os.environ.items() if name not in memory._VARIABLES} | {"JAX_PLATFORMS": "cpu"} | env
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_arrays_of_later_calls_take_freed_memory():
    kept, few = faults()
    own, many = faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert kept and not own  # the user's choice counts
    assert many > 2**25 / 4096  # in every call an array, page by page
    assert few < many / 20  # in some call none; the heap grows to the size of a call in the others


def test_only_where_there_are_only_cpus(monkeypatch):
    for name in memory._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: type("Library", (), {"mallopt": staticmethod(lambda *a: calls.append(a) or 1)}))
    for chosen in ("cuda", "tpu,cpu"):
        monkeypatch.setenv("JAX_PLATFORMS", chosen)
        assert not memory.keep_freed_memory()
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: name == "jax_plugins" or None)
    assert not memory.keep_freed_memory() and not calls
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None)
    assert memory.keep_freed_memory() and len(calls) == 3
    assert all(-(2**31) <= value < 2**31 for _, value in calls)  # C integers
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: type("Library", (), {"mallopt": staticmethod(lambda *a: calls.append(a) or 0)}))
    assert not memory.keep_freed_memory() and len(calls) == 4  # after a refusal nothing else is changed
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())  # another C library
    assert not memory.keep_freed_memory()

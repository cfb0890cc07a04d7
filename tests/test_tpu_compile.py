"""A whole training step, compiled ahead of time for TPUs that are not there. Needs libtpu (`pip install -e '.[test,tpu]'`), which one
process at a time can hold: not for `pytest -n`."""

import importlib.util
import os
import re
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `tpu`)"),
    pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="one process at a time can hold libtpu: run this file alone"),
]


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[1] / "benchmarks" / "tpu_memory.py"
    spec = importlib.util.spec_from_file_location("tpu_memory", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernels(compiled):
    return {name.split(".")[0] for name in re.findall(r"range_attention_\w+", compiled.as_text())}


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("mesh_shape", [(1, 1, 1), (2, 1, 2)], ids=str)
def test_a_training_step_compiles(benchmark, chip, mesh_shape):
    """On one chip, and with rows and heads over four."""
    compiled = benchmark.compile_step(chip, mesh_shape, 2048, 4, attention="tpu", self_key=True, head_size=64 if chip == "v5e" else 128)
    assert kernels(compiled) >= {"range_attention_forward", "range_attention_dq", "range_attention_dkv"}


def test_temporaries_grow_like_the_length(benchmark):
    """Eight times the length: some eight times the memory with the kernel (the compiler keeps some of a short row on the chip), and far
    more with the reference, already at four times the length."""

    def temporaries(implementation, length):
        return benchmark.temporaries(benchmark.compile_step("v5p", (1, 1, 1), length, 2, attention=implementation))

    kernel = [temporaries("tpu", length) for length in (2048, 4096, 16384)]
    assert 3.5 < kernel[2] / kernel[1] < 4.6 and kernel[2] / kernel[0] < 10
    assert temporaries("reference", 8192) / temporaries("reference", 2048) > 12

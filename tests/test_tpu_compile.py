"""A whole training step, compiled ahead of time for TPUs that are not there. Needs libtpu (`pip install -e '.[test,tpu]'`), which one
process at a time can hold: not for `pytest -n`."""

import importlib
import importlib.util
import os
import re
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `tpu`)"),
    pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="one process at a time can hold libtpu: run this file alone"),
]


@pytest.fixture(scope="module", autouse=True)
def benchmarks_are_modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield


@pytest.fixture(scope="module")
def benchmark():
    return importlib.import_module("tpu_memory")


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


def test_adapters_of_a_pretrained_model(tmp_path):
    """Two layers of width 256 (4 heads of 64, two of keys and values, MLP 512), an inserted layer behind each, 512 tokens, adapters of rank
    4, an item table of 1,000, over two chips that halve the axis D: what the compiler is given is what arithmetic says."""
    module = importlib.import_module("pretrained_memory")
    shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = {"schedule": "(full +inter)*2", "lora": {"rank": 4}}
    config = module.make_config("llama3_1b_amazon", "lora", tmp_path, shape, **model)
    row = module.measure(config, "v5e:2x2", (1, 2, 1), 1000)

    matrices = 256 * (256 + 128 + 128 + 256) + 3 * 256 * 512  # of a layer; every one has the axis D
    scales = 2 * 256  # of a layer; on every chip
    with_D = 4 * 256 * 7  # the sides of a layer's seven adapters that have it
    without = 4 * (256 + 128 + 128 + 256 + 3 * 512)
    frozen = (2 * matrices + 512 * 256) // 2 + 2 * scales + 256
    trained = (2 * (matrices + with_D) + 256 + 256 * 256) // 2 + 2 * (scales + without) + 1000 * 256  # boundary, projection; items
    assert row["frozen"] == 2 * frozen and row["trained"] == 4 * trained
    assert row["optimizer"] == 2 * 4 * trained + 2 * 4  # AdamW's two moments, two counts of steps
    held = row["frozen"] + row["trained"] + row["optimizer"]
    batch = 4 * 1024 * 4 * 5 + 4 * 4 * 2 * (1024 // 12)  # four rows a chip: five numbers a slot, two a target
    items = 1000 * (4 * 12 + 4 + 1 + 4 + 4 + 4)
    assert row["fits"] and held + batch + items <= row["arguments"] < 1.05 * (held + batch + items)  # arrays fill whole tiles
    assert row["total"] >= row["arguments"] + row["temporaries"]

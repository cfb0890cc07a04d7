"""A whole training step, and plans, compiled ahead of time for TPUs that are not attached. Needs libtpu (`pip install -e '.[test,tpu]'`).
Only one process at a time can use libtpu, so these tests are skipped with `pytest -n`."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
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
    """On one chip, and with rows and heads sharded over four."""
    compiled = benchmark.compile_step(chip, mesh_shape, 2048, 4, attention="tpu", self_key=True, head_size=64 if chip == "v5e" else 128)
    assert kernels(compiled) >= {"range_attention_forward", "range_attention_dq", "range_attention_dkv"}


def test_temporaries_grow_like_the_length(benchmark):
    """With eight times the length, the kernel needs about eight times the memory (the compiler keeps parts of a short row on the chip).
    The reference needs far more, already at four times the length."""

    def temporaries(implementation, length):
        return benchmark.temporaries(benchmark.compile_step("v5p", (1, 1, 1), length, 2, attention=implementation))

    kernel = [temporaries("tpu", length) for length in (2048, 4096, 16384)]
    assert 3.5 < kernel[2] / kernel[1] < 4.6 and kernel[2] / kernel[0] < 10
    assert temporaries("reference", 8192) / temporaries("reference", 2048) > 12


def test_adapters_of_a_pretrained_model(tmp_path):
    """Two layers of width 256 (4 heads of 64, two key-value heads, MLP 512), an inserted layer after each, 512 tokens, adapters of rank 4,
    an item table of 1,000, on two chips that shard the axis D: the bytes of the program's arguments equal those computed by hand."""
    module = importlib.import_module("pretrained_memory")
    shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = {"schedule": "(full +inter)*2", "lora": {"rank": 4}}
    config = module.make_config("llama3_1b_amazon", "lora", tmp_path, (1, 2, 1), shape, **model)
    program = module.measure(config, "v5e:2x2", 1000)
    row = module.facts(program)

    matrices = 256 * (256 + 128 + 128 + 256) + 3 * 256 * 512  # per layer; every one has the axis D
    scales = 2 * 256  # per layer; on every chip
    with_D = 4 * 256 * 7  # the matrices of a layer's seven adapters that have the axis D
    without = 4 * (256 + 128 + 128 + 256 + 3 * 512)
    frozen = (2 * matrices + 512 * 256) // 2 + 2 * scales + 256
    trained = (2 * (matrices + with_D) + 256 + 256 * 256) // 2 + 2 * (scales + without) + 1000 * 256  # boundary, projection; items
    assert row["frozen"] == 2 * frozen and row["trained"] == 4 * trained
    assert row["optimizer"] == 2 * 4 * trained + 2 * 4  # two moments of AdamW and two counts of steps
    held = row["frozen"] + row["trained"] + row["optimizer"]
    targets = 1 + 85 - 2  # a row holds one user, whose first event is a target after the prompt, and whose last two events are held out
    batch = 4 * 1024 * 4 * 5 + 4 * 4 * 3 * (targets - 1) + 4  # four rows per chip: five numbers per slot, three per target; the step
    items = 1000 * (4 * 12 + 4 + 1 + 4 + 4 + 4)
    assert row["batch and items"] == batch + items
    assert row["fits"] and program.padding < 0.05 * (held + batch + items)  # arrays fill whole tiles
    assert row["total"] >= held + batch + items + row["temporaries"]
    # The matrices of every layer are gathered from both chips, for the forward and again for the backward pass.
    assert set(program.traffic.collectives) >= {"all-gather"} and program.traffic.unknown_loops == 0
    assert program.traffic.collectives["all-gather"] > 2 * 2 * matrices  # in bfloat16; each chip sends half of each matrix
    assert program.traffic.memory > held


def plan(tmp_path, *flags, **shape_fields):
    shape = {"model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
    shape |= {"tie_word_embeddings": True, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(shape | shape_fields))
    config = Path(__file__).parents[1] / "configs" / "llama3_1b_amazon.py"
    command = [sys.executable, "-m", "iam_jax.main", "--mode=plan", f"--config={config}:full", f"--config.model.pretrained={tmp_path}"]
    command += ["--config.model.schedule=intra inter", "--num_items=1000", f"--output={tmp_path / 'plan.json'}", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ)


def test_a_plan(tmp_path):
    """The plan of training a tiny model on four chips, given by its config.json alone. The printed and the written plan agree."""
    done = plan(tmp_path, "--topology=v5e:2x2", "--programs=training", "--config.mesh.data=2", "--config.mesh.fsdp=-1")
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "plan.json").read_text())
    assert facts["chip"] == "TPU v5e" and facts["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1} and facts["verdict"] == ""
    (step,) = facts["programs"]["training"]
    assert f"{step['total'] / 2**30:.3f}" in done.stdout and "1.20 USD per chip and hour" in done.stdout
    fast, slow = facts["step"]["bounds"]
    assert 0 < fast < slow == pytest.approx(sum(facts["step"]["seconds"].values()))
    assert {"all-gather", "all-reduce"} & step["collective_bytes"].keys() and step["unknown_loops"] == 0


def test_a_plan_that_does_not_fit(tmp_path):
    """The parameters alone do not fit, so nothing is compiled."""
    done = plan(tmp_path, "--topology=v5e:1x1", "--programs=training", "--num_items=100000", hidden_size=16_384)
    assert done.returncode == 3 and (tmp_path / "plan.json").exists()
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: v5e:1x1: training (training step) needs more than") and "but 15.52 GiB are available" in error


def test_an_unknown_slice(tmp_path):
    done = plan(tmp_path, "--topology=v5e:3x5")
    assert done.returncode == 2 and "error: --topology=v5e:3x5: libtpu has no such slice" in done.stderr
    assert not (tmp_path / "plan.json").exists()

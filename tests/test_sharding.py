"""Meshes of eight simulated devices run in a separate process, which prints its results as JSON."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forks import python
from helpers import make_config, on_devices, random_params, stack, tiny_data
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from iam_jax.config import MeshConfig
from iam_jax.devices.mesh import AXES, BATCH, axes_of, constrain_activations, make_mesh, mesh_sizes, param_sharding, shard_batch, split_rows
from iam_jax.errors import InputError
from iam_jax.model import make_model

MESHES = ((1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2))
STEPS = 20
MICRO = ("sampled", "cached")  # softmaxes that are compared between one device and micro-batches on a mesh
CONFIG = {
    "data": {"row_tokens": 24},
    "model": {
        "schedule": "intra inter",
        "heads": 8,
        "kv_heads": 4,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "tie_tokens": False,
    },
    "objective": {"vectors": "both", "softmax": "full", "token": 0.5},
    # With a small epsilon, Adam's first step is the sign of the gradient, which is noise if the gradient is zero up to rounding
    "optimizer": {"warmup_steps": 0, "decay_steps": 0, "learning_rate": 0.1, "epsilon": 1e-2, "clip_norm": 0.0},
}
DATA = {"users": 40, "items": 16, "vocabulary": 16}
# Of the (2, 2, 2) mesh, by hand: 16 wide, 8 heads, 4 key-value heads, 24 feed-forward, 16 items, 16 tokens
EXPECTED = {
    "decoder/embedding_VD": ("tensor", "fsdp"),
    "decoder/final_norm/scale": (),
    "decoder/blocks/0_0/attention/query_DNH": (None, "fsdp", "tensor", None),
    "decoder/blocks/0_0/attention/key_DKH": (None, "fsdp", "tensor", None),
    "decoder/blocks/0_0/attention/out_NHD": (None, "tensor", None, "fsdp"),
    "decoder/blocks/0_0/attention/query_NH": (None, "tensor", None),
    "decoder/blocks/1_0/mlp/up_DF": (None, "fsdp", "tensor"),
    "decoder/blocks/1_0/mlp/down_FD": (None, "tensor", "fsdp"),
    "decoder/blocks/1_0/mlp/up_F": (None, "tensor"),
    "decoder/blocks/1_0/mlp_norm/scale": (),
    "table_IE": ("tensor", None),
    "state_DE": ("fsdp", None),
    "text_DE": ("fsdp", None),
    "output_VD": ("tensor", "fsdp"),
}
# The part of each that a device holds, on the other meshes. Eight devices along `tensor` exceed the number of key-value heads.
ALONG_D = {name for name, axes in EXPECTED.items() if "fsdp" in axes}
ALONG_HEADS = {name for name, axes in EXPECTED.items() if "tensor" in axes and "key" not in name}


def names_of(tree) -> dict:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def part_of(x: jax.Array) -> float:
    """The part of an array that each device holds, which is equal for all devices."""
    (held,) = {shard.data.nbytes for shard in x.addressable_shards}
    assert len(x.addressable_shards) == x.sharding.num_devices
    return held / x.nbytes


def mesh_of(mesh_shape: tuple[int, int, int]) -> jax.sharding.Mesh:
    devices = np.array(jax.devices()[: int(np.prod(mesh_shape))]).reshape(mesh_shape)
    return jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def attend_on(mesh_shape: tuple[int, int, int]) -> dict:
    """Values and gradients of every backend; of one kernel, since what is sharded does not depend on it, also for one key-value head (fewer
    than the tensor shards of (2, 2, 2)) and for a number of rows that is not divisible."""
    from iam_jax.kernels.range_attention import range_attention

    results, rng = {}, np.random.default_rng(0)
    with jax.set_mesh(mesh_of(mesh_shape)):
        for K, B in ((2, 8), (1, 4), (2, 3)):
            q, k, v, do = (rng.standard_normal((B, 20, n, 16)).astype(np.float32) for n in (4, K, K, 4))
            t = np.tile(np.arange(20, dtype=np.int32), (B, 1))
            for backend in ("local", "tpu", "gpu") if (K, B) == (2, 8) else ("tpu",):

                @jax.jit
                def run(q, k, v, do, t, backend=backend):
                    def attend(q, k, v):
                        first, second = (jnp.maximum(t - 9, 0), t // 5 * 5), (t // 5 * 5 + 1, t + 1)
                        options = {"second": second, "include_self": True, "reach": (9, 0), "implementation": backend}
                        return range_attention(q, k, v, *first, **options)

                    o, pullback = jax.vjp(attend, q, k, v)
                    return o, *pullback(do)

                lowered = run.lower(q, k, v, do, t)
                results[f"{backend}, {K} heads, {B} rows"] = {
                    "results": [np.asarray(x).tolist() for x in lowered.compile()(q, k, v, do, t)],
                    "by hand": any(name in lowered.as_text() for name in ("manual_computation", "shard_map")),
                }
    return results


def constraints_on(mesh_shape: tuple[int, int, int]) -> list:
    """The numbers of sharding constraints in the decoder for divisible and other numbers of rows, and the sharding of a block's output."""
    model = make_model(make_config(**CONFIG), 16, 16)
    mesh, counts = mesh_of(mesh_shape), []
    with jax.set_mesh(mesh):
        for rows in (8, 3):
            batch = {name: jnp.zeros((rows, 24), jnp.int32) for name in ("token", "user", "group", "position")}
            jaxpr = jax.make_jaxpr(lambda params, batch: model.bind(params).decoder(batch))(model.shapes(), batch)
            counts.append(str(jaxpr).count("sharding_constraint"))
        x = jax.device_put(np.zeros((8, 24, 16)), jax.sharding.NamedSharding(mesh, P(None, "fsdp", "tensor")))
        spec = jax.jit(constrain_activations)(x).sharding.spec
    return [*counts, list(spec)]


def parts_on(mesh_shape: tuple[int, int, int]) -> list:
    """The sharding of parts of rows, where a loop goes over the first axis."""
    mesh = mesh_of(mesh_shape)
    with jax.set_mesh(mesh):
        rows = jax.device_put(np.zeros((32, 5)), jax.sharding.NamedSharding(mesh, BATCH))
        parts = jax.jit(lambda x: split_rows({"x": x.reshape(2, 16, 5), "odd": x[:6].reshape(2, 3, 5)}, axis=1))(rows)
    return [list(parts["x"].sharding.spec)[:2], parts["x"].addressable_shards[0].data.shape[1], parts["odd"].shape[1]]


def train_on(mesh_shape: tuple[int, int, int], once: bool = False, softmax: str = "full", accumulate: int = 1) -> dict:
    """Training steps on the first devices: shardings, losses, the first gradients, and the parameters after the first step. once:
    whether the leading intra layers are computed once per distinct item."""
    from iam_jax.data.batches import training_rows
    from iam_jax.data.item_rows import DistinctItems, without_items
    from iam_jax.training.objectives import make_training_items
    from iam_jax.training.run import Run
    from iam_jax.training.step import init_state, make_train_step

    objective = CONFIG["objective"] | {"softmax": softmax, "negatives": 6}
    config = make_config(**CONFIG | {"objective": objective, "optimizer": CONFIG["optimizer"] | {"accumulate": accumulate}})
    prepared, steps = tiny_data(**DATA), 2 if once or softmax != "full" else STEPS
    rows = training_rows(prepared.events, prepared.catalogue, 24, 1, whole_text=True, seed=0)
    catalogue = prepared.catalogue
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, fun_name="", **__: compiled.append(fun_name) if event.endswith("backend_compile_duration") else None
    )
    mesh = mesh_of(mesh_shape)
    model = make_model(config, catalogue.vocabulary, DATA["items"])
    zeros = dataclasses.replace(model, init=lambda key: jax.tree.map(jnp.zeros_like, model.shapes()))  # others are given below
    finish = DistinctItems(rows, 8, multiple=mesh_shape[0] * mesh_shape[1]) if once else without_items
    run = Run(
        config,
        prepared,
        mesh,
        zeros,
        rows,
        make_training_items(catalogue, prepared.events, rows.segments, config),
    )
    with jax.set_mesh(mesh):
        state = init_state(run)
        start = jax.tree.map(np.asarray, random_params(run.model))
        wanted = param_sharding(mesh, state)
        state["params"] = jax.device_put(start, wanted["params"])
        before = jax.tree.leaves(state)
        held = {name: part_of(x) for name, x in names_of(state["params"]).items()}
        moments = {name: part_of(x) for name, x in names_of(state["optimizer"]).items() if "/mu/" in name or "/nu/" in name}
        specs = {name: list(x.sharding.spec) for name, x in names_of(state["params"]).items()}
        optimizer = {name.split("/mu/")[1]: list(x.sharding.spec) for name, x in names_of(state["optimizer"]).items() if "/mu/" in name}
        batches = [finish(stack([rows[(8 * k + i) % len(rows)] for i in range(8)])) for k in range(STEPS)]
        batch = shard_batch(mesh, batches[0])
        step = make_train_step(run)
        state, metrics = step(state, batch, run.items, np.int32(0))
        donated = [x.is_deleted() for x in before]
        after = {name: np.asarray(x) for name, x in names_of(state["params"]).items()}
        gradients = {
            name.split("/mu/")[1]: np.asarray(x) / (1 - config.optimizer.b1)
            for name, x in names_of(state["optimizer"]).items()
            if "/mu/" in name
        }
        stays = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, wanted)
        step_metrics = [metrics]
        for k in range(1, steps):
            state, more = step(state, shard_batch(mesh, batches[k]), run.items, np.int32(k))
            step_metrics.append(more)
    return {
        "held": held, "moments": moments, "specs": specs, "optimizer": optimizer, "donated": donated,
        "compiled": sum("train_step" in name for name in compiled),
        "strayed": [name for name, stay in names_of(stays).items() if not stay],
        "losses": [float(x["item_sum"] + x["token_sum"]) for x in step_metrics],
        "gradients": {name: x.tolist() for name, x in gradients.items()},
        "loss": float(metrics["item_sum"] + metrics["token_sum"]), "norm": float(metrics["gradient_norm"]),
        "after": {name: x.tolist() for name, x in after.items()},
        "start": {name: x.tolist() for name, x in names_of(start).items()},
        "batch": [list(batch["token"].sharding.spec), batch["token"].addressable_shards[0].data.shape[0]],
    }  # fmt: skip


def finetune_on(mesh_shape: tuple[int, int, int], folder: Path) -> dict:
    """A training step of the adapters, inserted layers and table of a pretrained model, which is frozen in bfloat16."""
    from pretrained_models import config_of

    from iam_jax.config import LoraConfig
    from iam_jax.model import pretrained
    from iam_jax.training.run import make_run
    from iam_jax.training.step import init_state, make_train_step

    lora = LoraConfig(rank=2)
    config = config_of(folder, "(full +intra +inter)*2", row_tokens=24, lora=lora, frozen_dtype="bfloat16")
    config = pretrained.configure(dataclasses.replace(config, data=dataclasses.replace(config.data, context_items=1)))
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, token=0.5, chunk=64))
    prepared = tiny_data(users=40, items=10, vocabulary=pretrained.vocabulary(config).size + 1)
    run = dataclasses.replace(make_run(config, prepared), mesh=mesh_of(mesh_shape))
    with jax.set_mesh(run.mesh):
        state = init_state(run)
        start = {name: np.asarray(x).sum().tolist() for name, x in names_of(state["params"]).items()}
        rows = stack([run.rows[i] for i in range(8)])
        arguments = state, shard_batch(run.mesh, run.finish(rows)), run.items, np.int32(0), run.frozen
        step = make_train_step(run).lower(*arguments).compile()
        logits = sorted({int(rows) for rows in re.findall(r"f32\[(\d+),37\]", step.as_text())})  # of 37 tokens
        state, metrics = step(*arguments)
    held = {name: x.addressable_shards[0].data.size / x.size for name, x in names_of(run.frozen | {"new": state["params"]}).items()}
    loss = float(metrics["item_sum"] + metrics["token_sum"])
    return {"loss": loss, "norm": float(metrics["gradient_norm"]), "start": start, "held": held, "logits": logits}


@pytest.fixture(scope="module")
def results():
    env, root = os.environ | on_devices(8), Path(__file__).parents[1]
    done = subprocess.run([python(), __file__], capture_output=True, text=True, env=env, cwd=root, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    training, *others = json.loads(done.stdout)
    names = "once", *MICRO, "attention", "parts", "constraints", "finetuning"
    return dict(zip(MESHES, training, strict=True)) | dict(zip(names, others, strict=True))


@pytest.mark.parametrize("shape", [*MESHES[1:], "once"], ids=str)
def test_a_step_equals_that_of_one_device(results, shape):
    """The step changes every parameter by up to 0.1; the result of many devices is within 1e-5 of the largest parameter. once: the
    (2, 2, 2) mesh with each distinct item once, compared with one device with every occurrence."""
    one, many = results[(1, 1, 1)], results[shape]
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-5) and many["norm"] == pytest.approx(one["norm"], rel=1e-5)
    for name, x in one["after"].items():
        np.testing.assert_allclose(many["after"][name], x, rtol=1e-5, atol=1e-5, err_msg=name)
        assert np.abs(np.subtract(x, one["start"][name])).max() > 1e-3, name


@pytest.mark.parametrize("shape", [*MESHES[1:], "once"], ids=str)
def test_gradients_and_losses_equal_those_of_one_device(results, shape):
    one, many = results[(1, 1, 1)], results[shape]
    assert many["gradients"].keys() == one["gradients"].keys() == one["after"].keys()
    for name, x in one["gradients"].items():
        difference = np.linalg.norm(np.subtract(many["gradients"][name], x))
        assert difference <= 1e-5 * np.linalg.norm(x) and np.linalg.norm(x) > 1e-3, name
    losses = many["losses"]
    assert len(losses) == (2 if shape == "once" else STEPS)
    np.testing.assert_allclose(losses, one["losses"][: len(losses)], rtol=1e-4)
    assert one["losses"][-1] < 0.8 * one["losses"][0]


@pytest.mark.parametrize("name", MICRO)
def test_micro_batches_on_a_mesh_equal_a_batch_of_one_device(results, name):
    """With each distinct item once, and candidates of the whole batch."""
    one, many = results[name]
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-4)
    for path, x in one["gradients"].items():
        assert np.linalg.norm(np.subtract(many["gradients"][path], x)) <= 1e-5 * np.linalg.norm(x), path
    assert many["donated"] and all(many["donated"]) and many["strayed"] == []


def test_a_step_of_adapters_equals_that_of_one_device(results):
    one, many = results["finetuning"]
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-5) and many["norm"] == pytest.approx(one["norm"], rel=1e-4)
    assert many["start"] == pytest.approx(one["start"], rel=1e-5, abs=1e-4)
    # 192 positions in three chunks: a device computes the logits of its quarter of a chunk. (37 by 32 is the embedding.)
    assert 64 in one["logits"] and 16 in many["logits"] and 64 not in many["logits"]
    block = "decoder/blocks/0_0/attention/"
    for name, part in {
        f"{block}query_DNH": 1 / 4, f"{block}key_DKH": 1 / 4, "decoder/embedding_VD": 1 / 2, "decoder/final_norm/scale": 1,
        f"new/{block}query_lora_DL": 1 / 2, f"new/{block}query_lora_LNH": 1 / 2, "new/decoder/boundary_D": 1 / 2,
        "new/decoder/blocks/0_1/mlp/up_DF": 1 / 4,
    }.items():  # fmt: skip
        assert one["held"][name] == 1 and many["held"][name] == part, name


def test_activations_are_sharded_by_rows_between_blocks(results):
    """There are constraints for the embeddings and for two blocks, but none if rows are not divisible or with one device. If the width is
    sharded (fsdp), there is another one that replicates the embedding table along it."""
    one, by_tensor, many = results["constraints"]
    assert one[:2] == [0, 0] and by_tensor[:2] == [3, 3] and many[:2] == [4, 1]
    assert many[2][0] == ["data", "fsdp"] and not any(many[2][1:]) and not any(axis == "tensor" for axis in by_tensor[2])


def test_parts_of_rows_stay_sharded(results):
    assert results["parts"] == [[None, ["data", "fsdp"]], 4, 3]


def test_attention_equals_that_of_one_device(results):
    """Kernels, which XLA cannot partition, are sharded explicitly over rows and heads."""
    one, many = results["attention"]
    assert len(one) == 5
    for name, alone in one.items():
        assert not alone["by hand"] and many[name]["by hand"] == (not name.startswith("local")), name
        for a, b in zip(alone["results"], many[name]["results"], strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_buffers_are_donated_and_parameters_stay_where_they_are(results, shape):
    assert results[shape]["donated"] and all(results[shape]["donated"])
    assert results[shape]["strayed"] == []
    assert results[shape]["compiled"] == 1  # the state of the second step has the sharding of the first


def test_parameters_are_sharded_by_their_names(results):
    specs, held = results[(2, 2, 2)]["specs"], results[(2, 2, 2)]["held"]
    for name, expected in EXPECTED.items():
        assert tuple(specs[name]) == expected, name
        assert held[name] == 0.5 ** len([axis for axis in expected if axis]), name  # the device holds only its part
    assert results[(2, 2, 2)]["optimizer"] == specs
    assert set(results[(8, 1, 1)]["held"].values()) == {1.0}  # data parallel: every device holds everything
    for name in EXPECTED:
        assert results[(1, 8, 1)]["held"][name] == (1 / 8 if name in ALONG_D else 1), name
        assert results[(1, 1, 8)]["held"][name] == (1 / 8 if name in ALONG_HEADS else 1), name
    for shape in MESHES:
        held, moments = results[shape]["held"], results[shape]["moments"]
        assert len(moments) == 2 * len(held)
        assert all(part == held[name.partition("u/")[2]] for name, part in moments.items()), shape
    assert results[(2, 2, 2)]["batch"] == [[["data", "fsdp"]], 2] and results[(8, 1, 1)]["batch"] == [[["data", "fsdp"]], 1]


# ---- in this process: names, errors, and a mesh of the available devices


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("query_DNH", "DNH"),
        ("embedding_VD", "VD"),
        ("up_F", "F"),
        ("scale", ""),
        ("shift", ""),
        ("count", ""),
        ("drawn_share", ""),
        ("x_Dn", ""),
    ],
)
def test_axes_of(name, axes):
    assert axes_of((jax.tree_util.DictKey("out_NHD"), jax.tree_util.DictKey(name))) == axes


def test_every_axis_letter_in_a_parameter_name_has_a_meaning():
    shapes = make_model(make_config(**CONFIG), vocabulary=13, items=10).shapes()
    for path, x in jax.tree_util.tree_leaves_with_path(shapes):
        axes = axes_of(path)
        assert set(axes) <= set("DNKHFVPIEL") and x.ndim - len(axes) in ((0, 1) if axes else (1, 2)), path
    assert set(AXES) <= set("DNKHFVPIEL")


@pytest.mark.parametrize("fields", [{"fsdp": 3}, {"data": 2, "tensor": 5}, {"data": 7}])
def test_meshes_that_do_not_fit(fields):
    with pytest.raises(InputError, match=r"config\.mesh: data x fsdp x tensor = .* but there are \d+ devices"):
        make_mesh(MeshConfig(**fields))


def test_remaining_devices_go_to_data():
    mesh = make_mesh(MeshConfig())
    assert dict(mesh.shape) == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
    assert mesh_sizes(MeshConfig(tensor=2), 8) == (4, 1, 2)
    assert mesh_sizes(MeshConfig(data=2, fsdp=-1), 8) == (2, 4, 1)
    assert mesh_sizes(MeshConfig(data=1, fsdp=2, tensor=-1), 8) == (1, 2, 4)


class FakeMesh:  # of twelve devices
    shape = {"data": 2, "fsdp": 2, "tensor": 3}  # noqa: RUF012


def test_sizes_that_do_not_divide_are_replicated(monkeypatch):
    monkeypatch.setattr("iam_jax.devices.mesh.NamedSharding", lambda mesh, spec: spec)
    shapes = {
        "up_DF": (4, 9),
        "down_FD": (2, 10, 4),
        "table_IE": (9, 4),
        "out_NHD": (3, 8, 5),
        "pair_DD": (4, 4),
        "scale": (12,),
        "count": (),
    }
    tree = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    assert param_sharding(FakeMesh, tree) == {
        "up_DF": P("fsdp", "tensor"),
        "down_FD": P(None, None, "fsdp"),  # the leading axis is that of repeats; 10 is not a multiple of 3
        "table_IE": P("tensor", None),
        "out_NHD": P("tensor", None, None),
        "pair_DD": P("fsdp", None),  # a mesh axis is used once
        "scale": P(),
        "count": P(),
    }


def test_rows_that_do_not_divide_are_replicated(monkeypatch):
    monkeypatch.setattr("iam_jax.devices.mesh.NamedSharding", lambda mesh, spec: spec)
    monkeypatch.setattr("jax.device_put", lambda x, spec: spec)
    batch = {"token": np.zeros((8, 3)), "target": np.zeros((6, 2))}
    assert shard_batch(FakeMesh, batch) == {"token": P(("data", "fsdp")), "target": P()}


if __name__ == "__main__":
    everything = [
        [train_on(shape) for shape in MESHES],
        train_on(MESHES[-1], once=True),
        *([train_on(MESHES[0], softmax=name), train_on(MESHES[-1], True, name, accumulate=2)] for name in MICRO),
        [attend_on(shape) for shape in (MESHES[0], MESHES[-1])],
        parts_on(MESHES[-1]),
        [constraints_on(shape) for shape in (MESHES[0], (1, 1, 8), MESHES[-1])],
    ]
    with tempfile.TemporaryDirectory() as folder:
        from pretrained_models import MODELS, write_model

        write_model(Path(folder), MODELS["llama3"])
        everything.append([finetune_on(shape, Path(folder)) for shape in (MESHES[0], MESHES[-1])])
    json.dump(everything, sys.stdout)

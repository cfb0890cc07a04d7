"""Import of model folders. Tests with transformers itself are in tests/test_parity.py."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forks import python
from helpers import on_devices
from pretrained_models import (
    LLAMA3,
    LOGITS,
    MODELS,
    config_of,
    configured,
    flat,
    load,
    logits,
    model_of,
    nested,
    refused,
    tensor_shapes,
    weights,
    write_model,
)

from iam_jax.devices.mesh import param_sharding
from iam_jax.errors import InputError
from iam_jax.model import pretrained
from iam_jax.model.pretrained import importing, table

STORIES = Path(__file__).parents[2] / "shared" / "data" / "tiny-llama-stories"


# ---- values


@pytest.mark.parametrize("name", MODELS)
def test_logits(folders, name):
    """Our logits equal those that transformers computed from the same folder."""
    config = configured(folders[name])
    expected = np.array(json.loads(LOGITS.read_text())[name])
    assert expected.std() > 0.2
    np.testing.assert_allclose(logits(config, load(config))[0], expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama3", {"rope_scaling": "none"}),
        ("llama3", {"rope_low": 1.9}),
        ("llama3-tied", {"rope_high": 3.0}),
        ("llama-linear-biases", {"rope_scaling": "none"}),
        ("qwen2", {"rope_theta": 1e4}),
        ("gpt2", {"norm_epsilon": 0.1}),
        ("gpt2-untied", {"activation": "gelu"}),
    ],
)
def test_the_logits_depend_on(folders, name, fields):
    """These changes have larger effects than the tolerance of the test above."""
    config = configured(folders[name])
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))
    assert np.abs(logits(other, load(other))[0] - np.array(json.loads(LOGITS.read_text())[name])).max() > 2e-3


@pytest.mark.skipif(not STORIES.is_dir(), reason="the real checkpoint is not on this machine")
def test_a_real_checkpoint_continues_its_text():
    """The greedy continuation equals that of transformers (in the README of the data folder)."""
    from iam_jax.data.tokenizer import load_pretrained

    config = configured(STORIES, row_tokens=160)
    tokenizer = load_pretrained(pretrained.vocabulary(config))
    start = [1, *tokenizer.encode("Once upon a time", add_special_tokens=False).ids]
    story = ", there was a little girl named Lily. She loved to play outside in the sunshine. One day, she went to the park with her"
    expected = tokenizer.encode("Once upon a time" + story, add_special_tokens=False).ids
    # Teacher forcing: after each prefix of the text, the most likely token is the next one, as in greedy decoding.
    x = logits(config, load(config), np.array([[1, *expected]], np.int32))
    assert x[0, len(start) - 1 : -1].argmax(-1).tolist() == expected[len(start) - 1 :] and len(expected) > 100


def test_layout_of_tensors(folders):
    """By hand: axes of heads and head sizes, transposed matrices, queries, keys and values of GPT-2 in one tensor."""
    tensors, params = weights(MODELS["mistral"]), flat(load(configured(folders["mistral"])))
    q, o = params["decoder.blocks.0_0.attention.query_DNH"], params["decoder.blocks.0_0.attention.out_NHD"]
    assert q.shape == (2, 32, 4, 6) and o.shape == (2, 4, 6, 32)
    assert q[1, 5, 2, 3] == tensors["model.layers.1.self_attn.q_proj.weight"][2 * 6 + 3, 5]
    assert o[0, 2, 3, 5] == tensors["model.layers.0.self_attn.o_proj.weight"][5, 2 * 6 + 3]
    gate = tensors["model.layers.1.mlp.gate_proj.weight"]
    np.testing.assert_array_equal(params["decoder.blocks.0_0.mlp.gate_DF"][1], gate.T)
    np.testing.assert_array_equal(params["output_VD"], tensors["lm_head.weight"])

    tensors, params = weights(MODELS["gpt2"]), flat(load(configured(folders["gpt2"])))
    fused = tensors["transformer.h.2.attn.c_attn.weight"]
    for at, name in enumerate(("query_DNH", "key_DKH", "value_DKH")):
        got = params[f"decoder.blocks.0_0.attention.{name}"][2]
        np.testing.assert_array_equal(got, fused[:, at * 32 : (at + 1) * 32].reshape(32, 4, 8))
    bias = params["decoder.blocks.0_0.attention.key_KH"][1].reshape(-1)
    np.testing.assert_array_equal(bias, tensors["transformer.h.1.attn.c_attn.bias"][32:64])


def test_layers_are_placed_by_the_schedule(tmp_path):
    """Five layers in two stages with an inserted layer between, which gets nothing from the folder."""
    values = MODELS["llama2"] | {"num_hidden_layers": 5}
    config = configured(write_model(tmp_path, values), schedule="(intra +inter full)*2 full")
    names, params = pretrained.names(config), flat(load(config))
    at = "decoder.blocks.{}.mlp.down_FD"
    assert not any(".0_1." in name for name in names)
    for place, layers in {"0_0": (0, 2), "0_2": (1, 3), "1_0": (4,)}.items():
        tensors = tuple(f"model.layers.{n}.mlp.down_proj.weight" for n in layers)
        assert names[at.format(place)] == tensors
        np.testing.assert_array_equal(params[at.format(place)], [weights(values)[name].T for name in tensors])


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_read_and_every_parameter_of_the_base_model_is_given(folders, name):
    config = configured(folders[name])
    names = pretrained.names(config)
    assert {tensor for tensors in names.values() for tensor in tensors} == tensor_shapes(MODELS[name]).keys()
    own = {name for name in flat(model_of(config).shapes()) if name.startswith(("decoder.", "output_VD")) and "boundary" not in name}
    assert names.keys() == own
    pretrained.fingerprint(config)  # checks that the folder contains exactly these tensors


def test_casting(tmp_path):
    """From files of any dtype to any dtype, rounded once, to nearest."""
    tensors, at = weights(MODELS["llama2"]), "decoder.blocks.0_0.mlp.up_DF"
    stored = {name: write_model(tmp_path / name, MODELS["llama2"], dtype=name) for name in ("float32", "bfloat16", "float16")}
    for name, folder in stored.items():
        config = configured(folder)
        abstract = nested({at: jax.ShapeDtypeStruct((2, 32, 40), jnp.bfloat16)})
        for dtype in (None, jnp.float32):
            got = flat(pretrained.load(config, abstract, dtype))[at]
            expected = [tensors[f"model.layers.{n}.mlp.up_proj.weight"].T.astype(name).astype(dtype or jnp.bfloat16) for n in (0, 1)]
            assert got.dtype == (dtype or jnp.bfloat16)
            np.testing.assert_array_equal(np.asarray(got), expected)


def test_load_checks_the_requested_parameters(folders):
    config = configured(folders["llama2"])
    with pytest.raises(ValueError, match=r"decoder\.boundary_D is not a pretrained parameter"):
        pretrained.load(config, nested({"decoder.boundary_D": jax.ShapeDtypeStruct((32,), jnp.float32)}))
    with pytest.raises(ValueError, match=r"decoder\.embedding_VD has shape \(38, 32\) and by .*config\.json \(37, 32\)"):
        pretrained.load(config, nested({"decoder.embedding_VD": jax.ShapeDtypeStruct((38, 32), jnp.float32)}))
    assert pretrained.load(config, {}) == {}


# ---- shards


class Recorder:
    """A tensor that records which parts are read."""

    def __init__(self, x):
        self.x, self.read = x, []

    def __getitem__(self, index):
        self.read.append(tuple((s.start, s.stop) for s in index))
        return self.x[index]


@pytest.mark.parametrize("piece_bytes", [1, 500, 2**20])
def test_only_needed_parts_are_read(monkeypatch, piece_bytes):
    monkeypatch.setattr(table, "PIECE_BYTES", piece_bytes)
    sizes, x = {"D": 6, "N": 4, "H": 3}, np.arange(6 * 36, dtype=np.float32).reshape(6, 36)
    source, every = table.Source("", "D NH", 1, 3), slice(None)
    whole = x[:, 12:24].reshape(6, 4, 3)
    for index in ((every, every, every), (slice(2, 5), slice(1, 3), every), (slice(0, 6), slice(3, 4), slice(1, 2))):
        view = Recorder(x)
        np.testing.assert_array_equal(table.read_part(view, source, "DNH", sizes, index, np.float64), whole[index])
        rows, columns = (s.indices(size)[:2] for s, size in zip(index, (6, 4), strict=False))
        steps = [(at, min(at + len(range(*rows)) // len(view.read), rows[1])) for at in range(*rows, len(range(*rows)) // len(view.read))]
        assert view.read == [(step, (12 + 3 * columns[0], 12 + 3 * columns[1])) for step in steps]
        assert len(view.read) == (len(range(*rows)) if piece_bytes == 1 else 1)
    view = Recorder(x.T)  # heads first: stored by rows, so it is read by rows
    part = table.read_part(view, table.Source("", "NH D"), "DNH", sizes | {"N": 12}, (slice(2, 5), slice(1, 3), every), np.float32)
    np.testing.assert_array_equal(part, x[2:5, 3:9].reshape(3, 2, 3))


def import_on(mesh_shape: tuple[int, int, int], folder: str) -> dict:
    """The bytes of every parameter, and the part that a device holds."""
    devices = np.array(jax.devices()[: int(np.prod(mesh_shape))]).reshape(mesh_shape)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    config = configured(Path(folder))
    shapes = flat(model_of(config).shapes())
    wanted = nested({name: shapes[name] for name in pretrained.names(config)})
    shardings = param_sharding(mesh, wanted)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=s), wanted, shardings)
    params = pretrained.load(config, abstract)
    assert jax.tree.map(lambda x: x.sharding, params) == shardings
    return {name: [np.asarray(x).tobytes().hex(), x.addressable_shards[0].data.size / x.size] for name, x in flat(params).items()}


def test_import_on_many_devices_equals_one(folders):
    """Bitwise, on a (2, 2, 2) mesh, where every device holds its part."""
    env = os.environ | on_devices(8)
    command = [python(), __file__, folders["gpt2"], folders["llama3"]]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(__file__).parents[1], timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, many in json.loads(done.stdout):
        assert one.keys() == many.keys() and len(one) > 10
        for name, (content, share) in one.items():
            assert many[name][0] == content, name
            assert share == 1
        at = "decoder.blocks.0_0."
        shares = {name: many[name][1] for name in (f"{at}attention.query_DNH", f"{at}mlp.down_FD", "decoder.embedding_VD")}
        assert list(shares.values()) == [0.25, 0.25, 0.5] and many[f"{at}mlp_norm.scale"][1] == 1


def test_stacks_are_filled_in_place(folders, monkeypatch):
    """The buffer of a stack is donated when a layer is written into it, so that there are never two copies."""
    put, given = importing._put, []

    def recorded(sharding):
        def call(stack, part, r):
            filled = put(sharding)(stack, part, r)
            given.append(stack.is_deleted())
            return filled

        return call

    monkeypatch.setattr(importing, "_put", recorded)
    load(configured(folders["gpt2"]))
    assert given == [True] * 16 * 3  # parameters per layer, layers


# ---- harmless differences


def test_names_that_differ_between_versions(tmp_path):
    """GPT-2 without its prefix and with masks; LLaMA with frequencies; a tied output embedding that is stored."""
    tensors = weights(MODELS["gpt2"])
    bare = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    bare |= {"h.0.attn.bias": np.ones((1, 1, 48, 48), np.float32), "h.2.attn.masked_bias": np.float32([-1e4])}
    config = configured(write_model(tmp_path / "gpt2", MODELS["gpt2"], bare))
    np.testing.assert_array_equal(flat(load(config))["decoder.position_PD"], tensors["transformer.wpe.weight"])

    tensors = weights(MODELS["llama3-tied"])
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32), "lm_head.weight": tensors["model.embed_tokens.weight"]}
    config = configured(write_model(tmp_path / "llama", MODELS["llama3-tied"], tensors | more))
    assert "output_VD" not in load(config)
    more["lm_head.weight"] = more["lm_head.weight"] + np.float32(1e-3)
    folder = write_model(tmp_path / "other", MODELS["llama3-tied"], tensors | more)
    refused("{folder}/model.safetensors: config.json ties 'lm_head.weight' to 'model.embed_tokens.weight', but it is another", folder)
    with pytest.raises(InputError, match="but it is another"):  # before the data are prepared
        pretrained.fingerprint(configured(folder))
    both = tensors | {"norm.weight": tensors["model.norm.weight"]}
    refused("{folder}/model.safetensors: tensor ", write_model(tmp_path / "twice", MODELS["llama3-tied"], both))


def test_both_spellings_of_rotary_positions(tmp_path):
    """transformers 4 and 5, and the still older `type`."""
    scaling = {key: x for key, x in LLAMA3.items() if key != "rope_type"}
    spellings = [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": scaling | {"type": "llama3"}},
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
        {"rope_parameters": LLAMA3, "rope_theta": 500000, "rope_scaling": None},
    ]
    plain = {key: x for key, x in MODELS["llama3"].items() if not key.startswith("rope")}
    shapes = [configured(write_model(tmp_path / str(k), plain | values)).model for k, values in enumerate(spellings)]
    assert {dataclasses.replace(model, pretrained="") for model in shapes} == {dataclasses.replace(shapes[0], pretrained="")}
    model = shapes[0]
    assert (model.rope_theta, model.rope_scaling, model.rope_factor) == (5e5, "llama3", 8)
    assert (model.rope_low, model.rope_high, model.rope_original) == (1, 4, 64)


def test_the_shape_comes_from_the_folder_alone(folders):
    """Also fields that the family does not have; fields that do not describe the shape are kept."""
    ours = {"width": 8, "rope_factor": 3.0, "qk_norm": True, "norm": "layer", "positions": "learned", "max_positions": 99, "self_key": True}
    model = configured(folders["llama2"], **ours).model
    assert (model.width, model.norm, model.positions, model.max_positions) == (32, "rms", "rotary", 0)
    assert (model.rope_factor, model.qk_norm, model.scale_embedding, model.self_key) == (1.0, False, False, True)


def test_home_folder(folders, monkeypatch):
    monkeypatch.setenv("HOME", str(folders["llama2"].parent))
    config = config_of(folders["llama2"], schedule="full*2")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, pretrained=f"~/{folders['llama2'].name}"))
    assert pretrained.vocabulary(pretrained.configure(config)) == (folders["llama2"] / "tokenizer.json", 37)


# ---- fingerprint


def test_fingerprint(tmp_path, folders, monkeypatch):
    """The fingerprint depends on the content, not on the path; a single changed number changes it."""
    first = pretrained.fingerprint(configured(folders["llama3"]))
    values = MODELS["llama3"] | {"torch_dtype": "bfloat16", "_name_or_path": "x", "transformers_version": "4.40"}
    assert pretrained.fingerprint(configured(write_model(tmp_path / "moved", values, files=3))) == first
    different = {
        "theta": write_model(tmp_path / "theta", MODELS["llama3"] | {"rope_theta": 1e4}),
        "type": write_model(tmp_path / "type", MODELS["llama3"], dtype="bfloat16"),
    }
    tensors = weights(MODELS["llama3"])
    for name in ("model.norm.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"):
        changed = tensors[name].copy()
        changed.flat[-1] += np.float32(2**-20)
        different[name] = write_model(tmp_path / name, MODELS["llama3"], tensors | {name: changed})
    swapped = {name: tensors[name.replace("up_proj", "gate_proj")] for name in tensors}
    different["swapped"] = write_model(tmp_path / "swapped", MODELS["llama3"], swapped)
    found = {name: pretrained.fingerprint(configured(folder)) for name, folder in different.items()}
    assert len({first, *found.values()}) == len(found) + 1
    # A large tensor is sampled, always including its ends.
    monkeypatch.setattr("iam_jax.model.pretrained.importing._SAMPLES", 4)
    monkeypatch.setattr("iam_jax.model.pretrained.importing._SAMPLE_BYTES", 16)
    sampled = pretrained.fingerprint(configured(folders["llama3"]))
    assert sampled not in (first, pretrained.fingerprint(configured(different["lm_head.weight"])))


if __name__ == "__main__":
    found = [[import_on(shape, folder) for shape in ((1, 1, 1), (2, 2, 2))] for folder in sys.argv[1:]]
    json.dump(found, sys.stdout)

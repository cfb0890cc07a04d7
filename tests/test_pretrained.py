"""Model folders: what is read, refused and written. Against transformers itself: tests/test_parity.py."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from pretrained_models import (
    LLAMA3,
    LOGITS,
    MODELS,
    complete,
    config_of,
    flat,
    load,
    logits,
    model_of,
    nested,
    tensor_shapes,
    weights,
    write_model,
)
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from iam_jax.errors import InputError
from iam_jax.model import pretrained
from iam_jax.model.pretrained import importing, table
from iam_jax.sharding import param_sharding

STORIES = Path(__file__).parents[2] / "shared" / "data" / "tiny-llama-stories"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Every model, to be read only."""
    return {name: write_model(tmp_path_factory.mktemp("models") / name, values) for name, values in MODELS.items()}


def configured(folder: Path, **options):
    return pretrained.configure(config_of(folder, **options))


def refused(message: str, folder: Path, **options) -> None:
    """Importing `folder` is one clear line that begins with `message`."""
    with pytest.raises(InputError) as caught:
        load(configured(folder, **options))
    text = str(caught.value)
    assert "\n" not in text and text.startswith(message.format(folder=folder)), text


# ---- values


@pytest.mark.parametrize("name", MODELS)
def test_logits(folders, name):
    """Those that transformers computed from the same folder."""
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
    """What the tolerance of the test above would not hide."""
    config = configured(folders[name])
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))
    assert np.abs(logits(other, load(other))[0] - np.array(json.loads(LOGITS.read_text())[name])).max() > 2e-3


@pytest.mark.skipif(not STORIES.is_dir(), reason="the real checkpoint is not on this machine")
def test_a_real_checkpoint_tells_its_story():
    """The greedy continuation that transformers gives (the data folder's README)."""
    from iam_jax.data.tokenizer import load_pretrained

    config = configured(STORIES, row_tokens=160)
    tokenizer = load_pretrained(pretrained.vocabulary(config))
    start = [1, *tokenizer.encode("Once upon a time", add_special_tokens=False).ids]
    story = ", there was a little girl named Lily. She loved to play outside in the sunshine. One day, she went to the park with her"
    expected = tokenizer.encode("Once upon a time" + story, add_special_tokens=False).ids
    # Teacher forcing: every greedy choice behind the true beginning is the next token, which is what greedy decoding takes.
    x = logits(config, load(config), np.array([[1, *expected]], np.int32))
    assert x[0, len(start) - 1 : -1].argmax(-1).tolist() == expected[len(start) - 1 :] and len(expected) > 100


def test_where_tensors_go(folders):
    """By hand: heads before their sizes, matrices transposed, GPT-2's queries, keys and values side by side."""
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


def test_layers_go_where_the_schedule_has_them(tmp_path):
    """Five layers in two stages, an inserted one between; nothing of it comes from the folder."""
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
    pretrained.check_folder(config)


def test_casting(tmp_path):
    """Of files of any type to any type, rounded once, to nearest."""
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


def test_what_load_is_asked_for(folders):
    config = configured(folders["llama2"])
    with pytest.raises(ValueError, match=r"decoder\.boundary_D is not a pretrained parameter"):
        pretrained.load(config, nested({"decoder.boundary_D": jax.ShapeDtypeStruct((32,), jnp.float32)}))
    with pytest.raises(ValueError, match=r"decoder\.embedding_VD has shape \(38, 32\) and by .*config\.json \(37, 32\)"):
        pretrained.load(config, nested({"decoder.embedding_VD": jax.ShapeDtypeStruct((38, 32), jnp.float32)}))
    assert pretrained.load(config, {}) == {}


# ---- shards


class Recorder:
    """A tensor that remembers what was read of it."""

    def __init__(self, x):
        self.x, self.read = x, []

    def __getitem__(self, index):
        self.read.append(tuple((s.start, s.stop) for s in index))
        return self.x[index]


@pytest.mark.parametrize("piece_bytes", [1, 500, 2**20])
def test_only_the_needed_part_is_read(monkeypatch, piece_bytes):
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
    view = Recorder(x.T)  # heads first: what is stored by rows is read by rows
    part = table.read_part(view, table.Source("", "NH D"), "DNH", sizes | {"N": 12}, (slice(2, 5), slice(1, 3), every), np.float32)
    np.testing.assert_array_equal(part, x[2:5, 3:9].reshape(3, 2, 3))


def import_on(mesh_shape: tuple[int, int, int], folder: str) -> dict:
    """Every parameter's bytes, and what part of it a device holds."""
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


def test_many_devices_hold_what_one_does(folders):
    """Bitwise, on a (2, 2, 2) mesh, every device its part."""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, folders["gpt2"], folders["llama3"]]
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
    """A stack is given away for the one with another layer in it: two of them are never there."""
    put, given = importing._put, []

    def recorded(sharding):
        def call(stack, part, r):
            filled = put(sharding)(stack, part, r)
            given.append(stack.is_deleted())
            return filled

        return call

    monkeypatch.setattr(importing, "_put", recorded)
    load(configured(folders["gpt2"]))
    assert given == [True] * 16 * 3  # parameters of a layer, layers


# ---- harmless differences


def test_names_that_differ_between_versions(tmp_path):
    """GPT-2 without its prefix and with its masks; LLaMA with frequencies; a tied output embedding that is stored as well."""
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
    """Fields of the config that the family does not have, too; what is not shape stays."""
    ours = {"width": 8, "rope_factor": 3.0, "qk_norm": True, "norm": "layer", "positions": "learned", "max_positions": 99, "self_key": True}
    model = configured(folders["llama2"], **ours).model
    assert (model.width, model.norm, model.positions, model.max_positions) == (32, "rms", "rotary", 0)
    assert (model.rope_factor, model.qk_norm, model.scale_embedding, model.self_key) == (1.0, False, False, True)


def test_home_folder(folders, monkeypatch):
    monkeypatch.setenv("HOME", str(folders["llama2"].parent))
    config = config_of(folders["llama2"], schedule="full*2")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, pretrained=f"~/{folders['llama2'].name}"))
    assert pretrained.vocabulary(pretrained.configure(config)) == (folders["llama2"] / "tokenizer.json", 37)


# ---- refused


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("llama2", {"model_type": "gemma2"}, "model_type = 'gemma2' is not supported; supported are llama, mistral, qwen2, qwen3, gpt2"),
        ("llama2", {"model_type": None}, "model_type must be of type str, not None"),
        (
            "llama2",
            {"quantization_config": {"bits": 4}},
            "quantization_config: quantised weights are not supported; supported are float32,",
        ),
        ("qwen2", {"num_experts": 8}, "num_experts: a mixture of experts is not supported; supported are dense models"),
        ("mistral", {"num_local_experts": 8}, "num_local_experts: a mixture of experts is not supported"),
        (
            "mistral",
            {"sliding_window": 31},
            "sliding_window = 31 would apply to rows of config.data.row_tokens = 32 and is not supported; s",
        ),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "sliding_window = 8 would apply"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
            "sliding_wind",
        ),
        ("qwen3", {"layer_types": ["linear_attention"]}, "layer_types: 'linear_attention' is not supported; supported are full_attention,"),
        ("llama2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type = 'dynamic' is not supported; supported are d"),
        ("llama2", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type = 'yarn' is not supported; supported are def"),
        ("llama2", {"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention: rotary positions that differ between la"),
        ("llama2", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ("llama2", {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "config.model.rope_high = 4.0: must be above model.rope_low = 4"),
        ("llama2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1 is not supported"),
        (
            "llama2",
            {"hidden_act": "gelu"},
            "hidden_act = 'gelu' is not supported; supported are silu, swish, gelu_new, gelu_pytorch_tanh, ",
        ),
        ("llama2", {"hidden_size": "32"}, "hidden_size must be of type int, not '32'"),
        ("llama2", {"vocab_size": 0}, "vocab_size = 0: must be 1 or more"),
        ("llama2", {"num_attention_heads": 5}, "num_attention_heads = 5 does not divide hidden_size = 32, and there is no head_dim"),
        ("llama3", {"num_key_value_heads": 3}, "config.model.kv_heads = 3: must divide model.heads = 4"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = true is not supported; supported is fal"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = false is not supported; supported is true"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn = true is not supported"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = true is not supported"),
        ("gpt2", {"n_positions": 31}, "config.data.row_tokens = 32: there are 31 learned positions"),
        ("gpt2", {"n_head": 5}, "n_head = 5 does not divide n_embd = 32"),
    ],
)
def test_unsupported_settings(tmp_path, name, values, message):
    refused("{folder}/config.json: " + message, write_model(tmp_path, MODELS[name] | values, weights(MODELS[name])))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("mistral", {"sliding_window": 32}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": False, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2}),
        ("llama2", {"num_key_value_heads": None, "head_dim": None, "quantization_config": None}),
        ("gpt2", {"n_inner": None}),
    ],
)
def test_settings_that_do_not_matter(tmp_path, name, values):
    load(configured(write_model(tmp_path, MODELS[name] | values, weights(MODELS[name]))))


def test_mistral_has_a_window_unless_it_says_no(tmp_path):
    values = {key: x for key, x in MODELS["mistral"].items() if key != "sliding_window"}
    folder = write_model(tmp_path, values)
    configured(folder, row_tokens=4096)
    refused("{folder}/config.json: sliding_window = 4,096 would apply to rows of config.data.row_tokens = 4,097", folder, row_tokens=4097)


def test_schedules_of_another_number_of_layers(folders):
    for schedule, own in (("full*3", 3), ("full +intra +inter", 1), ("(intra inter)*2", 4)):
        with pytest.raises(InputError) as caught:
            configured(folders["llama2"], schedule=schedule)
        what = f"has {own} layers without the inserted ones, and {folders['llama2']}/config.json has num_hidden_layers = 2"
        assert str(caught.value) == f"config.model.schedule = {schedule!r} {what}; for example 'full*2' or '(intra inter)*1'"
    with pytest.raises(InputError, match=r"has n_layer = 3; for example 'full\*3' or '\(intra inter\)\*1 full'"):
        configured(folders["gpt2"], schedule="full")


def test_folders_that_are_none(tmp_path, folders):
    here = config_of(folders["llama2"])

    def at(path):
        return dataclasses.replace(here, model=dataclasses.replace(here.model, pretrained=str(path)))

    for path in (tmp_path / "nothing", folders["llama2"] / "config.json"):
        with pytest.raises(InputError) as caught:
            pretrained.configure(at(path))
        assert str(caught.value).startswith(
            f"config.model.pretrained = '{path}': no such folder (a model folder on this machine; nothing is"
        )
    with pytest.raises(InputError, match=r"config\.json: no such file in the model folder$"):
        pretrained.configure(at(tmp_path))
    for text, why in (("{", "Expecting property name"), ("[]", "not a JSON object"), ('"\xff"', "'utf-8' codec can't decode")):
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError) as caught:
            pretrained.configure(at(tmp_path))
        assert str(caught.value).startswith(f"{tmp_path}/config.json: cannot be read ({why}"), caught.value
    least = {key: x for key, x in MODELS["llama2"].items() if key != "intermediate_size"}
    (tmp_path / "config.json").write_text(json.dumps(least))
    refused("{folder}/config.json: intermediate_size is missing", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MODELS["llama2"]))
    config = configured(tmp_path)
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file in the model folder"):
        pretrained.vocabulary(config)
    with pytest.raises(InputError, match=r": neither model\.safetensors nor model\.safetensors\.index\.json \(other formats are not"):
        pretrained.load(config, {})


@pytest.mark.parametrize("files", [1, 3])
def test_tensors_that_are_wrong(tmp_path, files):
    """Each is named, in one file and in several."""
    right, values = weights(MODELS["qwen2"]), MODELS["qwen2"]
    cases = {
        "missing": ({"model.layers.1.self_attn.v_proj.bias": None}, "{folder}: missing tensors: 'model.layers.1.self_attn.v_proj.bias'"),
        "head": ({"lm_head.weight": None}, "{folder}: missing tensors: 'lm_head.weight'"),
        "unused": ({"model.layers.2.mlp.x": np.ones(3, np.float32)}, "{folder}: unused tensors: 'model.layers.2.mlp.x'; by config.json"),
        "bias": (
            {"model.layers.1.self_attn.o_proj.bias": np.ones(32, np.float32)},
            "{folder}: unused tensors: 'model.layers.1.self_attn.o",
        ),
        "shape": (
            {"model.norm.weight": np.ones(31, np.float32)},
            "tensor 'model.norm.weight' has shape (31,); by config.json it must be (32,)",
        ),
        "type": ({"model.norm.weight": np.ones(32, np.int8)}, "tensor 'model.norm.weight' is I8; supported are F32, BF16, F16"),
        "float64": ({"model.norm.weight": np.ones(32)}, "tensor 'model.norm.weight' is F64; supported are F32, BF16, F16"),
        "float8": (
            {"model.norm.weight": np.ones(32, ml_dtypes.float8_e4m3fn)},
            "tensor 'model.norm.weight' is F8_E4M3; supported are F32, ",
        ),
    }
    for case, (changes, message) in cases.items():
        tensors = {name: x for name, x in (right | changes).items() if x is not None}
        folder = tmp_path / case
        write_model(folder, values, {})
        shutil.rmtree(folder)
        _write_as_is(folder, values, tensors, files)
        if not message.startswith("{folder}"):
            where = "model.safetensors" if files == 1 else f"model-{_file_of(tensors, 'model.norm.weight', files):05}-of-00003.safetensors"
            message = f"{{folder}}/{where}: {message}"
        refused(message, folder)


def _file_of(tensors: dict, name: str, files: int) -> int:
    return 1 + list(tensors).index(name) * files // len(tensors)


def _write_as_is(folder: Path, values: dict, tensors: dict, files: int) -> None:
    """`write_model`, each tensor of its own type."""
    write_model(folder, values, {name: np.zeros(1, np.float32) for name in tensors}, files)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as held:
            save_file({name: tensors[name] for name in held.keys()}, file)


def test_several_missing_tensors_are_counted(tmp_path):
    tensors = {name: x for name, x in weights(MODELS["llama2"]).items() if "layers.1" not in name}
    folder = write_model(tmp_path, MODELS["llama2"], tensors)
    first = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj")
    refused("{folder}: missing tensors: " + ", ".join(f"'model.layers.1.{name}.weight'" for name in first) + " and 6 more", folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1])
def test_truncated_files(tmp_path, keep):
    folder = write_model(tmp_path, MODELS["llama2"])
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused("{folder}/model.safetensors: a truncated or unreadable safetensors file (", folder)


def test_shards_that_are_wrong(tmp_path):
    folder = write_model(tmp_path, MODELS["llama2"], files=3)
    index = folder / "model.safetensors.index.json"
    right = json.loads(index.read_text())
    names = sorted(set(right["weight_map"].values()))
    tail = (folder / names[2]).read_bytes()
    (folder / names[2]).write_bytes(tail[:-1])
    refused(f"{{folder}}/{names[2]}: a truncated or unreadable safetensors file (", folder)
    (folder / names[2]).unlink()
    refused(f"{{folder}}/model.safetensors.index.json names '{names[2]}': no such file in the model folder", folder)
    (folder / names[2]).write_bytes(tail)
    load(configured(folder))
    moved = right["weight_map"] | {"model.embed_tokens.weight": names[1]}
    index.write_text(json.dumps({"weight_map": moved}))
    refused("{folder}/model.safetensors.index.json: missing tensors: 'model.embed_tokens.weight' (of " + names[1], folder)
    for wrong in ({}, {"weight_map": {}}, {"weight_map": {"a": 1}}):
        index.write_text(json.dumps(wrong))
        refused("{folder}/model.safetensors.index.json: weight_map must say which file holds which tensor", folder)
    index.write_text("{")
    refused("{folder}/model.safetensors.index.json: cannot be read (", folder)


# ---- fingerprint


def test_fingerprint(tmp_path, folders, monkeypatch):
    """Of the content, wherever it lies; a single number changes it."""
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
    # A large tensor is sampled: its ends are always in.
    monkeypatch.setattr("iam_jax.model.pretrained.importing._SAMPLES", 4)
    monkeypatch.setattr("iam_jax.model.pretrained.importing._SAMPLE_BYTES", 16)
    sampled = pretrained.fingerprint(configured(folders["llama3"]))
    assert sampled not in (first, pretrained.fingerprint(configured(different["lm_head.weight"])))


# ---- export


@pytest.mark.parametrize("name", MODELS)
def test_import_export_import_is_bitwise(tmp_path, folders, name):
    config = configured(folders[name])
    given = load(config)
    assert pretrained.export(config, complete(config, given), tmp_path / "out") == []
    written, source = load_file(tmp_path / "out" / "model.safetensors"), load_file(folders[name] / "model.safetensors")
    assert written.keys() == source.keys()
    for tensor, x in source.items():
        assert written[tensor].tobytes() == x.tobytes() and written[tensor].dtype == x.dtype, tensor
    again = load(configured(tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, again, given)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((folders[name] / "config.json").read_text())


def test_export_of_a_recommender(tmp_path):
    """bf16 in shards; what the format has no place for lies beside it; the tokenizer's files are copied; the notes say what is lost."""
    values = MODELS["qwen3"] | {"architectures": ["Qwen3ForCausalLM"]}
    source = write_model(tmp_path / "in", values, dtype="bfloat16", files=2)
    for file in ("tokenizer_config.json", "generation_config.json", "merges.txt"):
        (source / file).write_text(f"{file}\n")
    (source / "README.md").write_text("the source's")
    config = configured(source, schedule="(full +inter)*2", row_tokens=16)
    shapes, known = flat(model_of(config).shapes()), pretrained.names(config)
    given = pretrained.load(config, nested({name: shapes[name] for name in known}), jnp.bfloat16)
    params = complete(config, given)
    notes = pretrained.export(config, params, tmp_path / "new" / "out", max_shard_bytes=9000)
    out = tmp_path / "new" / "out"
    assert len(notes) == 1 and "ordinary attention, without the inserted layers" in notes[0] and "'(full +inter)*2'" in notes[0]
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"] and out.stat().st_mode & 0o777 == 0o755

    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(2 * int(np.prod(shape)) for shape in tensor_shapes(values).values())
    tensors = {}
    for file in files:
        held = load_file(out / file)
        assert all(index["weight_map"][name] == file for name in held)
        assert len(held) == 1 or sum(x.nbytes for x in held.values()) <= 9000
        with safe_open(out / file, framework="np") as stream:
            assert stream.metadata() == {"format": "pt"}
        tensors |= held
    for name, x in weights(values).items():
        assert tensors[name].tobytes() == x.astype(ml_dtypes.bfloat16).tobytes(), name
    assert tensors.keys() == tensor_shapes(values).keys()

    others = load_file(out / "iam_jax.safetensors")
    everything = flat(params)
    assert others.keys() == everything.keys() - known.keys()
    assert {"decoder.boundary_D", "table_IE", "decoder.blocks.0_1.attention.query_DNH", "output_boundary_D"} <= others.keys()
    for name, x in others.items():
        np.testing.assert_array_equal(x, everything[name])
    settings = json.loads((out / "config.json").read_text())
    assert settings == values | {"torch_dtype": "bfloat16"}
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "merges.txt"):
        assert (out / file).read_bytes() == (source / file).read_bytes()
    assert not (out / "README.md").exists()
    load(configured(out, schedule="full*2"))


def test_export_of_both_types_is_float32(tmp_path, folders):
    """Nothing is rounded."""
    config = configured(folders["gpt2"], schedule="intra*3")
    given = flat(load(config))
    given["decoder.embedding_VD"] = given["decoder.embedding_VD"].astype(jnp.bfloat16)
    notes = pretrained.export(config, complete(config, nested(given)), tmp_path / "out")
    assert notes == ["transformers will run the exported layers with ordinary attention: config.model.schedule = 'intra*3'"]
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {x.dtype for x in written.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(written["transformer.wte.weight"], given["decoder.embedding_VD"].astype(np.float32))


def test_an_export_is_whole_or_not_there(tmp_path, folders, monkeypatch):
    config = configured(folders["llama2"])
    params = complete(config, load(config))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("")
    for output in (taken, taken / "mine"):
        with pytest.raises(InputError, match="exists already, and an export does not overwrite"):
            pretrained.export(config, params, output)
    with pytest.raises(ValueError, match=r"missing: 'output_VD'"):
        pretrained.export(config, {name: x for name, x in params.items() if name != "output_VD"}, tmp_path / "out")
    with pytest.raises(ValueError, match="must be merged"):
        pretrained.export(config, params | {"query_lora_DL": params["output_VD"]}, tmp_path / "out")
    with monkeypatch.context() as broken:
        broken.setattr("iam_jax.model.pretrained.exporting.shutil.copyfile", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pretrained.export(config, params, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]
    (tmp_path / "out").mkdir()
    pretrained.export(config, params, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


if __name__ == "__main__":
    found = [[import_on(shape, folder) for shape in ((1, 1, 1), (2, 2, 2))] for folder in sys.argv[1:]]
    json.dump(found, sys.stdout)

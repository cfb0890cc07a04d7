"""Model folders that are refused, each with a clear one-line error."""

import dataclasses
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from pretrained_models import (
    LLAMA3,
    MODELS,
    config_of,
    configured,
    load,
    refused,
    weights,
    write_model,
)
from safetensors import safe_open
from safetensors.numpy import save_file

from iam_jax.errors import InputError
from iam_jax.model import pretrained


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("llama2", {"model_type": "gemma2"}, "model_type = 'gemma2' is not supported; supported are gpt2, llama, mistral, qwen2, qwen3"),
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
        ("gpt2", {"n_positions": 31}, "config.data.row_tokens = 32: the model has only 31 learned positions"),
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


def test_mistral_has_a_window_unless_it_is_disabled(tmp_path):
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


def test_invalid_folders(tmp_path, folders):
    here = config_of(folders["llama2"])

    def at(path):
        return dataclasses.replace(here, model=dataclasses.replace(here.model, pretrained=str(path)))

    for path in (tmp_path / "nothing", folders["llama2"] / "config.json"):
        with pytest.raises(InputError) as caught:
            pretrained.configure(at(path))
        assert str(caught.value).startswith(
            f"config.model.pretrained = '{path}': no such folder (a model folder on this machine; nothing is"
        )
    for path, why in (("~nobody-of-that-name/m", "home directory"), (tmp_path / ("a" * 300), "File name too long")):
        with pytest.raises(InputError, match=why):
            pretrained.configure(at(path))
        with pytest.raises(InputError, match=why):
            pretrained.check_output(path)
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
def test_wrong_tensors(tmp_path, files):
    """Each wrong tensor is named, with one file and with several."""
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
    """`write_model`, with every tensor in its own dtype."""
    write_model(folder, values, {name: np.zeros(1, np.float32) for name in tensors}, files)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as held:
            save_file({name: tensors[name] for name in held.keys()}, file)


def test_several_missing_tensors_are_counted(tmp_path):
    tensors = {name: x for name, x in weights(MODELS["llama2"]).items() if "layers.1" not in name}
    folder = write_model(tmp_path, MODELS["llama2"], tensors)
    first = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj")
    refused("{folder}: missing tensors: " + ", ".join(f"'model.layers.1.{name}.weight'" for name in first) + " and 6 more", folder)
    with pytest.raises(InputError, match=r"missing tensors: 'model\.layers\.1\.input_layernorm\.weight'"):
        pretrained.fingerprint(configured(folder))


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1])
def test_truncated_files(tmp_path, keep):
    folder = write_model(tmp_path, MODELS["llama2"])
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused("{folder}/model.safetensors: a truncated or unreadable safetensors file (", folder)


def test_wrong_shards(tmp_path):
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

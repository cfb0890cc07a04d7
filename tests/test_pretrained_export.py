"""Export of model folders, which are then read again."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from pretrained_models import (
    MODELS,
    complete,
    configured,
    flat,
    load,
    model_of,
    nested,
    tensor_shapes,
    weights,
    write_model,
)
from safetensors import safe_open
from safetensors.numpy import load_file

from iam_jax.errors import InputError
from iam_jax.model import pretrained


@pytest.mark.parametrize("name", MODELS)
def test_import_export_import_is_bitwise(tmp_path, folders, name):
    config = configured(folders[name])
    pretrained_params = load(config)
    assert pretrained.export(config, complete(config, pretrained_params), tmp_path / "out") == []
    written, source = load_file(tmp_path / "out" / "model.safetensors"), load_file(folders[name] / "model.safetensors")
    assert written.keys() == source.keys()
    for tensor, x in source.items():
        assert written[tensor].tobytes() == x.tobytes() and written[tensor].dtype == x.dtype, tensor
    again = load(configured(tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, again, pretrained_params)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((folders[name] / "config.json").read_text())


def test_export_of_a_recommender(tmp_path):
    """bf16 in shards; parameters outside the format go to a separate file; tokenizer files are copied; notes name what is lost."""
    values = MODELS["qwen3"] | {"architectures": ["Qwen3ForCausalLM"]}
    source = write_model(tmp_path / "in", values, dtype="bfloat16", files=2)
    for file in ("tokenizer_config.json", "generation_config.json", "merges.txt"):
        (source / file).write_text(f"{file}\n")
    (source / "README.md").write_text("the source's")
    config = configured(source, schedule="(full +inter)*2", row_tokens=16)
    shapes, known = flat(model_of(config).shapes()), pretrained.names(config)
    pretrained_params = pretrained.load(config, nested({name: shapes[name] for name in known}), jnp.bfloat16)
    params = complete(config, pretrained_params)
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


def test_export_of_mixed_dtypes_is_float32(tmp_path, folders):
    """Nothing is rounded."""
    config = configured(folders["gpt2"], schedule="intra*3")
    pretrained_params = flat(load(config))
    pretrained_params["decoder.embedding_VD"] = pretrained_params["decoder.embedding_VD"].astype(jnp.bfloat16)
    notes = pretrained.export(config, complete(config, nested(pretrained_params)), tmp_path / "out")
    assert notes == ["transformers will run the exported layers with ordinary attention: config.model.schedule = 'intra*3'"]
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {x.dtype for x in written.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(written["transformer.wte.weight"], pretrained_params["decoder.embedding_VD"].astype(np.float32))


def test_an_export_is_complete_or_absent(tmp_path, folders, monkeypatch):
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

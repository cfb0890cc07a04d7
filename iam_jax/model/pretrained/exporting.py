"""Exports parameters as a model folder that transformers can read."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from iam_jax.config import Config
from iam_jax.errors import InputError, quote_first
from iam_jax.model.pretrained.folder import CONFIG, INDEX, TOKENIZER, WEIGHTS
from iam_jax.model.pretrained.importing import places, read_pretrained
from iam_jax.model.pretrained.table import param_axes, to_tensor
from iam_jax.relations import ORDINARY

EXTRA = "iam_jax.safetensors"
COPIED = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "generation_config.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
_TAGS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int32": "I32", "uint32": "U32", "bool": "BOOL"}


def check_output(output: str | Path) -> Path:
    """Raises InputError if an export to `output` is not possible."""
    try:
        output = Path(output).expanduser()
        taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
    except (OSError, RuntimeError) as error:
        raise InputError(f"--output={output}: {getattr(error, 'strerror', None) or error}") from error
    if taken:
        raise InputError(f"{output}: exists already, and an export does not overwrite")
    existing = next(path for path in output.absolute().parents if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{output}: {existing} cannot be written to")
    return output


def export(config: Config, params: dict, output: str | Path, max_shard_bytes: int = 5 * 10**9) -> list[str]:
    """Writes the folder `output`, completely or not at all, and returns notes for the user.

    params: all parameters, with LoRA merged, addressable from this process. config.json and the tokenizer's files are copied from
    `config.model.pretrained`. Parameters that the format does not have (inserted layers, boundary tokens, the item table) go to
    iam_jax.safetensors under our names. Weights are float32 if any pretrained parameter is, otherwise bfloat16. Raises InputError if
    `output` exists and is not empty.
    """
    output = check_output(output)
    source = read_pretrained(config)
    leaves: dict = flatten_dict(params, sep=".")
    known = places(config, source)
    missing = [name for name in known if name not in leaves]
    if missing or any("_lora_" in name for name in leaves):
        raise ValueError(f"parameters to export must be merged and complete; missing: {quote_first(missing) or 'none'}")
    dtype = np.dtype(ml_dtypes.bfloat16 if all(leaves[name].dtype == ml_dtypes.bfloat16 for name in known) else np.float32)

    pieces: dict[str, list] = {}  # by tensor: (the parameter's name, its source, its repeat)
    for name, sources in known.items():
        for r, part in enumerate(sources):
            pieces.setdefault(part.tensor, []).append((name, part, r if name.startswith("decoder.blocks.") else None))

    def tensor(name: str) -> np.ndarray:
        parts = []
        for parameter, part, r in sorted(pieces[name], key=lambda piece: piece[1].piece):
            x = leaves[parameter] if r is None else leaves[parameter][r]
            parts.append(to_tensor(np.asarray(x), part, param_axes(parameter, part)).astype(dtype))
        return np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]

    folder = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        folder.chmod(0o755)
        _write_weights(folder, source.shapes(), dtype, tensor, max_shard_bytes)
        others = {name: x for name, x in leaves.items() if name not in known}
        if others:
            tensors = {name: (np.dtype(x.dtype), x.shape) for name, x in others.items()}
            write_tensors(folder / EXTRA, tensors, (np.asarray(x) for x in others.values()))
        values = dict(source.settings.values)
        values |= {key: dtype.name for key in ("dtype", "torch_dtype") if key in values} or {"dtype": dtype.name}
        (folder / CONFIG).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for name in COPIED:
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, folder / name)
        folder.replace(output)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror or error})") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return _notes(config)


def _notes(config: Config) -> list[str]:
    inserted = any(any(stage.inserted) for stage in config.schedule.stages)
    other = any(relation != ORDINARY for stage in config.schedule.stages for relation in stage.relations)
    if not (inserted or other):
        return []
    without = f", without the inserted layers (they are in {EXTRA})" if inserted else ""
    return [
        f"transformers will run the exported layers with ordinary attention{without}: config.model.schedule = {config.model.schedule!r}"
    ]


def _write_weights(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: np.dtype, tensor, max_shard_bytes: int) -> None:
    """Writes model.safetensors, or an index and shards of at most `max_shard_bytes` (or of one larger tensor). tensor: name -> array."""
    shards, filled = [[]], 0
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    stem = WEIGHTS.removesuffix(".safetensors")
    files = [WEIGHTS] if len(shards) == 1 else [f"{stem}-{k:05}-of-{len(shards):05}.safetensors" for k in range(1, len(shards) + 1)]
    for file, held in zip(files, shards, strict=True):
        write_tensors(folder / file, {name: (dtype, shapes[name]) for name in held}, map(tensor, held))
    if len(shards) > 1:
        where = {name: file for file, held in zip(files, shards, strict=True) for name in held}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_tensors(file: Path, tensors: dict[str, tuple[np.dtype, tuple[int, ...]]], arrays: Iterable[np.ndarray]) -> None:
    """Writes a safetensors file with one array in memory at a time (the library's writer needs all). tensors: name -> type, shape."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers expects this format
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _TAGS[dtype.name], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

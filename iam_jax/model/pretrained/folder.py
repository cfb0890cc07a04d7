"""A Hugging Face model folder: the settings in its config.json, the headers of its safetensors files, and parts of their tensors."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from safetensors import SafetensorError, safe_open

from iam_jax.errors import InputError, quote_first

CONFIG, WEIGHTS, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

_REQUIRED: Any = object()
# The names of activations in transformers, and ours: our gelu is the tanh approximation.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu"}
_ROPES = {"default": "none", "linear": "linear", "llama3": "llama3"}


def find_folder(path: str) -> Path:
    try:
        folder = Path(path).expanduser()
        there = folder.is_dir()
    except (OSError, RuntimeError) as error:  # the name is too long, a parent cannot be read, or the user in "~user" does not exist
        raise InputError(f"config.model.pretrained = {path!r}: {getattr(error, 'strerror', None) or error}") from error
    if not there:
        raise InputError(f"config.model.pretrained = {path!r}: no such folder (a model folder on this machine; nothing is downloaded)")
    return folder


def read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file in the model folder") from None
    except (OSError, ValueError) as error:  # text that is not UTF-8 or not JSON is a ValueError
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    return values


class Settings:
    """The values of a config.json, read by key. Errors name the file and the key."""

    def __init__(self, path: Path, values: dict | None = None, section: str = ""):
        self.path, self.section = path, section
        self.values = read_json(path) if values is None else values

    def fail(self, message: str) -> NoReturn:
        raise InputError(f"{self.path}: {self.section}{message}")

    def get(self, key: str, kind: type, default: Any = _REQUIRED, null: Any = _REQUIRED) -> Any:
        """The value of `key`; `default` if it is absent, `null` if it is null."""
        if key not in self.values:
            if default is _REQUIRED:
                self.fail(f"{key} is missing")
            return default
        value = self.values[key]
        if value is None and null is not _REQUIRED:
            return null
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            self.fail(f"{key} must be of type {kind.__name__}, not {value!r}")
        return value

    def size(self, key: str, default: Any = _REQUIRED, null: Any = _REQUIRED) -> Any:
        value = self.get(key, int, default, null)
        if type(value) is int and value < 1:
            self.fail(f"{key} = {value}: must be 1 or more")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        return self.get(key, float, default)

    def flag(self, key: str, default: bool) -> bool:
        return self.get(key, bool, default)

    def choice(self, key: str, value: str, options: Any) -> Any:
        if value not in options:
            self.fail(f"{key} = {value!r} is not supported; supported are {', '.join(options)}")
        return options[value]

    def activation(self, key: str, default: str, names: dict[str, str] = ACTIVATIONS) -> str:
        """Our name of the activation that `key` names. names: those that the family allows, and ours."""
        return self.choice(key, self.get(key, str, default), names)

    def rope(self, max_positions: int) -> dict:
        """rope_theta and the scaling, from `rope_parameters`, or from `rope_theta` and `rope_scaling`, their names before transformers 5.
        max_positions: the family's default of max_position_embeddings."""
        section = "rope_scaling" if self.values.get("rope_scaling") else "rope_parameters"
        rope = Settings(self.path, self.get(section, dict, {}, null={}), f"{section}.")
        nested = [key for key, value in rope.values.items() if isinstance(value, dict)]
        if nested:
            rope.fail(f"{nested[0]}: rotary positions that differ between layers are not supported; supported are the same for all")
        for settings in (self, rope):
            if settings.get("partial_rotary_factor", float, 1.0, null=1.0) != 1:
                settings.fail("partial_rotary_factor other than 1 is not supported; supported are heads that are rotated whole")
        key = "rope_type" if "rope_type" in rope.values or "type" not in rope.values else "type"
        scaling = rope.choice(key, rope.get(key, str, "default"), _ROPES)
        fields = {"rope_theta": rope.number("rope_theta", self.number("rope_theta", 10000.0)), "rope_scaling": scaling}
        if scaling != "none":
            fields["rope_factor"] = rope.number("factor")
        if scaling == "llama3":
            longest = self.size("max_position_embeddings", max_positions)
            fields |= {"rope_low": rope.number("low_freq_factor"), "rope_high": rope.number("high_freq_factor")}
            fields["rope_original"] = rope.size("original_max_position_embeddings", longest)
        return fields


def check_dense(settings: Settings) -> None:
    """Raises InputError for features that no family here supports."""
    if settings.values.get("quantization_config"):
        settings.fail("quantization_config: quantised weights are not supported; supported are float32, bfloat16 and float16")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if settings.values.get(key):
            settings.fail(f"{key}: a mixture of experts is not supported; supported are dense models")
    known = ("full_attention", "sliding_attention")
    other = [kind for kind in settings.get("layer_types", list, [], null=[]) if kind not in known]
    if other:
        settings.fail(f"layer_types: {other[0]!r} is not supported; supported are {', '.join(known)}")


class Header(NamedTuple):
    """A tensor as the header of its file describes it."""

    file: Path
    name: str  # there
    dtype: str  # "F32", "BF16", …
    shape: tuple[int, ...]
    begin: int  # its bytes in the file
    end: int


def read_header(file: Path) -> dict[str, Header]:
    """The header of every tensor, by name. Raises InputError if the file is missing, truncated or not a safetensors file."""
    try:
        file.open("rb").close()  # for a file without read permission, safe_open says that it does not exist
        with safe_open(file, framework="np"):  # checks the header against the file's length
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file in the model folder") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file}: a truncated or unreadable safetensors file ({error})") from error
    header.pop("__metadata__", None)
    return {
        name: Header(file, name, entry["dtype"], tuple(entry["shape"]), *(8 + length + at for at in entry["data_offsets"]))
        for name, entry in header.items()
    }


def read_headers(folder: Path) -> dict[str, Header]:
    """The header of every tensor of the folder: in model.safetensors, or in the files that the index names."""
    if (folder / WEIGHTS).exists():
        return read_header(folder / WEIGHTS)
    index = folder / INDEX
    if not index.exists():
        raise InputError(f"{folder}: neither {WEIGHTS} nor {INDEX} (other formats are not supported)")
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise InputError(f"{index}: weight_map must say which file holds which tensor")
    missing = [file for file in dict.fromkeys(where.values()) if not (folder / file).is_file()]
    if missing:
        raise InputError(f"{index} names {quote_first(missing)}: no such file in the model folder")
    shards = {file: read_header(folder / file) for file in dict.fromkeys(where.values())}
    strays = [name for name, file in where.items() if name not in shards[file]]
    if strays:
        raise InputError(f"{index}: missing tensors: {quote_first(strays)} (of {where[strays[0]]})")
    everything = {}
    for headers in shards.values():
        everything |= headers
    return everything | {name: shards[file][name] for name, file in where.items()}


class Tensors:
    """The folder's tensors by the names of the family's table."""

    def __init__(self, folder: Path, prefix: str, unprefixed: tuple[str, ...], buffers: str):
        """prefix: put before the names that lack it, except for those in `unprefixed`; buffers: regular expression of tensors to skip."""
        self.headers: dict[str, Header] = {}
        self._open: dict[Path, Any] = {}
        for name, header in read_headers(folder).items():
            full = name if name.startswith(prefix) or name in unprefixed else prefix + name
            if re.fullmatch(buffers, full):
                continue
            if full in self.headers:
                raise InputError(f"{header.file}: tensor {name!r} is there twice, also as {self.headers[full].name!r}")
            self.headers[full] = header

    def view(self, name: str):
        """A view that is sliced like an array and reads only the slices."""
        header = self.headers[name]
        if header.file not in self._open:
            self._open[header.file] = safe_open(header.file, framework="np")
        return self._open[header.file].get_slice(header.name)

    def check(self, shapes: dict[str, tuple[int, ...]], folder: Path, optional: tuple[str, ...] = ()) -> None:
        """Raises InputError that names tensors which are missing, unused, or of another shape or type. optional: tensors that may exist."""
        missing = [name for name in shapes if name not in self.headers]
        if missing:
            raise InputError(f"{folder}: missing tensors: {quote_first(missing)}")
        for name, shape in shapes.items():
            header = self.headers[name]
            if header.shape != shape:
                raise InputError(f"{header.file}: tensor {header.name!r} has shape {header.shape}; by {CONFIG} it must be {shape}")
        unused = [header.name for name, header in self.headers.items() if name not in shapes and name not in optional]
        if unused:
            raise InputError(f"{folder}: unused tensors: {quote_first(unused)}; by {CONFIG} the model has none of that name")
        for header in self.headers.values():
            if header.dtype not in DTYPES:
                raise InputError(f"{header.file}: tensor {header.name!r} is {header.dtype}; supported are {', '.join(DTYPES)}")

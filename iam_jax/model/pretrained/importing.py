"""Imports a model folder: it is checked as a whole, then streamed tensor by tensor into sharded parameters."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from iam_jax.config import Config, ModelConfig, check
from iam_jax.data.tokenizer import Vocabulary
from iam_jax.errors import InputError, quote_first
from iam_jax.model.decoder import Block, Decoder
from iam_jax.model.lora import Keys
from iam_jax.model.pretrained.families import FAMILIES
from iam_jax.model.pretrained.family import Family
from iam_jax.model.pretrained.folder import CONFIG, TOKENIZER, Header, Settings, Tensors, check_dense, find_folder
from iam_jax.model.pretrained.table import Source, axis_sizes, param_axes, param_shape, read_part, tensor_shape
from iam_jax.relations import ORDINARY
from iam_jax.schedule import Schedule

_HEAD, _BLOCKS = "output_VD", "decoder.blocks."
_FIELDS = [field.name for field in dataclasses.fields(ModelConfig)]
_SHAPE = _FIELDS[_FIELDS.index("width") : _FIELDS.index("tie_tokens") + 1]
_LATER = ("norm_offset",)  # fields that came after the first fingerprints: they count unless they have their defaults
_SHOWN_BYTES = 2 * 10**9  # reading more shows its progress
_SAMPLES, _SAMPLE_BYTES = 64, 1024  # of a tensor's bytes, in its fingerprint


class Pretrained(NamedTuple):
    """A model folder, as its config.json describes it."""

    folder: Path
    settings: Settings
    family: Family
    fields: dict  # of ModelConfig
    layers: int
    vocabulary: int

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(**self.fields)

    @property
    def sizes(self) -> dict[str, int]:
        return axis_sizes(self.model, self.vocabulary)

    def table(self) -> dict[str, Source]:
        """The parameters that are not in layers."""
        return self._present(self.family.top, _names(self.model)[0])

    def layer_table(self, n: int) -> dict[str, Source]:
        """The parameters of layer n, by their names inside a block."""
        layer = self._present(self.family.layer, _names(self.model)[1])
        return {name: source._replace(tensor=source.tensor.format(n=n)) for name, source in layer.items()}

    def _present(self, table: dict[str, Source], names: frozenset[str]) -> dict[str, Source]:
        if missing := sorted(names - table.keys()):
            raise ValueError(f"the model family {self.family.name!r} has no tensor for {quote_first(missing)}")
        return {name: source for name, source in table.items() if name in names}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the folder, by name."""
        tables = [self.table(), *(self.layer_table(n) for n in range(self.layers))]
        return {source.tensor: tensor_shape(source, self.sizes) for table in tables for source in table.values()}

    def tensors(self) -> Tensors:
        """The folder's tensors. Raises InputError if one is missing, unused, or of another shape or type."""
        tensors = Tensors(self.folder, self.family.prefix, self.family.unprefixed, self.family.buffers)
        # Some files contain the output embedding although it is tied.
        optional = (self.family.top[_HEAD].tensor,) if _HEAD in self.family.top and _HEAD not in self.table() else ()
        tensors.check(self.shapes(), self.folder, optional)
        return tensors


@functools.cache
def _names(model: ModelConfig) -> tuple[frozenset[str], frozenset[str]]:
    """The parameters that a pretrained model of this shape has: those outside the layers, and those of a layer."""

    def names(make) -> Iterable[str]:
        return flatten_dict(nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: make(Keys(jax.random.key(0)))))), sep=".").keys()

    model = dataclasses.replace(model, item_width=0)  # it has no item-level layers
    top = {f"decoder.{name}" for name in names(lambda keys: Decoder(model, Schedule(()), 2, 1, None, keys))}
    return frozenset(top | (set() if model.tie_tokens else {_HEAD})), frozenset(names(lambda keys: Block(model, 1, False, keys)))


def read_pretrained(config: Config) -> Pretrained:
    """Raises InputError if config.json cannot be read or needs an unsupported feature."""
    folder = find_folder(config.model.pretrained)
    settings = Settings(folder / CONFIG)
    family = settings.choice("model_type", settings.get("model_type", str), FAMILIES)
    check_dense(settings)
    # A field that the family does not set has its default, not the config's value.
    fields = {name: getattr(ModelConfig(), name) for name in _SHAPE} | family.fields(settings)
    return Pretrained(folder, settings, family, fields, settings.size(family.layers), settings.size("vocab_size"))


def configure(config: Config) -> Config:
    """The config with the folder's shape (the fields from `width` to `tie_tokens`), checked again.

    Raises InputError: no such folder, an unsupported model, a schedule of another number of layers, a sliding window that would apply.
    """
    source = read_pretrained(config)
    own, layers, key = len(config.schedule.own_layers), source.layers, source.family.layers
    if own != layers:
        pairs = f"(intra inter)*{layers // 2}" + f" {ORDINARY}" * (layers % 2) if layers > 1 else "intra"
        what = f"has {own} layers without the inserted ones, and {source.settings.path} has {key} = {layers}"
        raise InputError(f"config.model.schedule = {config.model.schedule!r} {what}; for example '{ORDINARY}*{layers}' or '{pairs}'")
    window, row = source.family.window(source.settings), config.data.row_tokens
    if window is not None and window < row:
        source.settings.fail(
            f"sliding_window = {window:,} would apply to rows of config.data.row_tokens = {row:,} and is not supported; supported are "
            f"rows of at most {window:,}"
        )
    configured = dataclasses.replace(config, model=dataclasses.replace(config.model, **source.fields))
    try:
        check(configured)
    except InputError as error:
        raise InputError(f"{source.settings.path}: {error}") from error
    return configured


def vocabulary(config: Config) -> Vocabulary:
    """The folder's tokenizer.json, and the number of rows of its embedding."""
    source = read_pretrained(config)
    if not (source.folder / TOKENIZER).is_file():
        raise InputError(f"{source.folder / TOKENIZER}: no such file in the model folder")
    return Vocabulary(source.folder / TOKENIZER, source.vocabulary)


def places(config: Config, source: Pretrained) -> dict[str, list[Source]]:
    """The source of each pretrained parameter: one, or one for each repeat of a stack."""
    found = {name: [place] for name, place in source.table().items()}
    for n, (stage, place, _) in enumerate(config.schedule.own_layers):
        for name, where in source.layer_table(n).items():
            found.setdefault(f"{_BLOCKS}{stage}_{place}.{name}", []).append(where)
    return found


def names(config: Config) -> dict[str, tuple[str, ...]]:
    """The tensors of the folder that each pretrained parameter comes from, by the parameter's name."""
    found = places(config, read_pretrained(config))
    return {name: tuple(source.tensor for source in sources) for name, sources in found.items()}


def fingerprint(config: Config) -> str:
    """SHA-256 of the model's shape, of every tensor's name, type and shape, and of a strided sample of its bytes. It does not depend on the
    folder's path or on how the tensors are spread over files.

    Raises InputError for tensors that are missing, unused, misshapen or of an unsupported type.
    """
    source = read_pretrained(config)
    tensors = source.tensors()
    _check_tied(source, tensors)
    headers = tensors.headers
    fields = {name: value for name, value in source.fields.items() if name not in _LATER or value != getattr(ModelConfig(), name)}
    described = [fields, source.layers, [[name, headers[name].dtype, headers[name].shape] for name in sorted(source.shapes())]]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(source.shapes()):
        digest.update(_sample(headers[name]))
    return digest.hexdigest()


def _sample(header: Header) -> bytes:
    with header.file.open("rb") as file:
        file.seek(header.begin)
        size = header.end - header.begin
        if size <= _SAMPLES * _SAMPLE_BYTES:
            return file.read(size)
        parts = []
        for at in np.linspace(0, size - _SAMPLE_BYTES, _SAMPLES, dtype=np.int64):
            file.seek(header.begin + int(at))
            parts.append(file.read(_SAMPLE_BYTES))
        return b"".join(parts)


def load(config: Config, abstract: dict, dtype=None) -> dict:
    """The pretrained parameters in the shape of `abstract`, arrays placed by its shardings.

    abstract: a nested dict of `jax.ShapeDtypeStruct` with all or some of the parameters that `names` lists. dtype: replaces the types in
    `abstract`. The whole folder is checked first. Besides the parameters, about two tensors are in memory at a time, and a process reads
    only what its own devices hold.
    """
    source = read_pretrained(config)
    tensors = source.tensors()
    _check_tied(source, tensors)
    known, sizes = places(config, source), source.sizes
    leaves: dict = flatten_dict(abstract, sep=".")
    for name, x in leaves.items():
        if name not in known:
            raise ValueError(f"{name} is not a pretrained parameter")
        shape = (len(known[name]),) * name.startswith(_BLOCKS) + param_shape(name, known[name][0], sizes)
        if x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape} and by {source.settings.path} {shape}")

    total = sum(x.size * jnp.dtype(dtype or x.dtype).itemsize for x in leaves.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="import", disable=total <= _SHOWN_BYTES) as bar:

        def parameter(path, x) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            wanted = jnp.dtype(dtype or x.dtype)
            sharding = x.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
            if not name.startswith(_BLOCKS):
                array = _place(tensors, name, known[name][0], sizes, wanted, sharding)
            else:
                inner = _inner(sharding)
                array = _zeros(x.shape, wanted, sharding)()
                for r, part in enumerate(known[name]):
                    array = _put(sharding)(array, _place(tensors, name, part, sizes, wanted, inner), np.int32(r))
                    array.block_until_ready()  # otherwise tensors pile up in memory
            bar.update(array.nbytes)
            return array

        return jax.tree_util.tree_map_with_path(parameter, abstract)


def _place(tensors: Tensors, name: str, source: Source, sizes: dict[str, int], dtype, sharding) -> jax.Array:
    axes = param_axes(name, source)
    view = tensors.view(source.tensor)
    shape = param_shape(name, source, sizes)
    return jax.make_array_from_callback(
        shape, sharding, lambda index: read_part(view, source, axes, sizes, index or (), dtype)
    ).block_until_ready()


def _inner(sharding):
    """The sharding of one repeat of a stack."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    if sharding.spec and sharding.spec[0] is not None:
        raise ValueError(f"the repeats of a stack cannot be sharded: {sharding}")
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]), memory_kind=sharding.memory_kind)


@functools.cache
def _zeros(shape: tuple[int, ...], dtype, sharding):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _put(sharding):
    """stack, part, r -> the stack with the part as repeat r, in place."""
    return jax.jit(lambda stack, part, r: jax.lax.dynamic_update_index_in_dim(stack, part, r, 0), donate_argnums=0, out_shardings=sharding)


def _check_tied(source: Pretrained, tensors: Tensors) -> None:
    """Raises InputError if the files contain an output embedding that differs from the tied input embedding."""
    top = source.family.top
    if _HEAD in source.table() or _HEAD not in top or top[_HEAD].tensor not in tensors.headers:
        return
    head, embedding = top[_HEAD].tensor, top["decoder.embedding_VD"].tensor
    header, other = tensors.headers[head], tensors.headers[embedding]
    a, b, rows = tensors.view(head), tensors.view(embedding), header.shape[0]
    parts = (slice(at, min(at + 8192, rows)) for at in range(0, rows, 8192))  # reads neither as a whole
    if header.shape != other.shape or not all(np.array_equal(a[part], b[part]) for part in parts):
        raise InputError(f"{header.file}: {CONFIG} ties {header.name!r} to {other.name!r}, but it is another tensor")

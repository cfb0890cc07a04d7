"""Exports a folder that turns histories into top-K lists without this project's code. docs/serving.md shows how a service loads it.

`scorer.stablehlo` is a function serialised by `jax.export` for CPU, CUDA and TPU: (weights, token, group, seen) -> items, scores. It uses
plain XLA operations only. Attention is dense, so that its memory grows with the square of the row length. The other files contain the
parameters that the function reads and the item vectors (`weights.safetensors`), the items' ids and tokens, the tokenizer, and all other
facts that a caller needs (`artefact.json`).

With item-level layers, an item is one slot: its "token" is its number. The function then reads the inputs of these layers (`item_inputs`)
instead of computing them from text, identity and vectors. The folder has no tokenizer.

Axes: B users (any number), T token slots, S seen items (any number), E item vectors, I items, K items of a list.
"""

import dataclasses
import json
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from tokenizers import Tokenizer

from iam_jax.config import Config
from iam_jax.data.catalogue import Catalogue
from iam_jax.data.prepare import Prepared
from iam_jax.data.tokenizer import encode
from iam_jax.errors import InputError
from iam_jax.model import Params, make_model
from iam_jax.model.parameters import name_of
from iam_jax.model.pretrained.exporting import check_output, write_tensors
from iam_jax.ranking.core import Ranker
from iam_jax.ranking.scores import top_items

FORMAT = 1  # version of the folder's format
TOP_K = 100
PLATFORMS = ("cpu", "cuda", "tpu")
VECTORS, INPUTS = "item_vectors", "item_inputs"


def check(config: Config) -> None:
    """Raises InputError if the model cannot be exported as a scorer."""
    if not config.objective.item:
        raise InputError("--format=stablehlo exports item scores, but the model has none (config.objective.item = 0)")
    if config.eval.ranking != "item":
        raise InputError(f"--format=stablehlo exports item scores, but config.eval.ranking = {config.eval.ranking!r} does not rank by them")
    if config.row_options["identity"] and not config.item_level:
        field = "model.item_input" if config.model.item_input != "none" else "data.vectors"
        raise InputError(f"--format=stablehlo: config.{field} needs item-level layers (the mark | in model.schedule)")
    if config.model.dtype == "bfloat16" and jax.default_backend() == "gpu":
        raise InputError("--format=stablehlo: bfloat16 attention on a GPU is not plain XLA; export on a CPU (JAX_PLATFORMS=cpu)")


def export_function(config: Config, catalogue: Catalogue, params: Params, width: int, k: int) -> tuple[jax.export.Exported, list[str]]:
    """Exports the function. Returns it with the names of the parameters that it reads.

    Args:
      config: the run's config.
      catalogue: the items.
      params: all parameters, or their shapes.
      width: E.
      k: K.
    """
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="reference", remat=False))
    given = [params[name] for name in ("input_vector_PE", "output_vector_PE") if name in params]
    vector_size = given[0].shape[0] if given else 0
    model = make_model(plain, catalogue.vocabulary, catalogue.items, int(catalogue.lengths.max()), vector_size)
    shapes = {name_of(path): jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    T, int32 = config.row_slots, np.dtype(np.int32)
    given = {VECTORS: jax.ShapeDtypeStruct((catalogue.items, width), np.float32)}
    if config.item_level:
        given[INPUTS] = jax.ShapeDtypeStruct((catalogue.items + 2, width), config.model.dtype)

    def score(weights: dict, token_BT: jax.Array, group_BT: jax.Array, seen_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
        leaves = [weights[name] if name in weights else jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()]
        network = model.bind(jax.tree.unflatten(jax.tree.structure(params), leaves))
        real_BT = group_BT >= 0
        position_BT = jnp.broadcast_to(jnp.arange(T, dtype=np.int32), token_BT.shape)
        batch = {"token": token_BT, "user": real_BT.astype(np.int32), "group": jnp.maximum(group_BT, 0), "position": position_BT}
        states = network.from_inputs(weights[INPUTS][token_BT], batch) if config.item_level else network.states(batch)
        last_B = jnp.maximum(real_BT.sum(1) - 1, 0)
        x_BD = jnp.take_along_axis(states, last_B[:, None, None], axis=1)[:, 0]
        h_BE = jnp.where(real_BT.any(1, keepdims=True), network.project(x_BD), 0)  # an empty history has the vector 0
        return top_items(h_BE, weights[VECTORS], seen_BS, k)[:2]

    def exported(names: list[str], B, S) -> jax.export.Exported:
        weights = {name: shapes[name] for name in names} | given
        rows = jax.ShapeDtypeStruct((B, T), int32)
        make = jax.export.export(jax.jit(score), platforms=PLATFORMS)
        return make(weights, rows, rows, jax.ShapeDtypeStruct((B, S), int32))

    order = sorted([*shapes, *given])  # the order in which JAX flattens a dict
    one_device = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    with jax.set_mesh(one_device):  # an exported function needs as many devices as its mesh has
        # With symbolic sizes, JAX would keep arguments that the function does not read, so the first export has fixed sizes.
        read = {order[n] for n in exported(list(shapes), 1, 1).module_kept_var_idx if n < len(order)}
        names = [name for name in shapes if name in read]
        return exported(names, *jax.export.symbolic_shape("b, s")), names


def export(ranker: Ranker, params: Params, prepared: Prepared, step: int, output: Path, top_k: int = TOP_K) -> list[str]:
    """Writes the folder, completely or not at all. Returns notes for the user.

    Args:
      ranker: of the run.
      params: all parameters, addressable from this process.
      prepared: the run's data.
      step: the step number of the parameters.
      output: the folder, which must be empty or not exist.
      top_k: length of the lists.

    Raises:
      InputError: if the model cannot be exported, or the folder cannot be written.
      FloatingPointError: if an item vector is not finite.
    """
    config, catalogue = ranker.config, ranker.catalogue
    check(config)
    output, k = check_output(output), min(top_k, catalogue.items)
    leading_XD = ranker.leading_states(params, sys.maxsize)
    v_IE = np.asarray(ranker.item_vectors(params, leading_XD))[: catalogue.items]
    if not np.isfinite(v_IE).all():
        raise FloatingPointError("an item's vector is not finite")
    function, names = export_function(config, catalogue, params, v_IE.shape[1], k)
    leaves = {name_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    weights = {name: leaves[name] for name in names} | {VECTORS: v_IE}
    items = {"tokens": catalogue.tokens[: catalogue.offsets[-3]], "offsets": catalogue.offsets[:-2].astype(np.int32)}
    if config.item_level:
        weights[INPUTS] = ranker.entry_inputs(params, leading_XD, ranker.items)
        items = {"tokens": np.arange(catalogue.items, dtype=np.int32), "offsets": np.arange(catalogue.items + 1, dtype=np.int32)}
    folder = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        folder.chmod(0o755)
        (folder / "scorer.stablehlo").write_bytes(function.serialize())
        for file, tensors in (("weights", weights), ("items", items)):
            headers = {name: (np.dtype(x.dtype), x.shape) for name, x in tensors.items()}
            write_tensors(folder / f"{file}.safetensors", headers, (np.asarray(x) for x in tensors.values()))
        texts = {"items.json": json.dumps(prepared.events.item_ids.tolist(), ensure_ascii=False)}
        texts["artefact.json"] = json.dumps(_facts(config, catalogue, k, step) | {"split_sha256": prepared.split.sha256}, indent=2) + "\n"
        if catalogue.tokenizer_json and not config.item_level:
            texts["tokenizer.json"] = catalogue.tokenizer_json
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        folder.replace(output)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror or error})") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    size = sum(path.stat().st_size for path in output.iterdir()) / 2**20
    return [f"{catalogue.items:,} items, lists of {k}, rows of {config.row_slots} slots, {size:,.1f} MiB"]


def _facts(config: Config, catalogue: Catalogue, k: int, step: int) -> dict:
    """The content of `artefact.json`, except for the hash of the split."""
    tokens, offsets = catalogue.tokens, catalogue.offsets
    facts = {"format": FORMAT, "step": step, "top_k": k, "items": catalogue.items, "row_tokens": config.row_slots}
    facts["last_n"] = config.data.last_n  # number of events of a history that are read; 0: all that fit
    facts["filter_seen"] = config.eval.filter_seen
    if config.item_level:
        facts |= {"prompt": [catalogue.items] * catalogue.prompt, "suffix": [catalogue.items + 1] * catalogue.suffix}
    else:
        facts |= {"prompt": tokens[offsets[-3] : offsets[-2]].tolist(), "suffix": tokens[offsets[-2] :].tolist()}
    if catalogue.tokenizer_json and not config.item_level:  # how a text becomes tokens
        separator = encode(Tokenizer.from_str(catalogue.tokenizer_json), [config.data.separator], special=True)[0]
        facts |= {"text": config.data.text, "separator": separator, "item_tokens": config.data.item_tokens}
        facts["boundary"] = catalogue.vocabulary - 1
    return facts | {"platforms": list(PLATFORMS), "jax": metadata.version("jax"), "iam_jax": metadata.version("iam_jax")}

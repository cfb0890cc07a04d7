"""Loads a model and its parameters from a working folder."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import polars as pl
from jax.sharding import AxisType

from iam_jax.config import Config, check_same_run
from iam_jax.data.cache import cache_root
from iam_jax.data.prepare import read_split
from iam_jax.data.splits import Split
from iam_jax.data.stored import Stored
from iam_jax.devices.mesh import make_mesh
from iam_jax.errors import InputError
from iam_jax.model import Model, Params, make_model, pretrained
from iam_jax.model.parameters import abstract, frozen_names, join, load_frozen, select
from iam_jax.ranking.choice import BASELINES
from iam_jax.ranking.fusion import Fusion, read_record
from iam_jax.ranking.tower import tower_states
from iam_jax.ranking.transitions import HistorySums
from iam_jax.runs.checkpoint import Checkpoints


def shape_from_folder(workdir: Path, config: Config, saved: bool) -> Config:
    """Returns the config with the shape of the pretrained model, if there is one.

    The folder of the pretrained model is read only if it is needed: for parameters that no checkpoint has, or if the config is not the
    working folder's own, which has the shape.

    Args:
      workdir: the working folder.
      config: the config.
      saved: whether the config is the working folder's own.

    Raises:
      InputError: if the working folder belongs to another config or another pretrained model.
    """
    if config.model.pretrained and not (saved and not _reads_model_folder(config)):
        config = pretrained.configure(config)
        saved_hash, own_hash = data_facts(workdir).get("pretrained_sha256"), pretrained.fingerprint(config)
        if saved_hash != own_hash:
            raise InputError(f"{workdir} was made from another pretrained model: its pretrained_sha256 is {saved_hash}, not {own_hash}")
    check_same_run(workdir, config)
    return config


def data_facts(workdir: Path) -> dict:
    """The content of data.json: hashes of the split, the catalogue and the pretrained model. Raises InputError if it cannot be read."""
    try:
        return dict(json.loads((workdir / "data.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{workdir / 'data.json'}: cannot be read ({error})") from error


def model_of(config: Config, stored: Stored, bounded: bool = True) -> Model:
    """Makes the model of a working folder.

    bounded: whether attention inside items is compiled for the longest item of the catalogue (which costs less), or for any length.
    """
    size = 0 if stored.vectors is None else stored.vectors.shape[1]
    return make_model(config, stored.catalogue.vocabulary, stored.known, int(stored.catalogue.lengths.max()) if bounded else None, size)


def serving_mesh(config: Config) -> jax.sharding.Mesh:
    """The config's mesh. In a job of several processes, the mesh of this process's own devices: they share the work, but no arrays."""
    if jax.process_count() == 1:
        return make_mesh(config.mesh)
    devices = jax.local_devices()
    return jax.make_mesh((len(devices), 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def restore(checkpoints: Checkpoints, step: str, config: Config, model: Model, mesh: jax.sharding.Mesh) -> tuple[int, Params]:
    """Restores a checkpoint. step: "best", "last", or a step number.

    Returns the step number, and all parameters on the mesh. Raises InputError if there is no such checkpoint or it cannot be read.
    """
    shapes = model.shapes()
    names = frozen_names(config, shapes) if _reads_model_folder(config) else set()
    number, params = checkpoints.load_params(step, abstract(mesh, select(shapes, lambda name: name not in names)))
    if names:
        frozen = select(shapes, lambda name: name in names)
        params = join(params, load_frozen(config, abstract(mesh, frozen, config.model.frozen_dtype)))
    return number, params


def tower_of(workdir: Path, config: Config, stored: Stored, model: Model, params: Params, mesh: jax.sharding.Mesh) -> np.ndarray | None:
    """The states of a constant tower, from the cache or computed; None if the model has none."""
    if not config.constant_tower:
        return None
    names = frozen_names(config, model.shapes())
    fingerprint, cache = str(data_facts(workdir).get("pretrained_sha256")), cache_root(config.data.cache)
    frozen = functools.partial(select, params, lambda name: name in names)
    return tower_states(config, stored.catalogue, model, mesh, frozen, fingerprint, cache)


def run_split(workdir: Path, config: Config, item_ids: pl.Series) -> Split:
    """Reads the data of a run again (`data.path`).

    item_ids: of the working folder, perhaps with added items behind them.

    Raises InputError if the data are not the run's.
    """
    split = read_split(config.data)
    expected = data_facts(workdir).get("split_sha256")
    if split.sha256 != expected or not item_ids[: len(split.items)].equals(split.items["item"]):
        raise InputError(f"{workdir} was made from other data: its split_sha256 is {expected}, not {split.sha256}")
    return split


def fusion_of(workdir: Path, config: Config, stored: Stored, step: int) -> Fusion | None:
    """The fusion of `eval.fusion` with the weight of the last evaluation of this step; None without `eval.fusion`.

    Raises InputError if there is no such evaluation, or if the data are not the run's.
    """
    name = config.eval.fusion
    if not name:
        return None
    split = run_split(workdir, config, stored.item_ids)
    record = read_record(split, workdir)
    if record is None or (record["step"], record["baseline"]) != (step, name):
        missing = f"{workdir} has no weight for step {step:,}; evaluate that step first (--mode=evaluate --config.eval.fusion={name})"
        raise InputError(f"config.eval.fusion = {name!r}: {missing}")
    sums = BASELINES[name].make(split.events)(**record["settings"])
    assert isinstance(sums, HistorySums)
    return Fusion(sums, record["weight"], record["settings"])


def _reads_model_folder(config: Config) -> bool:
    """Whether parameters are restored from the folder of the pretrained model, because no checkpoint has them."""
    unused_output = bool(config.model.pretrained) and not config.objective.token and not config.model.tie_tokens
    unused_norm = bool(config.model.pretrained and config.model.item_width)
    return config.freezes or unused_output or unused_norm

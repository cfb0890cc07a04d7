"""From a working folder to a model with its parameters: config, catalogue, checkpoint."""

import json
from pathlib import Path

import jax
from jax.sharding import AxisType

from iam_jax.config import Config, check_same_run
from iam_jax.data.stored import Stored
from iam_jax.devices.mesh import make_mesh
from iam_jax.errors import InputError
from iam_jax.model import Model, Params, make_model, pretrained
from iam_jax.model.parameters import abstract, frozen_names, join, select
from iam_jax.runs.checkpoint import Checkpoints


def shape_from_folder(workdir: Path, config: Config, saved: bool) -> Config:
    """The config with the shape of the pretrained model's folder. The folder is read only where it is needed: for parameters that are in no
    checkpoint, or where the config is not the saved one (which holds the shape). Raises InputError for another model or another config.

    saved: the config is the working folder's own.
    """
    if config.model.pretrained and not (saved and not _reads_model_folder(config)):
        config = pretrained.configure(config)
        known, found = data_facts(workdir).get("pretrained_sha256"), pretrained.fingerprint(config)
        if known != found:
            raise InputError(f"{workdir} was made from another pretrained model: its pretrained_sha256 is {known}, not {found}")
    check_same_run(workdir, config)
    return config


def data_facts(workdir: Path) -> dict:
    """The content of data.json: hashes of the split, the catalogue and the pretrained model. Raises InputError where it is unreadable."""
    try:
        return dict(json.loads((workdir / "data.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{workdir / 'data.json'}: cannot be read ({error})") from error


def model_of(config: Config, stored: Stored, bounded: bool = True) -> Model:
    """The model of a working folder. bounded: attention inside an item is compiled for the longest item of the catalogue; False: for items
    of any length."""
    return make_model(config, stored.catalogue.vocabulary, stored.known, int(stored.catalogue.lengths.max()) if bounded else None)


def serving_mesh(config: Config) -> jax.sharding.Mesh:
    """The config's mesh, or in a job of several processes this process' own devices: processes share work, not arrays."""
    if jax.process_count() == 1:
        return make_mesh(config.mesh)
    devices = jax.local_devices()
    return jax.make_mesh((len(devices), 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def restore(checkpoints: Checkpoints, step: str, config: Config, model: Model, mesh: jax.sharding.Mesh) -> tuple[int, Params]:
    """The step that "best", "last" or a number names, and all parameters on the mesh. Raises InputError where none can be read."""
    shapes = model.shapes()
    names = frozen_names(config, shapes) if _reads_model_folder(config) else set()
    found, params = checkpoints.load_params(step, abstract(mesh, select(shapes, lambda name: name not in names)))
    if names:
        frozen = select(shapes, lambda name: name in names)
        params = join(params, pretrained.load(config, abstract(mesh, frozen, config.model.frozen_dtype)))
    return found, params


def _reads_model_folder(config: Config) -> bool:
    """Whether parameters of the pretrained model's folder are in no checkpoint."""
    unread = bool(config.model.pretrained) and not config.objective.token and not config.model.tie_tokens
    return config.freezes or unread

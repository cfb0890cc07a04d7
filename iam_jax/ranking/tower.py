"""Item states of a constant tower: a frozen pretrained model before the mark `|` of the schedule (`Config.constant_tower`).

The state of each entry of the catalogue after the leading intra layers depends on nothing that is trained. It is computed once per
catalogue and kept in the cache of prepared data. An interrupted computation keeps its finished parts, and the same command continues.
"""

import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from iam_jax.config import Config
from iam_jax.data.cache import cached_folder
from iam_jax.data.catalogue import Catalogue
from iam_jax.data.item_rows import CatalogueItems
from iam_jax.devices import distributed
from iam_jax.devices.mesh import batch_shards, shard_batch
from iam_jax.errors import InputError
from iam_jax.model import Model, Params
from iam_jax.model.parameters import join, name_of, select
from iam_jax.storage.files import write_atomically

_VERSION = 1  # of the cached files
_STATES = "states.npy"


def tower_states(
    config: Config,
    catalogue: Catalogue,
    model: Model,
    mesh: jax.sharding.Mesh,
    frozen: Callable[[], Params],
    fingerprint: str,
    cache: Path,
    poll: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """[I + 2, D] float32: the state of the last token of every entry of the catalogue after the leading intra layers, memory-mapped.

    Args:
      config: the run's config.
      catalogue: the items.
      model: the model.
      mesh: the device mesh.
      frozen: returns the parameters that are not trained. It is called only if the states are not in the cache.
      fingerprint: hash of the pretrained model.
      cache: the folder of prepared data.
      poll: is called after each part.

    Raises:
      InputError: if the cache cannot be written.
    """
    identity = [
        _VERSION, fingerprint, catalogue.sha256, config.schedule.relations[: config.schedule.leading_intra], config.model.dtype,
        config.model.frozen_dtype, config.data.row_tokens, config.eval.batch_rows,
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    folder, parts = cache / f"tower-{digest}", cache / f"tower-{digest}.parts"
    start = time.monotonic()

    def make() -> Callable[[Path], None]:
        states = _computed(config, catalogue, model, mesh, frozen(), parts, poll)
        return lambda temporary: np.save(temporary / _STATES, states)

    there = all(distributed.gather(folder.is_dir()))
    if not there:  # processes with different caches compute the states together, too
        write = make()
        cached_folder(folder, lambda: write)
    states = np.load(folder / _STATES, mmap_mode="r")
    if jax.process_index() == 0:
        shutil.rmtree(parts, ignore_errors=True)
        what = "read from the cache" if there else "computed"
        layers, seconds = config.schedule.leading_intra, time.monotonic() - start
        print(f"states of {catalogue.items:,} items after {layers} frozen layers: {what} in {seconds:.1f} s", flush=True)
    return states


def _computed(
    config: Config,
    catalogue: Catalogue,
    model: Model,
    mesh: jax.sharding.Mesh,
    frozen: Params,
    parts: Path,
    poll: Callable[[], None],
) -> np.ndarray:
    shards, slots = batch_shards(mesh), config.data.row_tokens
    at_once = -(-config.eval.batch_rows // shards) * shards
    packed = CatalogueItems(catalogue, slots, at_once, by_item=True)
    last = packed.kept
    assert last is not None
    part_of = last // (slots * at_once)
    there = {name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(frozen)}
    trained = select(model.shapes(), lambda name: name not in there)

    @functools.partial(jax.jit, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    def states_of(frozen: Params, rows: dict, slot: jax.Array) -> jax.Array:
        params = join(frozen, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), trained))  # they are not read
        return model.bind(params).leading_states(rows, 1)[slot].astype(jnp.float32)

    states = np.zeros((catalogue.items + 2, config.model.width), np.float32)
    width = int(np.bincount(part_of, minlength=packed.chunks).max())
    resumable = jax.process_count() == 1  # several processes compute the parts together
    if resumable:
        try:
            parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{parts}: cannot write item states there ({error.strerror}); see config.data.cache") from error
    bar = tqdm(desc="item states", total=packed.chunks, unit="part", disable=not config.log.progress or bool(jax.process_index()))
    with bar:
        for part in range(packed.chunks):
            here = np.flatnonzero(part_of == part)
            file = parts / f"{part:06}.npy"
            if resumable and file.exists():
                states[here] = np.load(file)
            else:
                rows = {name: x[part * at_once : (part + 1) * at_once] for name, x in packed.rows.items()}
                slot = np.pad(last[here] - part * at_once * slots, (0, width - len(here))).astype(np.int32)
                states[here] = np.asarray(states_of(frozen, shard_batch(mesh, rows), slot))[: len(here)]
                if resumable:
                    write_atomically(file, functools.partial(_save, states[here]))
            bar.update()
            poll()
    return states


def _save(array: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:  # NumPy would add an ending to the name of a temporary file
        np.save(file, array)

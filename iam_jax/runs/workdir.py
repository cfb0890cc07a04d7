"""The working folder of a run. It belongs to one config and to one set of data."""

import contextlib
import json
from pathlib import Path

import filelock

from iam_jax.config import CONFIG_FILE, Config, check_same_run, to_json
from iam_jax.data.prepare import Prepared
from iam_jax.data.stored import ITEMS_FILE, identity, items_frame
from iam_jax.data.vectors import TRANSFORM_FILE, VECTORS_FILE
from iam_jax.errors import InputError
from iam_jax.storage import remote as storage
from iam_jax.storage.files import check_writable, make_folder, write_atomically

_FIRST_FILES = {  # written before the config; the config marks the folder as complete
    "data.json", "tokenizer.json", ITEMS_FILE, VECTORS_FILE, TRANSFORM_FILE,
}  # fmt: skip


def check_workdir(workdir: Path, config: Config) -> None:
    """Raises InputError for a folder of another config, one that is not a working folder, and one that cannot be written."""
    if (workdir / CONFIG_FILE).exists():
        check_same_run(workdir, config)
    elif workdir.is_dir() and any(
        path.name not in _FIRST_FILES and not path.name.startswith(".")
        for path in workdir.iterdir()
        if path != workdir  # an S3 folder
    ):
        raise InputError(f"--workdir={workdir} is not empty and holds no {CONFIG_FILE}: not a working folder of a run")
    elif workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir={workdir} is not a folder")
    check_writable(workdir, "workdir")


def lock_workdir(workdir: Path) -> contextlib.AbstractContextManager:
    """A file whose lock marks the folder as in training. The lock is held until the file is closed or the process ends, however it ends.

    Raises InputError if another process holds it: two runs in one folder would mix their files. Object storage and some file systems
    have no locks; nothing is held there.
    """
    if storage.is_remote(workdir):
        return contextlib.nullcontext()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("a")
    except OSError as error:
        raise InputError(f"--workdir={workdir}: {error.strerror}") from error
    try:
        locked = filelock.lock_descriptor(file.fileno(), blocking=False)
    except OSError:  # a file system without locks
        return file
    if not locked:
        file.close()
        raise InputError(f"--workdir={workdir}: another process is training there")
    return file


def open_workdir(
    workdir: Path, config: Config, prepared: Prepared, pretrained_sha256: str | None = None, create: bool = False, shared: bool = False
) -> None:
    """Checks that the folder belongs to this config, this data and this pretrained model. Raises InputError if it does not.

    create: makes the folder, or updates the config fields that may change. shared: another process has made the folder, and this process
    has to see it.
    """
    check_workdir(workdir, config)
    if shared and not (workdir / CONFIG_FILE).exists():
        raise InputError(f"--workdir={workdir}: this process does not see the files of the first process; all need the same disk")
    made_from = {"split_sha256": prepared.split.sha256, **identity(prepared.events.item_ids.tolist(), prepared.catalogue)}
    if prepared.content is not None:
        made_from["vectors_sha256"] = prepared.content.sha256
    if pretrained_sha256 is not None:
        made_from["pretrained_sha256"] = pretrained_sha256
    if (workdir / CONFIG_FILE).exists():
        try:
            saved = json.loads((workdir / "data.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{workdir / 'data.json'}: cannot be read ({error})") from error
        for name, value in made_from.items():
            if saved.get(name) != value:
                what = {"pretrained_sha256": "another pretrained model", "vectors_sha256": "other vectors"}.get(name, "other data")
                raise InputError(f"{workdir} was made from {what}: its {name} is {saved.get(name)}, not {value}")
    if not create:
        return
    if (workdir / "checkpoints").is_dir():
        from iam_jax.runs.checkpoint import Checkpoints  # takes a second to import

        checkpoints = Checkpoints(workdir, config.train.keep, config.selection, read_only=True)
        checkpoints.best()  # refuses an eval.metric that was not measured, before the config is written
        checkpoints.close()
    texts = {"data.json": json.dumps(made_from, indent=2) + "\n", "tokenizer.json": prepared.catalogue.tokenizer_json}
    try:
        make_folder(workdir)
        for name, text in texts.items():
            if text:
                _write(workdir / name, text)
        write_atomically(workdir / ITEMS_FILE, items_frame(prepared).write_parquet)
        if prepared.content is not None and not (workdir / VECTORS_FILE).exists():  # it may be large, and is the same
            prepared.content.save(workdir)
        _write(workdir / CONFIG_FILE, to_json(config))
    except OSError as error:
        raise InputError(f"--workdir={workdir}: {error.strerror}") from error


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

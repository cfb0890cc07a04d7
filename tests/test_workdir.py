"""The working folder: a folder of another run is refused before any work and not changed."""

import dataclasses
import errno
import json
import subprocess
import sys

import filelock
import numpy as np
import pytest
from helpers import make_config, tiny_data

from iam_jax.data.catalogue import Catalogue
from iam_jax.data.stored import read_stored
from iam_jax.data.vectors import Vectors
from iam_jax.errors import InputError
from iam_jax.runs.workdir import check_workdir, lock_workdir, open_workdir


def listing(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def config():
    return make_config()


def test_a_new_folder_holds_config_data_and_is_opened_again(tmp_path, config):
    data = tiny_data()
    open_workdir(tmp_path / "a" / "b", config, data, create=False)
    assert not (tmp_path / "a").exists()
    open_workdir(tmp_path / "a" / "b", config, data, create=True)
    before = listing(tmp_path)
    assert {"a/b/config.json", "a/b/data.json"} <= before.keys()
    assert json.loads(before["a/b/data.json"])["split_sha256"] == data.split.sha256
    open_workdir(tmp_path / "a" / "b", config, data, create=True)
    assert listing(tmp_path) == before


def test_one_run_at_a_time(tmp_path, config):
    with lock_workdir(tmp_path / "a" / "b"), pytest.raises(InputError, match="another process is training there"):
        lock_workdir(tmp_path / "a" / "b")
    lock_workdir(tmp_path / "a" / "b").close()
    check_workdir(tmp_path / "a" / "b", config)  # the lock file does not change the folder's contents
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--workdir=.*file: "):
        lock_workdir(tmp_path / "file")


def test_a_process_that_is_killed_lets_go_of_the_lock(tmp_path):
    holds = "import sys, time, pathlib; from iam_jax.runs.workdir import lock_workdir; lock = lock_workdir(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", f"{holds}; print('held', flush=True); time.sleep(60)", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another process is training there"):
            lock_workdir(tmp_path)
        process.kill()
    with lock_workdir(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def unsupported(fd, blocking):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(filelock, "lock_descriptor", unsupported)
    with lock_workdir(tmp_path), lock_workdir(tmp_path):
        assert (tmp_path / ".lock").exists()


def test_other_configs_are_refused_by_key(tmp_path, config):
    open_workdir(tmp_path / "w", config, tiny_data(), create=True)
    before = listing(tmp_path)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.25))
    with pytest.raises(InputError, match=r"model\.dropout"):
        check_workdir(tmp_path / "w", other)
    free = dataclasses.replace(config, eval=dataclasses.replace(config.eval, filter_seen=False))
    check_workdir(tmp_path / "w", free)
    assert listing(tmp_path) == before


def test_other_data_are_refused(tmp_path, config):
    data = tiny_data()
    open_workdir(tmp_path / "w", config, data, create=True)
    before = listing(tmp_path)
    ids = data.events.item_ids.copy()
    ids[0] = "another"  # neither the hash of the split nor the tokens show it, since an item may have no events
    renamed = dataclasses.replace(data.events, item_ids=ids)
    for other, name in (
        (dataclasses.replace(data, split=dataclasses.replace(data.split, sha256="0")), "split_sha256"),
        (dataclasses.replace(data, split=dataclasses.replace(data.split, events=renamed)), "items_sha256"),
    ):
        with pytest.raises(InputError, match=name):
            open_workdir(tmp_path / "w", config, other, create=True)
    assert listing(tmp_path) == before


def test_vectors_belong_to_the_folder(tmp_path, config):
    data = tiny_data()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, vectors="vectors.parquet", tokenizer="id"))
    content = Vectors(np.ones((data.catalogue.items, 3), np.float32), "a1", ("read",), np.zeros(3), np.eye(3))
    data = dataclasses.replace(data, content=content)
    open_workdir(tmp_path / "w", config, data, create=True)
    before = listing(tmp_path)
    assert {"w/vectors.npy", "w/vectors.npz"} <= before.keys()
    open_workdir(tmp_path / "w", config, data, create=True)
    assert listing(tmp_path) == before
    with pytest.raises(InputError, match=r"was made from other vectors: its vectors_sha256 is a1, not b2$"):
        open_workdir(tmp_path / "w", config, dataclasses.replace(data, content=dataclasses.replace(content, sha256="b2")), create=True)
    ids = Catalogue(np.arange(data.catalogue.items, dtype=np.int32), np.append(np.arange(9), [8, 8]), 8, 0, "")
    open_workdir(tmp_path / "ids", config, dataclasses.replace(data, catalogue=ids), create=True)
    stored = read_stored(tmp_path / "ids", config.data)
    np.testing.assert_array_equal(stored.vectors, content.of_items)
    assert read_stored(tmp_path / "ids", dataclasses.replace(config.data, vectors="")).vectors is None
    dataclasses.replace(content, sha256="b2").save(tmp_path / "ids")
    with pytest.raises(InputError, match=r"vectors\.npy and vectors\.npz do not match data\.json, whose vectors_sha256 is a1$"):
        read_stored(tmp_path / "ids", config.data)
    (tmp_path / "ids" / "vectors.npz").unlink()
    with pytest.raises(InputError, match=r"vectors\.npy or vectors\.npz cannot be read: No such file"):
        read_stored(tmp_path / "ids", config.data)


def test_other_folders_are_refused(tmp_path, config):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "data.json").write_text("{}")  # killed before the config was written, so it starts again
    before = listing(tmp_path)
    for name, message in (("file", "not a folder"), ("full", "not empty"), ("file/below", "cannot be written")):
        with pytest.raises(InputError, match=message):
            check_workdir(tmp_path / name, config)
    check_workdir(tmp_path / "begun", config)
    assert listing(tmp_path) == before

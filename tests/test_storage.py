"""Working folders on object storage: whole commands with emulators of S3 and Google Cloud Storage, if the extra `emulators` is installed,
and the code for small files with a store in memory."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import orbax.checkpoint as ocp
import polars as pl
import pytest
from forks import python
from fsspec.implementations.memory import MemoryFileSystem
from helpers import make_config, metrics_lines, tiny_data

from iam_jax.config import LogConfig, get_config
from iam_jax.data.stored import read_stored
from iam_jax.errors import InputError
from iam_jax.runs.logs import MetricsLog
from iam_jax.runs.workdir import check_workdir, lock_workdir, open_workdir
from iam_jax.storage import remote as storage
from iam_jax.storage.files import to_path, write_atomically
from iam_jax.training.telemetry import Profile

# ---- with a store in memory


class Store(MemoryFileSystem):
    """Objects by name for gs://. As there, a folder exists if it contains objects."""

    store, pseudo_dirs, protocol = {}, [""], ("gs", "gcs")

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").removeprefix("gcs://").strip("/")


@pytest.fixture
def bucket(monkeypatch):
    for name in Store.protocol:
        fsspec.register_implementation(name, Store, clobber=True)
    monkeypatch.setattr(storage, "_CLIENTS", {"gs": ("fsspec", "gcs")})
    monkeypatch.setattr(storage, "check_writable", lambda folder: None)  # TensorStore's client cannot use this store
    storage.remote_folder.cache_clear()
    Store.store.clear()
    return "gs://bucket"


def objects():
    return {name: data.getvalue() for name, data in Store.store.items()}


def test_local_paths_are_pathlib_paths():
    for name in ("runs/a", "/runs/a", "~/a", "gs:/bucket", "a/gs://b", Path("a")):
        assert type(to_path(name)) is type(Path(name)) and to_path(name) == Path(name) and not storage.is_remote(to_path(name))


def test_other_storage_and_missing_clients_are_refused(monkeypatch):
    storage.remote_folder.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, message in {
        "az://bucket/run": "az://bucket/run: only gs:// and s3:// are supported as object storage",
        "gs://": "gs://: the bucket name is missing",
        "s3:///run": "s3:///run: the bucket name is missing",
        "gs://bucket/run": "gs://bucket/run: gs:// needs gcsfs, which the extra 'gcs' installs: pip install 'iam_jax[gcs]'",
        "s3://bucket/run": "s3://bucket/run: s3:// needs s3fs, which the extra 's3' installs: pip install 'iam_jax[s3]'",
    }.items():
        with pytest.raises(InputError) as error:
            to_path(name)
        assert str(error.value) == message


def test_errors_of_the_storage_are_one_line(bucket, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no access:\n  to this bucket")

    folder = to_path(f"{bucket}/run")
    with monkeypatch.context() as patch:
        patch.setattr(Store, "pipe_file", refuse)
        with pytest.raises(InputError, match=r"^gs://bucket/run/run\.json: cannot be written \(no access: to this bucket\)$"):
            write_atomically(folder / "run.json", lambda path: path.write_text("{}"))
    with monkeypatch.context() as patch:
        patch.setattr(Store, "info", refuse)
        with pytest.raises(InputError, match=r"^gs://bucket/other: cannot be read \(no access: to this bucket\)$"):
            to_path(f"{bucket}/other")
        patch.setattr(Store, "info", lambda *_, **__: time.sleep(60))
        patch.setattr(storage, "_TIMEOUT", 0.1)
        with pytest.raises(InputError, match=r"cannot be read \(no answer within 0.1 seconds\)$"):
            to_path(f"{bucket}/other")
    assert objects() == {}


def test_a_profile(bucket):
    profile = Profile(to_path(f"{bucket}/run"), "0:1")
    profile.turn()
    profile.close()
    (trace,) = [name for name in objects() if name.endswith(".xplane.pb")]
    assert trace.startswith("/bucket/run/profile/process-0/") and objects()[trace]


def test_a_working_folder_equals_that_on_a_disk(bucket, tmp_path):
    config, data, workdir = make_config(), tiny_data(), to_path(f"{bucket}/runs/a")
    with lock_workdir(workdir):
        open_workdir(workdir, config, data, create=False)
        assert objects() == {}
        open_workdir(workdir, config, data, create=True)
    open_workdir(tmp_path, config, data, create=True)
    before = objects()
    assert before == {f"/bucket/runs/a/{path.name}": path.read_bytes() for path in tmp_path.iterdir()}
    open_workdir(workdir, config, data, create=True)  # the same run continues
    assert get_config(f"{bucket}/runs/a") == get_config(str(tmp_path))
    assert read_stored(workdir, make_config(data={"tokenizer": "id"}).data).known == 8
    with pytest.raises(InputError, match=r"gs://bucket/runs/a belongs to a run with another config: model\.dropout"):
        check_workdir(workdir, make_config(model={"dropout": 0.25}))
    with pytest.raises(InputError, match="gs://bucket/runs is not empty and holds no config"):
        check_workdir(to_path(f"{bucket}/runs"), config)
    with pytest.raises(InputError, match=r"config\.json is not a folder"):
        check_workdir(to_path(f"{bucket}/runs/a/config.json"), config)
    assert objects() == before


def test_metrics_after_an_interruption_equal_an_uninterrupted_run(bucket, monkeypatch):
    workdir, name = to_path(f"{bucket}/run"), "/bucket/run/metrics.jsonl"
    log = MetricsLog(workdir, 0, LogConfig())
    for step in (2, 4):
        log.write(step, {"item_loss": 1 / step})
    assert objects() == {}  # lines are not uploaded one by one
    log.upload()
    log.write(6, {"item_loss": 1.0})
    uploaded = objects()
    assert [json.loads(line)["step"] for line in uploaded[name].splitlines()] == [2, 4]
    events = [path for path in uploaded if path.startswith("/bucket/run/tensorboard/")]
    assert len(uploaded) == 2 and len(events) == 1 and b"item_loss" in uploaded[events[0]]
    # Killed here, and resumed from step 2.
    log = MetricsLog(workdir, 2, LogConfig(tensorboard=False))
    log.write(4, {"item_loss": 9.0})
    log.close()
    assert [json.loads(line) for line in objects()[name].splitlines()] == [{"step": 2, "item_loss": 0.5}, {"step": 4, "item_loss": 9.0}]


def test_metrics_are_uploaded_at_intervals(bucket, monkeypatch, capsys):
    log = MetricsLog(to_path(f"{bucket}/run"), 0, LogConfig(tensorboard=False))
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 31)

    def refuse(*_, **__):
        raise RuntimeError("busy")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "pipe_file", refuse)
        log.write(2, {"item_loss": 0.5})  # the error does not end the run
        assert capsys.readouterr().out == "gs://bucket/run/metrics.jsonl: not uploaded yet (busy)\n"
        with pytest.raises(InputError, match=r"^gs://bucket/run/metrics\.jsonl: cannot be read or written \(busy\)$"):
            log.upload()
    log.write(4, {"item_loss": 0.25})
    assert objects() == {}
    monkeypatch.setattr(time, "monotonic", lambda: now + 62)
    log.write(6, {"item_loss": 0.25})
    assert len(objects()["/bucket/run/metrics.jsonl"].splitlines()) == 3


def test_specs_for_tensorstore(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)
    assert storage.kvstore("gs://bucket/a/b") == {"driver": "gcs", "bucket": "bucket", "path": "a/b"}
    assert storage.kvstore("s3://bucket") == {"driver": "s3", "bucket": "bucket", "path": ""}
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:9")
    assert storage.kvstore("s3://bucket/a") == {
        "driver": "s3", "bucket": "bucket", "path": "a", "endpoint": "http://localhost:9", "aws_region": "eu-west-1",
    }  # fmt: skip


# ---- with emulators

SETTINGS = {
    "AWS_ACCESS_KEY_ID": "a",
    "AWS_SECRET_ACCESS_KEY": "b",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # the emulator has no gRPC
}
TABLE = """from iam_jax.config import default_config


def get_config():
    config = default_config()
"""


def serve(*command):
    """Starts a server; returns the process and its address."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, *(str(port) if part == "PORT" else part for part in command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 60
    while True:
        assert process.poll() is None and time.monotonic() < end
        with socket.socket() as found:
            if not found.connect_ex(("127.0.0.1", port)):
                return process, f"http://127.0.0.1:{port}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def clients():
    """{scheme: client of its emulator}, and the environment with which commands use the emulators."""
    missing = [name for name in ("moto", "s3fs", "gcsfs", "gcp_storage_emulator") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"the extra emulators is not installed: no {', '.join(missing)}")
    os.environ |= {name: value for name, value in SETTINGS.items() if name.startswith("GCSFS_")}  # also for the client of this process
    import gcsfs
    import s3fs

    processes = []
    try:
        s3, url = serve("-m", "moto.server", "-H", "127.0.0.1", "-p", "PORT")
        processes.append(s3)
        amazon = s3fs.S3FileSystem(key="a", secret="b", endpoint_url=url, use_listings_cache=False)
        amazon.mkdir("bucket")
        google, address = serve(str(Path(__file__).parent / "gcs_emulator.py"), "PORT", "bucket")
        processes.append(google)
        env = SETTINGS | {"AWS_ENDPOINT_URL": url, "STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
        yield {"s3": amazon, "gs": gcsfs.GCSFileSystem(endpoint_url=address, token="anon", use_listings_cache=False)}, env
    finally:
        for process in processes:
            process.kill()


def start(folder, env, *arguments):
    command = [python(), "-m", "iam_jax.main", *arguments]
    return subprocess.Popen(command, cwd=folder, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(folder, env, *arguments, code=0):
    process = start(folder, env, *arguments)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, (out, err)
    return out, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    """A shop, the config of a run, and this run on a local disk."""
    folder = tmp_path_factory.mktemp("storage")
    (folder / "items.csv").write_text("item,title\n" + "".join(f"i{n},{'red blue old'.split()[n % 3]} thing {n}\n" for n in range(12)))
    events = "".join(f"u{u},i{(7 * u + t * (t + u)) % 12},{t}\n" for u in range(40) for t in range(6))
    (folder / "interactions.csv").write_text(f"user,item,timestamp\n{events}")
    fields = {name: value for name, value in tiny.items() if not name.startswith("data.synthetic")} | {
        "data.source": "table", "data.path": ".", "train.steps": 300, "train.eval_every": 300, "train.save_every": 100, "log.every": 5,
    }  # fmt: skip
    (folder / "run.py").write_text(
        TABLE + "".join(f"    config.{name} = {value!r}\n" for name, value in fields.items()) + "    return config\n"
    )
    run(folder, {}, "--config=run.py", "--workdir=whole")
    return folder


def fetched(client, url, to):
    """Downloads the folder of a URL."""
    place = url.partition("://")[2]
    for name in client.find(place):
        path = to / name.removeprefix(place).strip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(client.cat_file(name))
    return to


def trained(workdir):
    return [ocp.StandardCheckpointer().restore(workdir / "checkpoints" / "300" / item) for item in ("params", "rest")]


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_stopped_and_resumed_run_equals_the_run_on_a_disk(folder, clients, tmp_path, scheme):
    client, env, url = clients[0][scheme], clients[1], f"{scheme}://bucket/runs/a"

    def saved():
        return sorted(int(name.split("/")[-2]) for name in client.glob("bucket/runs/a/checkpoints/*/commit_success.txt"))

    process = start(folder, env, "--config=run.py", f"--workdir={url}")
    end = time.monotonic() + 300
    while not saved():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 75 and err.endswith("stopped; run the same command again to continue\n"), (out, err)
    *_, before, last = saved()
    assert 0 < before < last < 300
    client.rm_file(f"bucket/runs/a/checkpoints/{last}/commit_success.txt")  # as after a kill during a save
    out, _ = run(folder, env, "--config=run.py", f"--workdir={url}")
    assert f"continuing from step {before}\n" in out and f"wrote {url}/evaluation.json" in out

    here, whole = fetched(client, url, tmp_path / "here"), folder / "whole"
    for name in ("config.json", "data.json", "items.parquet", "evaluation.json", "ranks.parquet", "baselines.parquet"):
        assert (here / name).read_bytes() == (whole / name).read_bytes(), name
    assert metrics_lines(here) == metrics_lines(whole)
    for ours, theirs in zip(trained(here), trained(whole), strict=True):
        ours, theirs = (dict(sorted(_flat(tree))) for tree in (ours, theirs))
        assert ours.keys() == theirs.keys() and ours
        for name, value in ours.items():
            np.testing.assert_array_equal(value, theirs[name], name)
    left = {path.name for path in here.iterdir()}
    assert left == {path.name for path in whole.iterdir()} - {".lock"}
    assert len(list((here / "tensorboard").iterdir())) == 2  # one file per command


def _flat(tree, name=""):
    if isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _flat(value, f"{name}.{key}")
    elif tree is not None:
        yield name, np.asarray(tree)


def test_evaluation_scores_and_comparison_read_and_write_there(folder, clients, tmp_path):
    both, env = clients
    if not all(client.exists("bucket/runs/a/evaluation.json") for client in both.values()):
        pytest.skip("the runs above are not there")
    before = both["gs"].cat_file("bucket/runs/a/ranks.parquet")
    both["gs"].rm_file("bucket/runs/a/ranks.parquet")
    run(folder, env, "--mode=evaluate", "--workdir=gs://bucket/runs/a")
    assert both["gs"].cat_file("bucket/runs/a/ranks.parquet") == before

    scoring = ("--mode=score", "--workdir=s3://bucket/runs/a", "--users=interactions.csv", "--top_k=5", "--config.score.part_users=25")
    out, _ = run(folder, env, *scoring, "--output=s3://bucket/lists")
    assert "wrote s3://bucket/lists" in out
    lists = fetched(both["s3"], "s3://bucket/lists", tmp_path / "lists")
    assert {path.name for path in lists.iterdir()} == {"part-00000-of-00002.parquet", "part-00001-of-00002.parquet", "request.json"}
    frame = pl.concat(pl.read_parquet(path) for path in sorted(lists.glob("*.parquet")))
    assert frame["user"].n_unique() == 40 and frame["rank"].to_list()[:5] == [1, 2, 3, 4, 5]
    _, err = run(folder, env, *scoring, "--output=s3://bucket/runs", code=2)
    assert err == "error: --output=s3://bucket/runs is not empty and has no request.json: not a folder of scores\n"

    run(folder, env, "--mode=compare", "--runs=whole,s3://bucket/runs/a,gs://bucket/runs/a", "--output=gs://bucket/table")
    table = json.loads(both["gs"].cat_file("bucket/table/comparison.json"))
    assert set(table["runs"]) == {"/".join((folder / "whole").parts[-4:]), "s3/bucket/runs/a", "gs/bucket/runs/a"}
    assert all(value == 0 for name, value in table["difference"]["test"]["gs/bucket/runs/a"].items() if "@" in name and "_ci" not in name)


@pytest.mark.parametrize(
    ("url", "env", "named"),
    [
        ("s3://nowhere/run", {}, "cannot be written to (not found: The specified bucket does not exist)"),
        ("gs://nowhere/run", {}, "cannot be written to (not found: "),
        ("s3://bucket/run", {"AWS_ACCESS_KEY_ID": None, "AWS_CONFIG_FILE": "none"}, "cannot be read (Unable to locate credentials)"),
    ],
)
def test_unusable_storage_is_reported_before_the_data_are_read(folder, clients, url, env, named, monkeypatch):
    given = {name: value for name, value in (clients[1] | env).items() if value is not None}
    for name in env.keys() - given.keys():
        monkeypatch.delenv(name, raising=False)
    out, err = run(folder, given, "--config=run.py", f"--workdir={url}", code=2)
    assert out == "" and err.startswith(f"error: {url}: {named}") and err.count("\n") == 1

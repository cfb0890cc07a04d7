"""Folders on object storage, gs://bucket/… and s3://bucket/…: what they need, whether they can be written to, and what they lack.

Small files go through etils.epath and fsspec (the extras `gcs` and `s3`), arrays through Orbax and TensorStore: two clients, which find
credentials each by itself. An object is put whole or not at all; none can be appended to, and there is no lock.
"""

import contextlib
import errno
import functools
import importlib.util
import logging
import os
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from iam_jax.errors import InputError

_CLIENTS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # fsspec's implementation, and the extra that installs it
_PATIENCE, _ARRAYS_PATIENCE = 60, 20  # seconds; fsspec's clients give up in between, TensorStore would try for many minutes


def is_remote(path: str | os.PathLike) -> bool:
    return os.fspath(path).startswith(("gs://", "s3://"))


@functools.cache
def remote_folder(name: str) -> Path:
    """An epath.Path, which has pathlib's methods. Raises InputError for other storage, without a bucket or the client, and, before long,
    where the storage cannot be asked. A folder that is not there is not wrong here."""
    scheme, _, place = name.partition("://")
    if scheme not in _CLIENTS:
        raise InputError(f"{name}: of object storage gs:// and s3:// are known")
    if not place.split("/")[0]:
        raise InputError(f"{name}: the bucket's name is missing")
    module, extra = _CLIENTS[scheme]
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{name}: {scheme}:// needs {module}, which the extra {extra!r} installs: pip install 'iam_jax[{extra}]'")
    os.environ.setdefault("EPATH_USE_TF", "false")  # epath would prefer TensorFlow's client where that is installed
    import fsspec
    from etils import epath

    # A listing that is kept would not show what TensorStore, or another process, has written since.
    fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it tells of every request that it cannot find out the bucket's kind
    folder = epath.Path(name)

    def ask() -> None:
        with contextlib.suppress(FileNotFoundError):
            _client(folder).info(name)

    _within_patience(folder, "cannot be read", ask)
    return folder


def put(path: Path, data: bytes) -> None:
    """Raises OSError, with a `strerror` of one line, where it is not there afterwards."""
    with _as_os_error(path):
        _client(path).pipe_file(str(path), data)  # not path.write_bytes: a file that is closed while Stop is raised is put in part


@functools.cache
def check_writable(folder: Path) -> None:
    """Raises InputError, before long, where one of the two clients cannot write there, or they mean different places: an object is put by
    both, then read and removed."""

    def ask() -> None:
        import tensorstore

        probe, token, client = f"{folder}/.writable-{uuid.uuid4().hex}", uuid.uuid4().bytes, _client(folder)
        client.pipe_file(probe, b"")  # its errors are the clearer ones
        try:
            store = tensorstore.KvStore.open(kvstore(probe)).result(timeout=_ARRAYS_PATIENCE)
            store.write("", token).result(timeout=_ARRAYS_PATIENCE)
        except TimeoutError as error:
            client.rm_file(probe)
            raise OSError(errno.ETIMEDOUT, f"TensorStore's client had no answer within {_ARRAYS_PATIENCE} seconds") from error
        if client.cat_file(probe) != token:
            raise OSError(errno.EIO, "what was written there is read otherwise")
        client.rm_file(probe)

    _within_patience(folder, "cannot be written to", ask)


class Mirror:
    """A local folder for files that grow, put whole to a folder on object storage by `upload`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._kept = tempfile.TemporaryDirectory(prefix="iam_jax-", ignore_cleanup_errors=True)
        self.local = Path(self._kept.name)
        self._sizes: dict[Path, int] = {}  # what is there
        self._last = time.monotonic()

    def fetch(self, name: str) -> None:
        if (self.folder / name).exists():
            (self.local / name).write_bytes((self.folder / name).read_bytes())

    def upload(self, at_most_every: float = 0) -> None:
        """Puts the files that have grown, unless the last upload is less than so many seconds ago. Raises OSError."""
        if time.monotonic() - self._last < at_most_every:
            return
        self._last = time.monotonic()
        for path in sorted(path for path in self.local.rglob("*") if path.is_file()):
            data = path.read_bytes()
            if self._sizes.get(path) != len(data):
                put(self.folder / path.relative_to(self.local).as_posix(), data)
                self._sizes[path] = len(data)

    def close(self) -> None:
        self.upload()
        self._kept.cleanup()


def kvstore(url: str) -> dict:
    """TensorStore's spec of what begins with a URL. The environment variables are those that fsspec's clients read."""
    scheme, _, place = url.partition("://")
    bucket, _, path = place.partition("/")
    spec: dict = {"driver": {"gs": "gcs", "s3": "s3"}[scheme], "bucket": bucket, "path": path}
    if scheme == "s3":
        given = {
            "endpoint": os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
            "aws_region": os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
            # Else it looks for profiles first, and tells on stderr of every file that is not there.
            "aws_credentials": {"type": "environment"} if "AWS_ACCESS_KEY_ID" in os.environ else None,
        }
        spec |= {name: value for name, value in given.items() if value}
    return spec


def patch_orbax_for_s3(folder: Path) -> Path:
    """Returns the folder, ready for Orbax's checkpoints.

    Orbax 0.12 makes TensorStore's specs of gs:// and of local paths, though TensorStore has a client for S3; and it takes a rename for
    atomic, which on S3 is a copy of one object after the other. So s3:// is sent the way of gs://, where a checkpoint is complete once a
    last object says so. Raises InputError where an Orbax of another build has no such way.
    """
    if not str(folder).startswith("s3://"):
        return folder
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    needed = {gcs_utils: ("_GCS_PATH_PREFIX", "get_kvstore_for_gcs"), tensorstore_utils: ("_normalize_path", "_use_gcs_driver")}
    if any(not hasattr(module, name) for module, names in needed.items() for name in names):
        raise InputError(f"{folder}: s3:// needs another version of Orbax: pip install 'iam_jax[s3]'")
    if gcs_utils._GCS_PATH_PREFIX == ("gs://",):
        gcs_utils._GCS_PATH_PREFIX = ("gs://", "s3://")
        gcs_utils.get_kvstore_for_gcs = _s3_or(gcs_utils.get_kvstore_for_gcs)
        tensorstore_utils._normalize_path = _normalized
        tensorstore_utils._use_gcs_driver = is_remote
    return folder


def _s3_or(otherwise: Callable[[str], dict]) -> Callable[[str], dict]:
    return lambda url: kvstore(url) if url.startswith("s3://") else otherwise(url)


def _normalized(path: str) -> str:
    scheme, remote, place = path.partition("://")
    return f"{scheme}://{os.path.normpath(place)}" if remote else os.path.normpath(path)


def _client(path: Path):
    """fsspec's file system; it is made once."""
    import fsspec

    return fsspec.core.url_to_fs(str(path))[0]


@contextlib.contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """Few errors of the clients are OSErrors, and few of those tell their `strerror`."""
    try:
        yield
    except Exception as error:
        raise OSError(errno.EIO, _reason(error), str(path)) from error


def _reason(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", getattr(error, "strerror", None) or str(error)).strip()[:300] or type(error).__name__
    return f"not found: {text}" if isinstance(error, FileNotFoundError) else text


def _within_patience(folder: Path, what: str, ask: Callable[[], None]) -> None:
    errors: list[BaseException] = [TimeoutError(f"no answer within {_PATIENCE} seconds")]

    def asking() -> None:
        try:
            ask()
            errors.clear()
        except BaseException as error:
            errors[:] = [error]

    thread = threading.Thread(target=asking, daemon=True)  # that cannot be stopped, but is not waited for
    thread.start()
    thread.join(_PATIENCE)
    if errors:
        raise InputError(f"{folder}: {what} ({_reason(errors[0])})") from errors[0]

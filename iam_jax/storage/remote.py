"""Folders on object storage (gs://bucket/… and s3://bucket/…): clients, checks, uploads, and a patch of Orbax for S3.

Small files go through etils.epath and fsspec (extras `gcs` and `s3`), arrays through Orbax and TensorStore. These are two clients, and each
finds credentials by itself. An object is written completely or not at all. Objects cannot be appended to, and there are no locks.
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
from typing import Any

from iam_jax.errors import InputError

_CLIENTS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme: (client of fsspec, extra that installs it)
_TIMEOUT, _ARRAYS_TIMEOUT = 60, 20  # seconds; fsspec's clients give up within a minute, TensorStore would retry for many minutes


def is_remote(path: str | os.PathLike) -> bool:
    return os.fspath(path).startswith(("gs://", "s3://"))


@functools.cache
def remote_folder(name: str) -> Path:
    """Returns the folder as an epath.Path, which has the methods of pathlib.Path. The folder need not exist.

    Raises InputError if the scheme is not gs:// or s3://, if the bucket or the client is missing, and (within a minute) if the storage
    cannot be read.
    """
    scheme, _, place = name.partition("://")
    if scheme not in _CLIENTS:
        raise InputError(f"{name}: only gs:// and s3:// are supported as object storage")
    if not place.split("/")[0]:
        raise InputError(f"{name}: the bucket name is missing")
    module, extra = _CLIENTS[scheme]
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{name}: {scheme}:// needs {module}, which the extra {extra!r} installs: pip install 'iam_jax[{extra}]'")
    os.environ.setdefault("EPATH_USE_TF", "false")  # epath prefers TensorFlow's client if it is installed
    import fsspec.config
    from etils import epath

    # A cached listing would not show objects that TensorStore or another process has written since.
    fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it warns at every request that it cannot determine the type of the bucket
    folder: Any = epath.Path(name)  # its methods are pathlib's

    def probe() -> None:
        with contextlib.suppress(FileNotFoundError):
            _client(folder).info(name)

    _within_timeout(folder, "cannot be read", probe)
    return folder


def put(path: Path, data: bytes) -> None:
    """Writes an object. Raises OSError, with a `strerror` of one line, if that fails."""
    with _as_os_error(path):
        # Not path.write_bytes: if Stop is raised meanwhile, closing the file would upload a part of it.
        _client(path).pipe_file(str(path), data)


@functools.cache
def check_writable(folder: Path) -> None:
    """Raises InputError, within a minute, if one of the two clients cannot write to the folder or if they write to different places.

    Both clients write to the same object, which is then read and removed.
    """

    def probe() -> None:
        import tensorstore

        name, token, client = f"{folder}/.writable-{uuid.uuid4().hex}", uuid.uuid4().bytes, _client(folder)
        client.pipe_file(name, b"")  # first, because its errors are clearer
        try:
            store = tensorstore.KvStore.open(kvstore(name)).result(timeout=_ARRAYS_TIMEOUT)
            store.write("", token).result(timeout=_ARRAYS_TIMEOUT)
        except TimeoutError as error:
            client.rm_file(name)
            raise OSError(errno.ETIMEDOUT, f"TensorStore's client got no answer within {_ARRAYS_TIMEOUT} seconds") from error
        if client.cat_file(name) != token:
            raise OSError(errno.EIO, "the two clients do not read the same object")
        client.rm_file(name)

    _within_timeout(folder, "cannot be written to", probe)


class Mirror:
    """A local folder for files that grow. `upload` copies them, each completely, to a folder on object storage."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._temporary = tempfile.TemporaryDirectory(prefix="iam_jax-", ignore_cleanup_errors=True)
        self.local = Path(self._temporary.name)
        self._sizes: dict[Path, int] = {}  # of the uploaded files
        self._last = time.monotonic()

    def fetch(self, name: str) -> None:
        """Copies a file from object storage to the local folder, if it exists."""
        if (self.folder / name).exists():
            (self.local / name).write_bytes((self.folder / name).read_bytes())

    def upload(self, at_most_every: float = 0) -> None:
        """Uploads the files that have grown, unless the last upload was less than `at_most_every` seconds ago. Raises OSError."""
        if time.monotonic() - self._last < at_most_every:
            return
        self._last = time.monotonic()
        for path in sorted(path for path in self.local.rglob("*") if path.is_file()):
            data = path.read_bytes()
            if self._sizes.get(path) != len(data):
                put(self.folder / path.relative_to(self.local).as_posix(), data)
                self._sizes[path] = len(data)

    def close(self) -> None:
        """Uploads the rest and removes the local folder."""
        self.upload()
        self._temporary.cleanup()


def kvstore(url: str) -> dict:
    """Returns TensorStore's KvStore spec for a URL. It reads the same environment variables as the clients of fsspec."""
    scheme, _, place = url.partition("://")
    bucket, _, path = place.partition("/")
    spec: dict = {"driver": {"gs": "gcs", "s3": "s3"}[scheme], "bucket": bucket, "path": path}
    if scheme == "s3":
        given = {
            "endpoint": os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
            "aws_region": os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
            # Otherwise TensorStore looks for profiles first and prints every missing file on stderr.
            "aws_credentials": {"type": "environment"} if "AWS_ACCESS_KEY_ID" in os.environ else None,
        }
        spec |= {name: value for name, value in given.items() if value}
    return spec


def patch_orbax_for_s3(folder: Path) -> Path:
    """Patches Orbax so that it can keep checkpoints on s3://, if the folder is there, and returns the folder.

    Orbax 0.12 makes TensorStore specs only for gs:// and local paths, although TensorStore has an S3 client. It also treats a rename as
    atomic, but on S3 a rename copies one object after another. The patch makes Orbax treat s3:// like gs://, where a last object marks a
    checkpoint as complete. Raises InputError if the installed version of Orbax is built differently.
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
    """Returns fsspec's file system for the path. fsspec caches it."""
    import fsspec

    return fsspec.core.url_to_fs(str(path))[0]


@contextlib.contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """Turns errors of the clients into OSErrors with a `strerror`. Few of them are OSErrors, and few of those have a `strerror`."""
    try:
        yield
    except Exception as error:
        raise OSError(errno.EIO, _reason(error), str(path)) from error


def _reason(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", getattr(error, "strerror", None) or str(error)).strip()[:300] or type(error).__name__
    return f"not found: {text}" if isinstance(error, FileNotFoundError) else text


def _within_timeout(folder: Path, problem: str, probe: Callable[[], None]) -> None:
    """Calls probe, and raises InputError if it raises or takes too long. problem: for the message, for instance "cannot be read"."""
    errors: list[BaseException] = [TimeoutError(f"no answer within {_TIMEOUT} seconds")]

    def run_probe() -> None:
        try:
            probe()
            errors.clear()
        except BaseException as error:
            errors[:] = [error]

    thread = threading.Thread(target=run_probe, daemon=True)  # it cannot be stopped; as a daemon it does not delay the exit
    thread.start()
    thread.join(_TIMEOUT)
    if errors:
        raise InputError(f"{folder}: {problem} ({_reason(errors[0])})") from errors[0]

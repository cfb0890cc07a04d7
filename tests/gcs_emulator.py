"""The emulator of Google Cloud Storage on PyPI, with two additions that TensorStore needs: a read returns the generation of the object, and
a write that is conditional on a generation is refused if the object has another one.

    python gcs_emulator.py PORT BUCKET
"""

import http.server
import sys
import threading
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import Router, create_server

LOCK = threading.Lock()


def generation(storage, bucket, name):
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def download(request, response, storage, *args, plain=objects.download, **kwargs):
    plain(request, response, storage, *args, **kwargs)
    response["X-Goog-Generation"] = generation(storage, request.params["bucket_name"], request.params["object_id"])


def upload(request, response, storage, plain=objects._media_upload):
    wanted = request.query.get("ifGenerationMatch")
    if wanted and wanted[0] != generation(storage, request.params["bucket_name"], request.query["name"][0]):
        request.data  # noqa: B018  # read, so that the connection can be used
        response.status = HTTPStatus.PRECONDITION_FAILED
    else:
        plain(request, response, storage)


def handle(router, method, plain=Router.handle):
    with LOCK:
        plain(router, method)


if __name__ == "__main__":
    http.server.HTTPServer = http.server.ThreadingHTTPServer  # an idle connection would block all others
    Router.handle = handle
    objects.download, objects._media_upload = download, upload
    create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket=sys.argv[2]).run()

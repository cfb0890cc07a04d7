"""Commands of the program as `python -m iam_jax.main` runs them, each in a process forked from one that has imported the libraries.

`run` is for tests; run as a program, this file is the process that forks. A job is a line of JSON on stdin: {"folder": working directory,
"arguments": [...], "env": {...}, "kill": ...}, answered by a line with its exit code (-9: killed), stdout and stderr. kill: null;
["batch", n, seconds]: so long after batch n was asked for; ["save", n, moment]: in a save, "before" or "after" the n-th folder takes its
name, or while the n-th older checkpoint is "deleted".
"""

import atexit
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

TESTS = Path(__file__).parent
SECONDS = 300  # a job that takes longer is ended by SIGALRM


def run(folder, *arguments, code=0, kill=None, **env):
    """stdout and stderr of a command in a folder. kill: see above; then the command may be done before. env: what the libraries do not
    read when they are imported."""
    process = _server()
    process.stdin.write(json.dumps({"folder": str(folder), "arguments": arguments, "env": env, "kill": kill}) + "\n")
    process.stdin.flush()
    status, out, err = json.loads(process.stdout.readline())
    assert status in ((-signal.SIGKILL, 0) if kill else (code,)), (status, out, err)
    return out, err


@functools.cache
def _server() -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen([sys.executable, __file__], env=env, **pipes)
    atexit.register(process.wait)
    atexit.register(process.stdin.close)  # first
    return process


# ---- the process that forks


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_batch(number, seconds):
    from iam_jax.training import loop

    batches = loop.training_batches

    def counted(rows, batch_rows, seed, start, *rest, **more):
        for at, batch in enumerate(batches(rows, batch_rows, seed, start, *rest, **more), start):
            if at == number:
                timer = threading.Timer(seconds, die)
                timer.daemon = True
                timer.start()
            yield batch

    loop.training_batches = counted


def die_in_save(number, moment):
    from orbax.checkpoint._src.path import atomicity, deleter

    deleting = moment == "deleted"
    owner, name = (deleter.StandardCheckpointDeleter, "delete") if deleting else (atomicity.AtomicRenameTemporaryPath, "finalize")
    real, calls = getattr(owner, name), []

    def delete(self, *args):
        calls.append(0)
        if len(calls) == number:
            threading.Timer(0.002, die).start()  # some of its files are gone then, or all, or none
        return real(self, *args)

    async def finalize(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == number and moment == "before":
            die()
        time.sleep(0.05)  # training goes on meanwhile
        await real(self, *args, **kwargs)
        if len(calls) == number:
            die()

    setattr(owner, name, delete if deleting else finalize)


def child(job, out, err):
    signal.alarm(SECONDS)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    os.chdir(job["folder"])
    sys.path.insert(0, job["folder"])
    os.environ.update(job["env"])
    sys.dont_write_bytecode |= bool(job["env"].get("PYTHONDONTWRITEBYTECODE"))
    if job["kill"]:
        kind, *how = job["kill"]
        {"batch": die_at_batch, "save": die_in_save}[kind](*how)
    sys.argv[1:] = job["arguments"]
    code = 0
    try:
        runpy.run_module("iam_jax.main", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve():
    sys.path.remove(str(TESTS))
    import tensorboardX

    import iam_jax.api
    import iam_jax.runs.compare
    import iam_jax.serving.offline
    import iam_jax.training.loop  # noqa: F401

    assert tensorboardX

    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            if (process := os.fork()) == 0:
                child(json.loads(line), out, err)
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            out.seek(0)
            err.seek(0)
            print(json.dumps([status, out.read(), err.read()]), flush=True)


if __name__ == "__main__":
    serve()

"""Runs commands of the program, each in a process forked from this one, which has its imports done; some are killed on the way.

A job is a line of JSON on stdin: {"folder": working directory, "arguments": [...], "env": {...}, "kill": ...}, answered by a line with its
exit code (-9: killed), stdout and stderr. kill: null; ["batch", n, seconds]: so long after batch n was asked for; ["save", n, moment]: in
a save, "before" or "after" the n-th folder takes its name, or while the n-th older checkpoint is "deleted".
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time

from absl import app
from orbax.checkpoint._src.path import atomicity, deleter

from iam_jax import main
from iam_jax.ranking import evaluate
from iam_jax.training import loop as train


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_batch(number, seconds):
    batches = train.training_batches

    def counted(rows, batch_rows, seed, start, *rest, **more):
        for at, batch in enumerate(batches(rows, batch_rows, seed, start, *rest, **more), start):
            if at == number:
                timer = threading.Timer(seconds, die)
                timer.daemon = True
                timer.start()
            yield batch

    train.training_batches = counted


def die_in_save(number, moment):
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
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    os.chdir(job["folder"])
    os.environ.update(job["env"])
    if job["kill"]:
        kind, *how = job["kill"]
        {"batch": die_at_batch, "save": die_in_save}[kind](*how)
    sys.argv[:] = ["iam_jax.main", *job["arguments"]]  # ml_collections looks there for the config's overrides
    code = 0
    try:
        app.run(main._main, flags_parser=main._parse)
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    assert evaluate  # imported before the forks
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            if (process := os.fork()) == 0:
                child(json.loads(line), out, err)
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            out.seek(0)
            err.seek(0)
            print(json.dumps([status, out.read(), err.read()]), flush=True)

"""A Python whose processes are forked from one that has imported the libraries: it saves the imports, which take longer than most commands.

`python()` returns its path. It is used as sys.executable is: a process has arguments, environment, working directory, output and an exit
code of its own, and gets the signals that are sent to it. Two things differ from a fresh process. Libraries that read the environment when
they are imported have read it before. And the process that is started only passes on signals and the exit code; the one that computes ends
with it.

Run as a program with an address, this file is the process that forks.
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from pathlib import Path
from unittest import mock

TESTS = Path(__file__).parent
SECONDS = 300  # a process that takes longer is ended by SIGALRM
CLIENT = """
import json, os, signal, socket, sys

channel = socket.socket(socket.AF_UNIX)
channel.connect(sys.argv[1])
signal.pthread_sigmask(signal.SIG_BLOCK, forwarded := (signal.SIGINT, signal.SIGTERM))
socket.send_fds(channel, [b"x"], [0, 1, 2])
stream = channel.makefile("rw")
print(json.dumps([sys.argv[2:], os.getcwd(), dict(os.environ)]), file=stream, flush=True)
process = int(stream.readline())
for number in forwarded:
    signal.signal(number, lambda number, _: os.kill(process, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)
code = int(stream.readline())
if code < 0:  # a signal ended it
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def run(folder, *arguments, code=0, kill=None, **env):
    """stdout and stderr of a command of the program in a folder. kill: ["batch", n, seconds]: so long after batch n was asked for; ["save",
    n, moment]: in a save, "before" or "after" the n-th folder takes its name, or while the n-th older checkpoint is "deleted". With it, the
    command may be done before."""
    process = start(folder, *arguments, **env, **({"FORKS_KILL": json.dumps(kill)} if kill else {}))
    out, err = process.communicate()
    assert process.returncode in ((-signal.SIGKILL, 0) if kill else (code,)), (process.returncode, out, err)
    return out, err


def start(folder, *arguments, **env):
    """Starts a command of the program in a folder."""
    command = [python(), "-m", "iam_jax.main", *arguments]
    return subprocess.Popen(command, cwd=folder, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@functools.cache
def python() -> str:
    """The path of the Python that forks, until this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="forks-")
    path, address = f"{folder.name}/python", f"{folder.name}/socket"
    command = [sys.executable, "-IS", f"{folder.name}/client.py", address]
    Path(command[2]).write_text(CLIENT)
    Path(path).write_text(f'#!/bin/sh\nexport FORKS_PYTHON={shlex.quote(path)}\nexec {shlex.join(command)} "$@"\n')
    Path(path).chmod(0o755)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen([sys.executable, __file__, address], env=env, **pipes)
    assert process.stdout.readline() == "ready\n"
    atexit.register(folder.cleanup)
    atexit.register(process.wait)
    atexit.register(process.stdin.close)  # first
    return path


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


def every_process_writes_to_the_cache_of_compiled_programs():
    """On CPUs the programs of a job differ by process, and JAX keeps those of the first one only."""
    from jax._src import compiler, distributed

    write = compiler._cache_write

    def write_as_the_first(*arguments):
        with mock.patch.object(distributed.global_state, "process_id", 0):
            write(*arguments)

    compiler._cache_write = write_as_the_first


def execute(words, folder, env):
    """Runs `python *words` in this process, and ends it. Commands that it starts with sys.executable are forked, too."""
    signal.alarm(SECONDS)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.executable = env["FORKS_PYTHON"]
    sys.dont_write_bytecode |= bool(env.get("PYTHONDONTWRITEBYTECODE"))
    if kill := json.loads(env.get("FORKS_KILL", "null")):
        kind, *how = kill
        {"batch": die_at_batch, "save": die_in_save}[kind](*how)
    every_process_writes_to_the_cache_of_compiled_programs()
    first, *rest = words
    own = {"-m": os.getcwd(), "-c": ""}.get(first, os.path.dirname(os.path.abspath(first)))
    sys.path[:0] = [own, *(path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path)]
    sys.argv[:] = ["-c", *rest[1:]] if first == "-c" else rest if first == "-m" else words
    code = 0
    try:
        if first == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            module = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(rest[0], "<string>", "exec"), module.__dict__)
        else:
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:  # what Python does at its end, without the time to take everything apart
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def answer(channel):
    """Runs the command that a connection asks for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, _, _ = socket.recv_fds(channel, 1, 3)
    stream = channel.makefile("rw")
    command = json.loads(stream.readline())
    if (process := os.fork()) == 0:
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.closerange(3, 256)
        execute(*command)
    for file in files:
        os.close(file)

    def end_with_its_client():
        if not channel.recv(1):
            os.kill(process, signal.SIGKILL)

    print(process, file=stream, flush=True)
    threading.Thread(target=end_with_its_client, daemon=True).start()
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), file=stream, flush=True)


def reap(*_):
    """Waits for the processes that have answered, so that their times are counted."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def serve(address):
    sys.path.remove(str(TESTS))
    import absl.app
    import ml_collections.config_flags
    import pytest
    import tensorboardX

    import iam_jax.api
    import iam_jax.runs.compare
    import iam_jax.serving.offline
    import iam_jax.training.loop

    assert absl.app and ml_collections.config_flags and pytest and tensorboardX and iam_jax.training.loop
    gc.disable()  # the processes are short
    signal.signal(signal.SIGCHLD, reap)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    print("ready", flush=True)
    while sys.stdin not in select.select([listening, sys.stdin], [], [])[0]:  # it is closed when the tests are done
        channel, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            try:
                answer(channel)
            finally:
                os._exit(0)
        channel.close()


if __name__ == "__main__":
    serve(sys.argv[1])

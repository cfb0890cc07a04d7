"""Several processes as one job: joining it, agreeing, and leaving together.

Whatever a process finds out alone (a signal, its clock, its disk, an error) is told to the others before it acts on it: a process that goes
its own way leaves the others waiting for it in a collective. One that dies is missed by its heartbeats, one that hangs ends itself. In a
job of one process all of this costs nothing.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import numpy as np

from iam_jax.config import MeshConfig
from iam_jax.devices.signals import Signals, Stop
from iam_jax.errors import InputError, JobError, NonFiniteError

FAILED = 5  # exit code: the job has failed, not this process's input
_LEAVING = 10  # seconds that the others may take to leave too

_processes, _process = 1, 0
_alone = False  # between joining and the first agreement: a process that fails there must tell the others
_life = time.monotonic(), "its own work"  # the last sign of it, and what is waited for since


def join(address: str, processes: int | None, process: int | None, mesh: MeshConfig, signals: Signals) -> None:
    """Joins the job, before any other use of JAX: at `address` as number `process` of `processes`, or (address "") as JAX finds it on Cloud
    TPU, GKE and Slurm. The first process is the one that tells and writes: the others' stdout goes nowhere. Raises InputError where
    there is no job to be found. Where the others do not come, JAX aborts this process after five minutes."""
    global _processes, _process, _alone
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # on hosts without accelerators
    given = {"coordinator_address": address, "num_processes": processes, "process_id": process, "cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(**(given if address else {}), heartbeat_timeout_seconds=mesh.heartbeat_seconds)
    except ValueError as error:
        how = "give --coordinator=HOST:PORT, --processes=N and --process_id=K"
        raise InputError(f"--multihost: JAX finds no Cloud TPU, GKE or Slurm job here ({error}); {how}") from error
    signals.install()  # again: JAX has taken SIGTERM for a service of its own
    _processes, _process = jax.process_count(), jax.process_index()
    if _processes == 1:
        return
    _alone = True
    signals.share(any_process)
    if _process:
        sys.stdout = open(os.devnull, "w")
    alive("its own work")
    if mesh.hang_minutes:
        threading.Thread(target=_watch, args=(mesh.hang_minutes * 60,), daemon=True).start()


def processes() -> int:
    return _processes


def is_first() -> bool:
    """Whether this process writes what the processes share, and tells."""
    return _process == 0


# ---- agreeing


def gather(value) -> list:
    """What every process gives, by the processes' numbers: anything that JSON holds. All must call it at the same point of the program."""
    if _processes == 1:
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    alive("what the other processes found")
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = process_allgather(np.int32(len(text)))
    width = 1 << int(sizes.max()).bit_length()  # few shapes are compiled
    texts = process_allgather(np.pad(text, (0, width - len(text))))
    alive("its own work")
    return [json.loads(text[:size].tobytes()) for text, size in zip(texts, sizes, strict=True)]


def any_process(flag: bool) -> bool:
    """Whether any process's flag is up. All must call it at the same point of the program."""
    if _processes == 1:
        return flag
    from jax.experimental.multihost_utils import process_allgather

    alive("the other processes' signals")
    found = bool(process_allgather(np.int32(flag)).any())
    alive("its own work")
    return found


def agree(facts: dict[str, object], signals: Signals) -> None:
    """Ends what each process did alone after joining. Raises InputError where one of them failed, or where one differs in a fact that
    must be the same in all (told by its name), and Stop where one was stopped."""
    global _alone
    signals.defer(_processes > 1)
    _alone = False
    told = gather({"facts": facts})
    _raise_first([one.get("problem") for one in told])
    for process, one in enumerate(told):
        for name in sorted(facts.keys() | one["facts"].keys()):
            here, there = (told[p]["facts"].get(name) for p in (0, process))
            if here != there:
                raise InputError(f"the processes differ: {name} is {here!r} in process 0, {there!r} in process {process}")


def tell(error: BaseException) -> None:
    """Tells of what ends this process, where the others wait for it in `agree`."""
    global _alone
    if _alone:
        _alone = False
        gather({"facts": {}, "problem": _problem(error)})


@contextlib.contextmanager
def together(signals: Signals) -> Iterator[None]:
    """Around what a process does alone, or not at all. At the end all go on, or all raise: what one of them raised inside, a signal's Stop
    included. No collective may stand inside."""
    if _processes == 1:
        yield
        return
    mine = None
    try:
        with signals.raising():
            yield
    except (Exception, Stop) as error:
        mine = error
    told = gather(None if mine is None else _problem(mine))
    if mine is not None:
        raise mine
    _raise_first(told)


def _problem(error: BaseException) -> list[str]:
    return [type(error).__name__, " ".join(str(error).split())]


def _raise_first(problems: list[list[str] | None]) -> None:
    known = {kind.__name__: kind for kind in (InputError, NonFiniteError, FloatingPointError, Stop)}
    for process, problem in enumerate(problems):
        if problem:
            kind, text = problem
            raise known.get(kind, JobError)(f"process {process}: {text if kind in known else f'{kind}: {text}'}")


# ---- ending


def alive(waiting_for: str) -> None:
    """A sign of life, and what is waited for from here on."""
    global _life
    _life = time.monotonic(), waiting_for


def _watch(limit: float) -> NoReturn:
    while True:
        time.sleep(min(limit / 10, 10))
        since, waiting_for = _life
        if (silent := time.monotonic() - since) > limit:
            told = f"error: process {_process}: nothing for {silent / 60:.1f} minutes (config.mesh.hang_minutes), waiting for {waiting_for}"
            print(told, file=sys.stderr, flush=True)
            os._exit(FAILED)


def leave(code: int, with_others: bool = True) -> NoReturn:
    """Ends the process without waiting for its threads: one that a library was starting when Stop was raised may never end. with_others:
    they are leaving too, and are waited for a little, since to them a process that is gone first looks like one that died."""
    if _processes > 1 and with_others:
        import jax

        threading.Timer(_LEAVING, os._exit, (code,)).start()
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

"""Several processes as one job: they join, agree before they act, and exit together.

A process must not act alone on what only it knows (a signal, its clock, its disk, an error): the others would wait for it in a collective
forever. It therefore reports to the others first, and all act together. If a process dies, its missing heartbeats end the job; a process
that hangs ends itself. In a job of one process none of this costs anything.
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

FAILED = 5  # exit code: the job failed, but not because of this process's input
_EXIT_PATIENCE = 10  # seconds that an exiting process waits for the others to exit too

_processes, _process = 1, 0
_before_agreement = False  # between `join` and the first `agree`: a process that fails there must report it to the others
_progress = time.monotonic(), "its own work"  # time of the last progress, and what the process has waited for since


def join(address: str, processes: int | None, process: int | None, mesh: MeshConfig, signals: Signals) -> None:
    """Joins the job. Call it before any other use of JAX.

    Only process 0 prints and writes shared files; the stdout of the others is discarded. If other processes do not join, JAX aborts this
    process after five minutes.

    Args:
      address: host:port of process 0; "" lets JAX detect the job (Cloud TPU, GKE or Slurm).
      processes: number of processes in the job; None if JAX detects it.
      process: number of this process, from 0; None if JAX detects it.
      mesh: its heartbeat_seconds and hang_minutes limit how long a dead or hanging process goes unnoticed.
      signals: this process's signal handlers, which are installed again and shared with the other processes.

    Raises:
      InputError: if JAX detects no job.
    """
    global _processes, _process, _before_agreement
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # for hosts without accelerators
    given = {"coordinator_address": address, "num_processes": processes, "process_id": process, "cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(**(given if address else {}), heartbeat_timeout_seconds=mesh.heartbeat_seconds)
    except ValueError as error:
        how = "give --coordinator=HOST:PORT, --processes=N and --process_id=K"
        raise InputError(f"--multihost: JAX finds no Cloud TPU, GKE or Slurm job here ({error}); {how}") from error
    signals.install()  # again, because JAX has replaced the SIGTERM handler
    _processes, _process = jax.process_count(), jax.process_index()
    if _processes == 1:
        return
    _before_agreement = True
    signals.share(any_process)
    if _process:
        sys.stdout = open(os.devnull, "w")
    report_progress("its own work")
    if mesh.hang_minutes:
        threading.Thread(target=_watch, args=(mesh.hang_minutes * 60,), daemon=True).start()


def processes() -> int:
    """The number of processes in the job."""
    return _processes


def is_first() -> bool:
    """Whether this is process 0, the one that prints and writes shared files."""
    return _process == 0


# ---- agreement


def gather(value) -> list:
    """Returns the values of all processes, ordered by process number. All must call it at the same point of the program.

    value: anything that JSON can represent.
    """
    if _processes == 1:
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    report_progress("the results of the other processes")
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = process_allgather(np.int32(len(text)))
    width = 1 << int(sizes.max()).bit_length()  # a power of two, so that few shapes are compiled
    texts = process_allgather(np.pad(text, (0, width - len(text))))
    report_progress("its own work")
    return [json.loads(text[:size].tobytes()) for text, size in zip(texts, sizes, strict=True)]


def any_process(flag: bool) -> bool:
    """Whether the flag is True in any process. All must call it at the same point of the program."""
    if _processes == 1:
        return flag
    from jax.experimental.multihost_utils import process_allgather

    report_progress("the other processes' signals")
    found = bool(process_allgather(np.int32(flag)).any())
    report_progress("its own work")
    return found


def agree(facts: dict[str, object], signals: Signals) -> None:
    """Checks that all processes succeeded so far and have the same facts. All must call it at the same point of the program.

    In a job of several processes, signals are deferred from here on until all processes agree to stop.

    Args:
      facts: names and values that must be equal in all processes; anything that JSON can represent.
      signals: this process's signal handlers.

    Raises:
      InputError: if a process differs in a fact; the message names it and both values.
      InputError, NonFiniteError, FloatingPointError, Stop or JobError: if a process failed and reported it with `report_failure`.
    """
    global _before_agreement
    signals.defer(_processes > 1)
    _before_agreement = False
    reports = gather({"facts": facts})
    _raise_first([report.get("problem") for report in reports])
    for process, report in enumerate(reports):
        for name in sorted(facts.keys() | report["facts"].keys()):
            first, other = (reports[p]["facts"].get(name) for p in (0, process))
            if first != other:
                raise InputError(f"the processes differ: {name} is {first!r} in process 0, {other!r} in process {process}")


def report_failure(error: BaseException) -> None:
    """Reports the error that ends this process to the others, if they wait for it in the first `agree`."""
    global _before_agreement
    if _before_agreement:
        _before_agreement = False
        gather({"facts": {}, "problem": _problem(error)})


@contextlib.contextmanager
def fail_together(signals: Signals) -> Iterator[None]:
    """Wraps work that only some processes do. At the end all processes continue, or all raise.

    All processes must enter it. If one raises inside, including Stop from a signal, the others raise the same error. The work inside must
    not use collectives.
    """
    if _processes == 1:
        yield
        return
    own_error = None
    try:
        with signals.raising():
            yield
    except (Exception, Stop) as error:
        own_error = error
    problems = gather(None if own_error is None else _problem(own_error))
    if own_error is not None:
        raise own_error
    _raise_first(problems)


def _problem(error: BaseException) -> list[str]:
    return [type(error).__name__, " ".join(str(error).split())]


def _raise_first(problems: list[list[str] | None]) -> None:
    shared_types = {kind.__name__: kind for kind in (InputError, NonFiniteError, FloatingPointError, Stop)}
    for process, problem in enumerate(problems):
        if problem:
            kind, text = problem
            message = f"process {process}: {text if kind in shared_types else f'{kind}: {text}'}"
            raise shared_types.get(kind, JobError)(message)


# ---- exit


def report_progress(waiting_for: str) -> None:
    """Notes that the process makes progress, and what it waits for from now on (for the message if it hangs)."""
    global _progress
    _progress = time.monotonic(), waiting_for


def _watch(limit: float) -> NoReturn:
    """Ends the process if it makes no progress for `limit` seconds."""
    while True:
        time.sleep(min(limit / 10, 10))
        since, waiting_for = _progress
        if (idle := time.monotonic() - since) > limit:
            minutes = f"{idle / 60:.1f} minutes (config.mesh.hang_minutes)"
            print(f"error: process {_process}: no progress for {minutes}, waiting for {waiting_for}", file=sys.stderr, flush=True)
            os._exit(FAILED)


def exit_process(code: int, with_others: bool = True) -> NoReturn:
    """Exits without waiting for threads: a thread that a library was starting when Stop was raised may never end.

    with_others: whether the other processes exit too. Then this one waits for them for a few seconds, because they would take a process
    that exits earlier for one that died.
    """
    if _processes > 1 and with_others:
        import jax

        threading.Timer(_EXIT_PATIENCE, os._exit, (code,)).start()
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

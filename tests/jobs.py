"""Jobs of two processes on this machine, as on two hosts: collectives by gloo over localhost."""

import os
import socket
import subprocess
from pathlib import Path

import jax


def join_job(address: str, process: str) -> None:
    """In a process that `two_processes` started, before JAX is used."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, int(process))


def two_processes(command: list[str], devices: int = 1, cwd: Path | None = None) -> list[str]:
    """What each of the two printed. The command gets the job's address and the process's number behind its arguments, so many devices a
    process, and may import this module."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    options = {"cwd": cwd, "env": env, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen([*command, address, str(process)], **options) for process in (0, 1)]
    try:
        told = [process.communicate(timeout=100)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(out[-3000:] for out in told)
    return told

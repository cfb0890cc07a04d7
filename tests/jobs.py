"""Jobs of several processes on this machine, started by launch/local.py."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import forks

from iam_jax.config import MeshConfig
from iam_jax.devices import distributed
from iam_jax.devices.signals import Signals

ROOT = Path(__file__).parents[1]
LAUNCHER = ROOT / "launch" / "local.py"


def load_launcher():
    sys.path.insert(0, str(LAUNCHER.parent))
    try:
        spec = importlib.util.spec_from_file_location("launch_local", LAUNCHER)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(LAUNCHER.parent))


FORKING = """
import runpy, sys
sys.executable = sys.argv.pop(1)
del sys.argv[0]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start_job(folder: Path, processes: int, *flags: str, devices: int = 1, fresh: bool = False) -> subprocess.Popen:
    """Starts the launcher in `folder`. fresh: its processes import the libraries themselves; otherwise they are forked (forks.py)."""
    launcher = [sys.executable] if fresh else [sys.executable, "-c", FORKING, forks.python()]
    command = [*launcher, str(LAUNCHER), f"--processes={processes}", f"--devices={devices}", "--", *flags]
    return subprocess.Popen(command, cwd=folder, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_job(folder: Path, processes: int, *flags: str, devices: int = 1, fresh: bool = False, code: int = 0, timeout: float = 900) -> str:
    """Runs a job to its end and returns its output."""
    job = start_job(folder, processes, *flags, devices=devices, fresh=fresh)
    try:
        output, _ = job.communicate(timeout=timeout)
    finally:
        job.terminate()
    assert job.returncode == code, output[-6000:]
    return output


def join_job(flags: list[str]) -> int:
    """Joins the job in a process that `two_processes` started, before JAX is used. Returns the number of the process."""
    values = dict(flag.lstrip("-").split("=") for flag in flags if "=" in flag)
    process = int(values["process_id"])
    distributed.join(values["coordinator"], int(values["processes"]), process, MeshConfig(), Signals())
    return process


def two_processes(command: list[str], devices: int = 1, cwd: Path | None = None, code: int = 0) -> list[str]:
    """Runs a program, as after `python`, as two processes and returns the output of each. The flags of the process are appended to its
    arguments."""
    options = {"cwd": cwd, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    commands = load_launcher().job([forks.python(), *command], 2, devices, {"JAX_PLATFORMS": "cpu"})
    running = [subprocess.Popen(process_command, env=_environment() | additions, **options) for additions, process_command in commands]
    try:
        outputs = [process.communicate(timeout=900)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [code, code], "\n".join(out[-3000:] for out in outputs)
    return outputs


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}

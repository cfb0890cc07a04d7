"""Runs one job as several processes on this machine, in the way that several hosts would run it.

    python launch/local.py --processes=2 [--devices=4] [--dry-run] -- --config=configs/demo.py --workdir=runs/demo [...]

This starts `python -m iam_jax.main` in --processes processes, with the flags after `--` and a free port as the coordinator. Without GPUs,
each process has --devices simulated CPU devices. With GPUs (listed by CUDA_VISIBLE_DEVICES or nvidia-smi, unless JAX_PLATFORMS is cpu),
each process gets --devices of them. Every line of output is prefixed with the number of its process. Signals are forwarded to all
processes. If one fails, the others have --grace seconds to exit before they are killed. The exit code is the first one that is not 0.
"""

import argparse
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

from commands import split_rest

PROGRAM = (sys.executable, "-m", "iam_jax.main")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def gpus(environment: dict[str, str]) -> list[str]:
    """Returns the names of the GPUs that the processes may use, as in CUDA_VISIBLE_DEVICES."""
    if "cpu" in environment.get("JAX_PLATFORMS", ""):
        return []
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(number) for number, _ in enumerate(listed.splitlines())]


def environments(processes: int, devices: int | None, environment: dict[str, str]) -> list[dict[str, str]]:
    """Returns the variables that each process gets in addition to the launcher's. Raises ValueError if there are too few GPUs."""
    names = gpus(environment)
    if not names:
        additions = {"JAX_PLATFORMS": "cpu"}
        if devices is not None:
            xla_flags = environment.get("XLA_FLAGS", "")
            additions["XLA_FLAGS"] = f"{xla_flags} --xla_force_host_platform_device_count={devices}".strip()
        return [additions] * processes
    per_process = devices or len(names) // processes
    if per_process < 1 or per_process * processes > len(names):
        raise ValueError(f"{processes} processes with {max(per_process, 1)} devices each need more than the {len(names)} available GPUs")
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[k * per_process : (k + 1) * per_process])} for k in range(processes)]


def job(command: list[str], processes: int, devices: int | None, environment: dict[str, str]) -> list[tuple[dict[str, str], list[str]]]:
    """Returns the additional environment variables and the command of each process."""
    address = f"localhost:{free_port()}"
    flags = "--multihost", f"--coordinator={address}", f"--processes={processes}"
    return [(added, [*command, *flags, f"--process_id={k}"]) for k, added in enumerate(environments(processes, devices, environment))]


def run(commands: list[tuple[dict[str, str], list[str]]], grace: float, output=print) -> int:
    """Runs all processes of a job, as `job` returns them, until they end.

    grace: seconds that the others get after one has failed. output: prints the lines. Returns the first exit code that is not 0; for a
    process that a signal ended, this is 128 plus the number of the signal.
    """
    ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    # A new session, because otherwise Ctrl-C in a terminal would reach the processes twice: from the terminal and from this process.
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace", "start_new_session": True}
    running: dict[int, subprocess.Popen] = {}

    def forward(number: int, frame: object) -> None:
        for process in list(running.values()):
            process.send_signal(number)

    def follow(k: int, process: subprocess.Popen) -> None:
        for line in process.stdout:
            output(f"[{k}] {line}", end="", flush=True)
        ended.put((k, process.wait()))

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    for k, (added, command) in enumerate(commands):
        running[k] = subprocess.Popen(command, env=os.environ | added, **options)
        threading.Thread(target=follow, args=(k, running[k]), daemon=True).start()
    code, deadline = 0, None
    while running:
        try:
            k, returncode = ended.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            output(f"process {', '.join(map(str, running))}: still running {grace:g} s after another one failed; killed", flush=True)
            for process in running.values():
                process.kill()
            deadline = None
            continue
        del running[k]
        if returncode and not code:
            code, deadline = returncode if returncode > 0 else 128 - returncode, time.monotonic() + grace
            if returncode < 0:
                output(f"process {k} was ended by {signal.Signals(-returncode).name}", flush=True)
    return code


def main() -> int:
    own, flags = split_rest(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog="The flags of iam_jax.main follow after --.")
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--devices", type=int, help="devices per process")
    parser.add_argument("--grace", type=float, default=90.0, help="seconds until the other processes are killed after one has failed")
    parser.add_argument("--dry-run", action="store_true", help="print the commands without running them")
    args = parser.parse_args(own)
    if args.processes < 1 or (args.devices is not None and args.devices < 1):
        parser.error("--processes and --devices must be at least 1")
    if not flags:
        parser.error("the flags of iam_jax.main are missing; put them after --")
    try:
        commands = job([*PROGRAM, *flags], args.processes, args.devices, dict(os.environ))
    except ValueError as error:
        parser.error(str(error))
    if args.dry_run:
        for added, command in commands:
            print(" ".join([*(f"{name}={shlex.quote(value)}" for name, value in added.items()), shlex.join(command)]))
        return 0
    return run(commands, args.grace)


if __name__ == "__main__":
    sys.exit(main())

"""Several processes on this machine as one job, as on several hosts.

    python launch/local.py --processes=2 [--devices=4] [--dry-run] -- --config=configs/demo.py --workdir=runs/demo [...]

starts `python -m iam_jax.main` so many times with the flags behind `--`, joined at a free port. Without GPUs the processes have CPUs as
devices, `--devices` simulated ones each; with GPUs (as CUDA_VISIBLE_DEVICES or nvidia-smi names them, unless JAX_PLATFORMS says cpu) each
process gets its part of them, `--devices` each. What a process prints comes after its number. Signals go to all. When one fails, the others
have --grace seconds to find out by themselves, then they are killed; the first code that is not 0 is the launcher's.
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
    """The GPUs that the processes may use, by the names CUDA_VISIBLE_DEVICES knows."""
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
    """What each process's environment has beside the launcher's. Raises ValueError where there are too few GPUs."""
    names = gpus(environment)
    if not names:
        more = {"JAX_PLATFORMS": "cpu"}
        if devices is not None:
            given = environment.get("XLA_FLAGS", "")
            more["XLA_FLAGS"] = f"{given} --xla_force_host_platform_device_count={devices}".strip()
        return [more] * processes
    each = devices or len(names) // processes
    if each < 1 or each * processes > len(names):
        raise ValueError(f"{processes} processes of {max(each, 1)} devices each need more than the {len(names)} GPUs there are")
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[k * each : (k + 1) * each])} for k in range(processes)]


def job(command: list[str], processes: int, devices: int | None, environment: dict[str, str]) -> list[tuple[dict[str, str], list[str]]]:
    """Each process's additions to the environment, and its command."""
    address = f"localhost:{free_port()}"
    flags = "--multihost", f"--coordinator={address}", f"--processes={processes}"
    return [(more, [*command, *flags, f"--process_id={k}"]) for k, more in enumerate(environments(processes, devices, environment))]


def run(commands: list[tuple[dict[str, str], list[str]]], grace: float, told=print) -> int:
    """Runs them all; returns the first code that is not 0, 128 + the signal's number for a process that a signal ended."""
    ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    # A session of their own: Ctrl-C in a terminal would reach them twice, by the terminal and by this process.
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace", "start_new_session": True}
    running: dict[int, subprocess.Popen] = {}

    def forward(number: int, frame: object) -> None:
        for process in list(running.values()):
            process.send_signal(number)

    def follow(k: int, process: subprocess.Popen) -> None:
        for line in process.stdout:
            told(f"[{k}] {line}", end="", flush=True)
        ended.put((k, process.wait()))

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    for k, (more, command) in enumerate(commands):
        running[k] = subprocess.Popen(command, env=os.environ | more, **options)
        threading.Thread(target=follow, args=(k, running[k]), daemon=True).start()
    code, deadline = 0, None
    while running:
        try:
            k, found = ended.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            told(f"process {', '.join(map(str, running))}: still there {grace:g} s after another one failed; killed", flush=True)
            for process in running.values():
                process.kill()
            deadline = None
            continue
        del running[k]
        if found and not code:
            code, deadline = found if found > 0 else 128 - found, time.monotonic() + grace
            if found < 0:
                told(f"process {k} was ended by {signal.Signals(-found).name}", flush=True)
    return code


def main() -> int:
    own, flags = split_rest(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog="Behind -- the flags of iam_jax.main.")
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--devices", type=int, help="of each process")
    parser.add_argument("--grace", type=float, default=90.0, help="seconds that the others have when one fails")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    args = parser.parse_args(own)
    if args.processes < 1 or (args.devices is not None and args.devices < 1):
        parser.error("--processes and --devices must be 1 or more")
    if not flags:
        parser.error("the flags of iam_jax.main are missing: they stand behind --")
    try:
        commands = job([*PROGRAM, *flags], args.processes, args.devices, dict(os.environ))
    except ValueError as error:
        parser.error(str(error))
    if args.dry_run:
        for more, command in commands:
            print(" ".join([*(f"{name}={shlex.quote(value)}" for name, value in more.items()), shlex.join(command)]))
        return 0
    return run(commands, args.grace)


if __name__ == "__main__":
    sys.exit(main())

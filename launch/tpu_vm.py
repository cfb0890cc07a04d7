"""Runs a job on a Cloud TPU VM slice: requests the slice, installs the source, starts all workers, and restarts after a preemption.

    python launch/tpu_vm.py run NAME --zone=ZONE --topology=v5e:4x4 --spot -- --config=configs/ml1m.py:iam --workdir=gs://BUCKET/ml1m
    python launch/tpu_vm.py {create,install,logs,status,stop,delete} NAME --zone=ZONE [...]

The slice is a queued resource: the platform provides it when there is capacity, and may preempt a spot slice. `run` requests the slice if
it does not exist or was preempted, copies and installs the commit --ref, starts the command after `--` with --multihost on every worker,
and follows the log of the first worker. The workers continue without this machine. When all of them have ended, exit code 0 means success;
exit codes 2, 3 and 4 (bad input, does not fit, not finite) and `stop` are final too. After anything else, including a preemption, `run`
restarts the job, at most --max_restarts times, and it continues from its last checkpoint. If `run` itself is interrupted, the same command
follows the job again. Workers share no disk, so the working folder must be a gs:// path. Only `delete` removes the slice and ends its
cost. --dry-run prints the commands.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import commands
import slices

from iam_jax.errors import InputError

TPUS = ["gcloud", "compute", "tpus"]
ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("tpu_worker.sh")
FOLDER, ARCHIVE = "iam_jax", "source.tar.gz"  # on a worker
GONE = ("SUSPENDED", "FAILED")  # preempted; never provided
FINAL = {"2", "3", "4"}  # exit codes that a restart would only repeat
POLL, PAUSE = 30, 60  # seconds between two queries of the state; seconds before a restart


def main(argv: list[str]) -> int:
    own, flags = commands.split_rest(argv)
    args = make_parser().parse_args(own, argparse.Namespace(flags=flags))
    try:
        if args.flags and args.action is not run:
            raise InputError(f"{args.flags[0]}: only `run` accepts flags of iam_jax.main after `--`")
        return args.action(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: {shlex.join(error.cmd)}: exit code {error.returncode}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the job on the slice continues: `run` or `logs` follows it, `stop` ends it", file=sys.stderr)
        return 75


def make_parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("name", help="name of the slice and of its queued resource")
    shared.add_argument("--zone", required=True)
    shared.add_argument("--project", help="default: the one of gcloud")
    shared.add_argument("--dry-run", action="store_true", help="print the commands without running them")
    slice_flags = argparse.ArgumentParser(add_help=False)
    slice_flags.add_argument("--topology", required=True, help="TPU slice as for --mode=plan: v5e:4x4, v5p:2x4x4, ...")
    slice_flags.add_argument("--spot", action="store_true", help="use a spot slice, which is cheaper and may be preempted at any time")
    slice_flags.add_argument("--runtime", help="software version of the VMs; default: the one for the chip")
    create_help = "further flags of queued-resources create, without the --"
    slice_flags.add_argument("--create", nargs="*", default=[], metavar="FLAG", help=create_help)
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("--ref", default="HEAD", help="commit of this repository to install")
    source.add_argument("--setup", default="", help="shell command for every worker after the installation, such as a copy of the tables")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(required=True)

    def add(action: Callable, help: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        subparser = actions.add_parser(action.__name__, parents=[shared, *parents], help=help)
        subparser.set_defaults(action=action)
        return subparser

    add(create, "request the slice and wait for it", slice_flags)
    add(install, "copy and install the source on all workers", source)
    add(run, "create, install, run, and restart if needed", slice_flags, source).add_argument("--max_restarts", type=int, default=20)
    add(logs, "print the log of the first worker from its start until the job ends")
    add(status, "print the state of the slice and of its workers")
    add(stop, "send SIGTERM to all workers: the program saves, exits and is not restarted")
    add(delete, "delete the slice and its queued resource")
    return parser


# ---- commands of gcloud


def _location(args: argparse.Namespace) -> list[str]:
    return [f"--zone={args.zone}", *([f"--project={args.project}"] if args.project else [])]


def state_command(args: argparse.Namespace) -> list[str]:
    """The command that prints the state of the queued resource, or nothing if it does not exist."""
    return [*TPUS, "queued-resources", "list", f"--filter=name~/{args.name}$", "--format=value(state.state)", *_location(args)]


def create_command(args: argparse.Namespace) -> list[str]:
    tpu_slice = slices.parse(args.topology)
    kind = tpu_slice.kind
    # The number of chips determines the shape of a slice with two axes, but not with three.
    size = [f"--accelerator-type={tpu_slice.accelerator_type}"]
    if kind.axes == 3:
        size = [f"--type={kind.api}", f"--topology={tpu_slice.shape}"]
    spot, further = ["--spot"] * args.spot, [f"--{flag}" for flag in args.create]
    runtime = f"--runtime-version={args.runtime or kind.runtime}"
    return [*TPUS, "queued-resources", "create", args.name, f"--node-id={args.name}", *size, runtime, *spot, *further, *_location(args)]


def delete_command(args: argparse.Namespace) -> list[str]:
    return [*TPUS, "queued-resources", "delete", args.name, "--force", "--quiet", *_location(args)]


def copy_command(args: argparse.Namespace, folder: str) -> list[str]:
    files = [f"{folder}/{ARCHIVE}", str(WORKER)]
    return [*TPUS, "tpu-vm", "scp", *files, f"{args.name}:{FOLDER}/", "--worker=all", *_location(args)]


def ssh_command(args: argparse.Namespace, command: str, worker: str = "all") -> list[str]:
    return [*TPUS, "tpu-vm", "ssh", args.name, f"--worker={worker}", f"--command={command}", *_location(args)]


def worker_command(args: argparse.Namespace, *action: str, worker: str = "all") -> list[str]:
    return ssh_command(args, shlex.join(["bash", f"{FOLDER}/{WORKER.name}", *action]), worker)


# ---- actions


def create(args: argparse.Namespace) -> int:
    """Requests the slice unless it exists, and waits for it. Returns 1 if the platform does not provide it."""
    create_command(args)  # raises InputError for an unknown topology before anything is deleted
    if args.dry_run:
        _print_command("the state of the slice", state_command(args))
        _print_command(f"if it was preempted or never provided ({', '.join(GONE)})", delete_command(args))
        _print_command("after that, and if it does not exist", create_command(args))
        _print_command(f"every {POLL} s until it is ACTIVE", state_command(args))
        return 0
    state = _state(args)
    if state in GONE:
        print(f"{args.name} is {state}: requesting it again", flush=True)
        _call(delete_command(args))
    if not state or state in GONE:
        _call(create_command(args))
    printed = ""
    while (state := _state(args)) != "ACTIVE":
        if state in GONE:
            print(f"{args.name} is {state}", flush=True)
            return 1
        if state != printed:
            print(f"{args.name} is {state or 'not created yet'}", flush=True)
            printed = state
        time.sleep(POLL)
    return 0


def install(args: argparse.Namespace) -> int:
    """Copies the commit to all workers and installs it there."""
    steps = [ssh_command(args, f"mkdir -p {FOLDER}"), copy_command(args, "."), worker_command(args, "install", *filter(None, [args.setup]))]
    archive = ["git", "-C", str(ROOT), "archive", "--format=tar.gz"]
    if args.dry_run:
        for number, step in enumerate([[*archive, f"--output={ARCHIVE}", args.ref], *steps]):
            _print_command("copy and install the commit on all workers" if not number else "", step)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        _call([*archive, f"--output={folder}/{ARCHIVE}", args.ref])
        steps[1] = copy_command(args, folder)
        for step in steps:
            _call(step)
    return 0


def run(args: argparse.Namespace) -> int:
    """Runs the job and restarts it if needed.

    Returns 0 after success, the final exit code of the program (2, 3 or 4), 75 after `stop`, or 1 after --max_restarts restarts.
    """
    check(args)
    start = worker_command(args, "start", "--multihost", *args.flags)
    follow, code = worker_command(args, "follow", worker="0"), worker_command(args, "code")
    if args.dry_run:
        create(args)
        install(args)
        _print_command("the same command on every worker, in the background", start)
        _print_command("the log of the first worker, until the job ends", follow)
        _print_command("the exit codes of all workers; final ones are 0 (success), 2, 3, 4 and stopped", code)
        print(f"# after other exit codes or a preemption: everything again, at most {args.max_restarts} times")
        return 0
    for restart in range(args.max_restarts + 1):
        if restart:
            print(f"start {restart + 1} of at most {args.max_restarts + 1} in {PAUSE} s", flush=True)
            time.sleep(PAUSE)
        if create(args):
            continue
        try:
            install(args)
            _call(start)
        except subprocess.CalledProcessError as error:  # the slice was preempted meanwhile, or it is unreachable
            print(f"{error.cmd[4]} failed with exit code {error.returncode}", flush=True)
            continue
        subprocess.run(follow)
        ended = subprocess.run(code, stdout=subprocess.PIPE, text=True)
        codes = re.findall(r"^exit-code (\w+)$", ended.stdout, re.M)
        print(f"exit codes of the workers: {', '.join(codes) or 'none received'}", flush=True)
        if "stopped" in codes:
            return 75
        if final := FINAL.intersection(codes):
            return int(min(final))
        if ended.returncode == 0 and codes and set(codes) == {"0"}:
            return 0
    print(f"error: not finished after {args.max_restarts} restarts", file=sys.stderr)
    return 1


def check(args: argparse.Namespace) -> None:
    """Raises InputError if the flags of the job cannot work on a slice."""
    given = dict(flag.lstrip("-").split("=", 1) for flag in args.flags if "=" in flag)
    if not re.match("gs://.|/", given.get("workdir", "")):
        raise InputError("--workdir=gs://BUCKET/... is missing after `--` (or a path on a file system that all workers share)")
    config = given.get("config", "").partition(":")[0]
    file = config if config.endswith(".py") or "/" in config else f"configs/{config}.py"  # --config=demo is a name
    exists = subprocess.run(["git", "-C", str(ROOT), "cat-file", "-e", f"{args.ref}:{file}"], stderr=subprocess.DEVNULL)
    if config and exists.returncode:
        raise InputError(f"--config={config}: not in commit {args.ref}, which is installed on the workers")


def logs(args: argparse.Namespace) -> int:
    return _run(args, worker_command(args, "follow", worker="0"))


def status(args: argparse.Namespace) -> int:
    return _run(args, state_command(args)) or _run(args, worker_command(args, "status"))


def stop(args: argparse.Namespace) -> int:
    return _run(args, worker_command(args, "stop"))


def delete(args: argparse.Namespace) -> int:
    return _run(args, delete_command(args))


def _state(args: argparse.Namespace) -> str:
    return subprocess.run(state_command(args), stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def _print_command(comment: str, command: list[str]) -> None:
    print(f"# {comment}\n" * bool(comment) + shlex.join(command), flush=True)


def _call(command: list[str]) -> None:
    """Prints and runs a command. Raises CalledProcessError if it fails."""
    _print_command("", command)
    subprocess.run(command, check=True)


def _run(args: argparse.Namespace, command: list[str]) -> int:
    """Runs a command, or prints it in a dry run, and returns its exit code."""
    if args.dry_run:
        _print_command("", command)
        return 0
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Runs on a Cloud TPU VM slice: asks for it, installs there, runs on all its workers, and runs again after a preemption.

    python launch/tpu_vm.py run NAME --zone=ZONE --topology=v5e:4x4 --spot -- --config=configs/ml1m.py --workdir=gs://BUCKET/ml1m
    python launch/tpu_vm.py {create,install,logs,status,stop,delete} NAME --zone=ZONE [...]

The slice is a queued resource: the platform gives it when there is room, and takes a spot slice back. `run` asks for it where it is not
there, or was taken; copies and installs the commit --ref; starts the command behind `--` with --multihost on every worker, where it goes on
without this machine; and follows the first worker. When it has ended everywhere: 0 is the end; 2, 3 and 4 (bad input, does not fit, not
finite) and `stop` are too; anything else, a slice that was taken among it, is started again, --max_restarts times at most, and goes on from
its last checkpoint. Interrupted here, `run` of the same command follows again. Workers share no disk: the working folder is a gs:// path.
Nothing ends the slice, and its cost, but `delete`. --dry-run prints the commands.
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
GONE = ("SUSPENDED", "FAILED")  # preempted; never given
FINAL = {"2", "3", "4"}  # exit codes that another start would only repeat
POLL, PAUSE = 30, 60  # seconds between two looks at the queue; before another start


def main(argv: list[str]) -> int:
    own, flags = commands.split_rest(argv)
    args = make_parser().parse_args(own, argparse.Namespace(flags=flags))
    try:
        if args.flags and args.do is not run:
            raise InputError(f"{args.flags[0]} stands behind `--`: only run takes flags of iam_jax.main")
        return args.do(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: {shlex.join(error.cmd)}: exit code {error.returncode}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("left; what runs on the slice goes on: `run` or `logs` follows it, `stop` ends it", file=sys.stderr)
        return 75


def make_parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("name", help="of the slice and its queued resource")
    shared.add_argument("--zone", required=True)
    shared.add_argument("--project", help="gcloud's default otherwise")
    shared.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    asked = argparse.ArgumentParser(add_help=False)
    asked.add_argument("--topology", required=True, help="v5e:4x4, v5p:2x4x4, ... as --mode=plan takes it")
    asked.add_argument("--spot", action="store_true", help="cheaper, and taken back at any moment")
    asked.add_argument("--runtime", help="software version of the VMs; by the chip otherwise")
    asked.add_argument("--create", nargs="*", default=[], metavar="FLAG", help="further flags of queued-resources create, without the --")
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("--ref", default="HEAD", help="commit of this repository that is installed")
    source.add_argument("--setup", default="", help="shell command on every worker after the installation, such as a copy of the tables")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(required=True)

    def add(do: Callable, help: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        one = what.add_parser(do.__name__, parents=[shared, *parents], help=help)
        one.set_defaults(do=do)
        return one

    add(create, "ask for the slice and wait for it", asked)
    add(install, "copy and install the source on all workers", source)
    add(run, "create, install, run, and run again", asked, source).add_argument("--max_restarts", type=int, default=20)
    add(logs, "what the first worker tells, from the start, until it ends")
    add(status, "the slice's state, and what its workers do")
    add(stop, "SIGTERM on all workers: the program saves and ends, and is not started again")
    add(delete, "the slice and its queued resource")
    return parser


# ---- gcloud's commands


def _of(args: argparse.Namespace) -> list[str]:
    return [f"--zone={args.zone}", *([f"--project={args.project}"] if args.project else [])]


def state_command(args: argparse.Namespace) -> list[str]:
    """Prints the queued resource's state, nothing where there is none."""
    return [*TPUS, "queued-resources", "list", f"--filter=name~/{args.name}$", "--format=value(state.state)", *_of(args)]


def create_command(args: argparse.Namespace) -> list[str]:
    asked = slices.parse(args.topology)
    # A number of chips has one shape in two dimensions, and several in three.
    by_size = asked.kind.axes == 2
    size = [f"--accelerator-type={asked.accelerator_type}"] if by_size else [f"--type={asked.kind.api}", f"--topology={asked.shape}"]
    spot, more = ["--spot"] * args.spot, [f"--{flag}" for flag in args.create]
    runtime = f"--runtime-version={args.runtime or asked.kind.runtime}"
    return [*TPUS, "queued-resources", "create", args.name, f"--node-id={args.name}", *size, runtime, *spot, *more, *_of(args)]


def delete_command(args: argparse.Namespace) -> list[str]:
    return [*TPUS, "queued-resources", "delete", args.name, "--force", "--quiet", *_of(args)]


def copy_command(args: argparse.Namespace, folder: str) -> list[str]:
    files = [f"{folder}/{ARCHIVE}", str(WORKER)]
    return [*TPUS, "tpu-vm", "scp", *files, f"{args.name}:{FOLDER}/", "--worker=all", *_of(args)]


def ssh_command(args: argparse.Namespace, command: str, worker: str = "all") -> list[str]:
    return [*TPUS, "tpu-vm", "ssh", args.name, f"--worker={worker}", f"--command={command}", *_of(args)]


def worker_command(args: argparse.Namespace, *what: str, worker: str = "all") -> list[str]:
    return ssh_command(args, shlex.join(["bash", f"{FOLDER}/{WORKER.name}", *what]), worker)


# ---- what is asked for


def create(args: argparse.Namespace) -> int:
    create_command(args)  # a topology that is none is refused before anything is deleted
    if args.dry_run:
        _tell("the slice's state", state_command(args))
        _tell(f"where it was taken or never given ({', '.join(GONE)})", delete_command(args))
        _tell("then, and where it is not there", create_command(args))
        _tell(f"every {POLL} s until it is ACTIVE", state_command(args))
        return 0
    state = _state(args)
    if state in GONE:
        print(f"{args.name} is {state}: asked for again", flush=True)
        _call(delete_command(args))
    if not state or state in GONE:
        _call(create_command(args))
    told = ""
    while (state := _state(args)) != "ACTIVE":
        if state in GONE:
            print(f"{args.name} is {state}", flush=True)
            return 1
        if state != told:
            print(f"{args.name} is {state or 'not there yet'}", flush=True)
            told = state
        time.sleep(POLL)
    return 0


def install(args: argparse.Namespace) -> int:
    steps = [ssh_command(args, f"mkdir -p {FOLDER}"), copy_command(args, "."), worker_command(args, "install", *filter(None, [args.setup]))]
    archive = ["git", "-C", str(ROOT), "archive", "--format=tar.gz"]
    if args.dry_run:
        for number, step in enumerate([[*archive, f"--output={ARCHIVE}", args.ref], *steps]):
            _tell("the commit, on all workers" if not number else "", step)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        _call([*archive, f"--output={folder}/{ARCHIVE}", args.ref])
        steps[1] = copy_command(args, folder)
        for step in steps:
            _call(step)
    return 0


def run(args: argparse.Namespace) -> int:
    """The exit code: 0, or the program's last; 1 where --max_restarts were not enough, 75 after `stop`."""
    check(args)
    start = worker_command(args, "start", "--multihost", *args.flags)
    follow, code = worker_command(args, "follow", worker="0"), worker_command(args, "code")
    if args.dry_run:
        create(args)
        install(args)
        _tell("the same command on every worker, in the background", start)
        _tell("what the first tells, until it ends", follow)
        _tell("how it ended on each; 0: done; 2, 3, 4 or stopped: the end", code)
        print(f"# anything else, or a slice that was taken: all of it once more, {args.max_restarts} times at most")
        return 0
    for restart in range(args.max_restarts + 1):
        if restart:
            print(f"start {restart + 1} of at most {args.max_restarts + 1}, in {PAUSE} s", flush=True)
            time.sleep(PAUSE)
        if create(args):
            continue
        try:
            install(args)
            _call(start)
        except subprocess.CalledProcessError as error:  # taken meanwhile, or not reached
            print(f"{error.cmd[4]} failed with exit code {error.returncode}", flush=True)
            continue
        subprocess.run(follow)
        ended = subprocess.run(code, stdout=subprocess.PIPE, text=True)
        codes = re.findall(r"^exit-code (\w+)$", ended.stdout, re.M)
        print(f"exit codes of the workers: {', '.join(codes) or 'none came'}", flush=True)
        if "stopped" in codes:
            return 75
        if final := FINAL.intersection(codes):
            return int(min(final))
        if ended.returncode == 0 and codes and set(codes) == {"0"}:
            return 0
    print(f"error: not finished after {args.max_restarts} restarts", file=sys.stderr)
    return 1


def check(args: argparse.Namespace) -> None:
    """Raises InputError where the command could not run on a slice."""
    given = dict(flag.lstrip("-").split("=", 1) for flag in args.flags if "=" in flag)
    if not re.match("gs://.|/", given.get("workdir", "")):
        raise InputError("--workdir=gs://BUCKET/... is missing behind `--` (or the path of a file system that all workers share)")
    config = given.get("config", "").partition(":")[0]
    known = subprocess.run(["git", "-C", str(ROOT), "cat-file", "-e", f"{args.ref}:{config}"], stderr=subprocess.DEVNULL)
    if config and known.returncode:
        raise InputError(f"--config={config}: not in commit {args.ref}, which is what the workers get")


def logs(args: argparse.Namespace) -> int:
    return _tell_or_call(args, worker_command(args, "follow", worker="0"))


def status(args: argparse.Namespace) -> int:
    return _tell_or_call(args, state_command(args)) or _tell_or_call(args, worker_command(args, "status"))


def stop(args: argparse.Namespace) -> int:
    return _tell_or_call(args, worker_command(args, "stop"))


def delete(args: argparse.Namespace) -> int:
    return _tell_or_call(args, delete_command(args))


def _state(args: argparse.Namespace) -> str:
    return subprocess.run(state_command(args), stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def _tell(why: str, command: list[str]) -> None:
    print(f"# {why}\n" * bool(why) + shlex.join(command), flush=True)


def _call(command: list[str]) -> None:
    _tell("", command)
    subprocess.run(command, check=True)


def _tell_or_call(args: argparse.Namespace, command: list[str]) -> int:
    if args.dry_run:
        _tell("", command)
        return 0
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

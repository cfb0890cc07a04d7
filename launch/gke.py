"""Starts a run on a TPU slice of a GKE cluster, as a JobSet (gke/jobset.yaml) or with xpk.

    docker build -f launch/gke/Dockerfile -t IMAGE . && docker push IMAGE
    python launch/gke.py NAME --image=IMAGE --topology=v5e:4x4 [--spot] -- --config=configs/ml1m.py:iam --workdir=gs://BUCKET/ml1m
    kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME,batch.kubernetes.io/job-completion-index=0
    kubectl delete jobset NAME                                      # SIGTERM: the run saves and ends

The cluster needs the JobSet controller and a node pool with the topology. --service_account must be allowed to write to the working folder
(Workload Identity). --bucket is mounted at /data. If a pod exits with 2, 3 or 4 (bad input, does not fit, not finite), the JobSet fails.
After a preemption, exit code 75 or a crash, all pods are restarted, at most --max_restarts times, and continue from the last checkpoint. A
name that already exists is refused; delete it first. --xpk=CLUSTER runs `xpk workload create` instead. --dry-run prints the command and the
manifest.
"""

import argparse
import json
import re
import shlex
import string
import subprocess
import sys
from pathlib import Path

import commands
import slices

from iam_jax.errors import InputError

MANIFEST = Path(__file__).parent / "gke" / "jobset.yaml"
MOUNT = "/data"
# xpk restarts after exit codes 42 and 127 to 255. These are added: an exception, a job that lost a process, stopped with everything saved.
RESTARTED = "1,5,75"


def main(argv: list[str]) -> int:
    own, flags = commands.split_rest(argv)
    args = make_parser().parse_args(own)
    try:
        if not re.match("gs://.|/", _given(flags, "workdir")):
            raise InputError("--workdir=gs://BUCKET/... is missing after `--` (or a path on a file system that all pods share)")
        text = manifest(args, flags)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = xpk_command(args, flags) if args.xpk else ["kubectl", "create", "-f", "-"]
    stdin = "" if args.xpk else text
    if args.dry_run:
        print(shlex.join(command) + (f" <<'EOF'\n{stdin}EOF" if stdin else ""))
        return 0
    return subprocess.run(command, input=stdin, text=True).returncode


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="name of the JobSet")
    parser.add_argument("--image", required=True, help="container image, built from launch/gke/Dockerfile")
    parser.add_argument("--topology", required=True, help="TPU slice as for --mode=plan: v5e:4x4, v5p:2x4x4, ...")
    parser.add_argument("--chips_per_host", type=int, default=4, help="chips per machine of the node pool (ct5lp-hightpu-4t: 4)")
    parser.add_argument("--spot", action="store_true", help="use spot nodes, which may be preempted at any time")
    parser.add_argument("--max_restarts", type=int, default=20)
    parser.add_argument("--service_account", default="default", help="Kubernetes service account")
    parser.add_argument("--bucket", help=f"bucket to mount read-only at {MOUNT} (Cloud Storage FUSE), for --config.data.path={MOUNT}/...")
    parser.add_argument("--xpk", metavar="CLUSTER", help="use xpk with this cluster")
    parser.add_argument("--dry-run", action="store_true", help="print the command and the manifest without starting anything")
    return parser


def program(flags: list[str]) -> list[str]:
    """Returns the command of a container."""
    return ["python", "-m", "iam_jax.main", "--multihost", *flags]


def manifest(args: argparse.Namespace, flags: list[str]) -> str:
    """Returns the JobSet as YAML. Raises InputError if the topology is unknown or is not a whole number of hosts."""
    tpu_slice = slices.parse(args.topology)
    per_host = min(args.chips_per_host, tpu_slice.chips)
    if per_host < 1 or tpu_slice.chips % per_host:
        raise InputError(f"--chips_per_host={args.chips_per_host}: {args.topology} is not a whole number of such hosts")
    selector = {"cloud.google.com/gke-tpu-accelerator": tpu_slice.kind.label, "cloud.google.com/gke-tpu-topology": tpu_slice.shape}
    if args.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    volumes, mounts, annotations = [], [], {}
    if args.bucket:
        fuse = {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": True, "volumeAttributes": {"bucketName": args.bucket}}
        volumes, annotations = [{"name": "data", "csi": fuse}], {"gke-gcsfuse/volumes": "true"}
        mounts = [{"name": "data", "mountPath": MOUNT, "readOnly": True}]
    values = {
        "name": args.name,
        "image": args.image,
        "max_restarts": args.max_restarts,
        "hosts": tpu_slice.chips // per_host,
        "chips_per_host": per_host,
        "service_account": args.service_account,
        "node_selector": selector,
        "command": program(flags),
        "annotations": annotations,
        "mounts": mounts,
        "volumes": volumes,
    }
    return string.Template(MANIFEST.read_text()).substitute({name: json.dumps(value) for name, value in values.items()})


def xpk_command(args: argparse.Namespace, flags: list[str]) -> list[str]:
    tpu_slice = slices.parse(args.topology)
    return [
        "xpk", "workload", "create",
        f"--cluster={args.xpk}",
        f"--workload={args.name}",
        f"--tpu-type={tpu_slice.kind.api}-{tpu_slice.shape}",
        "--num-slices=1",
        f"--docker-image={args.image}",
        f"--max-restarts={args.max_restarts}",
        f"--restart-on-exit-codes={RESTARTED}",
        "--termination-grace-period-seconds=300",
        *["--spot"] * args.spot,
        f"--command={shlex.join(program(flags))}",
    ]  # fmt: skip


def _given(flags: list[str], name: str) -> str:
    """Returns the value of a flag, or "" if it is not given."""
    return next((flag.partition("=")[2] for flag in flags if flag.lstrip("-").startswith(f"{name}=")), "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

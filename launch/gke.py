"""Runs on a TPU slice of a GKE cluster: a JobSet (gke/jobset.yaml), or the same by xpk.

    docker build -f launch/gke/Dockerfile -t IMAGE . && docker push IMAGE
    python launch/gke.py NAME --image=IMAGE --topology=v5e:4x4 [--spot] -- --config=configs/ml1m.py --workdir=gs://BUCKET/ml1m
    kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME,batch.kubernetes.io/job-completion-index=0
    kubectl delete jobset NAME                                      # SIGTERM: the run saves and ends

The cluster has the JobSet controller and a node pool of the topology; --service_account is one that may write the working folder (Workload
Identity), --bucket is mounted at /data. Where a pod ends with 2, 3 or 4 (bad input, does not fit, not finite) the set has failed; after a
preemption, exit code 75 or a crash all pods start again, --max_restarts times at most, and go on from the last checkpoint. A name that is
there is refused: delete it first. --xpk=CLUSTER runs `xpk workload create` instead. --dry-run prints the command and the manifest.
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
# xpk starts again after 42 and 127 to 255; these too: an exception, a job that lost a process, stopped with all saved.
RESTARTED = "1,5,75"


def main(argv: list[str]) -> int:
    own, flags = commands.split_rest(argv)
    args = make_parser().parse_args(own)
    try:
        if not re.match("gs://.|/", _given(flags, "workdir")):
            raise InputError("--workdir=gs://BUCKET/... is missing behind `--` (or the path of a file system that all pods share)")
        text = manifest(args, flags)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = xpk_command(args, flags) if args.xpk else ["kubectl", "create", "-f", "-"]
    given = "" if args.xpk else text
    if args.dry_run:
        print(shlex.join(command) + (f" <<'EOF'\n{given}EOF" if given else ""))
        return 0
    return subprocess.run(command, input=given, text=True).returncode


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the JobSet")
    parser.add_argument("--image", required=True, help="made from launch/gke/Dockerfile")
    parser.add_argument("--topology", required=True, help="of a slice: v5e:4x4, v5p:2x4x4, ... as --mode=plan takes it")
    parser.add_argument("--chips_per_host", type=int, default=4, help="of the node pool's machines (ct5lp-hightpu-4t: 4)")
    parser.add_argument("--spot", action="store_true", help="on spot nodes, which may be taken back at any moment")
    parser.add_argument("--max_restarts", type=int, default=20)
    parser.add_argument("--service_account", default="default", help="of Kubernetes")
    parser.add_argument("--bucket", help=f"mounted read-only at {MOUNT} (Cloud Storage FUSE), for tables: --config.data.path={MOUNT}/...")
    parser.add_argument("--xpk", metavar="CLUSTER", help="by xpk, on this cluster")
    parser.add_argument("--dry-run", action="store_true", help="print, and start nothing")
    return parser


def program(flags: list[str]) -> list[str]:
    return ["python", "-m", "iam_jax.main", "--multihost", *flags]


def manifest(args: argparse.Namespace, flags: list[str]) -> str:
    """The JobSet, YAML. Raises InputError where the topology and the hosts do not fit together."""
    asked = slices.parse(args.topology)
    per_host = min(args.chips_per_host, asked.chips)
    if per_host < 1 or asked.chips % per_host:
        raise InputError(f"--chips_per_host={args.chips_per_host}: {args.topology} is no whole number of such hosts")
    selector = {"cloud.google.com/gke-tpu-accelerator": asked.kind.label, "cloud.google.com/gke-tpu-topology": asked.shape}
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
        "hosts": asked.chips // per_host,
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
    asked = slices.parse(args.topology)
    return [
        "xpk", "workload", "create",
        f"--cluster={args.xpk}",
        f"--workload={args.name}",
        f"--tpu-type={asked.kind.api}-{asked.shape}",
        "--num-slices=1",
        f"--docker-image={args.image}",
        f"--max-restarts={args.max_restarts}",
        f"--restart-on-exit-codes={RESTARTED}",
        "--termination-grace-period-seconds=300",
        *["--spot"] * args.spot,
        f"--command={shlex.join(program(flags))}",
    ]  # fmt: skip


def _given(flags: list[str], name: str) -> str:
    return next((flag.partition("=")[2] for flag in flags if flag.lstrip("-").startswith(f"{name}=")), "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

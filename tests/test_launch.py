"""The commands that the launchers run on a cluster, and when they restart: dry runs, and the real scripts with fake programs for gcloud,
srun and iam_jax. No cloud is used."""

import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
sys.path.append(str(LAUNCH))

import gke  # noqa: E402
import slices  # noqa: E402
import tpu_vm  # noqa: E402

from iam_jax.errors import InputError  # noqa: E402

RUN = ["--config=configs/demo.py", "--workdir=gs://bucket/demo", "--config.data.text={title} | {brand}"]
SHELL = [LAUNCH / "slurm.sbatch", LAUNCH / "tpu_worker.sh", ROOT / ".ci" / "run"]


def stand_in(folder: Path, name: str, text: str) -> None:
    """Writes a fake program of this name. It is found first if PATH begins with `folder`."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def wait_for(condition) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("the condition never became true")


def test_shellcheck():
    assert {path for path in LAUNCH.rglob("*") if path.suffix in (".sh", ".sbatch")} < set(SHELL)
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    checked = subprocess.run([program, *SHELL], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("name", "accelerator", "chips"),
    [("v5e:4x4", "v5litepod-16", 16), ("v6e:2x4", "v6e-8", 8), ("v5p:2x4x4", "v5p-64", 32), ("v4:2x2x1", "v4-8", 4)],
)
def test_topologies(name, accelerator, chips):
    tpu_slice = slices.parse(name)
    assert (tpu_slice.accelerator_type, tpu_slice.chips, tpu_slice.shape) == (accelerator, chips, name.partition(":")[2])


@pytest.mark.parametrize("name", ["v5e", "v5e:", "v5e:4x", "v5e:4x0", "v5e:4x4x4", "v5p:4x4", "h100:8", "v5e:ax4"])
def test_no_topologies(name):
    with pytest.raises(InputError, match=f"--topology={name}: "):
        slices.parse(name)


# ---- Cloud TPU VMs


def tpu(*argv: str) -> int:
    action, *arguments = argv
    return tpu_vm.main([action, "slice-1", "--zone=us-west4-a", *arguments])


def printed_commands(capsys) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]


def test_tpu_vm_dry_run(capsys):
    assert tpu("run", "--topology=v5e:4x4", "--spot", "--project=p", "--setup=make data", "--dry-run", "--", *RUN) == 0
    commands = printed_commands(capsys)
    assert [command[:5] for command in commands if command[0] == "gcloud"] == [
        ["gcloud", "compute", "tpus", *arguments]
        for arguments in (
            ("queued-resources", "list"),
            ("queued-resources", "delete"),
            ("queued-resources", "create"),
            ("queued-resources", "list"),
            *[("tpu-vm", command) for command in ("ssh", "scp", "ssh", "ssh", "ssh", "ssh")],
        )
    ]
    assert all({"--zone=us-west4-a", "--project=p"} < set(command) for command in commands if command[0] == "gcloud")
    create, install, start, follow, code = commands[2], *commands[-4:]
    size = ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]
    assert create[5:11] == ["slice-1", "--node-id=slice-1", *size, "--spot", "--zone=us-west4-a"]
    assert shlex.split(install[7].removeprefix("--command=")) == ["bash", "iam_jax/tpu_worker.sh", "install", "make data"]
    assert start[5:7] == ["slice-1", "--worker=all"]
    assert shlex.split(start[7].removeprefix("--command=")) == ["bash", "iam_jax/tpu_worker.sh", "start", "--multihost", *RUN]
    assert follow[6:8] == ["--worker=0", "--command=bash iam_jax/tpu_worker.sh follow"]
    assert code[6:8] == ["--worker=all", "--command=bash iam_jax/tpu_worker.sh code"]

    for action, end in {"logs": "follow", "status": "status", "stop": "stop"}.items():
        assert tpu(action, "--dry-run") == 0
        assert printed_commands(capsys)[-1][7] == f"--command=bash iam_jax/tpu_worker.sh {end}"
    assert tpu("delete", "--dry-run") == 0
    assert printed_commands(capsys) == [[*tpu_vm.TPUS, "queued-resources", "delete", "slice-1", "--force", "--quiet", "--zone=us-west4-a"]]
    assert tpu("create", "--topology=v5p:2x4x4", "--create", "reserved", "--dry-run") == 0
    assert {"--type=v5p", "--topology=2x4x4", "--runtime-version=v2-alpha-tpuv5", "--reserved"} < set(printed_commands(capsys)[2])


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--config=configs/demo.py"], "--workdir=gs://BUCKET/... is missing"),
        (["--config=configs/demo.py", "--workdir=runs/demo"], "--workdir=gs://BUCKET/... is missing"),
        (["--config=configs/none.py", "--workdir=gs://b/demo"], "--config=configs/none.py: not in commit HEAD"),
        (["--config=none:full", "--workdir=gs://b/demo"], "--config=none: not in commit HEAD"),
    ],
)
def test_tpu_vm_refuses(capsys, flags, error):
    assert tpu("run", "--topology=v5e:4x4", "--dry-run", "--", *flags) == 2
    assert f"error: {error}" in capsys.readouterr().err


def test_tpu_vm_takes_the_name_of_a_config():
    assert tpu("run", "--topology=v5e:4x4", "--dry-run", "--", "--config=amazon_toys:full", "--workdir=gs://b/toys") == 0


GCLOUD = """
line() { head -n 1 "$FAKE/$1"; sed -i 1d "$FAKE/$1"; }
echo "$3 $4 $*" >> "$FAKE/calls"
case "$3 $4 $*" in
    *" list "*) line states ;;
    *"worker.sh code"*) line codes | tr , '\\n' ;;
    *"worker.sh install"*) [[ $(line installs) != lost ]] ;;
esac
"""


@pytest.mark.parametrize(
    ("states", "installs", "codes", "result", "starts", "creates"),
    [
        # requested, waited for, finished
        (["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], [], ["0,0"], 0, 1, 1),
        # preempted while the job ran: no exit codes; requested again
        (["ACTIVE", "ACTIVE", "SUSPENDED", "PROVISIONING", "ACTIVE"], [], ["", "0,0"], 0, 2, 1),
        # preempted during the installation
        (["ACTIVE", "ACTIVE", "FAILED", "ACTIVE"], ["lost", ""], ["0,0"], 0, 1, 1),
        # not provided at once
        (["", "FAILED", "FAILED", "ACTIVE"], [], ["0,0"], 0, 1, 2),
        # a crash, the loss of a peer, an exit by SIGTERM
        (["ACTIVE"] * 8, [], ["134,1", "0,none", "75,75", "0,0"], 0, 4, 0),
        (["ACTIVE"] * 2, [], ["2,134"], 2, 1, 0),
        (["ACTIVE"] * 2, [], ["4,4"], 4, 1, 0),
        (["ACTIVE"] * 2, [], ["stopped,stopped"], 75, 1, 0),
        (["ACTIVE"] * 8, [], ["75,75"] * 4, 1, 4, 0),
    ],
)
def test_tpu_vm_restarts(monkeypatch, tmp_path, states, installs, codes, result, starts, creates):
    stand_in(tmp_path / "bin", "gcloud", GCLOUD)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setattr(tpu_vm.time, "sleep", lambda _: None)
    answers = [",".join(f"exit-code {worker}" for worker in code.split(",") if worker) for code in codes]
    for name, values in {"states": states, "installs": installs, "codes": answers}.items():
        (tmp_path / name).write_text("".join(f"{value}\n" for value in values))
    (tmp_path / "calls").write_text("")
    assert tpu("run", "--topology=v5e:4x4", "--max_restarts=3", "--", *RUN) == result
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum("worker.sh start --multihost" in call for call in calls) == starts
    assert sum(call.startswith("queued-resources create") for call in calls) == creates
    assert sum(call.startswith("tpu-vm scp") for call in calls) == sum("worker.sh install" in call for call in calls) >= starts
    assert (tmp_path / "states").read_text() == (tmp_path / "codes").read_text() == ""  # all prepared answers were used


PROGRAM = """
trap 'echo saved; exit 75' TERM
echo "$@"
while [[ ! -e $END ]]; do sleep 0.05; done
exit "$(<"$END")"
"""


def test_tpu_worker(tmp_path, monkeypatch):
    """The script of a worker, with a fake program instead of iam_jax and without an installation."""
    home, end = tmp_path / "iam_jax", tmp_path / "end"
    home.mkdir()
    shutil.copy(LAUNCH / "tpu_worker.sh", home)
    archive = ["git", "-C", ROOT, "archive", "--format=tar.gz", f"--output={home / tpu_vm.ARCHIVE}", "HEAD", "configs", "setup.py"]
    subprocess.run(archive, check=True)
    stand_in(tmp_path / "bin", "python", PROGRAM)
    stand_in(tmp_path / "bin", "python3", 'echo "$@" >> "$FAKE"\n')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(tmp_path / "installed"))
    monkeypatch.setenv("PYTHON", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("END", str(end))

    def worker(*arguments: str) -> str:
        done = subprocess.run(["bash", home / "tpu_worker.sh", *arguments], stdout=subprocess.PIPE, text=True, timeout=60)
        assert done.returncode == 0
        return done.stdout

    worker("install", "ls > listed")
    assert (home / "source" / "listed").read_text().split() == ["configs", "listed", "setup.py"]
    assert (tmp_path / "installed").read_text().endswith(f"pip install -q --python {home}/venv/bin/python {home}/source[tpu,gcs]\n")
    assert worker("code") == "exit-code none\n"
    worker("start", "--multihost", *RUN)
    assert worker("start", "--multihost", *RUN) == "already running\n"
    assert worker("install") == "running: the installation is not changed\n"
    wait_for((home / "run.log").read_text)
    assert "running" in worker("status")
    end.write_text("4")
    assert worker("code") == "exit-code 4\n"
    assert worker("follow") == f"-m iam_jax.main --multihost {' '.join(RUN)}\n"

    end.unlink()
    worker("start", "--multihost", *RUN)
    assert worker("start") == "already running\n"
    wait_for((home / "run.log").read_text)
    worker("stop")
    assert worker("code") == "exit-code stopped\n" and "saved" in worker("follow")
    assert "exit-code stopped" in worker("status")


# ---- GKE


def kubernetes(capsys, *argv: str) -> tuple[list[str], dict]:
    """The command and the manifest of a dry run."""
    assert gke.main(["demo", "--image=registry/iam_jax:1", *argv, "--dry-run", "--", *RUN]) == 0
    command, _, text = capsys.readouterr().out.partition(" <<'EOF'\n")
    return shlex.split(command), yaml.safe_load(text.removesuffix("EOF\n"))


@pytest.mark.parametrize("flags", [[], ["--spot", "--bucket=tables", "--service_account=trainer"]])
def test_gke_manifest(capsys, flags):
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    command, jobset = kubernetes(capsys, "--topology=v5e:4x4", "--max_restarts=7", *flags)
    assert command == ["kubectl", "create", "-f", "-"]
    read = JobsetV1alpha2JobSet.from_dict(jobset).to_dict()
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and read["kind"] == "JobSet"
    assert_reads(jobset, read, "")
    jobset["spec"]["failurePolicy"]["maxRestart"] = 1
    with pytest.raises(AssertionError, match=r"\.spec\.failurePolicy: no field {'maxRestart'}"):
        assert_reads(jobset, read, "")

    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    (job,) = jobset["spec"]["replicatedJobs"]
    job = job["template"]["spec"]
    (given_up,) = job["podFailurePolicy"]["rules"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert given_up["action"] == "FailJob" and given_up["onExitCodes"]["containerName"] == container["name"]
    assert (given_up["onExitCodes"]["operator"], given_up["onExitCodes"]["values"]) == ("In", [2, 3, 4])
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"  # required by a pod failure policy with exit codes
    assert job["completions"] == job["parallelism"] == 4
    assert container["command"] == ["python", "-m", "iam_jax.main", "--multihost", *RUN]
    assert container["resources"]["limits"] == {"google.com/tpu": 4} and container["image"] == "registry/iam_jax:1"
    selector = {"cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice", "cloud.google.com/gke-tpu-topology": "4x4"}
    assert pod["nodeSelector"] == (selector | {"cloud.google.com/gke-spot": "true"} if flags else selector)
    assert pod["serviceAccountName"] == ("trainer" if flags else "default")
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == (["/data"] if flags else [])


def assert_reads(manifest: object, parsed: object, path: str) -> None:
    """Asserts that the model of the schema has every field of the manifest, with the same value."""
    if isinstance(manifest, dict):
        assert manifest.keys() <= parsed.keys(), f"{path}: no field {manifest.keys() - parsed.keys()}"
        for name in manifest:
            assert_reads(manifest[name], parsed[name], f"{path}.{name}")
    elif isinstance(manifest, list):
        assert len(manifest) == len(parsed), path
        for number, (expected, actual) in enumerate(zip(manifest, parsed, strict=True)):
            assert_reads(expected, actual, f"{path}[{number}]")
    else:
        assert manifest == parsed, path


def test_gke_hosts_and_xpk(capsys):
    _, jobset = kubernetes(capsys, "--topology=v5p:2x4x4")
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == 8 and job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x4x4"
    _, jobset = kubernetes(capsys, "--topology=v5e:2x4", "--chips_per_host=8")
    assert jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"] == 1
    assert gke.main(["demo", "--image=i", "--topology=v5e:2x4", "--chips_per_host=3", "--dry-run", "--", *RUN]) == 2
    assert gke.main(["demo", "--image=i", "--topology=v5e:2x4", "--dry-run", "--", "--config=configs/demo.py"]) == 2
    assert gke.main(["demo", "--image=i", "--topology=v5e:2", "--dry-run", "--", *RUN]) == 2
    assert [line[:7] for line in capsys.readouterr().err.splitlines()] == ["error: "] * 3

    assert gke.main(["demo", "--image=i", "--topology=v5e:4x4", "--spot", "--xpk=c", "--dry-run", "--", *RUN]) == 0
    command = shlex.split(capsys.readouterr().out)
    assert command[:3] == ["xpk", "workload", "create"]
    flags = dict(flag.split("=", 1) for flag in command[3:] if "=" in flag)
    assert flags["--tpu-type"] == "v5litepod-4x4" and flags["--cluster"] == "c" and "--spot" in command
    assert flags["--restart-on-exit-codes"] == "1,5,75" and flags["--max-restarts"] == "20"
    assert shlex.split(flags["--command"]) == ["python", "-m", "iam_jax.main", "--multihost", *RUN]


def test_gke_gives_the_manifest_to_kubectl(monkeypatch, tmp_path):
    stand_in(tmp_path, "kubectl", 'echo "$*" > "$FAKE/argv"; cat > "$FAKE/given"; exit 3\n')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(tmp_path))
    assert gke.main(["demo", "--image=i", "--topology=v5e:4x4", "--", *RUN]) == 3
    assert (tmp_path / "argv").read_text() == "create -f -\n"
    assert yaml.safe_load((tmp_path / "given").read_text())["metadata"]["name"] == "demo"


# ---- Slurm


SBATCH = ["bash", str(LAUNCH / "slurm.sbatch")]


def slurm(tmp_path: Path, program: str, restarts: int = 0, tasks: int = 2) -> subprocess.Popen:
    """Starts the batch script as Slurm does, with a fake srun."""
    stand_in(tmp_path / "bin", "srun", program)
    stand_in(tmp_path / "bin", "scontrol", 'echo "$*" > "$FAKE/requeued"\n')
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "FAKE": str(tmp_path), "SLURM_JOB_ID": "77"}
    env |= {"SLURM_GPUS_ON_NODE": "2", "SLURM_NTASKS_PER_NODE": str(tasks), "SLURM_RESTART_COUNT": str(restarts)}
    return subprocess.Popen([*SBATCH, *RUN], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(0, 0, False), (2, 0, False), (3, 0, False), (4, 0, False), (75, 0, True), (1, 19, True), (134, 0, True), (75, 20, False)],
)
def test_slurm_queues_again(tmp_path, code, restarts, again):
    job = slurm(tmp_path, f"""printf '%s\\n' "$@" > "$FAKE/argv"; exit {code}\n""", restarts)
    job.communicate(timeout=60)
    assert job.returncode == code
    assert (tmp_path / "requeued").exists() == again
    if again:
        assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    argv = (tmp_path / "argv").read_text().splitlines()
    assert argv[argv.index("-m") - 1 :] == [".venv/bin/python", "-m", "iam_jax.main", "--multihost", *RUN]


@pytest.mark.parametrize(("number", "again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_saves_before_the_time_limit_and_when_cancelled(tmp_path, number, again):
    """TERM reaches the step, and the exit code of the step counts."""
    job = slurm(tmp_path, """trap 'sleep 0.2; exit 75' TERM; touch "$FAKE/ready"; while :; do sleep 0.05; done\n""")
    wait_for((tmp_path / "ready").exists)
    job.send_signal(number)
    _, error = job.communicate(timeout=60)
    assert job.returncode == 75 and "exit code 75" in error
    assert (tmp_path / "requeued").exists() == again


def test_slurm_refuses_several_gpus_per_process_and_has_a_dry_run(tmp_path):
    job = slurm(tmp_path, 'touch "$FAKE/argv"\n', tasks=1)
    assert "1 processes for 2 GPUs" in job.communicate(timeout=60)[1] and job.returncode == 2
    assert not (tmp_path / "argv").exists() and not (tmp_path / "requeued").exists()
    dry = subprocess.run([*SBATCH, "--dry-run", *RUN], capture_output=True, text=True, check=True).stdout
    assert f"-m iam_jax.main --multihost {' '.join(RUN)}\n" in dry
    for option in ("--requeue", "--signal=B:USR1@300", "--gpus-per-node=8", "--ntasks-per-node=8"):
        assert f"sbatch: {option}\n" in dry

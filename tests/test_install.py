"""The wheel, installed into an empty environment and used far from the sources."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = {
    "data.synthetic.users": 60, "data.synthetic.products": 50, "model.width": 16, "model.heads": 2, "objective.negatives": 16,
    "train.steps": 2, "train.eval_every": 2, "eval.resamples": 10, "log.progress": False,
}  # fmt: skip

pytestmark = pytest.mark.slow


def environment():
    """Without what would lead to the sources, and without compiler flags of another version of XLA. Modules are compiled when used."""
    left_out = "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "XLA_FLAGS", "PYTHONDONTWRITEBYTECODE"
    return {name: value for name, value in os.environ.items() if name not in left_out}


def run(*command, cwd, code=0):
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment(), capture_output=True, text=True)
    assert done.returncode == code, (done.stdout[-3000:], done.stderr[-3000:])
    return done


def find_python(version):
    """An interpreter of this version: the one at work, one on the path, or one of pyenv's; None if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [sys.executable, shutil.which(f"python{version}"), *sorted(pyenv.glob(f"versions/{version}.*/bin/python"))]
    for python in filter(None, found):
        asked = subprocess.run([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True)
        if asked.returncode == 0 and asked.stdout.strip() == version:  # a shim of pyenv's may lead nowhere
            return python
    return None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: building leaves files behind, and such files would get into the next wheel
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("iam_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", f"--wheel-dir={folder}", source, cwd=folder)
    shutil.rmtree(source)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_the_wheel_works_alone(version, wheel, tmp_path):
    python = find_python(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    venv, work = tmp_path / "venv", tmp_path / "work"
    work.mkdir()
    run(python, "-m", "venv", venv, cwd=work)
    run(venv / "bin" / "pip", "install", "-q", "--no-compile", wheel, cwd=work)

    program = "import iam_jax, importlib.metadata as m; print(iam_jax.__file__, m.version('iam_jax') == iam_jax.__version__)"
    where, same = run(venv / "bin" / "python", "-c", program, cwd=work).stdout.split()
    assert Path(where).is_relative_to(venv) and same == "True"
    package = Path(where).parent
    modules = {path.relative_to(ROOT) for path in (ROOT / "iam_jax").rglob("*.py")}
    assert {path.relative_to(package.parent) for path in package.rglob("*.py") if path.parent.name != "configs"} == modules
    assert (package / "py.typed").exists()
    assert {path.name for path in (package / "configs").glob("*.py")} == {path.name for path in (ROOT / "configs").glob("*.py")}

    command = venv / "bin" / "iam-jax"
    refused = run(command, "--config=dmeo", cwd=work, code=2)
    assert refused.stderr.startswith("error: config 'dmeo': unknown name, the names are ") and len(refused.stderr.splitlines()) == 1
    flags = [f"--config.{name}={value}" for name, value in SMALL.items()]
    assert "wrote runs/demo/evaluation.json" in run(command, "--config=demo", *flags, cwd=work).stdout
    results = json.loads((work / "runs" / "demo" / "evaluation.json").read_text(encoding="utf-8"))["results"]
    assert {"model", "popularity"} <= results.keys() and results["model"]["test"]["users"] > 0

    program = "import iam_jax; r = iam_jax.load('runs/demo'); print(len(r.recommend([[r.items['item'][0]]], k=3)[0]))"
    assert run(venv / "bin" / "python", "-c", program, cwd=work).stdout.split() == ["3"]

    # Ctrl-C and SIGTERM during the imports, which take seconds: nothing is there to be saved.
    program = [str(venv / "bin" / "python"), "-X", "importtime", str(command), "--config=demo", "--workdir=stopped"]
    with subprocess.Popen(program, cwd=work, env=environment(), stderr=subprocess.PIPE, text=True) as stopped:
        assert any("absl.app" in line for line in stopped.stderr)
        stopped.send_signal(signal.SIGTERM)
        rest = stopped.stderr.read()
    assert (stopped.returncode, "Traceback" in rest) == (75, False) and not (work / "stopped").exists()

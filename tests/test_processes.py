"""`--mode=evaluate` gives the same ranks for the same checkpoint on one device, on eight devices, and in two processes.

Rounding may move a target only past items whose scores are within 1e-5 of its score, relative, and only for one user in 1,000.
"""

import functools
import re
import shutil

import jax
import numpy as np
import polars as pl
import pytest
from helpers import on_devices
from jobs import two_processes
from test_main import run

from iam_jax.config import default_config, resolve
from iam_jax.data.prepare import prepare
from iam_jax.data.splits import TEST, VALIDATION
from iam_jax.devices.signals import Signals
from iam_jax.ranking.evaluate import Evaluator, evaluate_all
from iam_jax.runs.workdir import open_workdir
from iam_jax.training.loop import train
from iam_jax.training.run import make_run

USERS = 1201
KINDS = {
    # text vectors of states that are computed once per item, in several chunks
    "item": {"data.synthetic.users": USERS, "data.synthetic.products": 203, "objective.vectors": "both", "eval.chunk_items": 64}
    | {"model.item_states": "on", "train.steps": 30, "train.eval_every": 30},
    "likelihood": {"data.synthetic.users": 33, "data.synthetic.products": 23, "objective.item": 0.0, "objective.token": 1.0}
    | {"eval.ranking": "likelihood"},
}
GLOO = re.compile(r"\[Gloo\] Rank \d+ is connected to \d+ peer ranks\. Expected number of connected peer ranks is : \d+\n")
MAIN = """
import sys
from absl import app
from iam_jax import main
from iam_jax.ranking import evaluate

if "--process_id=1" in sys.argv:
    evaluate.write_atomically = main.write_atomically = None  # it is not to write
app.run(main._main, flags_parser=main._parse)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    return functools.cache(
        lambda kind: train_and_rank(tmp_path_factory.mktemp(kind) / "run", tiny | KINDS[kind] | {"eval.baselines": False})
    )


def train_and_rank(workdir, settings):
    """Trains on one device. Returns the working folder, and for every target the number of items whose score is near its own."""
    fields = default_config()
    fields.update_from_flattened_dict(settings)
    config = resolve(fields)
    run_ = make_run(config, prepare(config.data))
    open_workdir(workdir, config, run_.prepared, create=True)
    evaluator, events = Evaluator(run_.model, config, run_.prepared, run_.mesh), run_.prepared.events
    targets = np.concatenate([events.targets(label) for label in (VALIDATION, TEST)])
    with jax.set_mesh(run_.mesh):
        checkpoints = train(run_, workdir, evaluator, Signals())
        step = checkpoints.resolve("best")
        params = checkpoints.restore_params(step, run_.abstract_trained)
        checkpoints.close()
        evaluate_all(evaluator, params, step, workdir)
        if config.eval.ranking == "likelihood":
            scores = evaluator._likelihoods(params, lambda: None, events, targets)
        else:
            leading = evaluator.leading_states(params, evaluator.rows(targets))
            h_nE = evaluator.history_vectors(params, targets, leading, lambda: None, "")
            v_IE = np.asarray(evaluator.ranker.item_vectors(params, leading))
            scores = h_nE.astype(np.float64) @ v_IE.T.astype(np.float64)
    own = scores[np.arange(len(targets)), events.item[targets]][:, None]
    near = ((scores != own) & (np.abs(scores - own) <= 1e-5 * np.abs(own))).sum(1)  # items with equal texts always tie
    assert (near == 0).mean() > 0.9
    return workdir, near


@pytest.mark.parametrize(
    ("kind", "processes", "devices", "mesh"),
    [("item", 1, 8, "data=-1"), ("item", 2, 1, "fsdp=2"), ("item", 2, 2, "data=-1"), ("likelihood", 2, 2, "data=-1")],
)
def test_ranks_of_a_trained_model(trained, tmp_path, kind, processes, devices, mesh):
    workdir, near = trained(kind)
    shutil.copytree(workdir, tmp_path / "run", ignore=shutil.ignore_patterns("ranks.parquet", "evaluation.json"))
    flags = "--workdir=run", "--mode=evaluate", f"--config.mesh.{mesh}"
    if processes == 1:
        run(tmp_path, *flags, **on_devices(devices))
    else:
        outputs = two_processes(["-c", MAIN, *flags], devices, tmp_path)
        assert "wrote run/evaluation.json" in outputs[0] and not GLOO.sub("", outputs[1])
    before, after = (
        pl.read_parquet(folder / "ranks.parquet").with_columns(last=pl.col("rank") + pl.col("ties"))
        for folder in (workdir, tmp_path / "run")
    )
    columns = ["split", "user", "target"]
    assert after[columns].equals(before[columns])
    moved = np.maximum(*(np.abs((after[name] - before[name]).to_numpy()) for name in ("rank", "last")))
    assert (moved <= near).all()
    assert before["user"].filter(moved > 0).n_unique() <= max(1, before["user"].n_unique() // 1000)
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"evaluation.json", "run.json"}

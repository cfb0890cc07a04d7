"""Makes tests/data/old_workdir_COMMIT: the working folder of a tiny run, trained by an earlier commit of this repository.

    python tests/data/make_old_workdir.py COMMIT      # from the repository's root, with an environment that the commit runs in

`tests/test_faults.py` opens it with the program as it is now. Kept are config, data hashes, tokenizer, catalogue, metrics, the newest
checkpoint and evaluation.json; of the checkpoint not what nothing reads (Orbax's per-process copies of its index).
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

COMMITS = {
    "d01666a": "2026-11-25, before any field of fault handling",
    "50a2050": "2026-11-30, before the program was split into packages",
}
CONFIG = """
from iam_jax.config import default_config


def get_config():
    config = default_config()
    config.data.source, config.data.vocabulary, config.data.item_tokens = "synthetic", 270, 6
    config.data.synthetic.users, config.data.synthetic.products, config.data.synthetic.events_per_user = 40, 40, 6.0
    config.data.row_tokens, config.data.context_items = 64, 2
    config.model.schedule, config.model.width, config.model.heads, config.model.mlp = "intra inter", 8, 2, "plain"
    config.objective.vectors, config.objective.negatives = "both", 16
    config.optimizer.warmup_steps, config.optimizer.learning_rate = 0, 1e-2
    config.train.steps, config.train.batch_rows, config.train.eval_every, config.train.keep = 40, 4, 40, 1
    config.eval.ks, config.eval.resamples, config.eval.baselines = (1, 10), 20, False
    config.log.tensorboard = config.log.progress = False
    config.log.every = 20
    return config
"""


def main(commit: str) -> None:
    target = Path(__file__).parent / f"old_workdir_{commit}"
    with tempfile.TemporaryDirectory() as temporary:
        tree, run = Path(temporary) / "tree", Path(temporary) / "run"
        subprocess.run(["git", "worktree", "add", "--detach", tree, commit], check=True)
        try:
            (Path(temporary) / "config.py").write_text(CONFIG)
            command = [sys.executable, "-m", "iam_jax.main", f"--config={temporary}/config.py", f"--workdir={run}"]
            subprocess.run(command, check=True, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"})
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], check=True)
        for name in ("run.json", "ranks.parquet", ".lock"):
            (run / name).unlink()
        for path in [*run.rglob("commit_success.txt"), *run.rglob("ocdbt.process_0/manifest.ocdbt")]:
            path.unlink()
        for item in ("params", "rest"):  # copies of parts of the index, by commits of single arrays
            (index,) = run.glob(f"checkpoints/*/{item}/d/*")
            known = index.read_bytes() + index.parents[1].joinpath("manifest.ocdbt").read_bytes()
            for path in run.glob(f"checkpoints/*/{item}/ocdbt.process_0/d/*"):
                if path.stat().st_size < 4096 and path.name.encode() not in known:
                    path.unlink()
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(run, target)
    print(f"wrote {target}: {sum(path.stat().st_size for path in target.rglob('*') if path.is_file()):,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])

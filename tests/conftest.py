"""Runs before JAX is imported: selects the CPU and puts every cache into a folder that is removed after the session."""

import atexit
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec

import pytest
from absl import flags
from smoke import SMOKE

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers of pytest-xdist inherit it
    _FOLDER = tempfile.mkdtemp(prefix="iam_jax-tests-")
    atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
    os.environ["XDG_CACHE_HOME"] = _FOLDER
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{_FOLDER}/compiled"  # commands in subprocesses compile the same functions
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    # Compiling takes most of the suite's time, and what is compiled runs but a few times. XLA ends a program whose flags it does not know;
    # libtpu reads them too, and is to compile as it does outside the tests.
    fast = ["xla_backend_optimization_level=0", "xla_cpu_use_fusion_emitters=false", "xla_cpu_parallel_codegen_split_count=1"]
    fast = [f"--{flag}" for flag in fast] if find_spec("libtpu") is None else []
    for chosen in (fast, *([flag for flag in fast if flag != unknown] for unknown in fast)):
        more = {"XLA_FLAGS": " ".join([*filter(None, [os.environ.get("XLA_FLAGS")]), *chosen])}
        if not subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=os.environ | more, capture_output=True).returncode:
            os.environ |= more
            break
flags.FLAGS.mark_as_parsed()  # grain reads absl flags

# With --dist=loadfile a file stays in one worker, as its fixtures and compiled programs do. The longest come first, so that no worker is
# left with one at the end.
LONGEST = (
    "test_range_attention", "test_local", "test_faults", "test_step", "test_sharding", "test_offline", "test_processes", "test_lora",
    "test_decoder", "test_main", "test_train", "test_finetune", "test_item_level", "test_docs", "test_benchmarks", "test_ranking",
    "test_item_rows", "test_artefact", "test_beam", "test_relations", "test_reproduce", "test_recommender", "test_candidates",
    "test_kernels", "test_storage", "test_objectives", "test_api",
)  # fmt: skip


def pytest_collection_finish():
    gc.freeze()  # what the imports left is looked through no more: collections are shorter
    gc.set_threshold(20_000, 20, 50)  # collections are fewer: tracing makes many objects, and few cycles of them


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # xdist's own order is by the number of tests
        config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)  # before the marks are used to choose
def pytest_collection_modifyitems(items):
    names = set(SMOKE.values())
    for item in items:
        if names & {f"{item.path.name}::{name}" for name in (item.name, getattr(item, "originalname", None))}:
            item.add_marker(pytest.mark.smoke)
    place = {name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True, scope="module")
def short_collections():
    """What a file leaves (compiled programs, mostly) is looked through no more in the next ones, of which some collect often."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_signal_handlers():
    """A test that changed them would change the programs that later tests start: an ignored signal stays ignored there."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.fixture(scope="session")
def tiny() -> dict[str, object]:
    """Config fields by dotted name for a run that compiles in seconds and trains in milliseconds."""
    return {
        "data.source": "synthetic",
        "data.synthetic.users": 60,
        "data.synthetic.products": 50,
        "data.synthetic.events_per_user": 6.0,
        "data.vocabulary": 300,
        "data.item_tokens": 6,
        "data.row_tokens": 64,
        "data.context_items": 2,
        "model.schedule": "intra inter",
        "model.width": 16,
        "model.heads": 2,
        "objective.negatives": 16,
        "optimizer.warmup_steps": 0,
        "optimizer.learning_rate": 1e-2,
        "train.steps": 6,
        "train.batch_rows": 4,
        "train.eval_every": 4,
        "train.save_every": 1000,
        "eval.resamples": 20,
        "log.every": 2,
        "log.progress": False,
    }


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict:
    """A Hugging Face folder for every tiny model (pretrained_models.py), by name. Tests must not write to them."""
    from pretrained_models import MODELS, write_model

    return {name: write_model(tmp_path_factory.mktemp("models") / name, values) for name, values in MODELS.items()}


SHOP_RUN = {"data.source": "table", "data.path": "tables", "objective.vectors": "both", "score.part_users": 16, "train.steps": 30}


@pytest.fixture(scope="session")
def shop():
    """The tables of a tiny synthetic shop."""
    from iam_jax.config import SyntheticConfig
    from iam_jax.data.sources import synthetic

    return synthetic.from_config(SyntheticConfig(users=60, products=50, events_per_user=6.0)).tables()


@pytest.fixture(scope="session")
def shop_run(tmp_path_factory, tiny, shop):
    """A folder with a trained run, `run`, whose data are gone (`moved`): scoring has the working folder and its own tables."""
    from test_main import config_text, run

    folder = tmp_path_factory.mktemp("shop")
    fields = {name: value for name, value in tiny.items() if "synthetic" not in name} | SHOP_RUN
    (folder / "run.py").write_text(config_text(fields))
    (folder / "tables").mkdir()
    shop.interactions.write_parquet(folder / "tables" / "interactions.parquet")
    shop.items.write_csv(folder / "tables" / "items.csv")
    run(folder, "--config=run.py", "--workdir=run")
    (folder / "tables").rename(folder / "moved")
    return folder

"""The exported folder, read by the code of docs/serving.md in a process that cannot import iam_jax: the evaluator's own lists."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import polars as pl
import pytest
from forks import python
from helpers import make_config, on_devices, optimized_jit, random_params
from test_evaluate import POLL, history_of
from test_main import config_text, run

from iam_jax import config as config_lib
from iam_jax.data.prepare import prepare
from iam_jax.data.splits import TEST
from iam_jax.errors import InputError
from iam_jax.model import make_model
from iam_jax.ranking.evaluate import Evaluator
from iam_jax.ranking.scores import top_items
from iam_jax.runs.checkpoint import Checkpoints
from iam_jax.serving import artefact
from iam_jax.training.run import make_run

PAGE = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
(CODE,) = re.findall(r"```python\n(.+?)```", PAGE, re.S)


ON_EIGHT = """
import jax
from helpers import make_config, random_params, tiny_data
from iam_jax.serving import artefact
from iam_jax.config import MeshConfig
from iam_jax.model import make_model
from iam_jax.devices.mesh import make_mesh

config, prepared = make_config(), tiny_data(items=9)
params = random_params(make_model(config, prepared.catalogue.vocabulary, 9, 4))
with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
    print(artefact.export_function(config, prepared.catalogue, params, 16, 3)[0].nr_devices)
"""


def service(folder: Path, calls: list) -> list:
    """What the page's code answers, in a process of its own."""
    block = "import sys\nsys.modules['iam_jax'] = None  # an import fails\n"
    rest = "import sys\nscorer = Scorer(sys.argv[1])\njson.dump([scorer.recommend(call) for call in json.load(sys.stdin)], sys.stdout)\n"
    (folder.parent / "service.py").write_text(block + CODE + rest)
    command = [sys.executable, folder.parent / "service.py", folder]
    done = subprocess.run(command, input=json.dumps(calls), capture_output=True, text=True, env=os.environ, cwd=folder.parent, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(("users", "items", "k", "chunk"), [(3, 40, 7, 13), (5, 40, 40, 6), (2, 9, 9, 100), (1, 33, 1, 8)])
def test_top_items_are_those_of_a_sort(users, items, k, chunk):
    rng = np.random.default_rng(0)
    h, v = (rng.integers(-3, 4, (n, 3)).astype(np.float32) for n in (users, items))  # many ties
    seen = np.array([[*rng.permutation(items)[:4], -1, 0] for _ in range(users)], np.int32)
    found, scores = (np.asarray(x) for x in jax.jit(top_items, static_argnums=3, static_argnames="chunk")(h, v, seen, k, chunk=chunk)[:2])
    for x in range(users):
        left = [i for i in range(items) if i not in seen[x]]
        best = sorted(left, key=lambda i, x=x: (-(h[x] @ v[i]), i))[:k]
        assert found[x].tolist() == best + [-1] * (k - len(best))
        assert scores[x].tolist() == [float(h[x] @ v[i]) for i in best] + [-np.inf] * (k - len(best))


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A run with everything a history may have: prompt, separator, suffix, vectors from table and text."""
    folder = tmp_path_factory.mktemp("artefact")
    more = {"data.prompt": "bought: ", "data.separator": "- ", "data.suffix": "next: ", "objective.vectors": "both"}
    (folder / "run.py").write_text(config_text(tiny | more))
    run(folder, "--config=run.py", "--workdir=run")
    out, _ = run(folder, "--workdir=run", "--mode=export", "--format=stablehlo", "--step=last", "--output=out")
    assert "50 items, lists of 50, rows of 64 slots" in out and "wrote out, from step 6" in out
    return folder


@pytest.fixture(scope="module")
def evaluator(trained):
    config = config_lib.resolve(config_lib.get_config(str(trained / "run")))
    prepared = prepare(config.data, None)
    this = make_run(config, prepared)
    checkpoints = Checkpoints(trained / "run", config.train.keep, config.selection, read_only=True)
    params = checkpoints.restore_params(6, this.abstract_trained)
    checkpoints.close()
    return Evaluator(this.model, config, prepared, this.mesh), params


def test_a_service_gives_the_evaluators_lists(trained, evaluator):
    evaluator, params = evaluator
    prepared = evaluator.prepared
    events, ids = prepared.events, prepared.events.item_ids.tolist()
    targets = events.targets(TEST)[:40]
    h, v = evaluator.history_vectors(params, targets, None, **POLL), np.asarray(evaluator.ranker.item_vectors(params, None))
    scores = h @ v.T
    histories = [history_of(events, target) for target in targets]
    named = [[ids[i] for i in history] for history in histories]
    tokens = np.array([prepared.catalogue.item_lengths[history].sum() for history in histories])
    assert (tokens > 64).any() and (tokens < 40).any()  # histories that are cut, and rows that are filled up
    lists, single = service(trained / "out", [named, named[:1]])
    for row, history in enumerate(histories):
        scores[row, history] = -np.inf
        left = len(ids) - len(set(history))
        expected = np.argsort(-scores[row], kind="stable")[:left]
        assert [item for item, _ in lists[row]] == [ids[i] for i in expected]
        np.testing.assert_allclose([score for _, score in lists[row]], scores[row, expected], rtol=1e-5, atol=1e-5)
    assert [item for item, _ in single[0]] == [item for item, _ in lists[0]]


def test_a_service_gives_the_lists_of_offline_scoring(trained, evaluator):
    events = evaluator[0].prepared.events
    ids = events.item_ids.tolist()
    histories = [[ids[i] for i in events.item[begin:end]] for begin, end in itertools.pairwise(events.offsets)]
    table = pl.DataFrame({"user": [f"{n:03}" for n in range(len(histories))], "item": histories})
    table = table.with_columns(timestamp=pl.int_ranges(pl.col("item").list.len())).explode("item", "timestamp")
    table.write_csv(trained / "users.csv")
    run(trained, "--workdir=run", "--mode=score", "--users=users.csv", "--top_k=50", "--step=last", "--output=lists")
    found = pl.concat([pl.read_parquet(path) for path in sorted((trained / "lists").glob("*.parquet"))])
    expected = found.group_by("user", maintain_order=True).agg("item", "score")
    lists = service(trained / "out", [histories])[0]
    assert len(lists) == len(expected) > 50
    for pairs, (_, items, scores) in zip(lists, expected.iter_rows(), strict=True):
        assert [item for item, _ in pairs] == items
        assert np.abs(np.array([score for _, score in pairs]) - scores).max() <= 1e-5


def test_an_item_that_is_known_by_its_text_only(trained, evaluator):
    """The same text under another name: the same scores, but for what is seen."""
    prepared = evaluator[0].prepared
    ids, catalogue = prepared.events.item_ids.tolist(), prepared.catalogue
    facts = json.loads((trained / "out" / "artefact.json").read_text())
    from tokenizers import Tokenizer

    begin, end = catalogue.offsets[:-3] + len(facts["separator"]), catalogue.offsets[1:-2] - 1
    texts = [catalogue.tokens[b:e].tolist() for b, e in zip(begin, end, strict=True)]
    tokenizer = Tokenizer.from_str(catalogue.tokenizer_json)
    # An item whose tokens are those of their own text: a title that was cut may end inside a word.
    n = next(n for n, tokens in enumerate(texts) if n != 7 and tokenizer.encode(tokenizer.decode(tokens).strip()).ids == tokens)
    text = tokenizer.decode(texts[n])
    named, by_text, empty = service(trained / "out", [[[ids[7], ids[n]]], [[ids[7], {"text": text}]], [[]]])
    assert {item for item, _ in by_text[0]} - {item for item, _ in named[0]} == {ids[n]}
    without = [pair for pair in by_text[0] if pair[0] != ids[n]]
    assert [item for item, _ in without] == [item for item, _ in named[0]]
    np.testing.assert_allclose([x for _, x in without], [x for _, x in named[0]], rtol=1e-5, atol=1e-5)
    assert len(empty[0]) == len(ids)  # there is a prompt


def test_the_folder_holds_what_is_read_and_for_every_platform(trained):
    function = jax.export.deserialize(bytearray((trained / "out" / "scorer.stablehlo").read_bytes()))
    assert function.platforms == ("cpu", "cuda", "tpu")
    assert set(re.findall(r"custom_call @(\w+)", function.mlir_module())) <= {"shape_assertion"}  # of the sizes; no kernels
    files = {path.name for path in (trained / "out").iterdir()}
    assert files == {"scorer.stablehlo", "weights.safetensors", "items.safetensors", "items.json", "tokenizer.json", "artefact.json"}
    from safetensors.numpy import load_file

    names = set(load_file(trained / "out" / "weights.safetensors"))
    assert {"item_vectors", "state_DE", "decoder.embedding_VD"} <= names
    assert not names & {"table_IE", "text_DE", "text_norm.scale"}  # they are in the item vectors


@pytest.mark.parametrize(
    "model",
    [
        {"schedule": "full", "positions": "learned", "norm": "layer", "mlp": "plain"},
        {"schedule": "intra_both (inter full)*2", "inter_positions": "item", "self_key": True, "kv_heads": 1, "dtype": "bfloat16"},
    ],
)
def test_every_kind_of_layer_exports_as_the_model_computes(model):
    from helpers import tiny_data

    config, prepared = make_config(model=model), tiny_data(items=9)
    made = make_model(config, prepared.catalogue.vocabulary, 9, 4)
    params = random_params(made)
    function, names = artefact.export_function(config, prepared.catalogue, params, 16, 3)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    v = np.random.default_rng(0).standard_normal((9, 16)).astype(np.float32)
    token, group = np.zeros((2, 24), np.int32), np.full((2, 24), -1, np.int32)
    token[:, :5], group[:, :5] = [[1, 2, 12, 5, 12], [7, 12, 3, 3, 12]], [[1, 1, 1, 2, 2], [1, 1, 2, 2, 2]]
    weights = {name: leaves[name] for name in names} | {"item_vectors": v}
    items, scores = optimized_jit(function.call)(weights, token, group, np.full((2, 1), -1, np.int32))
    rows = {"token": token[:, :5], "user": np.ones((2, 5), int), "group": group[:, :5], "position": np.tile(np.arange(5), (2, 1))}
    recommender = made.bind(params)
    expected = np.asarray(recommender.project(recommender.states(rows)[:, -1])) @ v.T
    tolerance = 1e-5 if config.model.dtype == "float32" else 0.1
    np.testing.assert_allclose(scores, -np.sort(-expected, axis=1)[:, :3], rtol=tolerance, atol=tolerance)
    if config.model.dtype == "float32":
        assert items.tolist() == np.argsort(-expected, axis=1)[:, :3].tolist()


def test_what_cannot_be_exported_is_said_in_one_line(trained):
    for flags, said in (
        (["--output=out"], "out: exists already, and an export does not overwrite"),
        ([], "--mode=export writes a stand-alone folder: --output=DIR is missing"),
        (["--output=new", "--step=7"], "7"),
    ):
        _, err = run(trained, "--workdir=run", "--mode=export", "--format=stablehlo", *flags, code=2)
        assert err.count("\n") == 1 and said in err
    assert not (trained / "new").exists()
    with pytest.raises(InputError, match=r"but the model has none \(config\.objective\.item = 0\)"):
        artefact.check(make_config(objective={"item": 0.0, "token": 1.0}, eval={"ranking": "likelihood"}))


def test_what_is_exported_on_a_mesh_runs_on_one_device():
    env = os.environ | on_devices(8)
    env["PYTHONPATH"] = os.pathsep.join([*map(str, (Path(__file__).parents[1], Path(__file__).parent)), env.get("PYTHONPATH", "")])
    done = subprocess.run([python(), "-c", ON_EIGHT], capture_output=True, text=True, env=env, timeout=200)
    assert done.stdout == "1\n", done.stderr[-3000:]


def test_a_service_reads_as_many_events_as_the_scorer(trained, evaluator):
    """data.last_n: the model reads the last events, all of them are seen."""
    facts = json.loads((trained / "out" / "artefact.json").read_text())
    assert facts["last_n"] == evaluator[0].config.data.last_n == 0 and facts["filter_seen"]
    shutil.copytree(trained / "out", trained / "short")
    (trained / "short" / "artefact.json").write_text(json.dumps(facts | {"last_n": 2}))
    history = evaluator[0].prepared.events.item_ids.tolist()[:5]
    (found,), (expected,) = service(trained / "short", [[history]])[0], service(trained / "out", [[history[-2:]]])[0]
    expected = [pair for pair in expected if pair[0] not in history]
    assert [item for item, _ in found] == [item for item, _ in expected] and len(found) == 45
    np.testing.assert_allclose([x for _, x in found], [x for _, x in expected], rtol=1e-5, atol=1e-6)


def test_what_is_seen_and_histories_without_a_token(trained, evaluator):
    """eval.filter_seen as the folder says; without prompt and suffix an empty history scores nothing, as in evaluation."""
    facts = json.loads((trained / "out" / "artefact.json").read_text())
    shutil.copytree(trained / "out", trained / "all")
    (trained / "all" / "artefact.json").write_text(json.dumps(facts | {"filter_seen": False, "prompt": [], "suffix": []}))
    ids = evaluator[0].prepared.events.item_ids.tolist()
    every, empty = service(trained / "all", [[ids[:5], []]])[0]
    assert sorted(item for item, _ in every) == sorted(ids) and len({score for _, score in every}) > 40
    assert empty == [[item, 0.0] for item in ids]
    config = evaluator[0].config
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, filter_seen=False))
    assert not artefact._facts(config, evaluator[0].prepared.catalogue, 5, 1)["filter_seen"]


def test_vectors_that_are_not_finite_are_not_exported(evaluator, tmp_path):
    evaluator, params = evaluator
    table = next(name for name in params if name.startswith("table"))
    with pytest.raises(FloatingPointError, match="an item's vector is not finite"):
        artefact.export(evaluator.ranker, {**params, table: params[table].at[3, 0].set(np.nan)}, evaluator.prepared, 6, tmp_path / "out")
    assert not any(tmp_path.iterdir())

"""From a model folder and two tables to a fine-tuned recommender with whole commands, and the files of such a run."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import polars as pl
import pytest
from pretrained_models import MODELS, flat, weights, write_model
from safetensors.numpy import load_file, save_file
from test_main import assert_same, config_text, run
from tokenizers import Tokenizer, models, pre_tokenizers

from iam_jax.config import default_config, get_config, resolve
from iam_jax.data.candidates import candidate_rows
from iam_jax.data.prepare import prepare
from iam_jax.data.splits import TEST, VALIDATION
from iam_jax.devices.signals import Signals
from iam_jax.errors import InputError
from iam_jax.model import pretrained
from iam_jax.model.lora import merge
from iam_jax.model.parameters import join, select
from iam_jax.ranking.evaluate import Evaluator
from iam_jax.ranking.likelihood import log_likelihoods
from iam_jax.serving.offline import ScoreRequest, score
from iam_jax.training import loop as train_lib
from iam_jax.training.loop import train
from iam_jax.training.run import make_run
from iam_jax.training.step import init_state

ITEMS, USERS = 12, 20
FIELDS = {
    "data.source": "table",
    "data.path": "tables",
    "data.text": "{title}",
    "data.tokenizer": "pretrained",
    "data.prompt": "t5 t6",
    "data.separator": "t7",
    "data.suffix": "t8",
    "data.item_tokens": 3,
    "data.row_tokens": 40,
    "data.context_items": 1,
    "model.pretrained": "model",
    "model.schedule": "full +intra inter",
    "model.dropout": 0.0,
    "model.lora.rank": 2,
    "model.lora.targets": "query|down",
    "objective.token": 0.5,
    "optimizer.warmup_steps": 0,
    "optimizer.learning_rate": 1e-2,
    "train.steps": 5,
    "train.batch_rows": 4,
    "train.eval_every": 3,
    "eval.resamples": 10,
    "eval.batch_rows": 4,
    "log.progress": False,
}
OWN = ["query_lora_DL", "query_lora_LNH", "down_lora_FL", "down_lora_LD"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A LLaMA of two layers whose tokens are words, and a shop."""
    folder = tmp_path_factory.mktemp("finetune")
    values = MODELS["llama3"]
    write_model(folder / "model", values)
    tokenizer = Tokenizer(models.WordLevel({f"t{k}": k for k in range(values["vocab_size"])}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    rng = np.random.default_rng(0)
    titles = [" ".join(f"t{k}" for k in rng.integers(10, 37, rng.integers(1, 5))) for _ in range(ITEMS)]
    titles[1] = titles[2] = titles[0]
    (folder / "tables").mkdir()
    (folder / "tables" / "items.csv").write_text("item,title\n" + "".join(f"i{n},{title}\n" for n, title in enumerate(titles)))
    events = [(u, rng.integers(ITEMS), t) for u in range(USERS) for t in range(rng.integers(3, 8))]
    (folder / "tables" / "interactions.csv").write_text("user,item,timestamp\n" + "".join(f"u{u},i{i},{t}\n" for u, i, t in events))
    (folder / "run.py").write_text(config_text(FIELDS))
    return folder


@pytest.fixture
def make(folder, monkeypatch):
    monkeypatch.chdir(folder)

    def make(**changes):
        config = default_config()
        config.update_from_flattened_dict(FIELDS | {name.replace("__", "."): value for name, value in changes.items()})
        resolved = pretrained.configure(resolve(config))
        return make_run(resolved, prepare(resolved.data, pretrained.vocabulary(resolved)))

    return make


def evaluator_of(run):
    return Evaluator(run.model, run.config, run.prepared, run.mesh)


@pytest.fixture(scope="session")
def trained(folder):
    return run(folder, "--config=run.py", "--workdir=lora")


def test_a_checkpoint_holds_the_trained_parameters(folder, trained, make):
    out, err = trained
    assert err == "" and "wrote lora/evaluation.json" in out
    run_ = make()
    saved = flat(ocp.StandardCheckpointer().restore(folder / "lora" / "checkpoints" / "5" / "params"))
    new = [name for name in flat(run_.model.shapes()) if name not in pretrained.names(run_.config)]
    assert saved.keys() == set(new)
    kinds = {name.rpartition(".")[2] for name in new if ".0_0." in name or ".2_0." in name}
    assert kinds == set(OWN) and any(".1_0." in name for name in new)  # all parameters of the inserted layer are trained
    others = {name for name in new if "decoder.blocks" not in name}
    assert others == {"decoder.boundary_D", "output_boundary_D", "state_DE", "table_IE"}
    moments = jax.tree.leaves(ocp.StandardCheckpointer().restore(folder / "lora" / "checkpoints" / "5" / "rest"))
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in saved.values()) + 2  # two moments of Adam and two counts
    start = flat(init_state(run_)["params"])
    assert start.keys() == saved.keys() and all((np.asarray(start[name]) != saved[name]).any() for name in saved)
    both = sum(x.size for x in saved.values()), sum(x.size for x in jax.tree.leaves(run_.frozen))
    assert f"{both[0]:,} parameters trained, {both[1]:,} frozen" in out


def test_frozen_parameters_are_those_of_the_folder_before_and_after(folder, make, tmp_path):
    """Bitwise; parameters that the config selects are trained."""
    run_ = make(train__trained="final_norm|embedding")
    seen = []

    def recording(run):
        step = make_train_step(run)

        def recorded(state, batch, items, number, frozen):
            seen.append(frozen)
            return step(state, batch, items, number, frozen)

        return recorded

    make_train_step = train_lib.make_train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lib, "make_train_step", recording)
        with jax.set_mesh(run_.mesh):
            checkpoints = train(run_, tmp_path, evaluator_of(run_), Signals())
            params = checkpoints.restore_params(5, run_.abstract_trained)
    names = pretrained.names(run_.config)
    pretrained_params = pretrained.load(run_.config, select(run_.model.shapes(), lambda name: name in names))
    assert len(seen) == 5
    for frozen in seen:
        assert flat(frozen).keys() == names.keys() - {"decoder.final_norm.scale", "decoder.embedding_VD"}
        for name, x in flat(frozen).items():
            np.testing.assert_array_equal(x, flat(pretrained_params)[name])
    for name in ("decoder.final_norm.scale", "decoder.embedding_VD"):
        assert (np.asarray(flat(params)[name]) != flat(pretrained_params)[name]).any()


def test_what_is_frozen(make):
    def frozen(**changes):
        return make(**changes).frozen_names

    names = set(pretrained.names(make().config))
    assert frozen() == frozen(train__frozen=".") == names
    full = {"model__lora__rank": 0}
    assert not frozen(**full)
    assert frozen(**full, train__frozen=r"embedding|norm\.scale") == {name for name in names if "embedding" in name or "norm.scale" in name}
    assert frozen(train__trained=r"mlp\.") == {name for name in names if "mlp." not in name}
    assert frozen(**full, objective__token=0.0) == {"output_VD"}  # nothing reads it
    for changes, message in (
        ({"train__frozen": "layers"}, r"config\.train\.frozen = 'layers' matches none of the pretrained parameters, such as decoder\."),
        ({"train__trained": "lora"}, r"config\.train\.trained = 'lora' matches none of the pretrained"),
    ):
        with pytest.raises(InputError, match=message):
            frozen(**changes)


def test_base_weights_in_bfloat16(make):
    """Frozen parameters are rounded, trained ones are not."""
    exact, rounded = make(), make(model__frozen_dtype="bfloat16", train__trained="final_norm")
    assert {str(x.dtype) for x in jax.tree.leaves(rounded.frozen)} == {"bfloat16"}
    for name, x in flat(rounded.frozen).items():
        np.testing.assert_array_equal(x, np.asarray(flat(exact.frozen)[name]).astype("bfloat16"))
    state = init_state(rounded)
    assert {str(x.dtype) for x in jax.tree.leaves(state["params"])} == {"float32"}
    rows = [rounded.rows[row] for row in range(2)]
    batch = rounded.finish({name: np.stack([row[name] for row in rows]) for name in rows[0]})
    state, metrics = train_lib.make_train_step(rounded)(state, batch, rounded.items, np.int32(0), rounded.frozen)
    assert np.isfinite(metrics["gradient_norm"]) and {str(x.dtype) for x in jax.tree.leaves(state["params"])} == {"float32"}


def test_the_boundary_starts_as_the_mean_of_the_tokens(make):
    for changes in ({}, {"model__lora__rank": 0}):
        run_ = make(**changes)
        state = init_state(run_)
        all_params = flat(join(state["params"], run_.frozen))
        for boundary, rows in (("decoder.boundary_D", "decoder.embedding_VD"), ("output_boundary_D", "output_VD")):
            np.testing.assert_allclose(all_params[boundary], np.asarray(all_params[rows], np.float64).mean(0), rtol=1e-5, atol=1e-6)


def test_interrupted_and_whole_are_the_same(folder, trained):
    run(folder, "--config=run.py", "--workdir=parts", "--config.train.steps=3")
    run(folder, "--config=run.py", "--workdir=parts")
    for item in ("params", "rest"):
        assert_same(*(ocp.StandardCheckpointer().restore(folder / name / "checkpoints" / "5" / item) for name in ("lora", "parts")))
    assert (folder / "lora" / "evaluation.json").read_text() == (folder / "parts" / "evaluation.json").read_text()


def test_export_is_the_merged_model(folder, trained, make, tmp_path):
    out, _ = run(folder, "--workdir=lora", "--mode=export", "--step=last", f"--output={tmp_path / 'out'}")
    assert "inter" in out and f"wrote {tmp_path / 'out'}, from step 5" in out  # a note says that transformers computes other attention
    run_ = make()
    saved = ocp.StandardCheckpointer().restore(folder / "lora" / "checkpoints" / "5" / "params")
    merged = flat(merge(join(saved, run_.frozen), run_.config.model.lora))
    config = pretrained.configure(
        dataclasses.replace(run_.config, model=dataclasses.replace(run_.config.model, pretrained=str(tmp_path / "out")))
    )
    again = flat(pretrained.load(config, select(run_.model.shapes(), lambda name: name in pretrained.names(config))))
    assert len(again) == len(pretrained.names(config))
    for name, x in again.items():
        np.testing.assert_array_equal(x, merged[name])
    changed = {name for name in again if (np.asarray(again[name]) != flat(run_.frozen)[name]).any()}
    assert changed == {f"decoder.blocks.{block}.{name}" for block in ("0_0", "2_0") for name in ("attention.query_DNH", "mlp.down_FD")}
    _, err = run(folder, "--workdir=lora", "--mode=export", code=2)
    assert err == "error: --mode=export writes a Hugging Face folder: --output=DIR is missing\n"
    for output, message in (("run.py", "exists already"), ("run.py/out", "run.py cannot be written to"), ("tables", "exists already")):
        out, err = run(folder, "--workdir=lora", "--mode=export", f"--output={output}", code=2)
        assert err.count("\n") == 1 and message in err and not out  # before any other work


def test_the_initial_model_and_the_losses(folder, make):
    """train.steps = 0: the base model with ordinary attention; the expected losses come from all log-probabilities."""
    flags = ["--config.train.steps=0", "--config.model.schedule=full*2", "--config.model.lora.rank=0"]
    out, _ = run(folder, "--config=run.py", "--workdir=base", *flags)
    assert "step 0: validation" in out
    run_ = make(train__steps=0, model__schedule="full*2", model__lora__rank=0)
    params = init_state(run_)["params"]
    assert_same(ocp.StandardCheckpointer().restore(folder / "base" / "checkpoints" / "0" / "params"), params)
    evaluation = json.loads((folder / "base" / "evaluation.json").read_text())
    events, catalogue = run_.prepared.events, run_.prepared.catalogue
    model = run_.model.bind(params)
    states = jax.jit(lambda row: run_.model.bind(params).states(row))
    for label, split in ((VALIDATION, "validation"), (TEST, "test")):
        losses = []
        for target in events.targets(label):
            begin = events.offsets[np.searchsorted(events.offsets, target, side="right") - 1]
            item = events.item[target : target + 1]
            room = run_.config.data.row_tokens
            row = candidate_rows(catalogue, [events.item[begin:target]], [item], room, room)  # of one shape: one program
            x_TD = np.asarray(states(row))[0]
            logits = np.concatenate([x_TD @ np.asarray(part).T for part in model.output_embedding()], axis=1)
            log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            at = np.flatnonzero(row["candidate"][0])
            losses += [(-log_p[t - 1, row["token"][0, t]], t == at[-1]) for t in at]
        loss, boundary = map(np.array, zip(*losses, strict=True))
        got = evaluation["results"]["model"][split]
        np.testing.assert_allclose([got["token_loss"], got["text_loss"]], [loss.mean(), loss[~boundary].mean()], rtol=1e-5)


def test_ranking_by_likelihood(make):
    """Ranks of a text generator without item vectors equal those from scoring each candidate alone."""
    run_ = make(objective__item=0.0, eval__ranking="likelihood", eval__length_normalized=True, data__item_tokens=2)
    assert not any("DE" in name or "IE" in name for name in flat(run_.model.shapes()))
    params = join(init_state(run_)["params"], run_.frozen)
    events, catalogue = run_.prepared.events, run_.prepared.catalogue
    targets = events.targets(TEST)
    rank, ties = evaluator_of(run_).rank(params, targets)
    titles = [tuple(catalogue.tokens[begin:end]) for begin, end in zip(catalogue.offsets, catalogue.offsets[1:], strict=False)][:ITEMS]
    alone = jax.jit(lambda params, row: log_likelihoods(run_.model.bind(params), row, 1, normalize=True)[0, 0])
    for n, target in enumerate(targets):
        begin = events.offsets[np.searchsorted(events.offsets, target, side="right") - 1]
        history, own = events.item[begin:target], events.item[target]
        most = 40 - int(catalogue.item_lengths.max())
        scores = np.array(
            [
                alone(params, candidate_rows(catalogue, [history], [np.array([item])], most + int(catalogue.item_lengths[item]), 40))
                for item in range(ITEMS)
            ]
        )
        others = [item for item in range(ITEMS) if item != own and item not in history]
        equal = [item for item in others if titles[item] == titles[own]]
        above = [item for item in others if item not in equal and scores[item] > scores[own]]
        assert (rank[n], ties[n]) == (1 + len(above), len(equal))
    assert ties.any() and not ties.all()


def test_another_ranking_is_another_selection(folder, trained):
    """A run that selects steps by item scores cannot continue with likelihoods. It can be evaluated with them; the protocol records it."""
    flags = ["--workdir=lora", "--config.eval.ranking=likelihood", "--config.eval.length_normalized=true"]
    _, err = run(folder, *flags, "--config.train.steps=6", code=2)
    assert "config.eval.metric = 'length-normalized likelihood ndcg@10' was not measured when" in err
    before = (folder / "lora" / "evaluation.json").read_text()
    run(folder, *flags, "--mode=evaluate", "--step=last")
    evaluation = json.loads((folder / "lora" / "evaluation.json").read_text())
    assert evaluation["protocol"]["ranking"] == "length-normalized likelihood"
    run(folder, "--workdir=lora", "--mode=evaluate")
    assert (folder / "lora" / "evaluation.json").read_text() == before
    assert json.loads(before)["protocol"]["ranking"] == "item"


def test_adapters_with_dropout_are_not_shared_unasked(make):
    """Occurrences of an item share one dropout mask if its states are computed once."""
    fields = {"model__schedule": "intra*2 +inter", "data__suffix": "", "data__row_tokens": 60}
    kinds = [type(make(**fields, model__lora__dropout=rate).finish).__name__ for rate in (0.0, 0.5)]
    assert kinds == ["DistinctItems", "function"]
    assert type(make(**fields, model__lora__dropout=0.5, model__item_states="on").finish).__name__ == "DistinctItems"


# ---- errors


def broken(folder, tmp_path, change):
    copy = tmp_path / "model"
    shutil.copytree(folder / "model", copy)
    change(copy)
    return f"--config.model.pretrained={copy}"


def truncate(copy):
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(1000)


def integers(copy):
    write_model(copy, MODELS["llama3"], dtype=np.int32)


def a_shard_less(copy):
    (copy / "model.safetensors").unlink()
    write_model(copy, MODELS["llama3"], files=3)
    (copy / "model-00002-of-00003.safetensors").unlink()


def other_tokenizer(copy):
    Tokenizer(models.WordLevel({f"t{k}": k for k in range(50)}, unk_token="t0")).save(str(copy / "tokenizer.json"))


def unsupported(copy):
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(values | {"model_type": "mixtral"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, "model.safetensors"),
        (integers, "I32"),
        (a_shard_less, "model-00002-of-00003.safetensors"),
        (other_tokenizer, "tokenizer of another vocabulary size: its token ids need 50 rows, the model's embedding has 37"),
        (unsupported, "mixtral"),
        (lambda copy: (copy / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
        (lambda copy: (copy / "model.safetensors").unlink(), "model.safetensors"),
        (shutil.rmtree, "no such folder"),
    ],
    ids=["truncated", "wrong type", "missing shard", "tokenizer", "unsupported", "no tokenizer", "no weights", "no folder"],
)
def test_bad_folders_are_one_line(folder, tmp_path, change, message):
    _, err = run(folder, "--config=run.py", f"--workdir={tmp_path / 'w'}", broken(folder, tmp_path, change), code=2)
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err and str(tmp_path / "model") in err
    assert not (tmp_path / "w").exists()


def test_a_working_folder_knows_its_model(folder, trained, tmp_path):
    """A working folder identifies its model by content: the model may move, and another model at the same path is refused."""
    moved = broken(folder, tmp_path, lambda copy: None)
    run(folder, "--workdir=lora", "--mode=evaluate", moved)
    other = write_model(tmp_path / "other", MODELS["llama3"], {name: x + 1e-3 for name, x in weights(MODELS["llama3"]).items()})
    shutil.copy(folder / "model" / "tokenizer.json", other)
    _, err = run(folder, "--workdir=lora", "--mode=evaluate", f"--config.model.pretrained={other}", code=2)
    assert "lora was made from another pretrained model: its pretrained_sha256 is " in err


def test_scoring_reads_the_model_folder_for_frozen_parameters_only(folder, trained, tmp_path, monkeypatch):
    """Lists of all items contain the test targets at their ranks, so the prompt, the suffix and the frozen parameters are used."""
    monkeypatch.chdir(folder)
    run(folder, "--workdir=lora", "--mode=evaluate")
    ranks = pl.read_parquet("lora/ranks.parquet").filter(pl.col("split") == "test")
    events = pl.read_csv("tables/interactions.csv", schema_overrides={"user": pl.String, "item": pl.String})
    events.join(ranks.select("user", "timestamp"), on=["user", "timestamp"], how="anti").write_parquet(tmp_path / "users.parquet")

    def lists(workdir, output, **changes):
        config = get_config(workdir)
        config.update_from_flattened_dict(changes)
        request = ScoreRequest(output=str(tmp_path / output), users=str(tmp_path / "users.parquet"))
        score(Path(workdir), resolve(config), request, saved=True)
        return pl.read_parquet(tmp_path / output / "part-00000-of-00001.parquet")

    found = ranks.join(lists("lora", "lists"), left_on=["user", "target"], right_on=["user", "item"], suffix="_found")
    assert 5 < len(found) and (found["rank"] <= found["rank_found"]).all()
    assert (found["rank_found"] <= found["rank"] + found["ties"]).all()
    shutil.copytree("model", tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    save_file({name: x + 1 for name, x in tensors.items()}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(InputError, match="another pretrained model: its pretrained_sha256"):
        lists("lora", "none", **{"model.pretrained": str(tmp_path / "other")})
    with pytest.raises(InputError, match="absent"):
        lists("lora", "none", **{"model.pretrained": "absent"})
    run(folder, "--config=run.py", "--workdir=whole", "--config.model.lora.rank=0", "--config.train.steps=2")
    assert len(lists("whole", "whole", **{"model.pretrained": "absent"})) > 20  # everything is in the checkpoint

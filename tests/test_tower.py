"""A frozen pretrained tower before the mark: its states are computed once per catalogue, and nothing changes by it."""

import dataclasses

import jax
import numpy as np
import polars as pl
import pytest
from helpers import metrics_lines, stack, tiny_data
from pretrained_models import config_of
from test_main import config_text, run

import iam_jax
from iam_jax.data.item_rows import DistinctItems
from iam_jax.errors import InputError
from iam_jax.model import pretrained
from iam_jax.model.parameters import join
from iam_jax.ranking.tower import tower_states
from iam_jax.training import objectives
from iam_jax.training.run import make_run
from iam_jax.training.step import init_state


@pytest.fixture(scope="module")
def tiny_run(folders):
    """A run with a constant tower of the tiny LLaMA model, and without its states."""
    config = config_of(folders["llama3"], "intra*2 | inter", row_tokens=24, item_width=8, item_heads=2, item_input="table")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, context_items=1, row_items=12),
        objective=dataclasses.replace(config.objective, vectors="both", softmax="full"),
        train=dataclasses.replace(config.train, frozen="."),
        eval=dataclasses.replace(config.eval, batch_rows=2),
        log=dataclasses.replace(config.log, progress=False),
    )
    config = pretrained.configure(config)
    assert config.constant_tower
    return make_run(config, tiny_data(users=30, items=40, vocabulary=pretrained.vocabulary(config).size + 1, prompt=2))


def states_of(this, cache, poll=lambda: None, frozen=None):
    config, catalogue = this.config, this.prepared.catalogue
    return tower_states(config, catalogue, this.model, this.mesh, frozen or (lambda: this.frozen), "hash", cache, poll)


class Interrupted(Exception):
    pass


def test_states_are_kept_and_an_interrupted_computation_continues(tiny_run, tmp_path, capsys):
    whole = states_of(tiny_run, tmp_path / "whole")
    assert whole.shape == (42, tiny_run.config.model.width) and whole[:41].any(1).all()
    calls = []

    def poll():
        calls.append(0)
        if len(calls) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        states_of(tiny_run, tmp_path / "parts", poll)
    (parts,) = (tmp_path / "parts").iterdir()
    assert parts.name.endswith(".parts") and len(list(parts.iterdir())) == 2
    (parts / "000000.npy").rename(parts / "kept")
    marked = np.load(parts / "kept") + 1  # what was computed is not computed again
    np.save(parts / "000000.npy", marked)
    continued = states_of(tiny_run, tmp_path / "parts")
    changed = (continued != whole).any(1)
    assert 0 < changed.sum() == len(marked) < 42
    np.testing.assert_array_equal(continued[~changed], whole[~changed])
    assert [path.name.endswith(".parts") for path in (tmp_path / "parts").iterdir()] == [False]

    def never():
        raise AssertionError("the parameters are not needed")

    capsys.readouterr()
    np.testing.assert_array_equal(states_of(tiny_run, tmp_path / "whole", frozen=never), whole)
    assert "states of 40 items after 2 frozen layers: read from the cache" in capsys.readouterr().out


def test_losses_and_gradients_are_those_of_a_tower_computed_in_place(tiny_run, tmp_path):
    this, config = tiny_run.with_tower(np.array(states_of(tiny_run, tmp_path))), tiny_run.config
    with jax.set_mesh(this.mesh):
        trained = init_state(this)["params"]
    plain = stack([this.rows[row] for row in range(4)])
    constant, in_place = this.finish(plain), DistinctItems(this.rows, 4, row_tokens=24)(plain)
    assert "leading" not in constant and (constant["slot"] == plain["item"]).all()

    def results(items, batch):
        def loss(trained):
            return objectives.losses(this.model.bind(join(trained, this.frozen)), config, items, batch, None, None)["item"]

        return jax.jit(jax.value_and_grad(loss))(trained)

    (loss, grads), (expected, expected_grads) = results(this.items, constant), results(tiny_run.items, in_place)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert not any(name.startswith("blocks.0") for name in trained.get("decoder", {}))
    assert "boundary_D" not in trained.get("decoder", {})  # the boundary token's embedding is a part of the tower


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"frozen": "auto"}},
        {"train": {"frozen": ".", "trained": "mlp"}},
        {"model": {"dropout": 0.1}},
        {"model": {"lora": iam_jax.config.LoraConfig(rank=2)}},
        {"model": {"schedule": "intra*2 +intra | inter"}},
    ],
)
def test_a_tower_with_trained_or_random_parts_is_not_constant(tiny_run, change):
    config = tiny_run.config
    for section, fields in change.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})
    assert not config.constant_tower and config.softmax == "full"


def test_the_softmax_is_exact_by_default(tiny_run):
    objective = dataclasses.replace(tiny_run.config.objective, softmax="auto")
    assert dataclasses.replace(tiny_run.config, objective=objective).softmax == "full"


def test_whole_commands(tiny, folders, tmp_path):
    """Training with the states computed and read from the cache is bitwise the same; scoring and the API read them, too."""
    fields = tiny | {
        "data.tokenizer": "pretrained", "model.pretrained": str(folders["llama3"]), "model.schedule": "intra*2 | inter",
        "train.frozen": ".", "model.item_width": 8, "model.item_heads": 2, "model.item_input": "table", "model.dropout": 0.0,
        "model.item_dropout": 0.2, "objective.vectors": "both", "data.row_items": 16,
    }  # fmt: skip
    fields = {name: value for name, value in fields.items() if name not in ("model.width", "model.heads")}
    (tmp_path / "run.py").write_text(config_text(fields | {"data.cache": str(tmp_path / "cache")}))
    for name, how in (("first", "computed"), ("second", "read from the cache")):
        out, _ = run(tmp_path, "--config=run.py", f"--workdir={name}")
        assert f"2 frozen layers: {how}" in out
    assert metrics_lines(tmp_path / "first") == metrics_lines(tmp_path / "second")
    assert (tmp_path / "first" / "ranks.parquet").read_bytes() == (tmp_path / "second" / "ranks.parquet").read_bytes()
    recommender = iam_jax.load(tmp_path / "first", step="last")
    ids = recommender.item_ids.to_list()
    histories = [ids[:3], ids[4:9]]
    table = pl.DataFrame({"user": ["a", "b"], "item": histories}).with_columns(timestamp=pl.int_ranges(pl.col("item").list.len()))
    table.explode("item", "timestamp").write_csv(tmp_path / "users.csv")
    out, _ = run(tmp_path, "--workdir=first", "--mode=score", "--users=users.csv", "--top_k=9", "--step=last", "--output=lists")
    assert "read from the cache" in out
    scored = pl.concat([pl.read_parquet(path) for path in sorted((tmp_path / "lists").glob("*.parquet"))])
    expected = scored.group_by("user", maintain_order=True).agg("item", "score").rows()
    lists = recommender.recommend(histories, k=9)
    assert [[one.item for one in mine] for mine in lists] == [items for _, items, _ in expected]
    assert [[one.score for one in mine] for mine in lists] == [scores for _, _, scores in expected]
    assert np.isfinite(recommender.user_vectors([[{"text": "the blue one"}, ids[0]]])).all()
    with pytest.raises(InputError, match="has 1 layers without the inserted ones"):
        iam_jax.train(tmp_path / "run.py", tmp_path / "third", {"model.schedule": "intra | inter"})

"""The config: every invalid value is refused by name, and a working folder keeps its config."""

import copy
import dataclasses
import functools
import json

import ml_collections
import pytest

from iam_jax.config import CONFIG_FILE, Config, check_same_run, default_config, get_config, resolve, to_json
from iam_jax.errors import InputError

ID = {"data.tokenizer": "id"}
TEXT = {"objective.vectors": "text"}
NAN = float("nan")


def configured(changes=()):
    """The defaults with `changes` by dotted name, without checks of their types."""
    tree = copy.deepcopy(dataclasses.asdict(Config()))
    for name, value in {"data.path": "tables", **dict(changes)}.items():
        section = tree
        *path, last = name.split(".")
        for part in path:
            section = section[part]
        section[last] = value
    return ml_collections.ConfigDict(tree)


def made(**changes):
    return resolve(configured({name.replace("__", "."): value for name, value in changes.items()}))


def cases(fields, *values, **others):
    others = {name.replace("__", "."): value for name, value in others.items()}
    return [(field, value, others) for field in fields.split() for value in values]


WRONG = [
    # choices
    *cases(
        "data.source data.untitled data.split data.vector_transform model.mlp model.activation model.norm model.positions "
        "model.inter_positions model.rope_scaling model.dtype model.frozen_dtype objective.vectors objective.text_layers objective.softmax "
        "eval.metric eval.ranking",
        "other",
        "",
    ),
    # sizes and counts
    *cases("data.k_core data.last_n data.synthetic.seed model.kv_heads model.head_size model.mlp_width model.max_positions", -1),
    *cases("model.rope_original", 0, -1),
    *cases("model.lora.rank", -1),
    *cases("objective.negatives train.patience train.seed eval.validation_users eval.seed", -1),
    *cases("optimizer.warmup_steps optimizer.decay_steps", -1),
    *cases("data.item_tokens data.context_items model.width model.heads objective.refresh_steps objective.chunk", 0, -1),
    *cases("train.steps", -1),
    *cases("optimizer.accumulate train.batch_rows train.eval_every train.save_every train.keep", 0, -1),
    *cases("mesh.fsdp mesh.tensor", 0, -1, -2),
    *cases("train.skip_limit", -1),
    *cases("mesh.hang_minutes", -1.0, NAN),
    *cases("mesh.heartbeat_seconds", 0),
    *cases("log.profile", "5", "5:5", "5:2", "a:b", "1:2:3"),
    *cases("eval.batch_rows eval.chunk_items eval.resamples log.every", 0, -1),
    *cases("data.vocabulary", 0, 255),
    *cases("data.row_tokens", 0, 1),
    *cases("data.vector_size", 0, -1),
    *cases("data.synthetic.users data.synthetic.products", 0, 9),
    *cases("data.synthetic.events_per_user", 2.9, NAN),
    *cases("mesh.data", 0, -2),
    *cases("train.seed", 2**31),
    # numbers
    *cases("objective.token train.max_minutes optimizer.weight_decay optimizer.clip_norm optimizer.final_scale", -0.1, NAN),
    *cases("model.rope_factor model.rope_low model.lora.alpha", 0.0, -1.0, NAN),
    *cases("model.lora.dropout", -0.1, 1.0, NAN),
    *cases("model.rope_high", 1.0, 0.5),
    *cases("objective.item", 0.0, -1.0, NAN),
    *cases("objective.item", -1.0, eval__ranking="likelihood", objective__token=1.0),
    *cases("objective.token", 0.0, eval__ranking="likelihood"),
    *cases("model.norm_epsilon model.rope_theta optimizer.learning_rate optimizer.epsilon", 0.0, -1.0, NAN),
    *cases("model.dropout optimizer.b1 optimizer.b2 data.unseen_items", -0.1, 1.0, NAN),
    *cases("objective.negatives_power", -0.1, 2.1, NAN),
    # cut-offs
    *cases("eval.ks", (), (0,), (5, -1), ("10",), (1.5,)),
    *cases("eval.metric", "ndcg@10", eval__ks=(1, 5)),
    *cases("eval.metric", "recall@10", "ndcg"),
    # fields that depend on each other
    *cases("data.path", "", data__source="table"),
    *cases("data.category", "", data__source="amazon", data__path=""),
    *cases("data.t1", "", data__split="temporal", data__t2="5"),
    *cases("data.t2", "", data__split="temporal", data__t1="5"),
    *cases("data.prompt data.separator data.suffix", "a shop:", data__tokenizer="id"),
    *cases("data.tokenizer", "bpe", "tokenizer.json", model__pretrained="folder"),
    *cases("model.pretrained", "", data__tokenizer="pretrained"),
    *cases("model.lora.rank", 4),
    *cases("train.frozen", "embedding"),
    *cases("train.trained", "embedding"),
    *cases("train.trained", "embedding", model__pretrained="folder", data__tokenizer="pretrained"),
    *cases("model.frozen_dtype", "bfloat16"),
    *cases("model.frozen_dtype", "bfloat16", model__pretrained="folder", data__tokenizer="pretrained"),
    *cases("objective.softmax", "cached", objective__vectors="text", objective__item=0.0, objective__token=1.0, eval__ranking="likelihood"),
    *cases("model.lora.targets train.frozen train.trained", "(", model__pretrained="folder", data__tokenizer="pretrained"),
    *cases("data.row_tokens", 512, model__positions="learned", model__max_positions=256),
    *cases("data.shuffled_titles", True, data__tokenizer="id"),
    *cases("data.vector_transform", "center", "whiten"),
    *cases("data.vectors", "tfidf+"),
    *cases("model.heads", 3, model__width=64),
    *cases("model.kv_heads", 3, 8, model__heads=4),
    *cases("model.head_size", 15),
    *cases("model.inter_positions", "item", model__positions="learned"),
    *cases("model.tie_items", True),
    *cases("model.tie_items", True, data__tokenizer="id", objective__vectors="both"),
    *cases("objective.vectors", "text", "both", data__tokenizer="id"),
    *cases("objective.token", 1.0, data__tokenizer="id"),
    *cases("objective.token", 1.0, model__schedule="(intra_both inter)*2"),
    *cases("objective.text_layers", "leading", objective__vectors="text", model__schedule="(full inter)*2"),
    *cases("objective.softmax", "cached"),
    *cases("objective.negatives", 0, objective__vectors="text", objective__softmax="cached"),
    *cases("optimizer.decay_steps", 50, 100, optimizer__warmup_steps=100),
    *cases("train.batch_rows", 16, optimizer__accumulate=3),
    *cases("model.schedule", "", "intra outer", "full*0"),
]


@pytest.mark.parametrize("field,value,others", WRONG, ids=[f"{f}={v!r}" + "+" * len(o) for f, v, o in WRONG])
def test_wrong_values_are_named(field, value, others):
    with pytest.raises(InputError, match=rf"^config\.{field} ") as caught:
        resolve(configured({**others, field: value}))
    assert "\n" not in str(caught.value)
    if field != "model.schedule":
        assert str(caught.value).startswith(f"config.{field} = {value!r}: ")


RIGHT = [
    {"mesh.data": -1},
    {"mesh.data": 2, "mesh.fsdp": -1},
    {"mesh.data": 2, "mesh.tensor": -1, "mesh.hang_minutes": 0.0},
    {"log.profile": "5:10", "train.skip_limit": 0},
    {"data.source": "synthetic", "data.path": ""},
    {"data.source": "ml1m", "data.path": ""},
    {"data.source": "amazon", "data.path": "folder"},
    {"data.source": "amazon", "data.path": "", "data.category": "2014/Toys_and_Games"},
    {"data.split": "temporal", "data.t1": "5", "data.t2": "9"},
    {"data.vocabulary": 256, "data.row_tokens": 2, "data.item_tokens": 1, "data.context_items": 1},
    {"model.heads": 3, "model.head_size": 20},
    {"model.heads": 8, "model.kv_heads": 2},
    {"model.positions": "learned", "model.head_size": 15},
    {"model.dropout": 0.0, "optimizer.b1": 0.0, "objective.negatives_power": 2.0},
    ID | {"model.tie_items": True},
    {"data.vectors": "tfidf+vectors.parquet"},
    {"data.vectors": "tfidf", "data.vector_size": 1, "data.vector_transform": "whiten"},
    {"data.shuffled_titles": True, "data.prompt": "a shop:"},
    TEXT | {"objective.softmax": "cached"},
    TEXT | {"objective.text_layers": "all", "model.schedule": "full*2"},
    {"objective.token": 1.0, "model.schedule": "intra inter full"},
    {"model.schedule": "intra_both inter"},
    {"optimizer.decay_steps": 0, "optimizer.warmup_steps": 100},
    {"optimizer.decay_steps": 101, "optimizer.warmup_steps": 100},
    {"optimizer.accumulate": 4, "train.batch_rows": 8},
    {"eval.ks": (3,), "eval.metric": "mrr@3"},
    {"train.seed": 2**31 - 1, "optimizer.clip_norm": 0.0},
]


@pytest.mark.parametrize("changes", RIGHT, ids=str)
def test_values_at_the_edge_are_accepted(changes):
    config = resolve(configured(changes))
    for name, value in changes.items():
        assert functools.reduce(getattr, name.split("."), config) == value


@pytest.mark.parametrize(
    "field,value",
    [
        ("train.steps", 10.0),
        ("train.steps", "10"),
        ("train.steps", True),
        ("train.steps", None),
        ("data.text", 5),
        ("data.text", None),
        ("eval.filter_seen", 1),
        ("eval.filter_seen", "true"),
        ("model.dropout", "0.1"),
        ("model.dropout", True),
        ("eval.ks", 10),
        ("eval.ks", "10"),
        ("data.synthetic.users", 10.5),
    ],
)
def test_wrong_types_are_named(field, value):
    with pytest.raises(InputError, match=rf"^config\.{field} must be of type \w+, not {value!r}$"):
        resolve(configured({field: value}))


def test_sections():
    tree = configured().to_dict()
    with pytest.raises(InputError, match=r"^config\.train must be a section, not 5"):
        resolve(ml_collections.ConfigDict(tree | {"train": 5}))
    del tree["train"]["steps"]
    with pytest.raises(InputError, match=r"^config\.train\.steps is missing"):
        resolve(ml_collections.ConfigDict(tree))
    del tree["train"]
    with pytest.raises(InputError, match=r"^config\.train is missing"):
        resolve(ml_collections.ConfigDict(tree))


@pytest.mark.parametrize("field", ["data.pth", "train.step", "optimiser", "data.synthetic.user"])
def test_unknown_keys_are_named(field):
    with pytest.raises(InputError, match=rf"^config\.{field} is not a config field; .* has "):
        resolve(configured({field: 1}))
    # A config file cannot set an unknown field, so a misspelt field is found in the file itself.
    config = default_config()
    *path, last = field.split(".")
    for part in path:
        config = config[part]
    with pytest.raises(AttributeError):
        setattr(config, last, 1)


def test_defaults_and_conversions():
    config = default_config()
    config.data.path = "tables"
    config.model.dropout = 0
    assert resolve(config) == dataclasses.replace(
        Config(),
        data=dataclasses.replace(Config().data, path="tables"),
        model=dataclasses.replace(Config().model, dropout=0.0),
    )
    assert type(resolve(config).model.dropout) is float
    assert resolve(configured({"eval.ks": [1, 10]})).eval.ks == (1, 10)
    with pytest.raises(InputError, match=r"config\.data\.path"):
        resolve(default_config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve(config).data.path = "other"


def test_what_auto_means():
    assert made().softmax == "full" and not made().uses_text
    assert made(objective__vectors="text").softmax == made(objective__vectors="both").softmax == "sampled"
    assert made(objective__vectors="both").uses_text
    assert made(objective__vectors="text", objective__softmax="full").softmax == "full"
    assert made(model__schedule="full*3").schedule.relations == ("full",) * 3


def test_round_trip_through_a_working_folder(tmp_path):
    changes = {"eval.ks": (1, 10), "optimizer.learning_rate": 1e-7, "data.text": "é {title}", "data.synthetic.users": 50}
    config = resolve(configured(changes))
    (tmp_path / CONFIG_FILE).write_text(to_json(config), encoding="utf-8")
    saved = get_config(str(tmp_path))
    assert resolve(saved) == config and isinstance(saved.eval.ks, tuple)
    check_same_run(tmp_path, config)
    saved.train.steps = 7  # overrides of the command line apply to it, and only to existing fields
    assert resolve(saved).train.steps == 7
    with pytest.raises(AttributeError):
        saved.train.stesp = 7


def test_another_config_is_refused_by_its_keys(tmp_path):
    check_same_run(tmp_path, made())  # there is no config yet
    (tmp_path / CONFIG_FILE).write_text(to_json(made()))
    for same in (
        {"eval.ks": (1, 10), "eval.batch_rows": 7, "eval.filter_seen": False, "eval.seed": 5},
        {"log.every": 3, "log.tensorboard": False},
        {"mesh.data": 2, "mesh.fsdp": 4},
        {"train.steps": 20000},
        {"data.path": "moved", "data.cache": "elsewhere"},
        {"train.skip_limit": 0, "mesh.hang_minutes": 1.0, "log.profile": "1:2"},
        {"train.max_minutes": 5.0, "train.keep": 9, "model.scan": False, "model.remat": True},
    ):
        check_same_run(tmp_path, resolve(configured(same)))
    for field, there, here in [
        ("train.steps", 10000, 9999),
        ("train.seed", 0, 1),
        ("train.batch_rows", 16, 32),
        ("data.k_core", 0, 5),
        ("data.synthetic.seed", 0, 1),
        ("data.context_items", 4, 5),
        ("model.width", 64, 128),
        ("objective.item", 1.0, 2.0),
        ("optimizer.learning_rate", 1e-3, 1e-4),
    ]:
        with pytest.raises(InputError) as caught:
            check_same_run(tmp_path, resolve(configured({field: here, "eval.batch_rows": 7})))
        assert str(caught.value) == (
            f"{tmp_path} belongs to a run with another config: {field} ({there!r} there, {here!r} here). Choose another --workdir."
        )
    with pytest.raises(InputError) as caught:
        check_same_run(tmp_path, made(train__steps=5, data__last_n=3, model__heads=8))
    assert "data.last_n (0 there, 3 here); model.heads (4 there, 8 here); train.steps (10000 there, 5 here)" in str(caught.value)


def test_the_path_of_vectors_may_differ(tmp_path):
    """data.json has the hash of their content."""
    (tmp_path / CONFIG_FILE).write_text(to_json(made(data__vectors="there.parquet")))
    check_same_run(tmp_path, made(data__vectors="moved/here.parquet"))
    for other in ("", "tfidf"):
        with pytest.raises(InputError, match=rf"another config: data\.vectors \('there\.parquet' there, '{other}' here\)\. "):
            check_same_run(tmp_path, made(data__vectors=other))
    with pytest.raises(InputError, match=r"another config: data\.vector_transform \('none' there, 'whiten' here\)\. "):
        check_same_run(tmp_path, made(data__vectors="there.parquet", data__vector_transform="whiten"))


def test_a_config_of_another_version(tmp_path):
    tree = json.loads(to_json(made(model__heads=8)))
    del tree["model"]["qk_norm"], tree["data"]["synthetic"], tree["train"]["skip_limit"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(tree))
    assert resolve(get_config(str(tmp_path))) == made(model__heads=8)  # fields that were added later have their defaults
    check_same_run(tmp_path, made(model__heads=8, train__skip_limit=0))
    with pytest.raises(InputError, match=r"another config: model\.qk_norm \(False there, True here\)\. "):
        check_same_run(tmp_path, made(model__heads=8, model__qk_norm=True))
    for section, value in (("model", 1), ("eval", {"a": 1})):  # fields that this version does not have
        (tmp_path / CONFIG_FILE).write_text(json.dumps(tree | {section: tree[section] | {"gone": value}}))
        for read in (lambda: get_config(str(tmp_path)), lambda: check_same_run(tmp_path, made())):
            with pytest.raises(InputError, match=rf"config\.json: .* no config fields {section}\.gone(\.a)?$"):
                read()
    (tmp_path / CONFIG_FILE).write_text(json.dumps(tree | {"model": 3}))
    with pytest.raises(InputError, match=r"no config fields model$"):
        get_config(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]"])
def test_a_broken_saved_config(tmp_path, content):
    (tmp_path / CONFIG_FILE).write_bytes(content)
    for read in (lambda: get_config(str(tmp_path)), lambda: check_same_run(tmp_path, made())):
        with pytest.raises(InputError, match=r"config\.json: cannot read the config of a run"):
            read()
    with pytest.raises(InputError, match=r"nowhere/config\.json: cannot read the config of a run \(No such file"):
        get_config(str(tmp_path / "nowhere"))

"""Data sets, models and search spaces of launch/reproduce.py: each as one table that can be read from top to bottom."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import commands

from iam_jax.config import flatten
from iam_jax.schedule import parse_schedule

Fields = Mapping[str, Any]  # dotted name -> value
NONE: Fields = MappingProxyType({})
UNITS = ("epochs", "minutes")
VALIDATIONS = 8  # in each trial and each run, at equal distances
ROUNDING = 8  # the number of steps is a multiple of it, so that the validations are at equal distances


class Budget(NamedTuple):
    """The length of a run or of a trial."""

    unit: str  # epochs | minutes (of training steps)
    amount: float

    @property
    def name(self) -> str:
        return f"{self.amount:g}{self.unit}"

    def __str__(self) -> str:
        return f"{self.amount:g} {self.unit if self.amount != 1 else self.unit[:-1]}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The flags of launch/reproduce.py."""

    folder: Path
    data: tuple[str, ...]
    models: tuple[str, ...]
    seeds: tuple[int, ...]
    trials: int
    comparisons: dict[Budget, Budget]  # budget of a run -> budget of a trial
    paths: dict[str, str] = dataclasses.field(default_factory=dict)  # data set -> data.path
    vectors: dict[str, str] = dataclasses.field(default_factory=dict)  # data set -> file of data.vectors of hybrid_minilm, hybrid_both
    pretrained: str = ""  # model.pretrained of hybrid_smollm
    rest: tuple[str, ...] = ()  # flags of every training command
    dry_run: bool = False

    @property
    def calibrations(self) -> int:
        """The number of calibrations: two if minutes are converted into steps, since other load can disturb one."""
        budgets = {*self.comparisons, *self.comparisons.values()}
        return 2 if any(budget.unit == "minutes" for budget in budgets) else 1

    def available(self, data: str, model: str) -> bool:
        """Whether the files that the model needs were given."""
        needs = MODELS[model].needs
        return not needs or bool(self.pretrained if needs == "pretrained" else self.vectors.get(data))


# ---- data sets

# The same for all models of a data set, because it is part of the protocol.
CONTEXT_ITEMS = 10
# The base of the item-level models, on top of the config of the data set.
ITEM_LEVEL = {
    "data.vocabulary": 512, "data.row_items": 64, "model.width": 64, "model.heads": 1, "model.dropout": 0.5, "objective.chunk": 128,
    "objective.text_layers": "leading", "optimizer.learning_rate": 3e-3, "optimizer.weight_decay": 0.3, "train.batch_rows": 16,
}  # fmt: skip
SMALL = {"train.batch_rows": 2}  # 86 steps an epoch; with 16 rows it has 11, and the hybrid is worse on validation
LONG = {"data.row_items": 256, "train.batch_rows": 8, "model.dropout": 0.2, "optimizer.weight_decay": 0.1}  # for long histories


class DataSet(NamedTuple):
    config: str  # config of the models over text
    repeats: int  # of "intra inter" in the schedules of the models over text
    row_tokens: int = 64  # data.row_tokens of SASRec
    item_level: Fields = NONE  # what differs from ITEM_LEVEL
    sasrec: Fields = NONE  # what differs from the config of SASRec


DATASETS = {
    "toys": DataSet("amazon_toys.py:iam", 1),
    "scientific": DataSet("amazon_scientific.py:iam", 1, 64, SMALL, SMALL),
    "arts": DataSet("amazon_arts.py", 2),
    "grocery": DataSet("amazon_grocery.py", 2),
    "cellphones": DataSet("amazon_cellphones.py", 2),
    "ml1m": DataSet("ml1m.py:iam", 2, 256, LONG, {"model.dropout": 0.2}),  # the published dropout of SASRec on ML-1M
    "demo": DataSet("demo.py", 1, item_level={"data.vector_size": 32}),  # its titles have few words
}
# Fields that SASRec and the tower take from the config of a data set: the protocol and the sizes of evaluation.
SHARED = (
    *(f"data.{field}" for field in ("source", "path", "category", "untitled", "k_core", "last_n", "split", "t1", "t2", "text")),
    "eval.validation_users", "eval.batch_rows",
)  # fmt: skip


# ---- search spaces


class LogUniform(NamedTuple):
    """All values between the two, on a logarithmic scale. They are rounded to three significant digits."""

    low: float
    high: float


# field -> LogUniform, or the list of its values. Several fields in one name get the same value. The first trial of every model is the
# setting of its config, so it must be in the space.
RATE, DROPOUT = LogUniform(5e-4, 1e-2), (0.2, 0.3, 0.4, 0.5, 0.6)
TOKEN_SPACE = {
    "optimizer.learning_rate": RATE,
    "model.dropout": (0.0, 0.1, 0.2, 0.3, 0.4),
    "optimizer.weight_decay": (0.0, 0.01, 0.05, 0.1, 0.3),
}
ITEM_SPACE = {
    "optimizer.learning_rate": RATE,
    "model.dropout": DROPOUT,
    "optimizer.weight_decay": (0.01, 0.03, 0.1, 0.3, 1.0),
}
VECTOR_SPACE = {**ITEM_SPACE, "data.vector_transform": ("none", "whiten")}
TOWER_SPACE = {name.replace("model.dropout", "model.item_dropout"): values for name, values in ITEM_SPACE.items()}
SASREC_SPACE = {
    "optimizer.learning_rate": RATE,
    "model.dropout": DROPOUT,
    "optimizer.weight_decay": (0.0, 0.01, 0.1, 0.3),
    "model.schedule": ("full*1", "full*2"),
    "model.width model.mlp_width": (64, 128),
}
# Fields of spaces that change the time of a step: each of their settings has its own calibration.
STRUCTURE = ("model.schedule", "model.width model.mlp_width")


# ---- models


class Model(NamedTuple):
    title: str  # in the table
    kind: str  # token | item | sasrec | tower
    space: dict[str, Any]
    schedule: Any = ""  # token: a function of the number of repeats; item: the schedule
    changes: Fields = NONE  # other fields
    needs: str = ""  # vectors | pretrained: the flag that the model needs


TFIDF = {"data.vectors": "tfidf"}
BOTH = {"objective.vectors": "both", "model.item_input": "table", "model.content_input": "vector"}
# A row is compared with ordinary attention (the first), the best baseline, and SASRec.
MODELS = {
    "ordinary": Model("ordinary attention", "token", TOKEN_SPACE, lambda n: f"full*{2 * n}"),
    "iam": Model("item-aware attention", "token", TOKEN_SPACE, lambda n: f"(intra inter)*{n}"),
    "no_intra": Model("without intra", "token", TOKEN_SPACE, lambda n: f"(full inter)*{n}"),
    "no_inter": Model("without inter", "token", TOKEN_SPACE, lambda n: f"(intra full)*{n}"),
    "hatllm": Model(
        "HatLLM's order",
        "token",
        TOKEN_SPACE,
        lambda n: "intra full inter" if n == 1 else f"intra*{n // 2} full*{2 * n - n // 2 * 2} inter*{n // 2}",
    ),
    "sasrec": Model("SASRec", "sasrec", SASREC_SPACE),
    "identity": Model("identity only", "item", ITEM_SPACE, "| inter*2", {"objective.vectors": "table", "model.item_input": "table"}),
    "content": Model(
        "content only (tf-idf)", "item", ITEM_SPACE, "| inter*2", {**TFIDF, "objective.vectors": "text", "model.content_input": "vector"}
    ),
    "hybrid": Model("hybrid (tf-idf)", "item", ITEM_SPACE, "| inter*2", {**TFIDF, **BOTH}),
    "hybrid_full": Model("hybrid (tf-idf), ordinary attention", "item", ITEM_SPACE, "| full*2", {**TFIDF, **BOTH}),
    "hybrid_text": Model("hybrid (text from scratch)", "item", ITEM_SPACE, "intra*2 | inter*2", BOTH),
    "hybrid_minilm": Model("hybrid (MiniLM)", "item", VECTOR_SPACE, "| inter*2", BOTH, needs="vectors"),
    "hybrid_both": Model(
        "hybrid (tf-idf and MiniLM)",
        "item",
        ITEM_SPACE,
        "| inter*2",
        {"data.vectors": "tfidf+", "data.vector_transform": "center", **BOTH},
        needs="vectors",
    ),
    "hybrid_smollm": Model("hybrid (SmolLM2)", "tower", TOWER_SPACE, needs="pretrained"),
}
BASE, SASREC = "ordinary", "sasrec"  # every row is compared with these two
FUSION = "transitions"  # eval.fusion of every run: the baseline whose score is added, with a weight that is chosen on validation


def config_of(plan: Plan, data: str, model: str) -> tuple[str, dict[str, Any]]:
    """Returns the config file of a model on a data set, and the fields that differ from it, without those of the search space."""
    file, changes, _ = _config_of(plan, data, model)
    fields = {field for name in MODELS[model].space for field in name.split()}
    return file, {name: value for name, value in changes.items() if name not in fields}


def own_setting(plan: Plan, data: str, model: str) -> dict[str, Any]:
    """Returns {name in the search space: value of the config}. It is the first trial."""
    _, changes, own = _config_of(plan, data, model)
    own = own | changes
    return {name: own[name.split()[0]] for name in MODELS[model].space}


def overrides(values: dict[str, Any]) -> list[str]:
    """Returns the flags of fields, also of names that contain several fields."""
    return [f"--config.{field}={value}" for name, value in values.items() for field in name.split()]


def _config_of(plan: Plan, data: str, model: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Returns the config file, the fields that differ, and all fields of the file."""
    dataset, chosen = DATASETS[data], MODELS[model]
    file, base = dataset.config, load(dataset.config)
    changes: dict[str, Any] = {"data.context_items": CONTEXT_ITEMS}
    if chosen.kind == "token":
        schedule = chosen.schedule(dataset.repeats)
        leading = parse_schedule(schedule).leading_intra
        changes |= {"model.schedule": schedule, "objective.text_layers": "leading" if leading else "all"}
    elif chosen.kind == "item":
        changes |= {**ITEM_LEVEL, **dataset.item_level, "model.schedule": chosen.schedule, **chosen.changes}
        if chosen.needs == "vectors":
            changes["data.vectors"] = chosen.changes.get("data.vectors", "") + plan.vectors.get(data, "FILE")
    elif chosen.kind == "sasrec":
        file, width = "amazon_toys_sasrec.py", base["model.width"]
        changes |= {name: base[name] for name in SHARED} | {"data.row_tokens": dataset.row_tokens}
        changes |= {"train.batch_rows": base["train.batch_rows"], "model.width": width, "model.mlp_width": width, **dataset.sasrec}
    else:
        file, sizes = "smollm2_amazon.py", {**ITEM_LEVEL, **dataset.item_level}
        changes |= {name: base[name] for name in (*SHARED, "data.item_tokens", "data.row_tokens")}
        changes |= {name: sizes[name] for name in ("data.row_items", "train.batch_rows")} | {"model.pretrained": plan.pretrained}
    if data in plan.paths:
        changes["data.path"] = plan.paths[data]
    return file, changes, load(file)


@functools.cache
def load(file: str) -> dict[str, Any]:
    """Returns all fields of a config file, optionally with ":variant", by dotted names."""
    namespace: dict = {}
    name, _, variant = file.partition(":")
    exec(compile((commands.CONFIGS / name).read_text(encoding="utf-8"), name, "exec"), namespace)
    return flatten(namespace["get_config"](*filter(None, [variant])).to_dict())

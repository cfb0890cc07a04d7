"""The config: every field with its default and meaning. It is validated once, and every error names the field.

A config file defines `get_config()`, which starts from `default_config()` and returns a locked `ConfigDict`. The command line overrides
single fields (`--config.train.steps=200`). `resolve` turns the `ConfigDict` into the frozen dataclasses below, which the program reads.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import ml_collections

from iam_jax.errors import InputError
from iam_jax.registry import SOURCES
from iam_jax.schedule import Schedule, parse_schedule
from iam_jax.storage.files import to_path

CONFIG_FILE = "config.json"


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    users: int = 2000  # number of users of the synthetic shop
    products: int = 800  # number of items
    events_per_user: float = 12.0  # mean number of events of a user
    seed: int = 0  # seed of the shop


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str = "table"  # table | ml1m | amazon | synthetic | one that was registered (iam_jax.data.sources)
    path: str = ""  # folder with interactions.* and items.*, or with the original archives; empty: download (ml1m, amazon)
    category: str = ""  # amazon only: "2014/Toys_and_Games", "2018/Arts_Crafts_and_Sewing", …
    cache: str = ""  # folder for prepared data; empty: $XDG_CACHE_HOME/iam_jax or ~/.cache/iam_jax
    text: str = "{title}"  # template that turns an item's columns into its text
    untitled: str = "error"  # what to do with an item without text: error | drop (the item and its events) | id (its id becomes its text)
    k_core: int = 0  # repeatedly remove users and items with fewer events than this; 0: off
    last_n: int = 0  # keep each user's last n events; 0: all
    split: str = "leave_one_out"  # leave_one_out | temporal
    t1: str = ""  # temporal: train < t1 <= validation < t2 <= test; written like the table's timestamps
    t2: str = ""  # temporal: start of the test period
    tokenizer: str = "bpe"  # bpe (trained on the catalogue's text) | id (one token per item) | pretrained | path of a tokenizer.json
    vocabulary: int = 8192  # maximum size of a trained BPE vocabulary
    item_tokens: int = 16  # maximum number of text tokens of an item, without its separator and its boundary token
    prompt: str = ""  # text before the first item of every history
    separator: str = ""  # text before every item; it belongs to that item
    suffix: str = ""  # text after the last item of a history; the next item is predicted from its end
    vectors: str = ""  # content vectors of the items: a Parquet file (item, vector) or a folder of them | tfidf (of their text)
    vector_size: int = 256  # tfidf: length of a vector
    vector_transform: str = "none"  # none | center | whiten: zero mean, and identity covariance, over the items with a training event
    row_tokens: int = 512  # token slots in a row; several users share one row
    row_items: int = 256  # with item-level layers (the mark | in model.schedule): item slots in a row of histories
    context_items: int = 4  # minimum number of items without targets to the left, where a long history is cut into windows
    shuffled_titles: bool = False  # control: permute the texts among the items
    shuffled_order: bool = False  # control: permute each user's training items, in training and in histories; same split hash
    unseen_items: float = 0.0  # control: share of items (chosen by id) that lose their training events and stay targets; another split hash
    synthetic: SyntheticConfig = SyntheticConfig()


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: int = 0  # rank of the low-rank adapters (arXiv 2106.09685); 0: no adapters
    alpha: float = 16.0  # the adapters' output is scaled by alpha / rank
    dropout: float = 0.0  # dropout on the adapters' inputs
    targets: str = "."  # regular expression that selects matrices of a layer: "attention.query_DNH", "mlp.up_DF", …


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    pretrained: str = ""  # Hugging Face folder; it provides the weights and the shape (the fields from width to tie_tokens)
    schedule: str = "(intra inter)*2"  # full | intra | inter | intra_both; `*n` repeats, `+` inserts, behind `|` an item has one slot
    width: int = 64  # width of the model (D)
    heads: int = 4  # number of query heads
    kv_heads: int = 0  # number of key-value heads; 0: as many as heads
    head_size: int = 0  # size of a head; 0: width / heads
    mlp: str = "gated"  # gated | plain
    mlp_width: int = 0  # width of the MLP; 0: 3 x width (gated), 4 x width (plain)
    activation: str = "silu"  # silu | gelu | relu
    norm: str = "rms"  # rms | layer
    norm_epsilon: float = 1e-6  # added to the mean square (rms) or the variance (layer)
    norm_offset: float = 0.0  # added to the scale of a norm
    positions: str = "rotary"  # rotary | learned
    max_positions: int = 0  # number of learned positions; 0: data.row_tokens
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_scaling: str = "none"  # scaling of the rotary frequencies: none | linear | llama3
    rope_factor: float = 1.0  # linear: divides all frequencies; llama3: divides the low ones
    rope_low: float = 1.0  # llama3: a frequency with fewer turns than this in rope_original positions is low
    rope_high: float = 4.0  # llama3: a frequency with more turns than this stays as it is; between the two they are blended
    rope_original: int = 8192  # llama3: number of positions in the model's first training
    qkv_bias: bool = False  # biases of queries, keys and values
    out_bias: bool = False  # bias of attention's output projection
    mlp_bias: bool = False  # biases of the MLP's projections
    qk_norm: bool = False  # norm of queries and keys, per head
    scale_embedding: bool = True  # multiply token embeddings by sqrt(width), as in the original Transformer
    tie_tokens: bool = True  # the token objective's output embedding is the input embedding
    item_input: str = "none"  # identity at the input, behind the leading intra layers: none | table (the item table's row) | own (a table)
    item_width: int = 0  # width of the item-level layers and of item vectors; 0: width
    item_heads: int = 0  # number of query heads of the item-level layers, if item_width is set; 0: heads
    item_dropout: float = -1.0  # dropout of the item-level layers and on their input; -1: dropout
    drop_identity: float = 0.0  # in training, share of the items that a step treats as if they had no row in the item table
    drop_content: float = 0.0  # in training, share of the items whose content a step leaves out (item-level layers)
    inter_positions: str = "token"  # rotary positions in inter layers: token | item (the item's number)
    self_key: bool = False  # inter layers: a token also sees itself
    dropout: float = 0.1  # dropout on embeddings and on each layer's output
    lora: LoraConfig = LoraConfig()
    dtype: str = "float32"  # type of the computation: float32 | bfloat16 (trained parameters are float32)
    frozen_dtype: str = "float32"  # type of the parameters that are not trained: float32 | bfloat16
    tie_items: bool = False  # the item table is the token embedding (tokenizer "id" only), and states are not projected
    attention: str = "auto"  # backend of range attention: auto (the platform's kernels; plain XLA on a CPU) | reference (dense) | tpu | gpu
    item_states: str = "auto"  # compute leading intra layers once per distinct item: auto (no dropout, and less work) | on | off
    scan: bool = True  # lax.scan over the schedule's repeats: compiles faster, computes the same
    remat: bool = False  # recompute a layer's activations in the backward pass

    @property
    def item_shape(self) -> "ModelConfig":
        """The shape of the item-level layers. They have no adapters."""
        dropout = self.dropout if self.item_dropout < 0 else self.item_dropout
        shape = dataclasses.replace(self, lora=LoraConfig(), dropout=dropout)
        if not self.item_width:
            return shape
        heads = self.item_heads or self.heads
        return dataclasses.replace(shape, width=self.item_width, heads=heads, kv_heads=0, head_size=0, mlp_width=0)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    item: float = 1.0  # weight of the item objective; 0: a text generator, ranked with eval.ranking = likelihood
    token: float = 0.0  # weight of the next-token objective
    vectors: str = "table"  # what an item's vector is: table | text (its content: text and data.vectors) | both (their sum)
    text_layers: str = "leading"  # which layers a text vector goes through: leading (the leading intra layers) | all
    softmax: str = "auto"  # full | sampled | cached | auto (sampled if text is read by layers, else full)
    negatives: int = 512  # sampled, cached: items drawn per step, in addition to the batch's own targets
    negatives_power: float = 1.0  # they are drawn in proportion to (training events of the item) ** power; cached: half of them uniformly
    refresh_steps: int = 100  # cached: steps between two refreshes of the cached text vectors
    chunk: int = 2048  # positions whose logits exist at the same time, on all devices together


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 1e-3  # peak learning rate
    warmup_steps: int = 100  # linear warm-up from 0
    decay_steps: int = 10000  # cosine decay from the end of the warm-up to this step, independent of train.steps; 0: constant
    final_scale: float = 0.1  # learning rate after the decay, relative to the peak
    b1: float = 0.9  # AdamW's decay rate of the first moment
    b2: float = 0.98  # AdamW's decay rate of the second moment
    epsilon: float = 1e-8  # AdamW's epsilon
    weight_decay: float = 0.01  # weight decay of matrices; vectors and scales have none
    table_decay: float = -1.0  # weight decay of item tables; -1: weight_decay
    content_decay: float = -1.0  # weight decay of the matrices that project content (text states, given vectors); -1: weight_decay
    clip_norm: float = 1.0  # maximum norm of the gradient; 0: off
    accumulate: int = 1  # micro-batches per step; must divide train.batch_rows


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 10000  # number of optimizer steps; 0: evaluate the initial model
    batch_rows: int = 16  # rows per step, all micro-batches together
    seed: int = 0  # seed of initial parameters, order of rows, dropout and negatives
    frozen: str = "auto"  # pretrained parameters that are not trained: auto (with LoRA all, else none) | a regular expression
    trained: str = ""  # exceptions to frozen: a regular expression over names like "decoder.blocks.0_1.attention.query_DNH"; empty: none
    eval_every: int = 500  # steps between two validations
    save_every: int = 500  # steps between two checkpoints; every validation saves one, too
    keep: int = 2  # number of newest checkpoints to keep, in addition to the best
    patience: int = 0  # stop after this many validations without improvement; 0: off
    max_minutes: float = 0.0  # stop after this many minutes of training, validations included; 0: off
    skip_limit: int = 10  # a step whose loss or gradient is not finite is skipped; more than this many end the run


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = -1  # devices that share the batch; -1, here or in one of the next two: all remaining devices
    fsdp: int = 1  # devices that share the parameters along the model's width, and the batch
    tensor: int = 1  # devices that share heads, feed-forward, vocabulary and item table
    heartbeat_seconds: int = 60  # several processes: one that is silent for this long counts as dead, and the others end
    hang_minutes: float = 30.0  # several processes: a process ends itself after this long without a finished step or batch; 0: off


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    ks: tuple[int, ...] = (1, 5, 10, 20, 50)  # cut-offs K of the metrics
    metric: str = "ndcg@10"  # metric that selects the best step, on validation
    ranking: str = "item"  # how candidates are ordered: item (scores of the item objective) | likelihood (of their text)
    length_normalized: bool = False  # likelihood: mean over the tokens instead of the sum
    filter_seen: bool = True  # leave the items of the history out of the candidates
    batch_rows: int = 32  # rows of histories computed at the same time
    chunk_items: int = 8192  # catalogue items in one matrix product
    item_states_gib: float = 2.0  # keep the catalogue's states after the leading intra layers if they fit into this much memory; 0: never
    validation_users: int = 0  # users of the validations during training (a fixed random subset); 0: all
    test: bool = True  # rank the test events too; switch off in trials that only choose a setting
    baselines: bool = True  # evaluate popularity, last-item transitions and item-kNN, too
    resamples: int = 1000  # bootstrap resamples over users
    seed: int = 0  # seed of the bootstrap and of the random subset of users


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    part_users: int = 8192  # users per output file (with --vectors, users or items)
    batch_rows: int = 32  # rows of histories computed at the same time


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: int = 50  # steps between two lines of metrics.jsonl
    tensorboard: bool = True  # write TensorBoard events to the working folder
    progress: bool = True  # show progress bars
    profile: str = ""  # "100:110" writes a jax.profiler trace of these training steps to the working folder; empty: none


@dataclasses.dataclass(frozen=True)
class Config:
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()
    score: ScoreConfig = ScoreConfig()
    log: LogConfig = LogConfig()

    @property
    def schedule(self) -> Schedule:
        return parse_schedule(self.model.schedule, field="model.schedule")

    @property
    def uses_text(self) -> bool:
        """Whether item vectors are computed from the items' text, alone or in sum with the table."""
        return self.objective.item > 0 and self.objective.vectors != "table"

    @property
    def leading_vectors(self) -> bool:
        """Whether text vectors are computed from the states after the leading intra layers."""
        return self.reads_text and self.objective.text_layers == "leading"

    @property
    def item_level(self) -> bool:
        """Whether the schedule has item-level layers. A batch of histories then has one slot for each item."""
        return self.schedule.item_level

    @property
    def row_slots(self) -> int:
        """The number of slots of a row of histories: of items with item-level layers, else of tokens."""
        return self.data.row_items if self.item_level else self.data.row_tokens

    @property
    def has_table(self) -> bool:
        """Whether the model has an item table of its own: for item vectors, or for `model.item_input` = "table"."""
        vectors = self.objective.item > 0 and self.objective.vectors != "text"
        return not self.model.tie_items and (vectors or self.model.item_input == "table")

    @property
    def row_options(self) -> dict[str, bool]:
        """Options of rows of histories (`iam_jax.data.batches.Rows`)."""
        return {"by_item": self.item_level, "identity": self.model.item_input != "none" or bool(self.data.vectors)}

    @property
    def reads_text(self) -> bool:
        """Whether item vectors are computed by layers that read the items' text."""
        return self.uses_text and (self.objective.text_layers == "all" or self.schedule.leading_intra > 0)

    @property
    def vector_width(self) -> int:
        """The width of item vectors and of projected history states (E)."""
        return self.model.item_width or self.model.width

    @property
    def states_by_item(self) -> bool:
        """Whether the schedule has leading intra layers, and their states depend on the item alone (not on its position)."""
        return self.model.positions == "rotary" and self.schedule.leading_intra > 0

    @property
    def selection(self) -> str:
        """The name, in the checkpoints' metrics, of the metric that selects the best step."""
        return f"{self.metric_prefix}{self.eval.metric}"

    @property
    def metric_prefix(self) -> str:
        """Prefix of the names of validation metrics: "" for ranking by item scores, else the kind of ranking."""
        if self.eval.ranking == "item":
            return ""
        return f"{'length-normalized ' * self.eval.length_normalized}{self.eval.ranking} "

    @property
    def freezes(self) -> bool:
        """Whether some pretrained parameters are not trained (apart from an output embedding that nothing reads)."""
        selected = self.model.lora.rank if self.train.frozen == "auto" else self.train.frozen
        return bool(self.model.pretrained and selected)

    @property
    def constant_tower(self) -> bool:
        """Whether the states after the leading intra layers are constants: item-level layers behind a pretrained model that is frozen as a
        whole, without adapters, dropout or inserted layers. They are then computed once per catalogue (ranking/tower.py)."""
        model, train = self.model, self.train
        frozen = bool(model.pretrained) and train.frozen == "." and not train.trained
        if not (frozen and self.item_level and self.schedule.leading_intra) or model.lora.rank or model.dropout:
            return False
        return not any(inserted for stage in self.schedule.stages[: self.schedule.token_stages] for inserted in stage.inserted)

    @property
    def drops(self) -> bool:
        """Whether the layers have dropout (with item-level layers: those before the mark)."""
        return self.model.dropout > 0 or (self.model.lora.rank > 0 and self.model.lora.dropout > 0)

    @property
    def softmax(self) -> str:
        """objective.softmax, where `auto` is replaced by its choice."""
        if self.objective.softmax != "auto":
            return self.objective.softmax
        # Given vectors and the states of a constant tower are projected at once.
        return "sampled" if self.reads_text and not self.constant_tower else "full"


# Fields that may change between two runs of one working folder. `data.path`, `data.cache` and `model.pretrained` are locations; hashes of
# their content are compared instead. A path in `data.vectors` is one, too (`run_fields`).
FREE_FIELDS = (
    "eval.", "score.", "log.", "mesh.", "data.path", "data.cache", "train.max_minutes", "train.keep", "train.skip_limit",
    "model.scan", "model.remat", "model.attention", "model.pretrained",
)  # fmt: skip


def run_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are equal in all runs of a working folder, given all fields (`flatten`): without FREE_FIELDS and the number of steps,
    and with "a path" for the path of vectors."""
    kept = {name: value for name, value in fields.items() if not name.startswith(FREE_FIELDS) and name != "train.steps"}
    return kept | ({} if kept["data.vectors"] in ("", "tfidf") else {"data.vectors": "a path"})


def default_config() -> ml_collections.ConfigDict:
    """Returns a locked ConfigDict with every field at its default."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config())).lock()


def finetuning_config(variant: str) -> ml_collections.ConfigDict:
    """Returns a starting point for configs that fine-tune a pretrained language model, with an item-aware block after every four of sixteen
    layers, in bfloat16.

    Args:
      variant: `lora` freezes the pretrained parameters and trains adapters and the new layers; `full` trains all parameters.

    Raises:
      InputError: if variant is neither.
    """
    if variant not in ("lora", "full"):
        raise InputError(f"variant {variant!r}: must be lora or full")
    config: Any = default_config()  # a ConfigDict, whose fields are known when it is made
    config.data.update({"tokenizer": "pretrained", "separator": "\n", "item_tokens": 24, "row_tokens": 1024, "context_items": 10})
    config.model.update({"schedule": "(full*4 +intra +inter)*4", "dropout": 0.0, "dtype": "bfloat16", "remat": True})
    config.objective.update({"vectors": "table", "token": 0.1, "chunk": 1024})
    config.optimizer.update({"learning_rate": 2e-5, "warmup_steps": 100, "decay_steps": 3000})
    if variant == "lora":
        config.model.lora.update({"rank": 16, "alpha": 32.0})
        config.model.frozen_dtype = "bfloat16"
        config.optimizer.learning_rate = 2e-4
    config.train.update({"steps": 3000, "batch_rows": 8, "eval_every": 300, "save_every": 300, "patience": 3})
    config.eval.update({"batch_rows": 8, "validation_users": 4000})
    return config


def get_config(workdir: str) -> ml_collections.ConfigDict:
    """Returns the locked config of a working folder. (It makes this module a config file: `--config=config.py:WORKDIR`.)

    Raises InputError if the config cannot be read, or has fields that this version does not know.
    """
    return ml_collections.ConfigDict(_tuples(_read_saved(workdir))).lock()


def _read_saved(workdir: str | os.PathLike) -> dict:
    """Returns the config of a working folder as nested dicts.

    Fields that the saved config lacks get their defaults. So the default of a new field has to mean what the program did before.

    Raises InputError if the config cannot be read, or has fields that this version does not know.
    """
    path = to_path(workdir) / CONFIG_FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(saved, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:  # text that is not UTF-8 or not JSON is a ValueError
        raise InputError(f"{path}: cannot read the config of a run ({getattr(error, 'strerror', None) or error})") from error
    defaults = json.loads(to_json(Config()))
    if unknown := sorted(flatten(saved).keys() - flatten(defaults).keys()):
        raise InputError(f"{path}: another version of this program wrote it; this version has no config fields {', '.join(unknown)}")
    return _with_defaults(saved, defaults)


def _with_defaults(values: dict, defaults: dict) -> dict:
    """Nested values, with the default where there is no value."""
    return {
        name: _with_defaults(values.get(name, {}), default) if isinstance(default, dict) else values.get(name, default)
        for name, default in defaults.items()
    }


def override(config: ml_collections.ConfigDict, overrides: Mapping[str, Any] | None) -> ml_collections.ConfigDict:
    """Returns a locked copy of the config with other values for some fields, by dotted name: `{"train.steps": 200}`.

    Raises InputError for an unknown field and for a value of another type.
    """
    config = ml_collections.ConfigDict(config.to_dict()).lock()
    fields = flatten(config.to_dict())
    for name, value in (overrides or {}).items():
        if name not in fields:
            raise InputError(f"config.{name}: no such field")
        try:
            config.update_from_flattened_dict({name: value})
        except (TypeError, ValueError) as error:
            raise InputError(f"config.{name} = {value!r}: {error}") from error
    return config


def resolve(config: ml_collections.ConfigDict) -> Config:
    """Turns a ConfigDict into the dataclasses and checks them. Raises InputError, which names the field."""
    resolved = _from_dict(Config, config.to_dict(), "")
    check(resolved)
    return resolved


def to_json(config: Config) -> str:
    """Returns the config as the text of a working folder's CONFIG_FILE."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def check_same_run(workdir: str | os.PathLike, config: Config) -> None:
    """Raises InputError if the working folder belongs to a run with another config (FREE_FIELDS aside). The error names the fields."""
    if not (to_path(workdir) / CONFIG_FILE).exists():
        return
    saved, wanted = flatten(_read_saved(workdir)), flatten(json.loads(to_json(config)))
    kept, fixed = run_fields(saved), run_fields(wanted)
    names = [name for name in fixed if kept[name] != fixed[name]]
    if wanted["train.steps"] < saved["train.steps"]:
        names.append("train.steps")
    differing = [f"{name} ({saved[name]!r} there, {wanted[name]!r} here)" for name in sorted(names)]
    if differing:
        raise InputError(f"{workdir} belongs to a run with another config: {'; '.join(differing)}. Choose another --workdir.")


def flatten(tree: dict, prefix: str = "") -> dict:
    """Flattens nested dicts: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _tuples(tree: dict) -> dict:
    """Nested values, with tuples instead of lists (JSON has no tuples)."""
    return {
        name: _tuples(value) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else value
        for name, value in tree.items()
    }


def _from_dict(cls, values: dict, prefix: str):
    """A dataclass of the config from nested dicts. prefix: of the field names in errors. Raises InputError, which names the field."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise InputError(f"config.{prefix}{name} is not a config field; config.{prefix or '*'} has {', '.join(fields)}")
    built = {}
    for name in fields:
        if name not in values:
            raise InputError(f"config.{prefix}{name} is missing (start from iam_jax.config.default_config())")
        value, default = values[name], getattr(cls(), name)
        if dataclasses.is_dataclass(default):
            if not isinstance(value, dict):
                raise InputError(f"config.{prefix}{name} must be a section, not {value!r}")
            built[name] = _from_dict(type(default), value, f"{prefix}{name}.")
            continue
        if isinstance(default, tuple) and isinstance(value, (list, tuple)):
            value = tuple(value)
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"config.{prefix}{name} = {value!r}: must be a finite number")
        if type(value) is not type(default):
            raise InputError(f"config.{prefix}{name} must be of type {type(default).__name__}, not {value!r}")
        built[name] = value
    return cls(**built)


def check(config: Config) -> None:
    """Raises InputError for the first field that is out of range or contradicts another field. The error names the field and its value."""
    data, model, objective, optimizer, train, evaluation = (
        config.data, config.model, config.objective, config.optimizer, config.train, config.eval,
    )  # fmt: skip

    def require(condition: bool, field: str, message: str) -> None:
        if not condition:
            section, _, name = field.rpartition(".")
            value = config
            for part in [*filter(None, section.split(".")), name]:
                value = getattr(value, part)
            raise InputError(f"config.{field} = {value!r}: {message}")

    def choice(field: str, value: str, *options: str) -> None:
        require(value in options, field, f"must be one of {', '.join(options)}")

    choice("data.source", data.source, *SOURCES)
    choice("data.untitled", data.untitled, "error", "drop", "id")
    choice("data.split", data.split, "leave_one_out", "temporal")
    SOURCES[data.source].check(data)
    for field, value in (("k_core", data.k_core), ("last_n", data.last_n)):
        require(value >= 0, f"data.{field}", "must be 0 or more")
    require(0 <= data.unseen_items < 1, "data.unseen_items", "must be in [0, 1)")
    if data.split == "temporal":
        for field, value in (("t1", data.t1), ("t2", data.t2)):
            require(bool(value), f"data.{field}", "a temporal split needs data.t1 and data.t2")
    require(data.vocabulary >= 256, "data.vocabulary", "a byte-level BPE has at least 256 tokens")
    require(data.item_tokens >= 1, "data.item_tokens", "must be 1 or more")
    require(data.context_items >= 1, "data.context_items", "must be 1 or more, because a target is predicted from the item before it")
    require(data.vector_size >= 1, "data.vector_size", "must be 1 or more")
    choice("data.vector_transform", data.vector_transform, "none", "center", "whiten")
    transform = bool(data.vectors) or data.vector_transform == "none"
    require(transform, "data.vector_transform", "needs data.vectors")
    require(data.row_tokens >= 2, "data.row_tokens", "must be 2 or more")
    for field in ("users", "products"):
        require(getattr(data.synthetic, field) >= 10, f"data.synthetic.{field}", "must be 10 or more")
    require(data.synthetic.events_per_user >= 3, "data.synthetic.events_per_user", "must be 3 or more")
    require(data.synthetic.seed >= 0, "data.synthetic.seed", "must be 0 or more")
    by_id = data.tokenizer == "id"
    for field in ("prompt", "separator", "suffix", "shuffled_titles"):
        require(not (by_id and getattr(data, field)), f"data.{field}", "needs text tokens, but data.tokenizer is 'id'")
    pretrained = bool(model.pretrained)
    require(not pretrained or data.tokenizer == "pretrained", "data.tokenizer", "must be 'pretrained' with model.pretrained")
    require(pretrained or data.tokenizer != "pretrained", "model.pretrained", "data.tokenizer = 'pretrained' needs the folder of a model")

    schedule = config.schedule
    require(model.width >= 1, "model.width", "must be 1 or more")
    require(model.heads >= 1, "model.heads", "must be 1 or more")
    require(model.head_size >= 0, "model.head_size", "must be 0 or more")
    require(model.head_size > 0 or model.width % model.heads == 0, "model.heads", f"must divide model.width = {model.width}")
    head_size = model.head_size or model.width // model.heads
    rotary = model.positions == "rotary"
    require(not rotary or head_size % 2 == 0, "model.head_size", f"rotary positions need an even head size, not {head_size}")
    kv_heads_fit = model.kv_heads >= 0 and model.heads % (model.kv_heads or 1) == 0
    require(kv_heads_fit, "model.kv_heads", f"must divide model.heads = {model.heads}")
    require(model.mlp_width >= 0, "model.mlp_width", "must be 0 or more")
    for field in ("norm_epsilon", "rope_theta"):
        require(getattr(model, field) > 0, f"model.{field}", "must be above 0")
    choice("model.mlp", model.mlp, "gated", "plain")
    choice("model.activation", model.activation, "silu", "gelu", "relu")
    choice("model.norm", model.norm, "rms", "layer")
    choice("model.positions", model.positions, "rotary", "learned")
    choice("model.item_input", model.item_input, "none", "table", "own")
    item_level = schedule.item_level
    for field in ("item_width", "item_heads"):
        require(getattr(model, field) >= 0, f"model.{field}", "must be 0 or more")
        require(item_level or not getattr(model, field), f"model.{field}", "needs item-level layers (the mark | in model.schedule)")
    require(bool(model.item_width) or not model.item_heads, "model.item_heads", "needs model.item_width")
    heads = model.item_shape.heads
    require(model.item_width % heads == 0, "model.item_width", f"must be divisible by the number of heads, {heads}")
    even = not model.item_width or model.item_width // heads % 2 == 0
    require(even, "model.item_width", f"rotary positions need an even head size, not {model.item_width // heads}")
    require(model.item_dropout < 1, "model.item_dropout", "must be below 1")
    require(item_level or model.item_dropout < 0, "model.item_dropout", "needs item-level layers (the mark | in model.schedule)")
    for field in ("drop_identity", "drop_content"):
        require(0 <= getattr(model, field) < 1, f"model.{field}", "must be in [0, 1)")
    together = model.drop_identity + model.drop_content <= 1
    require(together, "model.drop_content", f"with model.drop_identity = {model.drop_identity:g}, the sum must be at most 1")
    identity = (config.has_table or model.item_input == "own") and objective.vectors != "table"
    require(identity or not model.drop_identity, "model.drop_identity", "needs an item table and content in the items' vectors")
    content = objective.vectors != "text"
    require(content or not model.drop_content, "model.drop_content", "without content, vectors need the item table (objective.vectors)")
    require(item_level or not model.drop_content, "model.drop_content", "needs item-level layers (the mark | in model.schedule)")
    needed = data.context_items + 1 + bool(data.prompt) + bool(data.suffix)
    row_fits = data.row_items >= needed
    require(row_fits, "data.row_items", f"prompt, suffix and data.context_items + 1 items need {needed}")
    if item_level:
        require(rotary, "model.positions", "item-level layers (the mark | in model.schedule) need rotary positions")
        require(model.item_states != "off", "model.item_states", "item-level layers read the states of whole items")
        require(objective.token == 0, "objective.token", "no token is predicted behind the mark | of model.schedule")
        require(objective.text_layers == "leading", "objective.text_layers", "only the layers before the mark | of model.schedule see text")
    require(model.item_input != "table" or config.has_table or model.tie_items, "model.item_input", "there is no item table")
    by_score = evaluation.ranking == "item"
    require(model.item_input == "none" or by_score, "model.item_input", "must be 'none' with eval.ranking = 'likelihood'")
    require(not data.vectors or by_score, "data.vectors", "must be empty with eval.ranking = 'likelihood'")
    choice("model.inter_positions", model.inter_positions, "token", "item")
    choice("model.dtype", model.dtype, "float32", "bfloat16")
    choice("model.attention", model.attention, "auto", "reference", "tpu", "gpu")
    choice("model.item_states", model.item_states, "auto", "on", "off")
    require(model.inter_positions == "token" or rotary, "model.inter_positions", "'item' needs rotary positions")
    item_states = model.item_states != "on" or config.states_by_item
    require(item_states, "model.item_states", "'on' needs rotary positions and a schedule that begins with intra")
    learned = model.max_positions
    require(learned >= 0, "model.max_positions", "must be 0 or more")
    row_fits = rotary or not learned or learned >= data.row_tokens
    require(row_fits, "data.row_tokens", f"the model has only {learned} learned positions (model.max_positions)")
    choice("model.rope_scaling", model.rope_scaling, "none", "linear", "llama3")
    for field in ("rope_factor", "rope_low", "rope_original"):
        require(getattr(model, field) > 0, f"model.{field}", "must be above 0")
    require(model.rope_high > model.rope_low, "model.rope_high", f"must be above model.rope_low = {model.rope_low:g}")
    choice("model.frozen_dtype", model.frozen_dtype, "float32", "bfloat16")
    lora = model.lora
    require(lora.rank >= 0, "model.lora.rank", "must be 0 or more")
    require(lora.rank == 0 or pretrained, "model.lora.rank", "adapters need model.pretrained")
    require(lora.alpha > 0, "model.lora.alpha", "must be above 0")
    require(0 <= lora.dropout < 1, "model.lora.dropout", "must be in [0, 1)")
    for field, pattern in (("model.lora.targets", lora.targets), ("train.frozen", train.frozen), ("train.trained", train.trained)):
        try:
            re.compile(pattern)
        except re.error as error:
            require(False, field, f"not a regular expression: {error}")
    require(train.frozen == "auto" or pretrained, "train.frozen", "only pretrained parameters can be frozen, but model.pretrained is empty")
    for field, default in (("train.trained", not train.trained), ("model.frozen_dtype", model.frozen_dtype == "float32")):
        require(config.freezes or default, field, "no parameter is frozen (see model.pretrained, model.lora.rank and train.frozen)")
    require(0 <= model.dropout < 1, "model.dropout", "must be in [0, 1)")
    require(not model.tie_items or by_id, "model.tie_items", "needs data.tokenizer = 'id'")
    require(not model.tie_items or objective.vectors == "table", "model.tie_items", "needs objective.vectors = 'table'")

    choice("objective.vectors", objective.vectors, "table", "text", "both")
    choice("objective.text_layers", objective.text_layers, "leading", "all")
    choice("objective.softmax", objective.softmax, "auto", "full", "sampled", "cached")
    choice("eval.ranking", evaluation.ranking, "item", "likelihood")
    for field in ("item", "token"):
        require(getattr(objective, field) >= 0, f"objective.{field}", "must be 0 or more")
    by_item = evaluation.ranking == "item"
    require(
        objective.item > 0 or not by_item,
        "objective.item",
        "must be above 0, because eval.ranking = 'item' ranks by the item objective's scores",
    )
    require(
        objective.token > 0 or by_item,
        "objective.token",
        "must be above 0, because eval.ranking = 'likelihood' ranks by the text's likelihood",
    )
    text, token = objective.vectors != "table", objective.token
    require(not (by_id and token), "objective.token", "needs text tokens, but data.tokenizer is 'id'")
    require(
        not (by_id and text and config.reads_text), "objective.vectors", "vectors from text need text tokens, but data.tokenizer is 'id'"
    )
    require(not (token and schedule.sees_ahead), "objective.token", f"the relation {schedule.sees_ahead} sees the token to be predicted")
    text_layers = not config.uses_text or config.reads_text or bool(data.vectors)
    require(text_layers, "objective.text_layers", "'leading' needs a schedule that begins with intra layers")
    softmax = objective.softmax != "cached" or config.uses_text
    require(softmax, "objective.softmax", "'cached' needs objective.item and objective.vectors = 'text' or 'both'")
    require(objective.negatives >= 0, "objective.negatives", "must be 0 or more")
    drawn = config.softmax != "cached" or objective.negatives > 0
    require(drawn, "objective.negatives", "must be 1 or more with objective.softmax = 'cached'")
    require(0 <= objective.negatives_power <= 2, "objective.negatives_power", "must be in [0, 2]")
    for field in ("refresh_steps", "chunk"):
        require(getattr(objective, field) >= 1, f"objective.{field}", "must be 1 or more")

    require(optimizer.learning_rate > 0, "optimizer.learning_rate", "must be above 0")
    for field in ("warmup_steps", "decay_steps", "weight_decay", "clip_norm", "final_scale"):
        require(getattr(optimizer, field) >= 0, f"optimizer.{field}", "must be 0 or more")
    warmup = optimizer.warmup_steps
    decay = optimizer.decay_steps == 0 or optimizer.decay_steps > warmup
    require(decay, "optimizer.decay_steps", f"must be 0 or above optimizer.warmup_steps = {warmup}")
    for field in ("table_decay", "content_decay"):
        value = getattr(optimizer, field)
        require(value >= 0 or value == -1, f"optimizer.{field}", "must be 0 or more, or -1")
    for field in ("b1", "b2"):
        require(0 <= getattr(optimizer, field) < 1, f"optimizer.{field}", "must be in [0, 1)")
    require(optimizer.epsilon > 0, "optimizer.epsilon", "must be above 0")
    require(optimizer.accumulate >= 1, "optimizer.accumulate", "must be 1 or more")
    require(train.steps >= 0, "train.steps", "must be 0 or more")
    for field in ("batch_rows", "eval_every", "save_every", "keep"):
        require(getattr(train, field) >= 1, f"train.{field}", "must be 1 or more")
    require(train.patience >= 0, "train.patience", "must be 0 or more")
    for field in ("max_minutes", "skip_limit"):
        require(getattr(train, field) >= 0, f"train.{field}", "must be 0 or more")
    require(0 <= train.seed < 2**31, "train.seed", "must be in [0, 2**31)")
    micro_batches = optimizer.accumulate
    require(train.batch_rows % micro_batches == 0, "train.batch_rows", f"must be divisible by optimizer.accumulate = {micro_batches}")

    sizes = {field: getattr(config.mesh, field) for field in ("data", "fsdp", "tensor")}
    for field, size in reversed(sizes.items()):
        require(size >= 1 or size == -1, f"mesh.{field}", "must be 1 or more, or -1")
        single = size != -1 or list(sizes.values()).count(-1) == 1
        require(
            single, f"mesh.{field}", "only one of mesh.data (-1 by default), mesh.fsdp and mesh.tensor can be -1 (all remaining devices)"
        )
    require(config.mesh.heartbeat_seconds >= 1, "mesh.heartbeat_seconds", "must be 1 or more")
    require(config.mesh.hang_minutes >= 0, "mesh.hang_minutes", "must be 0 or more")
    cut_offs = bool(evaluation.ks) and all(type(k) is int and k >= 1 for k in evaluation.ks)
    require(cut_offs and len(set(evaluation.ks)) == len(evaluation.ks), "eval.ks", "must be distinct cut-offs of 1 or more")
    names = [f"{name}@{k}" for name in ("hr", "precision", "ndcg", "mrr") for k in evaluation.ks]
    choice("eval.metric", evaluation.metric, *names)
    for field in ("batch_rows", "chunk_items", "resamples"):
        require(getattr(evaluation, field) >= 1, f"eval.{field}", "must be 1 or more")
    for field in ("validation_users", "seed", "item_states_gib"):
        require(getattr(evaluation, field) >= 0, f"eval.{field}", "must be 0 or more")
    for field in ("part_users", "batch_rows"):
        require(getattr(config.score, field) >= 1, f"score.{field}", "must be 1 or more")
    require(config.log.every >= 1, "log.every", "must be 1 or more")
    steps = re.fullmatch(r"(\d+):(\d+)", config.log.profile)
    profile = not config.log.profile or bool(steps and int(steps[1]) < int(steps[2]))
    require(profile, "log.profile", "must be FIRST:STOP, two step numbers with FIRST < STOP")

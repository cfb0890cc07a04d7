"""The config: every field with its default and meaning. It is validated once, and every error names the field.

A config file defines `get_config()`, which starts from `default_config()` and returns a locked `ConfigDict`. The command line overrides
single fields (`--config.train.steps=200`). `resolve` turns the `ConfigDict` into the frozen dataclasses below, which the program reads.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import ml_collections

from iam_jax.config_checks import check
from iam_jax.errors import InputError
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
    ties: str = "hash"  # order of a user's events of equal time: hash (of user and item) | file (as there; leaks) | item (by id; leaks)
    duplicates: str = "keep"  # events that repeat an earlier one (same user, item and time): keep | drop; drop has another split hash
    split: str = "leave_one_out"  # leave_one_out | temporal
    t1: str = ""  # temporal: train < t1 <= validation < t2 <= test; written like the table's timestamps
    t2: str = ""  # temporal: start of the test period
    tokenizer: str = "bpe"  # bpe (trained on the catalogue's text) | id (one token per item) | pretrained | path of a tokenizer.json
    vocabulary: int = 8192  # maximum size of a trained BPE vocabulary
    item_tokens: int = 16  # maximum number of text tokens of an item, without its separator and its boundary token
    prompt: str = ""  # text before the first item of every history
    separator: str = ""  # text before every item; it belongs to that item
    suffix: str = ""  # text after the last item of a history; the next item is predicted from its end
    vectors: str = ""  # content vectors of the items: a Parquet file (item, vector) or folder of them | tfidf (of text) | tfidf+FILE
    vector_size: int = 256  # tfidf: length of a vector, at most what the catalogue allows
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
    token_embeddings: str = "random"  # start of token embeddings: random | svd (of the catalogue's tf-idf) | svd_frozen (not trained)
    item_input: str = "none"  # identity at the input, behind the leading intra layers: none | table (the item table's row) | own (a table)
    content_input: str = "state"  # content at the input of item-level layers: state (of the boundary token) | vector (as in item vectors)
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
    validation_users: int = 0  # random subset of users, for validations in training and to choose baselines; 0: all (baselines: 4,000)
    test: bool = True  # rank the test events too; switch off in trials that only choose a setting
    baselines: bool = True  # evaluate the baselines, too (docs/protocol.md)
    fusion: str = ""  # baseline whose score is added to the model's, with a weight chosen on validation: transitions; "": none
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


def vector_sources(vectors: str) -> tuple[bool, str]:
    """What `data.vectors` names: whether vectors are computed from the items' text, and the path of given vectors, or ""."""
    words = vectors == "tfidf" or vectors.startswith("tfidf+")
    return words, vectors.removeprefix("tfidf").removeprefix("+") if words else vectors


def run_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are equal in all runs of a working folder, given all fields (`flatten`): without FREE_FIELDS and the number of steps,
    and with "a path" for the path of vectors."""
    kept = {name: value for name, value in fields.items() if not name.startswith(FREE_FIELDS) and name != "train.steps"}
    words, path = vector_sources(kept["data.vectors"])
    return kept | ({"data.vectors": "tfidf+a path" if words else "a path"} if path else {})


def default_config() -> ml_collections.ConfigDict:
    """Returns a locked ConfigDict with every field at its default."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config())).lock()


def hybrid_config(schedule: str = "| inter*2") -> ml_collections.ConfigDict:
    """Returns a starting point for configs of a hybrid of content and identity: layers over one state per item, which is tf-idf of the
    item's text plus its row in the item table, at the input and in item vectors.

    Args:
      schedule: the item-level layers; its first character is the mark `|`.
    """
    config: Any = default_config()  # a ConfigDict, whose fields are known when it is made
    config.data.update({"vectors": "tfidf", "row_items": 64})
    config.model.update({"schedule": schedule, "width": 64, "heads": 1, "dropout": 0.5, "item_input": "table", "content_input": "vector"})
    config.objective.update({"vectors": "both", "chunk": 128})  # logits that stay in a CPU's cache
    config.optimizer.update({"learning_rate": 3e-3, "weight_decay": 0.3})
    config.train.batch_rows = 16
    return config


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

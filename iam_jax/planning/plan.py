"""Compiles the programs of a run for devices that this machine does not have, and reads their memory, FLOPs and traffic.

Nothing is allocated and nothing runs. The compiler gets shapes and shardings, and its own memory analysis gives the result. estimate.py
computes times and writes the report.
"""

import contextlib
import dataclasses
import functools
import math
import re
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from iam_jax.config import Config
from iam_jax.data.assumed import Assumption, assume
from iam_jax.data.batches import Batch, Rows, evaluation_rows
from iam_jax.data.prepare import Prepared, prepare
from iam_jax.data.splits import VALIDATION
from iam_jax.data.tokenizer import highest_id, load_tokenizer
from iam_jax.devices import topology
from iam_jax.devices.chips import Chip, Flops, find_chip
from iam_jax.devices.mesh import BATCH, batch_shards
from iam_jax.kernels import tpu
from iam_jax.model import pretrained
from iam_jax.model.parameters import abstract, join, select
from iam_jax.model.pretrained.importing import read_pretrained
from iam_jax.planning import hlo
from iam_jax.ranking.core import Ranker, keeps_item_states, padded, power_of_two
from iam_jax.ranking.evaluate import seen_lists
from iam_jax.ranking.scores import bonus_sharding
from iam_jax.training import flops
from iam_jax.training.run import Run, make_run
from iam_jax.training.step import abstract_state, make_train_step

PARTS = ("training", "evaluation", "scoring")
RESERVE = {"tpu": 0.03, "gpu": 0.25}  # share of a chip's memory that a TPU's runtime needs, or that JAX does not use on a GPU


@dataclasses.dataclass(frozen=True)
class PlanRequest:
    """The flags of --mode=plan."""

    topology: str
    assumption: Assumption | None  # None: the plan reads the config's data
    parts: tuple[str, ...] = PARTS
    top_k: int = 100


@dataclasses.dataclass
class Program:
    """One jitted function. Sizes are bytes per device."""

    name: str
    held: dict[str, int]  # arrays in memory while it runs, by kind; computed from their shapes
    padding: int = 0  # of the arguments, whose arrays fill whole tiles
    outputs: int = 0  # without those that reuse the memory of an argument
    code: int = 0
    temporaries: int | None = None  # None: not compiled, because the program does not fit
    needed: int | None = None  # total size by the error of the compiler, if the program does not fit and the error gives it
    flops: Flops = dataclasses.field(default_factory=Flops)  # of all devices together
    traffic: hlo.Traffic | None = None
    seconds: float = 0.0  # compile time

    @property
    def total(self) -> int | None:
        """Total size; None if it is only known to be larger than that of the arrays in memory."""
        if self.temporaries is None:
            return self.needed
        return sum(self.held.values()) + self.padding + self.outputs + self.code + self.temporaries

    @property
    def least(self) -> int:
        """Total size, or a lower bound if the total is not known."""
        return self.total if self.total is not None else sum(self.held.values())


@dataclasses.dataclass(frozen=True)
class Plan:
    """The compiled programs of a run on a topology."""

    topology: str
    config: Config
    run: Run
    chip: Chip | None  # None: not in the table of chips
    capacity: int | None  # memory of a device in bytes, without the reserve; None: not known
    scale: float  # number of real users per user of the planned data
    assumption: Assumption | None
    step: flops.StepFlops
    programs: dict[str, list[Program]]  # by part

    @property
    def devices(self) -> int:
        return self.run.mesh.size

    def peak(self, part: str) -> Program:
        """The program of this part that needs the most memory."""
        return max(self.programs[part], key=lambda program: program.least)

    def fits(self, part: str) -> bool:
        """Whether all programs of this part fit into the memory of a device."""
        program = self.peak(part)
        return program.temporaries is not None and (self.capacity is None or program.least <= self.capacity)


def make_plan(config: Config, request: PlanRequest) -> Plan:
    """Compiles the programs of a run, and prints the compile time of each part.

    Raises InputError if the config, the data or the topology is invalid.
    """
    devices = topology.devices(request.topology)
    if config.model.pretrained:
        config = pretrained.configure(config)
    prepared, scale = _data(config, request.assumption)
    config = _with_kernels(config, devices[0].platform)
    run = make_run(config, prepared, devices)
    if config.constant_tower:
        run = run.with_tower(np.zeros((prepared.catalogue.items + 2, config.model.width), np.float32))
    chip = find_chip(devices[0].device_kind)
    capacity = device_capacity(devices[0], chip)
    make = {"training": training, "evaluation": evaluation, "scoring": functools.partial(scoring, top_k=request.top_k)}
    programs = {}
    for part in (part for part in PARTS if part in request.parts):
        if compiled := make[part](run, capacity):
            programs[part] = compiled
            print(f"{part} compiled in {sum(program.seconds for program in compiled):.0f} s", flush=True)
    return Plan(request.topology, config, run, chip, capacity, scale, request.assumption, flops.step_flops(run), programs)


def device_capacity(device: jax.Device, chip: Chip | None) -> int | None:
    """The bytes that a program may use on a device; None if they are not known.

    For a GPU of this machine, the runtime gives the number. Otherwise it is the data sheet's memory without the reserve.
    """
    if device.platform == "gpu" and (stats := device.memory_stats()):
        return stats["bytes_limit"]
    return None if chip is None else int(chip.hbm_bytes * (1 - RESERVE[device.platform]))


def _data(config: Config, assumption: Assumption | None) -> tuple[Prepared, float]:
    """The config's data, or assumed data, and the number of real users per user of these data."""
    if assumption is None:
        return prepare(config.data, pretrained.vocabulary(config) if config.model.pretrained else None), 1.0
    return assume(config.data, assumption, _vocabulary(config, assumption.items))


def _vocabulary(config: Config, items: int) -> int:
    """The number of token ids, including the boundary token."""
    if config.model.pretrained:
        return read_pretrained(config).vocabulary + 1
    tokenizer = config.data.tokenizer
    if tokenizer in ("id", "bpe"):
        return items if tokenizer == "id" else config.data.vocabulary + 1
    return highest_id(load_tokenizer(tokenizer)) + 2


def _with_kernels(config: Config, platform: str) -> Config:
    """Replaces the backend `auto` of range attention by its choice on the given platform. (By itself, it would choose for this machine.)"""
    model = config.model
    if platform != "tpu" or model.attention != "auto":
        return config
    q = jax.ShapeDtypeStruct((1, config.data.row_tokens, model.heads, model.head_size or model.width // model.heads), model.dtype)
    chosen = "reference" if tpu.unsupported_reason(q, q, None) else "tpu"
    return dataclasses.replace(config, model=dataclasses.replace(model, attention=chosen))


# ---- shapes


def device_bytes(tree) -> int:
    """The bytes that one device holds of a tree of abstract arrays."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def frozen_parameters(run: Run) -> dict:
    """Shapes of the parameters that are not trained."""
    return abstract(run.mesh, select(run.model.shapes(), lambda name: name in run.frozen_names), run.config.model.frozen_dtype)


def _parameters(run: Run) -> dict:
    return {"parameters, trained": run.abstract_trained, "parameters, frozen": frozen_parameters(run)}


def whole(run: Run, tree):
    """Shapes of replicated arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(run.mesh, PartitionSpec())), tree)


def sharded_batch(run: Run, batch: Batch):
    """Shapes of a batch with the shardings of `devices.mesh.shard_batch`."""
    shards = batch_shards(run.mesh)

    def place(x):
        spec = BATCH if x.shape[0] % shards == 0 else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(run.mesh, spec))

    return jax.tree.map(place, batch)


def batch_of_rows(rows: Rows, count: int) -> Batch:
    """A batch of the first rows. They repeat if there are fewer than `count`."""
    picked = [rows[row % len(rows)] for row in range(count)]
    return {name: np.stack([row[name] for row in picked]) for name in picked[0]}


# ---- programs


def training_arguments(run: Run) -> tuple:
    """Shapes of the training step's arguments: state, batch, items, step number, frozen parameters."""
    batch = sharded_batch(run, run.finish(batch_of_rows(run.rows, run.config.train.batch_rows)))
    return abstract_state(run), batch, whole(run, run.items), whole(run, np.int32(0)), frozen_parameters(run)


def training(run: Run, capacity: int | None = None) -> list[Program]:
    """The training step."""
    state, batch, items, step, _ = arguments = training_arguments(run)
    held = _parameters(run) | {"optimizer": state["optimizer"]}
    if "cache" in state:
        held["text vectors"] = state["cache"]
    held["batch and items"] = [batch, items, step]
    return [_compiled("training step", make_train_step(run), arguments, held, run, capacity)]


def _forward(run: Run, rows: Rows, batch: Batch, relations: tuple[str, ...]) -> Flops:
    """FLOPs of attention in layers with these relations, for a batch of such rows."""
    pairs = flops.visible_pairs(batch_of_rows(rows, min(len(rows), 64)), run.config.model.self_key)
    config = run.config
    per_row = flops.attention_flops(config.model.item_shape if config.item_level else config.model, pairs, relations)
    return Flops({kind: count * len(batch["user"]) for kind, count in per_row.items()})


def evaluation(run: Run, capacity: int | None = None) -> list[Program]:
    """The programs of the evaluation. The training state stays in memory while they run."""
    config, state = run.config, abstract_state(run)
    resident = _parameters(run) | {"optimizer": {name: x for name, x in state.items() if name != "params"}}
    vector_programs = _vector_programs(run, capacity, resident, config.eval.batch_rows)
    if vector_programs is None:
        return []
    ranker, targets, vectors, programs = vector_programs
    events, fused = run.prepared.events, bool(config.eval.fusion)
    X = ranker.at_once_with_bonus if fused else ranker.at_once
    seen = padded(seen_lists(events, targets[:X]), X) if config.eval.filter_seen else np.full((X, 1), -1, np.int32)
    h, target, seen = whole(run, (np.zeros((X, vectors.shape[1]), np.float32), np.zeros(X, np.int32), seen))
    arrays = h, vectors, target, seen, *_bonus(run, X, vectors)
    held = resident | {"batch and items": list(arrays)}
    ranking = _compiled("ranking", ranker.ranks_with_bonus if fused else ranker.ranks, arrays, held, run, capacity)
    # Every chunk is computed twice if all chunks contain a target.
    ranking.flops = Flops({"float32 highest": 2 * 2 * X * vectors.shape[0] * vectors.shape[1]})
    return [*programs, ranking]


def scoring(run: Run, capacity: int | None = None, top_k: int = 100) -> list[Program]:
    """The programs of `--mode=score`: vectors of users and items, and the best items of each user."""
    config, resident = run.config, _parameters(run)
    vector_programs = _vector_programs(run, capacity, resident, config.score.batch_rows)
    if vector_programs is None:
        return []
    ranker, targets, vectors, programs = vector_programs
    fused = bool(config.eval.fusion)
    X = min(power_of_two(config.score.part_users), ranker.at_once_with_bonus if fused else ranker.at_once)
    seen = padded(seen_lists(run.prepared.events, targets[:X]), X)
    h, seen = whole(run, (np.zeros((X, vectors.shape[1]), np.float32), seen))
    top, bonus = ranker.top_program(min(top_k, ranker.catalogue.items), bonus=fused), _bonus(run, X, vectors)
    held = resident | {"item vectors": vectors, "batch and items": [h, seen, *bonus]}
    return [*programs, _compiled("top items", top, (h, vectors, seen, *bonus), held, run, capacity)]


def _bonus(run: Run, rows: int, vectors: jax.ShapeDtypeStruct) -> list[jax.ShapeDtypeStruct]:
    """The shape of the scores that are added with `eval.fusion`, [rows, items]. Without it, an empty list."""
    if not run.config.eval.fusion:
        return []
    return [jax.ShapeDtypeStruct((rows, vectors.shape[0]), np.float32, sharding=bonus_sharding(run.mesh))]


def _vector_programs(run: Run, capacity: int | None, resident: dict, batch_rows: int):
    """The programs that compute vectors, for `batch_rows` rows at the same time. resident: arrays that stay in memory.

    Returns the ranker, the validation targets, the shapes of the item vectors, and the programs for the states of the catalogue (if they
    are kept), for histories and for items. Returns None if nothing is ranked by vectors.
    """
    config, prepared = run.config, run.prepared
    targets = prepared.events.targets(VALIDATION)
    if not len(targets) or config.eval.ranking != "item":
        return None
    trained = prepared.events.train_counts > 0
    ranker = Ranker(config, prepared.catalogue, trained, run.model, run.mesh, batch_rows, prepared.vectors, run.items.catalogue.tower_XD)
    params, items = join(run.abstract_trained, frozen_parameters(run)), whole(run, ranker.items)
    rows = evaluation_rows(prepared.events, prepared.catalogue, config.row_slots, targets, **config.row_options)
    leading, first, programs = None, 0, []
    if ranker.items.tower_XD is not None:
        leading, first = whole(run, ranker.items.tower_XD), config.schedule.leading_intra
    elif keeps_item_states(config, prepared.catalogue, int(rows.sizes.sum())):
        catalogue = ranker.catalogue_items
        item_rows = sharded_batch(run, catalogue.rows)
        shape = jax.eval_shape(functools.partial(ranker.leading, chunks=catalogue.chunks), params, item_rows)
        leading = whole(run, shape)
        held = resident | {"batch and items": item_rows}
        programs.append(_compiled("leading states", ranker.leading, (params, item_rows, catalogue.chunks), held, run, capacity))
        first = config.schedule.leading_intra
    batch = ranker.batch(batch_of_rows(rows, batch_rows), power_of_two(rows.targets_per_row), leading is not None)
    batch = sharded_batch(run, {name: x for name, x in batch.items() if name != "segment"})
    held = resident | {"batch and items": [batch, leading, items]}
    histories = _compiled("history vectors", ranker.history_states, (params, batch, leading, items), held, run, capacity)
    histories.flops += _forward(run, rows, batch, config.schedule.relations[first:])
    held = resident | {"batch and items": [items, leading]}
    vectors_program = _compiled("item vectors", ranker.vectors, (params, items, leading), held, run, capacity)
    vectors = jax.eval_shape(ranker.vectors, params, items, leading)
    spread = NamedSharding(run.mesh, PartitionSpec(run.mesh.axis_names if run.mesh.size > 1 else ()))
    vectors = jax.ShapeDtypeStruct(vectors.shape, vectors.dtype, sharding=spread)
    return ranker, targets, vectors, [*programs, histories, vectors_program]


def _compiled(name: str, function, arguments: tuple, held: dict, run: Run, capacity: int | None) -> Program:
    """Compiles a jitted function for abstract arguments.

    held: all arrays in memory while it runs, by kind; not all are arguments. If they alone exceed the capacity, nothing is compiled.
    """
    program = Program(name, {kind: device_bytes(tree) for kind, tree in held.items()})
    if capacity is not None and program.least > capacity:
        return program
    start = time.monotonic()
    with jax.set_mesh(run.mesh):
        traced = function.trace(*arguments)
        with contextlib.suppress(ValueError):  # for loops whose number of iterations depends on the data
            program.flops = flops.matmul_flops(traced.jaxpr.jaxpr)
        lowered = traced.lower()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            # The "temporaries" of the second form include the arguments, so that they are the total.
            match = re.search(r"Used ([\d.]+)([MG]) of|required for HLO temporaries \(([\d.]+)([MG])\)", str(error))
            size, unit = [part for part in match.groups() if part] if match else (0, "G")
            program.needed = int(float(size) * {"M": 2**20, "G": 2**30}[unit]) or None
            compiled = None
    program.seconds = time.monotonic() - start
    if compiled is None:
        return program
    memory = compiled.memory_analysis()
    argument_bytes = device_bytes([x for x in jax.tree.leaves(arguments) if hasattr(x, "sharding")])
    program.padding = max(0, memory.argument_size_in_bytes - argument_bytes)
    program.temporaries, program.code = memory.temp_size_in_bytes, memory.generated_code_size_in_bytes
    program.outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    with contextlib.suppress(NotImplementedError):
        program.traffic = hlo.traffic(compiled.as_text())
    return program

"""Times, costs and a report of a plan, and suggestions if the run does not fit into memory.

Times come from a roofline model: FLOPs at the peak of the chip, bytes at the bandwidth of its memory and its links, each at an assumed
share (SHARES). How much they overlap is unknown, so a time is a range from the longest of the three to their sum.
"""

import dataclasses

from jax.sharding import AbstractMesh, AxisType

from iam_jax.config import Config
from iam_jax.devices.chips import Flops, seconds_at_peak
from iam_jax.devices.mesh import batch_shards
from iam_jax.model import Params, make_model
from iam_jax.model.parameters import abstract, frozen_names, select
from iam_jax.planning.plan import RESERVE, Plan, Program, device_bytes
from iam_jax.training.run import Run

SHARES = {"compute": 0.5, "memory": 0.8, "links": 0.5}  # assumed shares of the peak that a run reaches
GIB = 2**30


def seconds(plan: Plan, flops: Flops, program: Program) -> dict[str, float] | None:
    """Seconds for compute, memory and links in one call of the program.

    flops: FLOPs of the call on all devices together. Returns None if the chip is unknown or the program was not compiled.
    """
    chip, traffic = plan.chip, program.traffic
    if chip is None or traffic is None:
        return None
    return {
        "compute": seconds_at_peak(flops, chip) / plan.devices / SHARES["compute"],
        "memory": traffic.memory / chip.hbm_bytes_per_second / SHARES["memory"],
        "links": traffic.sent / chip.link_bytes_per_second / SHARES["links"],
    }


def record(plan: Plan, price: float | None) -> dict:
    """Returns all facts of the report as JSON values. price: dollars per chip and hour; None takes the list price of the chip."""
    run, config = plan.run, plan.config
    rows_epoch = len(run.rows) * plan.scale
    steps_epoch = rows_epoch / config.train.batch_rows
    tokens = config.train.batch_rows * config.row_slots * run.rows.fill
    out = {
        "topology": plan.topology,
        "chip": None if plan.chip is None else plan.chip.name,
        "device": run.mesh.devices.flat[0].device_kind,
        "devices": plan.devices,
        "mesh": dict(run.mesh.shape),
        "capacity": plan.capacity,
        "data": {
            "assumed": plan.assumption is not None,
            "items": run.prepared.catalogue.items,
            "vocabulary": run.prepared.catalogue.vocabulary,
            "rows_per_epoch": round(rows_epoch),
            "fill": run.rows.fill,
            "targets_per_row": run.rows.targets / max(len(run.rows), 1),
        },
        "programs": {part: [_program(plan, program) for program in programs] for part, programs in plan.programs.items()},
        "fits": {part: plan.fits(part) for part in plan.programs},
        "flops": {"model": dict(plan.step.model), "hardware": dict(plan.step.hardware)},
        "assumptions": assumptions(plan, price),
    }
    if "training" in plan.programs and (parts := seconds(plan, plan.step.hardware, plan.programs["training"][0])):
        bounds = max(parts.values()), sum(parts.values())
        assert plan.chip is not None, "`seconds` gives nothing without one"
        dollars = price if price is not None else plan.chip.dollars_per_hour
        hours = [steps_epoch * bound / 3600 for bound in bounds]
        out["step"] = {
            "seconds": parts,
            "bounds": bounds,
            "tokens_per_second": [tokens / bound for bound in bounds],
            "steps_per_epoch": steps_epoch,
            "hours_per_epoch": hours,
            "dollars_per_epoch": None if dollars is None else [dollars * plan.devices * hour for hour in hours],
            "utilisation": [seconds_at_peak(plan.step.model, plan.chip) / plan.devices / bound for bound in bounds],
        }
    return out


def _program(plan: Plan, program: Program) -> dict:
    traffic = program.traffic
    return {
        "name": program.name,
        "bytes": program.held,
        "padding": program.padding,
        "temporaries": program.temporaries,
        "outputs": program.outputs,
        "code": program.code,
        "total": program.total,
        "flops": dict(program.flops),
        "memory_bytes": traffic and traffic.memory,
        "collective_bytes": traffic and traffic.collectives,
        "unknown_loops": traffic and traffic.unknown_loops,
        "compile_seconds": program.seconds,
        "seconds": seconds(plan, program.flops, program),
    }


def assumptions(plan: Plan, price: float | None) -> list[str]:
    """Returns the assumptions behind the plan, one sentence each. price: as in `record`."""
    chip, assumed = plan.chip, plan.assumption
    platform = plan.run.mesh.devices.flat[0].platform
    lines = []
    if assumed is not None:
        lines.append(
            f"data: {assumed.users:,} users with {assumed.events} events each, {assumed.items:,} items of {assumed.item_length} tokens "
            "(--num_users, --events, --num_items, --item_length)"
        )
    if chip is not None:
        peak = ", ".join(f"{flops / 1e12:.0f} TFLOP/s {kind}" for kind, flops in chip.flops.items())
        memory, links = (f"{rate / 1e9:,.0f} GB/s" for rate in (chip.hbm_bytes_per_second, chip.link_bytes_per_second))
        lines.append(f"{chip.name}: {peak}; memory {memory}, links {links}")
        lines.append("a run reaches these shares of the peak: " + ", ".join(f"{name} {share:.0%}" for name, share in SHARES.items()))
        lines.append("a step takes between the longest of compute, memory and links, and their sum, without the wait for data")
        lines.append(f"the runtime needs {RESERVE[platform]:.0%} of the {chip.hbm_bytes / GIB:.0f} GiB of the chip")
        dollars = chip.dollars_per_hour if price is None else price
        source = f"{chip.price_source}; --price" if price is None else "--price"
        lines.append(f"{dollars:.2f} USD per chip and hour ({source})" if dollars is not None else "the price is unknown (--price)")
    else:
        lines.append("there is no data sheet of this device, so its memory and its speed are unknown")
    lines.append("visible pairs and distinct items are those of a few rows; collectives use rings; a kernel reads its inputs once")
    if plan.config.eval.ranking != "item":
        lines.append("ranking by likelihood is not planned")
    return lines


def report(plan: Plan, facts: dict) -> str:
    """Returns the plan as text. facts: from `record`."""
    mesh = " x ".join(f"{name} {size}" for name, size in facts["mesh"].items())
    data, lines = facts["data"], []
    lines.append(f"{plan.topology}: {plan.devices} x {facts['chip'] or facts['device']}, mesh {mesh}; nothing was run")
    rows = f"{data['rows_per_epoch']:,} rows of {plan.config.row_slots:,} slots per epoch"
    row = f"{data['fill']:.0%} of the slots used, {data['targets_per_row']:.1f} targets per row"
    lines.append(f"{data['items']:,} items, {data['vocabulary']:,} token ids; {rows} ({row})")
    lines += ["", *_memory_table(plan), ""]
    flops, hardware = (sum(facts["flops"][name].values()) for name in ("model", "hardware"))
    lines.append(f"training step: {flops:.3e} FLOPs ({hardware:.3e} with recomputation)")
    traffic = plan.programs["training"][0].traffic if "training" in plan.programs else None
    if traffic is not None:
        sent = ", ".join(f"{kind} {count / 1e9:.3f}" for kind, count in traffic.collectives.items()) or "none"
        lines.append(f"memory traffic per chip: {traffic.memory / 1e9:,.2f} GB; sent over its links, in GB: {sent}")
        if traffic.unknown_loops:
            lines.append(f"({traffic.unknown_loops} loops whose length depends on the data are counted once)")
    if "step" in facts:
        step = facts["step"]
        parts = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in step["seconds"].items())
        lines.append(f"ms: {parts}; step {_range([1e3 * x for x in step['bounds']])}")
        utilisation = _range([100 * x for x in step["utilisation"][::-1]])
        lines.append(f"tokens/s {_range(step['tokens_per_second'][::-1])}; model FLOPs utilisation {utilisation} %")
        cost = "" if step["dollars_per_epoch"] is None else f", {_range(step['dollars_per_epoch'])} USD"
        lines.append(f"epoch of {step['steps_per_epoch']:,.0f} steps: {_range(step['hours_per_epoch'])} hours{cost}")
    for part in ("evaluation", "scoring"):
        for program in facts["programs"].get(part, []):
            if program["seconds"]:
                times = program["seconds"].values()
                lines.append(f"{part}, {program['name']}: {_range([1e3 * max(times), 1e3 * sum(times)])} ms per call")
    lines += ["", "assumptions:", *(f"- {line}" for line in facts["assumptions"])]
    return "\n".join(lines)


def _range(values: list[float]) -> str:
    low, high = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in values)
    return low if low == high else f"{low} to {high}"


def _memory_table(plan: Plan) -> list[str]:
    """Lines of a table: GiB on one device, by kind, for the largest program of each part."""
    peaks = {part: plan.peak(part) for part in plan.programs}
    columns = []
    for program in peaks.values():
        column = {kind: size for kind, size in program.held.items()}
        if program.temporaries is not None:
            column |= {"padding": program.padding, "program": program.code, "outputs": program.outputs, "temporaries": program.temporaries}
        columns.append(column)
    kinds = list(dict.fromkeys(kind for column in columns for kind in column))
    last = [kind for kind in ("padding", "program", "outputs", "temporaries") if kind in kinds]
    kinds = [kind for kind in kinds if kind not in last] + last

    def line(name: str, values) -> str:
        return f"{name:22}" + "".join(f"{value:>18}" for value in values)

    capacity = "" if plan.capacity is None else f", of {plan.capacity / GIB:.2f}"
    lines = [line("GiB per chip", peaks), line("", (program.name for program in peaks.values()))]
    for kind in kinds:
        lines.append(line(kind, (f"{column[kind] / GIB:.3f}" if kind in column else "-" for column in columns)))
    totals = ("> " * (x.total is None) + f"{x.least / GIB:.3f}" for x in peaks.values())
    return [*lines, line("total" + capacity, totals)]


# ---- if a plan does not fit


def verdict(plan: Plan) -> str:
    """Returns "" if all programs fit; otherwise one line with the memory that is needed and suggestions."""
    oversized = [part for part in plan.programs if not plan.fits(part)]
    if not oversized:
        return ""
    program = plan.peak(oversized[0])
    size = f"{program.least / GIB:.2f} GiB of memory per chip"
    needs = f"{oversized[0]} ({program.name}) needs {size if program.total is not None else f'more than {size}'}"
    available = "" if plan.capacity is None else f", but {plan.capacity / GIB:.2f} GiB are available"
    found = suggestions(plan, oversized[0])
    return f"{plan.topology}: {needs}{available}. " + ("It may fit with " + "; or ".join(found) if found else "It needs more chips") + "."


def state_bytes(run: Run, config: Config, sizes: tuple[int, int, int]) -> int:
    """Bytes of parameters and optimizer state (two moments of each trained parameter) on one device.

    sizes: the mesh axes data, fsdp and tensor.
    """
    return _state_bytes(_shapes(run, config), config, sizes)


def _shapes(run: Run, config: Config) -> Params:
    prepared = run.prepared
    size = 0 if prepared.vectors is None else prepared.vectors.shape[1]
    return make_model(config, prepared.catalogue.vocabulary, prepared.catalogue.items, None, size).shapes()


def _state_bytes(shapes: Params, config: Config, sizes: tuple[int, int, int]) -> int:
    frozen = frozen_names(config, shapes)
    mesh = AbstractMesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    trained = abstract(mesh, select(shapes, lambda name: name not in frozen))
    kept = abstract(mesh, select(shapes, lambda name: name in frozen), config.model.frozen_dtype)
    return 3 * device_bytes(trained) + device_bytes(kept)


def suggestions(plan: Plan, part: str) -> list[str]:
    """Returns changes of the config that reduce the memory of `part`, the most promising one first."""
    run, config, out = plan.run, plan.config, []
    sizes, devices = tuple(run.mesh.shape.values()), plan.devices
    now, sharded = (state_bytes(run, config, mesh) for mesh in (sizes, (1, devices, 1)))

    def saving(before: int, after: int) -> str:
        return f"parameters and optimizer take {after / GIB:.2f} instead of {before / GIB:.2f} GiB"

    if sharded < 0.95 * now:
        out.append(f"--config.mesh.data=1 --config.mesh.fsdp=-1 ({saving(now, sharded)})")
    training = part == "training"
    if training and not config.model.remat:
        out.append("--config.model.remat=True (activations are recomputed)")
    rows, shards = config.train.batch_rows, batch_shards(run.mesh)
    if training and rows // config.optimizer.accumulate > shards:
        if rows % shards == 0:
            out.append(f"--config.optimizer.accumulate={rows // shards} (one row per chip at a time, with the same gradients)")
        else:
            out.append(f"a smaller --config.train.batch_rows than {rows}")
    if training and config.model.pretrained and not config.freezes:
        lora = dataclasses.replace(config.model.lora, rank=16)
        adapted = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=lora, frozen_dtype="bfloat16"))
        after = state_bytes(run, adapted, sizes)
        out.append(f"--config.model.lora.rank=16 --config.model.frozen_dtype=bfloat16 ({saving(now, after)})")
    if not training and (size := config.eval.batch_rows if part == "evaluation" else config.score.batch_rows) > shards:
        out.append(f"a smaller --config.{'eval' if part == 'evaluation' else 'score'}.batch_rows than {size}")
    if plan.capacity is not None and sharded > plan.capacity:
        shapes = _shapes(run, config)
        # tensor may divide axes that fsdp does not.
        sizes = ((devices << power, tensor) for power in range(13) for tensor in (1, 2, 4, 8, 16))
        fitting = ((n, k) for n, k in sizes if n % k == 0 and _state_bytes(shapes, config, (1, n // k, k)) <= 0.9 * plan.capacity)
        if found := next(fitting, None):
            chips, tensor = found
            out.append(f"{chips} chips (--config.mesh.fsdp=-1{f' --config.mesh.tensor={tensor}' if tensor > 1 else ''})")
    return out

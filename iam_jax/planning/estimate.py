"""From a plan to times, costs, a report and, where the run does not fit, what would help.

Times are a roofline: products at the chip's peak, bytes at its memory's and its links' bandwidth, each at a stated share of it. What
overlaps is not known, so that a time is between the longest of the three and their sum.
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

SHARES = {"compute": 0.5, "memory": 0.8, "links": 0.5}  # of the peaks, assumed
GIB = 2**30


def seconds(plan: Plan, flops: Flops, program: Program) -> dict[str, float] | None:
    """Of compute, memory and links in one call; None without a data sheet or a compiled program."""
    chip, moved = plan.chip, program.traffic
    if chip is None or moved is None:
        return None
    return {
        "compute": seconds_at_peak(flops, chip) / plan.devices / SHARES["compute"],
        "memory": moved.memory / chip.hbm_bytes_per_second / SHARES["memory"],
        "links": moved.sent / chip.link_bytes_per_second / SHARES["links"],
    }


def record(plan: Plan, price: float | None) -> dict:
    """Everything that the report tells, as JSON. price: dollars for a chip an hour, None for the list's."""
    run, config = plan.run, plan.config
    rows_epoch = len(run.rows) * plan.scale
    steps_epoch = rows_epoch / config.train.batch_rows
    tokens = config.train.batch_rows * config.data.row_tokens * run.rows.fill
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
        "programs": {part: [_program(plan, x) for x in programs] for part, programs in plan.programs.items()},
        "fits": {part: plan.fits(part) for part in plan.programs},
        "flops": {"model": dict(plan.step.model), "hardware": dict(plan.step.hardware)},
        "assumptions": assumptions(plan, price),
    }
    if "training" in plan.programs and (parts := seconds(plan, plan.step.hardware, plan.programs["training"][0])):
        bounds = max(parts.values()), sum(parts.values())
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
    moved = program.traffic
    return {
        "name": program.name,
        "bytes": program.held,
        "padding": program.padding,
        "temporaries": program.temporaries,
        "outputs": program.outputs,
        "code": program.code,
        "total": program.total,
        "flops": dict(program.flops),
        "memory_bytes": moved and moved.memory,
        "collective_bytes": moved and moved.collectives,
        "unknown_loops": moved and moved.unknown_loops,
        "compile_seconds": program.seconds,
        "seconds": seconds(plan, program.flops, program),
    }


def assumptions(plan: Plan, price: float | None) -> list[str]:
    chip, assumed = plan.chip, plan.assumption
    platform = plan.run.mesh.devices.flat[0].platform
    told = []
    if assumed is not None:
        told.append(
            f"data: {assumed.users:,} users of {assumed.events} events, {assumed.items:,} items of {assumed.item_length} tokens (--users, "
            f"--events, --items, --item_length)"
        )
    if chip is not None:
        peak = ", ".join(f"{flops / 1e12:.0f} TFLOP/s {kind}" for kind, flops in chip.flops.items())
        memory, links = (f"{rate / 1e9:,.0f} GB/s" for rate in (chip.hbm_bytes_per_second, chip.link_bytes_per_second))
        told.append(f"a {chip.name}: {peak}; memory {memory}, links {links}")
        told.append("of these, " + ", ".join(f"{share:.0%} {name}" for name, share in SHARES.items()) + " are reached")
        told.append("a step takes at least the longest of compute, memory and links, at most their sum; waiting for data is not in it")
        told.append(f"{RESERVE[platform]:.0%} of the chip's {chip.hbm_bytes / GIB:.0f} GiB are the runtime's")
        dollars = chip.dollars_per_hour if price is None else price
        source = f"{chip.price_source}; --price" if price is None else "--price"
        told.append(f"{dollars:.2f} USD for a chip an hour ({source})" if dollars is not None else "no price is known (--price)")
    else:
        told.append("no data sheet of this device: no capacity, no times")
    told.append("visible pairs and distinct items of a few rows stand for all; collectives go around rings; a kernel reads its inputs once")
    if plan.config.eval.ranking != "item":
        told.append("ranking by likelihood is not planned")
    return told


def report(plan: Plan, facts: dict) -> str:
    """The printed plan."""
    mesh = " x ".join(f"{name} {size}" for name, size in facts["mesh"].items())
    data, lines = facts["data"], []
    lines.append(f"{plan.topology}: {plan.devices} x {facts['chip'] or facts['device']}, mesh {mesh}; nothing was run")
    rows = f"{data['rows_per_epoch']:,} rows of {plan.config.data.row_tokens:,} slots an epoch"
    of_row = f"{data['fill']:.0%} real tokens, {data['targets_per_row']:.1f} targets each"
    lines.append(f"{data['items']:,} items, {data['vocabulary']:,} token ids; {rows} ({of_row})")
    lines += ["", *_memory_table(plan), ""]
    flops, hardware = (sum(facts["flops"][name].values()) for name in ("model", "hardware"))
    lines.append(f"a training step: {flops:.3e} FLOPs ({hardware:.3e} with what is computed twice)")
    moved = plan.programs["training"][0].traffic if "training" in plan.programs else None
    if moved is not None:
        sent = ", ".join(f"{kind} {count / 1e9:.3f}" for kind, count in moved.collectives.items()) or "none"
        lines.append(f"a chip's memory moves {moved.memory / 1e9:,.2f} GB, its links, in GB: {sent}")
        if moved.unknown_loops:
            lines.append(f"({moved.unknown_loops} loops whose length depends on the data are counted once)")
    if "step" in facts:
        step = facts["step"]
        parts = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in step["seconds"].items())
        lines.append(f"ms: {parts}; a step {_range([1e3 * x for x in step['bounds']])}")
        used = _range([100 * x for x in step["utilisation"][::-1]])
        lines.append(f"tokens/s {_range(step['tokens_per_second'][::-1])}; model FLOPs utilisation {used} %")
        cost = "" if step["dollars_per_epoch"] is None else f", {_range(step['dollars_per_epoch'])} USD"
        lines.append(f"an epoch of {step['steps_per_epoch']:,.0f} steps: {_range(step['hours_per_epoch'])} hours{cost}")
    for part in ("evaluation", "scoring"):
        for program in facts["programs"].get(part, []):
            if program["seconds"]:
                times = program["seconds"].values()
                lines.append(f"{part}, {program['name']}: {_range([1e3 * max(times), 1e3 * sum(times)])} ms a call")
    lines += ["", "assumed:", *(f"- {told}" for told in facts["assumptions"])]
    return "\n".join(lines)


def _range(values: list[float]) -> str:
    low, high = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in values)
    return low if low == high else f"{low} to {high}"


def _memory_table(plan: Plan) -> list[str]:
    """GiB of one device: each part's largest program."""
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
    lines = [line("GiB of a chip", peaks), line("", (program.name for program in peaks.values()))]
    for kind in kinds:
        lines.append(line(kind, (f"{column[kind] / GIB:.3f}" if kind in column else "-" for column in columns)))
    totals = ("> " * (x.total is None) + f"{x.least / GIB:.3f}" for x in peaks.values())
    return [*lines, line("total" + capacity, totals)]


# ---- what does not fit


def verdict(plan: Plan) -> str:
    """ "" where all fits; else one line: the requirement, and what would help."""
    wrong = [part for part in plan.programs if not plan.fits(part)]
    if not wrong:
        return ""
    program = plan.peak(wrong[0])
    size = f"{program.least / GIB:.2f} GiB of a chip's memory"
    needs = f"{wrong[0]} ({program.name}) needs {size if program.total is not None else f'more than {size}'}"
    there = "" if plan.capacity is None else f", and there are {plan.capacity / GIB:.2f}"
    helpful = suggestions(plan, wrong[0])
    return f"{plan.topology}: {needs}{there}. " + ("It may fit with " + "; or ".join(helpful) if helpful else "It needs more chips") + "."


def state_bytes(run: Run, config: Config, sizes: tuple[int, int, int]) -> int:
    """Parameters and optimizer (two moments of what is trained) on one device of a mesh of these sizes."""
    return _state_bytes(_shapes(run, config), config, sizes)


def _shapes(run: Run, config: Config) -> Params:
    return make_model(config, run.prepared.catalogue.vocabulary, run.prepared.catalogue.items).shapes()


def _state_bytes(shapes: Params, config: Config, sizes: tuple[int, int, int]) -> int:
    frozen = frozen_names(config, shapes)
    mesh = AbstractMesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    trained = abstract(mesh, select(shapes, lambda name: name not in frozen))
    kept = abstract(mesh, select(shapes, lambda name: name in frozen), config.model.frozen_dtype)
    return 3 * device_bytes(trained) + device_bytes(kept)


def suggestions(plan: Plan, part: str) -> list[str]:
    """Changes of the config that would take less memory, the most promising first."""
    run, config, out = plan.run, plan.config, []
    sizes, devices = tuple(run.mesh.shape.values()), plan.devices
    now, spread = (state_bytes(run, config, mesh) for mesh in (sizes, (1, devices, 1)))

    def told(before: int, after: int) -> str:
        return f"parameters and optimizer take {after / GIB:.2f} instead of {before / GIB:.2f} GiB"

    if spread < 0.95 * now:
        out.append(f"--config.mesh.data=1 --config.mesh.fsdp=-1 ({told(now, spread)})")
    training = part == "training"
    if training and not config.model.remat:
        out.append("--config.model.remat=True (activations are computed again)")
    rows, shards = config.train.batch_rows, batch_shards(run.mesh)
    if training and rows // config.optimizer.accumulate > shards:
        if rows % shards == 0:
            out.append(f"--config.optimizer.accumulate={rows // shards} (a row of a chip at a time, for the same gradients)")
        else:
            out.append(f"a smaller --config.train.batch_rows than {rows}")
    if training and config.model.pretrained and not config.freezes:
        lora = dataclasses.replace(config.model.lora, rank=16)
        adapted = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=lora, frozen_dtype="bfloat16"))
        after = state_bytes(run, adapted, sizes)
        out.append(f"--config.model.lora.rank=16 --config.model.frozen_dtype=bfloat16 ({told(now, after)})")
    if not training and (size := config.eval.batch_rows if part == "evaluation" else config.score.batch_rows) > shards:
        out.append(f"a smaller --config.{'eval' if part == 'evaluation' else 'score'}.batch_rows than {size}")
    if plan.capacity is not None and spread > plan.capacity:
        shapes = _shapes(run, config)
        sizes = ((devices << power, tensor) for power in range(13) for tensor in (1, 2, 4, 8, 16))  # what fsdp cannot split, tensor may
        fitting = ((n, k) for n, k in sizes if n % k == 0 and _state_bytes(shapes, config, (1, n // k, k)) <= 0.9 * plan.capacity)
        if found := next(fitting, None):
            chips, tensor = found
            out.append(f"{chips} chips (--config.mesh.fsdp=-1{f' --config.mesh.tensor={tensor}' if tensor > 1 else ''})")
    return out

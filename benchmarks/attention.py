"""What a relation costs in each backend: time and memory of range_attention, forward and backward, by the length of the row.

    python benchmarks/attention.py                                   # backends, lengths and sizes by the first JAX device
    python benchmarks/attention.py --lengths=512,2048 --users_per_row=4
    python benchmarks/attention.py --check                           # those backends against the reference, on this device

Rows of items of 12 tokens. Backends, beside those of range_attention: on NVIDIA GPUs the dense mask through
jax.nn.dot_product_attention (`xla`, `cudnn`; one of the two is what the reference does there) and, where torch with CUDA is
installed, PyTorch's compiled FlexAttention with a block mask from the same ranges (`flex`; its mask is made ahead and timed apart,
the `gpu` backend makes its lists in every call). Interpreted kernels are never timed.

ms: the best sample, compilation left out; samples of all backends alternate. MiB: temporaries, beside arguments and results. Prints
one table and writes one JSON. --check compares values and gradients on ragged packings (several users, prompts, padding, empty rows,
the self key, a second range), within 1e-5 of the largest magnitude in float32 and 2e-2 in 16 bits; a mismatch is exit code 1.
"""

import argparse
import dataclasses
import importlib.util
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np

from iam_jax.kernels.range_attention import choose_implementation, cudnn_unsupported_reason, range_attention, range_mask
from iam_jax.model.attention import Ranges, key_ranges
from iam_jax.relations import RELATIONS

ITEM = 12  # tokens
PACKAGES = ("iam_jax", "jax", "jaxlib", "numpy", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch", "triton")
MEASURED = ("intra", "inter", "full")
PEERS = ("xla", "cudnn", "flex")  # not the project's own
BACKENDS = {"tpu": ("reference", "local", "tpu"), "gpu": ("local", "gpu", *PEERS)}
SIZES = {"batch": (1, 1), "heads": (2, 8), "kv_heads": (2, 8), "head_size": (32, 64), "dtype": ("float32", "bfloat16")}  # CPU, else
LENGTHS, GPU_LENGTHS = [512, 1024, 2048, 4096, 8192, 16384], [2048, 8192, 32768]


@dataclasses.dataclass
class Case:
    """One forward and backward pass, compiled."""

    run: Callable[[], tuple]  # sends it off; o, dq, dk, dv
    wait: Callable[[tuple], object]  # until those are there
    arrays: Callable[[tuple], list[np.ndarray]]  # those as float32 [B, T, N or K, H]
    bytes: dict[str, int]  # temporaries, arguments, results
    mask_seconds: float | None = None  # of a mask made ahead


# ---- the backends


def attend(backend: str, include_self: bool, reach: tuple[int, int] | None, q, k, v, ranges: Ranges) -> jax.Array:
    if backend not in PEERS:
        return range_attention(q, k, v, *ranges.first, include_self=include_self, second=ranges.second, reach=reach, implementation=backend)
    mask_BTS = range_mask(q.shape[1], k.shape[1], tuple(filter(None, ranges)), include_self)
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
        o = jax.nn.dot_product_attention(q, k, v, mask=mask_BTS[:, None], implementation=backend)
    return jnp.where(mask_BTS.any(-1)[..., None, None], o, 0)


def jax_case(backend: str, q, k, v, do, ranges: Ranges, include_self: bool = False, reach: tuple[int, int] | None = None) -> Case:
    @jax.jit
    def step(q, k, v, do, ranges):
        o, pullback = jax.vjp(lambda *qkv: attend(backend, include_self, reach, *qkv, ranges), q, k, v)
        return o, *pullback(do)

    arguments = q, k, v, do, ranges
    compiled = step.lower(*arguments).compile()
    of = compiled.memory_analysis()
    sizes = {"temporary": of.temp_size_in_bytes, "argument": of.argument_size_in_bytes, "result": of.output_size_in_bytes}
    return Case(partial(compiled, *arguments), jax.block_until_ready, lambda xs: [np.asarray(x, np.float32) for x in xs], sizes)


def flex_case(q, k, v, do, ranges: Ranges, include_self: bool = False, reach: tuple[int, int] | None = None) -> Case:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention, or_masks

    def of_range(start, stop):
        start, stop = (torch.tensor(np.asarray(x), device="cuda") for x in (start, stop))
        return lambda b, h, t, s: (s >= start[b, t]) & (s < stop[b, t])

    masks = [of_range(*bounds) for bounds in filter(None, ranges)] + [lambda b, h, t, s: t == s] * include_self
    mask_mod = or_masks(*masks) if len(masks) > 1 else masks[0]
    (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
    torch._dynamo.reset()  # after eight compilations it would fall back to the uncompiled function
    make, attention = torch.compile(create_block_mask), torch.compile(flex_attention, dynamic=False)
    for _ in range(2):  # the first time compiles
        torch.cuda.synchronize()
        start = time.perf_counter()
        block_mask = make(mask_mod, B, None, T, S, device="cuda")
        torch.cuda.synchronize()
        mask_seconds = time.perf_counter() - start

    def to_torch(x):
        return torch.tensor(np.asarray(x, np.float32), device="cuda").to(getattr(torch, x.dtype.name)).transpose(1, 2).contiguous()

    def to_numpy(x):
        return x.detach().transpose(1, 2).float().cpu().numpy()

    q, k, v, do = (to_torch(x).requires_grad_(x is not do) for x in (q, k, v, do))

    def run():
        o = attention(q, k, v, block_mask=block_mask, enable_gqa=N != K)
        return o, *torch.autograd.grad(o, (q, k, v), do)

    def size(*xs):
        return sum(x.numel() * x.element_size() for x in xs)

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = size(*run())
    torch.cuda.synchronize()
    temporary = max(torch.cuda.max_memory_allocated() - before - results, 0)
    sizes = {"temporary": temporary, "argument": size(q, k, v, do), "result": results}
    return Case(run, lambda _: torch.cuda.synchronize(), lambda xs: [to_numpy(x) for x in xs], sizes, mask_seconds)


def why_not(backend: str, q, k, reach: tuple[int, int] | None, limit_gb: float) -> str:
    """What keeps the backend from the work; "" for nothing."""
    if backend == "flex" and importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    if backend == "cudnn" and (reason := cudnn_unsupported_reason(q, k)):
        return reason
    if backend not in PEERS:
        try:
            choose_implementation(q, k, reach, backend)
        except ValueError as error:
            return str(error)
    # Logits and weights, forward and backward, float32; cuDNN takes the mask as a bias that all heads share.
    per_pair = {"reference": 16 * q.shape[2], "xla": 16 * q.shape[2], "cudnn": 16}.get(backend, 0)
    needed = per_pair * q.shape[0] * q.shape[1] * k.shape[1] / 1e9
    return f"would need about {needed:,.1f} GB, above --limit_gb={limit_gb:g}" if needed > limit_gb else ""


def make_case(backend: str, arrays, ranges: Ranges, limit_gb: float, **options) -> tuple[Case | None, str]:
    """The case, run once; or None and why not. What fails in a backend of the project for another reason than memory is raised."""
    if reason := why_not(backend, *arrays[:2], options.get("reach"), limit_gb):
        return None, reason
    try:
        make = flex_case if backend == "flex" else partial(jax_case, backend)
        case = make(*arrays, ranges, **options)
        case.wait(case.run())
        return case, ""
    except Exception as error:
        if backend not in PEERS and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


# ---- the work


def random_arrays(length: int, args: argparse.Namespace) -> list[jax.Array]:
    """q, k, v and the cotangent of o."""
    rng = np.random.default_rng(length)
    heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
    return [jnp.asarray(rng.standard_normal((args.batch, length, n, args.head_size)), args.dtype) for n in heads]


def packed(B: int, length: int, users: int) -> tuple[np.ndarray, np.ndarray]:
    """user, group [B, length] of users of the same length, all of their items of ITEM tokens."""
    t = np.arange(length)
    user = t * users // length
    first = -(-user * length // users)
    return tuple(np.tile(x.astype(np.int32), (B, 1)) for x in (user + 1, (t - first) // ITEM + 1))


def ragged(B: int, length: int) -> np.ndarray:
    """user, group, candidate [B, length] of users of random lengths: every other one has a prompt, two of three have candidates."""
    rng, batch = np.random.default_rng(length), np.zeros((3, B, length), np.int32)
    for b in range(B):
        at, number, stop = 0, 0, length - 5 * b  # then padding
        while at < stop:
            number += 1
            last = rng.integers(1, 3 + length // 40)
            groups = [(0, 0)] * (number % 2 == 0) + [(g + 1, 0) for g in range(last)] + [(last + 1, c + 1) for c in range(number % 3)]
            for group, candidate in groups:
                end = min(at + rng.integers(1, ITEM + 1), stop)
                batch[:, b, at:end] = [[number], [group], [candidate]]
                at = end
    return batch


def timed(cases: list[Case], repeats: int, on_cpu: bool) -> list[list[float]]:
    """Samples of each case in seconds, the cases in turn; none after half a minute of one case.

    Short ones are called more often: on a CPU each call is a sample; on an accelerator the calls are sent off together and their mean is
    one, so that it is the device's time.
    """

    def sample(case: Case, calls: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            results = case.run()
        case.wait(results)
        return (time.perf_counter() - start) / calls

    samples = [[] for _ in cases]
    for _ in range(repeats):
        for case, mine in zip(cases, samples, strict=True):
            if sum(mine) < 30:
                first = sample(case)  # not counted where more follow: the case before may have left caches and allocators cold
                calls = min(math.ceil(0.1 / first), 100)
                mine += [first] if calls == 1 else [sample(case) for _ in range(calls)] if on_cpu else [sample(case, calls)]
    return samples


def measure(args: argparse.Namespace) -> list[dict]:
    rows = []
    for length in args.lengths:
        arrays = random_arrays(length, args)
        ranges = key_ranges(*packed(args.batch, length, args.users_per_row), relations=MEASURED)
        for relation in MEASURED:
            reach = RELATIONS[relation].reach(ITEM)
            names = [name for name in args.backends if name != "local" or reach]
            made = {name: make_case(name, arrays, ranges[relation], args.limit_gb, reach=reach) for name in names}
            ready = {name: case for name, (case, _) in made.items() if case}
            samples = dict(zip(ready, timed(list(ready.values()), args.repeats, args.platform == "cpu"), strict=True))
            for name, (case, reason) in made.items():
                rows.append({"relation": relation, "backend": name, "length": length, "skipped": reason})
                if case:
                    rows[-1] |= {"best_seconds": min(samples[name]), "median_seconds": statistics.median(samples[name])}
                    rows[-1] |= {"samples": len(samples[name]), "mask_seconds": case.mask_seconds}
                    rows[-1] |= {f"{kind}_bytes": size for kind, size in case.bytes.items()}
    return rows


def growth(rows: list[dict]) -> list[dict]:
    """Of each relation and backend: time and temporaries of the longest row relative to those of a quarter of it, or the next below."""
    grown = []
    for relation, backend in sorted({(row["relation"], row["backend"]) for row in rows}):
        mine = [row for row in rows if (row["relation"], row["backend"]) == (relation, backend) and not row["skipped"]]
        longest = max(mine, key=lambda row: row["length"], default=None)
        if shorter := [row for row in mine if row["length"] * 4 <= longest["length"]]:
            a = max(shorter, key=lambda row: row["length"])
            of = {name: longest[key] / max(a[key], 1e-9) for name, key in (("time", "best_seconds"), ("memory", "temporary_bytes"))}
            grown.append({"relation": relation, "backend": backend, "from": a["length"], "to": longest["length"]} | of)
    return grown


def against_peers(rows: list[dict]) -> list[dict]:
    """Time of `gpu` relative to the fastest peer's, per relation and length."""
    ratios = []
    for own in (row for row in rows if row["backend"] == "gpu" and not row["skipped"]):
        same = [row for row in rows if (row["relation"], row["length"]) == (own["relation"], own["length"]) and not row["skipped"]]
        if peers := [row for row in same if row["backend"] in PEERS]:
            fastest = min(peers, key=lambda row: row["best_seconds"])
            ratio = own["best_seconds"] / fastest["best_seconds"]
            ratios.append({"relation": own["relation"], "length": own["length"], "peer": fastest["backend"], "ratio": ratio})
    return ratios


def check(args: argparse.Namespace) -> list[dict]:
    rows, tolerance, args.batch = [], 1e-5 if args.dtype == "float32" else 2e-2, max(args.batch, 2)
    for length in (n for n in args.lengths if n <= 2048):
        arrays = random_arrays(length, args)
        user, group, candidate = ragged(args.batch, length)
        ranges, plain = key_ranges(user, group, candidate), key_ranges(user, group)
        variants = {}
        for name, relation in RELATIONS.items():
            options = {} if (reach := relation.reach(ITEM)) is None else {"reach": reach}
            if ranges[name].second is None:
                variants |= {name: (ranges[name], options), f"{name}, self key": (ranges[name], options | {"include_self": True})}
            else:
                variants |= {name: (plain[name], options), f"{name}, second range": (ranges[name], options)}
        for variant, (of_variant, options) in variants.items():
            # The reference in float32, of the same rounded inputs.
            oracle = jax_case("reference", *(x.astype(jnp.float32) for x in arrays), of_variant, **options)
            expected = oracle.arrays(oracle.run())
            empty = ~np.asarray(range_mask(length, length, tuple(filter(None, of_variant)), options.get("include_self", False))).any(-1)
            for name in (name for name in args.backends if name != "local" or "reach" in options):
                case, reason = make_case(name, arrays, of_variant, args.limit_gb, **options)
                row = {"relation": variant, "backend": name, "length": length, "skipped": reason}
                if case:
                    got = case.arrays(case.run())
                    errors = [np.abs(x - y).max() / np.abs(y).max() for x, y in zip(got, expected, strict=True)]
                    zero = not any(x[empty].any() for x in got[:2])
                    row |= {"empty_rows": int(empty.sum()), "empty_rows_are_zero": zero, "error": float(np.max(errors))}
                    row["passed"] = row["error"] <= tolerance and zero  # false for NaN
                rows.append(row)
    return rows


# ---- what is printed


def three_digits(x: float) -> str:
    return f"{x:,.{max(0, 2 - math.floor(math.log10(x)))}f}" if 1e-3 <= x < 1e3 else f"{x:,.0f}"


def print_times(result: dict, lengths: list[int]) -> None:
    print(f"{'':<18}" + "".join(f"{length:>19,}" for length in lengths))
    print(f"{'relation backend':<18}" + f"{'ms':>10}{'MiB':>9}" * len(lengths) + "   growth")
    rows = {(row["relation"], row["backend"], row["length"]): row for row in result["rows"]}
    grown = {(of["relation"], of["backend"]): of for of in result["growth"]}
    for relation, backend in sorted({key[:2]: None for key in rows}, key=lambda pair: MEASURED.index(pair[0])):
        line = f"{relation:<8} {backend:<9}"
        for row in (rows[relation, backend, length] for length in lengths):
            values = [] if row["skipped"] else [row["best_seconds"] * 1e3, row["temporary_bytes"] / 2**20]
            line += "{:>10}{:>9}".format(*[three_digits(x) for x in values] or "--")
        if of := grown.get((relation, backend)):
            line += f"   {of['from']:,} to {of['to']:,}: time x{of['time']:.1f}, memory x{of['memory']:.1f}"
        print(line)
    for of in result["against_peers"]:
        print(f"{of['relation']} at {of['length']:,}: gpu takes {of['ratio']:.2f} times as long as {of['peer']}, the fastest peer")
    for row in (row for row in result["rows"] if row.get("mask_seconds")):
        print(f"{row['relation']} at {row['length']:,}: {row['backend']} makes its mask in {row['mask_seconds'] * 1e3:.2f} ms")


def print_check(rows: list[dict]) -> None:
    print(f"{'relation':<20}{'backend':<11}{'length':>8}{'empty rows':>12}{'error':>10}")
    for row in (row for row in rows if not row["skipped"]):
        verdict = "ok" if row["passed"] else "MISMATCH" if row["empty_rows_are_zero"] else "MISMATCH: an empty row is not zero"
        print(f"{row['relation']:<20}{row['backend']:<11}{row['length']:>8,}{row['empty_rows']:>12,}{row['error']:>10.1e}  {verdict}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (cpu, other) in SIZES.items():
        parser.add_argument(f"--{name}", type=type(cpu), help=f"default: {cpu} on a CPU, else {other}")
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], help="tokens of a row, commas between")
    parser.add_argument("--users_per_row", type=int, default=1)
    parser.add_argument("--backends", type=lambda text: text.split(","), help="commas between; default: all of the device's")
    parser.add_argument("--repeats", type=int, default=5, help="samples of each, at least")
    parser.add_argument("--limit_gb", type=float, default=12.0, help="dense cases that would need more are left out; units of 1e9 bytes")
    parser.add_argument("--check", action="store_true", help="compare with the reference instead")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/attention.json"))
    args = parser.parse_args(argv)
    args.platform = jax.devices()[0].platform
    for name, defaults in SIZES.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[args.platform != "cpu"])
    there = BACKENDS.get(args.platform, ("reference", "local", "blocked"))
    args.backends = args.backends or list(there)
    args.lengths = args.lengths or (GPU_LENGTHS if args.platform == "gpu" else LENGTHS)
    for name in set(args.backends) - {*there, "reference"}:
        if name not in ("tpu", "gpu"):
            parser.error(f"--backends={name}: on a {args.platform} there are {', '.join(there)}")
        if not args.check:
            parser.error(f"--backends={name}: its kernels are interpreted on a {args.platform}: their time says nothing (--check may)")
    if args.check and min(args.lengths) > 2048:
        parser.error("--check looks at lengths up to 2,048 only")
    if args.heads % args.kv_heads:
        parser.error(f"--heads={args.heads} is no multiple of --kv_heads={args.kv_heads}")
    return args


def main() -> int:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory to torch; read when the devices are first asked for
    args = parse()
    facts = harness.environment(*PACKAGES, device=jax.devices()[0])
    print(f"range_attention, forward and backward, {args.dtype}, on {facts['device']}, {facts['date']}")
    print(f"{args.batch} rows, {args.heads} heads ({args.kv_heads} of keys) of size {args.head_size}, ", end="")
    print("ragged packings" if args.check else f"items of {ITEM} tokens, users per row: {args.users_per_row}")
    print(harness.listed(facts["versions"]))

    rows = check(args) if args.check else measure(args)
    result = facts | {"settings": harness.settings(args, "platform"), "rows": rows}
    if args.check:
        print_check(rows)
        result["passed"] = all(compared := [row["passed"] for row in rows if not row["skipped"]]) and bool(compared)
    else:
        result |= {"growth": growth(rows), "against_peers": against_peers(rows)}
        print_times(result, args.lengths)
    for row in (row for row in rows if row["skipped"]):
        print(f"{row['relation']} {row['backend']} at {row['length']:,}: {row['skipped']}")
    harness.save(args.output, result)
    return 0 if result.get("passed", True) else 1


if __name__ == "__main__":
    sys.exit(main())

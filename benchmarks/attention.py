"""Measures time and memory of range_attention, forward and backward, for each relation and backend, by the length of the row.

    python benchmarks/attention.py                                   # backends, lengths and sizes for the first JAX device
    python benchmarks/attention.py --lengths=512,2048 --users_per_row=4
    python benchmarks/attention.py --check                           # compares the backends with the reference on this device

Rows contain items of 12 tokens. On NVIDIA GPUs, the backends of range_attention are compared with jax.nn.dot_product_attention and a dense
mask (`xla` and `cudnn`; the reference uses one of the two there) and, if torch with CUDA is installed, with PyTorch's compiled
FlexAttention and a block mask for the same ranges (`flex`). The mask of `flex` is made in advance and timed separately, whereas the `gpu`
backend makes its lists in every call. Interpreted kernels are never timed.

ms: the best sample, without compilation; the backends take turns. MiB: temporaries, without arguments and results. Prints one table and
writes one JSON file. --check compares values and gradients on ragged packings (several users, prompts, padding, empty rows, the self key, a
second range). They may differ by 1e-5 of the largest magnitude in float32 and by 2e-2 in 16 bits; otherwise the exit code is 1.
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

ITEM = 12  # tokens per item
PACKAGES = ("iam_jax", "jax", "jaxlib", "numpy", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch", "triton")
MEASURED = ("intra", "inter", "full")
PEERS = ("xla", "cudnn", "flex")  # backends of other projects
BACKENDS = {"tpu": ("reference", "local", "tpu"), "gpu": ("local", "gpu", *PEERS)}
SIZES = {"batch": (1, 1), "heads": (2, 8), "kv_heads": (2, 8), "head_size": (32, 64), "dtype": ("float32", "bfloat16")}  # CPU, other
LENGTHS, GPU_LENGTHS = [512, 1024, 2048, 4096, 8192, 16384], [2048, 8192, 32768]


@dataclasses.dataclass
class Case:
    """A compiled forward and backward pass."""

    run: Callable[[], tuple]  # dispatches the computation and returns o, dq, dk, dv
    wait: Callable[[tuple], object]  # waits for these results
    arrays: Callable[[tuple], list[np.ndarray]]  # converts them to float32 [B, T, N or K, H]
    bytes: dict[str, int]  # temporaries, arguments, results
    mask_seconds: float | None = None  # time to make the mask in advance


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
    memory = compiled.memory_analysis()
    sizes = {"temporary": memory.temp_size_in_bytes, "argument": memory.argument_size_in_bytes, "result": memory.output_size_in_bytes}
    return Case(partial(compiled, *arguments), jax.block_until_ready, lambda xs: [np.asarray(x, np.float32) for x in xs], sizes)


def flex_case(q, k, v, do, ranges: Ranges, include_self: bool = False, reach: tuple[int, int] | None = None) -> Case:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention, or_masks

    def range_mod(start, stop):
        start, stop = (torch.tensor(np.asarray(x), device="cuda") for x in (start, stop))
        return lambda b, h, t, s: (s >= start[b, t]) & (s < stop[b, t])

    masks = [range_mod(*bounds) for bounds in filter(None, ranges)] + [lambda b, h, t, s: t == s] * include_self
    mask_mod = or_masks(*masks) if len(masks) > 1 else masks[0]
    (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
    torch._dynamo.reset()  # otherwise torch falls back to the uncompiled function after eight compilations
    make, attention = torch.compile(create_block_mask), torch.compile(flex_attention, dynamic=False)
    for _ in range(2):  # the first iteration compiles
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


def unsupported_reason(backend: str, q, k, reach: tuple[int, int] | None, limit_gb: float) -> str:
    """Returns why the backend cannot run the case, or "" if it can."""
    if backend == "flex" and importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    if backend == "cudnn" and (reason := cudnn_unsupported_reason(q, k)):
        return reason
    if backend not in PEERS:
        try:
            choose_implementation(q, k, reach, backend)
        except ValueError as error:
            return str(error)
    # Logits and weights, forward and backward, in float32. cuDNN gets the mask as a bias that all heads share.
    per_pair = {"reference": 16 * q.shape[2], "xla": 16 * q.shape[2], "cudnn": 16}.get(backend, 0)
    needed = per_pair * q.shape[0] * q.shape[1] * k.shape[1] / 1e9
    return f"would need about {needed:,.1f} GB, above --limit_gb={limit_gb:g}" if needed > limit_gb else ""


def make_case(backend: str, arrays, ranges: Ranges, limit_gb: float, **options) -> tuple[Case | None, str]:
    """Makes the case and runs it once. Returns (case, ""), or (None, reason) if that is not possible.

    For backends of this project, only a lack of memory is such a reason; other errors are raised.
    """
    if reason := unsupported_reason(backend, *arrays[:2], options.get("reach"), limit_gb):
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


# ---- inputs


def random_arrays(length: int, args: argparse.Namespace) -> list[jax.Array]:
    """Returns q, k, v and the cotangent of o."""
    rng = np.random.default_rng(length)
    heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
    return [jnp.asarray(rng.standard_normal((args.batch, length, n, args.head_size)), args.dtype) for n in heads]


def packed(B: int, length: int, users: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns user and group, [B, length], for users of equal length whose items have ITEM tokens."""
    t = np.arange(length)
    user = t * users // length
    first = -(-user * length // users)
    return tuple(np.tile(x.astype(np.int32), (B, 1)) for x in (user + 1, (t - first) // ITEM + 1))


def ragged(B: int, length: int) -> np.ndarray:
    """Returns user, group and candidate, [B, length], for users of random lengths. Half of them have a prompt, two thirds candidates."""
    rng, batch = np.random.default_rng(length), np.zeros((3, B, length), np.int32)
    for b in range(B):
        begin, user, stop = 0, 0, length - 5 * b  # padding follows
        while begin < stop:
            user += 1
            items = rng.integers(1, 3 + length // 40)
            groups = [(0, 0)] * (user % 2 == 0) + [(g + 1, 0) for g in range(items)] + [(items + 1, c + 1) for c in range(user % 3)]
            for group, candidate in groups:
                end = min(begin + rng.integers(1, ITEM + 1), stop)
                batch[:, b, begin:end] = [[user], [group], [candidate]]
                begin = end
    return batch


# ---- measurements


def timed(cases: list[Case], repeats: int, on_cpu: bool) -> list[list[float]]:
    """Returns samples of each case in seconds. The cases take turns; a case gets no more samples after half a minute.

    A fast case is called several times per turn. On a CPU, each call is a sample. On an accelerator, the calls are dispatched together and
    their mean is one sample, so that the sample is the time of the device.
    """

    def sample(case: Case, calls: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            results = case.run()
        case.wait(results)
        return (time.perf_counter() - start) / calls

    samples = [[] for _ in cases]
    for _ in range(repeats):
        for case, seconds in zip(cases, samples, strict=True):
            if sum(seconds) < 30:
                first = sample(case)  # only counted if it is the only call, since the previous case may have left caches cold
                calls = min(math.ceil(0.1 / first), 100)
                seconds += [first] if calls == 1 else [sample(case) for _ in range(calls)] if on_cpu else [sample(case, calls)]
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
    """Returns, by relation and backend, time and temporaries of the longest row relative to a row of at most a quarter of its length."""
    growths = []
    for relation, backend in sorted({(row["relation"], row["backend"]) for row in rows}):
        measured = [row for row in rows if (row["relation"], row["backend"]) == (relation, backend) and not row["skipped"]]
        longest = max(measured, key=lambda row: row["length"], default=None)
        if shorter := [row for row in measured if row["length"] * 4 <= longest["length"]]:
            base = max(shorter, key=lambda row: row["length"])
            ratios = {name: longest[key] / max(base[key], 1e-9) for name, key in (("time", "best_seconds"), ("memory", "temporary_bytes"))}
            growths.append({"relation": relation, "backend": backend, "from": base["length"], "to": longest["length"]} | ratios)
    return growths


def against_peers(rows: list[dict]) -> list[dict]:
    """Returns the time of `gpu` relative to that of the fastest peer, per relation and length."""
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
        for variant, (variant_ranges, options) in variants.items():
            # The reference, in float32 and with the same rounded inputs.
            oracle = jax_case("reference", *(x.astype(jnp.float32) for x in arrays), variant_ranges, **options)
            expected = oracle.arrays(oracle.run())
            mask_BTS = range_mask(length, length, tuple(filter(None, variant_ranges)), options.get("include_self", False))
            empty = ~np.asarray(mask_BTS).any(-1)
            for name in (name for name in args.backends if name != "local" or "reach" in options):
                case, reason = make_case(name, arrays, variant_ranges, args.limit_gb, **options)
                row = {"relation": variant, "backend": name, "length": length, "skipped": reason}
                if case:
                    got = case.arrays(case.run())
                    errors = [np.abs(x - y).max() / np.abs(y).max() for x, y in zip(got, expected, strict=True)]
                    zero = not any(x[empty].any() for x in got[:2])
                    row |= {"empty_rows": int(empty.sum()), "empty_rows_are_zero": zero, "error": float(np.max(errors))}
                    row["passed"] = row["error"] <= tolerance and zero  # False for NaN
                rows.append(row)
    return rows


# ---- output


def three_digits(x: float) -> str:
    return f"{x:,.{max(0, 2 - math.floor(math.log10(x)))}f}" if 1e-3 <= x < 1e3 else f"{x:,.0f}"


def print_times(result: dict, lengths: list[int]) -> None:
    print(f"{'':<18}" + "".join(f"{length:>19,}" for length in lengths))
    print(f"{'relation backend':<18}" + f"{'ms':>10}{'MiB':>9}" * len(lengths) + "   growth")
    rows = {(row["relation"], row["backend"], row["length"]): row for row in result["rows"]}
    growths = {(row["relation"], row["backend"]): row for row in result["growth"]}
    for relation, backend in sorted({key[:2]: None for key in rows}, key=lambda pair: MEASURED.index(pair[0])):
        line = f"{relation:<8} {backend:<9}"
        for row in (rows[relation, backend, length] for length in lengths):
            values = [] if row["skipped"] else [row["best_seconds"] * 1e3, row["temporary_bytes"] / 2**20]
            line += "{:>10}{:>9}".format(*[three_digits(x) for x in values] or "--")
        if ratios := growths.get((relation, backend)):
            line += f"   {ratios['from']:,} to {ratios['to']:,}: time x{ratios['time']:.1f}, memory x{ratios['memory']:.1f}"
        print(line)
    for row in result["against_peers"]:
        print(f"{row['relation']} at {row['length']:,}: gpu takes {row['ratio']:.2f} times as long as {row['peer']}, the fastest peer")
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
        parser.add_argument(f"--{name}", type=type(cpu), help=f"default: {cpu} on a CPU, {other} on other devices")
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], help="tokens per row, separated by commas")
    parser.add_argument("--users_per_row", type=int, default=1)
    parser.add_argument("--backends", type=lambda text: text.split(","), help="separated by commas; default: all for the device")
    parser.add_argument("--repeats", type=int, default=5, help="minimum number of samples per case")
    parser.add_argument("--limit_gb", type=float, default=12.0, help="skip dense cases that need more memory than this (1e9 bytes)")
    parser.add_argument("--check", action="store_true", help="compare values and gradients with the reference instead of timing")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/attention.json"))
    args = parser.parse_args(argv)
    args.platform = jax.devices()[0].platform
    for name, defaults in SIZES.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[args.platform != "cpu"])
    available = BACKENDS.get(args.platform, ("reference", "local", "blocked"))
    args.backends = args.backends or list(available)
    args.lengths = args.lengths or (GPU_LENGTHS if args.platform == "gpu" else LENGTHS)
    for name in set(args.backends) - {*available, "reference"}:
        if name not in ("tpu", "gpu"):
            parser.error(f"--backends={name}: the backends for a {args.platform} are {', '.join(available)}")
        if not args.check:
            parser.error(f"--backends={name}: its kernels are interpreted on a {args.platform}, so they cannot be timed (use --check)")
    if args.check and min(args.lengths) > 2048:
        parser.error("--check only checks lengths up to 2,048")
    if args.heads % args.kv_heads:
        parser.error(f"--heads={args.heads} must be a multiple of --kv_heads={args.kv_heads}")
    return args


def main() -> int:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory for torch; JAX reads it when it initialises devices
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

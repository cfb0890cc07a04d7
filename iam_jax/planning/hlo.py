"""What a compiled program moves: bytes between a device and its memory, and between devices, read from the compiler's own text (HLO).

`cost_analysis` counts the body of a loop once; here it counts as often as it runs. An instruction reads its operands and writes its result:
a fusion, of what it only takes slices of, those; a kernel, everything once. What the compiler keeps on the chip (in a memory space other
than 0) does not count.
"""

import dataclasses
import math
import re
from collections import defaultdict
from typing import NamedTuple

_BYTES = {"pred": 1, "bf16": 2, "token": 0, "opaque": 0, "c64": 8, "c128": 16}
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "opt-barrier",
    "partition-id", "replica-id", "async-start", "async-update", "async-done",
}  # fmt: skip
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")


class Array(NamedTuple):
    bytes: float
    in_memory: bool  # the device's main memory


class Instruction(NamedTuple):
    name: str
    arrays: list[Array]  # of its result
    opcode: str
    operands: list[str]
    rest: str  # the attributes, for a constant its value
    root: bool


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one device in one call of the program."""

    memory: float  # bytes read from and written to its memory
    collectives: dict[str, float]  # bytes that it sends, by kind, in rings
    unknown_loops: int  # loops of unknown length, whose bodies count once

    @property
    def sent(self) -> float:
        return sum(self.collectives.values())


def traffic(text: str) -> Traffic:
    """text: `jax.stages.Compiled.as_text()`."""
    return _Program(text).traffic()


def _arrays(shape: str) -> list[Array]:
    found = []
    for kind, sizes, layout in _SHAPE.findall(shape):
        bits = re.search(r"\d+", kind)
        width = _BYTES[kind] if kind in _BYTES else int(bits[0]) / 8 if bits else 4
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Array(width * math.prod(int(size) for size in sizes.split(",") if size), space is None or space[1] == "0"))
    return found


def _parse(line: str) -> Instruction | None:
    left, equals, right = line.strip().partition(" = ")
    if not equals:
        return None
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    shape, call = right[:end], right[end:].strip()
    open_at = call.find("(")
    if open_at < 0:
        return None
    close = _closing(call, open_at)
    inside = call[open_at + 1 : close]
    opcode = call[:open_at]
    operands = [] if opcode in ("constant", "parameter") else [part.split()[-1].lstrip("%") for part in _split(inside)]
    rest = inside if opcode in ("constant", "parameter") else call[close + 1 :]
    return Instruction(left.removeprefix("ROOT ").lstrip("%"), _arrays(shape), opcode, operands, rest, left.startswith("ROOT "))


def _closing(text: str, at: int) -> int:
    depth = 0
    for place in range(at, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    return len(text) - 1


def _split(operands: str) -> list[str]:
    """Parts between commas that are in no bracket."""
    parts, depth, begin = [], 0, 0
    for place, letter in enumerate(operands):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == "," and not depth:
            parts.append(operands[begin:place])
            begin = place + 1
    parts.append(operands[begin:])
    parts = [re.sub(r"/\*.*?\*/", "", part).strip() for part in parts]
    return [part for part in parts if part]


class _Program:
    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, current = "", {}
        for line in text.splitlines():
            if line[:1] not in (" ", "") and line.rstrip().endswith("{"):
                name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
                current = self.computations[name] = {}
                self.entry = name if line.startswith("ENTRY ") else self.entry
            elif line.startswith(" ") and (found := _parse(line)):
                current[found.name] = found
        devices = [int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", text[: text.find("\n")])]
        self.devices = math.prod(devices)
        self.memory, self.unknown = 0.0, 0
        self.sent: dict[tuple[str, str], float] = {}  # by kind and channel: the parts of an asynchronous one share theirs

    def traffic(self) -> Traffic:
        self._walk(self.entry, 1, fused=False)
        sent = defaultdict(float)
        for (kind, _), count in self.sent.items():
            sent[kind] += count
        return Traffic(self.memory, dict(sorted(sent.items())), self.unknown)

    def _walk(self, name: str, times: float, fused: bool) -> None:
        instructions = self.computations[name]
        for instruction in instructions.values():
            opcode = instruction.opcode
            kind = opcode.removesuffix("-start")
            if kind in _COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                key = kind, channel[1] if channel else f"{name}.{instruction.name}"
                self.sent[key] = max(self.sent.get(key, 0), times * self._ring(kind, instruction))
            if not fused and opcode not in _FREE and not opcode.endswith("-done"):
                self.memory += times * self._moved(instruction, instructions)
            called = dict(_CALLED.findall(instruction.rest))
            if opcode == "while":
                trips = self._trips(instruction, called["condition"])
                self.unknown += trips is None
                self._walk(called["body"], times * (trips or 1), fused)
            elif opcode in ("fusion", "call") or opcode.startswith("async-"):
                for inner in called.values():
                    self._walk(inner, times, fused or opcode == "fusion")
            elif opcode == "conditional":
                self._branches(instruction, called, times, fused)

    def _branches(self, instruction: Instruction, called: dict[str, str], times: float, fused: bool) -> None:
        """The branch that reads and writes most."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
        names = [name.strip().lstrip("%") for name in listed[1].split(",")] if listed else list(called.values())
        before, results = (self.memory, self.unknown, dict(self.sent)), []
        for name in names:
            self.memory, self.unknown, self.sent = before[0], before[1], dict(before[2])
            self._walk(name, times, fused)
            results.append((self.memory, self.unknown, self.sent))
        self.memory, self.unknown, self.sent = max(results, key=lambda result: result[0])

    def _trips(self, loop: Instruction, condition: str) -> int | None:
        if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest):
            return int(known[1])
        instructions = self.computations[condition]
        root = next(instruction for instruction in instructions.values() if instruction.root)
        counts = [instructions[name].rest for name in root.operands if name in instructions and instructions[name].opcode == "constant"]
        if root.opcode == "compare" and "direction=LT" in root.rest and len(counts) == 1 and counts[0].isdigit():
            return int(counts[0])  # from 0 by 1, as JAX makes them
        return None

    # ---- memory

    def _moved(self, instruction: Instruction, around: dict[str, Instruction]) -> float:
        def size(arrays: list[Array]) -> float:
            return sum(array.bytes for array in arrays if array.in_memory)

        operands = [around[name].arrays if name in around else [] for name in instruction.operands]
        written = size(instruction.arrays)
        match instruction.opcode:
            case "copy-start":  # the result holds both ends
                return written
            case "dynamic-slice" | "gather":
                return 2 * written
            case "dynamic-update-slice":
                return 2 * size(operands[1])
            case "scatter":
                return 3 * size(operands[-1])
            case "fusion":
                return self._fused(instruction, operands)
        return written + sum(map(size, operands))

    def _fused(self, fusion: Instruction, operands: list[list[Array]]) -> float:
        body = self.computations[dict(_CALLED.findall(fusion.rest))["calls"]]
        users = defaultdict(list)
        for instruction in body.values():
            for place, name in enumerate(instruction.operands):
                users[name].append((instruction, place))
        parameters = {int(x.rest): x.name for x in body.values() if x.opcode == "parameter"}

        def read(name: str, whole: float) -> float:
            total = 0.0
            for user, place in users[name]:
                if user.opcode in ("dynamic-slice", "gather") and place == 0:
                    total += sum(array.bytes for array in user.arrays)
                elif user.opcode == "bitcast":
                    total += read(user.name, whole)
                elif user.opcode not in ("dynamic-update-slice", "scatter") or place:  # those write into it
                    return whole
            return min(total, whole)

        total = 0.0
        for place, arrays in enumerate(operands):
            if any(array.in_memory for array in arrays) and place in parameters:
                total += read(parameters[place], sum(array.bytes for array in arrays))
        root = next(instruction for instruction in body.values() if instruction.root)
        roots = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
        for array, result in zip(fusion.arrays, roots, strict=False):
            while result.opcode == "bitcast" and result.operands[0] in body:
                result = body[result.operands[0]]
            if array.in_memory and result.opcode == "dynamic-update-slice":
                total += sum(part.bytes for part in body[result.operands[1]].arrays)
            elif array.in_memory:
                total += array.bytes
        return total

    # ---- between devices

    def _ring(self, kind: str, instruction: Instruction) -> float:
        """Bytes that a device sends when the group's devices pass parts around a ring."""
        arrays = instruction.arrays
        if instruction.opcode in ("all-gather-start", "collective-permute-start"):  # (what goes in, what comes out, flags)
            arrays = [array for array in arrays if array.bytes > 4] or arrays
            arrays = arrays[len(arrays) // 2 :]
        size, n = sum(array.bytes for array in arrays), self._group(instruction.rest)
        if kind == "collective-permute":
            return size
        return size * {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1}.get(kind, (n - 1) / n)

    def _group(self, rest: str) -> int:
        if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
            return found[1].count(",") + 1
        if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
            return int(found[1])
        if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
        return self.devices

"""The traffic of a compiled program: bytes between a device and its memory, and between devices, from the text of its HLO.

`cost_analysis` counts the body of a loop once; here it counts as often as the loop runs. An instruction reads its operands and writes its
result. If a fusion only takes slices of an operand, the slices count; a kernel reads every operand once. Arrays that the compiler keeps on
the chip (in a memory space other than 0) do not count.
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
    in_memory: bool  # in the main memory of the device, not on the chip


class Instruction(NamedTuple):
    name: str
    arrays: list[Array]  # its results
    opcode: str
    operands: list[str]
    attributes: str  # for constants and parameters, the text between the parentheses
    root: bool


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Traffic of one device in one call of the program."""

    memory: float  # bytes read from and written to main memory
    collectives: dict[str, float]  # bytes sent to other devices, by kind of collective, if collectives use rings
    unknown_loops: int  # loops of unknown length, whose bodies are counted once

    @property
    def sent(self) -> float:
        """Bytes sent to other devices."""
        return sum(self.collectives.values())


def traffic(text: str) -> Traffic:
    """Parses a compiled program. text: `jax.stages.Compiled.as_text()`."""
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
    attributes = inside if opcode in ("constant", "parameter") else call[close + 1 :]
    return Instruction(left.removeprefix("ROOT ").lstrip("%"), _arrays(shape), opcode, operands, attributes, left.startswith("ROOT "))


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    return len(text) - 1


def _split(operands: str) -> list[str]:
    """Splits at commas outside of brackets."""
    parts, depth, begin = [], 0, 0
    for index, letter in enumerate(operands):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == "," and not depth:
            parts.append(operands[begin:index])
            begin = index + 1
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
        self.sent: dict[tuple[str, str], float] = {}  # by kind and channel, which the parts of an asynchronous collective share

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
                channel = re.search(r"channel_id=(\d+)", instruction.attributes)
                key = kind, channel[1] if channel else f"{name}.{instruction.name}"
                self.sent[key] = max(self.sent.get(key, 0), times * self._ring(kind, instruction))
            if not fused and opcode not in _FREE and not opcode.endswith("-done"):
                self.memory += times * self._moved(instruction, instructions)
            called = dict(_CALLED.findall(instruction.attributes))
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
        """Counts the branch with the most memory traffic."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        names = [name.strip().lstrip("%") for name in listed[1].split(",")] if listed else list(called.values())
        before, results = (self.memory, self.unknown, dict(self.sent)), []
        for name in names:
            self.memory, self.unknown, self.sent = before[0], before[1], dict(before[2])
            self._walk(name, times, fused)
            results.append((self.memory, self.unknown, self.sent))
        self.memory, self.unknown, self.sent = max(results, key=lambda result: result[0])

    def _trips(self, loop: Instruction, condition: str) -> int | None:
        """The number of iterations of a loop, or None if it is unknown."""
        if found := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
            return int(found[1])
        instructions = self.computations[condition]
        root = next(instruction for instruction in instructions.values() if instruction.root)
        operands = [instructions[name] for name in root.operands if name in instructions]
        counts = [operand.attributes for operand in operands if operand.opcode == "constant"]
        if root.opcode == "compare" and "direction=LT" in root.attributes and len(counts) == 1 and counts[0].isdigit():
            return int(counts[0])  # JAX's loops count from 0 in steps of 1
        return None

    # ---- memory

    def _moved(self, instruction: Instruction, computation: dict[str, Instruction]) -> float:
        """Bytes that an instruction reads from and writes to main memory."""

        def size(arrays: list[Array]) -> float:
            return sum(array.bytes for array in arrays if array.in_memory)

        operands = [computation[name].arrays if name in computation else [] for name in instruction.operands]
        written = size(instruction.arrays)
        match instruction.opcode:
            case "copy-start":  # its result contains both the source and the destination
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
        """Bytes that a fusion reads and writes. If it only takes slices of an operand, only the slices count."""
        body = self.computations[dict(_CALLED.findall(fusion.attributes))["calls"]]
        users = defaultdict(list)
        for instruction in body.values():
            for position, name in enumerate(instruction.operands):
                users[name].append((instruction, position))
        parameters = {int(x.attributes): x.name for x in body.values() if x.opcode == "parameter"}

        def read(name: str, whole: float) -> float:
            total = 0.0
            for user, position in users[name]:
                if user.opcode in ("dynamic-slice", "gather") and position == 0:
                    total += sum(array.bytes for array in user.arrays)
                elif user.opcode == "bitcast":
                    total += read(user.name, whole)
                elif user.opcode not in ("dynamic-update-slice", "scatter") or position:  # these write into operand 0
                    return whole
            return min(total, whole)

        total = 0.0
        for number, arrays in enumerate(operands):
            if any(array.in_memory for array in arrays) and number in parameters:
                total += read(parameters[number], sum(array.bytes for array in arrays))
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
        """Bytes that a device sends if the devices of the group pass parts around a ring."""
        arrays = instruction.arrays
        if instruction.opcode in ("all-gather-start", "collective-permute-start"):  # results: (inputs, outputs, flags)
            arrays = [array for array in arrays if array.bytes > 4] or arrays
            arrays = arrays[len(arrays) // 2 :]
        size, n = sum(array.bytes for array in arrays), self._group(instruction.attributes)
        if kind == "collective-permute":
            return size
        return size * {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1}.get(kind, (n - 1) / n)

    def _group(self, attributes: str) -> int:
        """The number of devices in a group of a collective."""
        if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
            return found[1].count(",") + 1
        if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
            return int(found[1])
        if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
        return self.devices

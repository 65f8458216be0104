"""Reads a program as XLA compiled it: what the compiler says that each part of it takes.

Every figure is a compiler estimate, none was measured on a device. A TPU program carries ``estimated_cycles`` for what
runs on the TensorCore; they are pessimistic for copies and elementwise work, and know neither overlap nor stalls. Two
kinds of instructions carry none:

* Attention, one Pallas kernel: `Report.attention` is the time of its products at the peak of the chip, a lower bound.
* Collectives: `_collective` sets their bytes against the links that cut the group of chips in two, as if nothing ran
  beside them and no link wrapped around. Those that the compiler starts and awaits apart are counted as hidden.

A GPU program carries no times; of that the library calls are counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

LARGE = 64 * 2**20  # bytes: an activation of a large model, not a row of norms
MOVES = set(
    "copy transpose bitcast reshape slice dynamic-slice dynamic-update-slice pad concatenate parameter constant"
    " broadcast tuple get-tuple-element iota select compare and add subtract clamp gather reverse".split()
)
COLLECTIVES = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")
SCHEDULED = re.compile(r"-(start|done|update)$")

COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\(([^)]*)\)(.*)")
ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")


class Chip(NamedTuple):
    """Per JAX device: peak of bf16 (FLOP/s), clock (Hz), and bytes/s of one link to a neighbour in one direction.

    The clock is the published peak over the operations per cycle of the matrix units (8 of 128 x 128 make 262,144).
    """

    peak: float
    clock: float
    link: float


CHIPS = {"v6e": Chip(918e12, 1.75e9, 100e9), "v7x": Chip(1153e12, 2.20e9, 100e9)}


class Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str

    def called(self, key: str) -> str:
        """The computation that is named as ``key``, of several the first; or ""."""
        match = re.search(rf"\b{key}=\{{?%?([\w.-]+)", self.rest)
        return match[1] if match else ""

    @property
    def cycles(self) -> int:
        match = re.search(r'"estimated_cycles":"?(\d+)', self.rest)
        return int(match[1]) if match else 0


@dataclass
class Program:
    """Computations by name, each its instructions by name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def walk(self, computation: str = "", times: int = 1) -> Iterator[tuple[Instruction, str, int]]:
        """Every instruction that runs, the computation that it is in, and how often."""
        computation = computation or self.entry
        for instruction in self.computations[computation].values():
            yield instruction, computation, times
            if instruction.op == "while":
                yield from self.walk(instruction.called("body"), times * self._trips(instruction))
            elif instruction.op in ("call", "conditional", "async-start"):
                for key in ("to_apply", "calls", "branch_computations"):
                    if inner := instruction.called(key):
                        yield from self.walk(inner, times)

    def _trips(self, loop: Instruction) -> int:
        """TPU text does not tell: it is the bound that the counter is compared with."""
        if known := re.search(r"known_trip_count\W+n\W+(\d+)", loop.rest):
            return int(known[1])
        condition = self.computations[loop.called("condition")].values()
        return max(int(i.operands[0]) for i in condition if i.op == "constant" and i.operands[0].isdigit())

    def operations(self, instruction: Instruction) -> set[str]:
        """Of a fusion what it is made of, else its own."""
        if instruction.op != "fusion":
            return {instruction.op}
        inner = self.computations[instruction.called("calls")].values()
        return set().union(*map(self.operations, inner))


def parse(text: str) -> Program:
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            current = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif current is not None and (match := INSTRUCTION.match(line)):
            _, name, shape, op, operands, rest = match.groups()
            names = tuple(re.sub(r"/\*.*?\*/|%|\s", "", operands).split(","))
            current[name] = Instruction(name, shape, op, names, rest)
    return Program(computations, entry)


def arrays(shape: str) -> list[tuple[int, tuple[int, ...]]]:
    """Bytes and sizes of the arrays in the text of a shape."""
    found = []
    for _, bits, sizes in ARRAY.findall(shape):
        sizes = tuple(map(int, sizes.split(","))) if sizes else ()
        found.append((math.prod(sizes) * int(bits or 8) // 8, sizes))
    return found


def num_bytes(shape: str) -> int:
    return sum(size for size, _ in arrays(shape))


@dataclass
class Report:
    """Seconds of one call on one device, by kind of work; and counts.

    Attributes:
        large_copies: of activations from layout to layout, in the loop that runs most often.
        windowed: products that the partitioner cut in steps instead of gathering the weights.
        calls: of libraries, by target, each as often as the text has it.
        gelu: products with the activation in their epilogue.
        transposes: of arrays that a product needs the other way round (GPU).
    """

    matmul: float = 0.0
    elementwise: float = 0.0
    copies: float = 0.0
    collectives: float = 0.0
    attention: float = 0.0
    large_copies: int = 0
    windowed: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    gelu: int = 0
    transposes: int = 0


def read(text: str, chip: Chip | None = None) -> Report:
    """What the text of a compiled program tells; without a chip no times."""
    program, report = parse(text), Report()
    report.windowed = text.count("windowed_dot_general")
    report.gelu = len(re.findall(r'"epilogue":"\w*GELU', text))
    deepest = max(times for *_, times in program.walk())
    for instruction, computation, times in program.walk():
        if instruction.op == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)[1]
            report.calls[target] = report.calls.get(target, 0) + 1
        report.transposes += instruction.name.startswith("input_transpose")
        if chip is None:
            continue
        kind = _kind(program, instruction)
        if kind == "collectives":
            seconds = _collective(program.computations[computation], instruction, chip)
        elif kind == "attention":
            seconds = _attention(program.computations[computation], instruction) / chip.peak
        else:
            seconds = instruction.cycles / chip.clock
        if kind:
            setattr(report, kind, getattr(report, kind) + times * seconds)
        report.large_copies += kind == "copies" and times == deepest and num_bytes(instruction.shape) >= LARGE
    return report


def _kind(program: Program, instruction: Instruction) -> str:
    """The attribute of `Report` to which an instruction belongs, or "": it is free, or runs beside others."""
    if instruction.op in COLLECTIVES:
        return "collectives"
    if 'custom_call_target="tpu_custom_call"' in instruction.rest:
        return "attention"
    if not instruction.cycles or SCHEDULED.search(instruction.op):
        return ""
    made_of = program.operations(instruction)
    if made_of & {"convolution", "dot"}:
        return "matmul"
    return "copies" if made_of <= MOVES else "elementwise"


def _attention(scope: dict[str, Instruction], kernel: Instruction) -> int:
    """Operations of the two products: of queries and keys [heads, tokens, K], its first large operands."""
    shapes = [arrays(scope[name].shape)[0][1] for name in kernel.operands]
    queries, keys = [shape for shape in shapes if len(shape) >= 3 and shape[-1] % 64 == 0 and shape[-2] >= 128][:2]
    return 4 * math.prod(queries) * keys[-2]


def _collective(scope: dict[str, Instruction], instruction: Instruction, chip: Chip) -> float:
    """Seconds on the links, for n chips that hold ``size`` bytes each.

    all-to-all: half of what half of the chips hold crosses the middle of their n = 2 x n/2 mesh, over two links (one
    for n = 2). all-gather, reduce-scatter: all that a chip lacks comes over two links; all-reduce is both in turn.
    collective-permute: one link.
    """
    size = sum(num_bytes(scope[name].shape) for name in instruction.operands)
    n = _group(instruction.rest)
    if instruction.op == "collective-permute":
        return size / chip.link
    if instruction.op == "all-to-all":
        return size * n / 4 / (min(2, n // 2) * chip.link)
    whole = max(size, num_bytes(instruction.shape))
    return (2 if instruction.op == "all-reduce" else 1) * whole * (n - 1) / n / (2 * chip.link)


def _group(rest: str) -> int:
    """Chips of one group: listed, ``[groups, chips]``, or named axes of a mesh."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", match[2]))
    return 1

"""Costs of a compiled TPU program from its scheduled HLO: cycles, collectives, memory.

XLA writes its cycle estimate into every fusion; loops multiply it by their trip count. Pallas calls
have no estimate; their cycles come from the kernel's schedule. Waiting for collectives is not
included.
"""

import collections
import dataclasses
import math
import re

import jax

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_LIMIT = re.compile(r" = s32\[\][^ ]* constant\((\d+)\)")
_CALLED = re.compile(r"(?:body|to_apply|calls)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
_COLLECTIVES = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Costs:
    """Per chip: estimated cycles by kind of operation, bytes received by kind of collective."""

    cycles: dict[str, int]
    collective_bytes: dict[str, int]
    kernel_calls: int


def read_costs(hlo: str) -> Costs:
    """Sums the estimates of a scheduled HLO module over its loops."""
    computations, entry = _computations(hlo)
    cycles: collections.Counter[str] = collections.Counter()
    received: collections.Counter[str] = collections.Counter()
    kernel_calls = 0

    def visit(name: str, times: int) -> None:
        nonlocal kernel_calls
        for line in computations[name]:
            match = _OPERATION.match(line)
            if not match:
                continue
            _, shape, kind = match.groups()
            base = kind.removesuffix("-start")
            if base in _COLLECTIVES:
                received[base] += times * _received(base, shape, line)
            if kind == "fusion":
                for called in _CALLED.findall(line):
                    received.update(_fused_collectives(called, computations.get(called, []), times))
            if kind == "custom-call" and "tpu_custom_call" in line:
                kernel_calls += times
            if estimate := _CYCLES.search(line):
                cycles[_kind(kind, line)] += times * int(estimate[1])
            elif kind in ("while", "call", "conditional", "async-start"):
                inner = times * (_trips(computations, line) if kind == "while" else 1)
                called = _CALLED.findall(line)
                for branches in _BRANCHES.findall(line):
                    called += [b.strip().lstrip("%") for b in branches.split(",")]
                for computation in called:
                    visit(computation, inner)

    visit(entry, 1)
    return Costs(dict(cycles), dict(received), kernel_calls)


def _fused_collectives(name: str, lines: list[str], times: int) -> dict[str, int]:
    """Bytes received by the collectives inside a fusion, by kind.

    A TPU runs an all-reduce of which each chip keeps its share as one "all-reduce-scatter" fusion,
    which moves what a reduce-scatter moves: half of an all-reduce.
    """
    received: collections.Counter[str] = collections.Counter()
    for line in lines:
        match = _OPERATION.match(line)
        if match and match[3] in _COLLECTIVES:
            size = times * _received(match[3], match[2], line)
            if match[3] == "all-reduce" and "all-reduce-scatter" in name:
                received["reduce-scatter"] += size // 2
            else:
                received[match[3]] += size
    return dict(received)


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Returns HBM bytes per chip by kind; donated buffers count once."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError("the compiler reports no memory for this program")
    parts = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }
    return parts | {"total": sum(parts.values())}


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        match = _COMPUTATION.match(line)
        if match and " = " not in line.split("(")[0]:
            current = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return computations, entry


def _trips(computations: dict[str, list[str]], line: str) -> int:
    """Returns the trip count of a while loop from 0: the constant in its condition."""
    found = _CONDITION.search(line)
    if found is None:
        raise ValueError(f"a loop without a condition: {line.strip()[:80]}")
    condition = computations[found[1]]
    limits = [int(match[1]) for text in condition if (match := _LIMIT.search(text))]
    if len(limits) != 1:
        raise ValueError(f"cannot tell the trips of a loop: {limits} in {line.strip()[:80]}")
    return limits[0]


def _kind(kind: str, line: str) -> str:
    if kind == "fusion" and ("kind=kOutput" in line or "convolution" in line.split(" = ")[0]):
        return "matmul"
    if kind == "convolution":
        return "matmul"
    if kind in ("copy", "copy-start", "transpose", "bitcast-convert"):
        return "copy"
    return "elementwise" if kind == "fusion" else kind


def _received(kind: str, shape: str, line: str) -> int:
    """Computes the bytes a chip receives, from the result's shape and the group's size."""
    groups = re.search(r"replica_groups=(?:\[(\d+),(\d+)\]|\{\{([\d,]+)\})", line)
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    size = 1
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        size = math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    elif groups:
        size = int(groups[2]) if groups[2] else len(groups[3].split(","))
    shapes = _SHAPE.findall(shape)
    if f" {kind}-start(" in line:
        # The tuple has operands, results, and possibly contexts, which are scalars.
        shapes = [(dtype, dims) for dtype, dims in shapes if dims]
        operands = len(_SHAPE.findall(shape.split(")")[0])) if shape[1] == "(" else len(shapes) // 2
        shapes = shapes[operands : 2 * operands]
    total = 0
    for dtype, dims in shapes:
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim)
        total += count * _BYTES.get(dtype, 0)
    if kind == "collective-permute":
        return total
    if size == 1:
        return 0
    share = {"all-gather": 1, "all-to-all": 1, "reduce-scatter": size, "all-reduce": 2}[kind]
    return total * share * (size - 1) // size

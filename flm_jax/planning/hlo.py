"""A parser of compiled HLO text: collectives, hand-written kernels, and the TPU compiler's estimate of cycles.

A loop's body counts as often as the loop runs, and every branch of a conditional counts once. XLA does not promise that
this text stays the same, so everything that the parser does not understand is counted in `Program.unread`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_LAYOUT = re.compile(r"\{[^{}]*\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r"condition=%([\w.\-]+), body=%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BOUND = re.compile(r"= [su]32\[\]\S* constant\((\d+)\)")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_PARTITIONS = re.compile(r"^HloModule .*\bnum_partitions=(\d+)", re.MULTILINE)
_EVERYONE = re.compile(r"replica_groups=\{\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
# Every collective that is written in a `shard_map` has this channel; those of the partitioner have one each.
_SHARED_CHANNEL = "1"
_PAIRS = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      result: bytes of its result on one device; for reduce-scatter, of its operand, which is larger.
      shape: dtype and shape of the result, as written in the text.
      group: the devices of one group, by their index in the program.
      times: how often it runs in one call.
      overlapped: whether it is asynchronous (start and done are separate), so that it can overlap with work.
    """

    kind: str
    result: int
    shape: str
    group: tuple[int, ...]
    times: int
    overlapped: bool

    @property
    def sent(self) -> float:
        """Bytes that each device sends in one run, with the best algorithm on a ring."""
        n = len(self.group)
        if self.kind == "collective-permute":
            return float(self.result)
        return self.result * max(n - 1, 0) / max(n, 1) * (2 if self.kind == "all-reduce" else 1)


@dataclass
class Program:
    """The contents of a program's text.

    Attributes:
      cycles: sum of the compiler's estimated cycles, with loops counted in full.
      collectives: all collectives.
      channels: index in `collectives` by channel id.
      kernels: how often each hand-written kernel runs.
      devices: number of devices that the program is for.
      unread: number of loops with an unknown trip count (their bodies count once) and of collectives with an unknown
        group or dtype.
    """

    cycles: int = 0
    collectives: list[Collective] = field(default_factory=list)
    channels: dict[str, int] = field(default_factory=dict)
    kernels: Counter[str] = field(default_factory=Counter)
    devices: int = 1
    unread: int = 0

    def by_kind(self) -> dict[str, dict[str, float]]:
        """For each kind that occurs: how many collectives run in one call, and the bytes that each device sends."""
        found: dict[str, dict[str, float]] = {}
        for c in self.collectives:
            entry = found.setdefault(c.kind, {"count": 0, "sent_bytes": 0.0})
            entry["count"] += c.times
            entry["sent_bytes"] += c.times * c.sent
        return found

    def most_sent(self, most: int) -> list[dict[str, Any]]:
        """The collectives that send the most bytes in one call, those of one kind, shape and group size together."""
        found: dict[tuple[str, str, int], dict[str, Any]] = {}
        for c in self.collectives:
            what = {"kind": c.kind, "shape": c.shape, "devices": len(c.group)}
            entry = found.setdefault((c.kind, c.shape, len(c.group)), {**what, "count": 0, "sent_bytes": 0.0})
            entry["count"] += c.times
            entry["sent_bytes"] += c.times * c.sent
        return sorted(found.values(), key=lambda entry: -float(entry["sent_bytes"]))[:most]

    def largest(self, kind: str) -> Collective | None:
        """The collective of a kind with the largest result; None if there is none of that kind."""
        return max((c for c in self.collectives if c.kind == kind), key=lambda c: c.result, default=None)


def read(text: str) -> Program:
    """The contents of the text of a compiled program (`jax.stages.Compiled.as_text`)."""
    bodies, entry = _computations(text)
    partitions = _PARTITIONS.search(text)
    program = Program(devices=int(partitions[1]) if partitions else 1)
    _walk(entry, 1, bodies, program, counting=True)
    return program


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = bodies.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            # The text of a hand-written kernel has lines that start with a brace and continue the instruction.
            current = None if line.rstrip() == "}" else current
        elif current is not None:
            current.append(line)
    return bodies, entry


def _walk(name: str, times: int, bodies: Mapping[str, Sequence[str]], into: Program, counting: bool) -> None:
    for line in bodies.get(name, ()):
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        instruction, shape, operation = match[1], match[2], match[3]
        if counting and operation not in ("while", "conditional", "call") and (cycles := _CYCLES.search(line)):
            into.cycles += times * int(cycles[1])
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            _add(_collective(kind, shape, line, name, times, operation != kind, into), line, into)
        elif operation == "while" and (loop := _LOOP.search(line)):
            rounds = _rounds(line, bodies.get(loop[1], ()))
            into.unread += rounds is None
            _walk(loop[2], times * (rounds or 1), bodies, into, counting)
        elif operation == "conditional":
            for branch in _BRANCHES.findall(line):
                for called in branch.split(","):
                    _walk(called.strip().lstrip("%"), times, bodies, into, counting)
            for called in _CALLED.findall(line):
                _walk(called, times, bodies, into, counting)
        elif operation in ("fusion", "call", "async-start"):
            # The cycles of a fusion are given at the fusion itself, so only collectives are looked for inside.
            for called in _CALLED.findall(line):
                _walk(called, times, bodies, into, counting and operation == "call")
        elif operation == "custom-call" and 'custom_call_target="tpu_custom_call"' in _whole(line, bodies[name]):
            into.kernels[re.sub(r"[.\d]+$", "", instruction)] += times


def _add(found: Collective, line: str, into: Program) -> None:
    """Adds a collective; one that was split to overlap with work appears in several fusions, and counts once."""
    channel = _CHANNEL.search(line)
    name = None if channel is None or channel[1] == _SHARED_CHANNEL else channel[1]
    if name is None or name not in into.channels:
        if name is not None:
            into.channels[name] = len(into.collectives)
        into.collectives.append(found)
    else:
        place = into.channels[name]
        into.collectives[place] = replace(into.collectives[place], overlapped=True)


def _whole(line: str, lines: Sequence[str]) -> str:
    """A line of an instruction together with its continuation lines."""
    start = lines.index(line)
    end = next((i for i in range(start + 1, len(lines)) if _INSTRUCTION.match(lines[i])), len(lines))
    return "\n".join(lines[start:end])


def _rounds(line: str, condition: Sequence[str]) -> int | None:
    if known := _TRIPS.search(line):
        return int(known[1])
    bounds = {int(n) for text in condition for n in _BOUND.findall(text)}
    return bounds.pop() if len(bounds) == 1 else None


def _collective(
    kind: str, shape: str, line: str, computation: str, times: int, overlapped: bool, into: Program
) -> Collective:
    """The collective of a line; if it has several result arrays, their bytes are added."""
    if overlapped and kind != "all-reduce":
        # A start operation's shape lists operands and results: (operand, result, ...) or ((operands), (results), ...).
        groups = re.findall(r"\(([^()]*)\)", _LAYOUT.sub("", shape)[1:-1])
        parts = _SHAPE.findall(groups[1]) if len(groups) > 1 else _SHAPE.findall(shape)[1:2]
    else:
        parts = _SHAPE.findall(shape)
    size = sum(_bytes(*part) for part in parts)
    text = ", ".join(f"{dtype}[{dims}]" for dtype, dims in parts[:3]) + (", ..." if len(parts) > 3 else "")
    group = tuple(range(into.devices)) if _EVERYONE.search(line) else _group(line)
    into.unread += not group or any(_size(dtype) is None for dtype, _ in parts)
    if computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # On TPUs it is written as an all-reduce from which each device keeps its slice.
    elif kind == "reduce-scatter":
        size *= max(len(group), 1)
    return Collective(kind, size, text, group, times, overlapped)


def _size(dtype: str) -> int | None:
    return 1 if dtype.startswith("f8") else _BYTES.get(dtype)


def _bytes(dtype: str, dims: str) -> int:
    return (_size(dtype) or 0) * math.prod(int(n) for n in dims.split(",") if n)


def _group(line: str) -> tuple[int, ...]:
    """The first device group of a collective, from any of the forms in which the text writes groups."""
    if match := _LISTED.search(line):
        return tuple(int(n) for n in match[1].split(",") if n)
    if match := _IOTA.search(line):
        groups, dims = ([int(n) for n in match[i].split(",")] for i in (1, 2))
        return tuple(_iota(dims, _order(match[3], dims), i) for i in range(groups[-1]))
    if match := _MESH.search(line):
        names = [part.split("=") for part in match[1].split(",")]
        sizes = {name.strip(" '"): int(size) for name, size in names}
        split = [name.strip(" '") for name in match[4].split(",")]
        strides: dict[str, int] = {}
        for name in reversed(sizes):
            strides[name] = math.prod(sizes[later] for later in list(sizes)[list(sizes).index(name) + 1 :])
        members = [0]
        for name in split:
            members = [m + strides[name] * i for m in members for i in range(sizes[name])]
        if match[2]:
            dims = [int(n) for n in match[2].split(",")]
            members = [_iota(dims, _order(match[3], dims), m) for m in members]
        return tuple(members)
    if match := _PAIRS.search(line):
        return int(match[1]), int(match[2])
    return ()


def _order(text: str | None, dims: Sequence[int]) -> list[int]:
    return [int(n) for n in text.split(",")] if text else list(range(len(dims)))


def _iota(dims: Sequence[int], order: Sequence[int], index: int) -> int:
    """Entry `index` of `arange(prod(dims)).reshape(dims).transpose(order)`, in row-major order."""
    moved = [dims[axis] for axis in order]
    place = []
    for size in reversed(moved):
        place.append(index % size)
        index //= size
    original = dict(zip(order, reversed(place), strict=True))
    number = 0
    for axis, size in enumerate(dims):
        number = number * size + original[axis]
    return number

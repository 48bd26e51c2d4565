"""What a compiled program sends between devices, read from its HLO text.

A program is a set of computations that call each other; loops say how often they run where the
compiler knows. Every collective is counted as often as it runs in one execution of the program.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = (
    "all-to-all",
    "ragged-all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?(?P<name>[\w.\-]+) .*\{\s*$")
_COLLECTIVE = re.compile(rf" (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_CALLS = re.compile(
    r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_GROUPS = re.compile(
    r"replica_groups=(?:\[(?P<count>\d+),(?P<size>\d+)\]<=|\{\{(?P<first>[\d,]*)\})"
)
# Over named axes: mesh['data'=2,'expert'=4] {'expert'}; part of an axis is written 'data':(1)2.
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[(?P<axes>[^\]]*)\] \{(?P<over>[^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{\{")

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: 'all-to-all', 'all-reduce', ...
      shape: of its result on one device, as HLO prints it without layout.
      nbytes: on one device, of the larger of operand and result.
      group_size: devices that take part together; 0 for all of them, 2 for a permutation's pairs.
      times: how often it runs in one execution of the program; loops of unknown length count once.
      open_ended: whether it is in such a loop, whose length only the running program knows.
    """

    kind: str
    shape: str
    nbytes: int
    group_size: int
    times: int
    open_ended: bool = False


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over groups of one size, inside or outside of loops of unknown
    length.

    Attributes:
      kind: see `Collective`.
      group_size: see `Collective`.
      count: executions.
      nbytes: of all executions together, on one device.
      open_ended: see `Collective`; count and bytes are then those of one pass.
    """

    kind: str
    group_size: int
    count: int
    nbytes: int
    open_ended: bool = False


def collectives(hlo_text: str) -> list[Collective]:
    """All collectives of a compiled program (`compiled.as_text()`), in the order of the text."""
    bodies, entry = _computations(hlo_text)
    times = _times(bodies, entry)
    found = []
    for name, lines in bodies.items():
        for line in lines:
            if match := _COLLECTIVE.search(line):
                item = _collective(line, match, name)
                for open_ended in (False, True):
                    if count := times[name, open_ended]:
                        found.append(dataclasses.replace(item, times=count, open_ended=open_ended))
    return found


def summary(found: list[Collective]) -> list[Traffic]:
    """Totals by kind, group size and whether in loops of unknown length, most bytes first."""
    counts: collections.Counter[tuple[str, int, bool]] = collections.Counter()
    nbytes: collections.Counter[tuple[str, int, bool]] = collections.Counter()
    for item in found:
        key = item.kind, item.group_size, item.open_ended
        counts[key] += item.times
        nbytes[key] += item.times * item.nbytes
    return [
        Traffic(*key[:2], count=counts[key], nbytes=total, open_ended=key[2])
        for key, total in nbytes.most_common()
    ]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Instruction lines by computation, and the name of the entry."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line and not line[0].isspace():
            match = _COMPUTATION.match(line)
            current = match["name"] if match and not line.startswith("HloModule") else None
            if current is not None:
                bodies[current] = []
                entry = current if line.startswith("ENTRY") else entry
        elif current is not None and " = " in line:
            bodies[current].append(line)
    return bodies, entry


def _callees(line: str) -> Iterator[tuple[str, int | None]]:
    """Computations that an instruction runs, and how often; None where only the running program
    knows.
    """
    often: int | None = 1
    if " while(" in line:
        trips = _TRIPS.search(line)
        often = int(trips[1]) if trips else None
    for name in _CALLS.findall(line):
        yield name, often
    for names in _BRANCHES.findall(line):
        for name in names.split(","):
            yield name.strip().lstrip("%"), often


def _times(bodies: dict[str, list[str]], entry: str) -> collections.Counter[tuple[str, bool]]:
    """How often each computation runs when the entry runs once, outside (False) and inside (True)
    of loops of unknown length.
    """
    times: collections.Counter[tuple[str, bool]] = collections.Counter()
    pending = [(entry, 1, False)]
    while pending:
        name, often, open_ended = pending.pop()
        if name not in bodies:
            continue
        times[name, open_ended] += often
        for line in bodies[name]:
            pending += [
                (callee, often * (factor or 1), open_ended or factor is None)
                for callee, factor in _callees(line)
            ]
    return times


def _collective(line: str, match: re.Match[str], computation: str) -> Collective:
    result = line[line.index(" = ") + 3 : match.start()]
    arrays = [(f"{dtype}[{dims}]", _nbytes(dtype, dims)) for dtype, dims in _ARRAY.findall(result)]
    kind, group_size = match["kind"], _group_size(line)
    if match["start"] and kind != "all-reduce":
        # The result of a start is (operand, result, context...).
        arrays = [max(arrays, key=lambda item: item[1])] if arrays else []
    nbytes = sum(size for _, size in arrays)
    if kind == "all-reduce" and "reduce-scatter" in computation:
        # TPU writes it as an all-reduce that is fused with the slice which each device keeps
        kind = "reduce-scatter"
    elif kind == "reduce-scatter":
        nbytes *= max(group_size, 1)
    return Collective(kind, ", ".join(shape for shape, _ in arrays), nbytes, group_size, times=1)


def _nbytes(dtype: str, dims: str) -> int:
    digits = re.search(r"\d+", dtype)
    bits = _BITS.get(dtype) or (int(digits[0]) if digits else 8)
    return math.prod(int(n) for n in dims.split(",") if n) * bits // 8


def _group_size(line: str) -> int:
    if _PAIRS.search(line):
        return 2
    over_mesh = _MESH_GROUPS.search(line)
    if over_mesh is not None:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", over_mesh["axes"]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", over_mesh["over"])
        return math.prod(int(part or sizes[name]) for name, part in parts)
    groups = _GROUPS.search(line)
    if groups is None:
        return 0
    return int(groups["size"]) if groups["size"] else len(groups["first"].split(","))

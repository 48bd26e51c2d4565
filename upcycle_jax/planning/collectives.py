"""What a compiled program sends between devices, read from its HLO text.

Every collective is counted as often as it runs in one execution of the program.
"""

import collections
import dataclasses
import math
import re

from upcycle_jax.planning.hlo import Instruction, Program

KINDS = (
    "all-to-all",
    "ragged-all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
)

_COLLECTIVE = re.compile(rf"(?P<kind>{'|'.join(KINDS)})(?P<start>-start)?")
_GROUPS = re.compile(
    r"replica_groups=(?:\[(?P<count>\d+),(?P<size>\d+)\]<=|\{\{(?P<first>[\d,]*)\})"
)
# Over named axes: mesh['data'=2,'expert'=4] {'expert'}; part of an axis is written 'data':(1)2.
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[(?P<axes>[^\]]*)\] \{(?P<over>[^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{\{")


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


def collectives(program: Program) -> list[Collective]:
    """All collectives of a compiled program, in the order of its text."""
    found = []
    for name, computation in program.computations.items():
        for instruction in computation.instructions.values():
            if match := _COLLECTIVE.fullmatch(instruction.opcode):
                item = _collective(instruction, match, name)
                for open_ended in (False, True):
                    if count := program.times[name, open_ended]:
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


def _collective(instruction: Instruction, match: re.Match[str], computation: str) -> Collective:
    arrays = [(str(array), array.nbytes) for array in instruction.arrays]
    kind, group_size = match["kind"], _group_size(instruction.line)
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

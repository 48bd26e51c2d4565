"""What a compiled program does on one device: FLOPs of its matrix products, and bytes that it moves
between the device's main memory and the chip, read from its HLO text.

XLA's own count (`cost_analysis`) takes the body of a loop once; here it counts as often as the loop
runs. Of branches that are chosen when the program runs the one with the least products counts, as
MoE layers have another one for loads that are far from even.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

from upcycle_jax.planning.hlo import Array, Computation, Instruction, Program

_FREE = frozenset(
    [
        "add-dependency",
        "after-all",
        "bitcast",
        "call",
        "conditional",
        "constant",
        "domain",
        "get-tuple-element",
        "opt-barrier",
        "parameter",
        "partition-id",
        "replica-id",
        "tuple",
        "while",
    ]
)
"""Instructions that move nothing themselves."""

_SLICES = frozenset(["dynamic-slice", "gather", "slice"])
_VIEWS = frozenset(["bitcast", "reshape"])
_RUNS = frozenset(["async-start", "call", "conditional", "while"])
"""Instructions whose computations work on arrays of their own, not inside of one operation."""

_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)")
_GROUPS = re.compile(r"(feature|batch)_group_count=(\d+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program does on one device, loops of unknown length once.

    Attributes:
      flops: of matrix products.
      nbytes: read from and written to the device's main memory.
      open_ended: whether products are in loops of unknown length.
    """

    flops: float = 0.0
    nbytes: float = 0.0
    open_ended: bool = False

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops,
            self.nbytes + other.nbytes,
            self.open_ended or other.open_ended,
        )

    def times(self, often: int | None) -> "Work":
        """As often as that; None: as nobody knows."""
        if often is None:
            return dataclasses.replace(self, open_ended=self.open_ended or self.flops > 0)
        return dataclasses.replace(self, flops=self.flops * often, nbytes=self.nbytes * often)


def work(program: Program) -> Work:
    """What one execution of a program does."""
    return _Count(program).of_computation(program.entry, moves=True)


class _Count:
    """Counts each computation once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.known: dict[tuple[str, bool], Work] = {}

    def of_computation(self, name: str, *, moves: bool) -> Work:
        """What one execution of a computation does.

        Args:
          name: of the computation.
          moves: whether its instructions move bytes; those inside of one operation do not.
        """
        if (name, moves) not in self.known:
            computation = self.program.computations.get(name, Computation(name))
            self.known[name, moves] = sum(
                (
                    self._of_instruction(item, computation, moves=moves)
                    for item in computation.instructions.values()
                ),
                Work(),
            )
        return self.known[name, moves]

    def _of_instruction(self, item: Instruction, within: Computation, *, moves: bool) -> Work:
        inner = [
            self.of_computation(name, moves=moves and item.opcode in _RUNS).times(often)
            for name, often in self.program.callees(item, within)
        ]
        if item.opcode == "conditional":
            inner = [min(inner, key=lambda branch: branch.flops)] if inner else []
        own = Work(product_flops(item, within), self._moved(item, within) if moves else 0.0)
        return sum(inner, own)

    def _moved(self, item: Instruction, within: Computation) -> float:
        """Bytes that an instruction reads from and writes to the device's main memory."""
        if item.opcode in _FREE or item.opcode.endswith("-done") or item.opcode == "async-start":
            return 0.0
        operands = [
            made.arrays if (made := within.instructions.get(name)) else () for name in item.operands
        ]
        if item.opcode.endswith("-start"):  # (what it makes, its operand, context...)
            return _in_memory(*operands) + _in_memory(item.arrays[:1])
        if item.opcode in _SLICES:
            return _in_memory(item.arrays) + _in_memory(
                array for array in item.arrays if operands[0] and operands[0][0].is_in_memory
            )
        if item.opcode == "dynamic-update-slice":
            return 2 * _in_memory(operands[1])
        fused = self._fused(item)
        if fused is None:
            return _in_memory(*operands) + _in_memory(item.arrays)
        read = sum(_read(fused, index, arrays) for index, arrays in enumerate(operands) if arrays)
        return read + _written(fused)

    def _fused(self, item: Instruction) -> Computation | None:
        if item.opcode != "fusion":
            return None
        return next(
            (
                self.program.computations[name]
                for name, _ in item.callees()
                if name in self.program.computations
            ),
            None,
        )


def product_flops(item: Instruction, within: Computation) -> float:
    """FLOPs of an instruction that is a matrix product; 0 of others."""
    if item.opcode not in ("dot", "convolution"):
        return 0.0
    operands = [within.instructions[name].arrays[0] for name in item.operands[:2]]
    result = item.arrays[0]
    if item.opcode == "dot":
        match = _CONTRACTED.search(item.line)
        axes = [int(axis) for axis in match[1].split(",") if axis] if match else []
        return 2.0 * math.prod(result.shape) * math.prod(operands[0].shape[i] for i in axes)
    return _convolution(item.line, operands[0], operands[1], result)


def _convolution(line: str, lhs: Array, rhs: Array, result: Array) -> float:
    """Of a convolution, which TPU programs have for every matrix product, batches of them too:
    places of the window that are inside the input and not between its elements count.
    """
    labels = _LABELS.search(line)
    if labels is None:
        return 0.0
    of_lhs, of_rhs, of_result = labels.groups()
    groups = {name: int(count) for name, count in _GROUPS.findall(line)}
    window = _window(line)
    places = 1
    for digit in (label for label in of_rhs if label.isdigit()):
        i = int(digit)
        places *= _places(
            lhs.shape[of_lhs.index(digit)],
            rhs.shape[of_rhs.index(digit)],
            result.shape[of_result.index(digit)],
            stride=window.get("stride", {}).get(i, 1),
            before=window.get("pad", {}).get(i, 0),
            lhs_step=window.get("lhs_dilate", {}).get(i, 1),
            rhs_step=window.get("rhs_dilate", {}).get(i, 1),
        )
    rows = lhs.shape[of_lhs.index("b")] // groups.get("batch", 1)
    return 2.0 * rows * places * rhs.shape[of_rhs.index("i")] * rhs.shape[of_rhs.index("o")]


def _window(line: str) -> dict[str, dict[int, int]]:
    """Settings of a convolution's window by axis; of padding that before the input."""
    match = _WINDOW.search(line)
    settings = (field.split("=") for field in match[1].split()) if match else ()
    return {
        name: {i: int(part.split("_")[0]) for i, part in enumerate(parts.split("x"))}
        for name, parts in settings
        if name in ("lhs_dilate", "pad", "rhs_dilate", "stride")
    }


def _places(
    size: int, window: int, results: int, *, stride: int, before: int, lhs_step: int, rhs_step: int
) -> int:
    """How many pairs of a place of the result and one of the window meet an element of the input,
    along one axis.
    """
    found = 0
    for k in range(window):
        # i * stride + offset must be a multiple of lhs_step from 0 to (size - 1) * lhs_step.
        offset = k * rhs_step - before
        first = max(0, math.ceil(-offset / stride))
        last = min(results - 1, ((size - 1) * lhs_step - offset) // stride)
        if lhs_step == 1:
            found += max(0, last - first + 1)
        else:
            found += sum((i * stride + offset) % lhs_step == 0 for i in range(first, last + 1))
    return found


def _in_memory(*groups: Iterable[Array]) -> float:
    return float(sum(array.nbytes for group in groups for array in group if array.is_in_memory))


def _read(fused: Computation, index: int, operand: tuple[Array, ...]) -> float:
    """Bytes of an operand that a fusion reads: of slices only where nothing else reads it."""
    parameter = fused.parameter(index)
    if parameter is None or not operand[0].is_in_memory:
        return 0.0
    users = _users(fused, parameter.name)
    if users and all(user.opcode in _SLICES for user, _ in users):
        return float(sum(user.arrays[0].nbytes for user, _ in users))
    if users and all(user.opcode == "dynamic-update-slice" and place == 0 for user, place in users):
        return 0.0  # written in place
    return _in_memory(operand)


def _users(fused: Computation, name: str) -> list[tuple[Instruction, int]]:
    """What reads a result, through views of it, and as which operand."""
    found = []
    for item in fused.instructions.values():
        for place, operand in enumerate(item.operands):
            if operand == name:
                found += _users(fused, item.name) if item.opcode in _VIEWS else [(item, place)]
    return found


def _written(fused: Computation) -> float:
    """Bytes that a fusion writes: of an update in place only the part that is new."""
    root = fused.root
    if root is None:
        return 0.0
    parts = (
        [fused.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    )
    total = 0.0
    for part in parts:
        made: Instruction | None = part
        while made is not None and made.opcode in _VIEWS:
            made = fused.instructions.get(made.operands[0])
        if (
            made is not None
            and made.opcode == "dynamic-update-slice"
            and part.arrays[0].is_in_memory
        ):
            total += fused.instructions[made.operands[1]].arrays[0].nbytes
        else:
            total += _in_memory(part.arrays)
    return total

"""A compiled program, read from its HLO text: computations, instructions and how often they run.

A program is a set of computations that call each other. Loops say how often they run where the
compiler wrote it down (`known_trip_count`), or where their condition compares a counter with a
constant; TPU programs have only the latter.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?(?P<name>[\w.\-]+) .*\{\s*$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_NAMES = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(
    r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_INTEGER = re.compile(r"constant\((-?\d+)\)")
_INDEX = re.compile(r"index=(\d+)")

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}


@dataclasses.dataclass(frozen=True)
class Array:
    """An array on one device.

    Attributes:
      dtype: as HLO spells it.
      shape: its sizes.
      is_in_memory: whether it is in the device's main memory, not in the chip's own.
    """

    dtype: str
    shape: tuple[int, ...]
    is_in_memory: bool = True

    @property
    def nbytes(self) -> int:
        """Of its elements, without the padding of layouts."""
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype) or (int(digits[0]) if digits else 8)
        return math.prod(self.shape) * bits // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: of its result.
      opcode: what it does.
      result: text of the result's type.
      operands: names of what it works on.
      line: the whole line.
      is_root: whether it is what its computation returns.
    """

    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    line: str
    is_root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """What it results in."""
        return tuple(arrays(self.result))

    def callees(self) -> Iterator[tuple[str, int | None]]:
        """Computations that it runs, and how often; None where the line does not say."""
        often: int | None = 1
        if self.opcode == "while":
            trips = _TRIPS.search(self.line)
            often = int(trips[1]) if trips else None
        for name in _CALLS.findall(self.line):
            yield name, often
        for names in _BRANCHES.findall(self.line):
            for name in names.split(","):
                yield name.strip().lstrip("%"), often


@dataclasses.dataclass
class Computation:
    """Instructions by name, in the order of the text."""

    name: str
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def root(self) -> Instruction | None:
        """What it returns."""
        return next((item for item in self.instructions.values() if item.is_root), None)

    def parameter(self, index: int) -> Instruction | None:
        """The parameter of an index."""
        return next(
            (
                item
                for item in self.instructions.values()
                if item.opcode == "parameter" and f"parameter({index})" in item.line
            ),
            None,
        )

    def behind(self, name: str) -> Instruction | None:
        """The instruction that makes what a copy or another view of it is named."""
        item = self.instructions.get(name)
        while item is not None and item.opcode in ("copy", "bitcast") and item.operands:
            item = self.instructions.get(item.operands[0])
        return item


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: by name.
      entry: the name of the one that runs.
    """

    computations: dict[str, Computation]
    entry: str

    def callees(
        self, instruction: Instruction, within: Computation
    ) -> Iterator[tuple[str, int | None]]:
        """Computations that an instruction runs, and how often; None where only the running program
        knows.
        """
        for name, often in instruction.callees():
            yield name, self._trips(instruction, within) if often is None else often

    @functools.cached_property
    def times(self) -> collections.Counter[tuple[str, bool]]:
        """How often each computation runs when the entry runs once, outside (False) and inside
        (True) of loops of unknown length; all branches of a choice count.
        """
        times: collections.Counter[tuple[str, bool]] = collections.Counter()
        pending = [(self.entry, 1, False)]
        while pending:
            name, often, open_ended = pending.pop()
            if name not in self.computations:
                continue
            times[name, open_ended] += often
            computation = self.computations[name]
            for item in computation.instructions.values():
                pending += [
                    (callee, often * (factor or 1), open_ended or factor is None)
                    for callee, factor in self.callees(item, computation)
                ]
        return times

    def _trips(self, loop: Instruction, within: Computation) -> int | None:
        """How often a loop runs whose condition is that a counter is less than a constant, and
        whose body adds a constant to it.
        """
        named = dict(re.findall(r"(condition|body)=%?([\w.\-]+)", loop.line))
        condition = self.computations.get(named.get("condition", ""))
        body = self.computations.get(named.get("body", ""))
        test = condition.root if condition is not None else None
        if condition is None or body is None or test is None or test.opcode != "compare":
            return None
        counter, limit = (condition.behind(name) for name in test.operands[:2])
        index = _index(counter)
        end = _integer(limit)
        start = _integer(self._element(within, loop.operands[0], index))
        step = self._step(body, index)
        if end is None or start is None or not step or "direction=LT" not in test.line:
            return None
        return max(math.ceil((end - start) / step), 0)

    def _step(self, body: Computation, index: int | None) -> int | None:
        """What a loop's body adds to an element of what it carries."""
        root = body.root
        added = self._element(body, root.name, index) if root is not None else None
        if added is None or added.opcode != "add":
            return None
        sides = [body.behind(name) for name in added.operands]
        steps = [step for side in sides if (step := _integer(side)) is not None]
        same = any(_index(side) == index for side in sides)
        return steps[0] if same and len(steps) == 1 else None

    def _element(self, within: Computation, name: str, index: int | None) -> Instruction | None:
        """What makes an element of a tuple."""
        made = within.behind(name)
        if made is None or index is None or made.opcode != "tuple" or index >= len(made.operands):
            return None
        return within.behind(made.operands[index])


def parse(text: str) -> Program:
    """Reads a compiled program (`compiled.as_text()`)."""
    found: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line and not line[0].isspace():
            match = _COMPUTATION.match(line)
            current = None
            if match and not line.startswith("HloModule"):
                current = found.setdefault(match["name"], Computation(match["name"]))
                entry = match["name"] if line.startswith("ENTRY") else entry
        elif current is not None and (item := _instruction(line)) is not None:
            current.instructions[item.name] = item
    return Program(found, entry)


def arrays(text: str) -> list[Array]:
    """The arrays of a type, as HLO prints it."""
    return [
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), "S(" not in layout)
        for dtype, dims, layout in _ARRAY.findall(text)
    ]


def _instruction(line: str) -> Instruction | None:
    head, equals, rest = line.partition(" = ")
    if not equals:
        return None
    name = head.split()[-1].lstrip("%")
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    match = _OPCODE.match(rest, end)
    if match is None:
        return None
    inside = rest[match.end() : _closing(rest, match.end() - 1)]
    operands = tuple(_NAMES.findall(inside))
    return Instruction(
        name, match[1], rest[:end], operands, line, is_root=head.lstrip().startswith("ROOT")
    )


def _closing(text: str, start: int = 0) -> int:
    """Where the parenthesis that opens at `start` is closed; the end of the text if nowhere."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _integer(item: Instruction | None) -> int | None:
    match = _INTEGER.search(item.line) if item is not None and item.opcode == "constant" else None
    return int(match[1]) if match else None


def _index(item: Instruction | None) -> int | None:
    """Which element of its operand an instruction takes."""
    if item is None or item.opcode != "get-tuple-element":
        return None
    match = _INDEX.search(item.line)
    return int(match[1]) if match else None

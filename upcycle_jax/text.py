"""Text for terminals and reports: sizes, durations, tables, and lists that are cut short."""

import dataclasses
import enum
import json
import re
from collections.abc import Collection, Sequence
from typing import Any

import humanize

WIDTH = 138
"""Columns that text is wrapped to."""
NUMBER = re.compile(r"[-+]?\d|-$")


def size(count: float) -> str:
    """A number of bytes, in binary units.

    >>> size(1536), size(72)
    ('1.5 KiB', '72 Bytes')
    """
    return humanize.naturalsize(count, binary=True, format="%.1f")


def duration(seconds: float) -> str:
    """Seconds in words short enough for a cell or a line of a log, as `humanize` has none.

    >>> duration(45), duration(2280), duration(18720), duration(267840)
    ('45 s', '38 min', '5.2 h', '3.1 days')
    """
    for length, unit in ((86400.0, "days"), (3600.0, "h")):
        if seconds >= length * 1.5:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(seconds, 0):.0f} s"


def shorten(lines: Sequence[str], limit: int, *, of: str = "") -> list[str]:
    """The first `limit` lines, and how many `of` them there are beyond.

    >>> shorten(["a", "b", "c"], 1, of="leaves")
    ['a', '... and 2 more leaves']
    """
    left = len(lines) - limit
    return [*lines[:limit], f"... and {left} more {of}".rstrip()] if left > 0 else [*lines]


def columns(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> list[list[str]]:
    """The cells, padded so that columns line up: those of `right` flush right, the others left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]


def aligned(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> list[str]:
    """One line a row, two spaces between columns.

    >>> aligned([["run", "step"], ["a", "12"]], right=[1])
    ['run  step', 'a      12']
    """
    return ["  ".join(row).rstrip() for row in columns(rows, right=right)]


def markdown(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[int]
) -> str:
    """A Markdown table whose columns line up in a terminal as well.

    Every text stays in its cell: without line ends, and without bars that would start another.
    """
    cells = [
        [" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in (header, *rows)
    ]
    head, *body = columns(cells, right=right)
    rule = [
        "-" * max(len(cell) - 1, 1) + ":" if i in right else "-" * len(cell)
        for i, cell in enumerate(head)
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


class Format(enum.StrEnum):
    """How a comparison is written."""

    TEXT = "text"
    MARKDOWN = "markdown"
    JSON = "json"


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells under a heading."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def render(self, style: Format) -> str:
        """The table; columns of numbers are flush right, except the first."""
        right = [
            i for i in range(1, len(self.header)) if all(NUMBER.match(row[i]) for row in self.rows)
        ]
        if style == Format.MARKDOWN:
            return f"### {self.title}\n\n{markdown(self.header, self.rows, right=right)}"
        body = aligned([self.header, *self.rows], right=right)
        return "\n".join([self.title, *(f"  {line}" for line in body)])


def json_text(value: Any) -> str:
    """Plain values as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False)

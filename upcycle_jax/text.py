"""Tables for a terminal, as Markdown and as JSON: what the commands that only print share."""

import dataclasses
import enum
import json
import re
from collections.abc import Sequence
from typing import Any

WIDTH = 138
"""Columns that text is wrapped to."""
NUMBER = re.compile(r"[-+]?\d|-$")


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
        """The table; the first column is flush left, all others flush right."""
        lines = [list(self.header), *map(list, self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        left = {
            i
            for i in range(len(self.header))
            if i == 0 or not all(NUMBER.match(row[i]) for row in self.rows)
        }

        def cells(line: Sequence[str]) -> list[str]:
            return [
                cell.ljust(width) if i in left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]

        if style == Format.MARKDOWN:
            rule = [
                "-" * width if i in left else "-" * max(width - 1, 1) + ":"
                for i, width in enumerate(widths)
            ]
            body = [
                f"| {' | '.join(line)} |"
                for line in (cells(self.header), rule, *map(cells, self.rows))
            ]
            return "\n".join([f"### {self.title}", "", *body])
        body = ["  ".join(cells(line)).rstrip() for line in (self.header, *self.rows)]
        return "\n".join([self.title, *(f"  {line}" for line in body)])


def json_text(value: Any) -> str:
    """Plain values as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False)

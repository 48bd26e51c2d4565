"""The table of `papers.findings`, for a terminal, as Markdown and as JSON."""

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from upcycle_jax.papers.findings import Finding, Measured, Verdict, studies
from upcycle_jax.text import Format, Table

TITLE = "What the paper found, and what came out here"
WIDTH = 130
RULE = (
    "Ours: loss (nats per target token) of the first minus the second of two groups of runs, paired"
    " by seed, with its 95 % interval. The verdict is decided by the interval: a claimed difference"
    " agrees where the interval lies wholly on its side of 0 and differs where it lies wholly on"
    " the other; a claimed equality agrees within its margin. One seed decides nothing."
)


def render(found: Sequence[Finding], folder: str | Path, style: Format) -> str:
    """The table, the studies behind it with the commands of those that are missing, and what others
    found.
    """
    wrap = style != Format.MARKDOWN
    header = ["claim", "paper", "ours", "verdict"]
    rows = []
    for one in found:
        claim = one.claim
        cells = [
            claim.claim,
            f"{claim.paper} ({', '.join(filter(None, [claim.kind, claim.where]))})",
            "; ".join(_ours(part) for part in one.measured) or "-",
            str(one.verdict),
        ]
        rows += _wrapped(cells, (46, 40, 26, 11)) if wrap else [[*cells, _links(one, folder)]]
    if not wrap:
        header.append("study")
    contrary = [f"* {one.claim.claim}: {one.claim.contrary}" for one in found if one.claim.contrary]
    if wrap:
        contrary = [textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in contrary]
    parts = [
        Table(TITLE, header, rows).render(style).rstrip(),
        textwrap.fill(RULE, WIDTH) if wrap else RULE,
        _studies(found, folder, style),
        ("### " if not wrap else "") + "Contrary evidence and limits, from the literature",
        "\n".join(contrary),
    ]
    return "\n\n".join(parts)


def _studies(found: Sequence[Finding], folder: str | Path, style: Format) -> str:
    rows = []
    for study in studies().values():
        measured = [
            part for one in found for part in one.measured if part.comparison.study == study.study
        ]
        if all(part.verdict == Verdict.NOT_RUN for part in measured):
            command = f"{study.command} (about {study.hours:g} hours)"
            rows.append([study.study, "not run", command])
            continue
        state = "stored" if all(part.finished for part in measured) else "not finished"
        rows.append([study.study, state, _report(study.study, folder)])
    return Table("Studies", ["study", "state", "report or command"], rows).render(style).rstrip()


def _report(study: str, folder: str | Path) -> str:
    return (Path(folder) / study / "report" / "report.md").as_posix()


def _links(one: Finding, folder: str | Path) -> str:
    names = dict.fromkeys(part.comparison.study for part in one.measured)
    if not names:
        return "no study"
    if one.verdict == Verdict.NOT_RUN:
        return ", ".join(f"`{studies()[name].command}`" for name in names)
    return ", ".join(f"[{name}]({_report(name, folder)})" for name in names)


def _ours(part: Measured) -> str:
    if part.difference is None or not part.difference.count:
        return "-"
    at = {"start": "at the start", "compute": "at equal compute"}.get(part.comparison.at, "")
    seeds = f"{part.difference.count} seeds" if part.difference.count > 1 else "one seed"
    where = ", ".join(filter(None, [seeds, at, "" if part.finished else "not finished"]))
    value = part.difference.text(signed=True) if part.difference.count > 1 else ""
    return f"{value or format(part.difference.mean, '+.4f')} ({where})"


def _wrapped(cells: Sequence[str], widths: Sequence[int]) -> list[list[str]]:
    """A row whose cells are folded: as many rows as the longest needs."""
    columns = [
        textwrap.wrap(cell, width) or [""] for cell, width in zip(cells, widths, strict=True)
    ]
    height = max(map(len, columns))
    return [[column[i] if i < len(column) else "" for column in columns] for i in range(height)]


def as_json(found: Sequence[Finding], folder: str | Path) -> list[dict[str, Any]]:
    """Everything, as plain values."""
    return [
        {
            "name": one.claim.name,
            "claim": one.claim.claim,
            "paper": one.claim.paper,
            "kind": one.claim.kind,
            "where": one.claim.where,
            "contrary": one.claim.contrary,
            "verdict": str(one.verdict),
            "ours": [
                {
                    **dataclasses.asdict(part.comparison),
                    "expect": str(part.comparison.expect),
                    "mean": None if part.difference is None else part.difference.mean,
                    "low": None if part.difference is None else part.difference.low,
                    "high": None if part.difference is None else part.difference.high,
                    "seeds": 0 if part.difference is None else part.difference.count,
                    "steps": part.steps,
                    "finished": part.finished,
                    "verdict": str(part.verdict),
                    "report": _report(part.comparison.study, folder),
                    "command": studies()[part.comparison.study].command,
                    "hours": studies()[part.comparison.study].hours,
                }
                for part in one.measured
            ],
        }
        for one in found
    ]

"""Comparisons with the paper as text for a terminal (at most 140 columns), as Markdown and as
JSON.
"""

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

from upcycle_jax.papers import initial_drop
from upcycle_jax.papers.command_lines import quoted_word
from upcycle_jax.papers.compare import Comparison, Curve, Line, Scaled
from upcycle_jax.papers.exhibits import KIND_NOTES, METRICS, PAPER, Kind, Point, Series
from upcycle_jax.papers.initial_drop import Drops
from upcycle_jax.studies.intervals import Interval
from upcycle_jax.text import WIDTH, Format, Table, json_text

SHOWN_COMMANDS = 3


def render(comparison: Comparison, style: Format) -> str:
    """The comparison, with a newline at its end."""
    if style == Format.JSON:
        return json_text(as_json(comparison)) + "\n"
    exhibit = comparison.exhibit
    heading = f"{exhibit.title}\n{PAPER}"
    parts = [f"## {exhibit.title}\n\n{PAPER}" if style == Format.MARKDOWN else heading]
    kinds = [kind for kind in Kind if any(point.kind == kind for point in exhibit.points)]
    notes = [
        *([exhibit.note] if exhibit.note else []),
        *(f"The paper says: {claim}" for claim in exhibit.claims),
        *(f"{kind}: {KIND_NOTES[kind]}." for kind in kinds),
    ]
    parts.append("\n".join(textwrap.fill(note, WIDTH) for note in notes))
    parts += [table.render(style) for table in tables(comparison)]
    if comparison.drops is not None:
        parts += [textwrap.fill(text, WIDTH) for text in initial_drop.claims(comparison.drops)]
    parts += [_results_line(comparison), _missing(comparison, style)]
    return "\n\n".join(part for part in parts if part) + "\n"


def tables(comparison: Comparison) -> list[Table]:
    """All tables of a comparison."""
    out = []
    if comparison.sizes:
        out.append(_sizes(comparison))
    for metric in dict.fromkeys(curve.series.head.metric for curve in comparison.curves):
        out.append(
            _curves(
                metric, [curve for curve in comparison.curves if curve.series.head.metric == metric]
            )
        )
    if comparison.scaled:
        out.append(_scaled(comparison.scaled))
    if comparison.drops is not None:
        out.append(_drops(comparison.drops))
    return out


def _sizes(comparison: Comparison) -> Table:
    rows = []
    for row in comparison.sizes:
        point = row.point
        layers, experts = point.setting.get("moe_layers", "-"), point.setting.get("experts", "-")
        verdict = "equal" if row.equal else f"DIFFERENT: {row.rounded}"
        rows.append(
            [
                point.modality,
                point.size,
                str(point.method),
                layers,
                experts,
                point.printed,
                f"{row.parameters:,}",
                verdict,
                row.gin_file,
            ]
        )
    header = [
        "modality",
        "model",
        "type",
        "MoE layers",
        "experts",
        "paper (printed)",
        "this project",
        "comparison",
        "counted from",
    ]
    return Table("Parameters", header, rows)


def interval_text(value: Interval | None, *, signed: bool = False) -> str:
    """'70.84 ± 0.05 (n=3)'; a single run shows no interval."""
    if value is None:
        return "-"
    return value.text(2, signed=signed) + (f" (n={value.count})" if value.count > 1 else "")


def _position(point: Point) -> str:
    return "-" if point.x is None else f"{point.x:,.10g}"


def _paper_value(point: Point) -> str:
    return point.printed or ("-" if point.value is None else f"{point.value:.2f}")


def _curve_row(line: Line, series: Series) -> list[str]:
    point = line.point
    at_end = "end" if point is series.points[-1] else "-"
    steps = at_end if point.extra_steps is None else f"{point.extra_steps:,}"
    delta = "-" if line.delta is None else f"{line.delta:+.2f}"
    return [
        series.label,
        steps,
        _position(point),
        _paper_value(point),
        str(point.kind),
        interval_text(line.ours),
        delta,
    ]


def _curves(metric: str, curves: Sequence[Curve]) -> Table:
    units = dict.fromkeys(curve.series.head.x_unit for curve in curves if curve.series.head.x_unit)
    parts = any(curve.series.head.part for curve in curves)
    header = [
        "curve",
        "extra steps",
        " / ".join(units) or "x",
        "paper",
        "kind",
        "this project (95 % interval)",
        "ours - paper",
    ]
    rows = []
    for curve in curves:
        for line in curve.lines:
            row = _curve_row(line, curve.series)
            rows.append(
                [
                    f"{curve.series.head.part}: {row[0]}" if parts and len(units) > 1 else row[0],
                    *row[1:],
                ]
            )
    return Table(METRICS[metric], header, rows)


def _scaled(scaled: Sequence[Scaled]) -> Table:
    rows = []
    for row in scaled:
        paper = ", ".join(f"{size} {gain:+.2f}" for size, gain in row.paper_gain.items())
        rows.append(
            [
                row.label,
                f"{row.parameters:,}",
                str(row.num_experts or "-"),
                f"{row.extra_steps:,}",
                interval_text(row.start),
                interval_text(row.end),
                interval_text(row.gain, signed=True),
                paper or "-",
            ]
        )
    has_images = any(row.modality == "vision" for row in scaled)
    what = "accuracy" if has_images else "token accuracy"
    reference = (
        ", ".join(dict.fromkeys(row.reference for row in scaled if row.reference)) or "reference"
    )
    header = [
        "runs",
        "parameters",
        "experts",
        "extra steps",
        "accuracy at start",
        "at end",
        "gain",
        "paper's gain",
    ]
    title = (
        f"This project at other scales: {what} in % of its own data; gain = minus"
        f" {reference}, paired by seed"
    )
    return Table(title, header, rows)


def _drops(drops: Drops) -> Table:
    rows = []
    has_few_shot = drops.dense.few_shot is not None
    for row in drops.rows:
        cell = row.cell
        if cell is None:
            cells = ["dense", "-", "-", "-", "-", "-"]
        else:
            cells = [
                "upcycled" if cell.init == "copy" else "random experts",
                str(cell.num_experts),
                f"{cell.capacity_factor:g}",
                f"{row.actual_capacity:.2f}",
                "yes" if cell.renormalize else "no",
                _blocks(cell.blocks),
            ]
        loss, precision = row.loss - drops.dense.loss, row.precision - drops.dense.precision
        cells += [f"{row.loss:.5f}", f"{loss:+.5f}", f"{row.precision:.2f}", f"{precision:+.2f}"]
        if has_few_shot and row.few_shot is not None and drops.dense.few_shot is not None:
            cells += [f"{row.few_shot:.2f}", f"{row.few_shot - drops.dense.few_shot:+.2f}"]
        rows.append(cells)
    header = [
        *("model", "experts", "C", "actual C", "renormalised", "blocks"),
        *("loss", "- dense", "precision@1, %", "- dense"),
        *(("few-shot, %", "- dense") if has_few_shot else ()),
    ]
    return Table(f"At step 0: {drops.checkpoint}, {drops.images:,} images", header, rows)


def _blocks(blocks: Sequence[int]) -> str:
    """'3-5', or '0'."""
    return str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]}-{blocks[-1]}"


def _results_line(comparison: Comparison) -> str:
    if comparison.sizes or not comparison.curves:
        return ""
    if comparison.results is None:
        return "This project's results: none given (--results=DIR takes a folder with MODEL_DIRs)."
    return f"This project's results: {comparison.num_runs} evaluated runs in {comparison.results}."


def _missing(comparison: Comparison, style: Format) -> str:
    """The commands for what is missing; long lists are cut, JSON has all."""
    missing = comparison.missing
    if not missing:
        return ""
    lines = ["Missing at full scale, and what produces it:"]
    for curve in missing:
        lines += ["", f"# {curve.series.label} ({METRICS[curve.series.head.metric]})"]
        for command in curve.commands[:SHOWN_COMMANDS]:
            lines += [f"#   {command.makes}", _wrapped(command.words)]
        rest = len(curve.commands) - SHOWN_COMMANDS
        if rest > 0:
            lines.append(
                f"#   ... and {rest} more for the other points and seeds; --format=json lists all"
            )
    if style == Format.MARKDOWN:
        return "\n".join([lines[0], "", "```bash", *lines[2:], "```"])
    return "\n".join(lines)


def _wrapped(words: Sequence[str], width: int = WIDTH) -> str:
    """A command over several lines, as a shell takes it."""
    quoted = [quoted_word(word) for word in words]
    lines, current = [], " ".join(quoted[:3])
    for word in quoted[3:]:
        if len(current) + len(word) + 3 > width:
            lines.append(f"{current} \\")
            current = f"    {word}"
        else:
            current += f" {word}"
    return "\n".join([*lines, current])


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything that is known, as plain JSON."""
    exhibit = comparison.exhibit
    return {
        "exhibit": exhibit.name,
        "title": exhibit.title,
        "paper": PAPER,
        "note": exhibit.note,
        "results": comparison.results,
        "runs": comparison.num_runs,
        "sizes": [
            {
                **_point_json(row.point),
                "gin_file": row.gin_file,
                "parameters": row.parameters,
                "rounded": row.rounded,
                "equal": row.equal,
            }
            for row in comparison.sizes
        ],
        "curves": [
            {
                "label": curve.series.label,
                "points": [
                    {
                        **_point_json(line.point),
                        "ours": _interval_json(line.ours),
                        "delta": line.delta,
                    }
                    for line in curve.lines
                ],
                "missing": curve.is_missing,
                "commands": [
                    {"command": command.text(), "makes": command.makes}
                    for command in curve.commands
                ],
            }
            for curve in comparison.curves
        ],
        "other_scales": [
            {
                **dataclasses.asdict(row),
                **{name: _interval_json(getattr(row, name)) for name in ("start", "end", "gain")},
            }
            for row in comparison.scaled
        ],
        "vision": {
            "status": "supported",
            "points": [
                _point_json(point) for point in exhibit.points if point.modality == "vision"
            ],
        },
        "claims": list(exhibit.claims),
        "at_step_0": None if comparison.drops is None else _drops_json(comparison.drops),
    }


def _drops_json(drops: Drops) -> dict[str, Any]:
    return {
        **dataclasses.asdict(drops),
        "claims": initial_drop.claims(drops),
    }


def _interval_json(value: Interval | None) -> dict[str, Any] | None:
    """An interval; one value has no half width, which JSON could not hold either."""
    if value is None:
        return None
    return {
        "mean": value.mean,
        "half_width": value.half_width if value.count > 1 else None,
        "n": value.count,
        "confidence": value.confidence,
    }


def _point_json(point: Point) -> dict[str, Any]:
    return {
        **dataclasses.asdict(point),
        "method": str(point.method),
        "kind": str(point.kind),
        "setting": dict(point.setting),
    }

"""What the folder of a sweep says: which cells are finished, how far the others are, and their
results as a table.
"""

import dataclasses
import json
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from upcycle_jax.files import append_line, write_whole
from upcycle_jax.studies.run_results import MANIFEST, METRICS, read_rows
from upcycle_jax.studies.sweep import CACHE, ROOT_MARK, Cell, Sweep
from upcycle_jax.text import aligned

SWEEP_FILE = "sweep.json"
EVENTS_FILE = "events.jsonl"
TABLE_FILE = "table.jsonl"
PROOF_FILE = "proof.json"
INTERRUPTED = 75
"""Exit code of a run that a signal ended after it had saved."""
COLUMNS = ("cross_ent_loss", "accuracy")


def is_finished(cell: Cell) -> bool:
    """Whether the run says that it finished at its last step and left its checkpoint; for a
    conversion, whether its proof holds.
    """
    checkpoint = Path(cell.checkpoint)
    if cell.command == "upcycle":
        proof = _read_json(checkpoint / PROOF_FILE)
        return bool(proof) and bool(proof.get("ok"))
    if cell.command == CACHE:
        return _cache_mark(cell).is_file()
    manifest = _read_json(Path(cell.folder) / MANIFEST)
    return (
        manifest.get("status") == "finished"
        and manifest.get("step") == cell.end_step
        and checkpoint.is_dir()
    )


def _cache_mark(cell: Cell) -> Path:
    return Path(cell.folder) / "finished_by_sweep"


def mark_finished(cell: Cell) -> None:
    """Remembers that a cell ended well, where its own files do not say so."""
    if cell.command == CACHE:
        _cache_mark(cell).parent.mkdir(parents=True, exist_ok=True)
        write_whole(_cache_mark(cell), "")


def step_reached(cell: Cell) -> int:
    """The last step at which the run reported, its first step before that."""
    if is_finished(cell):
        return cell.end_step
    rows = read_rows(Path(cell.folder) / "train" / METRICS) if cell.command == "train" else []
    return max(cell.start_step, int(rows[-1]["step"])) if rows else cell.start_step


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def describe(sweep: Sweep, cells: Sequence[Cell]) -> dict[str, Any]:
    """`sweep.json`: the study and its cells, without the place where it lies, so that a copy of the
    folder can be read and continued.
    """
    return {
        "name": sweep.name,
        "title": sweep.title,
        "scale": sweep.scale,
        "baseline": sweep.baseline,
        "seeds": list(sweep.seeds),
        "axes": {axis: list(choices) for axis, choices in sweep.choices().items()},
        "stages": {
            stage.name: {
                "label": stage.label or stage.name,
                "compared": stage.name in sweep.compared,
            }
            for stage in sweep.stages
        },
        "cells": [
            {
                "name": cell.name,
                "stage": cell.stage,
                "kind": cell.command,
                "labels": dict(cell.labels),
                "start_step": cell.start_step,
                "end_step": cell.end_step,
                "needs": list(cell.needs),
                "command": portable(cell.command_line(), sweep.root),
            }
            for cell in cells
        ],
    }


def portable(text: str, root: str) -> str:
    """The text with the sweep's folder as `{SWEEP_DIR}`.

    >>> portable("/a/b/cells/x, /a/bc/d", "/a/b")
    '{SWEEP_DIR}/cells/x, /a/bc/d'
    """
    return re.sub(re.escape(root) + r"(?![\w.-])", lambda match: ROOT_MARK, text)


def save_plan(sweep: Sweep, cells: Sequence[Cell]) -> None:
    """Writes `sweep.json`, after a check that no cell's folder belongs to another command line.

    Raises:
      ValueError: a cell was begun with other settings.
    """
    root = Path(sweep.root)
    plan = describe(sweep, cells)
    before = {
        cell["name"]: cell["command"] for cell in _read_json(root / SWEEP_FILE).get("cells", ())
    }
    for cell, entry in zip(cells, plan["cells"], strict=True):
        if (
            before.get(cell.name, entry["command"]) != entry["command"]
            and Path(cell.folder).exists()
        ):
            raise ValueError(
                f"{cell.folder} was begun with another command line:\n  before:"
                f" {before[cell.name]}\n  now:    {entry['command']}\nchoose another SWEEP_DIR, or"
                " remove the folder of that cell"
            )
    root.mkdir(parents=True, exist_ok=True)
    write_whole(root / SWEEP_FILE, json.dumps(plan, indent=1) + "\n", shared=True)


def note(root: str, event: str, **entries: Any) -> None:
    """Appends to `events.jsonl`: the time, the event, the machine's load averages over 1, 5 and 15
    minutes, and `entries`.
    """
    row = {
        "time": round(time.time(), 1),
        "event": event,
        "load": [round(x, 2) for x in os.getloadavg()],
        **entries,
    }
    append_line(Path(root) / EVENTS_FILE, json.dumps(row))


def machine() -> dict[str, Any]:
    """The machine that the sweep runs on."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in _lines("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


@dataclasses.dataclass(frozen=True)
class Row:
    """The result of one finished training cell.

    Attributes:
      cell: its name.
      stage: its stage.
      labels: its choices.
      step: of the last evaluation.
      tasks: task -> metric -> value there.
    """

    cell: str
    stage: str
    labels: Mapping[str, str]
    step: int
    tasks: Mapping[str, Mapping[str, float]]

    def as_json(self) -> dict[str, Any]:
        """The row of `table.jsonl`."""
        return dataclasses.asdict(self)


def table(cells: Sequence[Cell]) -> list[Row]:
    """Loss and accuracy at the last evaluation of every finished training cell, as the cell's own
    JSON lines say.
    """
    rows = []
    for cell in cells:
        if cell.command != "train" or not is_finished(cell):
            continue
        tasks: dict[str, dict[str, float]] = {}
        step = cell.start_step
        for path in sorted(Path(cell.folder).glob(f"training_eval/*/{METRICS}")):
            last = read_rows(path)[-1]
            step = max(step, int(last["step"]))
            tasks[path.parent.name] = {name: last[name] for name in COLUMNS if name in last}
        rows.append(Row(cell.name, cell.stage, cell.labels, step, tasks))
    return rows


def save_table(sweep: Sweep, cells: Sequence[Cell]) -> str:
    """Writes `table.jsonl` and returns the table for a terminal: one for each set of tasks that
    cells were evaluated on.
    """
    rows = table(cells)
    write_whole(
        Path(sweep.root) / TABLE_FILE,
        "".join(json.dumps(row.as_json()) + "\n" for row in rows),
        shared=True,
    )
    if not rows:
        return "no training cell has finished"
    same_tasks: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        same_tasks.setdefault(tuple(row.tasks), []).append(row)
    return "\n\n".join(map(_of_same_tasks, same_tasks.values()))


def _of_same_tasks(rows: Sequence[Row]) -> str:
    columns = [(task, metric) for task in rows[0].tasks for metric in COLUMNS]
    header = ["cell", "step", *(f"{task}/{metric}" for task, metric in columns)]
    body = []
    for row in rows:
        values = [row.tasks.get(task, {}).get(metric) for task, metric in columns]
        body.append(
            [
                row.cell,
                str(row.step),
                *("-" if value is None else f"{value:.4f}" for value in values),
            ]
        )
    return "\n".join(aligned([header, *body]))

"""Which settings of a study are chosen: the best on validation, as fine-tuning is tuned. What is
then reported is measured elsewhere, on a split that had no part in the choice.
"""

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from upcycle_jax.files import write_whole
from upcycle_jax.studies.state import Row
from upcycle_jax.studies.sweep import SEED_AXIS, Cell, Sweep
from upcycle_jax.text import aligned

CHOSEN_FILE = "chosen.json"


@dataclasses.dataclass(frozen=True)
class Choice:
    """The best of the settings that a stage was run with.

    Attributes:
      stage: the stage.
      labels: axis -> label of what is not chosen over; without the seed.
      chosen: axis -> label of the best, of the axes that are chosen over.
      value: its metric, the mean over tasks and seeds at the last evaluation.
      settings: how many finished settings it was chosen from.
      of: how many there are.
      checkpoints: of its runs, one for each seed.
    """

    stage: str
    labels: Mapping[str, str]
    chosen: Mapping[str, str]
    value: float
    settings: int
    of: int
    checkpoints: Sequence[str]


def choose(sweep: Sweep, cells: Sequence[Cell], rows: Sequence[Row]) -> list[Choice]:
    """The best settings of every stage that has an axis to choose over.

    Args:
      sweep: names the axes and the metric.
      cells: all of its cells.
      rows: results of finished cells. A setting counts once it has finished for every seed.
    """
    by_name = {row.cell: row for row in rows}
    settings: dict[tuple[str, _Labels], dict[_Labels, list[Cell]]] = {}
    for cell in cells:
        tuned = {axis: cell.labels[axis] for axis in sweep.chosen_over if axis in cell.labels}
        if tuned and cell.stage in sweep.compared:
            rest = _labels(
                {a: v for a, v in cell.labels.items() if a not in tuned and a != SEED_AXIS}
            )
            table = settings.setdefault((cell.stage, rest), collections.defaultdict(list))
            table[_labels(tuned)].append(cell)
    best = []
    for (stage, rest), table in settings.items():
        values = {
            over: fmean(_value(by_name[cell.name], sweep.chosen_by) for cell in runs)
            for over, runs in table.items()
            if all(cell.name in by_name for cell in runs)
        }
        if values:
            first = (max if sweep.chosen_by == "accuracy" else min)(values, key=lambda o: values[o])
            best.append(
                Choice(
                    stage=stage,
                    labels=dict(rest),
                    chosen=dict(first),
                    value=values[first],
                    settings=len(values),
                    of=len(table),
                    checkpoints=tuple(cell.checkpoint for cell in table[first]),
                )
            )
    return best


_Labels = tuple[tuple[str, str], ...]


def _labels(labels: Mapping[str, str]) -> _Labels:
    return tuple(labels.items())


def _value(row: Row, metric: str) -> float:
    return fmean(metrics[metric] for metrics in row.tasks.values())


def save_choices(sweep: Sweep, cells: Sequence[Cell], rows: Sequence[Row]) -> str:
    """Writes `chosen.json`, and returns the choices for a terminal; nothing of a study that chooses
    nothing.
    """
    found = choose(sweep, cells, rows)
    if not found:
        return ""
    entries = [dataclasses.asdict(choice) for choice in found]
    write_whole(Path(sweep.root) / CHOSEN_FILE, json.dumps(entries, indent=1) + "\n", shared=True)
    lines = [["stage", f"best {sweep.chosen_by} on validation", "chosen", "of settings"]]
    for choice in found:
        stage = ", ".join([choice.stage, *(f"{a}={v}" for a, v in choice.labels.items())])
        chosen = ", ".join(f"{axis}={label}" for axis, label in choice.chosen.items())
        count = (
            f"{choice.settings}"
            if choice.settings == choice.of
            else (f"{choice.settings} of {choice.of}")
        )
        lines.append([stage, f"{choice.value:.4f}", chosen, count])
    return "\n".join(aligned(lines))

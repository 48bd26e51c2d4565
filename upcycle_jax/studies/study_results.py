"""What a sweep left in its folder, read back: groups of runs that differ in their seed only."""

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from upcycle_jax.studies import intervals
from upcycle_jax.studies.intervals import Interval
from upcycle_jax.studies.run_results import MANIFEST, METRICS, Run, read_rows
from upcycle_jax.studies.state import (
    EVENTS_FILE,
    INTERRUPTED,
    SWEEP_FILE,
    TABLE_FILE,
    portable,
)
from upcycle_jax.studies.sweep import SEED_AXIS

CELLS = "cells"
CONFIG = "config.gin"
STORED_FILES = (SWEEP_FILE, EVENTS_FILE, TABLE_FILE, CONFIG)
STORED_CELL_FILES = (MANIFEST, CONFIG, f"train/{METRICS}", f"training_eval/*/{METRICS}")


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs with the same settings and different seeds.

    Attributes:
      name: for readers, e.g. 'upcycled, capacity factor 2'.
      stage: of the sweep.
      labels: axis -> label, without the seed.
      runs: seed -> run.
    """

    name: str
    stage: str
    labels: Mapping[str, str]
    runs: Mapping[str, Run]

    @property
    def first(self) -> Run:
        """The run of the first seed: for what does not depend on the seed."""
        return next(iter(self.runs.values()))

    def per_seed(self, value: Callable[[Run], float]) -> dict[str, float]:
        """A value of each run, without those that do not have it (NaN)."""
        values = {seed: value(run) for seed, run in self.runs.items()}
        return {seed: number for seed, number in values.items() if not math.isnan(number)}

    def interval(self, value: Callable[[Run], float]) -> Interval:
        """Mean and confidence interval of a value over the seeds."""
        return intervals.mean_interval(self.per_seed(value).values())


@dataclasses.dataclass(frozen=True)
class Study:
    """A sweep's folder, or what was stored of it.

    Attributes:
      plan: `sweep.json`.
      groups: the compared runs, in the order of the stages and axes; only those with a result.
      shared: name -> run of the cells that others start from.
      unfinished: names of cells that have not finished, with the step that they reached.
      failed: those of the unfinished that ended with an error, with their exit code; not among the
        groups.
      events: rows of `events.jsonl`.
    """

    plan: Mapping[str, Any]
    groups: Sequence[Group]
    shared: Mapping[str, Run]
    unfinished: Mapping[str, int]
    failed: Mapping[str, int]
    events: Sequence[Mapping[str, Any]]

    @classmethod
    def load(cls, folder: str | Path) -> "Study":
        """Reads a sweep's folder, finished or not.

        Raises:
          FileNotFoundError: it is none, or no compared run has been evaluated after an update.
          ValueError: runs were evaluated on different tasks.
        """
        root = Path(folder)
        if not (root / SWEEP_FILE).is_file():
            raise FileNotFoundError(
                f"{root} holds no {SWEEP_FILE}: it is not the folder of a sweep, or the sweep has"
                " not started"
            )
        plan = json.loads((root / SWEEP_FILE).read_text())
        runs: dict[str, Run] = {}
        unfinished: dict[str, int] = {}
        trained = trained_cells(plan)
        for cell in trained:
            path = root / CELLS / cell["name"]
            run = _load_run(cell["name"], path)
            if run is not None:
                runs[cell["name"]] = run
            if (
                run is None
                or run.manifest.get("status") != "finished"
                or run.manifest.get("step") != cell["end_step"]
            ):
                unfinished[cell["name"]] = (
                    cell["start_step"] if run is None else run.start_step + run.extra_steps
                )
        rows = [json.loads(line) for line in _lines(root / EVENTS_FILE)]
        failed = {
            name: code
            for name, code in _exit_codes(rows).items()
            if name in unfinished and code not in (0, INTERRUPTED)
        }
        groups = _groups(
            plan,
            {name: run for name, run in runs.items() if run.extra_steps > 0 and name not in failed},
        )
        if not groups:
            raise FileNotFoundError(
                f"no run of the sweep in {root} has been evaluated after an update yet"
            )
        tasks = groups[0].first.tasks
        for group in groups:
            for run in group.runs.values():
                if run.tasks != tasks:
                    raise ValueError(
                        f"{run.name} was evaluated on {run.tasks}, others on {tasks}: they cannot"
                        " be compared"
                    )
        stages = {cell["name"]: plan["stages"][cell["stage"]] for cell in trained}
        shared = {name: run for name, run in runs.items() if not stages[name]["compared"]}
        return cls(plan, groups, shared, unfinished, failed, rows)

    @property
    def runs(self) -> list[Run]:
        """All compared runs."""
        return [run for group in self.groups for run in group.runs.values()]

    @property
    def common_steps(self) -> int:
        """Extra steps that every compared run has done: differences are taken there."""
        return min(run.extra_steps for run in self.runs)

    @property
    def common_flops(self) -> float:
        """Extra training FLOPs that every compared run has spent."""
        return min(run.extra_steps * run.flops_per_step for run in self.runs)

    def shared_steps(self, group: Group) -> int:
        """Extra steps that every run of the group and of its baseline has done: `common_steps` or
        more.
        """
        other = self.baseline_of(group)
        return min(
            run.extra_steps
            for run in (*group.runs.values(), *(other.runs.values() if other else ()))
        )

    def baseline_of(self, group: Group) -> Group | None:
        """The group of the baseline stage with the same labels on the axes that both have; None for
        the baseline itself.
        """
        for other in self.groups:
            shared = set(other.labels) & set(group.labels)
            if other.stage == self.plan["baseline"] != group.stage and all(
                other.labels[axis] == group.labels[axis] for axis in shared
            ):
                return other
        return None

    def starts_with_baseline(self, group: Group) -> bool:
        """Whether the group and its baseline go on from one trained checkpoint, of each seed."""
        other = self.baseline_of(group)
        if other is None:
            return False
        parents = {seed: _trained_parent(self.plan, run.name) for seed, run in group.runs.items()}
        return None not in parents.values() and all(
            _trained_parent(self.plan, run.name) == parents[seed]
            for seed, run in other.runs.items()
            if seed in parents
        )

    def difference(self, group: Group, value: Callable[[Run], float]) -> Interval | None:
        """Paired difference of a value to the baseline's; None where there is no baseline."""
        other = self.baseline_of(group)
        return (
            None
            if other is None
            else intervals.paired_difference(group.per_seed(value), other.per_seed(value))
        )


def at_steps(metric: str, extra: float) -> Callable[[Run], float]:
    """The metric after that many extra steps."""
    return lambda run: run.curve(metric).at(run.start_step + extra)


def at_flops(metric: str, flops: float) -> Callable[[Run], float]:
    """The metric after that many extra training FLOPs, linear between evaluations."""
    return lambda run: run.curve(metric).at(
        run.start_step + min(flops / run.flops_per_step * (1 - 1e-12), run.extra_steps)
    )


def _load_run(name: str, path: Path) -> Run | None:
    try:
        run = Run.load(name, path)
    except FileNotFoundError:  # not started, not evaluated yet, or a conversion
        return None
    return run if run.is_evaluated else None


def trained_cells(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cells of a study's plan that are training runs; others write a cache, or convert."""
    return [cell for cell in plan["cells"] if cell.get("kind", "train") == "train"]


def _trained_parent(plan: Mapping[str, Any], name: str) -> str | None:
    """The training run that a cell starts from, by way of conversions or none."""
    cells = {cell["name"]: cell for cell in plan["cells"]}
    for need in cells[name]["needs"]:
        kind = cells[need].get("kind", "train")
        if kind == "train":
            return need
        if kind == "upcycle":
            return _trained_parent(plan, need)
    return None


def _exit_codes(events: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Cell -> how its last process ended; without those that run."""
    codes: dict[str, int] = {}
    for event in events:
        if event["event"] == "end":
            codes[event["cell"]] = event["code"]
        elif event["event"] == "start":
            codes.pop(event["cell"], None)
    return codes


def _groups(plan: Mapping[str, Any], runs: Mapping[str, Run]) -> list[Group]:
    found: dict[tuple[str, tuple[tuple[str, str], ...]], dict[str, Run]] = {}
    for cell in plan["cells"]:
        if cell["name"] in runs and plan["stages"][cell["stage"]]["compared"]:
            labels = {axis: label for axis, label in cell["labels"].items() if axis != SEED_AXIS}
            members = found.setdefault((cell["stage"], tuple(labels.items())), {})
            members[cell["labels"].get(SEED_AXIS, "0")] = runs[cell["name"]]
    return [
        Group(_name(plan, stage, dict(labels)), stage, dict(labels), members)
        for (stage, labels), members in found.items()
    ]


def _name(plan: Mapping[str, Any], stage: str, labels: Mapping[str, str]) -> str:
    return ", ".join(
        [
            plan["stages"][stage]["label"],
            *(f"{axis_name(axis)} {label}" for axis, label in labels.items()),
        ]
    )


def axis_name(axis: str) -> str:
    """An axis as a reader wants it.

    >>> axis_name("NUM_EXPERTS"), axis_name("capacity_factor")
    ('num experts', 'capacity factor')
    """
    return axis.rpartition(".")[2].replace("_", " ").lower()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def store(folder: str | Path, output: str | Path) -> Path:
    """Copies what reports need, a few hundred kB: plans, configurations, manifests and metrics, no
    checkpoints.

    Paths of the sweep's folder become `{SWEEP_DIR}` and those of gin files `gin_configs/...`: they
    say nothing about a machine's folders.

    Args:
      folder: the sweep's folder.
      output: where to; its cells are replaced.

    Raises:
      FileNotFoundError: the folder is not a sweep's.
    """
    root, target = Path(folder).resolve(), Path(output)
    if not (root / SWEEP_FILE).is_file():
        raise FileNotFoundError(f"{root} holds no {SWEEP_FILE}: it is not the folder of a sweep")
    if (target / CELLS).is_dir():
        shutil.rmtree(target / CELLS)
    names = [cell["name"] for cell in json.loads((root / SWEEP_FILE).read_text())["cells"]]
    paths = [root / name for name in STORED_FILES if (root / name).is_file()]
    for name in names:
        paths += [
            path
            for pattern in STORED_CELL_FILES
            for path in sorted((root / CELLS / name).glob(pattern))
        ]
    for path in paths:
        text = portable(path.read_text(), str(root))
        text = re.sub(r"(?:/[^\s/'\"]+)+/(gin_configs/)", r"\1", text)
        copy = target / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(_rounded(path, text))
    return target


def _rounded(path: Path, text: str) -> str:
    """Metrics of vectors with six digits: the files stay small and the plots the same."""
    if path.name != METRICS:
        return text

    def short(value: Any) -> Any:
        return (
            [number if number is None else float(f"{number:.6g}") for number in value]
            if isinstance(value, list)
            else value
        )

    return "".join(
        json.dumps({key: short(value) for key, value in row.items()}) + "\n"
        for row in read_rows(path)
    )

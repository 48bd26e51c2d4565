"""What runs left in their MODEL_DIRs, read back for comparison."""

import dataclasses
import functools
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class Curve:
    """One metric along a run.

    Attributes:
      steps: global training steps, increasing, `[n]`.
      values: the metric after that many steps, `[n]`; `[n, E]` for one value per expert.
    """

    steps: np.ndarray
    values: np.ndarray

    @property
    def first(self) -> float:
        """The value at the earliest evaluation."""
        return float(self.values[0])

    @property
    def last(self) -> float:
        """The value at the latest evaluation."""
        return float(self.values[-1])

    def at(self, step: float) -> float:
        """The value at `step`, linear between evaluations; NaN outside the evaluated range."""
        return float(np.interp(step, self.steps, self.values, left=np.nan, right=np.nan))


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run, as its MODEL_DIR tells it.

    Attributes:
      name: how the report calls it.
      manifest: the run's `manifest.json`.
      training: rows of `train/metrics.jsonl`, one per step at which statistics were written, by
        step.
      evaluations: rows of `training_eval/<task>/metrics.jsonl` by task, by step.
    """

    name: str
    manifest: Mapping[str, Any]
    training: Sequence[Mapping[str, Any]]
    evaluations: Mapping[str, Sequence[Mapping[str, Any]]]

    @classmethod
    def load(cls, name: str, model_dir: str | Path) -> "Run":
        """Reads a MODEL_DIR.

        Raises:
          FileNotFoundError: the folder holds no manifest or no evaluation.
          ValueError: the manifest is damaged.
        """
        root = Path(model_dir)
        if not (root / MANIFEST).is_file():
            raise FileNotFoundError(
                f"{root} holds no {MANIFEST}: it is not the MODEL_DIR of a run, or the run has not"
                " started yet"
            )
        evaluations = {
            path.parent.name: read_rows(path)
            for path in sorted(root.glob(f"training_eval/*/{METRICS}"))
        }
        if not any(evaluations.values()):
            raise FileNotFoundError(
                f"{root}/training_eval holds no {METRICS}: the run has not been evaluated; set"
                " train.eval_period"
            )
        return cls(
            name,
            read_manifest(root / MANIFEST),
            read_rows(root / "train" / METRICS),
            evaluations,
        )

    @property
    def tasks(self) -> list[str]:
        """The evaluated tasks, sorted."""
        return sorted(self.evaluations)

    @functools.cached_property
    def start_step(self) -> int:
        """The step that the run started from: 0 from scratch, else that of the checkpoint which it
        continues.
        """
        return int(self.manifest["start_step"])

    @property
    def flops_per_step(self) -> float:
        """Training FLOPs (forward and backward) of one step."""
        return float(self.manifest["train_flops_per_step"])

    @property
    def is_evaluated(self) -> bool:
        """Whether all tasks were evaluated at one step at least; not so where the run was killed in
        its first evaluation.
        """
        return bool(
            set.intersection(*({row["step"] for row in rows} for rows in self.evaluations.values()))
        )

    @property
    def extra_steps(self) -> int:
        """Steps trained in this run."""
        return int(self.curve("accuracy").steps[-1]) - self.start_step

    @property
    def seconds_per_step(self) -> float:
        """Median seconds of a step over the reporting periods; NaN where none was written."""
        rates = [
            row["timing/steps_per_second"]
            for row in self.training
            if row.get("timing/steps_per_second")
        ]
        return 1.0 / float(np.median(rates)) if rates else float("nan")

    @property
    def machine_load(self) -> tuple[float, int] | None:
        """Median load average of the machine over the reporting periods, and its cores; None where
        the run did not record them.
        """
        loads = [
            row["timing/load_average"] for row in self.training if "timing/load_average" in row
        ]
        starts = self.manifest.get("starts") or [{}]
        cores = starts[-1].get("cores")
        return (float(np.median(loads)), int(cores)) if loads and cores else None

    def curve(self, metric: str, task: str | None = None) -> Curve:
        """A metric of one task, or its unweighted mean over all tasks, at the steps where each has
        a value.
        """
        by_task = [
            {row["step"]: row[metric] for row in self.evaluations[t] if metric in row}
            for t in ([task] if task else self.tasks)
        ]
        steps = sorted(set.intersection(*(set(rows) for rows in by_task)))
        if not steps:
            raise ValueError(f"run {self.name!r} has no evaluation with the metric {metric!r}")
        return Curve(
            np.array(steps),
            np.array(
                [np.mean([_numbers(rows[step]) for rows in by_task], axis=0) for step in steps]
            ),
        )

    def vectors_over_time(self, suffix: str) -> dict[str, Curve]:
        """Per-layer vectors of all evaluations: layer -> steps `[n]` and values `[n, E]`,
        unweighted means over the tasks.
        """
        prefix, end = "experts/", f"/{suffix}"
        first = self.evaluations[self.tasks[0]]
        keys = [
            key
            for key in (first[0] if first else {})
            if key.startswith(prefix) and key.endswith(end)
        ]
        return {key[len(prefix) : -len(end)]: self.curve(key) for key in keys}

    def last_vectors(self, suffix: str, task: str) -> dict[str, np.ndarray]:
        """Per-layer vectors of the last evaluation: `{'encoder/layers_1': [E], ...}` for metrics
        `experts/<layer>/<suffix>`.
        """
        row = self.evaluations[task][-1] if self.evaluations[task] else {}
        prefix, end = "experts/", f"/{suffix}"
        return {
            key[len(prefix) : -len(end)]: _numbers(row[key])
            for key in row
            if key.startswith(prefix) and key.endswith(end)
        }


def _numbers(value: Any) -> np.ndarray:
    """A metric as float64, `[]` or `[E]`; NaN where it was not finite, which the files hold as
    null.
    """
    return np.array(value, np.float64)


_MANIFEST_TYPES: dict[str, type | types.UnionType] = {
    "status": str,
    "start_step": int,
    "step": int,
    "total_steps": int,
    "parameters": int,
    "active_parameters": int,
    "train_flops_per_step": int | float,
    "starts": list,
    "model": dict,
    "restored_from": dict,
}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run.

    Raises:
      ValueError: it is no JSON object, or a member has another type than training writes.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path} is damaged ({why}): leave the run out") from None
    wrong = ["it is no object"] if not isinstance(content, dict) else []
    for name, kind in _MANIFEST_TYPES.items() if not wrong else ():
        value = content.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            wrong.append(f"{name} is {value!r:.40}")
    if not wrong and not all(isinstance(start, dict) for start in content.get("starts") or ()):
        wrong.append("starts is no list of objects")
    if wrong:
        raise ValueError(f"{path} is damaged ({'; '.join(wrong)}): leave the run out")
    return content


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file by step. A step that a resumed run wrote again counts once, as
    last written; a torn line, or one that is no row, is skipped.
    """
    rows: dict[int, dict[str, Any]] = {}
    text = path.read_text(errors="replace") if path.is_file() else ""
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the run was killed while it wrote this line
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows[row["step"]] = {**rows.get(row["step"], {}), **row}
    return [rows[step] for step in sorted(rows)]

"""The runs below a folder and how each stands, judged from the files that a run leaves; no jax."""

import datetime
import enum
import itertools
import json
import os
import pathlib
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from upcycle_jax import leases
from upcycle_jax.leases.process_record import is_alive
from upcycle_jax.printing import printable, printable_lines
from upcycle_jax.step_names import step_of
from upcycle_jax.studies.run_results import MANIFEST, METRICS, read_rows
from upcycle_jax.text import aligned, duration, size

NOT_ENTERED = re.compile(
    r"\..*|train|training_eval|inference_eval|damaged_checkpoint_.*|checkpoint_\d+.*"
)
"""Folders in which no MODEL_DIR lies."""

LEASE_SILENCE = 300.0
"""A run on another machine that holds a lease counts as stopped after five minutes without a
heartbeat: those come every 15 s, and the clocks of machines differ.
"""
LEAST_SILENCE = 600.0
SILENT_PERIODS = 10
"""A run that holds no lease (of an older version) counts as stopped after ten reporting periods,
and at least ten minutes, without a sign of life.
"""


class State(enum.StrEnum):
    """How a run stands."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """One run as its MODEL_DIR tells it.

    Attributes:
      name: the MODEL_DIR, relative to the folder that was listed.
      state: see `State`.
      why: what the state was judged from, in words.
      step: the last step that any file knows of.
      total_steps: TRAIN_STEPS, or None where the manifest does not say.
      parameters: of the model, or None.
      training: last reported training metrics: `loss`, `accuracy` and `steps_per_second`, those
        that there are.
      evaluations: last `cross_ent_loss` and `accuracy` by task.
      last_sign: seconds since the epoch of the newest file that the run writes while it runs.
      checkpoint_steps: finished checkpoints, rising.
      checkpoint_bytes: of all of them on disk; a file that several share counts once.
    """

    name: str
    state: State
    why: str
    step: int
    total_steps: int | None
    parameters: int | None = None
    training: Mapping[str, float] = field(default_factory=dict)
    evaluations: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    last_sign: float
    checkpoint_steps: Sequence[int] = ()
    checkpoint_bytes: int = 0

    def as_json(self, *, now: float) -> dict[str, Any]:
        """The status as JSON knows it; `age_seconds` counts from `last_sign` to `now`."""
        out = {name: getattr(self, name) for name in self.__dataclass_fields__}
        stamp = datetime.datetime.fromtimestamp(self.last_sign, datetime.UTC).isoformat(
            timespec="seconds"
        )
        return out | {
            "state": str(self.state),
            "checkpoint_steps": list(self.checkpoint_steps),
            "last_sign": stamp,
            "age_seconds": round(now - self.last_sign, 1),
        }


def list_runs(folder: os.PathLike | str, *, now: float | None = None) -> list[RunStatus]:
    """All runs below a folder (itself included), by name.

    Args:
      folder: where to look.
      now: seconds since the epoch that silence is measured to; None is the time of the call.

    Raises:
      FileNotFoundError: there is no such folder.
    """
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} is no folder: name one with MODEL_DIRs in it, or a MODEL_DIR"
        )
    moment = time.time() if now is None else now
    found = (
        read_status(path, name=path.relative_to(root).as_posix(), now=moment)
        for path in model_dirs(root)
    )
    return [status for status in found if status is not None]


def model_dirs(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Folders at or below `root` that hold a manifest, by path; checkpoints are not entered."""
    for place, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not NOT_ENTERED.fullmatch(name))
        if MANIFEST in files:
            yield pathlib.Path(place)


def read_status(model_dir: pathlib.Path, *, name: str, now: float) -> RunStatus | None:
    """The status of one MODEL_DIR; None where its manifest is not that of a run.

    Args:
      model_dir: a folder that holds a manifest.
      name: how to call it.
      now: seconds since the epoch.
    """
    rows = read_rows(model_dir / "train" / METRICS)
    evaluations = {
        path.parent.name: read_rows(path)
        for path in sorted(model_dir.glob(f"training_eval/*/{METRICS}"))
    }
    checkpoints = {
        step: path for path in model_dir.iterdir() if (step := step_of(path.name)) is not None
    }
    times = [
        (model_dir / MANIFEST).stat().st_mtime,
        *(path.stat().st_mtime for path in checkpoints.values()),
    ]
    times += [
        stamp
        for found in (rows, *evaluations.values())
        for row in found[-1:]
        if (stamp := _stamp(row)) is not None
    ]
    holder = leases.look(model_dir / leases.TRAINING_LEASE)
    last_sign = max(times if holder is None else [*times, holder.renewed])
    manifest, problem = _read_manifest(model_dir / MANIFEST)
    if not problem and ("status" not in manifest or "start_step" not in manifest):
        return None
    state, why = (
        (State.FAILED, problem)
        if problem
        else _judge(manifest, rows, silence=now - last_sign, has_lease=holder is not None)
    )
    steps = [row["step"] for found in (rows, *evaluations.values()) for row in found[-1:]]
    return RunStatus(
        name=name,
        state=state,
        why=why,
        step=max([_whole(manifest.get("step")) or 0, *steps, *checkpoints], default=0),
        total_steps=_whole(manifest.get("total_steps")),
        parameters=_whole(manifest.get("parameters")),
        training=_last_training(rows),
        evaluations={
            task: _picked(found[-1], ("cross_ent_loss", "accuracy"))
            for task, found in evaluations.items()
            if found
        },
        last_sign=last_sign,
        checkpoint_steps=sorted(checkpoints),
        checkpoint_bytes=_bytes_on_disk(checkpoints.values()),
    )


def _read_manifest(path: pathlib.Path) -> tuple[dict[str, Any], str | None]:
    """The manifest, and what is wrong with it; empty where it is none at all."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return {}, f"{MANIFEST} is damaged ({why})"
    return (content, None) if isinstance(content, dict) else ({}, None)


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def _stamp(row: Mapping[str, Any]) -> float | None:
    """When a row was written, in seconds since the epoch; None where it does not say so."""
    value = row.get("wall_time")
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e11 else None


def _process(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the process that writes the run; empty where there is none."""
    starts = manifest.get("starts")
    last = starts[-1] if isinstance(starts, list) and starts else None
    record = last.get("process") if isinstance(last, dict) else None
    if not isinstance(record, dict) or _whole(record.get("pid")) is None:
        return {}
    return record


def _judge(
    manifest: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    silence: float,
    has_lease: bool = False,
) -> tuple[State, str]:
    """What the manifest says, believed only as far as it can be: a run that was killed left it at
    'running'.
    """
    status = str(manifest["status"])
    if status == "finished":
        return State.FINISHED, "reached its last step"
    if status == "failed":
        return State.FAILED, str(manifest.get("error", "no error was recorded"))
    if status != "running":
        return State.STOPPED, status
    process = _process(manifest)
    alive = is_alive(process)
    if alive is not None:
        return (
            (State.RUNNING, f"process {process['pid']} is there")
            if alive
            else (State.STOPPED, f"process {process['pid']} is gone")
        )
    stamps = [stamp for row in rows if (stamp := _stamp(row)) is not None]
    gaps = [after - before for before, after in itertools.pairwise(stamps) if after > before]
    limit = max(LEAST_SILENCE, SILENT_PERIODS * statistics.median(gaps)) if gaps else LEAST_SILENCE
    limit = LEASE_SILENCE if has_lease else limit
    if silence > limit:
        return State.STOPPED, f"no sign of life for {duration(silence)}"
    return State.RUNNING, f"last sign of life {duration(silence)} ago"


def _last_training(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    if not rows:
        return {}
    last = {key.removeprefix("timing/"): value for key, value in rows[-1].items()}
    return _picked(last, ("loss", "accuracy", "steps_per_second"))


def _picked(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    return {name: float(row[name]) for name in names if _is_number(row.get(name))}


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)


def _bytes_on_disk(folders: Any) -> int:
    seen: dict[tuple[int, int], int] = {}
    for folder in folders:
        for place, _, files in os.walk(folder):
            for file in files:
                try:
                    stat = os.stat(os.path.join(place, file))
                except FileNotFoundError:  # an old checkpoint is removed while it is looked at
                    continue
                seen[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(seen.values())


def table(runs: Sequence[RunStatus], *, now: float) -> str:
    """The runs as text, one line each; what is wrong with those that do not run follows."""
    header = ("run", "state", "step", "loss", "evaluation", "steps/s", "age", "checkpoints")
    lines = [header, *(_cells(run, now) for run in runs)]
    text = aligned([tuple(map(printable, line)) for line in lines])
    notes = [
        f"{printable(run.name)}: {printable_lines(run.why)}"
        for run in runs
        if run.state in (State.STOPPED, State.FAILED)
    ]
    return "\n".join([*text, *([""] if notes else []), *notes]) + "\n"


def _cells(run: RunStatus, now: float) -> tuple[str, ...]:
    losses = [
        values["cross_ent_loss"]
        for values in run.evaluations.values()
        if "cross_ent_loss" in values
    ]
    many = f" (mean of {len(losses)})" if len(losses) > 1 else ""
    total = (
        f"/{run.total_steps} ({100 * run.step // max(run.total_steps, 1)}%)"
        if run.total_steps
        else ""
    )
    count = len(run.checkpoint_steps)
    return (
        run.name,
        str(run.state),
        f"{run.step}{total}",
        f"{run.training['loss']:.4g}" if "loss" in run.training else "-",
        f"{sum(losses) / len(losses):.4g}{many}" if losses else "-",
        f"{run.training['steps_per_second']:.3g}" if "steps_per_second" in run.training else "-",
        duration(now - run.last_sign),
        (
            f"{count}, latest {run.checkpoint_steps[-1]}, {size(run.checkpoint_bytes)}"
            if count
            else "none"
        ),
    )

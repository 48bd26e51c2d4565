"""What earlier starts left in MODEL_DIR and this one does not go on from is set aside, so that no
step is shown twice and no reader takes two runs for one.
"""

import json
import logging
from typing import Any

import jax
from etils import epath

from upcycle_jax.training import manifest
from upcycle_jax.training.metric_writers import METRICS_FILE
from upcycle_jax.training.tracking import RUN_ID_FILE

_log = logging.getLogger(__name__)

ROWS_FILE = "metrics_set_aside.jsonl"
"""Beside `metrics.jsonl`: rows that were taken out of it, as they were."""
MANIFESTS_FILE = "manifests_set_aside.jsonl"
"""In MODEL_DIR: manifests of earlier runs, one per line."""
EVENTS, EVENTS_SET_ASIDE = "events.out.tfevents.", "events_set_aside."
"""TensorBoard reads files with `tfevents` in their name."""

_FOLDERS = ("train", "training_eval/*")
_FOLDERS_OF_AN_EARLIER_RUN = (*_FOLDERS, "inference_eval/*")


def set_aside(model_dir: epath.Path, *, step: int, fresh: bool) -> None:
    """Takes out of `metrics.jsonl` what this start will write again; only process 0 does it.

    Args:
      model_dir: the run's folder.
      step: where this start begins: of a run that is resumed, rows of later steps go (it was
        killed after its last checkpoint, or fell back to an earlier one).
      fresh: nothing is resumed: whatever is there is of an earlier run, whose checkpoints are gone
        or never came to be. All rows, TensorBoard's events, the manifest and the run id of
        Weights & Biases go.
    """
    if jax.process_index() != 0 or not model_dir.is_dir():
        return
    moved = 0
    for pattern in _FOLDERS_OF_AN_EARLIER_RUN if fresh else _FOLDERS:
        for folder in sorted(model_dir.glob(pattern)):
            moved += _rows(folder, after=-1 if fresh else step)
            if fresh:
                for events in folder.glob(f"{EVENTS}*"):
                    name = events.name.removeprefix(EVENTS)
                    events.replace(folder / f"{EVENTS_SET_ASIDE}{name}")
    earlier = fresh and _manifest(model_dir)
    if earlier or (fresh and moved):
        _log.warning(
            "%s HOLDS AN EARLIER RUN WITHOUT A CHECKPOINT TO GO ON FROM: this one starts afresh;"
            " %d rows of metrics are kept in %s beside each %s, the manifest in %s",
            model_dir,
            moved,
            ROWS_FILE,
            METRICS_FILE,
            MANIFESTS_FILE,
        )
    elif moved:
        _log.info(
            "%d rows of metrics beyond step %d, from which this start goes on, are kept in %s"
            " beside each %s",
            moved,
            step,
            ROWS_FILE,
            METRICS_FILE,
        )


def _rows(folder: epath.Path, *, after: int) -> int:
    """Moves the rows of steps above `after`, and lines that are no rows; returns how many."""
    path = folder / METRICS_FILE
    if not path.exists():
        return 0
    lines = path.read_bytes().decode(errors="replace").splitlines()
    kept = [line for line in lines if _step(line) <= after]
    moved = [line for line in lines if _step(line) > after]
    if moved:
        _append(folder / ROWS_FILE, moved)
        manifest.write_text(path, "".join(f"{line}\n" for line in kept))
    return len(moved)


def _step(line: str) -> float:
    """The step of a row; infinite where a kill or a full disk has torn the line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return float("inf")


def _manifest(model_dir: epath.Path) -> bool:
    earlier: dict[str, Any] = manifest.read(model_dir)
    run_id = model_dir / RUN_ID_FILE
    if not earlier and not run_id.exists():
        return False
    entry = {"set_aside": manifest.now(), "manifest": earlier}
    if run_id.exists():
        entry["wandb_run_id"] = run_id.read_text().strip()
    _append(model_dir / MANIFESTS_FILE, [json.dumps(entry)])
    (model_dir / manifest.MANIFEST_FILE).unlink(missing_ok=True)
    run_id.unlink(missing_ok=True)
    return True


def _append(path: epath.Path, lines: list[str]) -> None:
    before = path.read_text() if path.exists() else ""
    manifest.write_text(path, before + "".join(f"{line}\n" for line in lines))

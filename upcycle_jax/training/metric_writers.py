"""Where metrics go: JSON lines and TensorBoard events side by side. TensorFlow is not needed for
either.
"""

import json
import math
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from upcycle_jax.files import append_line
from upcycle_jax.text import duration

METRICS_FILE = "metrics.jsonl"

Scalars = Mapping[str, Any]


class MetricWriter:
    """Writes the metrics of one kind (`train`, `training_eval/<task>`) into one folder.

    Each call appends a line to `metrics.jsonl` and an event to a TensorBoard file in the same
    folder. A resumed run appends; where it repeats steps that were lost, the later line counts, and
    TensorBoard is told to forget the earlier events. A line that a kill has torn is closed first,
    so that only that line is lost to readers.

    Args:
      folder: made on first use.
      first_step: the step at which this process starts writing.
    """

    def __init__(self, folder: os.PathLike | str, *, first_step: int = 0):
        self.folder = epath.Path(folder)
        self._first_step = first_step
        self._events: Any = None
        self._text: str | None = None

    def has_step(self, step: int) -> bool:
        """Whether a line for that step was written already, e.g. before an interruption."""
        path = self.folder / METRICS_FILE
        lines = path.read_text().splitlines() if path.exists() else ()
        return any(line.startswith(f'{{"step": {step},') and line.endswith("}") for line in lines)

    def write(self, step: int, values: Scalars) -> None:
        """Writes one set of metrics: floats or flat sequences of floats
        (`experts/<layer>/load`).
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        row = {"step": int(step), "wall_time": round(time.time(), 3)}
        row |= {name: _plain(value) for name, value in values.items()}
        self._append(json.dumps(row))
        self._write_event(step, values)

    def _append(self, line: str) -> None:
        path = self.folder / METRICS_FILE
        if "://" not in os.fspath(path):
            append_line(path, line)
            return
        if (
            self._text is None
        ):  # Buckets cannot append, and tear nothing: the file is written anew, from memory.
            self._text = path.read_text() if path.exists() else ""
        self._text += f"{line}\n"
        path.write_text(self._text)

    def _write_event(self, step: int, values: Scalars) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2

        if self._events is None:
            self._events = _EventFile(self.folder)
            if self._first_step:
                self._events.add(
                    event_pb2.Event(
                        step=self._first_step + 1,
                        session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START),
                    )
                )
        summary = summary_pb2.Summary()
        for name, value in values.items():
            for tag, number in _tags(name, value):
                summary.value.add(tag=tag, simple_value=number)
        self._events.add(event_pb2.Event(step=int(step), summary=summary))

    def close(self) -> None:
        """Closes the event file."""
        if self._events is not None:
            self._events.close()
            self._events = None


class _EventFile:
    """A TensorBoard event file, through tensorboard's record writer; its own EventFileWriter would
    import TensorFlow.
    """

    def __init__(self, folder: epath.Path):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        written_by = f"{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        name = f"events.out.tfevents.{int(time.time()):010d}.{written_by}"
        self._writer = RecordWriter((folder / name).open("wb"))
        self.add(event_pb2.Event(file_version="brain.Event:2"))

    def add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _plain(value: Any) -> Any:
    array = np.asarray(value, np.float64)
    if array.ndim:
        return [_plain(element) for element in array]
    return float(array) if math.isfinite(array) else None  # NaN is no JSON


def _tags(name: str, value: Any) -> list[tuple[str, float]]:
    """TensorBoard tags of a metric; a vector is shown by its extremes, its elements are in the JSON
    lines.
    """
    array = np.asarray(value, np.float64)
    if not array.ndim:
        return [(name, float(array))]
    return [(f"{name}/min", float(array.min())), (f"{name}/max", float(array.max()))]


def progress_line(
    step: int,
    total_steps: int,
    values: Scalars,
    *,
    steps_per_second: float,
    tokens_per_second: float,
    unit: str = "tokens",
) -> str:
    """The line that the console shows, e.g. `step 1200/20000 (6%)  loss 3.412  accuracy 0.412  8.3
    steps/s  52k tokens/s  38 min left`; of images `52k images/s`.
    """
    parts = [f"step {step}/{total_steps} ({100 * step // max(total_steps, 1)}%)"]
    parts += [
        f"{name} {float(values[name]):.4g}"
        for name in ("loss", "accuracy", "learning_rate")
        if name in values
    ]
    if steps_per_second > 0:
        parts += [f"{steps_per_second:.3g} steps/s", f"{_short(tokens_per_second)} {unit}/s"]
        if "timing/mfu" in values:
            parts.append(f"MFU {float(values['timing/mfu']):.1%}")
        parts.append(f"{duration((total_steps - step) / steps_per_second)} left")
    return "  ".join(parts)


def _short(number: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"

"""Steps that count from the start of a run: settings that say 'start' mean the step of the
checkpoint that the run began with, also after it was resumed. The averages of an optimizer count
from where they began, which may be an earlier run.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from upcycle_jax import checks

StepOrStart = checks.CountOrZero | Literal["start"]
"""A global step, or the one at which the run (or an optimizer's state) started."""

RUN_START, STATE_START = "run_start", "optimizer_state_start"
"""Entries of a checkpoint's record: the steps at which its run and its optimizer state started,
where a setting counts from there.
"""


@dataclasses.dataclass(frozen=True)
class Starts:
    """Where things started.

    Attributes:
      run: the step at which the run started.
      state: the step at which its optimizer state started afresh.
    """

    run: int
    state: int

    def record(self) -> dict[str, int]:
        """The entries of a checkpoint's record."""
        return {RUN_START: self.run, STATE_START: self.state}


def recorded(record: Mapping[str, Any], name: str, *, at_most: int) -> int | None:
    """One entry of a record; None where it is missing or no step up to `at_most`."""
    found = record.get(name)
    return found if isinstance(found, int) and 0 <= found <= at_most else None


def state_start(record: Mapping[str, Any], *, at_most: int) -> int:
    """The step at which the optimizer state of a checkpoint started afresh: as recorded by the run
    that saved it, or the step of the conversion that made it; 0 where neither says so.
    """
    found = recorded(record, STATE_START, at_most=at_most)
    if found is not None:
        return found
    surgery: Any = record.get("surgery")
    done: Any = surgery.get("recipe") if isinstance(surgery, dict) else None
    if not isinstance(done, dict) or done.get("optimizer_state") != "reset":
        return 0
    step = {"reset": 0}.get(str(done.get("step")), done.get("step"))
    where = {"step": step if isinstance(step, int) else surgery.get("source_step")}
    return recorded(where, "step", at_most=at_most) or 0


def counted_from(offset: StepOrStart, start: int | None) -> int:
    """The global step that an offset stands for.

    Args:
      offset: a global step, or 'start'.
      start: the step that 'start' means; None where no run has begun: 0 stands for it.
    """
    if offset == "start":
        return start or 0
    return offset

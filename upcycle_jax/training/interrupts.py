"""Stopping a run from outside: SIGTERM and SIGINT ask it to save at the next step and end."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

import jax

_log = logging.getLogger(__name__)


class StopRequest:
    """While entered, the first SIGTERM or SIGINT is remembered and a second one acts as usual.

    With several processes the request must stop all of them at the same step. jax's preemption
    service agrees on that step, and it takes SIGTERM for itself; there SIGINT keeps its usual
    meaning. Outside the main thread no handler can be set, and none is.
    """

    def __init__(self) -> None:
        self._name: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._name = signal.Signals(number).name
        self._restore()
        _log.warning(
            "%s: saving a checkpoint after the current step, then ending; a second signal ends at"
            " once",
            self._name,
        )

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)

    def after_step(self, step: int) -> str | None:
        """Why the run should stop after this step, or None to go on; every process gets the same
        answer.
        """
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return "preemption" if multihost_utils.reached_preemption_sync_point(step) else None
        return self._name

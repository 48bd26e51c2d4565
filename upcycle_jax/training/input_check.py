"""Looks at how long a run waited for batches, and says once what would make them come faster."""

import logging
import time
from collections.abc import Callable, Iterator

from upcycle_jax.features import HostBatch

_log = logging.getLogger(__name__)

WAITED_ABOVE = 0.1
"""More than this part of a report period may not be waited for batches."""
SHORTEST = 1.0
"""Seconds of a period that is judged: in shorter ones a hiccup of the machine is a large part."""


class InputCheck:
    """Takes batches, and warns once where devices have nothing to do until they come.

    Args:
      advice: what would make them come faster.
      clock: seconds.
    """

    def __init__(self, advice: Callable[[], str], *, clock: Callable[[], float] = time.monotonic):
        self._advice, self._clock = advice, clock
        self._waited, self._said = 0.0, False

    def take(self, batches: Iterator[HostBatch], devices_are_done: Callable[[], bool]) -> HostBatch:
        """The next batch. The time that it takes is waited for where the devices have finished all
        steps when it is there; until then they would not have begun with it anyway.
        """
        began = self._clock()
        batch = next(batches)
        if devices_are_done():
            self._waited += self._clock() - began
        return batch

    def look(self, seconds: float) -> str | None:
        """A warning about a report period of so many seconds, which is logged too; None where
        nothing is wrong, or it was said before.
        """
        waited, self._waited = self._waited, 0.0
        if self._said or seconds < SHORTEST or waited <= WAITED_ABOVE * seconds:
            return None
        self._said = True
        text = (
            f"INPUT limits this run: of the {seconds:.1f} s since the last report {waited:.1f} s"
            f" ({waited / seconds:.0%}) were waited for batches, and the devices were done before"
            f" those came. {self._advice()}."
        )
        _log.warning("%s", text)
        return text

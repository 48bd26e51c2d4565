"""How far some work is, at what rate, and how long the rest will take."""

import threading
import time
from collections.abc import Callable

from upcycle_jax.text import duration, size

Progress = Callable[[str], None]
"""Takes a line of text."""


class Meter:
    """Counts the work that is done, and reports about every `period` seconds. Threads may share
    one.
    """

    def __init__(
        self,
        total: float,
        report: Progress | None = None,
        *,
        verb: str = "written",
        unit: str | None = None,
        period: float = 1.0,
        done: float = 0,
    ):
        """
        Args:
          total: the whole work.
          report: takes the lines.
          verb: what is done to the work.
          unit: what the work is counted in; None: bytes.
          period: seconds between lines.
          done: work that was done before; it does not count for the rate.
        """
        self.total, self._before, self._done = total, done, done
        self._report, self._period, self._verb, self._unit = report, period, verb, unit
        self._begun = self._reported = time.monotonic()
        self._lock = threading.Lock()

    def add(self, count: float, what: str) -> None:
        """So much more is done, of what the text names."""
        with self._lock:
            self._at(self._done + count, what)

    def reach(self, done: float, what: str = "") -> None:
        """So much is done by now."""
        with self._lock:
            self._at(done, what)

    def _at(self, done: float, what: str) -> None:
        self._done = done
        now = time.monotonic()
        if self._report is not None and now - self._reported >= self._period:
            self._reported = now
            self._report(f"{self.text()}: {what}")

    def text(self) -> str:
        """`12.5%  written 1.0 MiB of 8.0 MiB, 512.0 KiB/s, 14 s left`."""
        shown, seconds = self._shown, max(time.monotonic() - self._begun, 1e-9)
        share, rate = self._done / max(self.total, 1), (self._done - self._before) / seconds
        line = f"{share:.1%}  {self._verb} {shown(self._done)} of {shown(self.total)}"
        if rate <= 0:
            return line
        return f"{line}, {shown(rate)}/s, {duration((self.total - self._done) / rate)} left"

    def finish(self, then: str = "") -> None:
        """Reports what was done in all, and what comes next."""
        if self._report is not None:
            seconds = time.monotonic() - self._begun
            self._report(f"{self._verb} {self._shown(self._done)} in {seconds:.1f} s{then}")

    def _shown(self, count: float) -> str:
        return size(count) if self._unit is None else f"{count:,.4g} {self._unit}"

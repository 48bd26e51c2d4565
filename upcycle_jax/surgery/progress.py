"""How far a conversion or a proof is, said about every second; and how many threads do the work."""

import os
import threading
import time
from collections.abc import Callable

from upcycle_jax.surgery.plan import size

Progress = Callable[[str], None]

MAX_THREADS = 8
"""More do not help: disks and decoders are busy by then, and each holds a block of arrays."""


def threads() -> int:
    """Threads that read and compare at a time: one per core that this process may use."""
    return max(1, min(MAX_THREADS, len(os.sched_getaffinity(0))))


class Meter:
    """Says about every second how far the work is. Threads may share one."""

    def __init__(self, total: int, progress: Progress | None, done: str = "written"):
        self.total, self.progress, self.done, self.verb = max(total, 1), progress, 0, done
        self.begun = self.said = time.monotonic()
        self._lock = threading.Lock()

    def add(self, count: int, name: str) -> None:
        """Counts bytes of a leaf as done."""
        with self._lock:
            self.done += count
            now = time.monotonic()
            if self.progress is not None and now - self.said >= 1:
                self.said = now
                rate = self.done / max(now - self.begun, 1e-9)
                left = (self.total - self.done) / max(rate, 1)
                self.progress(
                    f"{100 * self.done / self.total:5.1f}%  {self.verb} {size(self.done)} of"
                    f" {size(self.total)}, {size(rate)}/s, {left:.0f} s left: {name}"
                )

    def finish(self, then: str = "") -> None:
        """Says what was done in all, and what comes next."""
        if self.progress is not None:
            self.progress(
                f"{self.verb} {size(self.done)} in {time.monotonic() - self.begun:.1f} s{then}"
            )

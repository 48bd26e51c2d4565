"""How many threads read and compare at a time."""

import os

MAX_THREADS = 8
"""More do not help: disks and decoders are busy by then, and each holds a block of arrays."""


def threads() -> int:
    """One per core that this process may use, up to `MAX_THREADS`."""
    return max(1, min(MAX_THREADS, len(os.sched_getaffinity(0))))

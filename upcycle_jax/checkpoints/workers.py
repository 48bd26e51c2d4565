"""Threads that read, change and write arrays at a time, and the memory that they hold together."""

import collections
import concurrent.futures
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

MAX_THREADS = 8
"""More do not help: disks and decoders are busy by then, and each holds a block of arrays."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def threads() -> int:
    """One per core that this process may use, up to `MAX_THREADS`."""
    return max(1, min(MAX_THREADS, len(os.sched_getaffinity(0))))


def in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    nbytes: Callable[[Item], int],
    limit: int,
) -> Iterator[Result]:
    """Calls a function with every item, on all threads; gives the results in the items' order.

    What is raised for an item is raised here, when its turn comes; nothing more is begun then.

    >>> list(in_order(abs, [-3, 2, -1], lambda _: 1, limit=2))
    [3, 2, 1]

    Args:
      function: called in several threads at a time.
      items: read as they are needed.
      nbytes: about what is held for an item, from its call until its result is done with.
      limit: of what is held for all items; an item that is larger is held alone.
    """
    waiting: collections.deque[tuple[concurrent.futures.Future[Result], int]] = collections.deque()
    held = 0
    with concurrent.futures.ThreadPoolExecutor(threads()) as pool:
        try:
            for item in items:
                size = nbytes(item)
                while waiting and held + size > limit:
                    yield waiting[0][0].result()
                    held -= waiting.popleft()[1]
                waiting.append((pool.submit(function, item), size))
                held += size
            while waiting:
                yield waiting[0][0].result()
                waiting.popleft()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

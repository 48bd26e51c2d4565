"""Which short examples share a row; planned from their lengths alone, so that any row can be found.

Axis legend: N examples, R sequences of a row (`FeatureConverter.row_capacity`).
"""

import bisect
import threading
from collections.abc import Callable, Sequence

import numpy as np

WINDOW = 4096
"""Examples that are packed among themselves: a row never holds examples of two windows, so windows
can be planned one by one.
"""


def row_starts(lengths: np.ndarray, capacity: Sequence[int]) -> np.ndarray:
    """Fills rows in order, each with as many of the next examples as fit.

    Args:
      lengths: int `[N, R]` tokens that each example takes of each sequence of a row.
      capacity: tokens of each sequence; an example that is longer counts as a whole row.

    Returns:
      int64: the first example of each row, and N.

    >>> row_starts(np.array([[3], [2], [4], [1]]), [6])  # rows of 3 + 2, 4 + 1 tokens
    array([0, 2, 4])
    """
    fitted = np.minimum(lengths, np.asarray(capacity))
    # [N + 1, R]: tokens before each example, and all of them.
    ends = np.concatenate([np.zeros((1, fitted.shape[1]), np.int64), np.cumsum(fitted, axis=0)])
    # [N]: from each example as a row's first, the first that does not fit any more. Every sequence
    # of a row has to have room, so that the fullest decides.
    following = np.min(
        [
            np.searchsorted(ends[:, column], ends[:-1, column] + room, side="right") - 1
            for column, room in enumerate(capacity)
        ],
        axis=0,
    )
    # A chain through `following`; an example that no row has room for still makes one.
    starts = [0]
    while starts[-1] < len(lengths):
        starts.append(max(int(following[starts[-1]]), starts[-1] + 1))
    return np.array(starts, np.int64)


class PackingPlan:
    """Which examples of an endless stream each row holds.

        examples   0 ....... 4095 | 4096 ....... 8191 | ...      windows of `WINDOW` examples
        rows       0 ....... 1310 | 1311 ....... 2604 | ...      as many as each window fills

    A row is found by the first row of its window, so windows before it are planned once, from
    lengths, and only their numbers of rows are kept; the plans of a few windows are.

    Args:
      lengths: gives tokens `[count, R]` of examples `first, first + 1, ...` of the stream.
      capacity: tokens of each sequence of a row.
    """

    def __init__(self, lengths: Callable[[int, int], np.ndarray], capacity: Sequence[int]):
        self._lengths, self._capacity = lengths, tuple(capacity)
        self._lock = threading.Lock()
        self._first_window = 0
        # The first row of each window from `_first_window` on, and the row after the last known
        # one.
        self._first_rows = [0]
        self._known: dict[int, np.ndarray] = {}

    def _starts(self, window: int) -> np.ndarray:
        if window not in self._known:
            while len(self._known) >= 8:  # reading goes forwards: the earliest is done with
                del self._known[min(self._known)]
            self._known[window] = row_starts(self._lengths(window * WINDOW, WINDOW), self._capacity)
        return self._known[window]

    def _find(self, row: int) -> int:
        """The window of a row."""
        if row < self._first_rows[0]:
            self._first_window, self._first_rows = 0, [0]
        while row >= self._first_rows[-1]:
            window = self._first_window + len(self._first_rows) - 1
            self._first_rows.append(self._first_rows[-1] + len(self._starts(window)) - 1)
        return self._first_window + bisect.bisect_right(self._first_rows, row) - 1

    def row(self, row: int) -> range:
        """Numbers of the examples of a row."""
        with self._lock:
            window = self._find(row)
            starts = self._starts(window)
            number = row - self._first_rows[window - self._first_window]
            return range(
                window * WINDOW + int(starts[number]), window * WINDOW + int(starts[number + 1])
            )

    def anchor(self, row: int) -> dict[str, int]:
        """What finds the row again at once: its window, and that window's first row."""
        with self._lock:
            window = self._find(row)
            return {"window": window, "first_row": self._first_rows[window - self._first_window]}

    def start_from(self, anchor: dict[str, int]) -> None:
        """Makes rows from `anchor` on available without counting those before."""
        with self._lock:
            self._first_window, self._first_rows = anchor["window"], [anchor["first_row"]]

"""Token sequences as rows of a batch: padded, packed, shifted for teacher forcing. What converters
of text models share.

Axis legend: B rows, L tokens of a row.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def padded(rows: Sequence[Any], count: int, length: int) -> np.ndarray:
    """Int32 `[count, length]`: one sequence a row, zeros after it; longer ones are cut, missing
    rows are zeros.
    """
    out = np.zeros((count, length), np.int32)
    for number, row in enumerate(rows):
        tokens = np.asarray(row, np.int32)[:length]
        out[number, : len(tokens)] = tokens
    return out


def packed(
    rows: Sequence[Sequence[np.ndarray]], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Several sequences a row, one after another.

    Returns:
      Tokens, segment ids counted from 1, and positions counted from 0 in each sequence, all int32
      `[B, length]`.
    """
    tokens, segments, positions = (np.zeros((len(rows), length), np.int32) for _ in range(3))
    for row, parts in enumerate(rows):
        start = 0
        for number, part in enumerate(parts, start=1):
            here = slice(start, start + len(part))
            tokens[row, here], segments[row, here] = part, number
            positions[row, here] = np.arange(len(part))
            start = here.stop
    return tokens, segments, positions


def shifted(targets: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
    """What a decoder reads to predict `targets` `[B, L]`: the token before each, and 0 (BOS) first;
    of packed rows, whose `positions` are given, 0 at the beginning of each sequence.
    """
    before = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    return before if positions is None else np.where(positions > 0, before, 0)


def loss_weights(targets: np.ndarray) -> np.ndarray:
    """Int32 `[B, L]`: 1 for tokens, 0 for padding."""
    return (targets > 0).astype(np.int32)

"""Random numbers as a function of what they are for: (seed, counters) -> 64 bits. No state, no
TensorFlow.

Every draw of a cached stream is such a function of the seed and of the example's number, so any
example can be made again by itself, on any process and in any order, and does not change with the
version of a random generator.
"""

import zlib
from typing import Any

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every input bit changes half of the
    output bits.
    """
    values = (values ^ (values >> np.uint64(30))) * _FACTORS[0]
    values = (values ^ (values >> np.uint64(27))) * _FACTORS[1]
    return values ^ (values >> np.uint64(31))


def bits(seed: int | np.ndarray, *counters: Any) -> np.ndarray:
    """Uint64 draws, one for each combination of the counters, which broadcast against each other.

    Args:
      seed: an integer, or the result of another call.
      *counters: integers or integer arrays, none negative.
    """
    with np.errstate(over="ignore"):  # arithmetic is modulo 2^64 on purpose
        state = _mix(np.asarray(seed).astype(np.uint64) + _GOLDEN)
        for counter in counters:
            state = _mix((state ^ (np.asarray(counter).astype(np.uint64) * _GOLDEN)) + _GOLDEN)
    return state


def name_number(name: str) -> int:
    """A counter that stands for a name."""
    return zlib.crc32(name.encode())

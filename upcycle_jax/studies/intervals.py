"""Means with confidence intervals over few runs: Student's t, paired where runs saw the same data
in the same order.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import scipy.special

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and the half width of its confidence interval.

    Attributes:
      mean: of the values; NaN where there are none.
      half_width: infinite for a single value, about whose spread nothing is known.
      count: number of values.
      confidence: the interval's, e.g. 0.95.
    """

    mean: float
    half_width: float
    count: int
    confidence: float = CONFIDENCE

    @property
    def low(self) -> float:
        """The lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """The upper end."""
        return self.mean + self.half_width

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside: only then may a difference be called one."""
        return self.count > 1 and (self.low > 0 or self.high < 0)

    def text(self, digits: int = 4, *, signed: bool = False) -> str:
        """`1.2345 ± 0.0678`; a single value says that it has no interval.

        >>> Interval(1.0, 0.5, 3).text(2)
        '1.00 ± 0.50'
        """
        if math.isnan(self.mean):
            return "-"
        mean = f"{self.mean:{'+' if signed else ''}.{digits}f}"
        return (
            f"{mean} ± {self.half_width:.{digits}f}"
            if math.isfinite(self.half_width)
            else f"{mean} (one seed)"
        )


def mean_interval(values: Iterable[float], *, confidence: float = CONFIDENCE) -> Interval:
    """The mean of independent values with its confidence interval, t_{n-1} s / sqrt(n).

    Raises:
      ValueError: the confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: give a number between 0 and 1, e.g. 0.95")
    numbers = [float(value) for value in values]
    count = len(numbers)
    if not count:
        return Interval(math.nan, math.nan, 0, confidence)
    mean = math.fsum(numbers) / count
    if count == 1:
        return Interval(mean, math.inf, 1, confidence)
    variance = math.fsum((number - mean) ** 2 for number in numbers) / (count - 1)
    return Interval(
        mean,
        float(scipy.special.stdtrit(count - 1, 0.5 + confidence / 2)) * math.sqrt(variance / count),
        count,
        confidence,
    )


def paired_difference(
    left: Mapping[Any, float], right: Mapping[Any, float], *, confidence: float = CONFIDENCE
) -> Interval:
    """The mean of left - right over the keys that both have, e.g. seeds: runs of one seed see the
    same batches.

    What the data order does to both runs of a pair cancels, so that the interval is of the
    difference alone.
    """
    return mean_interval(
        [left[key] - right[key] for key in left if key in right], confidence=confidence
    )

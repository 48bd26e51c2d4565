"""Means over seeds with confidence intervals, as the comparisons with the paper use them."""

import dataclasses
import math
from collections.abc import Sequence

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Two-sided 95 % quantiles of Student's t with 1, 2, ... degrees of freedom."""
NORMAL_975 = 1.960


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean.

    Attributes:
      mean: of the values.
      half_width: of the 95 % confidence interval, or None for a single value: one seed shows no spread.
      count: how many values.
    """

    mean: float
    half_width: float | None
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % confidence interval (Student's t) of values of different seeds.

    Raises:
      ValueError: there are no values.
    """
    count = len(values)
    if not count:
        raise ValueError("there are no values to average")
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = T_975[count - 2] if count - 2 < len(T_975) else NORMAL_975
    return Estimate(mean, quantile * deviation / math.sqrt(count), count)

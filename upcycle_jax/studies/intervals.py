"""Means with confidence intervals over few runs: Student's t, paired where runs saw the same data
in the same order.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

CONFIDENCE = 0.95
_MANY_STEPS = 300


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
        t_quantile(0.5 + confidence / 2, count - 1) * math.sqrt(variance / count),
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


def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t distribution, by bisection of its distribution function.

    Raises:
      ValueError: the probability is not inside (0, 1), or there is no degree of freedom.
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability is {probability}: give a number between 0 and 1")
    if degrees < 1:
        raise ValueError(f"degrees is {degrees}: a spread needs at least two values")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while t_distribution(high, degrees) < probability:
        low, high = high, 2 * high
    for _ in range(_MANY_STEPS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (
            (middle, high) if t_distribution(middle, degrees) < probability else (low, middle)
        )
    return high


def t_distribution(value: float, degrees: int) -> float:
    """P(T <= value) of Student's t: 1 - I_x(degrees / 2, 1/2) / 2 with x = degrees / (degrees +
    value^2), for value >= 0.
    """
    if value < 0:
        return 1 - t_distribution(-value, degrees)
    return 1 - incomplete_beta(degrees / 2, 0.5, degrees / (degrees + value * value)) / 2


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (modified
    Lentz), for 0 <= x <= 1.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # there the fraction converges slowly; the mirror image does not
        return 1 - incomplete_beta(b, a, 1 - x)
    front = (
        math.exp(
            math.lgamma(a + b)
            - math.lgamma(a)
            - math.lgamma(b)
            + a * math.log(x)
            + b * math.log1p(-x)
        )
        / a
    )
    tiny = 1e-300
    d = 1 / _away_from_zero(1 - (a + b) * x / (a + 1), tiny)
    c, result = 1.0, d
    for m in range(1, _MANY_STEPS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _away_from_zero(1 + term * d, tiny)
            c = _away_from_zero(1 + term / c, tiny)
            result *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * result


def _away_from_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny

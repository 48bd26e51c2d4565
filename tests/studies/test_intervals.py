"""Student's t against printed tables, and intervals worked out by hand."""

import math

import pytest

from upcycle_jax.studies.intervals import Interval, mean_interval, paired_difference

# Two-sided 90, 95 and 99 %, as printed in tables of Student's t.
TABLE = [
    (0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 3, 3.182), (0.95, 4, 2.776), (0.95, 9, 2.262),
    (0.95, 30, 2.042), (0.95, 120, 1.980),
    (0.99, 1, 63.657), (0.99, 2, 9.925), (0.99, 5, 4.032), (0.9, 10, 1.812), (0.8, 1, 3.078),
]  # fmt: skip


def half_width(confidence, degrees):
    """The quantile, as the interval of values whose standard error is 1 shows it."""
    count = degrees + 1
    half = math.sqrt(count * degrees / 2)  # of two values off the mean, s^2 = 2 half^2 / degrees
    values = [half, -half, *[0.0] * (count - 2)]
    return mean_interval(values, confidence=confidence).half_width


@pytest.mark.parametrize(("confidence", "degrees", "printed"), TABLE)
def test_quantiles_are_those_of_the_tables(confidence, degrees, printed):
    assert half_width(confidence, degrees) == pytest.approx(printed, abs=6e-4)


@pytest.mark.parametrize("p", [0.6, 0.9, 0.975, 0.999])
def test_closed_forms(p):
    """One degree: Cauchy, tan(pi (p - 1/2)). Two degrees: (2p - 1) sqrt(2 / (1 - (2p - 1)^2))."""
    a = 2 * p - 1
    assert half_width(a, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9)
    assert half_width(a, 2) == pytest.approx(a * math.sqrt(2 / (1 - a * a)), rel=1e-9)


def test_the_interval_of_two_values():
    """Mean 2, s = sqrt(2), s / sqrt(2) = 1, t = 12.706: the interval is wide, and says so."""
    interval = mean_interval([1.0, 3.0])
    assert interval.mean == 2.0 and interval.half_width == pytest.approx(12.706, abs=1e-3)
    assert not interval.excludes_zero and interval.text(2) == "2.00 ± 12.71"


def test_one_value_has_no_interval_and_proves_nothing():
    interval = mean_interval([5.0])
    assert (
        interval.half_width == math.inf
        and not interval.excludes_zero
        and interval.text(1) == "5.0 (one seed)"
    )
    assert mean_interval([]).text() == "-"


def test_pairs_cancel_what_both_share():
    """Seeds differ by 10, the difference does not: 0.5 and 0.7, mean 0.6, s / sqrt(2) = 0.1, half
    width 1.2706.
    """
    left, right = {0: 1.5, 1: 11.7, 2: 99.0}, {0: 1.0, 1: 11.0, 3: 0.0}
    interval = paired_difference(left, right)
    assert (interval.count, interval.mean) == (
        2,
        pytest.approx(0.6),
    ) and interval.half_width == pytest.approx(1.2706, abs=1e-4)
    assert paired_difference(
        {i: 1.0 + i for i in range(3)}, {i: float(i) for i in range(3)}
    ).excludes_zero


def test_coverage_is_what_it_says():
    """Of 2000 intervals from 3 normal values, about 95 % hold the mean: 1900 +- 4 * sqrt(2000 *
    0.95 * 0.05) = +-39.
    """
    import numpy as np

    samples = np.random.default_rng(0).normal(7.0, 2.0, (2000, 3))
    held = sum(interval.low <= 7.0 <= interval.high for interval in map(mean_interval, samples))
    assert abs(held - 1900) <= 39


def test_a_confidence_is_no_percentage():
    with pytest.raises(ValueError, match="confidence is 95"):
        mean_interval([1.0, 2.0], confidence=95)


def test_signs():
    assert (
        Interval(0.25, 0.1, 3).text(2, signed=True) == "+0.25 ± 0.10"
        and Interval(-1.0, 0.5, 3).excludes_zero
    )

"""Is a region of a leaf what the plan says: copies the source's bits, draws with the mean and
deviation that the recipe promises, and the same when drawn again?
"""

import dataclasses
import math

import numpy as np

from upcycle_jax.checkpoints.checksums import nonfinite_count
from upcycle_jax.surgery.leaf_values import RowValues
from upcycle_jax.surgery.operations import Expectation, Region
from upcycle_jax.surgery.parents import Reader
from upcycle_jax.surgery.plan import Row

SIGMAS = 6.0
"""Standard errors that a sample mean or deviation may be off: about one false alarm in 10^9
samples.
"""
DRAW_ULPS = 4
"""Units in the last place that a drawn value may differ: the normal transform is not the same to
the bit on every backend.
"""


@dataclasses.dataclass
class LeafVerdict:
    """What was found about one leaf.

    Attributes:
      path: the target leaf.
      operation: what the plan says was done.
      elements: number of values.
      identical: values verified equal to their source bit for bit.
      shared: those of them (or of `by_checksum`) that were not read again, since their stored bytes
        are the source's own, or those of another expert that was read.
      by_checksum: values verified by the checksums that were recorded at the conversion, the source
        being gone.
      drawn: values that are new, or changed by a draw.
      regenerated: drawn values that came out the same to the bit when drawn again.
      max_ulps: largest difference of a drawn value to its second drawing, in units in the last
        place.
      mean: mean of the drawn values (of what was added to the source, where something was added),
        None where nothing was drawn.
      std: their standard deviation.
      checksum: of the leaf, where it is not a plain copy of a source leaf.
      blame: which side is not as it was at the conversion, where the leaf is wrong and the record
        tells: 'source', 'result' or 'both'.
      readable: the leaf has the planned shape, and it and its sources can be read.
      problems: why the leaf is wrong; empty: it is right.
    """

    path: str
    operation: str
    elements: int
    identical: int = 0
    shared: int = 0
    by_checksum: int = 0
    drawn: int = 0
    regenerated: int = 0
    max_ulps: int = 0
    mean: float | None = None
    std: float | None = None
    checksum: str | None = None
    blame: str = ""
    readable: bool = True
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems


class Moments:
    """Mean and deviation of values that come in parts."""

    def __init__(self):
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, values: np.ndarray) -> None:
        """Adds values; their shape does not matter."""
        values = np.asarray(values, np.float64)
        self.count += values.size
        self.total += float(values.sum())
        self.squares += float(np.square(values).sum())

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def std(self) -> float:
        return math.sqrt(max(0.0, self.squares / self.count - self.mean**2))


def check_region(
    row: Row,
    values: RowValues,
    region: Region,
    actual: np.ndarray,
    verdict: LeafVerdict | None,
    moments: Moments,
) -> str:
    """Checks one region; returns what is wrong, or ''.

    Args:
      row: of the plan.
      values: of the row.
      region: explicit bounds for every axis; of one expert where stacked.
      actual: its values in the result.
      verdict: whose counts of values grow; None where the caller counts.
      moments: of the drawn values of the leaf.
    """
    verdict = verdict if verdict is not None else LeafVerdict(row.target, row.what, 0)
    nonfinite = nonfinite_count(actual)
    if nonfinite:
        return f"{nonfinite} values are not finite"
    expected = values.expectation(region)
    inner = actual[0] if row.operation.stacked else actual
    if expected is not None:
        problem = _check_expectation(row, expected, inner, verdict, moments)
        if problem:
            return problem
        if expected.kept is True:
            return ""
    again = values.region(region)
    same = bits_of(again) == bits_of(actual)
    drawn = (
        ~np.broadcast_to(expected.kept, inner.shape)
        if expected is not None
        else np.ones(inner.shape, bool)
    )
    drawn = drawn.reshape(actual.shape)
    verdict.drawn += int(drawn.sum())
    verdict.regenerated += int((same & drawn).sum())
    if same.all():
        return ""
    ulps = ulps_between(again[~same], actual[~same])
    verdict.max_ulps = max(verdict.max_ulps, ulps)
    if ulps > DRAW_ULPS:
        return (
            f"{int((~same).sum())} of {same.size} values are not those that seed {values.seed}"
            " gives"
        )
    return ""


def _check_expectation(
    row: Row, expected: Expectation, actual: np.ndarray, verdict: LeafVerdict, moments: Moments
) -> str:
    """Compares a region with what is expected without the generator; see `check_region`."""
    wanted = expected.values
    if (
        expected.kept is True
        and wanted is not None
        and (wanted.dtype, wanted.shape) == (row.spec.dtype, actual.shape)
        and np.array_equal(bits_of(wanted), bits_of(actual))
    ):
        verdict.identical += actual.size
        return ""
    kept = np.broadcast_to(np.asarray(expected.kept), actual.shape)
    reference = np.broadcast_to(
        np.asarray(0.0 if expected.values is None else expected.values), actual.shape
    )
    if kept.any():
        wanted = (
            reference.astype(row.spec.dtype) if reference.dtype != row.spec.dtype else reference
        )
        differing = kept & (bits_of(wanted) != bits_of(actual))
        if (
            not row.moves_bits
        ):  # Arithmetic on the way: the device may flush denormal values to zero.
            differing &= (
                np.abs(actual.astype(np.float64) - wanted.astype(np.float64))
                > np.finfo(np.float32).tiny
            )
        if differing.any():
            first = tuple(int(i) for i in np.argwhere(differing)[0])
            shown = f"first at {list(first)}: {actual[first]} is not {wanted[first]}"
            return (
                f"{int(differing.sum())} of {int(kept.sum())} values that must be copies differ,"
                f" {shown}"
            )
        verdict.identical += int(kept.sum())
    if kept.all():
        return ""
    rest = actual[~kept].astype(np.float64)
    if expected.additive:
        rest = rest - reference[~kept].astype(np.float64)
    if expected.additive and expected.std == 0:
        scale = np.abs(reference[~kept]).max(initial=0) + 1e-30
        worst = float(np.abs(rest).max(initial=0) / scale)
        limit = 1e-2 if row.spec.dtype.itemsize < 4 else 1e-5
        return (
            f"differs from {expected.described} by {worst:.2g} of their size"
            if worst > limit
            else ""
        )
    moments.add(rest)
    # Rounding of narrow types widens the deviation a little.
    slack = expected.std * (1e-2 if row.spec.dtype.itemsize < 4 else 1e-4) + 1e-12
    if expected.additive:
        slack += float(np.abs(reference).max(initial=0)) * float(
            np.finfo(np.float32).eps if row.spec.dtype.itemsize >= 4 else 2**-8
        )
    mean, std = float(rest.mean()), float(rest.std())
    if abs(mean - expected.mean) > SIGMAS * expected.std / math.sqrt(rest.size) + slack:
        return (
            f"the drawn values have mean {mean:.4g}, expected {expected.mean:.4g} of {rest.size}"
            " values"
        )
    if (
        rest.size > 1
        and abs(std - expected.std)
        > SIGMAS * expected.std / math.sqrt(max(1, 2 * (rest.size - 1))) + slack
    ):
        return (
            f"the drawn values have standard deviation {std:.4g}, expected {expected.std:.4g} of"
            f" {rest.size} values"
        )
    return ""


def bits_of(array: np.ndarray) -> np.ndarray:
    """An array's bits as unsigned integers, so that equality is of bytes (and -0 is not 0)."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def ulps_between(a: np.ndarray, b: np.ndarray) -> int:
    """The largest distance between values of one dtype, counted in representable numbers."""
    signed = np.dtype(f"i{a.dtype.itemsize}")
    ordered = []
    for array in (a, b):
        bits = bits_of(array).view(signed).astype(np.int64)
        ordered.append(np.where(bits < 0, np.int64(np.iinfo(signed).min) - bits, bits))
    return int(np.abs(ordered[0] - ordered[1]).max(initial=0))


def twin_of(actual: np.ndarray, row: Row, region: Region, source: Reader) -> str:
    """Another source leaf that has exactly these bits: the mark of a swap."""
    inner = actual[0] if row.operation.stacked else actual
    if inner.size < 2 or not np.any(inner):
        return ""
    part = region[1:] if row.operation.stacked else region
    if row.operation.picks_experts:
        part = row.operation.source_region(part, 0, region[0].start)
    for name, spec in source.specs().items():
        if name in row.sources or spec.dtype != row.spec.dtype or len(spec.shape) != len(part):
            continue
        if all(s.stop <= n for s, n in zip(part, spec.shape, strict=True)) and np.array_equal(
            bits_of(source.read(name, part)).reshape(inner.shape), bits_of(inner)
        ):
            return name
    return ""

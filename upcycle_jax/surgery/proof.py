"""Re-checks a conversion from the two checkpoints on disk, leaf by leaf, against the plan.

Three questions per leaf: are the parts that must be copies the source's bits; do the parts that
were drawn have the mean and deviation that the recipe promises; and does drawing them again give
the same values. And one for the tree: is every leaf of the plan there, and nothing else.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from upcycle_jax import trees
from upcycle_jax.surgery.operations import Expectation, Region
from upcycle_jax.surgery.recipe_json import to_json
from upcycle_jax.surgery.sources import Reader
from upcycle_jax.surgery.table import Plan, Row, size
from upcycle_jax.surgery.values import RowValues, regions_of

FILE_NAME = "proof.json"
REGION_BYTES = 64 << 20
SIGMAS = 6.0
"""Sample means and deviations may lie so many standard errors off: about one false alarm in 10^9
samples.
"""
DRAW_ULPS = 4
"""Drawn values may differ by so many units in the last place: the normal transform is not the same
to the bit on every backend.
"""


@dataclasses.dataclass
class LeafVerdict:
    """What was found about one leaf.

    Attributes:
      path: the target leaf.
      operation: what the plan says was done.
      elements: number of values.
      identical: values verified equal to their source bit for bit.
      drawn: values that are new, or changed by a draw.
      regenerated: drawn values that came out the same to the bit when drawn again.
      max_ulps: largest difference of a drawn value to its second drawing, in units in the last
        place.
      mean: mean of the drawn values (of what was added to the source, where something was added),
        None where nothing was drawn.
      std: their standard deviation.
      problems: why the leaf is wrong; empty: it is right.
    """

    path: str
    operation: str
    elements: int
    identical: int = 0
    drawn: int = 0
    regenerated: int = 0
    max_ulps: int = 0
    mean: float | None = None
    std: float | None = None
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems


@dataclasses.dataclass
class Proof:
    """The verdict on a conversion.

    Attributes:
      leaves: one verdict per leaf of the plan.
      missing: leaves of the plan that the result lacks.
      unexplained: leaves of the result that the plan does not know.
      dropped: source leaves that were not used, with the reason.
      context: recipe, paths, fingerprints.
      function: what the function check found (`function_check.FunctionCheck.json`), once it ran.
    """

    leaves: list[LeafVerdict]
    missing: list[str]
    unexplained: list[str]
    dropped: dict[str, str]
    context: dict[str, Any]
    function: dict[str, Any] | None = None

    @property
    def ok(self) -> bool:
        """Every leaf is right, none lacks, none is too many, and the function check, if it ran,
        held.
        """
        return self.leaves_ok and (self.function is None or bool(self.function.get("ok", False)))

    @property
    def leaves_ok(self) -> bool:
        """The same without the function check."""
        return not self.missing and not self.unexplained and all(leaf.ok for leaf in self.leaves)

    def text(self) -> str:
        """A summary for people; wrong leaves in full."""
        identical, drawn = (
            sum(leaf.identical for leaf in self.leaves),
            sum(leaf.drawn for leaf in self.leaves),
        )
        pure = sum(leaf.ok and leaf.identical == leaf.elements for leaf in self.leaves)
        counts = len(self.missing), len(self.unexplained), len(self.dropped)
        lines = [
            f"proof: {'PASSED' if self.ok else 'FAILED'}",
            (
                f"  {sum(leaf.ok for leaf in self.leaves)} of {len(self.leaves)} leaves right;"
                f" {pure} of them bit-identical throughout"
            ),
            (
                f"  {identical} values equal their source (or the zeros planned) bit for bit,"
                f" {drawn} values are drawn anew"
            ),
            "  {} leaves unwritten, {} unexplained; {} source leaves dropped by name".format(
                *counts
            ),
        ]
        for leaf in self.leaves:
            if leaf.ok and leaf.std is not None:
                lines.append(
                    f"  {leaf.path}: {leaf.operation}: drawn values have mean {leaf.mean:.3g},"
                    f" standard deviation {leaf.std:.3g}"
                )
        lines = lines[:24] + (
            [f"  ... and {len(lines) - 24} more drawn leaves"] if len(lines) > 24 else []
        )
        lines += [f"  - {path}: not in the result" for path in self.missing]
        lines += [f"  + {path}: in the result, not in the plan" for path in self.unexplained]
        lines += [
            f"  ! {leaf.path} ({leaf.operation}): {problem}"
            for leaf in self.leaves
            for problem in leaf.problems
        ]
        if self.function is not None:
            lines += [f"  {line}" for line in self.function.get("text", "").splitlines()]
        return "\n".join(lines)

    def json(self) -> dict[str, Any]:
        """Everything, as plain JSON."""
        return {
            "ok": self.ok,
            "leaves_ok": self.leaves_ok,
            **self.context,
            "missing": self.missing,
            "unexplained": self.unexplained,
            "dropped": self.dropped,
            "leaves": [{**dataclasses.asdict(leaf), "ok": leaf.ok} for leaf in self.leaves],
            "function": self.function,
        }

    def write(self, directory: os.PathLike | str) -> Path:
        """Writes `proof.json` into a folder, in one step."""
        path = Path(directory) / FILE_NAME
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.json(), indent=1) + "\n")
        scratch.rename(path)
        return path


def prove(
    plan: Plan, source: Reader, target: Reader, *, progress: Callable[[str], None] | None = None
) -> Proof:
    """Checks a result against the plan and the source.

    Args:
      plan: what should have been done.
      source: reader of the source checkpoint.
      target: reader of the result.
      progress: called with a line of text now and then.
    """
    specs = target.specs()
    difference = trees.diff(plan.specs(), specs)
    leaves = []
    for number, row in enumerate(plan.rows):
        if row.target in specs:
            leaves.append(_check_leaf(row, source, target, specs[row.target], plan))
        if progress is not None and number % 100 == 99:
            progress(f"proved {number + 1} of {len(plan.rows)} leaves")
    context = {
        "recipe": to_json(plan.recipe),
        "source": {
            "path": str(getattr(source, "path", "")),
            "step": source.step,
            "fingerprint": source.fingerprint(),
        },
        "result": {"path": str(getattr(target, "path", "")), "step": target.step},
        "bytes": size(plan.bytes_written),
    }
    dropped = {item.source: item.reason for item in plan.dropped}
    return Proof(leaves, list(difference.missing), list(difference.unexpected), dropped, context)


def _check_leaf(
    row: Row, source: Reader, target: Reader, found: trees.LeafSpec, plan: Plan
) -> LeafVerdict:
    verdict = LeafVerdict(row.target, row.what, row.spec.size)
    if (found.shape, found.dtype) != (row.spec.shape, row.spec.dtype):
        verdict.problems.append(f"is {found}, planned {row.spec}")
        return verdict
    values = RowValues(row, source, plan.recipe.seed)
    moments = _Moments()
    for region in regions_of(row, REGION_BYTES):
        try:
            actual = target.read(row.target, region if region else None)
        except (ValueError, KeyError, OSError) as error:
            verdict.problems.append(f"cannot be read: {error}")
            return verdict
        problem = _check_region(row, values, region, actual, verdict, moments)
        if problem:
            where = f"expert {region[0].start}: " if row.operation.stacked else ""
            twin = _twin(actual, row, region, source)
            verdict.problems.append(
                where + problem + (f"; these are the bits of source leaf {twin}" if twin else "")
            )
            if len(verdict.problems) >= 4:
                verdict.problems.append("further regions were not looked at")
                break
    if moments.count:
        verdict.mean, verdict.std = moments.mean, moments.std
    return verdict


class _Moments:
    """Mean and deviation of values that come in parts."""

    def __init__(self):
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, values: np.ndarray) -> None:
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


def _check_region(
    row: Row,
    values: RowValues,
    region: Region,
    actual: np.ndarray,
    verdict: LeafVerdict,
    moments: _Moments,
) -> str:
    """Checks one region; returns what is wrong, or ''."""
    if row.spec.dtype.kind not in "iub" and not np.isfinite(actual.astype(np.float32)).all():
        return f"{int((~np.isfinite(actual.astype(np.float32))).sum())} values are not finite"
    expected = values.expectation(region)
    inner = actual[0] if row.operation.stacked else actual
    if expected is not None:
        problem = _check_expectation(row, expected, inner, verdict, moments)
        if problem:
            return problem
        if expected.kept is True:
            return ""
    again = values.region(region)
    same = _bits(again) == _bits(actual)
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
    ulps = _ulps(again[~same], actual[~same])
    verdict.max_ulps = max(verdict.max_ulps, ulps)
    if ulps > DRAW_ULPS:
        return (
            f"{int((~same).sum())} of {same.size} values are not those that seed {values.seed}"
            " gives"
        )
    return ""


def _check_expectation(
    row: Row, expected: Expectation, actual: np.ndarray, verdict: LeafVerdict, moments: _Moments
) -> str:
    kept = np.broadcast_to(np.asarray(expected.kept), actual.shape)
    reference = np.broadcast_to(
        np.asarray(0.0 if expected.values is None else expected.values), actual.shape
    )
    if kept.any():
        wanted = (
            reference.astype(row.spec.dtype) if reference.dtype != row.spec.dtype else reference
        )
        differing = kept & (_bits(wanted) != _bits(actual))
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
            f"differs from the mean of its sources by {worst:.2g} of their size"
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


def _bits(array: np.ndarray) -> np.ndarray:
    """An array's bits as unsigned integers, so that equality is of bytes (and -0 is not 0)."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def _ulps(a: np.ndarray, b: np.ndarray) -> int:
    """The largest distance between values of one dtype, counted in representable numbers."""
    signed = np.dtype(f"i{a.dtype.itemsize}")
    ordered = []
    for array in (a, b):
        bits = _bits(array).view(signed).astype(np.int64)
        ordered.append(np.where(bits < 0, np.int64(np.iinfo(signed).min) - bits, bits))
    return int(np.abs(ordered[0] - ordered[1]).max(initial=0))


def _twin(actual: np.ndarray, row: Row, region: Region, source: Reader) -> str:
    """Another source leaf that has exactly these bits: the mark of a swap."""
    inner = actual[0] if row.operation.stacked else actual
    if inner.size < 2 or not np.any(inner):
        return ""
    part = region[1:] if row.operation.stacked else region
    for name, spec in source.specs().items():
        if name in row.sources or spec.dtype != row.spec.dtype or len(spec.shape) != inner.ndim:
            continue
        if all(s.stop <= n for s, n in zip(part, spec.shape, strict=True)) and np.array_equal(
            _bits(source.read(name, part)), _bits(inner)
        ):
            return name
    return ""

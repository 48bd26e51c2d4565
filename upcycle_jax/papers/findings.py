"""What the paper claims, and what this project's stored studies say to it: every claim with the
paper's number and its kind, ours with its interval, and a verdict that a rule decides.

Claims are in `data/findings.csv`, the comparisons that test them in `data/findings_comparisons.csv`
(a claim may need several), the studies with their commands in `data/findings_studies.csv`.
"""

import csv
import dataclasses
import enum
import functools
import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from upcycle_jax.studies.intervals import Interval, paired_difference
from upcycle_jax.studies.study_page import LOSS
from upcycle_jax.studies.study_results import Group, Study, at_flops, at_steps

KINDS = ("printed", "read off", "by eye", "notes", "inferred", "not known")
"""How a number of the paper is known; 'notes': it stands in others' notes on the paper."""


class Verdict(enum.StrEnum):
    """What a study says to a claim."""

    AGREE = "agree"
    DIFFER = "differ"
    CANNOT_TELL = "cannot tell"
    NOT_RUN = "not run"


class Expect(enum.StrEnum):
    """What a claim says of left minus right, a difference of losses."""

    LOWER = "lower"
    HIGHER = "higher"
    EQUAL = "equal"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two groups of runs of a study, whose losses a claim compares.

    Attributes:
      name: of the claim.
      study: of `data/findings_studies.csv`.
      left: stage, and labels of its axes: 'upcycled NUM_EXPERTS=8'.
      right: likewise.
      at: 'start' (before the first update), 'steps' (after the extra steps that all runs have) or
        'compute' (after the extra FLOPs that all have).
      expect: of left minus right.
      margin: nats within which losses count as equal; 0 but for `Expect.EQUAL`.
    """

    name: str
    study: str
    left: str
    right: str
    at: str
    expect: Expect
    margin: float


@dataclasses.dataclass(frozen=True)
class StudyRow:
    """A study that a comparison needs.

    Attributes:
      study: its name and folder.
      hours: of two idle cores, estimated from step times.
      command: what runs it.
    """

    study: str
    hours: float
    command: str


@dataclasses.dataclass(frozen=True)
class Claim:
    """Something that the paper, or one that follows it, found.

    Attributes:
      name: unique.
      claim: in words.
      paper: its number, in words.
      kind: one of `KINDS`.
      where: table or figure, or ''.
      contrary: evidence of the literature against it or on its limits, or ''.
      comparisons: what tests it here; none where nothing does.
    """

    name: str
    claim: str
    paper: str
    kind: str
    where: str
    contrary: str
    comparisons: tuple[Comparison, ...]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A comparison with what the stored study has.

    Attributes:
      comparison: what was compared.
      difference: loss of left minus right, paired by seed; None where it is not stored.
      steps: extra steps at which it was taken; 0 at the start.
      finished: whether every run of the study has finished.
      verdict: by `verdict_of`.
    """

    comparison: Comparison
    difference: Interval | None
    steps: int
    finished: bool
    verdict: Verdict


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim and what came out here.

    Attributes:
      claim: of the paper.
      measured: one per comparison.
      verdict: by `combined`.
    """

    claim: Claim
    measured: tuple[Measured, ...]
    verdict: Verdict


def verdict_of(difference: Interval | None, expect: Expect, margin: float = 0.0) -> Verdict:
    """What an interval says to an expectation. A claim of a difference agrees where the interval
    lies wholly on its side of 0, and differs where it lies wholly on the other. A claim of equality
    agrees where the interval lies within the margin, and differs where it lies outside. One seed
    has no interval and decides nothing.

    >>> str(verdict_of(Interval(-0.03, 0.01, 3), Expect.LOWER))
    'agree'
    """
    if difference is None:
        return Verdict.NOT_RUN
    if difference.count < 2:
        return Verdict.CANNOT_TELL
    low, high = difference.low, difference.high
    if expect == Expect.EQUAL:
        if -margin <= low and high <= margin:
            return Verdict.AGREE
        return Verdict.DIFFER if low > margin or high < -margin else Verdict.CANNOT_TELL
    if expect == Expect.HIGHER:
        low, high = -high, -low
    if high < 0:
        return Verdict.AGREE
    return Verdict.DIFFER if low > 0 else Verdict.CANNOT_TELL


def combined(verdicts: Iterable[Verdict]) -> Verdict:
    """Of a claim that needs several comparisons: it agrees where all do, and differs where one
    does.
    """
    found = list(verdicts)
    if not found or all(one == Verdict.NOT_RUN for one in found):
        return Verdict.NOT_RUN
    if Verdict.DIFFER in found:
        return Verdict.DIFFER
    if all(one == Verdict.AGREE for one in found):
        return Verdict.AGREE
    return Verdict.CANNOT_TELL


@functools.cache
def claims() -> tuple[Claim, ...]:
    """All claims, in the order of the file."""
    tests: dict[str, list[Comparison]] = {}
    for row in _rows("findings_comparisons"):
        expect, margin = Expect(row.pop("expect")), float(row.pop("margin") or 0)
        one = Comparison(**row, expect=expect, margin=margin)
        tests.setdefault(one.name, []).append(one)
    return tuple(
        Claim(**row, comparisons=tuple(tests.get(row["name"], ()))) for row in _rows("findings")
    )


@functools.cache
def studies() -> Mapping[str, StudyRow]:
    """The studies by name."""
    rows = _rows("findings_studies")
    return {
        row["study"]: StudyRow(row["study"], float(row["hours"]), row["command"]) for row in rows
    }


def findings(folder: str | Path) -> list[Finding]:
    """All claims with what the studies stored in `folder`, one sub-folder each, say to them."""
    loaded = {name: _load(Path(folder) / name) for name in studies()}
    found = []
    for claim in claims():
        measured = tuple(_measure(one, loaded[one.study]) for one in claim.comparisons)
        found.append(Finding(claim, measured, combined(one.verdict for one in measured)))
    return found


def _load(folder: Path) -> Study | None:
    try:
        return Study.load(folder)
    except FileNotFoundError:
        return None


def _measure(comparison: Comparison, study: Study | None) -> Measured:
    left, right = (
        None if study is None else _group(study.groups, text)
        for text in (comparison.left, comparison.right)
    )
    if study is None or left is None or right is None:
        return Measured(comparison, None, 0, False, Verdict.NOT_RUN)
    runs = (*left.runs.values(), *right.runs.values())
    steps = 0 if comparison.at == "start" else min(run.extra_steps for run in runs)
    if comparison.at == "compute":
        value = at_flops(LOSS, min(run.extra_steps * run.flops_per_step for run in runs))
    else:
        value = at_steps(LOSS, steps)
    difference = paired_difference(left.per_seed(value), right.per_seed(value))
    verdict = verdict_of(difference, comparison.expect, comparison.margin)
    return Measured(comparison, difference, steps, not study.unfinished, verdict)


def _group(groups: Sequence[Group], text: str) -> Group | None:
    """The group that a comparison names."""
    stage, *labels = text.split(" ")
    wanted = dict(label.split("=", 1) for label in labels)
    for group in groups:
        if group.stage == stage and all(group.labels.get(a) == v for a, v in wanted.items()):
            return group
    return None


def _rows(name: str) -> list[dict[str, str]]:
    text = (
        importlib.resources.files("upcycle_jax.papers")
        .joinpath(f"data/{name}.csv")
        .read_text(encoding="utf-8")
    )
    return list(csv.DictReader(text.splitlines()))

"""This project's results beside the paper's: values against values at the paper's scale,
differences against differences at others.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from upcycle_jax.models.base import ModelConfig
from upcycle_jax.papers import vision_runs
from upcycle_jax.papers.command_lines import Command, Places
from upcycle_jax.papers.commands import commands
from upcycle_jax.papers.exhibits import MODALITIES, Exhibit, Method, Point, Series
from upcycle_jax.papers.initial_drop import Drops
from upcycle_jax.papers.runs import (
    Found,
    extra_steps_before,
    find_runs,
    paper_setting,
    source_of,
    superglue,
)
from upcycle_jax.papers.sizes import SizeRow, size_rows
from upcycle_jax.studies.intervals import Interval, mean_interval, paired_difference

TUNED = "imagenet_full_finetune"
"""The metric of figure 3's vision half."""

DENSE, DEFAULT = "dense continuation", "upcycled as in the paper"
"""What gains are counted from."""

TRAINED = ("c4_accuracy", "jft_precision_at_1")
"""Metrics that evaluations of pre-training runs give."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A number of the paper and this project's.

    Attributes:
      point: the paper's.
      ours: mean over the runs that reached these extra steps, or None. Percent, as the paper's.
    """

    point: Point
    ours: Interval | None

    @property
    def delta(self) -> float | None:
        """Ours minus the paper's."""
        paper = self.point.value
        return None if self.ours is None or paper is None else self.ours.mean - paper


@dataclasses.dataclass(frozen=True)
class Curve:
    """A curve of the paper.

    Attributes:
      series: the paper's numbers.
      lines: each with ours.
      commands: what produces it at full scale.
    """

    series: Series
    lines: tuple[Line, ...]
    commands: tuple[Command, ...]

    @property
    def is_missing(self) -> bool:
        """No run of this project gives any of its points."""
        return all(line.ours is None for line in self.lines)


@dataclasses.dataclass(frozen=True)
class Scaled:
    """Runs of one of the exhibit's methods at a scale that is not the paper's.

    Attributes:
      label: method and how it differs from the paper's upcycled model.
      runs: names of the runs, one per seed.
      parameters: of the model.
      num_experts: E, 0 for dense models.
      extra_steps: steps after which `end` and `gain` are taken: the fewest of the runs that are
        compared.
      start: accuracy (of tokens, of images precision at 1) before the first update, percent.
      end: accuracy at the end, percent.
      gain: `end` minus that of the reference after as many extra steps, paired by seed, in points;
        None for the reference.
      reference: what `gain` is counted from, e.g. 'dense continuation'.
      paper_gain: the same difference in the paper's curve of that method at its last common point,
        by size.
      modality: 'language' or 'vision'.
    """

    label: str
    runs: tuple[str, ...]
    parameters: int
    num_experts: int
    extra_steps: int
    start: Interval
    end: Interval
    gain: Interval | None
    reference: str
    paper_gain: dict[str, float]
    modality: str = "language"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An exhibit with this project's results.

    Attributes:
      exhibit: the paper's.
      sizes: rows of table 1; empty for the others.
      curves: those of language and of vision.
      scaled: this project's runs of the same methods at other scales.
      drops: what was computed from a dense checkpoint, or None.
      results: the folder that was searched, or None.
      num_runs: evaluated runs in it.
    """

    exhibit: Exhibit
    sizes: tuple[SizeRow, ...]
    curves: tuple[Curve, ...]
    scaled: tuple[Scaled, ...]
    results: str | None
    num_runs: int
    drops: Drops | None = None

    @property
    def missing(self) -> list[Curve]:
        """Curves that no run gives."""
        return [curve for curve in self.curves if curve.is_missing]

    @property
    def drops_hold(self) -> bool:
        """Whether every upcycled model that must equal the dense one does."""
        drops = self.drops
        return drops is None or all(map(drops.is_equal, drops.expected_equal))


def compare(
    exhibit: Exhibit,
    *,
    results: str | Path | None,
    load_config: Callable[[str], ModelConfig],
    places: Places = Places(),
    drops: Drops | None = None,
) -> Comparison:
    """Puts this project's results beside a table or figure.

    Args:
      exhibit: the paper's numbers.
      results: folder with MODEL_DIRs, at any depth; None for no results.
      load_config: the model of a shipped model file, for table 1.
      places: where the commands for what is missing read and write.
      drops: what was computed from a dense checkpoint.

    Raises:
      FileNotFoundError: the results folder does not exist.
    """
    found = find_runs(results) if results is not None else []
    series = [one for modality in MODALITIES for one in exhibit.series(modality)]
    is_table_of_sizes = any(point.metric == "parameters" for point in exhibit.points)
    curves = (
        []
        if is_table_of_sizes
        else [Curve(one, _lines(one, found), tuple(commands(one, places))) for one in series]
    )
    return Comparison(
        exhibit=exhibit,
        sizes=tuple(size_rows(load_config)) if is_table_of_sizes else (),
        curves=tuple(curves),
        scaled=tuple(
            _scaled(
                exhibit,
                curves,
                [one for one in found if not one.at_paper_scale and not one.fine_tuned],
            )
        ),
        results=None if results is None else str(results),
        num_runs=len(found),
        drops=drops,
    )


def _matches(one: Found, head: Point) -> bool:
    method = Method.DENSE if head.method == Method.START else head.method
    if one.modality != head.modality:
        return False
    is_tuned = head.metric == TUNED
    setting = vision_runs.of_pre_training(one.setting) if is_tuned else dict(one.setting)
    return one.method == method and setting == paper_setting(head)


def _lines(series: Series, found: Sequence[Found]) -> tuple[Line, ...]:
    head = series.head
    chosen = [
        one for one in found if one.at_paper_scale and one.size == head.size and _matches(one, head)
    ]
    if head.metric == "superglue":
        return tuple(
            Line(point, _score(point, [one for one in chosen if one.fine_tuned], found))
            for point in series.points
        )
    if head.metric == TUNED:
        tuned = [one for one in chosen if one.fine_tuned]
        last = series.points[-1]
        return tuple(
            Line(point, _tuned(point, tuned, found) if point is last else None)
            for point in series.points
        )
    values = _few_shot if head.metric == "imagenet_10shot" else _accuracy
    runs = [one for one in chosen if not one.fine_tuned]
    return tuple(
        Line(point, values(point, point is series.points[-1], _twins(_started_from(point, runs))))
        for point in series.points
    )


def _started_from(point: Point, runs: Sequence[Found]) -> list[Found]:
    """The runs that start where a point says: figure 6 varies that."""
    varies = point.x_unit == "dense steps"
    return [one for one in runs if not varies or one.run.start_step == point.x]


def _twins(found: Sequence[Found]) -> list[Found]:
    """The runs that differ in their seed only, the largest such group: another learning rate, say,
    is not averaged with them.
    """
    groups: dict[str, list[Found]] = {}
    for one in found:
        groups.setdefault(one.identity, []).append(one)
    return max(groups.values(), key=len, default=[])


def _accuracy(point: Point, is_last: bool, runs: Sequence[Found]) -> Interval | None:
    """Token accuracy in percent at the point's extra steps; where those are not known, the last of
    a curve is a run's last.
    """
    values = []
    for one in runs:
        curve = one.run.curve("accuracy")
        if point.method == Method.START:
            values.append(curve.first)
        elif point.extra_steps is not None:
            values.append(curve.at(one.run.start_step + point.extra_steps))
        elif is_last:
            values.append(curve.last)
    return _percent(values)


def _few_shot(point: Point, is_last: bool, runs: Sequence[Found]) -> Interval | None:
    """10-shot accuracy in percent at the point's extra steps, else of a run's last checkpoint."""
    values = []
    for one in runs:
        found = vision_runs.few_shot(one.folder)
        if point.extra_steps is not None:
            values.append(found.get(one.run.start_step + point.extra_steps, math.nan))
        elif found and is_last:
            values.append(found[max(found)])
    return _percent(values)


def _percent(values: Sequence[float]) -> Interval | None:
    known = [100 * value for value in values if value == value]
    return mean_interval(known) if known else None


def _score(point: Point, runs: Sequence[Found], found: Sequence[Found]) -> Interval | None:
    scored = {}
    for one in runs:
        score = superglue(one)
        if score is not None and (
            point.extra_steps is None or extra_steps_before(one, list(found)) == point.extra_steps
        ):
            scored[one.folder] = score
    values = [scored[one.folder] for one in _twins([one for one in runs if one.folder in scored])]
    return mean_interval(values) if values else None


def _tuned(point: Point, runs: Sequence[Found], found: Sequence[Found]) -> Interval | None:
    """Fine-tuned accuracy in percent of the runs that were evaluated on what they were not chosen
    on: of a network from scratch beside the start of the curves, of others beside their ends, since
    the steps between are not known.
    """
    values = {}
    for one in runs:
        accuracy = vision_runs.fine_tuned(one.folder)
        source = source_of(one, list(found))
        is_start = source is not None and not source.run.start_step
        if accuracy is not None and is_start == (point.method == Method.START):
            values[one.folder] = accuracy
    return _percent([values[o.folder] for o in _twins([o for o in runs if o.folder in values])])


def _scaled(exhibit: Exhibit, curves: Sequence[Curve], found: Sequence[Found]) -> list[Scaled]:
    """Groups of runs that differ in their seed only, each against the reference of its family."""
    heads = [curve.series.head for curve in curves if curve.series.head.metric in TRAINED]
    wanted = [
        one
        for one in found
        if any(head.method != Method.START and _matches(one, head) for head in heads)
    ]
    groups: dict[tuple, list[Found]] = {}
    for one in wanted:
        groups.setdefault((one.family, str(one.method), one.identity), []).append(one)
    shown = {head.method for head in heads}
    rows = []
    for group in groups.values():
        label, reference = _reference(group[0], found, has_dense=Method.DENSE in shown)
        rows.append(_scaled_row(group, label, reference, curves))
    named = Counter(row.label for row in rows)
    return [
        (
            dataclasses.replace(row, label=f"{row.label} ({Path(row.runs[0]).name})")
            if named[row.label] > 1
            else row
        )
        for row in rows
    ]


def _reference(one: Found, found: Sequence[Found], *, has_dense: bool) -> tuple[str, list[Found]]:
    """What a run's gain is counted from, among the runs of its family: what the exhibit shows
    beside it, else what there is.

    That is the dense continuation where the exhibit has one, else the upcycled model with the
    paper's setting; both of the same dense checkpoint's step, but for a run from scratch, which has
    none.
    """
    starts = (
        {one.run.start_step}
        if one.method != Method.SCRATCH
        else {other.run.start_step for other in found}
    )
    family = [
        other
        for other in found
        if other.family == one.family
        and other.num_experts in (0, one.num_experts)
        and other.run.start_step in starts
    ]
    choices = {
        DENSE: _twins([other for other in family if other.method == Method.DENSE]),
        DEFAULT: _twins(
            [other for other in family if other.method == Method.UPCYCLED and not other.setting]
        ),
    }
    order = (DENSE, DEFAULT) if has_dense else (DEFAULT, DENSE)
    return next(((label, choices[label]) for label in order if choices[label]), ("", []))


def _scaled_row(
    group: Sequence[Found], reference: str, others: Sequence[Found], curves: Sequence[Curve]
) -> Scaled:
    first = group[0]
    is_reference = any(other in group for other in others)
    paired = (
        {other.seed for other in others} & {one.seed for one in group}
        if not is_reference
        else set()
    )
    compared = [*group, *(other for other in others if other.seed in paired)]
    steps = min(one.run.extra_steps for one in compared)
    settings = " ".join(f"{key}={value}" for key, value in first.setting.items())
    ours, theirs = (
        {one.seed: 100 * _after(one, steps) for one in runs if one.seed in paired}
        for runs in (group, others)
    )
    return Scaled(
        label=" ".join(filter(None, (str(first.method), settings))),
        runs=tuple(one.run.name for one in group),
        parameters=int(first.run.manifest["parameters"]),
        num_experts=first.num_experts,
        extra_steps=steps,
        start=mean_interval(100 * one.run.curve("accuracy").first for one in group),
        end=mean_interval(100 * _after(one, steps) for one in group),
        gain=paired_difference(ours, theirs) if paired else None,
        reference=reference if paired else "",
        paper_gain=_paper_gains(first, reference, curves) if paired else {},
        modality=first.modality,
    )


def _after(one: Found, steps: int) -> float:
    """Token accuracy after so many steps of the run."""
    return one.run.curve("accuracy").at(one.run.start_step + steps)


def _paper_gains(one: Found, reference: str, curves: Sequence[Curve]) -> dict[str, float]:
    """The paper's difference between a run's method and the reference at the last point that both
    curves have, by size.
    """
    gains = {}
    for curve in curves:
        head = curve.series.head
        if head.method == Method.START or not _matches(one, head):
            continue
        for other in curves:
            there = other.series.head
            same = (there.part, there.size, there.metric, there.x_unit) == (
                head.part,
                head.size,
                head.metric,
                head.x_unit,
            )
            is_reference = there.method == (Method.DENSE if reference == DENSE else Method.UPCYCLED)
            if same and other is not curve and is_reference and not paper_setting(there):
                gain = _last_difference(curve.series, other.series)
                if gain is not None:
                    gains[head.size] = gain
    return gains


def _last_difference(one: Series, other: Series) -> float | None:
    """Value of one curve minus that of the other at the most extra steps that both have; at their
    ends where steps are not known.
    """
    values, mine = (
        {
            point.extra_steps: point.value
            for point in series.points
            if point.extra_steps is not None and point.value is not None
        }
        for series in (other, one)
    )
    common = mine.keys() & values.keys()
    if common:
        return mine[max(common)] - values[max(common)]
    known = all(point.extra_steps is not None for point in (*one.points, *other.points))
    ends = one.points[-1].value, other.points[-1].value
    return None if known or ends[0] is None or ends[1] is None else ends[0] - ends[1]

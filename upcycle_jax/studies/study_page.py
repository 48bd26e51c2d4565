"""The report of a study: what came out over the seeds of every group, with intervals, in words that
the numbers decide.
"""

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from upcycle_jax.studies import figures, paid
from upcycle_jax.studies.figures import Picture
from upcycle_jax.studies.intervals import (
    CONFIDENCE,
    Interval,
    mean_interval,
    paired_difference,
)
from upcycle_jax.studies.page import Report, table
from upcycle_jax.studies.run_results import Run
from upcycle_jax.studies.study_results import (
    CONFIG,
    Group,
    Study,
    at_flops,
    at_steps,
    trained_cells,
)
from upcycle_jax.studies.sweep import SEED_AXIS, shell_line

LOSS, ACCURACY = "cross_ent_loss", "accuracy"
FIGURES_FILE = "figures.json"


def report(study: Study) -> Report:
    """The page of a study; the same folder gives the same bytes."""
    pairs = paid.pairs_of_study(study)
    pictures = _pictures(study, pairs)
    images = {f"{name}.png": picture.png for name, (picture, _) in pictures.items()}
    summary = _summary(study)
    sections = [
        f"# {study.plan['title'] or study.plan['name']}",
        *_first_screen(pictures, pairs),
        "## What this is",
        _scale(study),
        "## What came out",
        _findings(study),
        f"## Summary after {study.common_steps:,} extra steps",
        _how_to_read(study),
        summary,
        "### Differences to the baseline",
        _difference_table(study),
        *_figure(pictures, "differences"),
        "## Quality against steps, compute and time",
        *_figure(pictures, "learning_curves"),
        *(
            ["## Initial drop", *_figure(pictures, "initial_drop")]
            if "initial_drop" in pictures
            else []
        ),
        *_routing_sections(pictures),
        *(
            ["## Similarity of experts", *_figure(pictures, "similarity")]
            if "similarity" in pictures
            else []
        ),
        "## Every run",
        _every_run(study),
        "## How it was made",
        _provenance(study),
    ]
    data = {name: picture.data for name, (picture, _) in pictures.items()}
    files = {FIGURES_FILE: json.dumps(data, indent=1, sort_keys=True) + "\n"}
    return Report("\n\n".join(sections) + "\n", images, summary, files)


def _first_screen(
    pictures: Mapping[str, tuple[Picture, str]], pairs: Sequence[paid.Pair]
) -> list[str]:
    if not pairs:
        return []
    return ["## Did it pay?", paid.words(pairs), *_figure(pictures, paid.NAME)]


def _pictures(study: Study, pairs: Sequence[paid.Pair]) -> dict[str, tuple[Picture, str]]:
    """Name -> figure and caption, those that there are."""
    n = len(study.plan["seeds"])
    percent = f"{100 * CONFIDENCE:g} %"
    found: dict[str, tuple[Picture | None, str]] = {
        paid.NAME: (paid.picture(pairs), paid.CAPTION),
        "differences": (
            figures.differences(study),
            (
                "Bars: mean over the seeds of the paired difference. Dots: each seed. Lines:"
                f" {percent} confidence intervals, with their numbers on the right; an arrowhead"
                " means that the interval goes on beyond the picture."
            ),
        ),
        "learning_curves": (
            figures.learning_curves(study),
            (
                f"Thick lines: mean over the seeds ({n} at most); thin lines: each seed; markers:"
                " evaluations. The ordinate shows what the runs that continue a checkpoint cover"
                " after their first updates: initial drops and runs from scratch may lie outside."
            ),
        ),
        "initial_drop": (
            figures.initial_drop(study),
            (
                "What the conversion costs before any training: evaluation loss of the upcycled"
                " model minus that of the dense checkpoint."
            ),
        ),
        "similarity": (
            figures.similarity(study),
            "Experts that stay copies of each other stay at 1.",
        ),
    }
    for group in study.groups:
        name = "routing_" + re.sub(r"[^a-z0-9]+", "_", group.name.lower()).strip("_")
        seed = next(iter(group.runs))
        caption = (
            f"{group.name}, seed {seed}: what each expert of each MoE layer gets at each"
            " evaluation, relative to an even split."
        )
        even = " and the ".join(_where_experts_choose(group.first))
        if even:
            caption += (
                f" In the {even} experts choose tokens and fill their capacity, so that their load"
                " is even by construction."
            )
        found[name] = (figures.routing(group.first), caption)
    return {
        name: (picture, caption)
        for name, (picture, caption) in found.items()
        if picture is not None
    }


def _where_experts_choose(run: Run) -> list[str]:
    """The stacks in which experts choose their tokens by the manifest: those of its
    '<stack>_router'.
    """
    moe = (run.manifest.get("model") or {}).get("moe") or {}
    return [
        name.removesuffix("_router")
        for name, router in moe.items()
        if name.endswith("_router") and (router or {}).get("type") == "ExpertsChoose"
    ]


def _figure(pictures: Mapping[str, tuple[Picture, str]], name: str) -> list[str]:
    return (
        [f"![{pictures[name][1]}]({name}.png)", f"*{pictures[name][1]}*"]
        if name in pictures
        else []
    )


def _routing_sections(pictures: Mapping[str, tuple[Picture, str]]) -> list[str]:
    names = [name for name in pictures if name.startswith("routing_")]
    return (
        ["## Routing over training", *(part for name in names for part in _figure(pictures, name))]
        if names
        else []
    )


def _scale(study: Study) -> str:
    """Scale, seeds, data, hardware and load: what a reader needs who has this file only."""
    first = study.groups[0].first
    seeds = ", ".join(map(str, study.plan["seeds"]))
    extra = sorted(
        {
            cell["end_step"] - cell["start_step"]
            for cell in trained_cells(study.plan)
            if study.plan["stages"][cell["stage"]]["compared"]
        }
    )
    lines = [f"{study.plan['scale']}\n"] if study.plan["scale"] else []
    lines.append(
        f"* **Runs**: {len(study.runs)} compared, of {' or '.join(f'{n:,}' for n in extra)} extra"
        f" steps; seeds {seeds}."
    )
    lines += _shared_starts(study)
    tasks = ", ".join(f"`{task}`" for task in first.tasks)
    lines.append(f"* **Data**: {tasks}; {_data(study)}.")
    lines.append(f"* **Hardware**: {_hardware(study)}")
    return "\n".join([*lines, *_incomplete(study)])


def _shared_starts(study: Study) -> list[str]:
    """What the compared runs start from: one run for all seeds, or one for each."""
    found: dict[str, list[Run]] = {}
    for cell in trained_cells(study.plan):
        if run := study.shared.get(cell["name"]):
            axes = {axis: label for axis, label in cell["labels"].items() if axis != SEED_AXIS}
            name = "-".join([cell["stage"], *(f"{axis}={label}" for axis, label in axes.items())])
            found.setdefault(name if SEED_AXIS in cell["labels"] else run.name, []).append(run)
    lines = []
    for name, runs in found.items():
        first, seeds = runs[0], "one for all seeds" if runs[0].name == name else "one for each seed"
        falls = sorted({f"{_slope(run):.4f}" for run in runs}, key=float)
        by = falls[0] if len(falls) == 1 else f"{falls[0]} to {falls[-1]}"
        lines.append(
            f"* **Shared start**: `{name}`, {first.manifest['parameters']:,} parameters,"
            f" {first.extra_steps:,} steps, {seeds}; its loss fell by {by} over the last tenth of"
            " them."
        )
    return lines


def _slope(run: Run) -> float:
    """How much the loss fell over the last tenth of the training."""
    curve, end = run.curve(LOSS), run.start_step + run.extra_steps
    return curve.at(end - 0.1 * run.extra_steps) - curve.last


def _incomplete(study: Study) -> list[str]:
    """What is missing from the comparisons, and why."""
    lines = []
    waiting = ", ".join(
        f"`{name}` (at step {step:,})"
        for name, step in study.unfinished.items()
        if name not in study.failed
    )
    if waiting:
        lines.append(
            f"* **NOT FINISHED**: {waiting}. Every comparison is made where all runs that are shown"
            " have been."
        )
    if study.failed:
        cells = ", ".join(
            f"`{name}` (code {code}, at step {study.unfinished[name]:,})"
            for name, code in study.failed.items()
        )
        lines.append(
            f"* **FAILED**, and left out of every comparison: {cells}. Means are those of the runs"
            " that did not fail."
        )
    measures = (at_steps(LOSS, study.common_steps), at_flops(LOSS, study.common_flops))
    lost = [
        f"{group.name}, seed {seed}"
        for group in study.groups
        for seed, run in group.runs.items()
        if any(np.isnan(value(run)) for value in measures)
    ]
    if lost:
        lines.append(
            f"* **NOT A NUMBER**: the loss of {'; '.join(lost)} where runs are compared. Means are"
            " those of the other runs."
        )
    return lines


def _data(study: Study) -> str:
    """Whether all runs read the same text; runs that are fine-tuned start from others that read
    another.
    """
    compared, shared = (
        {_without_versions(run.manifest.get("data")) for run in runs}
        for runs in (study.runs, study.shared.values())
    )
    found = compared | shared
    if len(found) == 1:
        return "all runs read the same text (equal fingerprints in their manifests)"
    if len(compared) == len(shared) == 1:
        return (
            "all runs that are compared read the same text, and all that they start from another"
            " one (equal fingerprints in their manifests)"
        )
    return (
        f"**the runs read {len(found)} different data sets** (fingerprints in their manifests):"
        " differences may come from that"
    )


def _without_versions(value: Any) -> str:
    def bare(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {
                key: bare(inner) for key, inner in part.items() if key not in ("versions", "seed")
            }
        return [bare(inner) for inner in part] if isinstance(part, list) else part

    return json.dumps(bare(value), sort_keys=True)


def _hardware(study: Study) -> str:
    starts = [event for event in study.events if event["event"] == "sweep"]
    devices = {
        json.dumps(start.get("devices", {}), sort_keys=True)
        for run in study.runs
        for start in run.manifest.get("starts", ())
    }
    kinds = " or ".join(
        f"{d['count']} x {d['kind']} ({d['platform']})"
        for d in map(json.loads, sorted(devices))
        if {"count", "kind", "platform"} <= set(d)
    )
    text = f"each run on {kinds}" if kinds else "not recorded"
    if starts and starts[-1].get("machine"):
        machine = starts[-1]["machine"]
        text += (
            f"; machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
        )
    loads = [event["load"][0] for event in study.events if event["event"] == "load"]
    if loads:
        text += (
            f"; load average over one minute between {min(loads):.1f} and {max(loads):.1f}, median"
            f" {float(np.median(loads)):.1f} (own runs included,"
            f" {(starts[-1] if starts else {}).get('num_parallel', 1)} at a time): step times are"
            " those of a shared machine"
        )
    return text + "."


def _how_to_read(study: Study) -> str:
    baseline = study.plan["stages"].get(study.plan["baseline"], {}).get("label")
    paired = (
        f" Differences to **{baseline}** are paired: runs of one seed see the same batches in the"
        " same order and are evaluated on the same corrupted spans (both follow from the seed),"
        " and the interval is that of the differences."
        if baseline
        else ""
    )
    return (
        "Losses are cross entropies in nats per target token, accuracies shares of target tokens,"
        " teacher-forced, unweighted means over the evaluation tasks. `±` is the half width of a"
        f" {100 * CONFIDENCE:g} % confidence interval of the mean over seeds (Student's t: with two"
        f" seeds it is 12.7 standard errors).{paired} Intervals are not corrected for the number of"
        " comparisons. Time per step is the mean over seeds of each run's median. Extra steps,"
        " compute and time count from the checkpoint that a run starts from: what that checkpoint"
        " took is not in them. FLOPs are those of matrix products, forward and backward; every"
        " slot of an expert counts, whether a token sits in it or not. `Loss before` is that"
        " before the first update; for an upcycled model its difference to the dense checkpoint's"
        " is the initial drop."
    )


def _summary(study: Study) -> str:
    steps = study.common_steps
    rows = []
    for group in study.groups:
        run, loss = group.first, group.interval(at_steps(LOSS, steps))
        rows.append(
            [
                group.name,
                (
                    str(loss.count)
                    if loss.count == len(group.runs)
                    else f"{loss.count} of {len(group.runs)}"
                ),
                f"step {run.start_step:,}" if run.start_step else "scratch",
                f"{run.manifest['parameters']:,}",
                f"{run.manifest.get('active_parameters', run.manifest['parameters']):,}",
                f"{run.flops_per_step / 1e9:,.2f}",
                _plain(group.interval(lambda run: run.seconds_per_step), 2),
                _plain(group.interval(at_steps(LOSS, 0))),
                loss.text(),
                group.interval(at_steps(ACCURACY, steps)).text(),
            ]
        )
    header = [
        "runs",
        "seeds",
        "starts from",
        "parameters",
        "active",
        "GFLOP/step",
        "s/step",
        "loss before",
        "loss",
        "accuracy",
    ]
    return table(header, rows)


def _plain(interval: Interval, digits: int = 4) -> str:
    return "-" if np.isnan(interval.mean) else f"{interval.mean:.{digits}f}"


def _measures(study: Study) -> dict[str, Callable[[Run], float]]:
    steps, flops = study.common_steps, study.common_flops
    return {
        "before training": at_steps(LOSS, 0),
        f"{steps:,} steps": at_steps(LOSS, steps),
        f"{flops / 1e12:,.2f} TFLOP": at_flops(LOSS, flops),
        f"accuracy, {steps:,} steps": at_steps(ACCURACY, steps),
        f"accuracy, {flops / 1e12:,.2f} TFLOP": at_flops(ACCURACY, flops),
    }


def _difference_table(study: Study) -> str:
    measures = _measures(study)
    groups = [group for group in study.groups if study.baseline_of(group) is not None]
    rows = []
    for group in groups:
        intervals = [study.difference(group, value) for value in measures.values()]
        rows.append(
            [
                group.name,
                *(
                    "-" if interval is None else interval.text(signed=True)
                    for interval in intervals
                ),
            ]
        )
    if not rows:
        return "The study has no baseline, or it has no result yet."
    header = ["difference of loss (or accuracy)", *measures]
    if any(_goes_on(study, group) for group in groups):
        header.append("at the most steps that both have")
        for group, row in zip(groups, rows, strict=True):
            steps = study.shared_steps(group)
            interval = study.difference(group, at_steps(LOSS, steps))
            row.append("-" if interval is None else f"{interval.text(signed=True)} ({steps:,})")
    return table(header, rows)


def _goes_on(study: Study, group: Group) -> bool:
    """Whether the group and its baseline were trained longer than the shortest run of the study."""
    return study.baseline_of(group) is not None and study.shared_steps(group) > study.common_steps


def _verdict(interval: Interval) -> str:
    """A difference of losses in words: 'lower' or 'higher' only where the interval excludes 0."""
    if not interval.count:
        return "not known, because no seed has both"
    if interval.count < 2:
        return f"{interval.mean:+.4f}, of one seed: no claim"
    ends = (
        f"{interval.text(signed=True)}, {100 * interval.confidence:g} % interval over"
        f" {interval.count} seeds"
    )
    direction = "lower" if interval.mean < 0 else "higher"
    if interval.excludes_zero:
        return f"**{direction}** ({ends})"
    if not interval.mean:
        return f"equal in the mean: **no difference can be claimed** ({ends})"
    return (
        f"{direction} in the mean, but the interval holds 0: **no difference can be claimed**"
        f" ({ends})"
    )


def _findings(study: Study) -> str:
    """Words that the numbers decide; a difference is called one only where its interval excludes
    0.
    """
    lines = []
    steps, flops = study.common_steps, study.common_flops
    for group in study.groups:
        by_steps, by_flops = (
            study.difference(group, value)
            for value in (at_steps(LOSS, steps), at_flops(LOSS, flops))
        )
        other = study.baseline_of(group)
        if other is None or by_steps is None or by_flops is None or not by_steps.count:
            continue
        lines.append(
            f"* **{group.name}** against **{other.name}**: after {steps:,} extra steps the loss is"
            f" {_verdict(by_steps)}; at equal extra compute ({flops / 1e12:,.2f} TFLOP) it is"
            f" {_verdict(by_flops)}."
        )
        if _goes_on(study, group):
            longest = study.shared_steps(group)
            latest = study.difference(group, at_steps(LOSS, longest))
            lines[-1] += (
                f" After {longest:,} extra steps, the most that both have, it is"
                f" {_verdict(latest)}."
                if latest
                else ""
            )
    for stage in {group.stage: None for group in study.groups}:
        lines += _order(study, [group for group in study.groups if group.stage == stage])
    signs = [line for group in study.groups if (line := _agreement(study, group))]
    return "\n".join([*lines, *signs]) if lines else "There is no baseline to compare with."


def _order(study: Study, groups: Sequence[Group]) -> list[str]:
    """Which choice of an axis has the lowest mean, and whether the next one is told apart from
    it.
    """
    loss = at_steps(LOSS, study.common_steps)
    values = {group.name: found for group in groups if (found := group.per_seed(loss))}
    if len(values) < 2:
        return []
    # Means over different seeds differ by their seeds as well.
    shared = set.intersection(*(set(found) for found in values.values()))
    means = {
        name: mean_interval(found[seed] for seed in shared or found).mean
        for name, found in values.items()
    }
    first, second, *_ = ranked = sorted(values, key=lambda name: means[name])
    order = " < ".join(f"{name} ({means[name]:.4f})" for name in ranked)
    which = (
        f", over the seeds that all have ({', '.join(sorted(shared))})"
        if any(set(found) != shared for found in values.values())
        else ""
    )
    gap = paired_difference(values[first], values[second])
    return [
        f"* Mean loss after {study.common_steps:,} extra steps{which}, lowest first: {order}. The"
        f" first minus the second: {_verdict(gap)}."
    ]


def _agreement(study: Study, group: Group) -> str:
    """Per-seed signs where no interval decides: said as what they are."""
    other = study.baseline_of(group)
    if other is None:
        return ""
    loss = at_steps(LOSS, study.common_steps)
    left, right = group.per_seed(loss), other.per_seed(loss)
    parts = [f"seed {seed} {left[seed] - right[seed]:+.4f}" for seed in left if seed in right]
    return (
        f"* Each seed, {group.name} minus {other.name}: {', '.join(parts)}."
        if len(parts) > 1
        else ""
    )


def _every_run(study: Study) -> str:
    tasks = study.groups[0].first.tasks
    rows = []
    for group in study.groups:
        for seed, run in group.runs.items():
            last = {task: run.curve(LOSS, task).last for task in tasks}
            rows.append(
                [
                    group.name,
                    seed,
                    f"{run.extra_steps:,}",
                    f"{run.seconds_per_step:.2f}",
                    *(f"{last[task]:.4f}" for task in tasks),
                    f"{run.curve(LOSS).last:.4f}",
                    f"{run.curve(ACCURACY).last:.4f}",
                    str(len(run.manifest.get("starts", ()))),
                ]
            )
    header = [
        "run",
        "seed",
        "extra steps",
        "s/step",
        *(f"loss, {task}" for task in tasks),
        "loss",
        "accuracy",
        "starts",
    ]
    note = (
        "At each run's own last evaluation. `starts` counts processes: a run that was interrupted"
        " and resumed has more than one."
    )
    return f"{note}\n\n{table(header, rows)}"


def _provenance(study: Study) -> str:
    versions = study.groups[0].first.manifest.get("starts", [{}])[-1].get("versions", {})
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    commands = "\n".join(
        f"    {shell_line(shlex.split(cell['command']))}" for cell in study.plan["cells"]
    )
    return (
        f"The study is its gin file: [config.gin](../{CONFIG}). Software: {shown}."
        f" `{FIGURES_FILE}` beside this page holds every number of the figures."
        " The runs, as ordinary command lines (`{SWEEP_DIR}` is the study's"
        f" folder):\n\n{commands}"
    )

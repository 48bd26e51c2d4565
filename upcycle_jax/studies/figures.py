"""Figures of a study: each is a PNG and the numbers that it shows."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from upcycle_jax.studies import plots
from upcycle_jax.studies.intervals import Interval
from upcycle_jax.studies.plots import COLOURS, MARKERS, METRIC_LABELS, STYLES, plt
from upcycle_jax.studies.run_results import Run
from upcycle_jax.studies.study_results import Group, Study, at_flops, at_steps

GREY = "#555555"
LOAD_KINDS = {
    "load": "share of the processed tokens",
    "router_probability": "mean router probability",
}
BUDGETS = {
    "extra training steps": lambda run: 1.0,
    "extra training compute (TFLOP, forward + backward)": lambda run: run.flops_per_step / 1e12,
    "extra training time (s, at the run's median step time)": lambda run: run.seconds_per_step,
}
WIDEST = 4.0


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
      png: the bytes of the picture.
      data: what it shows, as JSON.
    """

    png: bytes
    data: Mapping[str, Any]


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index % len(STYLES)]}


def _mean_curve(group: Group, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Extra steps that all seeds were evaluated at, and the mean there."""
    curves = [(run.curve(metric), run.start_step) for run in group.runs.values()]
    steps = sorted(
        set.intersection(*({int(step) - start for step in curve.steps} for curve, start in curves))
    )
    return np.array(steps), np.array(
        [np.mean([curve.at(start + step) for curve, start in curves]) for step in steps]
    )


def learning_curves(study: Study) -> Picture:
    """Loss and accuracy against extra steps, compute and time: the mean over the seeds, and each
    seed as a thin line.

    The ordinate is cut to what the runs that continue a checkpoint cover after their first updates,
    and the baseline's start: initial drops (which have their own figure) and runs from scratch,
    which start far away, would flatten them.
    """
    figure, panels = plt.subplots(
        2, len(BUDGETS), figsize=(15, 8.5), sharey="row", layout="constrained"
    )
    data: dict[str, Any] = {}
    for row, metric in enumerate(METRIC_LABELS):
        in_view: list[float] = []
        for index, group in enumerate(study.groups):
            steps, mean = _mean_curve(group, metric)
            data.setdefault(group.name, {})[metric] = {
                "extra_steps": steps.tolist(),
                "mean": mean.tolist(),
            }
            if group.first.start_step or not any(other.first.start_step for other in study.groups):
                in_view += mean[0 if study.baseline_of(group) is None else 1 :].tolist()
            for column, (label, scale) in enumerate(BUDGETS.items()):
                panel = panels[row, column]
                unit = float(np.mean([scale(run) for run in group.runs.values()]))
                for run in group.runs.values():
                    curve = run.curve(metric)
                    panel.plot(
                        (curve.steps - run.start_step) * unit,
                        curve.values,
                        linewidth=0.7,
                        alpha=0.45,
                        color=_style(index)["color"],
                    )
                marker = MARKERS[index % len(MARKERS)]
                panel.plot(
                    steps * unit,
                    mean,
                    marker=marker,
                    markersize=5,
                    linewidth=1.8,
                    label=group.name,
                    **_style(index),
                )
                panel.set_xlabel(label)
                panel.grid(alpha=0.3)
        finite = [value for value in in_view if np.isfinite(value)]
        if finite:
            margin = 0.06 * (max(finite) - min(finite) or 1.0)
            panels[row, 0].set_ylim(min(finite) - margin, max(finite) + margin)
        panels[row, 0].set_ylabel(METRIC_LABELS[metric])
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return Picture(plots.png(figure), _finite(data))


def differences(study: Study) -> Picture | None:
    """Bars: loss minus the baseline's at equal extra steps and at equal extra compute, with
    intervals and each seed's difference.

    None without a baseline.
    """
    groups = [group for group in study.groups if study.baseline_of(group) is not None]
    if not groups:
        return None
    measures: dict[str, Callable[[Run], float]] = {
        f"after {study.common_steps:,} extra steps": at_steps("cross_ent_loss", study.common_steps),
        f"after {study.common_flops / 1e12:,.2f} extra TFLOP": at_flops(
            "cross_ent_loss", study.common_flops
        ),
    }
    figure, panels = plt.subplots(
        1, 2, figsize=(15, 1.6 + 0.55 * len(groups)), sharey=True, layout="constrained"
    )
    data: dict[str, Any] = {}
    for panel, (title, value) in zip(panels, measures.items(), strict=True):
        intervals = {group.name: study.difference(group, value) for group in groups}
        seeds = {group.name: _seed_differences(study, group, value) for group in groups}
        _bars(panel, intervals, seeds, study)
        panel.set_title(title)
        panel.set_xlabel("loss minus the baseline's (nats per target token; left is better)")
        data[title] = {
            name: {"mean": i.mean, "half_width": i.half_width, "seeds": seeds[name]}
            for name, i in intervals.items()
            if i
        }
    return Picture(plots.png(figure), _finite(data))


def _seed_differences(study: Study, group: Group, value: Callable[[Run], float]) -> list[float]:
    other = study.baseline_of(group)
    if other is None:
        return []
    left, right = group.per_seed(value), other.per_seed(value)
    return [left[seed] - right[seed] for seed in left if seed in right]


def _bars(
    panel: Any,
    intervals: Mapping[str, Interval | None],
    seeds: Mapping[str, Sequence[float]],
    study: Study,
) -> None:
    """Horizontal bars with their numbers beside them.

    Runs that continue a checkpoint set the scale; bars from scratch, and intervals that are much
    wider than all differences, leave the picture, with an arrow where they do.
    """
    colours = {
        group.name: COLOURS[index % len(COLOURS)] for index, group in enumerate(study.groups)
    }
    scratch = {group.name for group in study.groups if not group.first.start_step}
    scaling = [name for name in intervals if name not in scratch] or list(intervals)
    largest = max((abs(d) for name in scaling for d in seeds[name]), default=0.0) or 1e-6
    shown = [
        interval
        for name in scaling
        if (interval := intervals[name]) is not None and np.isfinite(interval.half_width)
    ]
    widest = max((abs(interval.mean) + interval.half_width for interval in shown), default=largest)
    limit = 1.08 * min(max(largest, widest), WIDEST * largest)
    for y, (name, interval) in enumerate(intervals.items()):
        if interval is None or np.isnan(interval.mean):
            continue
        panel.barh(y, interval.mean, color=colours[name], alpha=0.55, height=0.6)
        panel.text(
            1.01,
            y,
            interval.text(3, signed=True),
            transform=panel.get_yaxis_transform(),
            va="center",
            fontsize=8,
        )
        panel.plot(
            seeds[name],
            [y] * len(seeds[name]),
            "o",
            markersize=4.5,
            color=colours[name],
            markeredgecolor="black",
            markeredgewidth=0.6,
        )
        low, high = (min(max(end, -limit), limit) for end in (interval.low, interval.high))
        panel.plot([low, high], [y, y], color="black", linewidth=1.2)
        for end, cut, sign in (
            (low, interval.low < -limit, "<"),
            (high, interval.high > limit, ">"),
        ):
            panel.plot(
                [end],
                [y],
                sign if cut else "|",
                color="black",
                markersize=7 if cut else 11,
                clip_on=False,
            )
    panel.axvline(0.0, color=GREY, linewidth=1.0)
    panel.set_xlim(-limit, limit)
    panel.set_yticks(range(len(intervals)), list(intervals))
    panel.set_ylim(len(intervals) - 0.5, -0.5)
    panel.grid(alpha=0.3, axis="x")


def initial_drop(study: Study) -> Picture | None:
    """Bars: loss before the first update minus the dense checkpoint's; None where nothing starts
    from the checkpoint that its baseline starts from.
    """
    groups = [group for group in study.groups if study.starts_with_baseline(group)]
    if not groups:
        return None
    first = at_steps("cross_ent_loss", 0)
    intervals = {group.name: study.difference(group, first) for group in groups}
    seeds = {group.name: _seed_differences(study, group, first) for group in groups}
    figure, panel = plt.subplots(figsize=(10, 1.4 + 0.55 * len(groups)), layout="constrained")
    _bars(panel, intervals, seeds, study)
    panel.set_xlabel(
        "loss before the first update minus the dense checkpoint's (nats per target token)"
    )
    data = {
        name: {"mean": i.mean, "half_width": i.half_width, "seeds": seeds[name]}
        for name, i in intervals.items()
        if i
    }
    return Picture(plots.png(figure), _finite(data))


def _finite(value: Any) -> Any:
    """NaN and infinity as None: they are no JSON."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def routing(run: Run) -> Picture | None:
    """Heat maps, experts (rows) against extra steps (columns), one per MoE layer and kind; None for
    dense runs.

    Experts that choose their tokens fill their capacity, so their load hardly varies; what the
    router prefers shows in its probability.
    """
    grids = {kind: run.vectors_over_time(kind) for kind in LOAD_KINDS}
    layers = sorted(grids["load"], key=plots.depth)
    if not layers:
        return None
    experts = grids["load"][layers[0]].values.shape[1]
    figure, panels = plt.subplots(
        len(layers),
        len(grids),
        figsize=(12, 0.9 + 2.1 * len(layers)),
        squeeze=False,
        layout="constrained",
        sharex=True,
    )
    scales = {
        kind: _around_one([curve.values * experts for curve in grid.values()])
        for kind, grid in grids.items()
    }
    data: dict[str, Any] = {}
    for row, layer in enumerate(layers):
        for column, (kind, grid) in enumerate(grids.items()):
            curve = grid[layer]
            panel, values = panels[row, column], curve.values.T * experts
            image = panel.imshow(
                values,
                cmap="cividis",
                vmin=scales[kind][0],
                vmax=scales[kind][1],
                aspect="auto",
                origin="lower",
            )
            steps = [int(step) - run.start_step for step in curve.steps]
            shown = range(0, len(steps), max(1, -(-len(steps) // 12)))
            panel.set_xticks(list(shown), [str(steps[i]) for i in shown])
            panel.set_yticks(range(0, experts, max(1, experts // 8)))
            panel.set_title(f"{layer}: {LOAD_KINDS[kind]}", fontsize=9)
            panel.set_ylabel("expert")
            if row == len(layers) - 1:
                figure.colorbar(
                    image, ax=panels[:, column].tolist(), label="1 = 1/E, an even split"
                )
            data[f"{layer}/{kind}"] = {
                "extra_steps": steps,
                "relative_to_even": np.round(curve.values * experts, 5).tolist(),
            }
    for panel in panels[-1]:
        panel.set_xlabel("extra training steps")
    return Picture(plots.png(figure), _finite(data))


def _around_one(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """A range with 1 in the middle that holds all values, and at least 0.9 to 1.1."""
    reach = max(
        [
            0.1,
            *(
                float(distance)
                for array in values
                for distance in np.abs(array - 1).ravel()
                if np.isfinite(distance)
            ),
        ]
    )
    return 1 - reach, 1 + reach


def similarity(study: Study) -> Picture | None:
    """Similarity of the experts of each MoE layer along training (`experts/<layer>/similarity`),
    mean over seeds; None without.
    """
    found: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for group in study.groups:
        rows = group.first.evaluations[group.first.tasks[0]]
        keys = [
            key
            for key in (rows[-1] if rows else {})
            if key.startswith("experts/") and key.endswith("/similarity")
        ]
        for key in keys:
            if not isinstance(rows[-1][key], list):
                found.setdefault(key.removeprefix("experts/").removesuffix("/similarity"), {})[
                    group.name
                ] = _mean_curve(group, key)
    if not found:
        return None
    layers = sorted(found, key=plots.depth)
    figure, panels = plt.subplots(
        1,
        len(layers),
        figsize=(1 + 3.6 * len(layers), 4.2),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    names = [group.name for group in study.groups]
    for panel, layer in zip(panels[0], layers, strict=True):
        for name, (steps, values) in found[layer].items():
            index = names.index(name)
            panel.plot(
                steps,
                values,
                marker=MARKERS[index % len(MARKERS)],
                markersize=4,
                label=name,
                **_style(index),
            )
        panel.set_title(layer, fontsize=10)
        panel.set_xlabel("extra training steps")
        panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("mean cosine similarity between experts (1 = copies)")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    data = {
        layer: {n: {"extra_steps": s.tolist(), "mean": v.tolist()} for n, (s, v) in by.items()}
        for layer, by in found.items()
    }
    return Picture(plots.png(figure), _finite(data))

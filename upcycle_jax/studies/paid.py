"""The first screen of a report: did upcycling pay, by how much, from when on, at what cost; in
words that the numbers decide, and in one figure.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from upcycle_jax.studies import plots
from upcycle_jax.studies.figures import Picture
from upcycle_jax.studies.intervals import Interval, mean_interval
from upcycle_jax.studies.plots import COLOURS, STYLES, plt
from upcycle_jax.studies.run_results import Run
from upcycle_jax.studies.study_results import Study, at_flops, at_steps

LOSS = "cross_ent_loss"
NAME = "paid"
CAPTION = (
    "Evaluation loss minus that of the baseline after as many extra steps on the same batches:"
    " below zero upcycling has paid. Lines: mean over the seeds; bands: 95 % interval of the paired"
    " difference. The ordinate is cut to the second half of training."
)
QUIET = 1.25
"""Load average per core up to which a machine counts as quiet: a lone run keeps its cores busy."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Runs of one kind against the baseline's, paired by seed.

    Attributes:
      name: of the runs.
      other: of the baseline.
      left: the runs, one per seed.
      right: the baseline's, in the order of the same seeds.
      load: load average of the machine and its cores, for runs that did not record them; None where
        nothing did.
    """

    name: str
    other: str
    left: tuple[Run, ...]
    right: tuple[Run, ...]
    load: tuple[float, int] | None = None

    @property
    def steps(self) -> int:
        """Extra steps that all have done."""
        return min(run.extra_steps for run in (*self.left, *self.right))

    @property
    def evaluated(self) -> list[int]:
        """Extra steps at which all were evaluated."""
        found = [
            {int(step) - run.start_step for step in run.curve(LOSS).steps}
            for run in (*self.left, *self.right)
        ]
        return sorted(step for step in set.intersection(*found) if step <= self.steps)

    def after(self, steps: float) -> Interval:
        """The difference of losses after so many extra steps."""
        value = at_steps(LOSS, steps)
        return mean_interval(
            value(a) - value(b) for a, b in zip(self.left, self.right, strict=True)
        )

    def at_equal_compute(self) -> Interval:
        """The difference at the extra FLOPs that all have spent."""
        budget = min(run.extra_steps * run.flops_per_step for run in (*self.left, *self.right))
        value = at_flops(LOSS, budget)
        return mean_interval(
            value(a) - value(b) for a, b in zip(self.left, self.right, strict=True)
        )

    @property
    def ahead_from(self) -> int | None:
        """Extra steps from which on the mean is below the baseline's at every evaluation; None
        where it is not at the last.
        """
        first = None
        for step in self.evaluated:
            if not self.after(step).mean < 0:
                first = None
            elif first is None:
                first = step
        return first


def pairs_of_study(study: Study) -> list[Pair]:
    """Every compared group that has a baseline, over the seeds that both have."""
    found = []
    for group in study.groups:
        other = study.baseline_of(group)
        seeds = [] if other is None else [seed for seed in group.runs if seed in other.runs]
        if other is not None and seeds:
            left, right = (tuple(one.runs[seed] for seed in seeds) for one in (group, other))
            found.append(Pair(group.name, other.name, left, right, _load(study)))
    return found


def _load(study: Study) -> tuple[float, int] | None:
    """Median load average while the sweep ran, and the machine's cores."""
    loads = [event["load"][0] for event in study.events if event["event"] == "load"]
    cores = [event["machine"]["cores"] for event in study.events if event.get("machine")]
    return (float(np.median(loads)), int(cores[-1])) if loads and cores else None


def words(pairs: Sequence[Pair]) -> str:
    """One line for each pair, the one that gains most first."""
    ranked = sorted(pairs, key=lambda pair: pair.after(pair.steps).mean)
    return "\n".join(f"* {sentence(pair)}" for pair in ranked)


def sentence(pair: Pair) -> str:
    """Did it pay, by how much, from when on, at what cost."""
    end, compute = pair.after(pair.steps), pair.at_equal_compute()
    seeds = f"{end.count} seeds" if end.count > 1 else "one seed, so no error bar"
    if np.isnan(end.mean):
        return f"**{pair.name}** against {pair.other}: a loss is no number."
    side = "below" if end.mean < 0 else "above"
    if end.count > 1 and not end.excludes_zero:
        verdict = "It cannot be told"
    else:
        verdict = "Yes" if end.mean < 0 else "No"
    half = f" ± {end.half_width:.4f}" if end.count > 1 else ""
    began = pair.ahead_from
    since = "behind at the last evaluation"
    if began is not None:
        since = f"ahead from step +{began:,} on" if began else "ahead from the start"
    where = "below" if compute.mean < 0 else "above"
    sure = "" if compute.count < 2 or compute.excludes_zero else " (not told apart from 0)"
    return (
        f"**{verdict}: {pair.name} ends {abs(end.mean):.4f}{half} {side} {pair.other}** after"
        f" {pair.steps:,} extra steps ({seeds}), {since}; at equal extra compute it is"
        f" {abs(compute.mean):.4f} {where}{sure}. {cost(pair)}"
    )


def cost(pair: Pair) -> str:
    """What a step costs, and the parameters; time only where the machine was quiet."""
    left, right = pair.left[0], pair.right[0]
    flops = left.flops_per_step / right.flops_per_step
    size = left.manifest["parameters"] / right.manifest["parameters"]
    time = time_words(pair.left, pair.right, pair.load)
    return (
        f"A step costs {flops:.2f}x the FLOPs{time}, and the model has {size:.1f}x the parameters."
    )


def time_words(
    left: Sequence[Run], right: Sequence[Run], load: tuple[float, int] | None = None
) -> str:
    """' and 1.20x the time' of two kinds of runs, or why that cannot be said; `load` is for runs
    that did not record it.
    """
    ratio = np.mean([run.seconds_per_step for run in left]) / np.mean(
        [run.seconds_per_step for run in right]
    )
    if np.isnan(ratio):
        return ""
    loads = [run.machine_load or load for run in (*left, *right)]
    if None in loads:
        return f" and {ratio:.2f}x the time (the machine's load was not recorded)"
    busiest = max((load for load in loads if load is not None), key=lambda load: load[0] / load[1])
    if busiest[0] > QUIET * busiest[1]:
        return (
            f" (times are not compared: the load average was {busiest[0]:.1f} on {busiest[1]}"
            " cores)"
        )
    return f" and {ratio:.2f}x the time"


def picture(pairs: Sequence[Pair]) -> Picture | None:
    """Differences to the baseline over the extra steps; None where nothing was evaluated twice."""
    pairs = [pair for pair in pairs if len(pair.evaluated) > 1]
    if not pairs:
        return None
    figure, panel = plt.subplots(figsize=(8, 4), constrained_layout=True)
    data, late = {}, []
    for index, pair in enumerate(pairs):
        steps = np.array(pair.evaluated)
        found = [pair.after(step) for step in steps]
        mean = np.array([one.mean for one in found])
        half = np.array([one.half_width if one.count > 1 else 0.0 for one in found])
        colour = COLOURS[index % len(COLOURS)]
        style = STYLES[index % len(STYLES)]
        panel.plot(steps, mean, color=colour, linestyle=style, linewidth=2.5, label=pair.name)
        panel.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
        second = steps >= steps[-1] / 2
        if pair.left[0].start_step:  # Runs from scratch start far away.
            late += [*mean[second], *(mean - half)[second], *(mean + half)[second]]
        finite = np.isfinite(half)
        data[pair.name] = {
            "extra_steps": steps.tolist(),
            "difference": [None if np.isnan(x) else float(x) for x in mean],
            "half_width": [float(h) if ok else None for h, ok in zip(half, finite, strict=True)],
        }
    finite_late = [value for value in (*late, 0.0) if np.isfinite(value)]
    low, high = min(finite_late), max(finite_late)
    room = 0.15 * max(high - low, 1e-6)
    panel.set_ylim(low - room, high + room)
    panel.axhline(0.0, color="black", linewidth=1)
    panel.set_xlabel("extra steps", fontsize=14)
    panel.set_ylabel(f"loss minus that of\n{pairs[0].other}", fontsize=14)
    panel.tick_params(labelsize=12)
    panel.legend(fontsize=11, frameon=False, loc="upper right")
    return Picture(plots.png(figure), data)

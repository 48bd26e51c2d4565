"""Plots of runs as PNG bytes. Colours are Okabe and Ito's, which stay apart for colour-blind
readers; line styles differ as well.
"""

import io
from collections.abc import Sequence

import matplotlib
import numpy as np

from upcycle_jax.models import layer_names
from upcycle_jax.studies.run_results import Run

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = ("-", "--", "-.", ":")
METRIC_LABELS = {
    "cross_ent_loss": "evaluation loss (nats per target token)",
    "accuracy": "token accuracy (fraction)",
}


def depth(layer: str) -> tuple[bool, int]:
    """Sorts 'encoder/layers_3' and the like as the signal passes them."""
    place = layer_names.split(layer)
    assert place is not None  # A metric of a layer carries the layer's path.
    return place.stack != "encoder", place.number


def png(figure: Figure) -> bytes:
    """The picture as a PNG, the same bytes for the same data."""
    buffer = io.BytesIO()
    # No creation date or version in the file.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def learning_curves(runs: Sequence[Run]) -> bytes:
    """Loss and accuracy of each run against its extra steps (left) and its extra training FLOPs
    (right).

    The ordinate is cut to the range of the runs that continue a checkpoint, so that a run from
    scratch, which starts far away, does not flatten them; where its curve enters from outside, the
    cut is visible.
    """
    figure, panels = plt.subplots(2, 2, figsize=(11, 7.5), sharey="row", constrained_layout=True)
    for row, metric in enumerate(METRIC_LABELS):
        in_view = []
        for index, run in enumerate(runs):
            curve = run.curve(metric)
            extra = curve.steps - run.start_step
            style = {
                "color": COLOURS[index % len(COLOURS)],
                "marker": MARKERS[index % len(MARKERS)],
                "linestyle": STYLES[index % len(STYLES)],
                "markersize": 4,
            }
            panels[row, 0].plot(extra, curve.values, label=run.name, **style)
            panels[row, 1].plot(
                extra * run.flops_per_step / 1e12, curve.values, label=run.name, **style
            )
            in_view += list(curve.values) if run.start_step else [curve.last]
        low, high = min(in_view), max(in_view)
        margin = 0.08 * (high - low or 1.0)
        panels[row, 0].set_ylim(low - margin, high + margin)
        panels[row, 0].set_ylabel(METRIC_LABELS[metric])
    for row in range(2):
        panels[row, 0].set_xlabel("extra training steps")
        panels[row, 1].set_xlabel("extra training compute (TFLOP, forward + backward)")
        for panel in panels[row]:
            panel.grid(alpha=0.3)
    panels[0, 0].legend()
    return png(figure)


def expert_load(run: Run, tasks: Sequence[str]) -> bytes | None:
    """Heat map of the share of dispatched tokens and of router probability per expert, by layer
    (rows) and domain (columns).

    Experts that choose their tokens fill their capacity, so their load hardly varies; what the
    router prefers shows in its mean probability. Both are drawn for every layer.

    Returns:
      The PNG, or None when the run has no MoE layer.
    """
    kinds = {"load": "share of dispatched tokens", "router_probability": "mean router probability"}
    grids = {kind: {task: run.last_vectors(kind, task) for task in tasks} for kind in kinds}
    layers = sorted(grids["load"][tasks[0]], key=depth)
    if not layers:
        return None
    num_experts = len(grids["load"][tasks[0]][layers[0]])
    figure, panels = plt.subplots(
        len(kinds),
        len(tasks),
        figsize=(1.5 + 4.6 * len(tasks), (1.5 + 0.4 * len(layers)) * len(kinds)),
        squeeze=False,
        constrained_layout=True,
    )
    for row, kind in enumerate(kinds):
        # Relative to an even split: 1 is 1/E of the tokens.
        values = {
            task: np.stack([grids[kind][task][layer] for layer in layers]) * num_experts
            for task in tasks
        }
        top = max(2.0, max(v.max() for v in values.values()))
        for column, task in enumerate(tasks):
            panel = panels[row, column]
            image = panel.imshow(values[task], cmap="cividis", vmin=0.0, vmax=top, aspect="auto")
            panel.set_xticks(range(num_experts))
            panel.set_yticks(range(len(layers)), layers if column == 0 else [""] * len(layers))
            panel.set_title(f"{task}\n{kinds[kind]}", fontsize=9)
            panel.set_xlabel("expert")
            for y in range(len(layers)):
                for x in range(num_experts if num_experts <= 16 else 0):
                    value = values[task][y, x]
                    panel.text(
                        x,
                        y,
                        f"{value:.2f}",
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="black" if value > 0.55 * top else "white",
                    )
        figure.colorbar(image, ax=panels[row].tolist(), label="1 = 1/E, an even split")
    return png(figure)

"""The comparison of several runs as one page: Markdown with PNGs beside it, and a self-contained
HTML file.
"""

import base64
import dataclasses
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import markdown
import markdown.treeprocessors
import numpy as np

from upcycle_jax import text
from upcycle_jax.studies import paid, plots
from upcycle_jax.studies.run_results import Run

NUM_BUDGETS = 5
FOLDED = (
    "Learning curves in numbers",
    "Routing over training",
    "Similarity of experts",
    "Every run",
    "How it was made",
)
"""Sections that a reader opens who wants them."""
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0"
    " 1rem}table{border-collapse:collapse;margin:1rem"
    " 0;display:block;overflow-x:auto}pre{overflow-x:auto}td,th{border:1px solid #bbb;padding:.3rem"
    " .7rem;text-align:right}td:first-child,th:first-child{text-align:left}img{max-width:100%}"
    "summary{cursor:pointer;margin:1rem 0}"
)


@dataclasses.dataclass(frozen=True)
class Report:
    """A rendered comparison.

    Attributes:
      markdown: the page; its images are named relative to it.
      images: PNG bytes by file name.
      summary: the first table alone, for a terminal.
      files: further text files beside the page, by name.
    """

    markdown: str
    images: dict[str, bytes]
    summary: str
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def write(self, folder: str | Path) -> tuple[Path, Path]:
        """Writes `report.md`, its PNGs and `report.html` (which embeds them).

        Returns:
          The paths of the Markdown and the HTML page.
        """
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        page = to_html(self.markdown)
        for name, data in self.images.items():
            (root / name).write_bytes(data)
            page = page.replace(
                f'src="{name}"', f'src="data:image/png;base64,{base64.b64encode(data).decode()}"'
            )
        for name, content in self.files.items():
            (root / name).write_text(content)
        (root / "report.md").write_text(self.markdown)
        title = html.escape(self.markdown.splitlines()[0].lstrip("# "))
        (root / "report.html").write_text(
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            f"<title>{title}</title><style>{STYLE}</style><body>{page}</body></html>\n"
        )
        return root / "report.md", root / "report.html"


class _NoForeignHtml(markdown.Extension):
    """Shows HTML in the text as text, and drops addresses that would run something.

    Names of runs, cells and tasks, titles and scales come from files and folders: none of them may
    become a script of the page.
    """

    def extendMarkdown(self, md: markdown.Markdown) -> None:
        md.preprocessors.deregister("html_block")
        md.inlinePatterns.deregister("html")
        md.treeprocessors.register(_PlainAddresses(md), "plain_addresses", 0)


class _PlainAddresses(markdown.treeprocessors.Treeprocessor):
    def run(self, root: Any) -> None:
        for element in root.iter():
            for name in ("href", "src"):
                scheme, colon, _ = element.get(name, "").partition(":")
                if colon and scheme.strip().lower() not in ("http", "https"):
                    del element.attrib[name]


def to_html(text: str) -> str:
    """A page's Markdown as HTML in which only the Markdown's own marks are elements; long sections
    are folded.
    """
    page = markdown.markdown(text, extensions=["tables", _NoForeignHtml()])
    first, *sections = re.split(r"(?=<h2>)", page)
    return "".join([first, *map(_folded, sections)])


def _folded(section: str) -> str:
    """A section that begins with its heading, folded where it is one of `FOLDED`."""
    heading, _, body = section.partition("</h2>")
    title = heading.removeprefix("<h2>")
    if title not in FOLDED:
        return section
    return f"<details><summary><b>{title}</b></summary>{body}</details>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column flush left, all others flush right."""
    return text.markdown(header, rows, right=range(1, len(header)))


def _number(value: float, digits: int = 4) -> str:
    return "-" if np.isnan(value) else f"{value:.{digits}f}"


def _summary_table(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        loss, accuracy = run.curve("cross_ent_loss"), run.curve("accuracy")
        rows.append(
            [
                run.name,
                f"step {run.start_step:,}" if run.start_step else "scratch",
                f"{run.manifest['parameters']:,}",
                f"{run.extra_steps:,}",
                f"{run.extra_steps * run.flops_per_step / 1e12:,.2f}",
                _number(loss.first),
                _number(loss.last),
                _number(accuracy.first),
                _number(accuracy.last),
                _number(run.seconds_per_step, 3),
                f"{run.extra_steps * run.seconds_per_step:,.0f}",
            ]
        )
    header = [
        "run",
        "starts from",
        "parameters",
        "extra steps",
        "extra TFLOP",
        "loss at start",
        "loss at end",
        "accuracy at start",
    ]
    return table([*header, "accuracy at end", "s/step", "training s"], rows)


def _by_steps(runs: Sequence[Run], metric: str) -> str:
    """The metric at every number of extra steps at which some run was evaluated."""
    curves = {run.name: run.curve(metric) for run in runs}
    extras = sorted({int(step) - run.start_step for run in runs for step in curves[run.name].steps})
    rows = [
        [f"{extra:,}", *(_number(curves[run.name].at(run.start_step + extra)) for run in runs)]
        for extra in extras
    ]
    return table(["extra steps", *(run.name for run in runs)], rows)


def _by_flops(runs: Sequence[Run], metric: str) -> str:
    """The metric at equal extra FLOPs, linear between a run's evaluations, up to the cheapest run's
    total.
    """
    curves = {run.name: run.curve(metric) for run in runs}
    most = min(run.extra_steps * run.flops_per_step for run in runs)
    rows = []
    for budget in np.linspace(0.0, most, NUM_BUDGETS + 1):
        cells = (
            _number(curves[run.name].at(run.start_step + budget / run.flops_per_step * (1 - 1e-12)))
            for run in runs
        )
        rows.append([f"{budget / 1e12:,.2f}", *cells])
    return table(["extra TFLOP", *(run.name for run in runs)], rows)


def _compared(difference: float) -> str:
    return f"{abs(difference):.4f} {'lower' if difference < 0 else 'higher'}"


def _findings(runs: Sequence[Run], dense: Run, upcycled: Run) -> str:
    """What came out, in words that the numbers decide."""
    sparse_loss, dense_loss = upcycled.curve("cross_ent_loss"), dense.curve("cross_ent_loss")
    drop = sparse_loss.first - dense_loss.first
    lines = [
        f"* Initial drop: before its first update **{upcycled.name}** has an evaluation loss of"
        f" {sparse_loss.first:.4f} against {dense_loss.first:.4f} of the dense checkpoint"
        f" ({drop:+.4f})."
    ]
    extra = min(dense.extra_steps, upcycled.extra_steps)
    budget = min(
        dense.extra_steps * dense.flops_per_step, upcycled.extra_steps * upcycled.flops_per_step
    ) * (1 - 1e-12)
    for other in runs:
        if other is upcycled:
            continue
        curve = other.curve("cross_ent_loss")
        steps = min(extra, other.extra_steps)
        at_steps = sparse_loss.at(upcycled.start_step + steps) - curve.at(other.start_step + steps)
        flops = min(budget, other.extra_steps * other.flops_per_step)
        at_flops = sparse_loss.at(upcycled.start_step + flops / upcycled.flops_per_step) - curve.at(
            other.start_step + flops / other.flops_per_step
        )
        lines.append(
            f"* Against **{other.name}**: after {steps:,} extra steps the loss of"
            f" **{upcycled.name}** is {_compared(at_steps)}; at equal extra compute"
            f" ({flops / 1e12:,.2f} TFLOP) it is {_compared(at_flops)}."
        )
    flops_ratio = upcycled.flops_per_step / dense.flops_per_step
    lines.append(
        f"* A step of **{upcycled.name}** costs {flops_ratio:.2f}x the FLOPs"
        f"{paid.time_words([upcycled], [dense])} of a step of **{dense.name}**."
    )
    return "\n".join(lines)


def compare(runs: Sequence[Run], *, dense: str, upcycled: str, title: str, scale: str) -> Report:
    """Compares runs that were evaluated on the same tasks.

    Args:
      runs: the runs, in the order of the tables.
      dense: name of the dense continuation among them.
      upcycled: name of the upcycled run among them; its expert load is drawn.
      title: heading of the page.
      scale: one sentence that says at which scale, on which data and hardware this was measured.

    Raises:
      ValueError: a name is not among the runs, or the runs were evaluated on different tasks.
    """
    by_name = {run.name: run for run in runs}
    for name in (dense, upcycled):
        if name not in by_name:
            raise ValueError(f"no run is called {name!r}; the runs are {list(by_name)}")
    for run in runs:
        if run.tasks != runs[0].tasks:
            raise ValueError(
                f"runs {runs[0].name!r} and {run.name!r} were evaluated on different tasks:"
                f" {runs[0].tasks} and {run.tasks}"
            )
    images = {"learning_curves.png": plots.learning_curves(runs)}
    load = plots.expert_load(by_name[upcycled], by_name[upcycled].tasks)
    if load is not None:
        images["expert_load.png"] = load
    summary = _summary_table(runs)
    sparse = by_name[upcycled]
    pairs = [paid.Pair(upcycled, one.name, (sparse,), (one,)) for one in runs if one is not sparse]
    first = paid.picture([pair for pair in pairs if pair.other == dense])
    if first is not None:
        images[f"{paid.NAME}.png"] = first.png
    sections = [
        f"# {title}",
        "## Did it pay?",
        "\n".join(f"* {paid.sentence(pair)}" for pair in pairs),
        *([f"![{paid.CAPTION}]({paid.NAME}.png)", f"*{paid.CAPTION}*"] if first else []),
        "## What this is",
        scale,
        "Losses (cross entropy, nats per target token) and accuracies are unweighted means over the"
        " evaluation tasks ("
        + ", ".join(f"`{task}`" for task in runs[0].tasks)
        + "), teacher-forced. One seed: differences carry no error bar, so they are those of these"
        " runs and no claim about others.",
        "Each run's settings are in `config.gin` of its MODEL_DIR, which can be given as"
        " `--gin_file` again.",
        "## Summary",
        summary,
        "## What came out",
        _findings(runs, by_name[dense], sparse),
        "## Learning curves",
        (
            "![Evaluation loss and token accuracy against extra steps and extra"
            " compute](learning_curves.png)"
        ),
        "## Learning curves in numbers",
        "### Evaluation loss against extra steps",
        _by_steps(runs, "cross_ent_loss"),
        "### Token accuracy against extra steps",
        _by_steps(runs, "accuracy"),
        "### Evaluation loss against extra compute",
        (
            "Linear between evaluations; FLOPs are the model's own (matrix products, forward and"
            " backward)."
        ),
        _by_flops(runs, "cross_ent_loss"),
        "### Token accuracy against extra compute",
        _by_flops(runs, "accuracy"),
    ]
    if load is not None:
        sections += [
            f"## Expert load of {upcycled} at its last evaluation",
            "![Expert load per layer and domain](expert_load.png)",
        ]
    return Report("\n\n".join(sections) + "\n", images, summary)

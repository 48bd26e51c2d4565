"""One page of tables and plots: of a study that sweep ran, or of named runs.

Examples:

    python -m upcycle_jax.report --sweep=runs/capacity_factor \\
        --output_dir=runs/capacity_factor/report
    python -m upcycle_jax.report --sweep=runs/capacity_factor \\
        --store=results/capacity_factor --output_dir=results/capacity_factor/report
    python -m upcycle_jax.report --run=dense=runs/dense --run=upcycled=runs/upcycled \\
        --dense=dense --upcycled=upcycled --output_dir=report

Writes report.md, report.html (with its images inside) and the images. --store copies what the
report of a study needs, without checkpoints, and makes the report from that copy.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from upcycle_jax.printing import printable_lines, show

if TYPE_CHECKING:
    from upcycle_jax.studies.page import Report


def _named_dir(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=MODEL_DIR")
    return name, path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m upcycle_jax.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output_dir", required=True, help="folder for report.md, report.html and the PNGs"
    )
    study = parser.add_argument_group("a study")
    study.add_argument(
        "--sweep",
        metavar="DIR",
        help="the folder of a sweep, finished or not, or what --store made of it",
    )
    study.add_argument(
        "--store",
        metavar="DIR",
        help="copy plans, manifests and metrics of --sweep to this folder first",
    )
    runs = parser.add_argument_group("named runs")
    runs.add_argument(
        "--run",
        type=_named_dir,
        action="append",
        default=[],
        metavar="NAME=MODEL_DIR",
        help="a run; repeat for each",
    )
    runs.add_argument("--dense", help="name of the dense continuation among the runs")
    runs.add_argument("--upcycled", help="name of the upcycled run among the runs")
    runs.add_argument(
        "--title",
        default="Dense continuation, upcycled and from-scratch MoE compared",
        help="heading of the page",
    )
    runs.add_argument(
        "--scale",
        default="",
        help="one sentence on scale, data and hardware, printed under the heading",
    )
    return parser


def _of_runs(arguments: argparse.Namespace) -> "Report":
    from upcycle_jax.studies.page import compare
    from upcycle_jax.studies.run_results import Run

    runs = [Run.load(name, path) for name, path in arguments.run]
    return compare(
        runs,
        dense=arguments.dense,
        upcycled=arguments.upcycled,
        title=arguments.title,
        scale=arguments.scale,
    )


def _of_study(arguments: argparse.Namespace) -> "Report":
    from upcycle_jax.studies import study_page, study_results

    folder = (
        study_results.store(arguments.sweep, arguments.store)
        if arguments.store
        else arguments.sweep
    )
    return study_page.report(study_results.Study.load(folder))


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page, prints the summary table, and returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if bool(arguments.sweep) == bool(arguments.run):
        parser.error(
            "give either --sweep=DIR, or --run=NAME=MODEL_DIR for each run with --dense and"
            " --upcycled"
        )
    if arguments.run and not (arguments.dense and arguments.upcycled):
        parser.error("--run needs --dense=NAME and --upcycled=NAME")
    if arguments.store and not arguments.sweep:
        parser.error("--store goes with --sweep")
    try:
        report = _of_study(arguments) if arguments.sweep else _of_runs(arguments)
    except (FileNotFoundError, ValueError) as error:
        print(f"report: {printable_lines(error)}", file=sys.stderr)
        return 1
    pages = report.write(arguments.output_dir)
    show(report.summary)
    show("\n".join(["", *(f"wrote {path}" for path in pages)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

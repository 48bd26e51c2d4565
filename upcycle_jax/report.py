"""Compares finished runs: `python -m upcycle_jax.report --run NAME=MODEL_DIR ... --dense NAME --upcycled NAME --output_dir DIR`."""

import argparse
import sys
from collections.abc import Sequence


def _named_dir(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=MODEL_DIR")
    return name, path


def main(argv: Sequence[str] | None = None) -> int:
    """Writes `report.md`, `report.html` and the plots, prints the summary table, and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m upcycle_jax.report", description="Compare runs in one page of tables and plots.")
    parser.add_argument("--run", type=_named_dir, action="append", required=True, metavar="NAME=MODEL_DIR", help="a run; repeat for each")
    parser.add_argument("--dense", required=True, help="name of the dense continuation among the runs")
    parser.add_argument("--upcycled", required=True, help="name of the upcycled run among the runs")
    parser.add_argument("--output_dir", required=True, help="folder for report.md, report.html and the PNGs")
    parser.add_argument("--title", default="Dense continuation, upcycled and from-scratch MoE compared", help="heading of the page")
    parser.add_argument("--scale", default="", help="one sentence on scale, data and hardware, printed under the heading")
    arguments = parser.parse_args(argv)

    from upcycle_jax.experiments.report import compare
    from upcycle_jax.experiments.results import Run

    try:
        runs = [Run.load(name, path) for name, path in arguments.run]
        report = compare(runs, dense=arguments.dense, upcycled=arguments.upcycled, title=arguments.title, scale=arguments.scale)
    except (FileNotFoundError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    pages = report.write(arguments.output_dir)
    print(report.summary)
    print("\n".join(["", *(f"wrote {path}" for path in pages)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Shows tables and figures of the sparse-upcycling paper as data beside this project's results, and
the commands for what is missing.

Examples:

    python -m upcycle_jax.paper list
    python -m upcycle_jax.paper table1
    python -m upcycle_jax.paper figure2 --results=/data/runs --format=markdown
    python -m upcycle_jax.paper findings
    python -m upcycle_jax.paper figure13 figure15 --checkpoint=/data/runs/vit --output_dir=drop

Each number of the paper says how it is known: printed, read off a figure's image, or estimated by
eye. Runs are found below the results folder by what their manifests say: those of the paper's
models on its data (C4, JFT-300M) stand beside the paper's values, with the mean and the 95 %
interval over seeds; runs at other scales are compared by their gain over the dense continuation.
With --checkpoint, figures 13 and 15 are computed from a dense vision transformer as it is upcycled,
without training. Its MODEL_DIR names model and images; for other formats give a model file and
runs/initial_drop.gin.
"""

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from upcycle_jax.config.flags import plain_words
from upcycle_jax.papers import drop_flags
from upcycle_jax.printing import printable_lines, show

if TYPE_CHECKING:
    from upcycle_jax.models.base import ModelConfig


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m upcycle_jax.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "exhibit",
        nargs="+",
        metavar="TABLE|FIGURE",
        help="'list', 'all', 'findings', or names such as table1, figure2, b7",
    )
    parser.add_argument(
        "--results",
        metavar="DIR",
        help="folder with MODEL_DIRs, at any depth; of 'findings': with stored studies (default"
        " results/findings)",
    )
    parser.add_argument(
        "--format", choices=("text", "markdown", "json"), default="text", help="default text"
    )
    parser.add_argument(
        "--runs_dir",
        metavar="DIR",
        help="where the printed commands put runs (default: --results, else results/paper)",
    )
    parser.add_argument(
        "--dense_checkpoints",
        metavar="DIR",
        default="/data/dense",
        help=(
            "where the printed commands find t5_1_1_<size>/checkpoint_1000000 and"
            " vit_<size>/checkpoint_<step> (default /data/dense)"
        ),
    )
    drop_flags.add(parser)
    return parser


@functools.cache
def _load_config(gin_file: str) -> "ModelConfig":
    from upcycle_jax import config

    return config.load([gin_file]).macro("MODEL").config


def _findings(folder: str, style: str) -> int:
    """Prints every claim of the paper with what the studies stored in `folder` say to it."""
    from upcycle_jax.papers import findings, findings_text
    from upcycle_jax.text import Format, json_text

    try:
        found = findings.findings(folder)
    except ValueError as error:
        print(f"upcycle_jax.paper: error: {printable_lines(error)}", file=sys.stderr)
        return 2
    if Format(style) == Format.JSON:
        print(json_text(findings_text.as_json(found, folder)))
    else:
        show(findings_text.render(found, folder, Format(style)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the exhibits and returns the exit code: 1 where a size of table 1 differs from the
    printed one or an upcycled model that must equal the dense one does not, 2 for bad input.
    """
    arguments = _parser().parse_args(plain_words(sys.argv[1:] if argv is None else argv))
    if arguments.checkpoint is None:
        # Only shapes are computed: do not take hold of an accelerator.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if arguments.exhibit == ["findings"]:
        return _findings(arguments.results or "results/findings", arguments.format)

    from upcycle_jax.papers import exhibits
    from upcycle_jax.papers.command_lines import Places
    from upcycle_jax.papers.compare import compare
    from upcycle_jax.papers.render import as_json, render
    from upcycle_jax.text import Format, Table, json_text

    style = Format(arguments.format)
    try:
        if arguments.exhibit == ["list"]:
            rows = exhibits.listing(list(exhibits.exhibits().values()))
            header = ("name", "shows", "numbers known")
            listed = [dict(zip(header, row, strict=True)) for row in rows]
            print(
                json_text(listed)
                if style == Format.JSON
                else Table(exhibits.PAPER, header, rows).render(style)
            )
            return 0
        names = list(exhibits.exhibits()) if arguments.exhibit == ["all"] else arguments.exhibit
        chosen = [exhibits.exhibit(name) for name in names]
        places = Places(
            arguments.runs_dir or arguments.results or Places.results, arguments.dense_checkpoints
        )
        drops = drop_flags.measured(arguments, [one.name for one in chosen])
        found = [
            compare(
                one,
                results=arguments.results,
                load_config=_load_config,
                places=places,
                drops=drops.get(one.name),
            )
            for one in chosen
        ]
        for one in found if arguments.output_dir else ():
            drop_flags.write(arguments.output_dir, one)
    except (ValueError, FileNotFoundError) as error:
        print(f"upcycle_jax.paper: error: {printable_lines(error)}", file=sys.stderr)
        return 2
    if style == Format.JSON:
        print(json_text([as_json(one) for one in found] if len(found) > 1 else as_json(found[0])))
    else:
        show("\n\n".join(render(one, style).rstrip() for one in found))
    differs = any(row.equal is False for one in found for row in one.sizes)
    return 1 if differs or any(not one.drops_hold for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())

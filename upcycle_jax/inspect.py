"""Shows what a checkpoint of any supported format contains: format, step, tree, shapes, dtypes,
parameters, optimizer slots.

Examples:

    python -m upcycle_jax.inspect /runs/t5_base             # a MODEL_DIR: its latest finished step
    python -m upcycle_jax.inspect /runs/t5_base/checkpoint_1000 --match 'layers_0/mlp'
    python -m upcycle_jax.inspect ~/flan-t5-small --json > leaves.json

No array is read, and nothing is written.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence

from upcycle_jax.printing import printable_lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m upcycle_jax.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "path",
        help=(
            "checkpoint_<step>, MODEL_DIR, legacy T5X folder or msgpack file, Hugging Face folder,"
            " or GGUF file"
        ),
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--match",
        metavar="REGEX",
        type=regular_expression,
        help="list only the leaves whose path contains a match",
    )
    return parser


def regular_expression(text: str) -> str:
    """`text` itself, where it is a regular expression.

    Raises:
      argparse.ArgumentTypeError: it is none.
    """
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no regular expression ({error}); write a backslash before a character"
            " that is meant literally"
        ) from None
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; 2 when the path cannot be read."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault(
        "JAX_PLATFORMS", "cpu"
    )  # Only files are read: do not take hold of an accelerator.
    from upcycle_jax.checkpoints.formats import open_checkpoint
    from upcycle_jax.checkpoints.summary import summarize

    try:
        summary = summarize(open_checkpoint(arguments.path))
    except (ValueError, OSError) as error:
        print(f"inspect: {printable_lines(error)}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(summary.json(arguments.match), indent=1))
    else:
        sys.stdout.write(summary.text(arguments.match))
    return 0


if __name__ == "__main__":
    sys.exit(main())

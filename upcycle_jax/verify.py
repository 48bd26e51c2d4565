"""Checks a converted checkpoint against its source: every leaf from disk, then both models on the
same tokens.

Examples:

    python -m upcycle_jax.verify /data/sparse/checkpoint_1000000
    python -m upcycle_jax.verify --gin_file=gin_configs/models/t5_1_1_base_upcycled.gin \\
        --gin_file=gin_configs/runs/upcycle.gin \\
        --gin.INITIAL_CHECKPOINT_PATH="'/data/dense/checkpoint_1000000'" \\
        --gin.OUTPUT_CHECKPOINT_PATH="'/data/sparse/checkpoint_1000000'"

A path alone is enough: the checkpoint records its source, recipe and model. Where the source is
gone, the result is proved against the checksums that were recorded at the conversion. With gin
files, the bindings of `upcycle` apply; the recorded recipe is used even then, and a configured one
that differs is reported. Damage is reported by side: source, result or record. Exit status: 0 when
the proof holds, 1 when it does not, 2 when it could not be tried.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from upcycle_jax.config import command
from upcycle_jax.config.flags import Flags

if TYPE_CHECKING:
    from upcycle_jax.config import Config


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        nargs="?",
        help="a converted checkpoint, instead of OUTPUT_CHECKPOINT_PATH: its source, recipe and"
        " model are those that it records, unless bindings say otherwise",
    )
    command.add_max_memory(parser)


def _run(flags: Flags, loaded: "Config") -> int:
    from upcycle_jax.models.base import Model

    given = command.given_to_conversion(flags, loaded, Model)
    if flags.extra.path is not None:
        given["output_checkpoint_path"] = flags.extra.path
    built = loaded.build("verify", **given)
    command.say_unused(loaded, name="verify", other_functions=("upcycle",))
    return 0 if built().run().ok else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return command.run("verify", argv, description=__doc__ or "", body=_run, extra=_add_flags)


if __name__ == "__main__":
    sys.exit(main())

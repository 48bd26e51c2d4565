"""Converts a checkpoint: dense to sparse, several dense parents to one sparse model, shallow to
deep, or sparse back to dense.

Example:

    python -m upcycle_jax.upcycle --gin_file=gin_configs/models/t5_1_1_base_upcycled.gin \\
        --gin_file=gin_configs/runs/upcycle.gin \\
        --gin.INITIAL_CHECKPOINT_PATH="'/data/dense/checkpoint_1000000'" \\
        --gin.OUTPUT_CHECKPOINT_PATH="'/data/sparse/checkpoint_1000000'"

Prints the plan before and the proof after. Without a model file the target is the source's own T5
shape with the paper's MoE layers. Exit status: 0 when the proof holds, 1 when it does not, 2 when
the conversion was refused or could not be written.
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
        "--materialize",
        action="store_true",
        help="write every byte: the result shares no file with the source",
    )
    parser.add_argument(
        "--all_leaves",
        action="store_true",
        help="show every leaf of the plan, not one line for all layers; plan.json always has them",
    )
    command.add_max_memory(parser)


def _run(flags: Flags, loaded: "Config") -> int:
    from upcycle_jax.models.base import Model

    given = command.given_to_conversion(flags, loaded, Model)
    if flags.extra.materialize:
        given["materialize"] = True
    built = loaded.build("upcycle", **given)
    command.say_unused(loaded, name="upcycle", other_functions=("verify",))
    try:
        return 0 if built().run(dry_run=flags.dry_run, all_leaves=flags.extra.all_leaves).ok else 1
    except FileNotFoundError:
        raise
    except OSError as error:
        where = (
            f"{error.filename}: {error.strerror}. What is finished is kept: put this right and run"
            " the same command again"
        )
        print(
            f"upcycle_jax.upcycle: error: {where if error.filename and error.strerror else error}",
            file=sys.stderr,
        )
        return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    os.environ.setdefault(
        "JAX_PLATFORMS", "cpu"
    )  # the work is on files: do not take hold of an accelerator
    return command.run("upcycle", argv, description=__doc__ or "", body=_run, extra=_add_flags)


if __name__ == "__main__":
    sys.exit(main())

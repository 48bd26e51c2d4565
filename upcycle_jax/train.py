"""Trains a model: from scratch, from a checkpoint, or from a dense checkpoint that is upcycled
while it is restored.

Examples:

    python -m upcycle_jax.train --gin_file=models/t5_1_1_tiny.gin --gin_file=runs/pretrain.gin \\
        --gin.MIXTURE_OR_TASK_NAME="'embedded_text_span_corruption'" \\
        --gin.MODEL_DIR="'/tmp/tiny'" --gin.TRAIN_STEPS=200 --gin.BATCH_SIZE=8

Started again, the command goes on from the latest checkpoint in MODEL_DIR; while another training
is at work there it is refused, with exit code 2. SIGTERM and SIGINT save
a checkpoint after the current step and end the run with exit code 0, or with the code in the
environment variable UPCYCLE_JAX_INTERRUPTED_CODE, from which launchers and schedulers see that the
run wants to be started again. --dry_run prints what the run would do and writes nothing.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from upcycle_jax.config import command
from upcycle_jax.config.flags import Flags

if TYPE_CHECKING:
    from upcycle_jax.config import Config

INTERRUPTED_CODE_VARIABLE = "UPCYCLE_JAX_INTERRUPTED_CODE"


def _run(flags: Flags, loaded: "Config") -> int:
    if loaded.has_macro("TOPOLOGY"):
        print(
            f"this configuration was made for the topology {loaded.macro('TOPOLOGY')}",
            file=sys.stderr,
        )
    result = command.call("train", flags, loaded, name="train")
    return int(os.environ.get(INTERRUPTED_CODE_VARIABLE, 0)) if result.interrupted else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return command.run("train", argv, description=__doc__ or "", body=_run)


if __name__ == "__main__":
    sys.exit(main())

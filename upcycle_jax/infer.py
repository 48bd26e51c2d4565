"""Writes predictions or scores of a checkpoint for the examples of a task or mixture.

Example:

    python -m upcycle_jax.infer --gin_file=models/t5_1_1_tiny.gin --gin_file=runs/infer.gin \\
        --gin.MIXTURE_OR_TASK_NAME="'embedded_text_span_corruption'" \\
        --gin.CHECKPOINT_PATH="'/tmp/tiny'" --gin.INFER_OUTPUT_DIR="'/tmp/tiny/predictions'" \\
        --gin.NUM_EXAMPLES=16 --gin.BATCH_SIZE=8 \\
        --gin.TASK_FEATURE_LENGTHS="{'inputs': 512, 'targets': 114}"

Started again after an interruption, the same command goes on from the last finished chunk.
--dry_run says what would be done.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from upcycle_jax.config import command
from upcycle_jax.config.flags import Flags

if TYPE_CHECKING:
    from upcycle_jax.config import Config


def _run(flags: Flags, loaded: "Config") -> int:
    result = command.call("infer", flags, loaded, name="infer")
    for path in result.files.values() if command.is_first() else ():
        print(path)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return command.run("infer", argv, description=__doc__ or "", body=_run)


if __name__ == "__main__":
    sys.exit(main())

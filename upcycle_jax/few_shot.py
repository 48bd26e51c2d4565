"""Evaluates the features of a vision transformer: classes that were not trained on are told apart
by a few images of each, with least squares (10-shot accuracy, 5 seeds).

Example:

    python -m upcycle_jax.few_shot --gin_file=models/vit_tiny.gin --gin_file=runs/few_shot.gin \\
        --gin.NUM_CLASSES=200 --gin.VitConfig.channels=1 \\
        --gin.CHECKPOINT_PATH="'/tmp/vit'" --gin.EVAL_OUTPUT_DIR="'/tmp/vit'"

The result is printed, one line per step, and written to EVAL_OUTPUT_DIR/few_shot. --dry_run says
what would be done.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from upcycle_jax.config import command
from upcycle_jax.config.flags import Flags
from upcycle_jax.inference.json_lines import json_line

if TYPE_CHECKING:
    from upcycle_jax.config import Config


def _run(flags: Flags, loaded: "Config") -> int:
    results = command.call("few_shot", flags, loaded, name="few_shot")
    for result in results.values() if command.is_first() else ():
        print(json_line(result))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return command.run("few_shot", argv, description=__doc__ or "", body=_run)


if __name__ == "__main__":
    sys.exit(main())

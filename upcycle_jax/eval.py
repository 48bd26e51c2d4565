"""Evaluates one, several or all checkpoints of a run: teacher-forced metrics, and the tasks' own
metrics of predictions and scores.

Example:

    python -m upcycle_jax.eval --gin_file=models/t5_1_1_tiny.gin --gin_file=runs/eval.gin \\
        --gin.MIXTURE_OR_TASK_NAME="'embedded_text_span_corruption'" \\
        --gin.CHECKPOINT_PATH="'/tmp/tiny'" --gin.EVAL_OUTPUT_DIR="'/tmp/tiny'" \\
        --gin.CHECKPOINT_STEPS="'all'" --gin.BATCH_SIZE=8 \\
        --gin.TASK_FEATURE_LENGTHS="{'inputs': 512, 'targets': 114}"

Metrics are printed, one line per step and task, and written to EVAL_OUTPUT_DIR/inference_eval.
--dry_run says what would be done.
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
    metrics = command.call("evaluate", flags, loaded, name="eval")
    for step, tasks in metrics.items() if command.is_first() else ():
        for task, values in tasks.items():
            numbers = {
                name: round(float(value), 6)
                for name, value in values.items()
                if getattr(value, "ndim", 0) == 0
            }
            print(json_line({"step": step, "task": task, **numbers}))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return command.run("eval", argv, description=__doc__ or "", body=_run)


if __name__ == "__main__":
    sys.exit(main())

"""Prints a model's parameters, axes and partition specs, and their number, without allocating anything.

Example:

    python -m upcycle_jax.model_info --gin_file=gin_configs/models/t5_1_1_base.gin

The gin files must define the macro MODEL. Partitioner bindings, where there are any, decide the partition specs.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from upcycle_jax.config import command
from upcycle_jax.config.flags import Flags

if TYPE_CHECKING:
    from upcycle_jax.config import Config


def _run(flags: Flags, loaded: "Config") -> int:
    from upcycle_jax.models import info

    model = loaded.macro("MODEL")
    text = info.model_info(model.param_specs(), partitioner=loaded.build("Partitioner")())
    sys.stdout.write(text)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # only shapes are computed: do not take hold of an accelerator
    return command.run("model_info", argv, description=__doc__ or "", body=_run)


if __name__ == "__main__":
    sys.exit(main())

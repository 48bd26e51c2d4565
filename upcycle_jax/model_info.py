"""Prints a model's parameters, axes and partition specs, their number and what they cost, without
allocating anything.

Example:

    python -m upcycle_jax.model_info --gin_file=gin_configs/models/t5_1_1_base.gin

The gin files must define the macro MODEL. Partitioner bindings, where there are any, decide the
partition specs; BATCH_SIZE and TASK_FEATURE_LENGTHS the batch of which FLOPs per token are told (64
rows of 512 + 128 tokens without them).
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from upcycle_jax import checks
from upcycle_jax.config import command, registry
from upcycle_jax.config.flags import Flags

if TYPE_CHECKING:
    from upcycle_jax.config import Config


def _run(flags: Flags, loaded: "Config") -> int:
    from upcycle_jax.costs import model_info
    from upcycle_jax.data import DatasetConfig
    from upcycle_jax.models.base import Model

    model = loaded.macro("MODEL", Model)
    partitioner = loaded.build("Partitioner")()
    lengths_kind = checks.annotations_of(DatasetConfig)["task_feature_lengths"]
    batch_size, lengths = (
        loaded.macro(name, kind) if loaded.has_macro(name) else None
        for name, kind in (("BATCH_SIZE", checks.Size), ("TASK_FEATURE_LENGTHS", lengths_kind))
    )
    text = model_info.model_info(model.param_specs(), partitioner=partitioner)
    lines = model_info.cost_lines(model, partitioner, batch_size=batch_size, lengths=lengths)
    command.say_unused(loaded, name="model_info", other_functions=registry.FUNCTIONS)
    sys.stdout.write(text + "".join(f"{line}\n" for line in lines))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    os.environ.setdefault(
        "JAX_PLATFORMS", "cpu"
    )  # only shapes are computed: do not take hold of an accelerator
    return command.run("model_info", argv, description=__doc__ or "", body=_run)


if __name__ == "__main__":
    sys.exit(main())

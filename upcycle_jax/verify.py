"""Checks a converted checkpoint against its source: every leaf from disk, then both models on the
same tokens.

Example:

    python -m upcycle_jax.verify --gin_file=gin_configs/models/t5_1_1_base_upcycled.gin --gin_file=gin_configs/runs/upcycle.gin \\
        --gin.INITIAL_CHECKPOINT_PATH="'/data/dense/checkpoint_1000000'" --gin.OUTPUT_CHECKPOINT_PATH="'/data/sparse/checkpoint_1000000'"

Takes the bindings of `upcycle`. The recipe is the one that the result records, or the configured
one where it records none. Exit status: 0 when the proof holds, 1 when it does not, 2 when it could
not be tried.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from upcycle_jax.config import command
from upcycle_jax.config.flags import Flags

if TYPE_CHECKING:
    from upcycle_jax.config import Config
    from upcycle_jax.surgery.proof import Proof

PathOrPaths = str | Sequence[str]


def verify(
    *,
    initial_checkpoint_path: PathOrPaths,
    output_checkpoint_path: str,
    model: Any = None,
    moe: Any = None,
    optimizer: Any = None,
    recipe: Any = None,
    max_memory: int = 2 << 30,
    function_check: str = "auto",
    function_check_dataset: Any = None,
    proof_directory: str | None = None,
    report: Any = print,
) -> "Proof":
    """Proves a result.

    Args:
      initial_checkpoint_path: the source; a list for several dense parents.
      output_checkpoint_path: the result.
      model: the target model; None: the source's T5 shape with `moe`.
      moe: MoE layers of an inferred model; None: the paper's.
      optimizer: whose state the result should hold; None: the state that it holds is taken as it
        is, its slots zero or carried over.
      recipe: used where the result records none; None: the paper's for language.
      max_memory: limit for `function_check='auto'`, in bytes.
      function_check: 'auto', 'on' or 'off'.
      function_check_dataset: a `DatasetConfig` whose first batch is used; None: random tokens.
      proof_directory: where to write `proof.json`; None: nowhere, the checkpoints are only read.
      report: is given every line for people.

    Raises:
      FileNotFoundError: a checkpoint is not there.
      ValueError: the source does not fit the target.
    """
    from upcycle_jax import surgery
    from upcycle_jax.checkpoints import open_checkpoint
    from upcycle_jax.surgery import conversion, infer
    from upcycle_jax.training.train_state import STEP, TARGET, state_specs
    from upcycle_jax.upcycle import first_batch, inferred_model

    source, target = (
        conversion.open_sources(initial_checkpoint_path),
        open_checkpoint(output_checkpoint_path),
    )
    recipe = conversion.recorded_recipe(target) or recipe or surgery.Recipe()
    model = model if model is not None else inferred_model(infer, source, moe)
    found = target.specs()
    if optimizer is not None:
        specs = state_specs(model, optimizer)
    else:
        specs = {f"{TARGET}{path}": spec for path, spec in model.param_specs().items()}
        specs |= {path: spec for path, spec in found.items() if not path.startswith(TARGET)}
    if STEP not in specs and STEP in found:
        specs[STEP] = found[STEP]
    plan = surgery.make_plan(source.specs(), specs, recipe)
    proof = conversion.verify(
        plan,
        source,
        target,
        model=model,
        check=function_check,
        max_memory=max_memory,
        tokens=first_batch(function_check_dataset if function_check != "off" else None, model),
        report=report,
    )
    if proof_directory is not None:
        proof.write(proof_directory)
    return proof


def _run(flags: Flags, loaded: "Config") -> int:
    given = {"model": loaded.macro("MODEL")} if loaded.has_macro("MODEL") else {}
    return 0 if loaded.build("verify", **given)().ok else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return command.run("verify", argv, description=__doc__ or "", body=_run)


if __name__ == "__main__":
    sys.exit(main())

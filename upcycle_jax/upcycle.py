"""Converts a checkpoint: dense to sparse, several dense parents to one sparse model, shallow to
deep, or sparse back to dense.

Example:

    python -m upcycle_jax.upcycle --gin_file=gin_configs/models/t5_1_1_base_upcycled.gin --gin_file=gin_configs/runs/upcycle.gin \\
        --gin.INITIAL_CHECKPOINT_PATH="'/data/dense/checkpoint_1000000'" --gin.OUTPUT_CHECKPOINT_PATH="'/data/sparse/checkpoint_1000000'"

Prints the plan before and the proof after. Without a model file the target is the source's own T5
shape with the paper's MoE layers. Exit status: 0 when the proof holds, 1 when it does not, 2 when
the conversion was refused or could not be written.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from upcycle_jax import byte_sizes, checks
from upcycle_jax.config import command
from upcycle_jax.config.flags import Flags
from upcycle_jax.printing import show

if TYPE_CHECKING:
    from upcycle_jax.config import Config
    from upcycle_jax.surgery.convert_and_prove import Conversion

PathOrPaths = checks.PathText | Sequence[checks.PathText]


def upcycle(
    *,
    initial_checkpoint_path: PathOrPaths,
    output_checkpoint_path: checks.PathText,
    model: checks.Model | None = None,
    moe: checks.Moe | None = None,
    optimizer: checks.Optimizer | None = None,
    recipe: checks.Recipe | None = None,
    source_model: checks.Model | None = None,
    max_memory: checks.Bytes = 2 << 30,
    materialize: bool = False,
    function_check: Literal["auto", "on", "off"] = "auto",
    function_check_dataset: checks.Dataset | None = None,
    dry_run: bool = False,
    report: Any = show,
) -> "Conversion":
    """Converts a checkpoint on disk; see `surgery.convert_and_prove.convert`.

    Args:
      initial_checkpoint_path: the source, in any readable format; a list for several dense parents.
      output_checkpoint_path: folder of the result, which must not exist.
      model: the target model; None: the source's T5 shape with `moe`.
      moe: MoE layers of an inferred model; None: the paper's.
      optimizer: whose state the result holds; None: no optimizer state.
      recipe: None: the paper's for language.
      source_model: the sparse source's model, needed to measure the weights of
        `MergeRecipe(how='weighted')` where none are given.
      max_memory: bytes of arrays to hold at a time, or a size such as '2GiB'.
      materialize: write every byte, sharing no file with the source.
      function_check: 'auto', 'on' or 'off'.
      function_check_dataset: a `DatasetConfig` whose first batch the function check uses (and the
        weights of a merge are measured with); None: random tokens, and no TensorFlow.
      dry_run: stop after the plan.
      report: is given every line for people.

    Raises:
      FileNotFoundError: there is no checkpoint at the source path.
      ValueError: the source does not fit the target, or the output exists.
      OSError: the output cannot be written.
    """
    import numpy as np

    from upcycle_jax import surgery
    from upcycle_jax.state_tree import STEP, TARGET
    from upcycle_jax.surgery import convert_and_prove
    from upcycle_jax.surgery import function_check as checking
    from upcycle_jax.training.train_state import state_specs
    from upcycle_jax.trees import LeafSpec

    recipe = recipe if recipe is not None else surgery.Recipe()
    source = convert_and_prove.open_sources(initial_checkpoint_path)
    model = model if model is not None else inferred_model(source, moe)
    measures = (
        isinstance(recipe, surgery.MergeRecipe) and recipe.how == "weighted" and not recipe.weights
    )
    tokens = first_batch(
        function_check_dataset if measures or function_check != "off" else None, model
    )
    if measures:
        recipe = _with_measured_weights(checking, recipe, source, source_model, tokens)
    if optimizer is not None:
        specs = state_specs(model, optimizer)
    else:
        specs = {
            STEP: LeafSpec((), np.dtype(np.int32)),
            **{f"{TARGET}{path}": spec for path, spec in model.param_specs().items()},
        }
    return convert_and_prove.convert(
        source,
        specs,
        output_checkpoint_path,
        recipe,
        model=model,
        max_memory=byte_sizes.parse_bytes(max_memory),
        materialize=materialize,
        check=function_check,
        tokens=tokens,
        dry_run=dry_run,
        report=report,
    )


def inferred_model(source: Any, moe: Any) -> Any:
    from upcycle_jax.checkpoints import model_settings
    from upcycle_jax.models import registry

    specs = {name.removeprefix("parent_0/"): spec for name, spec in source.specs().items()}
    return registry.infer(specs, model_settings.stated_by(source), moe)


def _with_measured_weights(
    checking: Any, recipe: Any, source: Any, source_model: Any, tokens: Any
) -> Any:
    import dataclasses

    from upcycle_jax.checkpoints.model_settings import check_model
    from upcycle_jax.surgery.probe_batch import ProbeBatch

    if source_model is None:
        raise ValueError(
            "MergeRecipe(how='weighted') needs weights, or upcycle.source_model (the sparse model)"
            " to measure them with"
        )
    check_model(source, source_model.config)
    tokens = tokens if tokens is not None else ProbeBatch.random(source_model)
    return dataclasses.replace(
        recipe, weights=checking.router_weights(source_model, source, tokens.batch)
    )


def first_batch(dataset: Any, model: Any) -> Any:
    """The first batch of a `DatasetConfig`, as a `ProbeBatch` for a model; None without a data set.

    Raises:
      ValueError: the model's vocabulary is too small for it.
    """
    from upcycle_jax.surgery.probe_batch import ProbeBatch

    if dataset is None:
        return None
    batch = next(iter(dataset.train_iterator()))
    largest, vocab_size = max(int(array.max()) for array in batch.values()), model.config.vocab_size
    if largest >= vocab_size:
        raise ValueError(
            f"function_check_dataset {dataset.mixture_or_task_name} holds token id {largest}, the"
            f" model's vocab_size is {vocab_size}: choose a data set of the model's vocabulary, or"
            " None for random tokens"
        )
    origin = f"first batch of {dataset.mixture_or_task_name}, split {dataset.split}"
    return ProbeBatch(batch, model.features, origin)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's own flags."""
    parser.add_argument(
        "--materialize",
        action="store_true",
        help="write every byte: the result shares no file with the source",
    )
    parser.add_argument(
        "--max_memory",
        type=byte_sizes.flag,
        metavar="SIZE",
        help="how much of the arrays to hold at a time: 2GiB (the default), 512MiB, 1000000",
    )


def given_by_flags(flags: Flags, loaded: "Config") -> dict[str, Any]:
    """Arguments that flags decide, and the model where a file defines one."""
    given: dict[str, Any] = {}
    if getattr(flags.extra, "materialize", False):
        given["materialize"] = True
    if getattr(flags.extra, "max_memory", None) is not None:
        given["max_memory"] = flags.extra.max_memory
    if loaded.has_macro("MODEL"):
        given["model"] = loaded.macro("MODEL", checks.Model)
    return given


def _run(flags: Flags, loaded: "Config") -> int:
    run = loaded.build("upcycle", **given_by_flags(flags, loaded), dry_run=flags.dry_run)
    command.say_unused(loaded, name="upcycle", other_functions=("verify",))
    try:
        return 0 if run().ok else 1
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
    return command.run("upcycle", argv, description=__doc__ or "", body=_run, extra=add_flags)


if __name__ == "__main__":
    sys.exit(main())

"""Checks a converted checkpoint against its source: every leaf from disk, then both models on the
same tokens.

Examples:

    python -m upcycle_jax.verify /data/sparse/checkpoint_1000000
    python -m upcycle_jax.verify --gin_file=gin_configs/models/t5_1_1_base_upcycled.gin --gin_file=gin_configs/runs/upcycle.gin \\
        --gin.INITIAL_CHECKPOINT_PATH="'/data/dense/checkpoint_1000000'" --gin.OUTPUT_CHECKPOINT_PATH="'/data/sparse/checkpoint_1000000'"

A path alone is enough: the checkpoint records its source, recipe and model. Where the source is
gone, the result is proved against the checksums that were recorded at the conversion. With gin
files, the bindings of `upcycle` apply; the recipe is the recorded one also then, and a configured
one that differs is named. What is not as it was is told by side: source, result or record. Exit
status: 0 when the proof holds, 1 when it does not, 2 when it could not be tried.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from upcycle_jax import byte_sizes, checks
from upcycle_jax.config import command
from upcycle_jax.config.flags import Flags
from upcycle_jax.printing import show

if TYPE_CHECKING:
    from upcycle_jax.checkpoints import CheckpointReader
    from upcycle_jax.config import Config
    from upcycle_jax.surgery.parents import Reader
    from upcycle_jax.surgery.proof import Proof
    from upcycle_jax.surgery.recorded import Recorded

PathOrPaths = checks.PathText | Sequence[checks.PathText]


def verify(
    *,
    output_checkpoint_path: checks.PathText,
    initial_checkpoint_path: PathOrPaths | None = None,
    model: checks.Model | None = None,
    moe: checks.Moe | None = None,
    optimizer: checks.Optimizer | None = None,
    recipe: checks.Recipe | None = None,
    max_memory: checks.Bytes = 2 << 30,
    function_check: Literal["auto", "on", "off"] = "auto",
    function_check_dataset: checks.Dataset | None = None,
    proof_directory: checks.PathText | None = None,
    report: Any = show,
) -> "Proof":
    """Proves a result.

    Args:
      output_checkpoint_path: the result.
      initial_checkpoint_path: the source; a list for several dense parents; None: what the result
        records, and its recorded checksums where that is gone.
      model: the target model; None: the recorded one, or the source's T5 shape with `moe`.
      moe: MoE layers of an inferred model; None: the paper's.
      optimizer: whose state the result should hold; None: the state that it holds is taken as it
        is, its slots zero or carried over.
      recipe: used where the result records none; None: the paper's for language.
      max_memory: bytes of arrays to hold at a time, or a size such as '2GiB'.
      function_check: 'auto', 'on' or 'off'.
      function_check_dataset: a `DatasetConfig` whose first batch is used; None: random tokens.
      proof_directory: where to write `proof.json`; None: nowhere, the checkpoints are only read.
      report: is given every line for people.

    Raises:
      FileNotFoundError: a checkpoint is not there.
      ValueError: the source does not fit the target, or nothing is recorded that would be needed.
    """
    from upcycle_jax import surgery
    from upcycle_jax.checkpoints import open_checkpoint
    from upcycle_jax.state_tree import STEP, TARGET
    from upcycle_jax.surgery import convert_and_prove, recorded
    from upcycle_jax.training.train_state import state_specs
    from upcycle_jax.upcycle import first_batch

    target = open_checkpoint(output_checkpoint_path)
    found, record = target.specs(), recorded.read_recorded(target)
    source, unreadable = _source(initial_checkpoint_path, record, target)
    if record.recipe is not None and recipe is not None:
        for line in convert_and_prove.differences(recipe, record.recipe):
            report(f"note: the configured recipe is not the recorded one, which is used: {line}")
    model = _model(model, moe, source, record, len(found), report)
    if model is not None and optimizer is not None:
        specs = state_specs(model, optimizer)
    elif model is not None:
        specs = {f"{TARGET}{path}": spec for path, spec in model.param_specs().items()}
        specs |= {path: spec for path, spec in found.items() if not path.startswith(TARGET)}
    else:
        specs = dict(found)
    if STEP not in specs and STEP in found:
        specs[STEP] = found[STEP]
    from_record = initial_checkpoint_path is None and record.specs
    plan = surgery.make_plan(
        record.specs if from_record or source is None else source.specs(),
        specs,
        record.recipe or recipe or surgery.Recipe(),
    )
    known = model is not None and function_check != "off" and source is not None
    proof = convert_and_prove.verify(
        plan,
        source,
        target,
        model=model,
        recorded=record,
        check=function_check,
        max_memory=byte_sizes.parse_bytes(max_memory),
        tokens=first_batch(function_check_dataset if known else None, model),
        source_damage=unreadable,
        report=report,
    )
    if proof_directory is not None:
        for leaf in proof.leaves:  # What was recorded first stays recorded.
            leaf.checksum = record.results.get(leaf.path, leaf.checksum)
        proof.context["files"] = record.files or recorded.small_files(target)
        proof.write(proof_directory)
    return proof


def _source(
    path: "PathOrPaths | None", record: "Recorded", target: "CheckpointReader"
) -> "tuple[Reader | None, list[str]]":
    """The source, or None where the recorded one is gone or cannot be opened; and why it cannot."""
    from upcycle_jax.surgery import convert_and_prove

    alone = f"python -m upcycle_jax.verify {target.path}"
    if path is not None:
        try:
            return convert_and_prove.open_sources(path), []
        except FileNotFoundError as error:
            if record.checksums:
                error.add_note(f"without its source, the result is proved by: {alone}")
            raise
    problems = "".join(f"; {problem}" for problem in record.problems)
    if not record.sources:
        raise ValueError(
            f"{target.path} does not record what it was made from{problems}: name the source, with"
            " --gin_file=runs/upcycle.gin, INITIAL_CHECKPOINT_PATH and OUTPUT_CHECKPOINT_PATH"
        )
    try:
        source = convert_and_prove.open_sources(record.sources)
        source.specs()
        return source, []
    except FileNotFoundError as error:
        gone: list[str] = []
        why: Exception = error
    except (ValueError, KeyError, OSError) as error:
        gone, why = [f"cannot be opened: {error.args[0] if error.args else error}"], error
    if not record.checksums:
        raise ValueError(
            f"{why}; and {target.path} records no checksums, so it cannot be proved without its"
            f" source{problems}"
        ) from None
    return None, gone


def _model(
    model: Any, moe: Any, source: "Reader | None", record: "Recorded", leaves: int, report: Any
) -> Any:
    """The result's model: as configured, as recorded, or as the source's leaves imply.

    A recorded one is not trusted to be of any size: the result has at least a leaf for each layer.
    """
    from upcycle_jax.surgery.model_record import model_from_json, model_to_json
    from upcycle_jax.upcycle import inferred_model

    if model is not None:
        if record.model is not None and record.model != json.loads(
            json.dumps(model_to_json(model))
        ):
            report("note: the configured model is not the recorded one; the configured one is used")
        return model
    if moe is None and record.model is not None:
        try:
            return model_from_json(record.model, max_layers=leaves)
        except ValueError as error:
            report(f"note: {error}")
            return None
    if source is None or (moe is None and record.specs):
        return None
    return inferred_model(source, moe)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's own words."""
    parser.add_argument(
        "path",
        nargs="?",
        help="a converted checkpoint, instead of OUTPUT_CHECKPOINT_PATH: its source, recipe and"
        " model are those that it records, unless bindings say otherwise",
    )
    parser.add_argument(
        "--max_memory",
        type=byte_sizes.flag,
        metavar="SIZE",
        help="how much of the arrays to hold at a time: 2GiB (the default), 512MiB, 1000000",
    )


def _run(flags: Flags, loaded: "Config") -> int:
    given = {"model": loaded.macro("MODEL", checks.Model)} if loaded.has_macro("MODEL") else {}
    if flags.extra.path is not None:
        given["output_checkpoint_path"] = flags.extra.path
    if flags.extra.max_memory is not None:
        given["max_memory"] = flags.extra.max_memory
    run = loaded.build("verify", **given)
    command.say_unused(loaded, name="verify", other_functions=("upcycle",))
    return 0 if run().ok else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return command.run("verify", argv, description=__doc__ or "", body=_run, extra=add_flags)


if __name__ == "__main__":
    sys.exit(main())

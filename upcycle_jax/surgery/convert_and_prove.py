"""A conversion from start to finish: plan shown, applied, proved, and the function compared. What
the commands call.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from upcycle_jax.checkpoints import model_settings, open_checkpoint
from upcycle_jax.checkpoints.huggingface.beside import carry
from upcycle_jax.checkpoints.model_settings import check_model
from upcycle_jax.checkpoints.output import checked_output, tidy_finished
from upcycle_jax.checkpoints.to_orbax import checkpoint_path
from upcycle_jax.models.base import Model
from upcycle_jax.models.layerwise import LayerwiseModel
from upcycle_jax.printing import show
from upcycle_jax.surgery import function_check
from upcycle_jax.surgery.matching import make_plan
from upcycle_jax.surgery.model_record import model_to_json
from upcycle_jax.surgery.offline import (
    DEFAULT_MAX_MEMORY,
    apply_offline,
    record,
    result_step,
    shared_chunks,
)
from upcycle_jax.surgery.parents import Reader, join, source_paths
from upcycle_jax.surgery.plan import Plan
from upcycle_jax.surgery.plan_text import plan_text
from upcycle_jax.surgery.probe_batch import ProbeBatch
from upcycle_jax.surgery.proof import Proof, prove
from upcycle_jax.surgery.recipe import MergeRecipe, ParentExperts, Recipe
from upcycle_jax.surgery.recipe_json import to_json
from upcycle_jax.surgery.recorded import (
    PLAN_FILE,
    PROOF_FILE,
    Recorded,
    read_recorded,
    small_files,
)
from upcycle_jax.trees import LeafSpec, Role

Report = Callable[[str], None]

FunctionCheckMode = Literal["auto", "on", "off"]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What came of a conversion.

    Attributes:
      plan: what was (or would be) done.
      path: the result, or None for a dry run.
      proof: the verdict, or None for a dry run.
    """

    plan: Plan
    path: str | None = None
    proof: Proof | None = None

    @property
    def ok(self) -> bool:
        """Nothing was found wrong."""
        return self.proof is None or self.proof.ok


def open_sources(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> Reader:
    """Opens one dense checkpoint, or several as parents."""
    several = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not several or not all(str(path) for path in several):
        raise ValueError(
            "no source checkpoint is named: set INITIAL_CHECKPOINT_PATH to a checkpoint or a"
            " MODEL_DIR"
        )
    return join([open_checkpoint(path) for path in several])


def convert(
    source: Reader,
    target_specs: Mapping[str, LeafSpec],
    output_path: str | os.PathLike,
    recipe: Recipe | MergeRecipe,
    *,
    model: Model,
    max_memory: int = DEFAULT_MAX_MEMORY,
    materialize: bool = False,
    check: FunctionCheckMode = "auto",
    tokens: ProbeBatch | None = None,
    dry_run: bool = False,
    all_leaves: bool = False,
    report: Report = show,
) -> Conversion:
    """Plans, applies and proves.

    Args:
      source: the dense checkpoint (the sparse one when merging).
      target_specs: every leaf of the result, by full path.
      output_path: folder of the new checkpoint.
      recipe: the choices.
      model: the target model, for the function check.
      max_memory: see `apply_offline`.
      materialize: see `apply_offline`.
      check: the function check: 'off', or 'on' or 'auto', which are the same: wherever there is one
        dense parent to compare with.
      tokens: what the function check compares the models on; None: random tokens.
      dry_run: stop after the plan.
      all_leaves: report every leaf of the plan; else one line for all layers.
      report: called with every line of output.

    Raises:
      ValueError: the source does not fit, `output_path` is taken, or an argument is out of range.
        Nothing was written.
      OSError: the output cannot be written.
    """
    modes = get_args(FunctionCheckMode)
    _require(check in modes, f"function_check is {check!r}: choose one of {modes}")
    checked_output(output_path, source_paths(source), setting="OUTPUT_CHECKPOINT_PATH")
    check_model(source, model.config)
    plan = make_plan(source.specs(), target_specs, recipe)
    report(plan_text(plan, all_leaves=all_leaves))
    if not why_no_function_check(plan, check) and isinstance(model, LayerwiseModel):
        probe = tokens if tokens is not None else ProbeBatch.random(model)
        # Refuses a batch that does not divide into routing groups.
        prediction = function_check.predict(plan, model, probe.batch)
        report(f"its function, as predicted: {prediction.verdict} ({prediction.reason})")
    unproved = is_unproved_result(plan, source, output_path)
    _require(
        unproved or not Path(output_path).exists(),
        f"{output_path} exists already: choose another OUTPUT_CHECKPOINT_PATH or remove it; nothing"
        " was changed",
    )
    checkpoint_path(
        output_path, result_step(plan, source)
    )  # Refuses a folder that is named for another step.
    if dry_run:
        report(
            f"{shared_chunks(plan, source, output_path, materialize=materialize).reason}\ndry run:"
            f" nothing was written to {output_path}"
        )
        return Conversion(plan)
    if unproved:
        report(
            f"{output_path} was written by this very conversion, which then was interrupted: only"
            " the proof is missing"
        )
        tidy_finished(Path(output_path))
        path = str(output_path)
    else:
        path = apply_offline(
            plan,
            source,
            output_path,
            max_memory=max_memory,
            materialize=materialize,
            metadata={
                "model": model_to_json(model),
                **model_settings.record(model.config.forward_settings),
            },
            progress=report,
        )
    for line in carry(source, path):
        report(line)
    proof = verify(
        plan,
        source,
        open_checkpoint(path),
        model=model,
        check=check,
        max_memory=max_memory,
        tokens=tokens,
        report=report,
    )
    (Path(path) / PLAN_FILE).write_text(json.dumps(plan.json(), indent=1) + "\n")
    proof.context["files"] = small_files(open_checkpoint(path))
    proof.write(path)
    report(f"{path} is written, with {PLAN_FILE} and proof.json")
    return Conversion(plan, path, proof)


def is_unproved_result(plan: Plan, source: Reader, output_path: str | os.PathLike) -> bool:
    """Whether a finished result of this very conversion lies at `output_path` without its proof:
    the command was killed in between.
    """
    if not Path(output_path).is_dir() or (Path(output_path) / PROOF_FILE).exists():
        return False
    try:
        found = open_checkpoint(output_path).metadata()
    except (ValueError, FileNotFoundError):
        return False
    surgery = dict(found.get("surgery", {}))
    surgery.pop("leaves", None)  # Known only when everything is written.
    return surgery == json.loads(json.dumps(record(plan, source)["surgery"]))


def verify(
    plan: Plan,
    source: Reader | None,
    target: Reader,
    *,
    model: Model | None,
    recorded: Recorded | None = None,
    check: FunctionCheckMode = "auto",
    max_memory: int = DEFAULT_MAX_MEMORY,
    tokens: ProbeBatch | None = None,
    source_damage: Sequence[str] = (),
    report: Report = show,
) -> Proof:
    """Proves a result from disk and, where it applies, compares the two models on tokens; reports
    the verdict.

    Args:
      plan: what should have been done.
      source: None: it is gone, and the result is proved against the recorded checksums.
      target: the result.
      model: the result's model; None: it is not known, and functions are not compared.
      recorded: what the result records about its making; None: it is read from there.
      check: see `convert`.
      max_memory: see `convert`.
      tokens: see `convert`.
      source_damage: why the source cannot be opened, where it is there.
      report: called with every line of output.

    Raises:
      ValueError: the model contradicts what source or result states of it.
    """
    for reader in (source, target):
        if reader is not None and model is not None:
            check_model(reader, model.config)
    recorded = recorded if recorded is not None else read_recorded(target)
    proof = prove(plan, source, target, recorded=recorded, max_memory=max_memory, progress=report)
    proof.damage["source"] = [*source_damage, *proof.damage["source"]]
    if source is not None and recorded.fingerprint not in ("", source.fingerprint()):
        report(
            f"note: the result records another source than {getattr(source, 'path', '')}, or that"
            " one has changed since"
        )
    if source is None:
        report("function check: skipped, the source is gone")
    elif model is None:
        report("function check: skipped, the result records no model: name a model file")
    elif reason := why_no_function_check(plan, check):
        report(f"function check: skipped, {reason}")
    elif not proof.readable:
        report("function check: skipped, leaves are missing or cannot be read")
    elif not isinstance(model, LayerwiseModel):
        report("function check: skipped, a model of this family is not run layer by layer")
    else:
        tokens = tokens if tokens is not None else ProbeBatch.random(model)
        outcome = function_check.check_function(
            plan, model, source, target, tokens, max_memory=max_memory, progress=report
        )
        proof.function = outcome.json()
    report(proof.text())
    return proof


def why_no_function_check(plan: Plan, check: str) -> str:
    """Why the function check does not run; '' where it does."""
    if check == "off":
        return "as asked"
    if isinstance(plan.recipe, MergeRecipe):
        return "a merged model is not compared with its experts"
    if isinstance(plan.recipe.expert_init, ParentExperts):
        return "there is no single dense parent to compare with"
    if plan.recipe.depth is not None:
        return "the source has another depth"
    experts = [row for row in plan.rows if row.spec.role is Role.EXPERT]
    if not experts:
        return "the target has no experts"
    if plan.replaced and not any(row.operation.stacked for row in experts):
        return "the source's experts are carried over as they are"
    return ""


def differences(recipe: Recipe | MergeRecipe, recorded: Recipe | MergeRecipe) -> list[str]:
    """Where a configured recipe differs from the recorded one, a line for each setting."""
    now, then = (json.loads(json.dumps(to_json(one))) for one in (recipe, recorded))
    if isinstance(recipe, MergeRecipe) and not recipe.weights:
        for one in (now, then):
            one.pop("weights", None)  # Measured at the conversion.
    for init in (now.get("expert_init"), then.get("expert_init")):
        if isinstance(init, dict):
            init.pop("selected_before", None)  # Stated by the source.
    return [
        f"{name} is {_short(now.get(name))}, recorded {_short(then.get(name))}"
        for name in {**then, **now}
        if now.get(name) != then.get(name)
    ]


def _short(value: Any) -> str:
    """A setting as text; a part of a recipe with its own settings."""
    if isinstance(value, dict) and "type" in value:
        inner = ", ".join(f"{k}={v!r}" for k, v in value.items() if k != "type")
        return f"{value['type']}({inner})"
    return repr(value)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)

"""The proof of a conversion from what lies on disk, as gin files configure it: `verify`."""

import dataclasses
import json

from upcycle_jax import byte_sizes, checks, state_tree
from upcycle_jax.checkpoints import CheckpointReader, open_checkpoint
from upcycle_jax.models.base import Model
from upcycle_jax.printing import show
from upcycle_jax.state_tree import TARGET
from upcycle_jax.surgery import convert_and_prove
from upcycle_jax.surgery.conversion_settings import ConversionSettings, PathOrPaths
from upcycle_jax.surgery.convert_and_prove import Report, differences, open_sources
from upcycle_jax.surgery.matching import make_plan
from upcycle_jax.surgery.model_record import model_from_json, model_to_json
from upcycle_jax.surgery.parents import Reader
from upcycle_jax.surgery.proof import Proof
from upcycle_jax.surgery.recipe import MergeRecipe, Recipe
from upcycle_jax.surgery.recorded import Recorded, read_recorded, small_files
from upcycle_jax.surgery.source_model import inferred_model, resolved
from upcycle_jax.trees import LeafSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify(ConversionSettings):
    """Proves a result; see `ConversionSettings` for the attributes that are not listed.

    Attributes:
      initial_checkpoint_path: the source; a list for several dense parents; None: what the result
        records, and its recorded checksums where that is gone.
      model: the target model; None: the recorded one, or the shape of the source's own model with
        `moe`.
      optimizer: whose state the result should hold; None: the state that it holds is taken as it
        is, its slots zero or carried over.
      recipe: used where the result records none; None: the paper's for language.
      proof_directory: where to write `proof.json`; None: nowhere, the checkpoints are only read.
    """

    initial_checkpoint_path: PathOrPaths | None = None
    proof_directory: checks.PathText | None = None

    def run(self, *, report: Report = show) -> Proof:
        """Proves the result and reports the verdict; see `convert_and_prove.verify`.

        Args:
          report: called with every line of output.

        Raises:
          FileNotFoundError: a checkpoint is not there.
          ValueError: the source does not fit the target, or nothing is recorded that would be
            needed.
        """
        target = open_checkpoint(self.output_checkpoint_path)
        record = read_recorded(target)
        source, source_damage = _source(self.initial_checkpoint_path, record, target)
        if record.recipe is not None and self.recipe is not None:
            for line in differences(self.recipe, record.recipe):
                report(
                    f"note: the configured recipe is not the recorded one, which is used: {line}"
                )
        recipe = record.recipe or self.recipe or Recipe()
        if source is not None:
            recipe = resolved(recipe, source)
        model = self._model(source, record, recipe, len(target.specs()), report)
        from_record = self.initial_checkpoint_path is None and record.specs
        plan = make_plan(
            record.specs if from_record or source is None else source.specs(),
            self._expected(target, model),
            recipe,
        )
        compares = model is not None and self.function_check != "off" and source is not None
        proof = convert_and_prove.verify(
            plan,
            source,
            target,
            model=model,
            recorded=record,
            check=self.function_check,
            max_memory=byte_sizes.parse_bytes(self.max_memory),
            tokens=self.first_batch(model) if model is not None and compares else None,
            source_damage=source_damage,
            report=report,
        )
        if self.proof_directory is not None:
            for leaf in proof.leaves:  # What was recorded first stays recorded.
                leaf.checksum = record.results.get(leaf.path, leaf.checksum)
            proof.context["files"] = record.files or small_files(target)
            proof.write(self.proof_directory)
        return proof

    def _expected(self, target: CheckpointReader, model: Model | None) -> dict[str, LeafSpec]:
        """Every leaf that the result should have: what neither model nor optimizer tell is taken
        as it is.
        """
        found = target.specs()
        if model is None:
            return dict(found)
        parameters = model.param_specs()
        if self.optimizer is not None:
            return state_tree.specs(parameters, self.optimizer.state_specs(parameters))
        kept = {path: spec for path, spec in found.items() if not path.startswith(TARGET)}
        return state_tree.parameter_specs(parameters) | kept

    def _model(
        self,
        source: Reader | None,
        record: Recorded,
        recipe: Recipe | MergeRecipe,
        leaves: int,
        report: Report,
    ) -> Model | None:
        """The result's model: as configured, as recorded, or as the source's leaves imply.

        A recorded one is not trusted to be of any size: the result has at least a leaf for each
        layer.
        """
        if self.model is not None:
            configured = json.loads(json.dumps(model_to_json(self.model)))
            if record.model is not None and record.model != configured:
                report(
                    "note: the configured model is not the recorded one; the configured one is used"
                )
            return self.model
        if self.moe is None and record.model is not None:
            try:
                return model_from_json(record.model, max_layers=leaves)
            except ValueError as error:
                report(f"note: {error}")
                return None
        if source is None or (self.moe is None and record.specs):
            return None
        return inferred_model(source, recipe, self.moe)


def _source(
    path: PathOrPaths | None, record: Recorded, target: CheckpointReader
) -> tuple[Reader | None, list[str]]:
    """The source, or None where the recorded one is gone or cannot be opened; and why it cannot."""
    if path is not None:
        try:
            return open_sources(path), []
        except FileNotFoundError as error:
            if record.checksums:
                alone = f"python -m upcycle_jax.verify {target.path}"
                error.add_note(f"without its source, the result is proved by: {alone}")
            raise
    problems = "".join(f"; {problem}" for problem in record.problems)
    if not record.sources:
        raise ValueError(
            f"{target.path} does not record what it was made from{problems}: name the source, with"
            " --gin_file=runs/upcycle.gin, INITIAL_CHECKPOINT_PATH and OUTPUT_CHECKPOINT_PATH"
        )
    try:
        source = open_sources(record.sources)
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

"""A conversion on disk, as gin files configure it: `upcycle`."""

import dataclasses

from upcycle_jax import byte_sizes, state_tree
from upcycle_jax.checkpoints.model_settings import check_model
from upcycle_jax.models import registry
from upcycle_jax.models.base import Model
from upcycle_jax.models.layerwise import LayerwiseModel
from upcycle_jax.printing import show
from upcycle_jax.surgery import function_check
from upcycle_jax.surgery.conversion_settings import ConversionSettings, PathOrPaths
from upcycle_jax.surgery.convert_and_prove import Conversion, Report, convert, open_sources
from upcycle_jax.surgery.parents import Reader
from upcycle_jax.surgery.probe_batch import ProbeBatch
from upcycle_jax.surgery.recipe import MergeRecipe, Recipe
from upcycle_jax.surgery.source_model import inferred_model, own_config, resolved


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycle(ConversionSettings):
    """Converts a checkpoint; see `ConversionSettings` for the attributes that are not listed.

    Attributes:
      initial_checkpoint_path: the source, in any readable format; a list for several dense parents.
      model: the target model; None: the shape of the source's own model with `moe`.
      optimizer: whose state the result holds; None: no optimizer state.
      source_model: the sparse source's model, needed to measure the weights of
        `MergeRecipe(how='weighted')` where none are given; None: that of its config.json.
        `function_check_dataset` then gives the batch that they are measured with.
      materialize: write every byte, sharing no file with the source.
    """

    initial_checkpoint_path: PathOrPaths
    source_model: Model | None = None
    materialize: bool = False

    def run(
        self, *, dry_run: bool = False, all_leaves: bool = False, report: Report = show
    ) -> Conversion:
        """Plans, applies and proves; see `convert_and_prove.convert`.

        Args:
          dry_run: stop after the plan.
          all_leaves: report every leaf of the plan; else one line for all layers.
          report: called with every line of output.

        Raises:
          FileNotFoundError: there is no checkpoint at the source path.
          ValueError: the source does not fit the target, or the output exists.
          OSError: the output cannot be written.
        """
        source = open_sources(self.initial_checkpoint_path)
        recipe = resolved(self.recipe if self.recipe is not None else Recipe(), source)
        model = self.model
        if model is None:
            model = inferred_model(source, recipe, self.moe)
        probe = self.first_batch(model) if self.function_check != "off" else None
        if isinstance(recipe, MergeRecipe) and recipe.lacks_weights:
            probe = probe if probe is not None else self.first_batch(model)
            recipe = _with_measured_weights(recipe, source, self._source_model(source), probe)
        parameters = model.param_specs()
        slots = self.optimizer.state_specs(parameters) if self.optimizer is not None else {}
        return convert(
            source,
            state_tree.specs(parameters, slots),
            self.output_checkpoint_path,
            recipe,
            model=model,
            max_memory=byte_sizes.parse_bytes(self.max_memory),
            materialize=self.materialize,
            check=self.function_check,
            tokens=probe,
            dry_run=dry_run,
            all_leaves=all_leaves,
            report=report,
        )

    def _source_model(self, source: Reader) -> Model | None:
        """The sparse source's model: as configured, or as its config.json states it."""
        if self.source_model is not None:
            return self.source_model
        stated = own_config(source)
        return None if stated is None else registry.build(stated)


def _with_measured_weights(
    recipe: MergeRecipe, source: Reader, model: Model | None, probe: ProbeBatch | None
) -> MergeRecipe:
    """The recipe with the mean router probabilities of the sparse source as weights."""
    if model is None:
        raise ValueError(
            "MergeRecipe(how='weighted') needs weights, or upcycle.source_model (the sparse model)"
            " to measure them with"
        )
    if not isinstance(model, LayerwiseModel):
        raise ValueError(
            f"upcycle.source_model is a {type(model).__name__}, which cannot be run layer by layer"
            " to measure weights with: give MergeRecipe.weights"
        )
    check_model(source, model.config)
    probe = probe if probe is not None else ProbeBatch.random(model)
    weights = function_check.router_weights(model, source, probe.batch)
    return dataclasses.replace(recipe, weights=weights)

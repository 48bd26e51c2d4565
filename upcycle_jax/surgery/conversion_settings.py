"""What a conversion and its proof are both told: the result, its model, and how to compare."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from upcycle_jax import checks
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.features.base import check_lengths
from upcycle_jax.models.base import Model
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.surgery.convert_and_prove import FunctionCheckMode
from upcycle_jax.surgery.probe_batch import ProbeBatch
from upcycle_jax.surgery.recipe import MergeRecipe, Recipe
from upcycle_jax.trees import LeafSpec


class Optimizer(Protocol):
    """What a conversion asks of an optimizer; those of `training.optimizers` have it."""

    def state_specs(self, param_specs: Mapping[str, LeafSpec]) -> dict[str, LeafSpec]:
        """Specs of all slots by path, of parameters by path."""


PathOrPaths = checks.PathText | Sequence[checks.PathText]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionSettings:
    """Settings that `upcycle` and `verify` share.

    Attributes:
      output_checkpoint_path: folder of the result.
      model: the target model; None: see `upcycle` and `verify`.
      moe: MoE layers of a model that is inferred from the source; None: the paper's.
      optimizer: whose state the result holds; None: see `upcycle` and `verify`.
      recipe: the choices; None: the paper's for language.
      max_memory: bytes of arrays to hold at a time, or a size such as '2GiB'.
      function_check: 'off', or 'on' or 'auto', which are the same: wherever there is one dense
        parent to compare with.
      function_check_dataset: a `DatasetConfig` whose first batch the function check uses; None:
        random tokens, and no TensorFlow.
    """

    output_checkpoint_path: checks.PathText
    model: Model | None = None
    moe: MoeSettings | None = None
    optimizer: Optimizer | None = None
    recipe: Recipe | MergeRecipe | None = None
    max_memory: checks.Bytes = 2 << 30
    function_check: FunctionCheckMode = "auto"
    function_check_dataset: checks.Dataset | None = None

    def first_batch(self, model: Model) -> ProbeBatch | None:
        """The first batch of `function_check_dataset`; None without one.

        Raises:
          ValueError: it is of another kind than the model, whose vocabulary may also be too small.
        """
        dataset = self.function_check_dataset
        if dataset is None:
            return None
        try:
            check_lengths(model.features, dataset.task_feature_lengths)
        except ValueError as error:
            raise ValueError(
                f"function_check_dataset {dataset.mixture_or_task_name} is not for a"
                f" {type(model).__name__}: {error}. runs/upcycle_lm.gin has one for language"
                " models, runs/upcycle_images.gin one for vision transformers; None takes random"
                " values"
            ) from None
        batch = next(open_dataset(dataset, model.features).train_iterator())
        # Numbers of segments and positions are no token ids.
        tokens = [
            name for name in batch if name.endswith("_tokens") or name == model.features.targets
        ]
        largest, vocab_size = max(int(batch[name].max()) for name in tokens), model.vocab_size
        if vocab_size is not None and largest >= vocab_size:
            raise ValueError(
                f"function_check_dataset {dataset.mixture_or_task_name} holds token id {largest},"
                f" the model's vocab_size is {vocab_size}: choose a data set of the model's"
                " vocabulary, or None for random tokens"
            )
        origin = f"first batch of {dataset.mixture_or_task_name}, split {dataset.split}"
        return ProbeBatch(batch, model.features, origin)

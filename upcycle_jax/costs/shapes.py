"""What a training step works on."""

import dataclasses
from collections.abc import Mapping

from upcycle_jax.models.base import Model, stack_lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepShape:
    """The batch of a training step.

    Attributes:
      batch_size: rows, over all devices.
      lengths: of the task's features, as the model needs them.
      packed: whether rows hold several examples.
      num_microbatches: parts that the batch is processed in.
    """

    batch_size: int
    lengths: Mapping[str, int]
    packed: bool = False
    num_microbatches: int = 1

    @property
    def rows(self) -> int:
        """Rows of a microbatch."""
        return self.batch_size // self.num_microbatches

    def num_tokens(self, model: Model) -> int:
        """Positions of all stacks of a model, padding included."""
        return self.batch_size * sum(stack_lengths(model, self.lengths).values())

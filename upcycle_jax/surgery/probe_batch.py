"""The batch on which two models are compared: random, or real data with its origin."""

import dataclasses

from upcycle_jax.features import FeatureConverter, num_rows
from upcycle_jax.models.base import Model
from upcycle_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class ProbeBatch:
    """What both models are run on.

    Attributes:
      batch: model features.
      features: the converter that made them.
      origin: where it comes from, for the proof: 'random', or a task's name and split.
      rows_left_out: rows that the batch had beyond those here.
    """

    batch: Batch
    features: FeatureConverter
    origin: str
    rows_left_out: int = 0

    @classmethod
    def random(cls, model: Model) -> "ProbeBatch":
        """Random values, as `FeatureConverter.random` draws them for a model."""
        return cls(model.features.random(model.vocab_size), model.features, "random")

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return num_rows(self.batch)

    def first_rows(self, count: int) -> "ProbeBatch":
        """The first rows alone."""
        return dataclasses.replace(
            self,
            batch={name: values[:count] for name, values in self.batch.items()},
            rows_left_out=self.rows_left_out + max(0, self.num_rows - count),
        )

    @property
    def description(self) -> str:
        """The origin with the size, e.g. 'random: 2 x 32 inputs, 2 x 32 targets'."""
        left_out = f", {self.rows_left_out} more rows left out" if self.rows_left_out else ""
        return f"{self.origin}: {self.features.describe(self.batch)}{left_out}"

"""Metrics that can be added up over microbatches, batches and hosts."""

from collections.abc import Mapping
from typing import TypeAlias

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Mean:
    """A weighted mean that is still open: total / weight.

    Attributes:
      total: float32, any shape (a vector for per-expert values).
      weight: float32 scalar.
    """

    total: jax.Array
    weight: jax.Array

    def merge(self, other: "Mean") -> "Mean":
        """The mean over both."""
        return Mean(total=self.total + other.total, weight=self.weight + other.weight)

    def compute(self) -> jax.Array:
        """total / weight; 0 where nothing was counted."""
        return jnp.where(
            self.weight > 0, self.total / jnp.where(self.weight > 0, self.weight, 1.0), 0.0
        )


Metrics: TypeAlias = dict[str, Mean]
"""Metrics by name. See `models.shared` and
`models.expert_metrics` for the names and what each is a mean over."""


def merge(left: Mapping[str, Mean], right: Mapping[str, Mean]) -> Metrics:
    """Merges two sets of metrics with the same names."""
    return {name: left[name].merge(right[name]) for name in left}


def compute(metrics: Mapping[str, Mean]) -> dict[str, jax.Array]:
    """Values by name."""
    return {name: mean.compute() for name, mean in metrics.items()}

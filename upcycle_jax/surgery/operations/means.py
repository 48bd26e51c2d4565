"""Means of several sources, or of the experts of a layer, with a shared expert beside them.

They are running means, `m + (x - m) / n`, so that the mean of equal arrays is that array to the
bit.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from upcycle_jax.surgery.operations.base import Expectation, Operation, Reach


@dataclasses.dataclass(frozen=True)
class Mean(Operation):
    """The mean of a leaf over several dense checkpoints, in float32 (Branch-Train-MiX averages
    everything but the MLPs).
    """

    @property
    def name(self) -> str:
        return "mean of parents"

    def make(self, sources, aux, keys, expert, shape):
        mean = sources[0].astype(np.float32)
        for number, source in enumerate(sources[1:], start=2):
            mean = mean + (source.astype(np.float32) - mean) / np.float32(number)
        return mean

    def expectation(self, sources, aux, expert, shape):
        mean = np.mean([np.asarray(s, np.float64) for s in sources], axis=0)
        return Expectation(values=mean, kept=False, std=0.0, additive=True)


@dataclasses.dataclass(frozen=True)
class MergeExperts(Operation):
    """One dense matrix from the experts of a layer: `[E, *D] -> [*D]`, weighted mean in float32.

    Attributes:
      weights: weight of each expert, summing to 1; empty: all equal.
    """

    weights: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        return "weighted mean of experts" if self.weights else "mean of experts"

    def result_shape(self, sources, target):
        if self.weights and len(self.weights) != sources[0][0]:
            raise ValueError(
                f"{len(self.weights)} weights for {sources[0][0]} experts: give one per expert"
            )
        return tuple(sources[0][1:])

    def source_region(self, region, source, expert=0):
        return (slice(None), *region)

    def make(self, sources, aux, keys, expert, shape):
        stack = sources[0]
        mean, total = stack[0].astype(np.float32), self.weights[0] if self.weights else 1.0
        for number in range(1, len(stack)):
            weight = self.weights[number] if self.weights else 1.0
            total += weight
            mean = mean + (stack[number].astype(np.float32) - mean) * np.float32(
                weight / total if total else 0.0
            )
        return mean

    def expectation(self, sources, aux, expert, shape):
        stack = np.asarray(sources[0], np.float64)
        weights = np.asarray(self.weights or (1 / len(stack),) * len(stack))
        return Expectation(
            values=np.tensordot(weights / weights.sum(), stack, 1),
            kept=False,
            std=0.0,
            additive=True,
        )


@dataclasses.dataclass(frozen=True)
class JoinSharedExpert(Operation):
    """One dense matrix from the experts of a layer and its shared expert: `[E, *D]` and `[*S]`,
    which differ in the hidden axis, to the hidden units of both, those of the routed ones first.

    `act(x [A B]) [C; D]` is `act(x A) C + act(x B) D`: the dense MLP gives the sum of both.

    Attributes:
      routed: what makes one matrix of the experts.
      axis: the hidden axis of the dense matrix.
    """

    reach: ClassVar[Reach] = Reach.WHOLE
    joins_shapes: ClassVar[bool] = True

    routed: Operation
    axis: int

    @property
    def name(self) -> str:
        return f"{self.routed.name}, and the shared expert"

    def result_shape(self, sources, target):
        experts, shared = sources
        routed = list(self.routed.result_shape([experts], target))
        if len(shared) != len(routed):
            raise ValueError(f"a shared expert of shape {list(shared)} beside {list(experts)}")
        routed[self.axis] += shared[self.axis]
        return tuple(routed)

    def make(self, sources, aux, keys, expert, shape):
        experts, shared = sources
        made = self.routed.make([self._read(experts)], aux, keys, expert, shape)
        return np.concatenate([made.astype(np.float32), shared.astype(np.float32)], self.axis)

    def expectation(self, sources, aux, expert, shape):
        experts, shared = sources
        routed = self.routed.expectation([self._read(experts)], aux, expert, shape)
        if routed is None or routed.values is None:
            return None
        values = np.concatenate([routed.values, np.asarray(shared, np.float64)], self.axis)
        return Expectation(values=values, kept=False, std=0.0, additive=True)

    def _read(self, experts: np.ndarray) -> np.ndarray:
        """The experts that one matrix is made of."""
        everything = (slice(None),) * (experts.ndim - 1)
        return experts[self.routed.source_region(everything, 0)]

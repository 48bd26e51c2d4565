"""Experts that start as something else than copies of the dense MLP."""

import dataclasses
from typing import ClassVar

import numpy as np

from upcycle_jax.surgery.keys import draw
from upcycle_jax.surgery.operations.base import Expectation, Operation, Reach

TRUNCATION_STD = 0.87962566103423978
"""Standard deviation of a unit normal that is truncated to [-2, 2]."""


@dataclasses.dataclass(frozen=True)
class AddNoise(Operation):
    """Dense leaf plus N(0, s^2) per expert; s is `std`, or `std` times the leaf's own standard
    deviation where `relative`.
    """

    std: float
    relative: bool = False

    stacked: ClassVar[bool] = True
    reach: ClassVar[Reach] = Reach.WHOLE
    draws: ClassVar[bool] = True

    @property
    def reads_statistics(self) -> bool:  # type: ignore[override]
        return self.relative

    @property
    def name(self) -> str:
        return f"tile + noise({self.std:g}{' x std' if self.relative else ''})"

    def prepare(self, sources, keys, target):
        scale = self.std * (float(np.std(sources[0], dtype=np.float64)) if self.relative else 1.0)
        return {"std": np.full(target[0], scale, np.float32)}

    def make(self, sources, aux, keys, expert, shape):
        values = draw("normal", keys.seed, keys.leaf, expert, sources[0].shape) * aux["std"][expert]
        values += sources[0].astype(np.float32, copy=False)
        return values

    def expectation(self, sources, aux, expert, shape):
        return Expectation(
            values=sources[0], kept=False, std=float(aux["std"][expert]), additive=True
        )


@dataclasses.dataclass(frozen=True)
class RandomExperts(Operation):
    """Copies for the experts named, the model's own initialisation for the others.

    The initialisation is T5X's for MLP kernels: normal truncated at two deviations with variance 1
    / fan_in, fan_in being the first axis of the dense kernel.

    Attributes:
      copied: the experts that get the dense leaf.
    """

    copied: tuple[int, ...] = ()

    stacked: ClassVar[bool] = True
    reach: ClassVar[Reach] = Reach.WHOLE
    draws: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"tile to {len(self.copied)}, random others" if self.copied else "random"

    def result_shape(self, sources, target):
        beyond = [e for e in self.copied if not 0 <= e < target[0]]
        if beyond:
            raise ValueError(
                f"experts {beyond} are to be copied, but there are only {target[0]}: name experts"
                f" from 0 to {target[0] - 1}"
            )
        return super().result_shape(sources, target)

    def prepare(self, sources, keys, target):
        return {"copied": np.isin(np.arange(target[0]), self.copied)}

    def make(self, sources, aux, keys, expert, shape):
        if aux["copied"][expert]:
            return sources[0]
        scale = np.float32(sources[0].shape[0] ** -0.5 / TRUNCATION_STD)
        return draw("truncated_normal", keys.seed, keys.leaf, expert, sources[0].shape) * scale

    def expectation(self, sources, aux, expert, shape):
        if aux["copied"][expert]:
            return Expectation(values=sources[0], kept=True)
        return Expectation(values=None, kept=False, std=sources[0].shape[0] ** -0.5)

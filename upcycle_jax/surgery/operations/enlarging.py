"""A larger MoE layer from an MoE layer: experts and the columns of their router several times.

Copies of an expert, or its parts, stand side by side: expert e of the result comes from expert
e // copies of the source, and so does column e of the router.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from upcycle_jax.surgery.keys import draw
from upcycle_jax.surgery.operations.base import Expectation, Operation, Reach
from upcycle_jax.surgery.operations.movements import scaled, shifted


@dataclasses.dataclass(frozen=True)
class CopiesOfExperts(Operation):
    """Every expert several times: `[E, *D] -> [E * copies, *D]`; or cut into as many parts.

    Attributes:
      copies: results of one expert.
      axis: intermediate axis of one expert's leaf, along which part e mod copies is cut out; None
        for whole copies.
      width: hidden units of a part.
      scale: factor on every value.
    """

    copies: int
    axis: int | None = None
    width: int = 0
    scale: float = 1.0

    stacked: ClassVar[bool] = True
    picks_experts: ClassVar[bool] = True

    @property
    def name(self) -> str:
        what = f"each expert x{self.copies}"
        if self.axis is not None:
            what = f"each expert in {self.copies} parts"
        return what + (f", x{self.scale:g}" if self.scale != 1.0 else "")

    @property
    def keeps_values(self) -> bool:
        return self.scale == 1.0

    def result_shape(self, sources, target):
        experts, *inner = sources[0]
        if self.axis is not None:
            if self.width * self.copies != inner[self.axis]:
                raise ValueError(
                    f"the source's experts have {inner[self.axis]} hidden units, which are"
                    f" {self.copies} parts of {inner[self.axis] / self.copies:g}, the model's have"
                    f" {self.width}: set EXPERT_MLP_DIM to the source's divided by the copies"
                )
            inner[self.axis] = self.width
        return (experts * self.copies, *inner)

    def source_region(self, region, source, expert=0):
        if self.axis is not None:
            region = shifted(region, self.axis, expert % self.copies * self.width)
        here = expert // self.copies
        return (slice(here, here + 1), *region)

    def make(self, sources, aux, keys, expert, shape):
        return scaled(sources[0][0], self.scale)

    def expectation(self, sources, aux, expert, shape):
        return Expectation(values=scaled(sources[0][0], self.scale), kept=True)


@dataclasses.dataclass(frozen=True)
class CopiesOfColumns(Operation):
    """Every column of a router several times: `[..., E] -> [..., E * copies]`.

    Attributes:
      copies: results of one column, side by side.
      noise_std: of the noise N(0, noise_std^2) on all of them but the first.
    """

    copies: int
    noise_std: float = 0.0

    reach: ClassVar[Reach] = Reach.WHOLE

    @property
    def draws(self) -> bool:  # type: ignore[override]
        return self.noise_std > 0

    @property
    def name(self) -> str:
        noise = f" + noise({self.noise_std:g})" if self.noise_std else ""
        return f"each column x{self.copies}{noise}"

    @property
    def keeps_values(self) -> bool:
        return not self.noise_std

    def result_shape(self, sources, target):
        *rest, experts = sources[0]
        return (*rest, experts * self.copies)

    def make(self, sources, aux, keys, expert, shape):
        values = np.repeat(sources[0], self.copies, axis=-1)
        if not self.noise_std:
            return values
        values = values.astype(np.float32)
        for column in np.flatnonzero(self._disturbed(shape)):
            noise = draw("normal", keys.seed, keys.leaf, int(column), tuple(shape[:-1]))
            values[..., column] += noise * np.float32(self.noise_std)
        return values

    def expectation(self, sources, aux, expert, shape):
        values = np.repeat(sources[0], self.copies, axis=-1)
        if not self.noise_std:
            return Expectation(values=values, kept=True)
        return Expectation(
            values=values, kept=~self._disturbed(shape), std=self.noise_std, additive=True
        )

    def _disturbed(self, shape: tuple[int, ...]) -> np.ndarray:
        """Bool `[E * copies]`: columns with noise."""
        return np.arange(shape[-1]) % self.copies != 0

"""Positions of images of another size."""

import dataclasses
from typing import ClassVar

import numpy as np

from upcycle_jax.layers import position_grids
from upcycle_jax.layers.position_grids import Interpolation
from upcycle_jax.surgery.operations.base import Expectation, Operation, Reach


@dataclasses.dataclass(frozen=True)
class InterpolatePositions(Operation):
    """A table of positions on another grid: `[1, before^2, d] -> [1, after^2, d]`, in float64.

    Attributes:
      method: see `position_grids.Interpolation`.
      before: patches along a side of the source's images.
      after: of the target's.
    """

    method: Interpolation
    before: int
    after: int

    reach: ClassVar[Reach] = Reach.WHOLE

    @property
    def name(self) -> str:
        before, after = (f"{side} x {side}" for side in (self.before, self.after))
        return f"{self.method} {before} -> {after}"

    def result_shape(self, sources, target):
        return (1, self.after**2, *sources[0][2:])

    def make(self, sources, aux, keys, expert, shape):
        return position_grids.interpolate(sources[0], self.after, self.method)

    def expectation(self, sources, aux, expert, shape):
        if self.method != "bilinear":
            return None  # Made again, it must be the same.
        import scipy.ndimage

        grid = np.asarray(sources[0], np.float64).reshape(self.before, self.before, -1)
        zoom = self.after / self.before
        values = scipy.ndimage.zoom(grid, (zoom, zoom, 1), order=1).reshape(shape)
        return Expectation(
            values=values, kept=False, additive=True, described="scipy's interpolation"
        )

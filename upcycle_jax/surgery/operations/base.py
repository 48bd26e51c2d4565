"""What can happen to one leaf: frozen, pure, array -> array, without I/O.

Legend: E experts, D the shape of the dense leaf. A *stacked* operation fills a leaf `[E, *D]`
expert by expert; the others fill a leaf whole. `make` is the one generator of values: it works on
the host, one expert's slab at a time, in NumPy (whose separate multiplications and additions are
never fused, so results do not depend on how the array is cut). A `Movement` merely moves bits, and
can also do so on the devices.
"""

import abc
import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import numpy as np

from upcycle_jax.surgery.keys import KeySource

Shape = tuple[int, ...]
Region = tuple[slice, ...]
Aux = Mapping[str, np.ndarray]


class Reach(enum.Enum):
    """How much of the sources one value of the result depends on."""

    ELEMENT = "element"  # the same place in every source: any region can be made by itself
    WHOLE = "whole"  # possibly all of it: a slab is made in one go


@dataclasses.dataclass(frozen=True)
class Expectation:
    """What a slab must look like, stated without the generator (the proof checks files against it).

    Attributes:
      values: reference values in the shape of the slab, or None where nothing is kept and nothing
        is added to.
      kept: which entries must equal `values` bit for bit: a boolean array that broadcasts to the
        slab, or one boolean for all.
      mean: expected mean of the other entries (of their difference to `values` where `additive`).
      std: expected standard deviation of the same.
      additive: the other entries are `values` plus a draw.
      described: what `values` are, where nothing is drawn and rounding alone is allowed for.
    """

    values: np.ndarray | None
    kept: np.ndarray | bool
    mean: float = 0.0
    std: float = 0.0
    additive: bool = False
    described: str = "the mean of its sources"


@dataclasses.dataclass(frozen=True)
class Operation(abc.ABC):
    """Base of all operations.

    Class attributes:
      stacked: the result has a leading expert axis that this operation adds.
      reach: see `Reach`.
      draws: random numbers are involved.
      reads_statistics: `prepare` needs the values of the sources.
      picks_experts: sources are stacked themselves, and `source_region` picks the one expert that
        an expert of the result is made of.
      joins_shapes: sources may be of different shapes.
    """

    stacked: ClassVar[bool] = False
    reach: ClassVar[Reach] = Reach.ELEMENT
    draws: ClassVar[bool] = False
    reads_statistics: ClassVar[bool] = False
    picks_experts: ClassVar[bool] = False
    joins_shapes: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Short text for the plan, e.g. `tile`."""
        return type(self).__name__.lower()

    @property
    def keeps_values(self) -> bool:
        """Every value of the result is a value of a source (up to a cast), or zero."""
        return False

    def result_shape(self, sources: Sequence[Shape], target: Shape) -> Shape:
        """The shape that the operation gives for sources of these shapes; `target` tells the number
        of experts.

        Raises:
          ValueError: the operation cannot be applied to these shapes.
        """
        return ((target[0],) if self.stacked else ()) + tuple(sources[0])

    def prepare(
        self, sources: Sequence[np.ndarray], keys: KeySource, target: Shape
    ) -> dict[str, np.ndarray]:
        """Host-side choices and statistics, each array with a leading expert axis: index sets,
        masks, means, deviations.

        They are made here and not inside the sharded program, because a sharded sum depends on the
        number of shards.
        """
        return {}

    def source_region(self, region: Region, source: int, expert: int = 0) -> Region:
        """The region of a source that a region of the result (without the axis that stacking adds)
        is made of; of the result's expert `expert`, where that matters.
        """
        return region

    @abc.abstractmethod
    def make(
        self, sources: Sequence[np.ndarray], aux: Aux, keys: KeySource, expert: int, shape: Shape
    ) -> np.ndarray:
        """The values of one slab (the whole leaf or a region of it where not stacked), before the
        cast to the leaf's dtype.

        Args:
          sources: the source arrays, whole or (reach ELEMENT) the same region of each.
          aux: what `prepare` gave.
          keys: key source of the leaf.
          expert: the expert to make; 0 where not stacked.
          shape: shape of the result.
        """

    def expectation(
        self, sources: Sequence[np.ndarray], aux: Aux, expert: int, shape: Shape
    ) -> Expectation | None:
        """What slab `expert` (the whole leaf or region where not stacked) must look like; None:
        only the generator can tell.
        """
        return None


@dataclasses.dataclass(frozen=True)
class Movement(Operation):
    """An operation that `keeps_values`, and does so on the devices too."""

    @property
    def keeps_values(self) -> bool:
        return True

    @abc.abstractmethod
    def move(self, sources: Sequence[jax.Array], shape: Shape) -> jax.Array:
        """The whole result on the devices, traced by jit."""

"""Operations that only move values: copies, cuts, repetitions, and leaves filled with one value."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax.surgery.operations.base import Expectation, Movement, Operation, Region


@dataclasses.dataclass(frozen=True)
class Copy(Movement):
    """Carries a leaf over unchanged."""

    def make(self, sources, aux, keys, expert, shape):
        return sources[0]

    def move(self, sources, shape):
        return sources[0]

    def expectation(self, sources, aux, expert, shape):
        return Expectation(values=sources[0], kept=True)


@dataclasses.dataclass(frozen=True)
class FirstUnits(Movement):
    """The first hidden units of an MLP's matrix, `[d, f] -> [d, w]` or `[f, d] -> [w, d]`: a shared
    expert narrower than the dense MLP.

    Attributes:
      axis: the intermediate axis.
      width: w, hidden units of the result.
    """

    axis: int
    width: int

    @property
    def name(self) -> str:
        return f"first {self.width} units"

    def result_shape(self, sources, target):
        shape = list(sources[0])
        if self.width > shape[self.axis]:
            raise ValueError(
                f"a shared expert of {self.width} hidden units cannot be cut from an MLP of"
                f" {shape[self.axis]}: set SHARED_EXPERT_MLP_DIM to at most {shape[self.axis]}"
            )
        shape[self.axis] = self.width
        return tuple(shape)

    def make(self, sources, aux, keys, expert, shape):
        return sources[0]  # Regions of the result are the same regions of the source.

    def move(self, sources, shape):
        return jax.lax.slice_in_dim(sources[0], 0, self.width, axis=self.axis)

    def expectation(self, sources, aux, expert, shape):
        return Expectation(values=sources[0], kept=True)


@dataclasses.dataclass(frozen=True)
class LastUnits(Operation):
    """The last hidden units of an MLP's matrix, `[d, f] -> [d, w]` or `[f, d] -> [w, d]`: a shared
    expert that has what routed experts have not.

    Attributes:
      axis: the intermediate axis.
      start: f - w, the first hidden unit.
      scale: factor on every value.
    """

    axis: int
    start: int
    scale: float = 1.0

    @property
    def name(self) -> str:
        return f"units from {self.start} on{f', x{self.scale:g}' if self.scale != 1.0 else ''}"

    @property
    def keeps_values(self) -> bool:
        return self.scale == 1.0

    def result_shape(self, sources, target):
        shape = list(sources[0])
        shape[self.axis] -= self.start
        return tuple(shape)

    def source_region(self, region, source, expert=0):
        return shifted(region, self.axis, self.start)

    def make(self, sources, aux, keys, expert, shape):
        return scaled(sources[0], self.scale)

    def expectation(self, sources, aux, expert, shape):
        return Expectation(values=scaled(sources[0], self.scale), kept=True)


def shifted(region: Region, axis: int, by: int) -> Region:
    """A region that lies further along one axis."""
    moved = slice(region[axis].start + by, region[axis].stop + by)
    return (*region[:axis], moved, *region[axis + 1 :])


def scaled(values: np.ndarray, factor: float) -> np.ndarray:
    """Values times a factor, in float32; as they are where it is 1."""
    return values if factor == 1.0 else values.astype(np.float32) * np.float32(factor)


@dataclasses.dataclass(frozen=True)
class TileFirstUnits(Movement):
    """Gives every expert the first hidden units of the dense matrix: `[d, f] -> [E, d, w]` or
    `[f, d] -> [E, w, d]`.

    Attributes:
      axis: the intermediate axis of the dense matrix.
      width: w, hidden units of an expert.
    """

    axis: int
    width: int

    stacked: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"tile first {self.width} units"

    def result_shape(self, sources, target):
        shape = list(sources[0])
        if self.width > shape[self.axis]:
            raise ValueError(
                f"experts of {self.width} hidden units cannot be cut from an MLP of"
                f" {shape[self.axis]}: set EXPERT_MLP_DIM to at most {shape[self.axis]}"
            )
        shape[self.axis] = self.width
        return (target[0], *shape)

    def make(self, sources, aux, keys, expert, shape):
        return sources[0]  # Regions of the result are the same regions of the source.

    def move(self, sources, shape):
        cut = jax.lax.slice_in_dim(sources[0], 0, self.width, axis=self.axis)
        return jnp.broadcast_to(cut, shape)

    def expectation(self, sources, aux, expert, shape):
        return Expectation(values=sources[0], kept=True)


@dataclasses.dataclass(frozen=True)
class Tile(Movement):
    """Gives every expert the dense leaf (Komatsuzaki et al. 2023, section 2.2; T5X's
    `UpcycleCheckpointer`): `[*D] -> [E, *D]`.
    """

    stacked: ClassVar[bool] = True

    def make(self, sources, aux, keys, expert, shape):
        return sources[0]

    def move(self, sources, shape):
        return jnp.broadcast_to(sources[0], shape)

    def expectation(self, sources, aux, expert, shape):
        return Expectation(values=sources[0], kept=True)


@dataclasses.dataclass(frozen=True)
class FromParents(Movement):
    """Expert e is the dense leaf of parent `parents[e]` (Branch-Train-MiX, Sukhbaatar et al. 2024):
    `N x [*D] -> [E, *D]`.
    """

    parents: tuple[int, ...]

    stacked: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"experts of parents {','.join(map(str, self.parents))}"

    def result_shape(self, sources, target):
        if len(self.parents) != target[0]:
            raise ValueError(
                f"{len(self.parents)} experts are assigned to parents, the model has {target[0]}:"
                " name one parent per expert"
            )
        return super().result_shape(sources, target)

    def make(self, sources, aux, keys, expert, shape):
        return sources[self.parents[expert]]

    def move(self, sources, shape):
        # A chain of selections, not a gather from a stacked array: elementwise, so each shard needs
        # its own part only.
        parent = jnp.asarray(self.parents).reshape((-1,) + (1,) * sources[0].ndim)
        out = jnp.broadcast_to(sources[0], shape)
        for number, source in enumerate(sources[1:], start=1):
            out = jnp.where(parent == number, source, out)
        return out

    def expectation(self, sources, aux, expert, shape):
        return Expectation(values=sources[self.parents[expert]], kept=True)


@dataclasses.dataclass(frozen=True)
class PickExpert(Movement):
    """One dense matrix: expert `expert` of a layer, `[E, *D] -> [*D]`."""

    expert: int = 0

    @property
    def name(self) -> str:
        return f"expert {self.expert}"

    def result_shape(self, sources, target):
        if not 0 <= self.expert < sources[0][0]:
            raise ValueError(
                f"expert {self.expert} is not there: the layer has {sources[0][0]}, name one from 0"
                f" to {sources[0][0] - 1}"
            )
        return tuple(sources[0][1:])

    def source_region(self, region, source, expert=0):
        return (slice(self.expert, self.expert + 1), *region)

    def make(self, sources, aux, keys, expert, shape):
        return sources[0][0]

    def move(self, sources, shape):
        return sources[0][self.expert]

    def expectation(self, sources, aux, expert, shape):
        return Expectation(values=sources[0][0], kept=True)


@dataclasses.dataclass(frozen=True)
class Zeros(Movement):
    """Zeros: an optimizer slot that starts afresh, or a router that starts indifferent."""

    def result_shape(self, sources, target):
        return target

    def make(self, sources, aux, keys, expert, shape):
        return np.zeros(shape, np.float32)

    def move(self, sources, shape):
        return jnp.zeros(shape, jnp.float32)

    def expectation(self, sources, aux, expert, shape):
        return Expectation(values=np.zeros(shape, np.float32), kept=True)


@dataclasses.dataclass(frozen=True)
class Constant(Operation):
    """One integer, given beforehand: the step of a source that stores none among its leaves."""

    value: int

    @property
    def name(self) -> str:
        return f"set to {self.value}"

    def result_shape(self, sources, target):
        return target

    def make(self, sources, aux, keys, expert, shape):
        return np.full(shape, self.value, np.int32)

    def expectation(self, sources, aux, expert, shape):
        return Expectation(values=np.full(shape, self.value, np.int32), kept=True)

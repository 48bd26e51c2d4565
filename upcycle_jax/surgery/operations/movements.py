"""Operations that only move values: copies, cuts, repetitions, and leaves filled with one value."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax.surgery.operations.base import Expectation, Movement, Operation


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

    def source_region(self, region, source):
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

"""What can happen to one leaf: frozen, pure, array -> array, without I/O.

Legend: E experts, D the shape of the dense leaf. A *stacked* operation fills a leaf `[E, *D]`
expert by expert; the others fill a leaf whole. `make` is the one generator of values: it works on
the host, one expert's slab at a time, in NumPy (whose separate multiplications and additions are
never fused, so results do not depend on how the array is cut). Operations that merely move bits can
also do so on the devices, in `move`.
"""

import dataclasses
import enum
import zipfile
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax.surgery.keys import KeySource, draw

Shape = tuple[int, ...]
Region = tuple[slice, ...]
Aux = Mapping[str, np.ndarray]

TRUNCATION_STD = 0.87962566103423978
"""Standard deviation of a unit normal that is truncated to [-2, 2]."""


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
    """

    values: np.ndarray | None
    kept: np.ndarray | bool
    mean: float = 0.0
    std: float = 0.0
    additive: bool = False


@dataclasses.dataclass(frozen=True)
class Operation:
    """Base of all operations.

    Class attributes:
      stacked: the result has a leading expert axis that this operation adds.
      reach: see `Reach`.
      draws: random numbers are involved.
      preserves: every value of the result is a value of a source (up to a cast), or zero; `move`
        exists.
      reads_statistics: `prepare` needs the values of the sources.
    """

    stacked: ClassVar[bool] = False
    reach: ClassVar[Reach] = Reach.ELEMENT
    draws: ClassVar[bool] = False
    preserves: ClassVar[bool] = False
    reads_statistics: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Short text for the plan, e.g. `tile`."""
        return type(self).__name__.lower()

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

    def source_region(self, region: Region, source: int) -> Region:
        """The region of a source that a region of the result (without the axis that stacking adds)
        is made of.
        """
        return region

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
        raise TypeError(f"{type(self).__name__} does not say how its values are made")

    def move(self, sources: Sequence[jax.Array], aux: Aux, shape: Shape) -> jax.Array:
        """The whole result on the devices, traced by jit; only where `preserves`."""
        raise TypeError(f"{type(self).__name__} does more than to move values")

    def expectation(
        self, sources: Sequence[np.ndarray], aux: Aux, expert: int, shape: Shape
    ) -> Expectation | None:
        """What slab `expert` (the whole leaf or region where not stacked) must look like; None:
        only the generator can tell.
        """
        return None


@dataclasses.dataclass(frozen=True)
class Copy(Operation):
    """Carries a leaf over unchanged."""

    preserves: ClassVar[bool] = True

    def make(self, sources, aux, keys, expert, shape):
        return sources[0]

    def move(self, sources, aux, shape):
        return sources[0]

    def expectation(self, sources, aux, expert, shape):
        return Expectation(values=sources[0], kept=True)


@dataclasses.dataclass(frozen=True)
class FirstUnits(Operation):
    """The first hidden units of an MLP's matrix, `[d, f] -> [d, w]` or `[f, d] -> [w, d]`: a shared
    expert narrower than the dense MLP.

    Attributes:
      axis: the intermediate axis.
      width: w, hidden units of the result.
    """

    axis: int
    width: int

    preserves: ClassVar[bool] = True

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

    def move(self, sources, aux, shape):
        return jax.lax.slice_in_dim(sources[0], 0, self.width, axis=self.axis)

    def expectation(self, sources, aux, expert, shape):
        return Expectation(values=sources[0], kept=True)


@dataclasses.dataclass(frozen=True)
class Tile(Operation):
    """Gives every expert the dense leaf (Komatsuzaki et al. 2023, section 2.2; T5X's
    `UpcycleCheckpointer`): `[*D] -> [E, *D]`.
    """

    stacked: ClassVar[bool] = True
    preserves: ClassVar[bool] = True

    def make(self, sources, aux, keys, expert, shape):
        return sources[0]

    def move(self, sources, aux, shape):
        return jnp.broadcast_to(sources[0], shape)

    def expectation(self, sources, aux, expert, shape):
        return Expectation(values=sources[0], kept=True)


@dataclasses.dataclass(frozen=True)
class Zeros(Operation):
    """Zeros: an optimizer slot that starts afresh, or a router that starts indifferent."""

    preserves: ClassVar[bool] = True

    def result_shape(self, sources, target):
        return target

    def make(self, sources, aux, keys, expert, shape):
        return np.zeros(shape, np.float32)

    def move(self, sources, aux, shape):
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


@dataclasses.dataclass(frozen=True)
class RouterNormal(Operation):
    """A fresh router kernel `[d, E]`: column e is N(0, std^2) drawn from (seed, path, e // repeat),
    so columns do not depend on E.

    Attributes:
      std: standard deviation.
      repeat: so many consecutive columns are equal (virtual groups); 1: all differ.
    """

    std: float
    repeat: int = 1

    reach: ClassVar[Reach] = Reach.WHOLE
    draws: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"normal({self.std:g})" + (
            f", each column x{self.repeat}" if self.repeat > 1 else ""
        )

    def result_shape(self, sources, target):
        if len(target) != 2 or target[1] % self.repeat:
            raise ValueError(
                f"a router kernel [d_model, experts] with experts a multiple of {self.repeat} is"
                f" needed, the model's is {list(target)}"
            )
        return target

    def make(self, sources, aux, keys, expert, shape):
        columns = [
            draw("normal", keys.seed, keys.leaf, e, shape[:1]) * np.float32(self.std)
            for e in range(shape[1] // self.repeat)
        ]
        return np.repeat(np.stack(columns, axis=1), self.repeat, axis=1)

    def expectation(self, sources, aux, expert, shape):
        return Expectation(values=None, kept=False, std=self.std)


@dataclasses.dataclass(frozen=True)
class RouterUniform(Operation):
    """A fresh router kernel `[d, E]`: uniform, mean-subtracted, scaled to `std` (the choice of
    Drop-Upcycling's released code).
    """

    std: float

    reach: ClassVar[Reach] = Reach.WHOLE
    draws: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"uniform(std {self.std:g})"

    def result_shape(self, sources, target):
        return target

    def make(self, sources, aux, keys, expert, shape):
        columns = [draw("uniform", keys.seed, keys.leaf, e, shape[:1]) for e in range(shape[1])]
        values = np.stack(columns, axis=1).astype(np.float64)
        return ((values - values.mean()) * (self.std / max(values.std(), 1e-30))).astype(np.float32)

    def expectation(self, sources, aux, expert, shape):
        return Expectation(values=None, kept=False, std=self.std)


@dataclasses.dataclass(frozen=True)
class Given(Operation):
    """Values from a `.npz` file (or one `.npy` file): a router that was prepared elsewhere.

    Attributes:
      file: the file's path.
      member: name of the array inside the `.npz`, a parameter path; '' for a `.npy`.
    """

    file: str
    member: str = ""

    reach: ClassVar[Reach] = Reach.WHOLE

    @property
    def name(self) -> str:
        return "given"

    def _values(self) -> np.ndarray:
        """The array.

        Raises:
          ValueError: the file is not there, is damaged or lacks the array.
        """
        try:
            loaded = np.load(self.file, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{self.file} cannot be read as NumPy's .npz ({error}): write it with numpy.savez,"
                " arrays only"
            ) from None
        if not self.member:
            return np.asarray(loaded)
        if isinstance(loaded, np.ndarray):
            raise ValueError(
                f"{self.file} holds one array without a name: write a .npz with an array"
                f" {self.member!r}"
            )
        if self.member not in loaded:
            raise ValueError(
                f"{self.file} has no array {self.member!r}; it has"
                f" {', '.join(loaded.files[:8]) or 'none'}"
            )
        return np.asarray(loaded[self.member])

    def result_shape(self, sources, target):
        return self._values().shape

    def make(self, sources, aux, keys, expert, shape):
        return self._values()

    def expectation(self, sources, aux, expert, shape):
        return Expectation(values=self._values(), kept=True)


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
        noise = draw("normal", keys.seed, keys.leaf, expert, sources[0].shape) * aux["std"][expert]
        return sources[0].astype(np.float32) + noise

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

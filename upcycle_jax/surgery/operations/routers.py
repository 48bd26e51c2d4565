"""Router kernels `[d, E]`: drawn, or prepared elsewhere."""

import dataclasses
import zipfile
from typing import ClassVar

import numpy as np

from upcycle_jax.surgery.keys import draw
from upcycle_jax.surgery.operations.base import Expectation, Operation, Reach


@dataclasses.dataclass(frozen=True)
class RouterNormal(Operation):
    """A fresh router kernel `[d, E]`: column e is N(0, std^2) drawn from (seed, path, e // repeat),
    so columns do not depend on E.

    Attributes:
      std: standard deviation.
      repeat: number of consecutive columns that are equal (virtual groups); 1: all differ.
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

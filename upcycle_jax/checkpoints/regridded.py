"""A checkpoint of a vision transformer, read as that of a model for images of another size."""

import dataclasses
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from upcycle_jax import axes
from upcycle_jax.checkpoints.huggingface.beside import Beside, of_reader
from upcycle_jax.checkpoints.reader import CheckpointReader, Index, ReaderBase, checked_index
from upcycle_jax.checkpoints.vit.model import dense_model
from upcycle_jax.layers import position_grids
from upcycle_jax.layers.position_grids import Interpolation
from upcycle_jax.models import registry
from upcycle_jax.models.base import ModelConfig
from upcycle_jax.state_tree import PARAM_STATES, TARGET
from upcycle_jax.trees import LeafSpec


class Regridded(ReaderBase):
    """Another reader, whose positions are interpolated to another grid. Everything else is as it
    is.

    Attributes:
      description: what is done, e.g. 'bilinear 14 x 14 -> 24 x 24'.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        *,
        image_size: int,
        method: Interpolation,
        keeps_optimizer: bool,
        model: ModelConfig | None = None,
    ):
        """Reads no arrays.

        Args:
          reader: the checkpoint.
          image_size: side of an image, in pixels.
          method: see `position_grids.Interpolation`.
          keeps_optimizer: whether its optimizer state is wanted.
          model: the model, where the checkpoint does not state all of it.

        Raises:
          ValueError: it is no vision transformer, its patches do not divide such images, or its
            positions have optimizer slots, which cannot be interpolated.
        """
        self.path: epath.Path = reader.path
        self.format = reader.format
        self._reader = reader
        config = dense_model(reader, model)
        if image_size < 1 or image_size % config.patch_size:
            raise ValueError(
                f"images of {image_size} pixels do not divide into the patches of {reader.path},"
                f" which are {config.patch_size} pixels wide"
            )
        specs = registry.build(config).param_specs()
        (name,) = (path for path, spec in specs.items() if axes.POSITIONS in spec.axes)
        slots = f"{PARAM_STATES}{name}/"
        if keeps_optimizer and any(leaf.startswith(slots) for leaf in reader.specs()):
            raise ValueError(
                f"{reader.path} has optimizer slots of its positions, which cannot be interpolated:"
                " give --optimizer_state drop"
            )
        self._positions, self._method = TARGET + name, method
        self._side = image_size // config.patch_size
        self._interpolated: np.ndarray | None = None
        before, after = (f"{side} x {side}" for side in (config.grid, self._side))
        self.description = f"{method} {before} -> {after}"

    @property
    def step(self) -> int:
        return self._reader.step

    def specs(self) -> dict[str, LeafSpec]:
        """See `CheckpointReader.specs`."""
        specs = dict(self._reader.specs())
        one, _, width = specs[self._positions].shape
        shape = (one, self._side**2, width)
        specs[self._positions] = dataclasses.replace(specs[self._positions], shape=shape)
        return specs

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """See `CheckpointReader.read`."""
        if name != self._positions:
            return self._reader.read(name, index)
        spec = self.spec(name)
        if self._interpolated is None:
            values = self._reader.read(name)
            made = position_grids.interpolate(values, self._side, self._method)
            self._interpolated = made.astype(spec.dtype)
        return self._interpolated[checked_index(name, spec.shape, index)]

    def fingerprint(self) -> str:
        return f"{self._reader.fingerprint()} {self.description}"

    def metadata(self) -> dict[str, Any]:
        return self._reader.metadata()

    def model_settings(self) -> Mapping[str, Any]:
        return self._reader.model_settings()

    def model_config(self) -> ModelConfig | None:
        return None  # A vision transformer shows in its leaves.

    def beside(self) -> Beside | None:
        """See `huggingface.beside.of_reader`."""
        return of_reader(self._reader)

    def _files(self) -> Iterable[epath.Path]:
        return ()


def with_image_size(
    reader: CheckpointReader,
    image_size: int | None,
    method: str | None,
    keeps_optimizer: bool,
    *,
    model: ModelConfig | None,
    say: Callable[[str], None],
) -> tuple[CheckpointReader, dict[str, Any]]:
    """A checkpoint as it is or, where `image_size` and `method` are given, `Regridded`; and what
    its copy is to record of that.

    Args:
      reader: the checkpoint.
      image_size: see `Regridded`; None: its own.
      method: a `position_grids.Interpolation`.
      keeps_optimizer: see `Regridded`.
      model: see `Regridded`.
      say: told what is done.

    Raises:
      ValueError: one is given without the other, there is no such method, or as of `Regridded`.
    """
    if image_size is None and method is None:
        return reader, {}
    if image_size is None or method is None:
        raise ValueError(
            "--image_size and --position_interpolation belong together: how positions are taken"
            " over to images of another size is not the same everywhere"
        )
    known = typing.get_args(Interpolation)
    if method not in known:
        raise ValueError(f"--position_interpolation must be {' or '.join(known)}, got {method!r}")
    found = Regridded(
        reader,
        image_size=image_size,
        method=typing.cast(Interpolation, method),
        keeps_optimizer=keeps_optimizer,
        model=model,
    )
    say(f"positions: {found.description}")
    return found, {"positions": found.description}

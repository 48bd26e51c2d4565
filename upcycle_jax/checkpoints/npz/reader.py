"""Reads archives of vision transformers as if they were T5X checkpoints."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.npz import names
from upcycle_jax.checkpoints.npz.archive import Archive
from upcycle_jax.checkpoints.reader import Index, ReaderBase, checked_index
from upcycle_jax.moe import roles
from upcycle_jax.printing import printable
from upcycle_jax.state_tree import TARGET
from upcycle_jax.trees import LeafSpec

_CLS, _POSITIONS = f"{TARGET}cls", f"{TARGET}pos_embedding"


@dataclasses.dataclass(frozen=True)
class _Source:
    """The array behind a leaf.

    Attributes:
      array: its name in the archive.
      layer: which entry of its first axis; None for the whole array.
      joined: see `names.Place`.
    """

    array: str
    layer: int | None = None
    joined: str | None = None

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The leaf's, given the array's."""
        shape = stored if self.layer is None else stored[1:]
        if self.joined == names.HEADS:
            return (*shape[:-2], math.prod(shape[-2:]))
        return (math.prod(shape[:-1]), shape[-1]) if self.joined == names.JOINED else shape


class NpzReader(ReaderBase):
    """A vision transformer in a NumPy archive, as vit_jax, AugReg, big_vision and V-MoE write it:
    the parameters, with one of `names.PREFIXES` before their names.

    Attention arrays are flattened to `[d, H * D]`. Where the class token has a position of its own
    (vit_jax), that is added to the token, so that positions are those of patches.

    Args:
      path: the archive.

    Raises:
      ValueError: it is damaged, holds an array that has no place, or lacks one.
    """

    format = "npz"

    def __init__(self, path: epath.Path):
        self.path = path
        if not storage.is_local(path):
            raise ValueError(f"{path}: copy the archive to a local disk first")
        self._archive = Archive(Path(path))
        self._heads = 0
        self._sources = self._find()
        self._token_has_position = self._find_positions()
        self._specs = roles.inferred(
            {name: self._spec(name, source) for name, source in sorted(self._sources.items())}
        )

    def _find(self) -> dict[str, _Source]:
        """The array behind every leaf, by full path."""
        arrays = self._archive.arrays
        prefix = next((one for one in names.PREFIXES if f"{one}embedding/kernel" in arrays), None)
        if prefix is None:
            raise ValueError(
                f"{self.path} holds no vision transformer: no embedding/kernel, with or without"
                f" {', '.join(filter(None, names.PREFIXES))} before it, among"
                f" {printable(', '.join(sorted(arrays)[:5]))} ..."
            )
        found: dict[str, _Source] = {}
        for array, stored in arrays.items():
            place = names.place(array[len(prefix) :]) if array.startswith(prefix) else None
            if place is None:
                if names.UNUSED.fullmatch(array):
                    continue
                raise ValueError(
                    f"{self.path}: the array {printable(array)} has no place in a vision"
                    f" transformer{_hint(array)}"
                )
            if place.joined == names.HEADS and len(stored.shape) >= 2:
                self._heads = stored.shape[-2]
            numbers: Iterable[int | None] = [None]
            if "{layer}" in place.path:
                numbers = range(stored.shape[0] if stored.shape else 0)
            for number in numbers:
                leaf = TARGET + place.path.format(layer=number)
                if leaf in found:
                    raise ValueError(
                        f"{self.path}: {printable(array)} and {found[leaf].array} are both"
                        f" {leaf}: the archive is of two models"
                    )
                found[leaf] = _Source(array, number, place.joined)
        self._check(found)
        return found

    def _check(self, found: Mapping[str, _Source]) -> None:
        """Raises a ValueError where arrays that every vision transformer has are missing, or have
        the shapes of none.
        """
        first = f"{TARGET}encoder/layers_0"
        needed = [
            f"{TARGET}embedding/kernel",
            _POSITIONS,
            f"{first}/attention/query/kernel",
            f"{first}/pre_mlp_layer_norm/scale",
        ]
        missing = [leaf for leaf in needed if leaf not in found]
        if missing:
            raise ValueError(f"{self.path} lacks {', '.join(missing)}: it holds a part of a model")
        ranks = {needed[0]: 4, needed[1]: 3, needed[2]: 3}
        for leaf, rank in ranks.items():
            source = found[leaf]
            shape = self._archive.arrays[source.array].shape
            if len(shape) - (source.layer is not None) != rank:
                raise ValueError(
                    f"{self.path}: {source.array} has the shape {list(shape)}, an array of"
                    f" {rank} axes belongs there"
                )

    def _find_positions(self) -> bool:
        """Whether the class token has a position, before those of patches."""
        count = self._archive.arrays[self._sources[_POSITIONS].array].shape[1]
        if math.isqrt(count) ** 2 == count:
            return False
        if _CLS in self._sources and math.isqrt(count - 1) ** 2 == count - 1:
            return True
        raise ValueError(
            f"{self.path} has {count} positions: neither they nor all but the first are a square of"
            " patches"
        )

    def _spec(self, name: str, source: _Source) -> LeafSpec:
        stored = self._archive.arrays[source.array]
        shape = source.shape(stored.shape)
        if name == _POSITIONS and self._token_has_position:
            shape = (shape[0], shape[1] - 1, *shape[2:])
        return LeafSpec(shape, stored.dtype)

    def specs(self) -> dict[str, LeafSpec]:
        return dict(self._specs)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        spec = self.spec(name)
        index = checked_index(name, spec.shape, index)
        source = self._sources[name]
        value = self._archive.read(source.array)
        value = value if source.layer is None else value[source.layer]
        if self._token_has_position and name == _POSITIONS:
            value = value[:, 1:]
        elif self._token_has_position and name == _CLS:
            value = value + self._archive.read(self._sources[_POSITIONS].array)[:, :1]
        return np.ascontiguousarray(value.reshape(spec.shape)[index])

    def model_settings(self) -> Mapping[str, Any]:
        """The arithmetic of the projects that write such archives: tanh GELU, epsilon 1e-6."""
        pool = "mean"
        if f"{TARGET}map_head/probe" in self._sources:
            pool = "map"
        elif _CLS in self._sources:
            pool = "class_token"
        return {
            "num_heads": self._heads,
            "mlp_activations": ("gelu",),
            "norm_epsilon": 1e-6,
            "pool": pool,
        }

    def _files(self) -> Iterable[epath.Path]:
        return [self.path]


def _hint(array: str) -> str:
    if "pre_logits" in array:
        return ": models with a layer before the head (pre_logits) are not read"
    return ""

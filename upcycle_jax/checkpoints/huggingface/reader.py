"""Reads Hugging Face folders as if they were T5X checkpoints.

Opening a folder reads the headers of its files, and, where it holds copies of a tensor, each of
these once.
"""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.huggingface.base import Computed, Sources
from upcycle_jax.checkpoints.huggingface.beside import Beside, LayoutWithMore
from upcycle_jax.checkpoints.huggingface.families import family_of
from upcycle_jax.checkpoints.huggingface.files import (
    CONFIG,
    WEIGHTS_INDEX,
    WeightFiles,
    load_json,
    shown,
)
from upcycle_jax.checkpoints.huggingface.views import read_leaf
from upcycle_jax.checkpoints.reader import Index, ReaderBase, checked_index
from upcycle_jax.models.base import ModelConfig
from upcycle_jax.moe import roles
from upcycle_jax.trees import LeafSpec


class HuggingFaceReader(ReaderBase):
    """A Hugging Face folder: config.json with model.safetensors, or with shards and their index.

    Args:
      path: the folder.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the model is of no family that is read, its weights are pickled, quantised or
        damaged, a tensor has no place or is missing, or config.json, index, headers and copies
        contradict each other.
    """

    format = "huggingface"

    def __init__(self, path: epath.Path):
        self.path = path
        if not storage.is_local(path):
            raise ValueError(
                f"{path}: safetensors files are memory-mapped, so copy the folder to a local disk"
                " first"
            )
        folder = Path(path)
        keys = load_json(folder, CONFIG)
        self._layout = family_of(folder, keys).layout(folder, keys)
        self._weights = WeightFiles(folder)
        self._sources = self._layout.sources(self._weights)
        self._specs = roles.inferred(
            {
                name: self._leaf_spec(name, sources)
                for name, sources in sorted(self._sources.items())
            }
        )

    def _leaf_spec(self, name: str, sources: Sources | Computed) -> LeafSpec:
        """
        Raises:
          ValueError: tensors that are stacked have different shapes.
        """
        if isinstance(sources, Computed):
            found = [self._weights.dtype(tensor) for tensor in sources.tensors]
            least = [np.dtype(np.float32)] if sources.widened or not found else []
            return LeafSpec(sources.shape, functools.reduce(np.promote_types, [*found, *least]))
        parts = sources if isinstance(sources, tuple) else (sources,)
        shapes = {part.leaf_shape(self._weights.tensors[part.tensor].shape) for part in parts}
        if len(shapes) != 1:
            raise ValueError(
                f"{self.path}: {shown(parts[0].tensor)} and its kin, of which {name} is made, have"
                f" different shapes ({', '.join(map(str, sorted(shapes)[:3]))}): copy the folder"
                " again"
            )
        dtypes = {self._weights.dtype(part.tensor) for part in parts}
        if any(part.factor != 1.0 for part in parts):
            dtypes.add(np.dtype(np.float32))
        shape = shapes.pop()
        return LeafSpec(
            (len(parts), *shape) if isinstance(sources, tuple) else shape,
            functools.reduce(np.promote_types, sorted(dtypes, key=str)),
        )

    def specs(self) -> dict[str, LeafSpec]:
        return dict(self._specs)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        spec = self.spec(name)
        index = checked_index(name, spec.shape, index)
        return read_leaf(self._sources[name], self._weights.read, index, spec.dtype)

    def model_settings(self) -> Mapping[str, Any]:
        return self._layout.settings

    def model_config(self) -> ModelConfig | None:
        return self._layout.config

    def beside(self) -> Beside | None:
        """What the folder holds beside the model; None where its family's hold nothing more."""
        if not isinstance(self._layout, LayoutWithMore):
            return None
        return self._layout.beside(self._weights, self._sources)

    def _files(self) -> Iterable[epath.Path]:
        # The files that are read, and no others: a link beside them may lead anywhere.
        index = [WEIGHTS_INDEX] if (self.path / WEIGHTS_INDEX).exists() else []
        return [self.path / name for name in sorted((CONFIG, *index, *self._weights.files))]

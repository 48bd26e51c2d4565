"""Reads Hugging Face folders as if they were T5X checkpoints.

Opening a folder reads the headers of its files, and, where it holds copies of a tensor, each of
these once.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.huggingface.base import Source
from upcycle_jax.checkpoints.huggingface.families import family_of
from upcycle_jax.checkpoints.huggingface.files import (
    CONFIG,
    WEIGHTS_INDEX,
    WeightFiles,
    load_json,
)
from upcycle_jax.checkpoints.reader import Index, ReaderBase, checked_index
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
        self._specs = {
            name: self._leaf_spec(source) for name, source in sorted(self._sources.items())
        }

    def _leaf_spec(self, source: Source) -> LeafSpec:
        shape, dtype = (
            self._weights.tensors[source.tensor].shape,
            self._weights.dtype(source.tensor),
        )
        if source.factor != 1.0:
            dtype = np.promote_types(dtype, np.float32)
        return LeafSpec(shape[::-1] if source.transposed else shape, dtype)

    def specs(self) -> dict[str, LeafSpec]:
        return dict(self._specs)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        spec = self.spec(name)
        index = checked_index(name, spec.shape, index)
        source = self._sources[name]
        value = self._weights.read(source.tensor, index[::-1] if source.transposed else index)
        value = np.ascontiguousarray(value.T) if source.transposed else value
        if source.factor == 1.0:
            return value
        return value.astype(spec.dtype) * np.asarray(source.factor, spec.dtype)

    def model_settings(self) -> Mapping[str, Any]:
        return self._layout.settings

    def _files(self) -> Iterable[epath.Path]:
        # The files that are read, and no others: a link beside them may lead anywhere.
        index = [WEIGHTS_INDEX] if (self.path / WEIGHTS_INDEX).exists() else []
        return [self.path / name for name in sorted((CONFIG, *index, *self._weights.files))]

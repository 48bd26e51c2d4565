"""Reads GGUF files as if they were T5X checkpoints: a tensor is dequantised when it is read, and no
more of it than was asked for.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.gguf.config import read_config
from upcycle_jax.checkpoints.gguf.files import GgufFile
from upcycle_jax.checkpoints.gguf.tensors import sources
from upcycle_jax.checkpoints.huggingface.views import read_leaf
from upcycle_jax.checkpoints.reader import Index, ReaderBase, checked_index
from upcycle_jax.models.decoder.config import DecoderConfig
from upcycle_jax.trees import LeafSpec


class GgufReader(ReaderBase):
    """A GGUF file of a dense Llama- or Qwen-like model. Quantised tensors are float32 leaves, the
    others keep their dtype.

    Args:
      path: the file.

    Raises:
      ValueError: it is not a model of an architecture that is read, damaged or truncated, a tensor
        has no place or is missing, or it and the metadata contradict each other; or the package
        `gguf` is not installed.
    """

    format = "gguf"

    def __init__(self, path: epath.Path):
        self.path = path
        if not storage.is_local(path):
            raise ValueError(
                f"{path}: GGUF files are memory-mapped, so copy the file to a local disk first"
            )
        self._file = GgufFile(Path(path))
        self._config = read_config(self._file)
        architecture = self._file.metadata["general.architecture"]
        self._sources = sources(self._file, architecture, self._config)
        self._specs = {}
        for name, source in sorted(self._sources.items()):
            stored = self._file.tensors[source.tensor]
            self._specs[name] = LeafSpec(source.leaf_shape(stored.shape), stored.dtype)

    def specs(self) -> dict[str, LeafSpec]:
        return dict(self._specs)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        spec = self.spec(name)
        index = checked_index(name, spec.shape, index)
        return read_leaf(self._sources[name], self._file.read, index, spec.dtype)

    def model_settings(self) -> Mapping[str, Any]:
        return self._config.forward_settings

    def model_config(self) -> DecoderConfig:
        return self._config

    def _files(self) -> Iterable[epath.Path]:
        return [self.path]

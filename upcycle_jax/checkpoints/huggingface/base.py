"""What reader and writer ask of a family of models."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from upcycle_jax.checkpoints.huggingface.files import WeightFiles
from upcycle_jax.trees import LeafSpec


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensor behind a leaf.

    Attributes:
      tensor: its name.
      transposed: the leaf is its transpose.
      factor: what it is multiplied by.
    """

    tensor: str
    transposed: bool = False
    factor: float = 1.0


class Layout(Protocol):
    """What the config.json of a folder states."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """See `CheckpointReader.model_settings`."""

    def sources(self, weights: WeightFiles) -> dict[str, Source]:
        """The tensor behind every leaf, by full path.

        Raises:
          ValueError: a tensor has no place or is missing, or contradicts config.json.
        """


@dataclasses.dataclass(frozen=True)
class Export:
    """A model as a folder.

    Attributes:
      config: content of config.json.
      tensors: the tensor that every leaf becomes, by full path, in the order of the files.
    """

    config: dict[str, Any]
    tensors: Mapping[str, Source]


@dataclasses.dataclass(frozen=True)
class FolderFamily:
    """A family of models whose folders are read and written.

    Attributes:
      name: in words, e.g. 'T5'.
      model_types: values of `model_type` in config.json.
      refused: other values that are near to it, each with the reason why it is not read.
      layout: given folder and content of config.json, what is stated. Raises ValueError where it is
        damaged or cannot be computed here.
      export: given specs of parameters by full path, the dtype to write (None: each its own) and
        what the checkpoint states of its forward pass. Raises ValueError where the parameters are
        not those of such a model.
    """

    name: str
    model_types: tuple[str, ...]
    refused: Mapping[str, str]
    layout: Callable[[Path, Mapping[str, Any]], Layout]
    export: Callable[[Mapping[str, LeafSpec], np.dtype | None, Mapping[str, Any]], Export]

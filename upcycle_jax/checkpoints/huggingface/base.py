"""What reader and writer ask of a family of models."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from upcycle_jax.checkpoints.huggingface.files import WeightFiles
from upcycle_jax.checkpoints.reader import CheckpointReader, Index
from upcycle_jax.models.base import ModelConfig
from upcycle_jax.state_tree import TARGET
from upcycle_jax.trees import LeafSpec


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a tensor in the order in which a leaf has them.

    Row `(i, j, ...)` of `shape`, counted in C order, is row `offset + i * strides[0] + j *
    strides[1] + ...` of the tensor.

    >>> Rows((2, 3), (6, 1), offset=3).indices().tolist()  # the second half of each of two heads
    [3, 4, 5, 9, 10, 11]

    Attributes:
      shape: its product is the number of rows of the leaf.
      strides: one for each entry of `shape`.
      offset: the tensor's row that comes first.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def count(self) -> int:
        """Rows of the leaf."""
        return math.prod(self.shape)

    def indices(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Int64, the tensor's rows for the leaf's rows from `start` to `stop`."""
        ours = np.arange(start, self.count if stop is None else stop)
        rows = np.full(ours.shape, self.offset, np.int64)
        for i, stride in zip(np.unravel_index(ours, self.shape), self.strides, strict=True):
            rows += i * stride
        return rows


def consecutive(start: int, count: int) -> Rows:
    """So many rows, one after the other."""
    return Rows((count,), (1,), start)


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensor behind a leaf, or a part of it.

    Attributes:
      tensor: its name.
      transposed: the leaf has the tensor's last two axes exchanged.
      factor: what it is multiplied by.
      rows: which rows the leaf has, along the last axis but one (of a vector: its only one); None
        for all, in order.
    """

    tensor: str
    transposed: bool = False
    factor: float = 1.0
    rows: Rows | None = None

    def leaf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the leaf, given that of the tensor."""
        out = list(shape)
        if self.rows is not None:
            out[row_axis(len(out))] = self.rows.count
        if self.transposed:
            out[-2:] = out[:-3:-1]
        return tuple(out)


Sources = Source | tuple[Source, ...]
"""What is behind a leaf: one tensor, or several of one shape, stacked along a first axis."""


@dataclasses.dataclass(frozen=True)
class Computed:
    """A leaf that is computed from whole tensors, which are held meanwhile: a small one.

    Attributes:
      shape: of the leaf.
      compute: the leaf, given the tensors in order, in the leaf's dtype.
      tensors: their shapes, by name; none where the leaf is a constant.
      widened: the leaf is of float32 at least, since its values may not fit into fewer bits.
    """

    shape: tuple[int, ...]
    compute: Callable[..., np.ndarray]
    tensors: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    widened: bool = False


def row_axis(rank: int) -> int:
    """The axis of a tensor that `Source.rows` means."""
    return max(rank - 2, 0)


class Layout(Protocol):
    """What the config.json of a folder states."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """See `CheckpointReader.model_settings`."""

    @property
    def config(self) -> ModelConfig | None:
        """See `CheckpointReader.model_config`."""

    def sources(self, weights: WeightFiles) -> Mapping[str, Sources | Computed]:
        """What is behind every leaf, by full path.

        Raises:
          ValueError: a tensor has no place or is missing, or contradicts config.json.
        """


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter that is read in parts.

    Attributes:
      spec: its shape and dtype.
      read: the part that `index` selects, one slice with explicit bounds per dimension.
    """

    spec: LeafSpec
    read: Callable[[Index], np.ndarray]


def leaves_of(reader: CheckpointReader) -> dict[str, Leaf]:
    """The parameters of a checkpoint, by full path."""

    def leaf(path: str, spec: LeafSpec) -> Leaf:
        return Leaf(spec, lambda index: reader.read(path, index))

    specs = reader.specs().items()
    return {path: leaf(path, spec) for path, spec in specs if path.startswith(TARGET)}


@dataclasses.dataclass(frozen=True)
class WritingOptions:
    """How a checkpoint is to become a folder.

    Attributes:
      dtype: of the tensors; None: each parameter's own.
      model: the configuration of the model, where it is given beside the checkpoint.
      model_type: the type to write; None: the family chooses.
      readers: who has to read the folder.
      tokenizer: the folder whose tokenizer and generation files are copied, or the GGUF file whose
        tokenizer is written; None: what the checkpoint comes from, where it is known and there.
      max_positions: `max_position_embeddings`; None: that of the folder of the tokenizer, else the
        family's default.
    """

    dtype: np.dtype | None = None
    model: ModelConfig | None = None
    model_type: str | None = None
    readers: tuple[str, ...] = ()
    tokenizer: Path | None = None
    max_positions: int | None = None


@dataclasses.dataclass(frozen=True)
class Export:
    """A model as a folder.

    Attributes:
      config: content of config.json.
      tensors: where every leaf goes, by full path, in the order of the files.
      leaves: the leaves, by full path.
      said: lines that are to be said before anything is written.
      verdicts: the same as plain JSON, for `VERDICTS`; None for no such file.
      copied: files of other folders that are copied, or texts that are written, by their name in
        this one.
    """

    config: dict[str, Any]
    tensors: Mapping[str, Sources]
    leaves: Mapping[str, Leaf]
    said: tuple[str, ...] = ()
    verdicts: dict[str, Any] | None = None
    copied: Mapping[str, Path | str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class FolderFamily:
    """A family of models whose folders are read and written.

    Attributes:
      name: in words, e.g. 'T5'.
      model_types: values of `model_type` in config.json.
      refused: other values that are near to it, each with the reason why it is not read.
      layout: given folder and content of config.json, what is stated. Raises ValueError where it is
        damaged or cannot be computed here.
      export: the folder that a checkpoint becomes; None where its leaves are another family's.
        Raises ValueError where they are not those of such a model, or an option does not fit.
    """

    name: str
    model_types: tuple[str, ...]
    refused: Mapping[str, str]
    layout: Callable[[Path, Mapping[str, Any]], Layout]
    export: Callable[[CheckpointReader, WritingOptions], Export | None]

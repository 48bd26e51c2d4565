"""What a Hugging Face folder holds beside the model that is read out of it: the text tower of a
SigLIP or CLIP model, a pooler, names of classes, how images are prepared. It goes along when the
model is converted, in a folder of the new checkpoint, and back when that is written as a folder
again.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.huggingface.assembly import Piece, Tensor
from upcycle_jax.checkpoints.huggingface.base import Computed, Leaf, Source, Sources
from upcycle_jax.checkpoints.huggingface.carried import NAMES, came_from
from upcycle_jax.checkpoints.huggingface.files import (
    CONFIG,
    WEIGHTS,
    WEIGHTS_INDEX,
    WeightFiles,
    inner_file,
    load_json,
)
from upcycle_jax.checkpoints.huggingface.shards import DEFAULT_SHARD_BYTES, write_tensors
from upcycle_jax.trees import LeafSpec

FOLDER = "beside"
"""The folder of a checkpoint, next to that of its arrays."""

PREPARATION = "preprocessor_config.json"
"""How images are prepared."""

FILES = (*NAMES, PREPARATION, "processor_config.json")
"""Names of files that go along."""


@dataclasses.dataclass(frozen=True)
class Beside:
    """What a folder holds beside the model that is read out of it.

    Attributes:
      folder: where it is.
      keys: content of config.json, that of the model included.
      tensors: by name.
    """

    folder: Path
    keys: Mapping[str, Any]
    tensors: Mapping[str, Leaf]

    def files(self) -> dict[str, Path]:
        """The files of `FILES` that are there, by name.

        Raises:
          ValueError: one is a link that leaves the folder.
        """
        return {
            name: inner_file(self.folder, name)
            for name in FILES
            if os.path.lexists(self.folder / name)
        }

    def assembled(self) -> list[Tensor]:
        """The tensors as they are written."""
        return [
            Tensor(name, (Piece(name, leaf, None, Source(name)),), leaf.spec.dtype)
            for name, leaf in self.tensors.items()
        ]


@runtime_checkable
class LayoutWithMore(Protocol):
    """A `base.Layout` of folders that hold more than the model."""

    def beside(self, weights: WeightFiles, sources: Mapping[str, Sources | Computed]) -> Beside:
        """What they hold more.

        Args:
          weights: of the folder.
          sources: what is behind every leaf.
        """
        ...


def tensors_behind(sources: Iterable[Sources | Computed]) -> set[str]:
    """The names of the tensors that leaves are made of."""
    names: set[str] = set()
    for source in sources:
        if isinstance(source, Computed):
            names |= set(source.tensors)
        else:
            names |= {one.tensor for one in (source if isinstance(source, tuple) else (source,))}
    return names


def carry(reader: object, checkpoint: os.PathLike | str) -> list[str]:
    """Copies what lies beside a source's model into a new checkpoint; nothing where that is done
    already.

    Args:
      reader: the source; of several, of which all are one model's parents, nothing is copied.
      checkpoint: its folder, complete but for this.

    Returns:
      Lines that say what was copied.

    Raises:
      ValueError: it is damaged.
      OSError: the folder cannot be written to.
    """
    found = of_reader(reader)
    final = Path(checkpoint) / FOLDER
    if found is None or final.exists():
        return []
    partial = final.with_name(f".{FOLDER}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name, path in found.files().items():
        shutil.copyfile(path, partial / name)
    if found.tensors:
        write_tensors(found.assembled(), partial, DEFAULT_SHARD_BYTES)
    (partial / CONFIG).write_text(json.dumps(found.keys, indent=2) + "\n", encoding="utf-8")
    os.rename(partial, final)
    what = f"{len(found.tensors)} tensors beside the model" if found.tensors else CONFIG
    return [f"{what} of {found.folder} go along, in {final}"]


def of_reader(reader: object) -> Beside | None:
    """What lies beside a checkpoint's model; None where nothing does, or where its format has
    nothing beside models.

    Raises:
      ValueError: it is damaged.
    """
    stated = getattr(reader, "beside", None)
    if stated is not None:
        found = stated()
        return found if found is None or isinstance(found, Beside) else None
    path = getattr(reader, "path", None)
    if not isinstance(path, os.PathLike) or not storage.is_local(path):
        return None
    return at(Path(path) / FOLDER)


def at(folder: Path) -> Beside | None:
    """What `carry` wrote; None where it wrote nothing.

    Raises:
      ValueError: it is damaged.
    """
    if not (folder / CONFIG).is_file():
        return None
    keys = load_json(folder, CONFIG)
    if not any(os.path.lexists(folder / name) for name in (WEIGHTS, WEIGHTS_INDEX)):
        return Beside(folder, keys, {})
    weights = WeightFiles(folder)

    def leaf(name: str) -> Leaf:
        spec = LeafSpec(weights.tensors[name].shape, weights.dtype(name))
        return Leaf(spec, lambda index: weights.read(name, index))

    return Beside(folder, keys, {name: leaf(name) for name in sorted(weights.tensors)})


def find(reader: Any) -> tuple[Beside | None, Path | None]:
    """What lies beside a checkpoint's model: in its own folder, in that of an earlier checkpoint of
    its run, or of a checkpoint on its way from a Hugging Face folder; else that folder.

    Returns:
      What `carry` wrote, and the folder that the model came from, each where it is still there.

    Raises:
      ValueError: it is damaged.
    """
    found = of_reader(reader)
    if found is not None:
        return found, None
    if storage.is_local(reader.path):
        for folder in sorted(Path(reader.path).parent.glob(f"checkpoint_*/{FOLDER}")):
            if (found := at(folder)) is not None:
                return found, None
    for path in came_from(reader):
        if (found := at(path / FOLDER)) is not None:
            return found, None
        if (path / CONFIG).is_file():
            return None, path
    return None, None

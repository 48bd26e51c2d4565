"""The one interface through which every checkpoint format is read."""

import abc
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from etils import epath

from upcycle_jax.checkpoints import model_settings
from upcycle_jax.models.base import ModelConfig
from upcycle_jax.state_tree import STEP
from upcycle_jax.trees import LeafSpec

Index = tuple[slice, ...]

METADATA_KEY = "upcycle_jax"
"""Where this library's own record lies in the custom metadata of an Orbax checkpoint."""

NOTES = frozenset({"plan.json", "proof.json"})
"""What a conversion leaves beside the arrays, and writes again when it is proved again: no part of
the checkpoint.
"""


@runtime_checkable
class CheckpointReader(Protocol):
    """A checkpoint on disk whose leaves are read one by one.

    Names are full paths: `target/<parameter>`, `state/step`,
    `state/param_states/<parameter>/<slot>`.

    Attributes:
      path: the checkpoint's own folder or file (never the MODEL_DIR around it).
      format: 'orbax', 't5x_legacy', 't5x_msgpack', 'huggingface', 'gguf', 'npz', 'big_vision' or
        'vmoe'.
      step: training step; 0 where the format records none.
    """

    path: epath.Path
    format: str

    @property
    def step(self) -> int: ...

    def specs(self) -> dict[str, LeafSpec]:
        """Shape, dtype, role and twin of every leaf, sorted by name, without reading arrays.
        Logical axes are unknown.
        """
        ...

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """One leaf, or the part of it that `index` (one slice of step 1 per leading dimension)
        selects.

        Raises:
          KeyError: no such leaf; the message names the nearest ones.
          ValueError: the leaf's data is missing or damaged.
        """
        ...

    def read_sharded(self, name: str, sharding: jax.sharding.Sharding) -> jax.Array:
        """One leaf as a global array: each process reads only what its own devices hold."""
        ...

    def fingerprint(self) -> str:
        """A digest that changes when the checkpoint's files change. Cheap: see
        `fingerprint_files`.
        """
        ...

    def metadata(self) -> dict[str, Any]:
        """This library's record of how the checkpoint came about; empty where there is none."""
        ...

    def model_settings(self) -> Mapping[str, Any]:
        """The settings of the forward pass that the checkpoint itself states, under the names of
        `ModelConfig.forward_settings`; see `model_settings`. Empty where it states none.
        """
        ...

    def model_config(self) -> ModelConfig | None:
        """The whole model that the checkpoint itself states, MoE layers included; None where it
        states none, or settings alone.
        """
        ...


class ReaderBase(abc.ABC):
    """What the formats share. A subclass gives `specs`, `read` and `_files`."""

    path: epath.Path
    format: str

    @property
    def step(self) -> int:
        return scalar_step(self) if STEP in self.specs() else 0

    @abc.abstractmethod
    def specs(self) -> dict[str, LeafSpec]:
        """See `CheckpointReader.specs`."""

    @abc.abstractmethod
    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """See `CheckpointReader.read`."""

    def names(self) -> Iterable[str]:
        """The names of all leaves; cheaper than `specs` where it can be."""
        return self.specs()

    def _files(self) -> Iterable[epath.Path]:
        return sorted(
            path
            for path in files_below(self.path)
            if path.parent != self.path or path.name not in NOTES
        )

    def read_parts(self, name: str, indices: Sequence[Index]) -> list[np.ndarray]:
        """Several parts of one leaf, in order."""
        return [self.read(name, index) for index in indices]

    def read_sharded(self, name: str, sharding: jax.sharding.Sharding) -> jax.Array:
        spec = self.spec(name)

        def bounds(index: Index) -> tuple[tuple[int, int], ...]:
            return tuple(
                entry.indices(size)[:2] for entry, size in zip(index, spec.shape, strict=True)
            )

        # Devices that hold copies of one shard share one read.
        wanted = list(
            dict.fromkeys(
                bounds(index or ())
                for index in sharding.addressable_devices_indices_map(spec.shape).values()
            )
        )
        values = self.read_parts(name, [tuple(slice(*pair) for pair in part) for part in wanted])
        parts = dict(zip(wanted, values, strict=True))
        return jax.make_array_from_callback(
            spec.shape, sharding, lambda index: parts[bounds(index or ())], dtype=spec.dtype
        )

    def spec(self, name: str) -> LeafSpec:
        """The spec of one leaf.

        Raises:
          KeyError: no such leaf; the message names the nearest ones.
        """
        specs = self.specs()
        if name not in specs:
            raise KeyError(missing_leaf(name, specs, self.path))
        return specs[name]

    def fingerprint(self) -> str:
        return fingerprint_files(self.path, self._files())

    def metadata(self) -> dict[str, Any]:
        return {}

    def model_settings(self) -> Mapping[str, Any]:
        return model_settings.recorded(self.metadata(), where=self.path)

    def model_config(self) -> ModelConfig | None:
        return model_settings.recorded_config(self.metadata(), where=self.path)


def scalar_step(reader: ReaderBase) -> int:
    """The value of `state/step`.

    Raises:
      ValueError: it is no whole number from 0 to 2^63.
    """
    spec = reader.spec(STEP)
    value = reader.read(STEP).item() if spec.shape == () and spec.dtype.kind in "iuf" else None
    if value is None or not 0 <= value < 1 << 63 or value != int(value):
        raise ValueError(
            f"{reader.path}: {STEP} is {spec if value is None else value} and no training step:"
            " the checkpoint is damaged"
        )
    return int(value)


def missing_leaf(name: str, specs: Mapping[str, LeafSpec], path: epath.Path) -> str:
    """The message for a leaf that a checkpoint does not have."""
    import difflib

    near = difflib.get_close_matches(name, specs, n=3, cutoff=0.6)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return f"{path} has no leaf {name!r} among its {len(specs)}{hint}"


def files_below(path: epath.Path) -> Iterator[epath.Path]:
    """Every file at or below `path`; works in buckets, where a recursive glob does not."""
    if path.is_dir():
        for child in path.iterdir():
            yield from files_below(child)
    else:
        yield path


def fingerprint_files(
    root: epath.Path, files: Iterable[epath.Path], *, end_bytes: int = 1 << 16
) -> str:
    """sha256 over each file's name below `root`, its size, and its first and last `end_bytes`
    bytes.

    It tells checkpoints apart (Orbax's manifests and data files carry random identifiers, and
    headers hold shapes) in milliseconds at any size. It does not prove that every byte in between
    is unchanged.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().length
        digest.update(f"{path.relative_to(root) if path != root else path.name}\0{size}\0".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(end_bytes))
            if size > end_bytes:
                stream.seek(max(end_bytes, size - end_bytes))
                digest.update(stream.read(end_bytes))
    return f"sha256-ends:{digest.hexdigest()}"


def checked_index(name: str, shape: tuple[int, ...], index: Index | None) -> Index:
    """`index` with every dimension present and every bound explicit.

    Raises:
      ValueError: a step other than 1, bounds outside the array, or more slices than dimensions.
    """
    given = tuple(index or ())
    if len(given) > len(shape):
        raise ValueError(f"{name}: {len(given)} slices for an array of shape {shape}")
    out = []
    for axis, size in enumerate(shape):
        entry = given[axis] if axis < len(given) else slice(None)
        start, stop = entry.start or 0, size if entry.stop is None else entry.stop
        if entry.step not in (None, 1) or not 0 <= start <= stop <= size:
            raise ValueError(
                f"{name}: slice {entry} does not fit axis {axis} of shape {shape} (steps of 1 and"
                " bounds inside only)"
            )
        out.append(slice(start, stop))
    return tuple(out)


def index_shape(index: Index) -> tuple[int, ...]:
    """The shape that an explicit index selects."""
    return tuple(entry.stop - entry.start for entry in index)


def index_size(index: Index) -> int:
    """The number of elements that an explicit index selects."""
    return math.prod(index_shape(index))

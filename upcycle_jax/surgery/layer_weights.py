"""A model's parameters, read from a checkpoint step by step (`models.layerwise`) and, of MoE
layers, expert by expert.
"""

import concurrent.futures
import dataclasses
from collections.abc import Hashable, Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from upcycle_jax import trees
from upcycle_jax.checkpoints.stored_chunks import StoredChunks
from upcycle_jax.checkpoints.workers import threads
from upcycle_jax.models.layerwise import Step
from upcycle_jax.progress import Meter
from upcycle_jax.surgery.parents import Reader
from upcycle_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Expert:
    """One expert of a layer, or several that are copies of one.

    Attributes:
      number: the one whose values were read.
      members: bool `[E]`, itself and those that are known to have the same values.
      kernels: its leaves, by path below the experts' subtree, as they are stored.
    """

    number: int
    members: np.ndarray
    kernels: Mapping[str, np.ndarray]

    def params(self) -> PyTree:
        """Its parameters as nested float32 arrays with a leading axis of 1."""
        return trees.unflatten(
            {path: jnp.asarray(leaf[None], jnp.float32) for path, leaf in self.kernels.items()}
        )

    def same_bits(self, other: "Expert") -> bool:
        """Whether the other's values are these, bit for bit."""
        return all(
            np.array_equal(_bits(leaf), _bits(other.kernels[path]))
            for path, leaf in self.kernels.items()
        )


class LayerWeights:
    """The parameters of one model in one checkpoint. Nothing is kept.

    Attributes:
      reader: the checkpoint.
      specs: of the model's parameters (`LayerwiseModel.param_specs`).
      block_bytes: bytes of experts to read at a time; one expert at least.
      meter: is told what was read, if there is one.
    """

    def __init__(self, reader: Reader, specs: Mapping[str, trees.LeafSpec], *, block_bytes: int):
        self.reader, self.specs, self.block_bytes = reader, specs, block_bytes
        self.meter: Meter | None = None
        self._stored = reader.specs()
        self._chunks = StoredChunks(reader)
        self._copies: dict[str, list[list[int]]] = {}

    def of(self, step: Step) -> PyTree:
        """What `step.program` takes, float32, without experts.

        Raises:
          KeyError, ValueError: a leaf is missing or cannot be read.
        """
        places = self._paths(step)
        arrays = self._read(list(places))
        return trees.unflatten(
            {place: jnp.asarray(arrays.pop(path), jnp.float32) for path, place in places.items()}
        )

    def experts(self, step: Step) -> Iterator[Expert]:
        """The experts of a step's MoE layer, each once: of those that share their stored bytes,
        the first alone is read.
        """
        leaves = self._expert_leaves(step)
        total = next(iter(leaves.values())).shape[0]
        each = sum(spec.nbytes for spec in leaves.values()) // total
        at_a_time = max(1, self.block_bytes // max(each, 1))
        groups = {group[0]: group for group in self._groups(step)}
        for block in _runs(sorted(groups), at_a_time):
            index = (slice(block.start, block.stop),)
            arrays = self._read(list(leaves), index)
            for number in block:
                members = np.zeros(total, bool)
                members[groups[number]] = True
                kernels = {
                    path.removeprefix(step.experts + "/"): array[number - block.start]
                    for path, array in arrays.items()
                }
                yield Expert(number, members, kernels)

    def bytes_of(self, step: Step) -> int:
        """Stored bytes that a pass through a step reads."""
        total = sum(self._nbytes(path) for path in self._paths(step))
        if step.experts:
            leaves = self._expert_leaves(step)
            groups = self._groups(step)
            count = sum(len(group) for group in groups)
            total += sum(self._nbytes(path) for path in leaves) * len(groups) // count
        return total

    def _paths(self, step: Step) -> dict[str, str]:
        """Parameters of a step by path, without experts -> their place in what it takes."""
        places = {path: step.place(path) for path in self.specs}
        return {
            path: place
            for path, place in places.items()
            if place is not None and not _is_below(step.experts, path)
        }

    def twins_of_experts(self, step: Step) -> dict[str, str]:
        """Leaves of a step's experts by path below them -> the leaves of the dense model that they
        come from.
        """
        return {
            path.removeprefix(f"{step.experts}/"): self.specs[path].twin
            for path in self.specs
            if _is_below(step.experts, path)
        }

    def _expert_leaves(self, step: Step) -> dict[str, trees.LeafSpec]:
        """The stored leaves of a step's experts, `[E, ...]`, by path."""
        return {
            path: self._stored[f"target/{path}"]
            for path in self.specs
            if _is_below(step.experts, path)
        }

    def _groups(self, step: Step) -> list[list[int]]:
        """The experts of a step, together where all their leaves share stored bytes."""
        if step.experts not in self._copies:
            leaves = self._expert_leaves(step)
            groups: dict[Hashable, list[int]] = {}
            for expert in range(next(iter(leaves.values())).shape[0]):
                slabs = tuple(self._chunks.slab(f"target/{path}", expert) for path in leaves)
                key: Hashable = expert if None in slabs else slabs
                groups.setdefault(key, []).append(expert)
            self._copies[step.experts] = list(groups.values())
        return self._copies[step.experts]

    def _nbytes(self, path: str) -> int:
        return self._stored[f"target/{path}"].nbytes

    def _read(
        self, paths: Sequence[str], index: tuple[slice, ...] | None = None
    ) -> dict[str, np.ndarray]:
        """Several leaves, or a part of each, on all cores."""

        def read(path: str) -> np.ndarray:
            array = self.reader.read(f"target/{path}", index)
            if self.meter is not None:
                self.meter.add(array.nbytes, path)
            return array

        with concurrent.futures.ThreadPoolExecutor(threads()) as pool:
            return dict(zip(paths, pool.map(read, paths), strict=True))


def _is_below(folder: str, path: str) -> bool:
    """Whether a path is below a folder; nothing is below ''."""
    return bool(folder) and path.startswith(f"{folder}/")


def _runs(numbers: list[int], at_most: int) -> Iterator[range]:
    """Ascending numbers as ranges of at most `at_most` each."""
    start = 0
    while start < len(numbers):
        stop = start + 1
        while (
            stop < len(numbers)
            and stop - start < at_most
            and numbers[stop] == numbers[stop - 1] + 1
        ):
            stop += 1
        yield range(numbers[start], numbers[stop - 1] + 1)
        start = stop


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.dtype(f"u{array.dtype.itemsize}"))

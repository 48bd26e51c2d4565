"""Reads the arrays of vision transformers as if they were T5X checkpoints."""

import dataclasses
import functools
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from upcycle_jax.checkpoints.reader import Index, ReaderBase, checked_index
from upcycle_jax.checkpoints.vit import names, slots
from upcycle_jax.checkpoints.vit.arrays import Arrays, Stored
from upcycle_jax.moe import roles
from upcycle_jax.printing import printable
from upcycle_jax.state_tree import PARAM_STATES, STEP, TARGET
from upcycle_jax.trees import LeafSpec

_log = logging.getLogger(__name__)

_CLS, _POSITIONS = f"{TARGET}cls", f"{TARGET}pos_embedding"
_MAX_LAYERS = 4096
"""Of arrays with an axis of layers: a claim beyond it would only cost memory."""


@dataclasses.dataclass(frozen=True)
class _Source:
    """The array behind a leaf.

    Attributes:
      array: its name.
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

    def read(self, arrays: Arrays, index: Index) -> np.ndarray:
        """The part of the leaf that `index` selects."""
        inner = arrays.arrays[self.array].shape[self.layer is not None :]
        before = () if self.layer is None else (slice(self.layer, self.layer + 1),)

        def part(*wanted: slice) -> np.ndarray:
            value = arrays.read(self.array, (*before, *wanted))
            return value if self.layer is None else value[0]

        if self.joined == names.HEADS:
            heads, size = inner[-2:]
            value = part(*index[:-1], slice(0, heads), slice(0, size))
            return value.reshape(*value.shape[:-2], heads * size)[..., index[-1]]
        if self.joined == names.JOINED:
            (_, size, width), rows = inner, index[0]
            first, last = rows.start // size, -(-rows.stop // size)
            value = part(slice(first, max(first, last)), slice(0, size), index[1])
            flat = value.reshape(-1, index[1].stop - index[1].start) if width else value
            return flat[rows.start - first * size : rows.stop - first * size]
        return part(*index)


class TreeReader(ReaderBase):
    """A vision transformer under the names of vit_jax, AugReg, big_vision or V-MoE, dense or with
    experts: the parameters, with one of `names.PREFIXES` before their names.

    Attention arrays are flattened to `[d, H * D]`. Where the class token has a position of its own
    (vit_jax, V-MoE), that is added to the token, so that positions are those of patches. Of a
    training state the step is read, and the state of big_vision's Adafactor (`slots`); another
    optimizer's is left out, which the log says.

    Args:
      arrays: what is stored.

    Raises:
      ValueError: it is damaged, holds an array that has no place, or lacks one.
    """

    def __init__(self, arrays: Arrays):
        self.path, self.format = arrays.path, arrays.format
        self._arrays = arrays
        self._heads = 0
        self._sources = self._find()
        self._token_has_position = self._find_positions()
        leaves = {name: self._spec(name, source) for name, source in self._sources.items()}
        self._step = self._find_step()
        self._slots = self._find_slots(leaves)
        leaves |= {f"{PARAM_STATES}{name}": slot.spec for name, slot in self._slots.items()}
        if self._step is not None:
            leaves[STEP] = LeafSpec((), self._arrays.arrays[self._step].dtype)
        self._specs = roles.inferred(dict(sorted(leaves.items())))

    def _find(self) -> dict[str, _Source]:
        """The array behind every leaf, by full path."""
        arrays = self._arrays.arrays
        prefix = names.prefix_of(arrays)
        if prefix is None:
            raise ValueError(
                f"{self.path} holds no vision transformer: no {names.FIRST}, with or without"
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
            self._check_rank(array, stored, place)
            if place.joined == names.HEADS:
                self._heads = stored.shape[-2]
            numbers: Iterable[int | None] = [None]
            if "{layer}" in place.path:
                numbers = range(self._depth(array, stored))
            for number in numbers:
                leaf = TARGET + place.path.format(layer=number)
                if leaf in found:
                    raise ValueError(
                        f"{self.path}: {printable(array)} and {printable(found[leaf].array)} are"
                        f" both {leaf}: the checkpoint is of two models"
                    )
                found[leaf] = _Source(array, number, place.joined)
        self._check(found)
        return found

    def _check_rank(self, array: str, stored: Stored, place: names.Place) -> None:
        """Raises a ValueError where an array of heads has too few axes."""
        least = {names.HEADS: 2, names.JOINED: 3}.get(place.joined or "", 0)
        if len(stored.shape) - ("{layer}" in place.path) < least:
            raise self._misshapen(array, stored, least)

    def _misshapen(self, array: str, stored: Stored, rank: int) -> ValueError:
        return ValueError(
            f"{self.path}: {printable(array)} has the shape {list(stored.shape)}, an array of"
            f" {rank} axes belongs there"
        )

    def _depth(self, array: str, stored: Stored) -> int:
        if not stored.shape or stored.shape[0] > _MAX_LAYERS:
            raise ValueError(
                f"{self.path}: {printable(array)} has the shape {list(stored.shape)}, whose first"
                " axis is no number of layers"
            )
        return stored.shape[0]

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
            stored = self._arrays.arrays[source.array]
            if len(stored.shape) - (source.layer is not None) != rank:
                raise self._misshapen(source.array, stored, rank)

    def _find_positions(self) -> bool:
        """Whether the class token has a position, before those of patches."""
        count = self._arrays.arrays[self._sources[_POSITIONS].array].shape[1]
        if math.isqrt(count) ** 2 == count:
            return False
        if _CLS in self._sources and math.isqrt(count - 1) ** 2 == count - 1:
            return True
        raise ValueError(
            f"{self.path} has {count} positions: neither they nor all but the first are a square of"
            " patches"
        )

    def _spec(self, name: str, source: _Source) -> LeafSpec:
        stored = self._arrays.arrays[source.array]
        shape = source.shape(stored.shape)
        if name == _POSITIONS and self._token_has_position:
            shape = (shape[0], shape[1] - 1, *shape[2:])
        return LeafSpec(shape, stored.dtype)

    def _find_step(self) -> str | None:
        """The array that holds the step of a training state; None where there is none."""
        for name in names.STEPS:
            stored = self._arrays.arrays.get(name)
            if stored is not None and stored.shape == () and stored.dtype.kind in "iu":
                return name
        return None

    def _find_slots(self, leaves: Mapping[str, LeafSpec]) -> dict[str, slots.Slot]:
        """The optimizer's slots; none where its state is not read, which the log says."""
        arrays = self._arrays.arrays
        count = sum(1 for name in arrays if names.is_optimizer_state(name))
        if not count:
            return {}
        prefix = names.prefix_of(arrays) or ""
        parameters = {
            name.removeprefix(TARGET): slots.Of(
                source.array.removeprefix(prefix), source.layer, source.joined, leaves[name].shape
            )
            for name, source in self._sources.items()
        }
        try:
            if self._token_has_position:
                raise slots.NotReadError("a position of the class token is in the positions' state")
            counting, found = slots.find(arrays, parameters, prefix)
        except slots.NotReadError as error:
            _tell_of_optimizer_state(self.path, count, str(error))
            return {}
        self._step = self._step or counting
        return found

    def specs(self) -> dict[str, LeafSpec]:
        return dict(self._specs)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        spec = self.spec(name)
        index = checked_index(name, spec.shape, index)
        if name == STEP:
            assert self._step is not None  # It has a spec.
            return np.asarray(self._arrays.read(self._step, ()))
        if name.startswith(PARAM_STATES):
            return self._read_slot(name.removeprefix(PARAM_STATES), index)
        source = self._sources[name]
        if self._token_has_position and name == _POSITIONS:
            first, rows, *rest = index
            index = (first, slice(rows.start + 1, rows.stop + 1), *rest)
        value = source.read(self._arrays, index)
        if self._token_has_position and name == _CLS:
            # One token, whose position is the first.
            value = value + self._sources[_POSITIONS].read(self._arrays, index)
        return np.ascontiguousarray(value)

    def _read_slot(self, name: str, index: Index) -> np.ndarray:
        slot = self._slots[name]
        if slot.array is not None:
            source = self._sources[TARGET + name.rpartition("/")[0]]
            value = dataclasses.replace(source, array=slot.array).read(self._arrays, index)
        else:
            assert slot.read is not None  # It has no array.
            value = slot.read(self._arrays, index)
        return np.asarray(value, order="C")

    def model_settings(self) -> Mapping[str, Any]:
        """The arithmetic of the projects that write such checkpoints: tanh GELU, epsilon 1e-6."""
        pool = "mean"
        if f"{TARGET}map_head/probe" in self._sources:
            pool = "map"
        elif _CLS in self._sources:
            pool = "class_token"
        return {**names.ARITHMETIC, "num_heads": self._heads, "pool": pool}

    def fingerprint(self) -> str:
        return self._arrays.fingerprint()


@functools.lru_cache(maxsize=64)
def _tell_of_optimizer_state(path: str, count: int, why: str) -> None:
    """Logs once what is left out."""
    _log.warning(
        "%s holds its optimizer's state (arrays: %d), which is not read, since %s: what goes on"
        " from it starts with a fresh one",
        path,
        count,
        why,
    )


def _hint(array: str) -> str:
    if "pre_logits" in array:
        return ": models with a layer before the head (pre_logits) are not read"
    return ""

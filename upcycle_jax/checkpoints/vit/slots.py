"""The state of big_vision's Adafactor in training states of big_vision and of V-MoE, as the slots
`v_row`, `v_col`, `v`, `m` and `count` of each parameter.

Both keep it as optax's chain (factored second moments, then the average of updates), big_vision
with the positions of tuples as names, V-MoE with the names of fields:

    big_vision   opt/1/0/0/{0: count, 1: v_row, 2: v_col, 3: v}/<parameter>, opt/1/0/2/1/<parameter>
    V-MoE        opt_state/2/0/{count, v_row, v_col, v}/<parameter>, opt_state/2/1/ema/<parameter>

Attention arrays of three axes are factored there over the two largest, and are matrices here. Rows
and columns are means of squared gradients, so that a matrix's are means of those, or of a full
second moment: the numbers that its own averages would have come to.

Axis legend: d model width, H heads, D size of a head, f hidden width of the MLP, E experts.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from upcycle_jax.checkpoints.reader import Index
from upcycle_jax.checkpoints.vit import names
from upcycle_jax.checkpoints.vit.arrays import Arrays, Stored
from upcycle_jax.moe import roles
from upcycle_jax.state_tree import UNUSED_SHAPE
from upcycle_jax.trees import LeafSpec

COUNT, ROW, COLUMN, FULL, AVERAGE = "count", "v_row", "v_col", "v", "m"
LEAST = 32
"""Elements from which a dimension is factored: the default of big_vision and V-MoE."""

_FORMS = (
    (
        re.compile(r"opt/(\d{1,2})/0/(0/[0-3]|2/[01])(?:/(.+))?"),
        {"0/0": COUNT, "0/1": ROW, "0/2": COLUMN, "0/3": FULL, "2/1": AVERAGE},
    ),
    (
        re.compile(r"opt_state/(\d{1,2})/(0/(?:count|v_row|v_col|v)|1/(?:count|ema))(?:/(.+))?"),
        {"0/count": COUNT, "0/v_row": ROW, "0/v_col": COLUMN, "0/v": FULL, "1/ema": AVERAGE},
    ),
)

Read = Callable[[Arrays, Index], np.ndarray]


class NotReadError(Exception):
    """A state is there, and is none that is read; with the reason."""


@dataclasses.dataclass(frozen=True)
class Of:
    """The array behind a parameter.

    Attributes:
      array: its name, without what stands before all names of the model.
      layer: which entry of its first axis; None for the whole array.
      joined: see `names.Place`.
      shape: of the parameter.
    """

    array: str
    layer: int | None
    joined: str | None
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Slot:
    """A slot of a parameter.

    Attributes:
      spec: of it.
      read: its values, of an index with explicit bounds.
      array: where it is an array of the parameter's shape, that array's name: it is joined as the
        parameter's.
    """

    spec: LeafSpec
    read: Read | None
    array: str | None = None


@dataclasses.dataclass(frozen=True)
class _State:
    """Arrays of the state by slot and by the parameter's array; `count` counts updates."""

    count: str
    slots: Mapping[str, Mapping[str, str]]


def find(
    arrays: Mapping[str, Stored], parameters: Mapping[str, Of], prefix: str
) -> tuple[str, dict[str, Slot]]:
    """The array that counts updates, and the slots of every parameter, as '<parameter>/<slot>'.

    Args:
      arrays: all that are stored.
      parameters: by path.
      prefix: what stands before the names of the model.

    Raises:
      NotReadError: the state is of another optimizer, or of another form; or its moments are not
        those of matrices.
    """
    state = _state(arrays, prefix.removeprefix("params/"))
    found: dict[str, Slot] = {}
    for path, of in parameters.items():
        for slot, value in _slots(arrays, state, path, of).items():
            found[f"{path}/{slot}"] = value
    return state.count, found


def _state(arrays: Mapping[str, Stored], before: str) -> _State:
    """Args: before: what stands before the names of parameters in the state."""
    for pattern, parts in _FORMS:
        slots: dict[str, dict[str, str]] = {slot: {} for slot in parts.values()}
        places = set()
        for array in arrays:
            match = pattern.fullmatch(array)
            slot = parts.get(match[2]) if match else None
            if match and slot is not None:
                places.add(match[1])
                slots[slot][(match[3] or "").removeprefix(before)] = array
        count = slots.pop(COUNT).get("")
        if count is None or not all(slots.values()):
            continue
        if len(places) > 1:
            raise NotReadError("it has several states of Adafactor")
        if arrays[count].shape != () or arrays[count].dtype.kind not in "iu":
            raise NotReadError(f"{count} is no number of updates")
        return _State(count, slots)
    raise NotReadError("it is not that of big_vision's Adafactor with momentum, in its own layout")


def _slots(arrays: Mapping[str, Stored], state: _State, path: str, of: Of) -> dict[str, Slot]:
    stored = {}
    for slot, by_name in state.slots.items():
        if of.array not in by_name:
            raise NotReadError(f"it has no {slot} of {of.array}")
        stored[slot] = by_name[of.array]
    shape = arrays[stored[AVERAGE]].shape
    is_expert = f"/{roles.EXPERT}/" in path
    out = {AVERAGE: Slot(LeafSpec(of.shape, arrays[stored[AVERAGE]].dtype), None, stored[AVERAGE])}
    experts = of.shape[:1] if is_expert else ()
    out[COUNT] = Slot(LeafSpec(experts, np.dtype(np.int32)), _counted(state.count, experts))
    missing = _factored(arrays, stored, shape)
    groups = _groups(len(shape), of)
    inner = of.shape[is_expert:]
    if len(inner) >= 2 and sorted(inner)[-2] >= LEAST:
        # As optax: of equal dimensions the later counts as larger.
        small, large = (int(axis) + is_expert for axis in np.argsort(inner)[-2:])
        for slot, reduced in ((ROW, large), (COLUMN, small)):
            out[slot] = _marginal(arrays, stored, missing, groups, reduced, of)
        out[FULL] = _unused()
        return out
    if missing is not None:
        raise NotReadError(f"{of.array} has factored second moments there, and full ones here")
    out[FULL] = Slot(LeafSpec(of.shape, arrays[stored[FULL]].dtype), None, stored[FULL])
    return out | {ROW: _unused(), COLUMN: _unused()}


def _factored(
    arrays: Mapping[str, Stored], stored: Mapping[str, str], shape: tuple[int, ...]
) -> Mapping[str, int] | None:
    """Which axis rows and columns lack; None where the second moment is full."""
    full, row, column = (arrays[stored[slot]].shape for slot in (FULL, ROW, COLUMN))
    if full == shape and row == column == UNUSED_SHAPE:
        return None
    if len(shape) >= 2:
        small, large = (int(axis) for axis in np.argsort(shape)[-2:])
        lacking = {ROW: large, COLUMN: small}
        if full == UNUSED_SHAPE and all(
            arrays[stored[slot]].shape == (*shape[:axis], *shape[axis + 1 :])
            for slot, axis in lacking.items()
        ):
            return lacking
    raise NotReadError(
        f"{stored[FULL]} has the shape {list(full)}, and rows and columns {list(row)} and"
        f" {list(column)}, of {list(shape)}"
    )


def _groups(rank: int, of: Of) -> list[tuple[int, ...]]:
    """The stored axes that each axis of the parameter is made of; of an axis of layers none is."""
    axes: list[tuple[int, ...]] = [(axis,) for axis in range(of.layer is not None, rank)]
    if of.joined == names.HEADS:
        return [*axes[:-2], axes[-2] + axes[-1]]
    return [axes[0] + axes[1], *axes[2:]] if of.joined == names.JOINED else axes


def _marginal(
    arrays: Mapping[str, Stored],
    stored: Mapping[str, str],
    missing: Mapping[str, int] | None,
    groups: Sequence[tuple[int, ...]],
    reduced: int,
    of: Of,
) -> Slot:
    """The mean of the second moment over an axis of the parameter."""
    over = set(groups[reduced])
    shape = (*of.shape[:reduced], *of.shape[reduced + 1 :])
    array, lacks = stored[FULL], None
    if missing is not None:
        slot = next((slot for slot, axis in missing.items() if axis in over), None)
        if slot is None:
            raise NotReadError(f"{of.array} is factored over other dimensions there")
        array, lacks = stored[slot], missing[slot]
    # Axes of the array that is read, of which one may be missing already.
    axes = tuple(
        axis - (lacks is not None and axis > lacks) for axis in sorted(over) if axis != lacks
    )
    bounds = arrays[array].shape

    def read(source: Arrays, index: Index) -> np.ndarray:
        whole = [slice(0, size) for size in bounds]
        if of.layer is not None:
            whole[0] = slice(of.layer, of.layer + 1)
        value = source.read(array, tuple(whole)).astype(np.float32)
        value = value.mean(axis=axes, dtype=np.float32) if axes else value
        assert value.size == math.prod(shape)
        return value.reshape(shape)[index]

    return Slot(LeafSpec(shape, np.dtype(np.float32)), read)


def _counted(array: str, experts: tuple[int, ...]) -> Read:
    def read(source: Arrays, index: Index) -> np.ndarray:
        return np.full(experts, source.read(array, ()), np.int32)[index]

    return read


def _unused() -> Slot:
    def read(source: Arrays, index: Index) -> np.ndarray:
        return np.zeros(UNUSED_SHAPE, np.float32)[index]

    return Slot(LeafSpec(UNUSED_SHAPE, np.dtype(np.float32)), read)

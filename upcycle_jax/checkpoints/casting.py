"""Casts of values that are about to be stored."""

import numpy as np

from upcycle_jax.checkpoints.reader import Index
from upcycle_jax.printing import printable


class OverflowingCast(ValueError):
    """A finite value that is infinite in the dtype that was asked for."""


def cast(name: str, value: np.ndarray, dtype: np.dtype, index: Index | None = None) -> np.ndarray:
    """`value` in another dtype; itself where it has it already.

    Digits that the dtype does not hold are lost, as asked for. What was infinite or NaN before
    stays so.

    Args:
      name: the leaf, for the message.
      value: any shape.
      dtype: to store.
      index: the part of the leaf that `value` is, with explicit bounds; None for all of it.

    Raises:
      OverflowingCast: a finite value would become infinite; leaf, place and value are named.
    """
    if value.dtype == dtype:
        return value
    with np.errstate(over="ignore"):
        out = value.astype(dtype)
    if out.dtype.kind in "iub":  # no floating-point number is asked for
        return out
    lost = ~np.isfinite(out)
    if lost.any():
        lost &= np.isfinite(value)
    if lost.any():
        place = tuple(map(int, np.argwhere(lost)[0])) if value.ndim else ()
        first = [part.start for part in index] if index else [0] * value.ndim
        where = [start + offset for start, offset in zip(first, place, strict=True)]
        raise OverflowingCast(
            f"{printable(name)} holds {value[place]:.6g} at {where}, which {dtype.name}"
            f" cannot hold ({int(lost.sum())} of {value.size} values here): choose bfloat16 or"
            " float32"
        )
    return out

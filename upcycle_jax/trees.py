"""Trees as flat dictionaries with '/'-joined paths: the one place that builds and splits parameter
paths.
"""

import dataclasses
import enum
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from upcycle_jax.types import PyTree

SEPARATOR = "/"


class Role(enum.StrEnum):
    """What a parameter is to an MoE model."""

    DENSE = "dense"
    EXPERT = "expert"
    SHARED_EXPERT = "shared_expert"
    ROUTER = "router"
    ROUTER_BIAS = "router_bias"
    SHARED_GATE = "shared_expert_gate"


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """Shape, dtype, logical axes and role of one array, without its values.

    Attributes:
      shape: dimensions.
      dtype: NumPy dtype (ml_dtypes' bfloat16 included).
      axes: logical axis name per dimension (see `axes`), or None per dimension where unknown. Empty
        stands for "all unknown".
      role: what the parameter is, or for an optimizer slot what its parameter is.
      twin: path of the leaf of the dense model that this leaf comes from (its own path, for a dense
        leaf); '' where there is none or nothing is known. Specs that differ in role or twin alone
        are equal.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[str | None, ...] = ()
    role: Role = dataclasses.field(default=Role.DENSE, compare=False)
    twin: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        object.__setattr__(self, "axes", tuple(self.axes) or (None,) * len(self.shape))
        if len(self.axes) != len(self.shape):
            raise ValueError(
                f"axes {self.axes} do not name the dimensions of shape {self.shape} one by one"
            )

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the uncompressed array."""
        return self.size * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype.name}[{','.join(map(str, self.shape))}]"


def flatten(tree: PyTree) -> dict[str, Any]:
    """Flattens nested dicts to `{'a/b/c': leaf}`, sorted by path. Empty dicts vanish.

    >>> flatten({"b": {"c": 2}, "a": 1})
    {'a': 1, 'b/c': 2}
    """
    flat = traverse_util.flatten_dict(tree, sep=SEPARATOR) if tree else {}
    return dict(sorted(flat.items()))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`.

    >>> unflatten({"a": 1, "b/c": 2})
    {'a': 1, 'b': {'c': 2}}
    """
    nested: dict[str, Any] = traverse_util.unflatten_dict(dict(flat), sep=SEPARATOR)
    return nested


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """The paths that `pattern` (a regular expression) matches from end to end, in order."""
    compiled = re.compile(pattern)
    return [path for path in paths if compiled.fullmatch(path)]


@dataclasses.dataclass(frozen=True)
class TreeDiff:
    """What differs between two flat trees of things with a `shape` (and a `dtype`, where both sides
    have one).
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, str, str], ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = [f"- {path} (expected, not there)" for path in self.missing]
        lines += [f"+ {path} (there, not expected)" for path in self.unexpected]
        lines += [
            f"! {path}: expected {want}, found {have}" for path, want, have in self.mismatched
        ]
        return "\n".join(lines) or "no difference"


def _describe(leaf: Any, with_dtype: bool) -> str:
    shape = f"[{','.join(map(str, leaf.shape))}]"
    return f"{np.dtype(leaf.dtype).name}{shape}" if with_dtype else shape


def diff(
    expected: Mapping[str, Any], actual: Mapping[str, Any], *, compare_dtype: bool = False
) -> TreeDiff:
    """Compares two flat trees by path and shape, and by dtype when asked.

    Args:
      expected: flat tree of arrays or specs.
      actual: flat tree of arrays or specs.
      compare_dtype: also report equal shapes with different dtypes.
    """
    mismatched = []
    for path in expected.keys() & actual.keys():
        want, have = (_describe(side[path], compare_dtype) for side in (expected, actual))
        if want != have:
            mismatched.append((path, want, have))
    return TreeDiff(
        missing=tuple(sorted(expected.keys() - actual.keys())),
        unexpected=tuple(sorted(actual.keys() - expected.keys())),
        mismatched=tuple(sorted(mismatched)),
    )

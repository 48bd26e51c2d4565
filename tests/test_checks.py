"""What annotations say of values: `checks.problem` on every kind of them."""

import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import numpy as np
import pytest

from upcycle_jax import checks
from upcycle_jax.checks import Range


class Colour(enum.StrEnum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Net:
    width: checks.Size = 8
    names: tuple[str, ...] = ()

    def __post_init__(self):
        checks.check_fields(self)


@dataclasses.dataclass(frozen=True)
class DeepNet(Net):
    depth: Annotated[int, Range(at_least=2, hint="one layer is no stack")] = 2


@runtime_checkable
class Moves(Protocol):
    speed: float

    def move(self) -> None: ...


class Car:
    speed = 1.0

    def move(self) -> None: ...


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (3, int),
        (np.int64(3), int),
        (3, float),
        (np.float32(0.5), float),
        (True, bool),
        (np.bool_(True), bool),
        ("x", str),
        (Colour.RED, str),
        ("red", Colour),
        ("red", Literal["red", "blue"]),
        (Colour.RED, Literal["red"]),
        (None, int | None),
        ([1, 2], tuple[int, ...]),
        ((1, "a"), tuple[int, str]),
        ({"a": [1]}, Mapping[str, Sequence[int]]),
        ("a", str | Sequence[str]),
        (np.sum, Callable[..., Any]),
        (Net(), Net),
        (DeepNet(), Annotated[Any, checks.InstanceOf("Net")]),
        (Car(), Moves),
        (object(), Any),
        ("gs://bucket/run", checks.PathText),
        ("2GiB", checks.Bytes),
        (1 << 40, checks.Bytes),
    ],
)
def test_right_values(value, annotation):
    assert checks.problem(value, annotation) is None


@pytest.mark.parametrize(
    ("value", "annotation", "text"),
    [
        (True, int, "must be a whole number, got True"),
        ("32", int, "must be a whole number, got '32': write 32 without quotes"),
        (2.0, int, "must be a whole number, got 2.0: write 2"),
        (2.5, int, "must be a whole number, got 2.5"),
        (float("inf"), int, "must be a whole number, got inf"),
        (True, float, "must be a number, got True"),
        (float("nan"), float, "must be a finite number in float32, got nan"),
        (1e39, float, "must be a finite number in float32, got 1e+39"),
        (10**400, float, "must be a finite number in float32, got 1000"),
        ("nan", float, "must be a number, got 'nan'"),
        ("1e-3", float, "must be a number, got '1e-3': write 1e-3 without quotes"),
        ("false", bool, "must be True or False, got 'false': write False without quotes"),
        (0, bool, "must be True or False, got 0: write False"),
        (3, str, "must be text, got 3: text stands in quotes, '3'"),
        ("None", int | None, "must be a whole number or None, got 'None': write None without"),
        ("@Net()", Net, "must be a Net, got '@Net()': write @Net() without quotes"),
        (Net, Net, "write it with parentheses, @Net()"),
        (functools.partial(Net, width=3), Net, "write it with parentheses, @Net()"),
        (Car, Moves, "write it with parentheses, @Car()"),
        (3, Moves, "must be a Moves, got 3"),
        ("net", Annotated[Any, checks.InstanceOf("Net")], "must be a Net, got 'net'"),
        ("green", Literal["red", "blue"], "must be 'red' or 'blue', got 'green'"),
        (1, Literal[True], "must be True, got 1"),
        ("green", Colour, "must be 'red', got 'green'"),
        ("gelu", tuple[str, ...], "must be a list, got 'gelu': write ['gelu']"),
        ([1, "2"], tuple[int, ...], "has an entry 1 that must be a whole number, got '2'"),
        ([1], tuple[int, str], "must hold 2 values, got [1]"),
        ({"a": "1"}, Mapping[str, int], "has an entry 'a' that must be a whole number, got '1'"),
        ({1: 1}, Mapping[str, int], "has an entry 1 that must be text, got 1"),
        (Net, Callable[..., Any], "must be a function"),
        (0, checks.Size, "must be at least 1, got 0"),
        (10**7, checks.Size, "must be at least 1 and at most 1048576, got 10000000"),
        (0, checks.Size | None, "must be at least 1, got 0"),
        (1.0, checks.BelowOne, "must be at least 0 and below 1, got 1.0"),
        (0.0, checks.Positive, "must be above 0, got 0.0"),
        ("", checks.PathText, "is empty: name a file or folder"),
        ("a\0b", checks.PathText, "holds a null byte"),
        ("x" * 5000, checks.PathText, "is a path of 5000 bytes ('xxx"),
        ("a/" + "x" * 300, checks.PathText, "each name in it 255"),
        ("much", checks.Bytes, "must be a size: 'much' is no size"),
        ("x", Annotated[int, checks.Hint("{'a': 1}")], "must be a whole number, got 'x': write {"),
    ],
)
def test_wrong_values(value, annotation, text):
    found = checks.problem(value, annotation)
    assert found is not None and text in found.text and len(found.text) < 400


def test_fields_are_checked_by_class_and_name_in_subclasses_too():
    assert Net(width=2).width == 2
    with pytest.raises(ValueError, match=r"Net.width must be at least 1, got 0"):
        Net(width=0)
    with pytest.raises(ValueError, match=r"DeepNet.names must be a list, got 'a': write \['a'\]"):
        DeepNet(names="a")
    with pytest.raises(ValueError, match=r"depth must be at least 2, got 1: one layer is no stack"):
        DeepNet(depth=1)


def test_an_annotation_for_the_type_checker_alone_checks_nothing():
    def function(a: "Unknown", b: int = 0) -> None: ...  # noqa: F821

    assert "a" not in checks.annotations_of(function)
    assert checks.annotations_of(function)["b"] is int

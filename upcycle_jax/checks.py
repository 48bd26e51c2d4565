"""Types and ranges of settings, read from annotations.

    @dataclasses.dataclass(frozen=True)
    class Net:
        width: Annotated[int, Range(at_least=1)]

        def __post_init__(self):
            checks.check_fields(self)

The configuration checks the arguments of everything that gin files build in the same way, before it
is built; `problem` is that check for one value.
"""

import collections.abc
import dataclasses
import enum
import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

import numpy as np

from upcycle_jax import byte_sizes

_NUMBERS = (int, float, np.integer, np.floating)
_LARGEST = float(np.finfo(np.float32).max)
_SHOWN = 80
"""Characters of a value that a message shows."""


ADDED = {"added": True}
"""Metadata of a field that the first version of its class did not have: see `is_shown`."""


def is_shown(owner: Any, field: dataclasses.Field) -> bool:
    """Whether records and texts show a field of a dataclass: all but `ADDED` ones that have their
    default, so that they read as those of earlier versions.
    """
    added = field.metadata.get("added", False)
    return not added or bool(getattr(owner, field.name) != field.default)


def shown_repr(owner: Any) -> str:
    """What dataclasses print of themselves, less the fields that `is_shown` leaves out: for
    `__repr__` of classes with `ADDED` fields whose texts are compared with those of earlier runs.
    """
    fields = [
        f"{field.name}={getattr(owner, field.name)!r}"
        for field in dataclasses.fields(owner)
        if is_shown(owner, field)
    ]
    return f"{type(owner).__qualname__}({', '.join(fields)})"


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with a value.

    Attributes:
      text: goes on where the name of the setting ends: "must be a whole number, got '32': ...".
      accepts: whether instances of a class would be right, where the value is of a wrong class.
      is_range: the type is right, the value (or an entry of it) is not.
    """

    text: str
    accepts: Callable[[type], bool] | None = None
    is_range: bool = False


class Constraint(Protocol):
    """Metadata of `Annotated` that `problem` asks."""

    def problem(self, value: Any) -> Problem | None:
        """What is wrong with a value of the right type; None where nothing is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """Bounds of a number; None for none.

    Attributes:
      at_least: smallest value.
      above: a value that it must exceed.
      at_most: largest value.
      below: a value that it must not reach.
      hint: what to do instead, behind the message.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    hint: str = ""

    def problem(self, value: Any) -> Problem | None:
        """See `Constraint`."""
        if not isinstance(value, _NUMBERS):
            return None  # the type is told already, or another member of a union
        too_low = (self.at_least is not None and value < self.at_least) or (
            self.above is not None and value <= self.above
        )
        too_high = (self.at_most is not None and value > self.at_most) or (
            self.below is not None and value >= self.below
        )
        if not too_low and not too_high:
            return None
        low = [("at least", self.at_least), ("above", self.above)]
        high = [("at most", self.at_most), ("below", self.below)]
        # An upper bound that only keeps out nonsense is told where it is what was broken.
        both = too_high or self.below is not None or (self.at_most or math.inf) <= 1
        words = [
            f"{word} {bound}"
            for word, bound in (*low, *(high if both else ()))
            if bound is not None
        ]
        hint = f": {self.hint}" if self.hint else ""
        return Problem(f"must be {' and '.join(words)}, got {shown(value)}{hint}", is_range=True)


@dataclasses.dataclass(frozen=True)
class PathName:
    """A path that a file system can hold: not empty, without null bytes, no longer than Linux
    allows.
    """

    def problem(self, value: Any) -> Problem | None:
        """See `Constraint`."""
        if not isinstance(value, str | os.PathLike):
            return None
        text = os.fspath(value)
        if isinstance(text, bytes):
            return Problem(f"must be text, got {shown(value)}")
        if not text.strip():
            return Problem("is empty: name a file or folder", is_range=True)
        if "\0" in text:
            return Problem(f"holds a null byte: {shown(text)}", is_range=True)
        size = len(text.encode(errors="surrogateescape"))
        longest = max(len(part.encode(errors="surrogateescape")) for part in text.split("/"))
        if size > 4000 or longest > 255:
            return Problem(
                f"is a path of {size} bytes ({shown(text)}): a path holds at most 4000 bytes and"
                " each name in it 255",
                is_range=True,
            )
        return None


@dataclasses.dataclass(frozen=True)
class Hint:
    """What to write, told behind every problem of the type that says nothing of it."""

    text: str

    def problem(self, value: Any) -> Problem | None:
        """Refuses nothing itself."""
        return None


@dataclasses.dataclass(frozen=True)
class ByteSize:
    """A number of bytes, or text such as '2GiB' (`byte_sizes.parse_bytes`)."""

    def problem(self, value: Any) -> Problem | None:
        """See `Constraint`."""
        try:
            byte_sizes.parse_bytes(value)
        except ValueError as error:
            return Problem(f"must be a size: {error}", is_range=True)
        return None


@dataclasses.dataclass(frozen=True, init=False)
class InstanceOf:
    """An instance of one of several classes, by their names: the room of the annotated function
    does not import theirs. Objects of classes outside this project are taken for such instances.

    Attributes:
      names: of the classes; subclasses are instances too.
    """

    names: tuple[str, ...]

    def __init__(self, *names: str):
        object.__setattr__(self, "names", names)

    def accepts(self, kind: type) -> bool:
        """Whether instances of a class are meant."""
        return any(base.__name__ in self.names for base in kind.__mro__)

    def problem(self, value: Any) -> Problem | None:
        """See `Constraint`."""
        kind = type(value)
        package = kind.__module__.partition(".")[0]
        is_foreign = package not in ("builtins", "functools", "numpy", "upcycle_jax")
        if not inspect.isclass(value) and (is_foreign or self.accepts(kind)):
            return None
        want = " or ".join(map(_with_article, self.names))
        return dataclasses.replace(_wrong(value, Any, want=want), accepts=self.accepts)


Size = Annotated[int, Range(at_least=1, at_most=2**20)]
"""A dimension of an array."""
Experts = Annotated[int, Range(at_least=1, at_most=2**15)]
"""Losses multiply by its square, an int32."""
Layers = Annotated[int, Range(at_least=1, at_most=1024)]
Count = Annotated[int, Range(at_least=1, at_most=2**31 - 1)]
"""How many of something, or a period in steps: at least one. Steps are int32."""
CountOrZero = Annotated[int, Range(at_least=0, at_most=2**31 - 1)]
Seed = Annotated[int, Range(at_least=0, at_most=2**31 - 1)]
NotNegative = Annotated[float, Range(at_least=0)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(at_least=0, at_most=1)]
BelowOne = Annotated[float, Range(at_least=0, below=1)]
"""A rate such as dropout's: at 1 nothing would be left."""
PathText = Annotated[str, PathName()]
Bytes = Annotated[int | str, ByteSize()]

Device = Annotated[Any, InstanceOf("Device")]
Dataset = Annotated[Any, InstanceOf("DatasetConfig")]
Examples = Annotated[Any, InstanceOf("FewShot")]


def shown(value: Any) -> str:
    """A value as messages show it, shortened."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]}... ({len(text)} characters)"


def problem(value: Any, annotation: Any) -> Problem | None:
    """What is wrong with a value by an annotation; None where nothing is.

    A bool is no number, a whole number is a float too, NaN and infinity are none. Lists stand for
    tuples, as in gin files. What an annotation says that is not known here is not checked.
    """
    if annotation is Any:
        return None
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        constraints = [part for part in args[1:] if hasattr(part, "problem")]
        found = problem(value, args[0]) or next(
            filter(None, (part.problem(value) for part in constraints)), None
        )
        hint = next((part.text for part in constraints if isinstance(part, Hint)), "")
        if found and hint and ": write" not in found.text:
            found = dataclasses.replace(found, text=f"{found.text}: write {hint}", accepts=None)
        bound_hint = next((part.hint for part in constraints if isinstance(part, Range)), "")
        if found and found.is_range and bound_hint and bound_hint not in found.text:
            found = dataclasses.replace(found, text=f"{found.text}: {bound_hint}")
        return found
    if origin in (typing.Union, types.UnionType):
        return _union_problem(value, args)
    if origin is Literal:
        fits = any(value == choice and type(value) is type(choice) for choice in args)
        return None if fits or _is_member(value, args) else _wrong(value, annotation)
    if origin in _CONTAINERS:
        return _container_problem(value, annotation, origin, args)
    kind = origin or annotation
    if kind in (None, type(None)):
        return None if value is None else _wrong(value, annotation)
    if kind in _SCALARS:
        return _scalar_problem(value, kind)
    if kind is collections.abc.Callable:
        return None if callable(value) and not inspect.isclass(value) else _wrong(value, annotation)
    if isinstance(kind, type):
        return _class_problem(value, kind)
    return None


def _is_member(value: Any, choices: Sequence[Any]) -> bool:
    return isinstance(value, enum.StrEnum) and str(value) in choices


def _union_problem(value: Any, members: Sequence[Any]) -> Problem | None:
    found = [problem(value, member) for member in members]
    told = [part for part in found if part is not None]
    if len(told) < len(found):
        return None
    close = [part for part in told if part.is_range]
    if close:
        return close[0]
    classes = [part for part in told if part.accepts is not None]
    if len(classes) == 1 and len(told) <= 2:  # one class, or None
        return classes[0]
    return _wrong(value, *members, want=_described(members))


_SCALARS: dict[type, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
}

_CONTAINERS = (
    tuple,
    list,
    dict,
    collections.abc.Sequence,
    collections.abc.Mapping,
)


def _scalar_problem(value: Any, kind: type) -> Problem | None:
    if kind is bool:
        fits = isinstance(value, bool | np.bool_)
    elif kind is int:
        fits = isinstance(value, int | np.integer) and not isinstance(value, bool)
    elif kind is float:
        fits = isinstance(value, _NUMBERS) and not isinstance(value, bool)
    else:
        fits = isinstance(value, str)
    if not fits:
        return _wrong(value, kind)
    if kind is float and not (_is_finite(value) and abs(value) <= _LARGEST):
        return Problem(f"must be a finite number in float32, got {shown(value)}", is_range=True)
    return None


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _container_problem(
    value: Any, annotation: Any, origin: Any, args: tuple[Any, ...]
) -> Problem | None:
    if origin in (dict, collections.abc.Mapping):
        if not isinstance(value, Mapping):
            return _wrong(value, annotation)
        for key, part in value.items():
            for item, want in ((key, args[0]), (part, args[1])):
                if found := problem(item, want):
                    place = f"has an entry {shown(key)} that"
                    return dataclasses.replace(found, text=f"{place} {found.text}", is_range=True)
        return None
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return _wrong(value, annotation)
    wanted = (
        args
        if origin is tuple and args[-1:] != (Ellipsis,)
        else [args[0] if args else Any] * len(value)
    )
    if len(wanted) != len(value):
        return Problem(f"must hold {len(wanted)} values, got {shown(value)}")
    for index, (part, want) in enumerate(zip(value, wanted, strict=True)):
        if found := problem(part, want):
            text = f"has an entry {index} that {found.text}"
            return dataclasses.replace(found, text=text, is_range=True)
    return None


def _class_problem(value: Any, kind: type) -> Problem | None:
    if isinstance(kind, enum.EnumType):
        choices = [str(choice) for choice in list[Any](kind)]
        wanted: Any = Literal
        return None if value in choices else _wrong(value, wanted[tuple(choices)])
    if getattr(kind, "_is_protocol", False):
        fits = _has_members(value, kind)
    else:
        fits = isinstance(value, kind)
    # A class has the methods of its instances, so a protocol would take it.
    if fits and not inspect.isclass(value) and not isinstance(value, functools.partial):
        return None
    return dataclasses.replace(_wrong(value, kind), accepts=functools.partial(_is_subclass, kind))


def _has_members(thing: Any, protocol: type) -> bool:
    """Whether an object or a class has the methods and attributes that a protocol asks for.
    Properties are left out: an object's class need not have them, and they may be costly.
    """
    bases = [base for base in protocol.__mro__ if getattr(base, "_is_protocol", False)]
    names = {
        name
        for base in bases
        for name in (
            *filter(lambda n: inspect.isfunction(vars(base)[n]), vars(base)),
            *inspect.get_annotations(base),
        )
        if not name.startswith("_")
    }
    return all(hasattr(thing, name) for name in names)


def _is_subclass(expected: type, kind: type) -> bool:
    if getattr(expected, "_is_protocol", False):
        return _has_members(kind, expected)
    return issubclass(kind, expected)


def _describe(annotation: Any) -> str:
    """What an annotation asks for, in words."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return "a path" if any(isinstance(a, PathName) for a in args[1:]) else _describe(args[0])
    if origin in (typing.Union, types.UnionType):
        return _described(args)
    if origin is Literal:
        return _joined([repr(choice) for choice in args])
    if origin in (dict, collections.abc.Mapping):
        return "a dictionary"
    if origin in _CONTAINERS:
        return "a list"
    if annotation in (None, type(None)):
        return "None"
    if annotation is os.PathLike:
        return "a path"
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    if (origin or annotation) is collections.abc.Callable:
        return "a function"
    return _with_article(getattr(annotation, "__name__", str(annotation)))


def _described(members: Sequence[Any]) -> str:
    """What a union asks for."""
    words: list[str] = []
    for member in members:
        choices = typing.get_args(member) if typing.get_origin(member) is Literal else ()
        words += map(repr, choices) if choices else [_describe(member)]
    return _joined(words)


def _joined(words: Sequence[str]) -> str:
    *first, last = dict.fromkeys(words)
    return f"{', '.join(first)} or {last}" if first else last


def _with_article(name: str) -> str:
    return f"{'an' if name[:1] in 'AEIOU' else 'a'} {name}"


def _wrong(value: Any, *wants: Any, want: str = "") -> Problem:
    advice = _advice(value, wants)
    return Problem(
        f"must be {want or _describe(wants[0])}, got {shown(value)}"
        f"{f': {advice}' if advice else ''}"
    )


def _plain(wants: Sequence[Any]) -> set[Any]:
    """The types that a tuple of annotations comes down to."""
    out: set[Any] = set()
    for want in wants:
        origin, args = typing.get_origin(want), typing.get_args(want)
        if origin is Annotated:
            out |= _plain(args[:1])
        elif origin in (typing.Union, types.UnionType):
            out |= _plain(args)
        else:
            out.add(origin or want)
    return out


def _advice(value: Any, wants: Sequence[Any]) -> str:
    """What to write instead, where the value shows what was meant."""
    kinds = _plain(wants)
    if inspect.isclass(value) or inspect.isfunction(value) or isinstance(value, functools.partial):
        target = value.func if isinstance(value, functools.partial) else value
        return f"write it with parentheses, @{target.__name__}()"
    if isinstance(value, str):
        text = value.strip()
        if text.startswith(("@", "%")):
            return f"write {text} without quotes"
        if bool in kinds and text.lower() in ("true", "false"):
            return f"write {text.capitalize()} without quotes"
        if text.lower() == "none" and type(None) in kinds:
            return "write None without quotes"
        for kind in (int, float):
            if kind in kinds and _reads_as(text, kind):
                return f"write {text} without quotes"
    if isinstance(value, _NUMBERS) and not isinstance(value, bool):
        if int in kinds and _is_finite(value) and value == int(value):
            return f"write {int(value)}"
        if bool in kinds and value in (0, 1):
            return f"write {bool(value)}"
    if isinstance(value, _NUMBERS) and str in kinds:
        return f"text stands in quotes, '{value}'"
    if kinds & {tuple, list, collections.abc.Sequence} and isinstance(value, str):
        return f"write [{value!r}]"
    return ""


def _reads_as(text: str, kind: Callable[[str], Any]) -> bool:
    try:
        return _is_finite(kind(text))
    except ValueError:
        return False


@functools.cache
def annotations_of(target: Any) -> Mapping[str, Any]:
    """The annotations of a function's or a class's parameters, resolved. One that cannot be
    resolved (a name for the type checker alone) is left out.
    """
    source = (
        target.__init__
        if inspect.isclass(target) and not dataclasses.is_dataclass(target)
        else target
    )
    try:
        return typing.get_type_hints(source, include_extras=True)
    except NameError:
        return {
            name: annotation
            for name, annotation in inspect.get_annotations(source).items()
            if not isinstance(annotation, str)
        }


def check_fields(self: Any) -> None:
    """Checks every field of a dataclass by its annotation; for `__post_init__`.

    Raises:
      ValueError: a value of a wrong type or out of range, named as 'Class.field'.
    """
    kind: Any = type(self)
    hints = annotations_of(kind)
    for field in dataclasses.fields(self):
        if field.name in hints and (found := problem(getattr(self, field.name), hints[field.name])):
            raise ValueError(f"{type(self).__name__}.{field.name} {found.text}")

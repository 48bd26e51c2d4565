"""Frozen dataclasses as plain JSON and back: how the configuration of a model is recorded."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from upcycle_jax import checks


def to_json(value: Any) -> Any:
    """A dataclass (or a part of one) as plain JSON: `{'type': class name, field: value, ...}`, with
    the fields that `checks.is_shown` names.
    """
    if dataclasses.is_dataclass(value):
        fields = {
            field.name: to_json(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if checks.is_shown(value, field)
        }
        return {"type": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {name: to_json(part) for name, part in value.items()}
    return [to_json(item) for item in value] if isinstance(value, tuple | list) else value


def from_json(value: Any, parts: Sequence[type], what: str) -> Any:
    """The inverse of `to_json`.

    Args:
      value: plain JSON.
      parts: the classes that it may be made of.
      what: what it is, for messages.

    Raises:
      ValueError: a class or field that this version does not know, or values that one refuses.
    """
    if isinstance(value, list):
        return tuple(from_json(item, parts, what) for item in value)
    if not isinstance(value, dict):
        return value
    fields = {name: from_json(v, parts, what) for name, v in value.items() if name != "type"}
    if "type" not in value:
        return fields
    known = {part.__name__: part for part in parts}
    part = known.get(str(value["type"]))
    unknown = set(fields) - {field.name for field in dataclasses.fields(part)} if part else ()
    if part is None or unknown:
        raise ValueError(
            f"{what}: part {value['type']!r} with fields {sorted(fields)} is not known here: it was"
            f" written by another version; known parts: {sorted(known)}"
        )
    try:
        return typing.cast(Any, part)(**fields)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{what}: {error}") from None

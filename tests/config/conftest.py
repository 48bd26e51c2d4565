"""A small set of objects that stand for the library, so that these tests do not depend on what it
holds.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from upcycle_jax.config import registry


@dataclasses.dataclass(frozen=True)
class Net:
    width: int
    depth: int = 2
    names: tuple[str, ...] = ("a",)


@dataclasses.dataclass(frozen=True)
class Model:
    net: Net
    smoothing: float = 0.0
    schedule: Callable[..., float] | None = None


@dataclasses.dataclass(frozen=True)
class Data:
    name: str
    lengths: dict[str, Any] = dataclasses.field(default_factory=dict)
    batch: int = 8


def schedule(step: int = 0, *, base: float = 1.0) -> float:
    return base * step


def run(
    model: Model,
    data: Data,
    eval_data: Data | None = None,
    *,
    steps: int,
    directory: str = "x",
    **options: Any,
) -> dict[str, Any]:
    return {
        "model": model,
        "data": data,
        "eval_data": eval_data,
        "steps": steps,
        "directory": directory,
        **options,
    }


def strict(value: int = 0) -> int:
    if value < 0:
        raise ValueError(f"value must not be negative, got {value}")
    return value


OBJECTS = {item.__name__: item for item in (Net, Model, Data, schedule, run, strict)}


@pytest.fixture
def objects(monkeypatch) -> dict[str, Any]:
    """Replaces the registry by the objects above."""
    monkeypatch.setattr(registry, "PATHS", {name: name for name in OBJECTS})
    monkeypatch.setattr(registry, "_load", OBJECTS.__getitem__)
    return OBJECTS


@pytest.fixture
def write(tmp_path, monkeypatch) -> Callable[[str, str], str]:
    """Writes a gin file into the working directory of the test."""
    monkeypatch.chdir(tmp_path)

    def _write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    return _write

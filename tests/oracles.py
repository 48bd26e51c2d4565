"""NumPy forward passes that lie beside some checkouts, as test oracles."""

import importlib.util
import pathlib
import types

import pytest

_FOLDER = pathlib.Path(__file__).resolve().parents[2] / "shared/reference/oracles"


def load(name: str) -> types.ModuleType:
    """The oracle of a name; where there is none beside this checkout, the test is skipped."""
    place = _FOLDER / f"{name}.py"
    if not place.is_file():
        pytest.skip(f"{place.name} lies beside some checkouts alone, not beside this one")
    spec = importlib.util.spec_from_file_location(name, place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

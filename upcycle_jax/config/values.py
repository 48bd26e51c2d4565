"""Checks of the values that bindings give, by the annotations of what they are given to, before
anything is built (see `checks`).
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_origin

from upcycle_jax import checks
from upcycle_jax.config import registry
from upcycle_jax.config.parse import Binding, Bindings, Macro

_PLACES = frozenset(f"upcycle_jax.{path}" for path in registry.PATHS.values())


def _name_and_place(written: str, binding: Binding, bindings: Bindings) -> tuple[str, str]:
    """What a user sets to change a value: the macro at the end of a chain of macros, or the
    parameter itself; and the place that gave the value, where it is no flag of that name.
    """
    name = written
    while isinstance(binding.value, Macro) and binding.value.name in bindings.macros:
        name, binding = binding.value.name, bindings.macros[binding.value.name]
    place = "" if binding.place == f"--gin.{name}" else f"{binding.place}: "
    return (name if name == written else f"{name} ({written})"), place


@functools.cache
def _factories() -> Mapping[str, Any]:
    """Name -> object of the registry, for advice. Imports every room."""
    found = {}
    for name in registry.PATHS:
        configurable = registry.lookup(name, {})
        if configurable is not None:
            found[name] = configurable.target
    return found


def _advice(accepts: Callable[[type], bool]) -> str:
    """How to write an instance of a class in a gin file; '' where no name gives one."""
    names = [
        f"@{name}()"
        for name, target in _factories().items()
        if inspect.isclass(target) and accepts(target)
    ]
    if not names:
        return ""
    return f"write {names[0]}" if len(names) == 1 else f"write one of {', '.join(names)}"


def _told(found: checks.Problem) -> str:
    """The problem's text, with what a gin file would say where an object is missing."""
    if found.accepts is None or ": write" in found.text:
        return found.text
    advice = _advice(found.accepts)
    return f"{found.text}: {advice}" if advice else found.text


def _uncalled(value: Any, annotation: Any) -> str:
    """What is wrong where a function is asked for and a name of the registry stands without
    parentheses; '' elsewhere.
    """
    target = value.func if isinstance(value, functools.partial) else value
    where = f"{getattr(target, '__module__', '')}:{getattr(target, '__name__', '')}"
    if get_origin(annotation) is not Callable or where not in _PLACES:
        return ""
    return f"must be a function of the step, got the name alone: write @{target.__name__}()"


def problems(
    configurable: registry.Configurable,
    prefix: str,
    bound: Mapping[str, Binding],
    values: Mapping[str, Any],
    bindings: Bindings,
) -> list[str]:
    """What is wrong with the values that bindings give to a configurable, one line each.

    Args:
      configurable: a name of the registry; what gin files import themselves is not checked, since
        annotations outside this project promise nothing.
      prefix: its name with its scope.
      bound: parameter -> binding.
      values: parameter -> value, macros and references replaced.
      bindings: everything that files and flags say.
    """
    if configurable.name not in registry.PATHS:
        return []
    hints = checks.annotations_of(configurable.target)
    out = []
    for parameter, binding in bound.items():
        if parameter not in hints:
            continue
        found = checks.problem(values[parameter], hints[parameter])
        text = _told(found) if found else _uncalled(values[parameter], hints[parameter])
        if text:
            name, place = _name_and_place(f"{prefix}.{parameter}", binding, bindings)
            out.append(f"{place}{name} {text}")
    return out


def macro_problems(name: str, value: Any, annotation: Any, bindings: Bindings) -> list[str]:
    """The same for a macro that a command reads itself."""
    found = checks.problem(value, annotation)
    if found is None:
        return []
    _, place = _name_and_place(name, bindings.macros[name], bindings)
    return [f"{place}{name} {_told(found)}"]

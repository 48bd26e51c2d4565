"""The operative configuration: gin text of what a run really used, defaults included."""

import dataclasses
import enum
import math
from collections.abc import Container
from typing import Any

from upcycle_jax.config.parse import Binding, Bindings, Macro, Reference
from upcycle_jax.config.registry import Configurable

_LINE = 120


def _is_literal(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_literal(key) and _is_literal(part) for key, part in value.items())
    if type(value) in (list, tuple):
        return all(_is_literal(part) for part in value)
    return (
        value is None
        or isinstance(value, enum.StrEnum)
        or type(value) in (bool, int, str, bytes)
        or (type(value) is float and math.isfinite(value))
    )


def format_value(value: Any, indent: int = 0) -> str:
    """A value as gin text; containers that are too long for a line are broken up."""
    if isinstance(value, (dict, list, tuple)):
        if isinstance(value, dict):
            parts, ends = (
                [
                    f"{format_value(key)}: {format_value(part, indent + 4)}"
                    for key, part in value.items()
                ],
                "{}",
            )
        else:
            parts, ends = (
                [format_value(part, indent + 4) for part in value],
                ("[]" if isinstance(value, list) else "()"),
            )
        comma = "," if isinstance(value, tuple) and len(parts) == 1 else ""
        flat = f"{ends[0]}{', '.join(parts)}{comma}{ends[1]}"
        if len(flat) + indent <= _LINE and "\n" not in flat:
            return flat
        pad = " " * (indent + 4)
        return (
            f"{ends[0]}\n" + "".join(f"{pad}{part},\n" for part in parts) + " " * indent + ends[1]
        )
    if isinstance(value, enum.StrEnum):
        return repr(str(value))
    return str(value) if isinstance(value, (Macro, Reference)) else repr(value)


@dataclasses.dataclass
class Record:
    """What building used.

    Attributes:
      macros: names of the macros read.
      sections: (scope, configurable) -> parameter -> value as written, or the default.
    """

    macros: set[str] = dataclasses.field(default_factory=set)
    sections: dict[tuple[str, str], dict[str, Any]] = dataclasses.field(default_factory=dict)
    _used: set[Binding] = dataclasses.field(default_factory=set)

    def used(
        self,
        configurable: Configurable,
        scope: tuple[str, ...],
        bound: dict[str, Binding],
        given: frozenset[str],
    ) -> None:
        """Notes that a configurable was built in a scope with these bindings; `given` parameters
        came from the program.
        """
        section = self.sections.setdefault(("/".join(scope), configurable.name), {})
        for name, parameter in configurable.parameters.items():
            if (
                name not in given
                and parameter.default is not parameter.empty
                and _is_literal(parameter.default)
            ):
                section.setdefault(name, parameter.default)
        section.update({name: binding.value for name, binding in bound.items()})
        self._used.update(bound.values())

    def text(self, bindings: Bindings) -> str:
        """gin text: macros first, then each configurable, sorted."""
        out = [
            "# The configuration that this run used, defaults included.",
            f"# Read from: {', '.join(bindings.files) or 'flags alone'}",
            "",
        ]
        modules = {(name, module.__name__) for name, module in bindings.imports.items()}
        for name, module in sorted(modules):
            out.append(
                f"import {module}"
                if name == module.partition(".")[0]
                else f"import {module} as {name}"
            )
        for name in sorted(self.macros):
            out.append(f"{name} = {format_value(bindings.macros[name].value)}")
        for (scope, name), section in sorted(
            self.sections.items(), key=lambda item: (item[0][1], item[0][0])
        ):
            prefix = f"{scope}/{name}" if scope else name
            out += ["", f"# Parameters of {prefix}:"]
            out += [
                f"{prefix}.{parameter} = {format_value(value)}"
                for parameter, value in sorted(section.items())
            ]
        return "\n".join(out) + "\n"

    def unused(self, bindings: Bindings, known: Container[Binding] = ()) -> list[str]:
        """Bindings that nothing used and that are not `known` otherwise, as 'place: name'."""
        idle = [
            f"{binding.place}: {name}"
            for name, binding in bindings.macros.items()
            if name not in self.macros and binding not in known
        ]
        for (scope, name), table in bindings.parameters.items():
            prefix = f"{scope}/{name}" if scope else name
            idle += [
                f"{binding.place}: {prefix}.{key}"
                for key, binding in table.items()
                if binding not in self._used and binding not in known
            ]
        return idle

"""Which code outside the project a configuration runs: gin files import modules, and so does a task
module. Nothing else in a gin file runs code of its own.
"""

from typing import Any

from upcycle_jax.config.parse import Bindings, Macro, leaves

_OURS = "upcycle_jax"
_TASK_MODULE = ("DatasetConfig", "module")


def _texts(value: Any, bindings: Bindings, path: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Texts in a value with the macro, if any, that holds each."""
    found: list[tuple[str, str]] = []
    for leaf in leaves(value):
        if isinstance(leaf, Macro) and leaf.name in bindings.macros and leaf.name not in path:
            inner = bindings.macros[leaf.name].value
            found += [
                (text, name or leaf.name)
                for text, name in _texts(inner, bindings, (*path, leaf.name))
            ]
        elif isinstance(leaf, str):
            found.append((leaf, ""))
    return found


def modules(bindings: Bindings) -> list[str]:
    """Modules outside the project that will be imported, as 'module (place)', without importing
    any.
    """
    named = [(statement.module, place) for statement, place in bindings.import_lines]
    name, parameter = _TASK_MODULE
    for (_, owner), table in bindings.parameters.items():
        if owner == name and parameter in table:
            binding = table[parameter]
            named += [
                (text, macro or f"{owner}.{parameter}, {binding.place}")
                for text, macro in _texts(binding.value, bindings)
            ]
    return list(
        dict.fromkeys(
            f"{module} ({place})" for module, place in named if module.partition(".")[0] != _OURS
        )
    )

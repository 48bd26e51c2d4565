"""Checks of parsed bindings before anything is built: names, parameters, macros, and what is still
missing.
"""

from collections.abc import Iterable
from typing import Any

from upcycle_jax.config import registry, stale
from upcycle_jax.config.parse import REQUIRED, Binding, Bindings, Macro, Reference, leaves

Scope = tuple[str, ...]

MUST_BE_SET = " must be set: "
"""In every problem of `missing` that a value solves."""


def _all_bindings(bindings: Bindings) -> Iterable[tuple[str, Binding]]:
    """Every binding with its written name."""
    yield from bindings.macros.items()
    for (scope, name), table in bindings.parameters.items():
        prefix = f"{scope}/{name}" if scope else name
        yield from ((f"{prefix}.{parameter}", binding) for parameter, binding in table.items())


def _unknown_name(name: str) -> str:
    """What to say about a name that nothing has."""
    current = stale.current_name(name, registry.names())
    if current:
        return f"{name!r} is a T5X name; write {current!r}"
    return (
        f"{name!r} is not a name that can be configured.{registry.nearest(name, registry.names())}"
    )


def _unknown_parameter(configurable: registry.Configurable, parameter: str) -> str:
    """What to say about a parameter that a configurable does not have."""
    return stale.explain_parameter(configurable.name, parameter) or (
        f"{configurable.name} has no parameter"
        f" {parameter!r}.{registry.nearest(parameter, configurable.parameters)} It has:"
        f" {', '.join(configurable.parameters)}"
    )


def names(bindings: Bindings) -> list[str]:
    """Names, parameters and macros that do not exist, each with its place and the nearest that
    does.
    """
    problems: list[str] = []
    for (scope, name), table in bindings.parameters.items():
        prefix = f"{scope}/" if scope else ""
        configurable = registry.lookup(name, bindings.imports)
        unknown = "" if configurable is not None else _unknown_name(name)
        if configurable is None and (current := stale.current_name(name, registry.names())):
            configurable = registry.lookup(current, {})  # its parameters may have changed too
        for parameter, binding in table.items():
            advice = [unknown] if unknown else []
            if configurable is not None and not configurable.accepts(parameter):
                wrong = _unknown_parameter(configurable, parameter)
                # The new name of what owns it is of no use to a line that goes away.
                advice = [wrong] if wrong.startswith(stale.REMOVE) else [*advice, wrong]
            if advice:
                problems.append(f"{binding.place}: {prefix}{name}.{parameter}: {'; '.join(advice)}")
    for written, binding in _all_bindings(bindings):
        for leaf in leaves(binding.value):
            if isinstance(leaf, Reference) and registry.lookup(leaf.name, bindings.imports) is None:
                problems.append(f"{binding.place}: {written} = {leaf}: {_unknown_name(leaf.name)}")
            elif isinstance(leaf, Macro) and leaf != REQUIRED and leaf.name not in bindings.macros:
                problems.append(
                    f"{binding.place}: {written} = {leaf}: no macro"
                    f" {leaf.name}.{registry.nearest(leaf.name, bindings.macros)}"
                )
    return problems + _idle_flags(bindings)


def _idle_flags(bindings: Bindings) -> list[str]:
    """Macros that a flag sets and nothing reads: almost always a misspelling."""
    read = {
        leaf.name
        for _, binding in _all_bindings(bindings)
        for leaf in leaves(binding.value)
        if isinstance(leaf, Macro)
    }
    candidates = (bindings.file_macros | read) - {REQUIRED.name}
    return [
        f"{binding.place}: {_unknown_macro(name, candidates)}"
        for name, binding in bindings.macros.items()
        if binding.from_flag and name not in candidates
    ]


def _unknown_macro(name: str, candidates: Iterable[str]) -> str:
    """What to say about a macro that no gin file defines or reads."""
    if advice := stale.explain_macro(name):
        return f"{name} is a macro of T5X's files: {advice}"
    return f"no gin file defines or reads a macro {name}.{registry.nearest(name, candidates)}"


class _Missing:
    """Walks everything that a root reaches and collects what must be set and is not."""

    def __init__(self, bindings: Bindings):
        self.bindings = bindings
        self.problems: dict[str, None] = {}
        self.reached: set[Binding] = set()
        self._seen: set[tuple[Any, Scope]] = set()

    def value(self, value: Any, scope: Scope, place: str, path: tuple[str, ...]) -> None:
        """Visits a value. `path`: the macros being read, to notice a circle."""
        for leaf in leaves(value):
            if leaf == REQUIRED:
                self.problems[place] = None
            elif isinstance(leaf, Macro):
                self.macro(leaf, path)
            elif isinstance(leaf, Reference):
                self.reference(leaf, leaf.scopes or scope, path)

    def macro(self, macro: Macro, path: tuple[str, ...]) -> None:
        """Visits a macro."""
        if macro.name in path:
            self.problems[
                f"macros refer to each other in a circle: {' -> '.join((*path, macro.name))}"
            ] = None
            return
        binding = self.bindings.macros.get(macro.name)
        if binding is None:
            self.problems[
                f"no macro {macro.name}.{registry.nearest(macro.name, self.bindings.macros)}"
            ] = None
        else:
            self.reached.add(binding)
            missing = (
                f"{macro.name}{MUST_BE_SET}--gin.{macro.name}=... (declared in {binding.place})"
            )
            self.value(binding.value, tuple(macro.name.split("/")), missing, (*path, macro.name))

    def reference(
        self,
        reference: Reference,
        scope: Scope,
        path: tuple[str, ...],
        given: frozenset[str] = frozenset(),
    ) -> None:
        """Visits the bindings of a configurable, and the parameters that it must have."""
        if (reference, scope) in self._seen:
            return
        self._seen.add((reference, scope))
        configurable = registry.lookup(reference.name, self.bindings.imports)
        if configurable is None:
            self.problems[_unknown_name(reference.name)] = None
            return
        written = "/".join((*self.bindings.shortest_scope(reference.name, scope), reference.name))
        bound = self.bindings.effective(reference.name, scope)
        self.reached.update(bound.values())
        for parameter, binding in bound.items():
            if parameter not in given:
                missing = (
                    f"{written}.{parameter}{MUST_BE_SET}--gin.{written}.{parameter}=... (declared"
                    f" in {binding.place})"
                )
                self.value(binding.value, scope, missing, path)
        if reference.call:
            for parameter in configurable.required:
                if parameter not in bound and parameter not in given:
                    self.problems[
                        f"{written}.{parameter}{MUST_BE_SET}--gin.{written}.{parameter}=... (it has"
                        " no default)"
                    ] = None


def missing(
    bindings: Bindings, root: Macro | Reference, *, given: frozenset[str] = frozenset()
) -> list[str]:
    """Everything that `root` reaches and that has no value yet.

    Args:
      bindings: what the files say.
      root: where to start.
      given: parameters of `root` that the caller supplies.
    """
    walk = _Missing(bindings)
    if isinstance(root, Macro):
        walk.macro(root, ())
    else:
        walk.reference(root, root.scopes, (), given)
    return list(walk.problems)


def reached(bindings: Bindings, names: Iterable[str]) -> set[Binding]:
    """All bindings that objects of these names would use, given ones included."""
    walk = _Missing(bindings)
    for name in names:
        if bindings.effective(name, ()):  # else it uses nothing, and need not be imported
            walk.reference(Reference((), name, call=True), (), ())
    return walk.reached

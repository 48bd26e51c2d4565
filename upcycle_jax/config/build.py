"""Bindings -> objects, once: every reference is evaluated here, and what is built holds nothing of
gin.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from upcycle_jax.config import check, operative, outside, registry, stale, values
from upcycle_jax.config.parse import (
    REQUIRED,
    Bindings,
    ConfigError,
    Macro,
    Reference,
    add_file,
    add_flag,
    import_modules,
    settle_defaults,
)

Scope = tuple[str, ...]


class Config:
    """A parsed and checked configuration. `build` and `macro` turn it into plain objects.

    A reference evaluated in one scope gives one object, however often it is used: two macros that
    name `@Adafactor()` share it.
    """

    def __init__(self, bindings: Bindings):
        self._bindings = bindings
        self._objects: dict[tuple[Reference, Scope], Any] = {}
        self._record = operative.Record()

    @property
    def bindings(self) -> Bindings:
        """What the files and flags say; not to be changed."""
        return self._bindings

    def has_macro(self, name: str) -> bool:
        """Whether the macro is defined with a value."""
        return name in self._bindings.macros and self._bindings.macros[name].value != REQUIRED

    def macro(self, name: str, kind: Any = Any) -> Any:
        """The value of macro NAME, references evaluated.

        Args:
          name: the macro's.
          kind: an annotation that the value must fit (see `checks`).

        Raises:
          ConfigError: the macro is not defined, or something that its value needs is missing; all
            of it is listed. Or its value is of another kind.
        """
        if name not in self._bindings.macros:
            raise ConfigError(
                [
                    "no gin file or flag defines"
                    f" {name}.{registry.nearest(name, self._bindings.macros)}"
                ]
            )
        problems = check.missing(self._bindings, Macro(name))
        if problems:
            raise ConfigError(problems)
        value = self._resolve(Macro(name), ())
        problems = values.macro_problems(name, value, kind, self._bindings)
        if problems:
            raise ConfigError(problems)
        return value

    def build(self, name: str, **given: Any) -> functools.partial[Any]:
        """The function or class `name` with every parameter that the configuration binds, as
        `functools.partial`.

        Args:
          name: a name of the registry.
          **given: arguments that the caller supplies itself; they win over bindings, and their
            bindings are not evaluated.

        Raises:
          ConfigError: macros or parameters are missing; all of them are listed.
        """
        reference = Reference((), name, call=True)
        problems = check.missing(self._bindings, reference, given=frozenset(given))
        if problems:
            raise ConfigError(problems)
        configurable = self._lookup(name)
        return functools.partial(
            configurable.target, **self._arguments(configurable, (), given), **given
        )

    def unused(self, *, other_functions: Sequence[str] = ()) -> list[str]:
        """Bindings that nothing built so far has used, as 'place: name'.

        Args:
          other_functions: names of the registry for which bindings may stand here too.
        """
        known = check.reached(self._bindings, other_functions)
        return self._record.unused(self._bindings, known)

    def operative_text(self) -> str:
        """gin text of everything that was used: parsing it builds the same objects."""
        return self._record.text(self._bindings)

    def _lookup(self, name: str) -> registry.Configurable:
        configurable = registry.lookup(name, self._bindings.imports)
        if configurable is None:  # `load` has checked every name that the files use
            raise ConfigError(
                [
                    f"{name!r} is not a name that can be"
                    f" configured.{registry.nearest(name, registry.names())}"
                ]
            )
        return configurable

    def _arguments(
        self, configurable: registry.Configurable, scope: Scope, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        bound = {
            key: value
            for key, value in self._bindings.effective(configurable.name, scope).items()
            if key not in given
        }
        self._record.used(
            configurable,
            self._bindings.shortest_scope(configurable.name, scope),
            bound,
            frozenset(given),
        )
        arguments = {key: self._resolve(binding.value, scope) for key, binding in bound.items()}
        prefix = "/".join(
            (*self._bindings.shortest_scope(configurable.name, scope), configurable.name)
        )
        problems = values.problems(configurable, prefix, bound, arguments, self._bindings)
        if problems:
            raise ConfigError(problems)
        return arguments

    def _resolve(self, value: Any, scope: Scope) -> Any:
        """A value with every macro and reference replaced. Containers are copied, so that no two
        users share one.
        """
        if isinstance(value, dict):
            return {
                self._resolve(key, scope): self._resolve(part, scope) for key, part in value.items()
            }
        if isinstance(value, (list, tuple)):
            return type(value)(self._resolve(part, scope) for part in value)
        if isinstance(value, Macro):
            self._record.macros.add(value.name)
            # gin evaluates a macro's value in a scope of the macro's own name.
            return self._resolve(
                self._bindings.macros[value.name].value, tuple(value.name.split("/"))
            )
        if isinstance(value, Reference):
            return self._resolve_reference(value, value.scopes or scope)
        return value

    def _resolve_reference(self, reference: Reference, scope: Scope) -> Any:
        key = (reference, scope)
        if key not in self._objects:
            configurable = self._lookup(reference.name)
            arguments = self._arguments(configurable, scope, {})
            self._objects[key] = (
                self._construct(configurable, arguments)
                if reference.call
                else self._defer(configurable, arguments)
            )
        return self._objects[key]

    def _construct(self, configurable: registry.Configurable, arguments: dict[str, Any]) -> Any:
        try:
            return configurable.target(**arguments)
        except Exception as error:
            tables = [
                table
                for (_, name), table in self._bindings.parameters.items()
                if name == configurable.name
            ]
            places = sorted({binding.place for table in tables for binding in table.values()})
            error.add_note(
                f"while building {configurable.name}, bound in {', '.join(places) or 'no file'}"
            )
            raise

    @staticmethod
    def _defer(
        configurable: registry.Configurable, arguments: dict[str, Any]
    ) -> Callable[..., Any]:
        return (
            functools.partial(configurable.target, **arguments)
            if arguments
            else configurable.target
        )


def load(
    gin_files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    *,
    function: str | None = None,
    before_imports: Callable[[list[str]], None] | None = None,
) -> Config:
    """Reads gin files in order, then bindings; later ones override earlier ones.

    `NAME = %gin.REQUIRED` asks for a value, it does not take one back: a file that is read later
    may declare what an earlier one set. `default/NAME = VALUE` is the value of macro NAME where no
    file or flag gives it one.

    Args:
      gin_files: paths or names of shipped files.
      bindings: `NAME=VALUE`, as after `--gin.`.
      search_paths: folders to look for files in.
      function: what will be built: where names are wrong, the error also lists the values that it
        still needs.
      before_imports: is told the modules outside the project that the files import, with their
        places, before they are imported; not called where there are none.

    Returns:
      The configuration, with all names checked and nothing built yet.

    Raises:
      FileNotFoundError: a gin file is nowhere.
      ConfigError: syntax errors, names or parameters that do not exist (with the nearest that do),
        T5X lines with their new form.
    """
    parsed = Bindings()
    absent: list[str] = []
    for name in gin_files:
        try:
            add_file(name, search_paths, parsed)
        except FileNotFoundError as error:
            advice = stale.explain_file(name)
            if advice is None:
                raise FileNotFoundError(str(error)) from None
            absent.append(advice)
    if absent:
        raise FileNotFoundError("; ".join(dict.fromkeys([*parsed.t5x_files, *absent])))
    for text in bindings:
        add_flag(text, parsed)
    settle_defaults(parsed)
    if parsed.t5x_files:
        # What else would be missed, those files would have given.
        raise ConfigError(parsed.t5x_files + parsed.problems)
    if before_imports is not None and (foreign := outside.modules(parsed)):
        before_imports(foreign)
    import_modules(parsed)
    problems = parsed.problems + check.names(parsed)
    if problems and function is not None:
        needed = check.missing(parsed, Reference((), function, call=True))
        problems += [
            problem for problem in needed if check.MUST_BE_SET in problem
        ]  # the others are names, told above with their places
    if problems:
        raise ConfigError(problems)
    return Config(parsed)

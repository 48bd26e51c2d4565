"""gin text -> bindings with their places. gin's parser reads the syntax; nothing is evaluated and
gin's global state is not touched.

Resolution is this project's own (see `build`), because gin's resolves while objects are called: two
models could not live in one process, and a built object would keep a wrapper that looks values up
in a global table.
"""

import dataclasses
import importlib
import io
import tokenize
from collections.abc import Sequence
from typing import Any

from gin import config_parser

from upcycle_jax.config import search, stale


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, listed at once."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(dict.fromkeys(problems))
        text = (
            self.problems[0]
            if len(self.problems) == 1
            else "".join(f"\n  * {problem}" for problem in self.problems)
        )
        super().__init__(
            text
            if len(self.problems) == 1
            else f"{len(self.problems)} problems in the configuration:{text}"
        )


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%NAME`."""

    name: str

    def __str__(self) -> str:
        return f"%{self.name}"


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/Name` (`call` false) or `@scope/Name()` (`call` true)."""

    scopes: tuple[str, ...]
    name: str
    call: bool

    def __str__(self) -> str:
        return f"@{'/'.join((*self.scopes, self.name))}{'()' if self.call else ''}"


REQUIRED = Macro("gin.REQUIRED")
"""The value of a macro or parameter that the user must set."""


@dataclasses.dataclass(frozen=True, eq=False)
class Binding:
    """One value and the place that gave it; two are the same only if they are one object.

    Attributes:
      value: a Python literal, possibly with `Macro` and `Reference` inside containers.
      place: `file:line`, or the flag.
      from_flag: it came from `--gin.NAME=VALUE` or `--gin_bindings`, not from a file.
    """

    value: Any
    place: str
    from_flag: bool = False


@dataclasses.dataclass
class Bindings:
    """What a set of gin files and flags says, after overriding.

    Attributes:
      macros: name (with its scopes) -> binding.
      parameters: (scope, configurable name) -> parameter -> binding.
      imports: name that an `import` line binds -> the module.
      import_lines: `import` statements of the files and their places; see `import_modules`.
      file_macros: macros that some file defines.
      files: paths of all files read, in order.
      problems: what is wrong so far.
      t5x_files: which files were left out since they are T5X's, each with its counterpart.
    """

    macros: dict[str, Binding] = dataclasses.field(default_factory=dict)
    parameters: dict[tuple[str, str], dict[str, Binding]] = dataclasses.field(default_factory=dict)
    imports: dict[str, Any] = dataclasses.field(default_factory=dict)
    import_lines: list[tuple[Any, str]] = dataclasses.field(default_factory=list)
    file_macros: set[str] = dataclasses.field(default_factory=set)
    files: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    t5x_files: list[str] = dataclasses.field(default_factory=list)

    def effective(self, name: str, scope: tuple[str, ...]) -> dict[str, Binding]:
        """Bindings of a configurable in a scope: those of the enclosing scopes, overridden from the
        outside in (gin's rule).
        """
        merged: dict[str, Binding] = {}
        for depth in range(len(scope) + 1):
            merged.update(self.parameters.get(("/".join(scope[:depth]), name), {}))
        return merged

    def shortest_scope(self, name: str, scope: tuple[str, ...]) -> tuple[str, ...]:
        """The shortest scope in which the configurable has the same bindings as in `scope`."""
        while scope and ("/".join(scope), name) not in self.parameters:
            scope = scope[:-1]
        return scope


class _Delegate(config_parser.ParserDelegate):
    """Builds plain values for `@` and `%`."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        *scopes, name = scoped_configurable_name.split("/")
        return Reference(tuple(scopes), name, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return REQUIRED if macro_name in ("gin.REQUIRED", "REQUIRED") else Macro(macro_name)


def leaves(value: Any) -> list[Any]:
    """All leaves of nested containers, keys of dictionaries included."""
    if isinstance(value, dict):
        return [leaf for pair in value.items() for part in pair for leaf in leaves(part)]
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in leaves(part)]
    return [value]


def parse_value(text: str) -> Any:
    """Parses one gin value.

    Raises:
      SyntaxError, tokenize.TokenError: it is not one.
    """
    return config_parser.ConfigParser(text, _Delegate()).parse_value()


def _statements(text: str, filename: str) -> list[Any]:
    """All statements of a text.

    Raises:
      ConfigError: bad syntax, with the line.
    """
    stream = io.StringIO(text)
    # type: ignore[attr-defined]  # gin's parser reads the name for its locations
    stream.name = filename
    try:
        return list(config_parser.ConfigParser(stream, _Delegate()))
    except SyntaxError as error:
        location = (
            error.args[1]
            if len(error.args) > 1
            else (filename, getattr(error, "lineno", "?"), None, "")
        )
        message = " ".join(str(error.args[0]).split())
        raise ConfigError(
            [f"{filename}:{location[1]}: {message} In the line: {str(location[3]).strip()!r}"]
        ) from None
    except tokenize.TokenError as error:
        raise ConfigError(
            [f"{filename}: {error.args[0]} (an unclosed bracket or string)"]
        ) from None


def import_modules(into: Bindings) -> None:
    """Runs the `import` lines of all files read: gin's way to code of one's own. What does not
    import becomes a problem.
    """
    for statement, place in into.import_lines:
        try:
            module = importlib.import_module(statement.module)
        except ImportError as error:
            into.problems.append(f"{place}: `{statement.format()}`: {error}")
            continue
        bound = statement.bound_name()
        into.imports[bound] = (
            module if statement.alias or statement.is_from else importlib.import_module(bound)
        )


def _add_import(statement: Any, place: str, into: Bindings) -> None:
    advice = stale.explain_import(statement.module)
    if advice:
        into.problems.append(f"{place}: `{statement.format()}`: {advice}")
    else:
        into.import_lines.append((statement, place))


def _add_binding(statement: Any, place: str, from_flag: bool, into: Bindings) -> None:
    binding = Binding(statement.value, place, from_flag)
    if not statement.arg_name:
        name = f"{statement.scope}/{statement.selector}" if statement.scope else statement.selector
        table: dict[str, Binding] = into.macros
        if not from_flag:
            into.file_macros.add(name)
    else:
        name = statement.arg_name
        table = into.parameters.setdefault((statement.scope, statement.selector), {})
    # REQUIRED says that a value is needed; it does not take back a value that an earlier file gave.
    if binding.value != REQUIRED or name not in table:
        table[name] = binding


DEFAULT = "default/"
"""Before the name of a macro: its value where nothing else gives it one."""


def settle_defaults(into: Bindings) -> None:
    """Gives macros their defaults (`default/NAME = VALUE`) where no file or flag has set them."""
    for written in [name for name in into.macros if name.startswith(DEFAULT)]:
        binding, name = into.macros.pop(written), written.removeprefix(DEFAULT)
        into.file_macros.discard(written)
        into.file_macros.add(name)
        if name not in into.macros or into.macros[name].value == REQUIRED:
            into.macros[name] = binding


def add_file(
    name: str,
    search_paths: Sequence[str],
    into: Bindings,
    *,
    beside: str | None = None,
    chain: tuple[str, ...] = (),
) -> None:
    """Reads a gin file and the files that it includes, each at the place of its `include`.

    Raises:
      FileNotFoundError: the file is nowhere.
      ConfigError: bad syntax, or a file that includes itself.
    """
    path = search.find(name, search_paths, beside=beside)
    if path in chain:
        raise ConfigError(
            [f"gin files include each other in a circle: {' -> '.join((*chain, path))}"]
        )
    text = search.read(path)
    if advice := stale.explain_found_file(path, text):
        into.t5x_files.append(f"{chain[-1]}: {advice}" if chain else advice)
        return
    into.files.append(path)
    for statement in _statements(text, path):
        place = f"{path}:{statement.location.line_num}"
        if isinstance(statement, config_parser.IncludeStatement):
            advice = stale.explain_file(statement.filename)
            try:
                add_file(statement.filename, search_paths, into, beside=path, chain=(*chain, path))
            except FileNotFoundError as error:
                said = into.problems if advice is None else into.t5x_files
                said.append(f"{place}: {advice or error}")
        elif isinstance(statement, config_parser.ImportStatement):
            _add_import(statement, place, into)
        elif isinstance(statement, config_parser.BindingStatement):
            _add_binding(statement, place, False, into)


def _explain_flag(text: str) -> str:
    """Why a binding given as a flag does not parse, with the form that does."""
    name, equals, value = text.partition("=")
    name, value = name.strip(), value.strip()
    if not equals or not name:
        return f"binding {text!r} is not NAME=VALUE"
    constant = {"true": "True", "false": "False", "none": "None", "null": "None"}.get(value.lower())
    if constant:
        return f"--gin.{name}={value}: write --gin.{name}={constant}"
    if value.lower().lstrip("+-") in ("nan", "inf", "infinity"):
        return f"--gin.{name}={value}: no setting takes {value}: write a finite number"
    quoted = value.replace("\\", "\\\\").replace("'", "\\'")
    return (
        f"--gin.{name}={value}: {value!r} is not a gin value. A string needs quotes that reach gin:"
        f" --gin.{name}=\"'{quoted}'\""
    )


def add_flag(text: str, into: Bindings) -> None:
    """Adds one binding `NAME=VALUE` from the command line.

    Raises:
      ConfigError: it does not parse; the message shows the quoted form.
    """
    place = f"--gin.{text.partition('=')[0].strip()}"
    try:
        statements = _statements(text, place)
    except ConfigError:
        raise ConfigError([_explain_flag(text)]) from None
    if not statements or not all(
        isinstance(statement, config_parser.BindingStatement) for statement in statements
    ):
        raise ConfigError([_explain_flag(text)])
    for statement in statements:
        _add_binding(statement, place, True, into)

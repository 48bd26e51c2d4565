"""Writes docs/api.md from docstrings: the names of `import upcycle_jax`, and every name that gin
files may use with its parameters.

    python scripts/api_page.py            # rewrites docs/api.md
    python scripts/api_page.py --check    # exit code 1 where it is not up to date
"""

import argparse
import inspect
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import upcycle_jax as uj
from upcycle_jax.config import registry

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "api.md"
HEAD = """\
# Names

Written by `python scripts/api_page.py` from docstrings; do not edit. Arguments without a default
must be given.
"""
SECTIONS = ("Attributes:", "Args:", "Returns:", "Raises:", "Yields:")
# What keeps a repr from changing between machines and runs.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def summary(doc: str) -> str:
    """The text before the first section, as Markdown."""
    lines = doc.splitlines()
    end = next((i for i, line in enumerate(lines) if line.strip() in SECTIONS), len(lines))
    return "\n".join(lines[:end]).strip()


def described(doc: str) -> dict[str, str]:
    """What `Attributes:` or `Args:` says of each name."""
    found: dict[str, str] = {}
    inside, name = False, ""
    for line in doc.splitlines():
        if line.strip() in SECTIONS:
            inside, name = line.strip() in ("Attributes:", "Args:"), ""
        elif inside and (match := re.match(r"  (\**\w+): (.*)", line)):
            name = match[1].lstrip("*")
            found[name] = match[2]
        elif inside and name and line.startswith("    "):
            found[name] += " " + line.strip()
    return found


def all_described(target: Any) -> dict[str, str]:
    """As `described`, of a class with its bases: a dataclass inherits fields and their meaning."""
    classes = reversed(inspect.getmro(target)) if inspect.isclass(target) else (target,)
    found: dict[str, str] = {}
    for one in classes:
        found |= described(inspect.getdoc(one) or "") if one.__doc__ else {}
    if inspect.isclass(target):
        found |= described(inspect.getdoc(target.__init__) or "")
    return found


def default_of(parameter: inspect.Parameter) -> str:
    """The default in code, or an empty string."""
    if parameter.default is inspect.Parameter.empty:
        return ""
    text = repr(parameter.default)
    if "factory" in text or inspect.isfunction(parameter.default):
        return "(made afresh)"
    return f"`{_ADDRESS.sub('', text)}`"


def table(parameters: Mapping[str, inspect.Parameter], texts: Mapping[str, str]) -> Iterator[str]:
    """Rows of a Markdown table, one for each parameter."""
    if parameters:
        yield from ("", "| argument | default | |", "| --- | --- | --- |")
    for name, parameter in parameters.items():
        text = texts.get(name, "").replace("|", "\\|")
        yield f"| `{name}` | {default_of(parameter)} | {text} |"


def entry(title: str, target: Callable[..., Any]) -> Iterator[str]:
    """One name: heading, summary, arguments."""
    parameters = dict(inspect.signature(target).parameters)
    yield from ("", f"### `{title}`", "", summary(inspect.getdoc(target) or ""))
    yield from table(parameters, all_described(target))


def members(target: type) -> Iterator[str]:
    """Rows for the fields, properties and methods of a class, with the first line of each."""
    texts = all_described(target)
    public = {
        name: member
        for one in inspect.getmro(target)[-2::-1]
        for name, member in vars(one).items()
        if not name.startswith("_") and (callable(member) or isinstance(member, property))
    }
    rows = {name: text for name, text in texts.items() if name not in public}
    for name, member in public.items():
        call = "" if isinstance(member, property) else "()"
        # A docstring's first sentence may run over several lines.
        rows[f"{name}{call}"] = " ".join((inspect.getdoc(member) or "").split("\n\n")[0].split())
    yield from ("", "| member | |", "| --- | --- |")
    for name, text in rows.items():
        escaped = text.replace("|", "\\|")
        yield f"| `{name}` | {escaped} |"


def page() -> str:
    """The whole page."""
    lines = [HEAD, "## From Python", "", "`import upcycle_jax as uj`; [python.md](python.md)."]
    for name in uj.__all__:
        target = getattr(uj, name)
        if inspect.isfunction(target):
            lines += entry(f"uj.{name}", target)
        elif inspect.isclass(target):
            lines += ["", f"### `uj.{name}`", "", summary(inspect.getdoc(target) or "")]
            lines += members(target)
    lines += ["", "## In gin files", ""]
    lines.append("Bound as `NAME.argument = value`; `python -m upcycle_jax.check` checks a file.")
    for name in sorted(registry.names(), key=str.lower):
        configurable = registry.lookup(name, {})
        assert configurable is not None
        lines += entry(name, configurable.target)
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs the script and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == page():
        return 0
    print(f"{PAGE} is not up to date: run python scripts/api_page.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

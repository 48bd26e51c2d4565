"""The console script: `upcycle-jax <command> [flags]` is `python -m upcycle_jax.<command>
[flags]`.
"""

import ast
import difflib
import importlib
import pathlib
import sys
from collections.abc import Sequence


def commands() -> dict[str, str]:
    """Name -> first line of its docstring, for every module of the package that has a `main`.
    Nothing is imported.
    """
    found = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.name != "cli.py" and any(
            isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body
        ):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def _usage(known: dict[str, str]) -> str:
    width = max(map(len, known), default=0)
    lines = [f"  {name:<{width}}  {summary}" for name, summary in known.items()]
    return "\n".join(
        ["usage: upcycle-jax <command> [flags]", "", "Commands (each has --help):", *lines]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; 2 for a command that does not exist."""
    words = list(sys.argv[1:] if argv is None else argv)
    known = commands()
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage(known))
        return 0 if words else 2
    if words[0] not in known:
        near = difflib.get_close_matches(words[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"upcycle-jax: no command {words[0]!r}{hint}\n\n{_usage(known)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"upcycle_jax.{words[0]}").main(words[1:])


if __name__ == "__main__":
    sys.exit(main())

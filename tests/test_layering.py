"""The shape of the code: imports follow the order of the rooms, and files and functions stay
small.
"""

import ast
import functools
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "upcycle_jax"

ROOMS = (
    (
        "printing",
        "types",
        "axes",
        "trees",
        "state_tree",
        "step_names",
        "byte_sizes",
        "checks",
        "text",
        "progress",
        "files",
        "data_folders",
        "leases",
    ),
    ("partitioning", "distributed"),
    ("distributed",),
    ("config",),
    ("layers",),
    ("moe",),
    ("features",),
    ("data", "tasks"),
    ("models",),
    ("costs",),
    ("checkpoints",),
    ("surgery",),
    ("training",),
    ("planning",),
    ("inference",),
    ("studies",),
    ("papers",),
)
"""Lowest first. Modules of the package that are in no room are commands: the top layer."""

LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
TOP = len(ROOMS)
EXCLUSIVE = {
    "gin": {"config"},
    "orbax": {"checkpoints"},
    "tensorflow": {"data", "features", "tasks"},
    "seqio": {"data", "features", "tasks"},
}
"""Package -> the rooms that may import it."""
FORBIDDEN = {"pickle", "cloudpickle", "dill"}
MAX_FILE, MAX_FUNCTION = 600, 120

LIBRARY = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tasks").rglob("*.py")])
ALL_CODE = sorted(
    [
        *LIBRARY,
        *(ROOT / "tests").rglob("*.py"),
        *(ROOT / "scripts").rglob("*.py"),
        ROOT / "setup.py",
    ]
)


@functools.cache
def text_of(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def tree_of(path: pathlib.Path) -> ast.Module:
    return ast.parse(text_of(path))


def name_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "tasks" else parts[1]


def level_of(room: str) -> int:
    return LEVELS.get(room, TOP)


def type_checking_lines(tree: ast.AST) -> set[int]:
    """Lines that only the type checker reads."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def imports_of(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions included; `from a import b` gives
    `a.b`.
    """
    skipped = type_checking_lines(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return [item for item in found if item[0] not in skipped]


def wrong_imports(room: str, tree: ast.AST) -> Iterator[str]:
    """What a file of a room imports and may not."""
    for line, name in imports_of(tree):
        parts = name.split(".")
        package = parts[0]
        if package in EXCLUSIVE and room not in EXCLUSIVE[package]:
            yield f"{line}: imports {package}, which only {sorted(EXCLUSIVE[package])} may"
        if package in FORBIDDEN:
            yield f"{line}: imports {package}"
        if package == "tasks":
            yield f"{line}: imports tasks; its one name is upcycle_jax.tasks"
        if package == "upcycle_jax" and len(parts) > 1 and level_of(parts[1]) > level_of(room):
            yield f"{line}: {room} imports {name}, which lies above it"


def test_imports_follow_the_order_of_the_rooms():
    problems = [
        f"{name_of(path)}:{problem}"
        for path in LIBRARY
        for problem in wrong_imports(room_of(path), tree_of(path))
    ]
    assert not problems, "\n".join(problems)


def test_wrong_imports_are_found():
    code = "import gin\nimport pickle\nimport tasks.c4\nfrom upcycle_jax.training import loop"
    assert len(list(wrong_imports("moe", ast.parse(code)))) == 4
    assert list(wrong_imports("moe", ast.parse("import upcycle_jax.layers"))) == []


def module_of(path: pathlib.Path) -> str:
    """The dotted name of a file of the library; the tasks' package is `upcycle_jax.tasks`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts if parts[0] != "tasks" else (PACKAGE.name, *parts))
    return name.removesuffix(".__init__")


MODULES = {module_of(path): path for path in LIBRARY}


def named_in_strings(tree: ast.AST) -> set[str]:
    """Dotted names that are imported by their text: 'upcycle_jax.tasks.c4', and
    'data:DatasetConfig' as the registry of gin names writes it.
    """
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    whole = {text for text in texts if re.fullmatch(rf"{PACKAGE.name}(\.\w+)+", text)}
    below = {text for text in texts if re.fullmatch(r"\w+(\.\w+)*:\w+", text)}
    return whole | {f"{PACKAGE.name}.{text.replace(':', '.')}" for text in below}


def imported_by(module: str) -> set[str]:
    """The modules that a module imports wherever in its code, or names for an import; the packages
    around them, which are imported with them, included.
    """
    tree = tree_of(MODULES[module])
    found = set()
    for name in {name for _, name in imports_of(tree)} | named_in_strings(tree):
        parts = name.split(".")
        outer = {".".join(parts[:count]) for count in range(1, len(parts) + 1)} & MODULES.keys()
        nearest = max(outer, key=len, default=module)
        # The packages around the importing module are being imported already.
        found |= {nearest} | {part for part in outer if not f"{module}.".startswith(f"{part}.")}
    return found - {module, PACKAGE.name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Tarjan's strongly connected components of more than one node."""
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        numbers[node] = lowest[node] = len(numbers)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in numbers:
                visit(other)
            if other in stack:
                lowest[node] = min(lowest[node], lowest[other])
        if lowest[node] == numbers[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            found.extend([sorted(component)] if len(component) > 1 else [])

    for node in sorted(graph):
        if node not in numbers:
            visit(node)
    return found


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b", "e"}, "e": set(), "f": {"a", "f"}}
    assert circles(graph) == [["b", "c", "d"]]
    assert "upcycle_jax.data.config" in imported_by("upcycle_jax.data")
    assert "upcycle_jax.tasks.c4" in imported_by("upcycle_jax.data.shipped_tasks")
    assert "upcycle_jax.training.train" in imported_by("upcycle_jax.config.registry")


def test_no_circle_between_files():
    assert circles({module: imported_by(module) for module in MODULES}) == []


def test_tasks_know_nothing_of_models():
    for path in (ROOT / "tasks").rglob("*.py"):
        for line, name in imports_of(tree_of(path)):
            parts = name.split(".")
            allowed = parts[0] != "upcycle_jax" or parts[1] in ("types", "files", "data", "tasks")
            assert allowed, f"{name_of(path)}:{line} imports {name}"


def test_the_library_imports_without_tensorflow():
    """Every room and every command, except the parts of `data` and the SeqIO converters, which are
    imported when a task is built.
    """
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in LIBRARY
        if not path.name.endswith("_seqio.py")
        and (room_of(path) not in ("data", "tasks") or path == PACKAGE / "data" / "__init__.py")
    ]
    loop = "    importlib.import_module(name)\n    assert 'tensorflow' not in sys.modules, name"
    code = f"import importlib, sys\nfor name in {modules!r}:\n{loop}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def too_long(path: pathlib.Path) -> Iterator[str]:
    """The file and its functions, where they have more lines than they may."""
    lines = text_of(path).count("\n") + 1
    if lines > MAX_FILE:
        yield f"{name_of(path)} has {lines} lines, at most {MAX_FILE}: split the file by noun"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                yield f"{name_of(path)}: {node.name} has {length} lines, at most {MAX_FUNCTION}"


def test_files_and_functions_stay_small():
    problems = [problem for path in ALL_CODE for problem in too_long(path)]
    assert not problems, "\n".join(problems)


def test_no_file_is_called_utils_and_nothing_is_left_open():
    words = ("TODO", "FIXME", "raise NotImplementedError")
    assert not [name_of(path) for path in LIBRARY if "util" in path.stem]
    assert not [
        f"{name_of(path)} says {word}"
        for path in LIBRARY
        for word in words
        if word in text_of(path)
    ]


def test_commands_are_short():
    """A command parses flags, calls one function and returns an exit code."""
    commands = [path for path in PACKAGE.glob("*.py") if level_of(room_of(path)) == TOP]
    lines = {path.name: text_of(path).count("\n") for path in commands}
    del lines["__init__.py"]
    assert len(lines) > 10 and max(lines.values()) < 240, lines


def test_the_map_names_every_room_and_command():
    words = set(re.findall(r"[a-z_0-9]+", (ROOT / "WORKSPACE.md").read_text(encoding="utf-8")))
    here = {
        room_of(path) for path in LIBRARY if path.parent == PACKAGE or path.name == "__init__.py"
    } - {"__init__", "cli"}
    assert not here - words, "not in WORKSPACE.md"

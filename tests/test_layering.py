"""The shape of the code: imports follow the order of the rooms, and files and functions stay
small.
"""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

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


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_imports_follow_the_order_of_the_rooms(path):
    room = room_of(path)
    problems = []
    for line, name in imports_of(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        package = parts[0]
        if package in EXCLUSIVE and room not in EXCLUSIVE[package]:
            problems.append(
                f"line {line}: imports {package}, which only {sorted(EXCLUSIVE[package])} may"
            )
        if package in FORBIDDEN:
            problems.append(f"line {line}: imports {package}")
        if package == "tasks":
            problems.append(f"line {line}: imports tasks; its one name is upcycle_jax.tasks")
        if package == "upcycle_jax" and len(parts) > 1 and level_of(parts[1]) > level_of(room):
            problems.append(f"line {line}: {room} imports {name}, which lies above it")
    assert not problems, "\n".join(problems)


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
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
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
        for line, name in imports_of(ast.parse(path.read_text(encoding="utf-8"))):
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


@pytest.mark.parametrize("path", ALL_CODE, ids=name_of)
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    lines = text.count("\n") + 1
    assert lines <= MAX_FILE, f"{lines} lines; the limit is {MAX_FILE}: split the file by noun"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION, (
                f"{node.name} has {length} lines; the limit is {MAX_FUNCTION}"
            )


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_no_file_is_called_utils_and_nothing_is_left_open(path):
    assert "util" not in path.stem
    text = path.read_text(encoding="utf-8")
    for word in ("TODO", "FIXME", "raise NotImplementedError"):
        assert word not in text, f"{path.name} says {word}"


@pytest.mark.parametrize(
    "path",
    [path for path in LIBRARY if path.parent == PACKAGE and level_of(room_of(path)) == TOP],
    ids=name_of,
)
def test_commands_are_short(path):
    """A command parses flags, calls one function and returns an exit code."""
    if path.name != "__init__.py":
        assert path.read_text(encoding="utf-8").count("\n") < 240


def test_the_map_names_every_room_and_command():
    words = set(re.findall(r"[a-z_0-9]+", (ROOT / "WORKSPACE.md").read_text(encoding="utf-8")))
    here = {
        room_of(path) for path in LIBRARY if path.parent == PACKAGE or path.name == "__init__.py"
    } - {"__init__", "cli"}
    assert not here - words, "not in WORKSPACE.md"

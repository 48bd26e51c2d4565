"""The project installs from a wheel, and asks for what it imports."""

import ast
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = (
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "upcycle_jax",
    "tasks",
    "gin_configs",
)
COMES_WITH_SEQIO = {"tensorflow", "tensorflow_datasets"}
"""Installed by SeqIO, which alone knows the version that fits (see setup.py)."""


def setup_constants() -> dict:
    """The literal constants of setup.py, read without running it."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    wanted = ("REQUIREMENTS", "EXTRAS")
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in wanted
    }


def distribution(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement).group().lower().replace("_", "-")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this checkout, built from a copy so that nothing is left behind in it."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(work),
    ]
    done = subprocess.run([*pip, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(work.glob("*.whl"))


def test_the_wheel_holds_library_tasks_and_gin_files(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to(ROOT).as_posix()
        for kind in ("*.py", "*.csv")
        for path in (ROOT / "upcycle_jax").rglob(kind)
    }
    for folder, pattern in (("tasks", "*.py"), ("gin_configs", "*.gin")):
        expected |= {
            f"upcycle_jax/{path.relative_to(ROOT).as_posix()}"
            for path in (ROOT / folder).rglob(pattern)
        }
    assert not expected - held, "missing from the wheel"
    assert not any(name.startswith(("tests/", "tasks/", "gin_configs/")) for name in held), (
        "would be installed under a second name"
    )


COMMANDS = """
import runpy, sys
import upcycle_jax.tasks as t
print(t.__file__)
for words in (
    ["model_info", "--gin_file=gin_configs/models/t5_1_1_tiny.gin"],
    ["cli", "model_info", "--gin_file=models/t5_1_1_tiny.gin"],
    ["paper", "list"],
):
    print("==")
    sys.argv = words
    try:
        runpy.run_module("upcycle_jax." + words[0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        assert not ended.code, words
"""
"""As with `python -m`, one after the other in one process."""


def test_commands_work_from_a_wheel_in_another_directory(wheel, tmp_path):
    target = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(target)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    file, by_path, by_name, sizes = done.stdout.split("==\n")
    assert file.startswith(str(target))
    assert by_path == by_name and "Total number of parameters: " in by_path
    assert "Table 1: sizes of the models" in sizes  # reads the data file of the package


def test_requirements_are_ranges_with_both_ends():
    constants = setup_constants()
    for requirement in constants["REQUIREMENTS"]:
        assert re.search(r">=[\d.]+,<[\d.]+$", requirement), requirement


def test_everything_that_is_imported_is_required():
    constants = setup_constants()
    declared = {distribution(item) for item in constants["REQUIREMENTS"]}
    optional = {distribution(item) for items in constants["EXTRAS"].values() for item in items}
    providers = importlib.metadata.packages_distributions()
    problems = []
    for path in [*(ROOT / "upcycle_jax").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = list(ast.walk(tree))
        inside = {
            id(node)
            for function in nodes
            if isinstance(function, ast.FunctionDef)
            for node in ast.walk(function)
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        for node in nodes:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for head in (
                {name.partition(".")[0] for name in names}
                - set(sys.stdlib_module_names)
                - {"upcycle_jax"}
                - COMES_WITH_SEQIO
            ):
                by = {name.lower().replace("_", "-") for name in providers.get(head, [head])}
                if not by & (declared | optional if id(node) in inside else declared):
                    problems.append(
                        f"{path.relative_to(ROOT)}:{node.lineno} imports {head}"
                        f" ({', '.join(sorted(by))}), which setup.py does not ask for"
                    )
    assert not problems, "\n".join(problems)

"""Command lines in the README, the documentation and the heads of gin files: flags, files and names
exist, nothing REQUIRED is left out.
"""

import importlib
import pathlib
import re
import shlex

import pytest

from upcycle_jax import config
from upcycle_jax.config import check, command, flags
from upcycle_jax.config.parse import Reference

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "gin_configs").rglob("*.gin")),
]

BUILDS = {
    "train": "train",
    "check": "train",
    "eval": "evaluate",
    "infer": "infer",
    "few_shot": "few_shot",
    "upcycle": "upcycle",
    "verify": "verify",
}
"""What a command builds; of the others only flags and names are looked at."""
OWN_FLAGS = ("inspect", "convert", "runs", "report", "paper", "train_vocab")
"""Commands without gin files."""
SHELL = {
    '"${labels[@]}"': (
        "--gin.MIXTURE_OR_TASK_NAME=\"'x'\" --gin.TASK_FEATURE_LENGTHS=\"{'inputs': 8, 'targets':"
        ' 8}" --gin.BATCH_SIZE=8'
    )
}
"""Variables of scripts that stand in an example."""


def commands(path):
    """(command, words) of every complete command line of a page: one that is indented, or stands in
    a gin file's head.
    """
    lines = iter(path.read_text(encoding="utf-8").splitlines())
    for line in lines:
        found = re.match(r"(?:    |#\s+)(python -m upcycle_jax\.\w+ .*)", line)
        if not found:
            continue
        text = found[1]
        while text.endswith("\\"):
            text = f"{text[:-1]} {next(lines).lstrip('# ')}"
        for variable, value in SHELL.items():
            text = text.replace(variable, value)
        if "..." not in text:
            _, _, module, *words = shlex.split(text, comments=True)
            yield module.removeprefix("upcycle_jax."), words


EXAMPLES = [
    pytest.param(name, words, id=f"{path.relative_to(ROOT)}:{name}:{number}")
    for path in PAGES
    for number, (name, words) in enumerate(commands(path))
    if name not in OWN_FLAGS and "--help" not in words and "--advise=/data/runs" not in words
]


def test_examples_are_found():
    assert len(EXAMPLES) > 30 and {
        name for name, *_ in (example.values for example in EXAMPLES)
    } >= set(BUILDS) - {"verify"}


@pytest.mark.parametrize(("name", "words"), EXAMPLES)
def test_an_example_is_a_command(name, words, monkeypatch):
    reached = []

    def run(command_name, argv, *, description, extra=None, **_):
        parsed = flags.parse(command_name, argv, description=description, extra=extra)
        loaded = config.load(parsed.gin_file, parsed.gin_bindings, parsed.gin_search_paths)
        if name in BUILDS and not getattr(parsed.extra, "path", None):  # `verify PATH` has it all.
            assert check.missing(loaded.bindings, Reference((), BUILDS[name], call=True)) == []
        reached.append(command_name)
        return 0

    monkeypatch.setattr(command, "run", run)
    monkeypatch.chdir(ROOT)
    assert importlib.import_module(f"upcycle_jax.{name}").main(words) == 0
    assert reached == [name]


def test_lines_that_can_be_folded_are_folded():
    """Prose, commands and bindings have at most 100 columns. Tables, output and what has no place
    for a line break (a URL, a diagram's edge) may be longer.
    """
    hand_written = [page for page in PAGES if page.name not in ("README.md", "api.md")]
    for page in (*hand_written, ROOT / "CONTRIBUTING.md"):
        continued = False
        fenced = False
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            command_line = continued or re.match(r"(?:    |#\s+)(python|pip|\.?/?scripts/)", line)
            continued = bool(command_line) and line.endswith("\\")
            fenced ^= line.startswith("```")
            printed = line.startswith("    ") and page.suffix == ".md" and not command_line
            if fenced or printed or line.lstrip().startswith("|") or "://" in line:
                continue
            assert len(line) <= 100, f"{page.relative_to(ROOT)}:{number} has {len(line)} columns"

"""Labelled examples that every Python environment holds: facts about code and documentation that
the code itself states. No TensorFlow.

Train and validation are divided by the file that an example comes from, by the rule that divides
the text of `python_environment`: a model that was pre-trained on `embedded_text_*` has not seen the
files of validation. The examples differ by Python and package versions.
"""

import ast
import dataclasses
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping

from upcycle_jax.data.text.documents import TRAIN, VALIDATION, Document, is_held_out
from upcycle_jax.tasks import python_environment

_EXTRACTION = 1
"""Raise when the rules below change what a function says: it is part of the kept file's key."""

PACKAGES = ("python", "numpy", "scipy", "jax", "flax", "optax", "seqio")
KEYWORDS = (
    "if",
    "elif",
    "for",
    "while",
    "with",
    "return",
    "raise",
    "assert",
    "del",
    "import",
    "from",
)
YES_NO = ("yes", "no")
LETTERS = ("A", "B", "C", "D")

MOST = {TRAIN: 8000, VALIDATION: 600}
"""Examples of a split at most: those whose hash comes first."""

_LONGEST_INPUT, _LONGEST_ANSWER = (
    400,
    24,
)  # characters; most are bytes, and an input of 512 bytes has room
_SHORTEST_PARAGRAPH, _SHORTEST_SUMMARY, _LONGEST_SUMMARY = 80, 20, 72

Pairs = Mapping[str, list[tuple[str, str]]]


@dataclasses.dataclass(frozen=True)
class Example:
    """One question with its answer, and the file that it comes from."""

    file: str
    inputs: str
    targets: str


@dataclasses.dataclass(frozen=True)
class Function:
    """A documented function of the standard library.

    Attributes:
      file: where it is defined.
      name: its name.
      signature: its parameters as written, on one line.
      defaults: simple default values by parameter.
      summary: the first sentence of its docstring.
    """

    file: str
    name: str
    signature: str
    defaults: Mapping[str, str]
    summary: str


def _order(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "little")


def divide(examples: Iterable[Example]) -> Pairs:
    """Splits by file; each input once, on one side, in the order of a hash, as many as `MOST`
    allows.
    """
    sides: dict[str, dict[str, str]] = {TRAIN: {}, VALIDATION: {}}
    for example in examples:
        if len(example.inputs) <= _LONGEST_INPUT and example.targets:
            sides[VALIDATION if is_held_out(example.file) else TRAIN].setdefault(
                example.inputs, example.targets
            )
    for text in sides[VALIDATION]:
        sides[TRAIN].pop(text, None)
    return {
        split: sorted(pairs.items(), key=lambda pair: _order(pair[0]))[: MOST[split]]
        for split, pairs in sides.items()
    }


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _summary(docstring: str) -> str:
    """The first sentence of a docstring."""
    first = _one_line(docstring.strip().split("\n\n")[0])
    return re.split(r"(?<=[.!?]) ", first)[0]


@functools.cache
def _sources() -> tuple[tuple[str, str], ...]:
    """(file, text) of the standard library, files as `python_environment` names them."""
    root = python_environment._standard_library()
    files = python_environment._source_files(root)
    return tuple(
        (f"stdlib/{name}", text)
        for name, path in files
        if name != python_environment._TOPICS and (text := python_environment._read(path))
    )


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, file: str) -> Function | None:
    docstring = ast.get_docstring(node)
    if not docstring or node.name.startswith("__"):
        return None
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args]
    values = [
        *zip(named[len(named) - len(arguments.defaults) :], arguments.defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    defaults = {
        argument.arg: ast.unparse(value)
        for argument, value in values
        if isinstance(value, ast.Constant | ast.Name | ast.Attribute)
    }
    return Function(
        file, node.name, f"{node.name}({ast.unparse(arguments)})", defaults, _summary(docstring)
    )


@functools.cache
def functions() -> tuple[Function, ...]:
    """Every documented function of the standard library. Parsing takes seconds, so they are kept as
    `documentation_prose` is.
    """
    identity = {
        "extraction": _EXTRACTION,
        "python": sys.version,
        "stdlib": os.fspath(python_environment._standard_library()),
    }
    path = python_environment._cache_file(identity, "functions")
    kept = python_environment._load_cache(path)
    if kept is None:
        with python_environment.uncollected():
            found = _parse_functions()
        kept = [
            Document(json.dumps(dataclasses.asdict(function)), key=function.file)
            for function in found
        ]
        python_environment._save_cache(path, kept)
    return tuple(Function(**json.loads(document.text)) for document in kept)


def _parse_functions() -> list[Function]:
    found = []
    for file, text in _sources():
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        nodes = (
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        )
        found += [function for node in nodes if (function := _function(node, file)) is not None]
    return found


def _described() -> Iterator[tuple[Function, list[str]]]:
    """Functions with a summary of handy length, and the summaries of others of the same file, in a
    hash's order.
    """
    by_file: dict[str, list[Function]] = {}
    for function in functions():
        if (
            _SHORTEST_SUMMARY <= len(function.summary) <= _LONGEST_SUMMARY
            and len(function.signature) <= 100
        ):
            by_file.setdefault(function.file, []).append(function)
    for members in by_file.values():
        for function in members:
            others = sorted(
                {other.summary for other in members} - {function.summary},
                key=lambda text: _order(function.name + text),
            )
            if len(others) >= len(LETTERS) - 1:
                yield function, others


def packages() -> Iterator[Example]:
    """A paragraph of documentation: which package is it of?"""
    documents, _ = python_environment.prose_documents()
    for document in documents:
        package = document.key.partition("/")[0]
        label = "python" if package in ("stdlib", "topics") else package
        if label in PACKAGES and not document.key.endswith("/description"):
            for paragraph in document.text.split("\n\n"):
                text = _one_line(paragraph)[: _LONGEST_INPUT - 30]
                if len(text) >= _SHORTEST_PARAGRAPH:
                    yield Example(document.key, f"package documentation: {text}", label)


_STATEMENT = re.compile(rf"^( *)({'|'.join(KEYWORDS)})\b(.*)$")


def keywords() -> Iterator[Example]:
    """A line of code that has lost its first word, and the two lines before it: which keyword was
    it?
    """
    for file, text in _sources():
        lines = text.split("\n")
        for number in range(2, len(lines)):
            found = _STATEMENT.match(lines[number])
            if (
                found and len(found[3]) >= 3 and _order(f"{file} {number}") % 4 == 0
            ):  # a quarter is plenty
                before = "\n".join(lines[number - 2 : number])
                yield Example(file, f"keyword: ____{found[3]}\nafter:\n{before}", found[2])


def matches() -> Iterator[Example]:
    """A function and a description, its own or that of another function of the same file: do they
    belong together?
    """
    for function, others in _described():
        true = _order(f"{function.file} {function.name} {function.signature}") % 2 == 0
        description = function.summary if true else others[0]
        yield Example(
            function.file,
            f"match function: {function.signature} description: {description}",
            YES_NO[not true],
        )


def choices() -> Iterator[Example]:
    """A function and four descriptions: which letter is its own?"""
    for function, others in _described():
        place = _order(f"choice {function.file} {function.name} {function.signature}") % len(
            LETTERS
        )
        descriptions = others[: len(LETTERS) - 1]
        descriptions.insert(place, function.summary)
        listed = " ".join(
            f"{letter}: {text}" for letter, text in zip(LETTERS, descriptions, strict=True)
        )
        yield Example(
            function.file, f"choice function: {function.signature} {listed}", LETTERS[place]
        )


def defaults() -> Iterator[Example]:
    """A function's parameters: what is the default value of one of them?"""
    for function in functions():
        for parameter, value in function.defaults.items():
            if len(value) <= _LONGEST_ANSWER:
                yield Example(
                    function.file, f"default of {parameter} in: {function.signature}", value
                )


@dataclasses.dataclass(frozen=True)
class Labels:
    """A kind of question.

    Attributes:
      examples: makes all of them.
      classes: the answers there are, or None for free text.
    """

    examples: Callable[[], Iterator[Example]]
    classes: tuple[str, ...] | None

    def pairs(self) -> Pairs:
        """(input, target) by split."""
        return divide(self.examples())


LABELS: Mapping[str, Labels] = {
    "package": Labels(packages, PACKAGES),
    "keyword": Labels(keywords, KEYWORDS),
    "match": Labels(matches, YES_NO),
    "choice": Labels(choices, LETTERS),
    "default": Labels(defaults, None),
}
"""The questions by name."""

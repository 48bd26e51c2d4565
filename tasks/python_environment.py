"""Real text that every Python environment holds: the source of the standard library, and the
documentation written inside packages.

No module is imported to read it: source files are parsed. The texts differ by Python and package
versions, so each corpus carries versions, counts and sha256.
"""

import ast
import contextlib
import functools
import gc
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence

from upcycle_jax.data.text.documents import (
    DOCUMENT_CHARACTERS,
    PASSAGE_CHARACTERS,
    Corpus,
    Document,
    build_corpus,
)
from upcycle_jax.files import replacing

_NOT_SOURCE = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "_vendor",
        "testing",
    }
)
_TOPICS = "pydoc_data/topics.py"

PROSE_PACKAGES = (
    "absl-py",
    "etils",
    "flax",
    "jax",
    "ml_dtypes",
    "numpy",
    "optax",
    "orbax-checkpoint",
    "scipy",
    "seqio",
    "tensorflow-datasets",
)
"""Distributions whose docstrings and descriptions are read, where installed. All are dependencies
of the library or of SeqIO.
"""

_IMPORT_NAMES = {
    "absl-py": "absl",
    "orbax-checkpoint": "orbax",
    "tensorflow-datasets": "tensorflow_datasets",
}

_EXTRACTION = 1
"""Raise when the rules below change: it is part of the cache's key."""

_SHORTEST_DOCSTRING = 60
CACHE_VARIABLE = "UPCYCLE_JAX_CACHE"


def _standard_library() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_paths()["stdlib"])


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without the collector of cycles: syntax trees have none, and looking for them takes a quarter
    of the time of parsing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _source_files(root: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
    """Python files under `root` with their relative names, without tests and installed packages,
    sorted by name.
    """
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_SOURCE]
        for name in names:
            if name.endswith(".py"):
                path = pathlib.Path(folder, name)
                found.append((path.relative_to(root).as_posix(), path))
    return sorted(found)


def _read(path: pathlib.Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        # a few library files declare another encoding on purpose; they are not worth a special case
        return None


@functools.cache
def python_source(*, whole_documents: bool = False) -> Corpus:
    """The standard library's source, one document a file, without tests, IDLE and installed
    packages (about 11 MB); cut into passages unless `whole_documents`.

    Raises:
      ValueError: the interpreter has no source files (a frozen or zipped standard library).
    """
    root = _standard_library()
    documents = [
        Document(text, key=f"stdlib/{name}")
        for name, path in _source_files(root)
        if name != _TOPICS and (text := _read(path))
    ]
    if len(documents) < 2:
        raise ValueError(
            f"the standard library at {root} holds no Python source (frozen or zipped?): use a"
            " Python that has it, or your own text with TEXT_FILES"
        )
    return build_corpus(
        "python_source",
        documents,
        origin={"kind": "standard library source", "python": platform.python_version()},
        characters=DOCUMENT_CHARACTERS if whole_documents else PASSAGE_CHARACTERS,
    )


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, in the order of the source."""
    body = getattr(node, "body", None)
    if not isinstance(body, list):
        return
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text:
            yield text
    for child in body:
        yield from _docstrings(child)


def strip_doctests(text: str) -> str:
    """Drops interactive examples: from a line that starts with '>>>' to the next blank line.

    >>> strip_doctests("Adds.\\n\\n>" + ">> 1 + 1\\n2\\n\\nThat is all.")
    'Adds.\\n\\n\\nThat is all.'
    """
    kept, inside = [], False
    for line in text.split("\n"):
        inside = line.lstrip().startswith(">>>") or (inside and bool(line.strip()))
        if not inside:
            kept.append(line)
    return "\n".join(kept)


def _prose_of_source(text: str, seen: set[str]) -> str:
    """The docstrings of one source text, joined, without interactive examples, without those in
    `seen` (which grows).
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return ""
    kept = []
    for docstring in _docstrings(tree):
        prose = strip_doctests(docstring).strip()
        if len(prose) >= _SHORTEST_DOCSTRING and prose not in seen:
            seen.add(prose)
            kept.append(prose)
    return "\n\n".join(kept)


def _topics(text: str) -> Iterator[tuple[str, str]]:
    """The language reference's topics, from the source of `pydoc_data.topics`: one dictionary of
    name -> text.
    """
    for node in ast.parse(text).body:
        value = getattr(node, "value", None)
        if isinstance(value, ast.Dict):
            yield from sorted(ast.literal_eval(value).items())


def package_versions(packages: Sequence[str] = PROSE_PACKAGES) -> dict[str, str]:
    """Installed versions of those packages that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _prose_documents(packages: Sequence[str]) -> Iterator[Document]:
    """Keys of the standard library's files equal those of `python_source`: a file's source and
    docstrings share a split.
    """
    seen: set[str] = set()
    for name, path in _source_files(_standard_library()):
        text = _read(path)
        if text is None:
            continue
        if name == _TOPICS:
            for topic, prose in _topics(text):
                yield Document(prose, key=f"topics/{topic}")
        elif prose := _prose_of_source(text, seen):
            yield Document(prose, key=f"stdlib/{name}")
    for package in packages:
        distribution = importlib.metadata.distribution(package)
        description = (
            distribution.metadata.get("Description") or distribution.metadata.get_payload()
        )
        if isinstance(description, str) and description.strip():
            yield Document(description, key=f"{package}/description")
        folder = pathlib.Path(
            os.fspath(distribution.locate_file(_IMPORT_NAMES.get(package, package)))
        )
        for name, path in _source_files(folder):
            if (text := _read(path)) and (prose := _prose_of_source(text, seen)):
                yield Document(prose, key=f"{package}/{name}")


def _cache_file(identity: Mapping[str, object], name: str = "documentation_prose") -> pathlib.Path:
    folder = os.environ.get(CACHE_VARIABLE)
    if not folder:
        folder = os.path.join(
            os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "upcycle_jax"
        )
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return pathlib.Path(folder, f"{name}-{key}.json.gz")


def _load_cache(path: pathlib.Path) -> list[Document] | None:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [Document(text, key=key) for key, text in json.load(file)]
    except (OSError, EOFError, ValueError, TypeError):
        return None  # absent or damaged: read the environment again


def _save_cache(path: pathlib.Path, documents: Sequence[Document]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            replacing(path, "wb", shared=True) as raw,
            gzip.open(raw, "wt", encoding="utf-8", compresslevel=3) as file,
        ):
            json.dump([[document.key, document.text] for document in documents], file)
    except OSError:
        return  # a read-only home costs a few seconds at each start, nothing more


def prose_documents() -> tuple[list[Document], dict[str, str]]:
    """The documents of `documentation_prose`, keyed `stdlib/<file>`, `<package>/<file>` or
    `topics/<name>`; and the packages' versions.

    Parsing takes several seconds, so the extracted text is kept in `$UPCYCLE_JAX_CACHE` (default:
    `~/.cache/upcycle_jax`) under a key of all the versions and places that it depends on.
    """
    versions = package_versions()
    identity = {
        "extraction": _EXTRACTION,
        "python": sys.version,
        "stdlib": os.fspath(_standard_library()),
        "packages": versions,
    }
    identity["library"] = sysconfig.get_paths()["purelib"]
    path = _cache_file(identity)
    documents = _load_cache(path)
    if documents is None:
        with uncollected():
            documents = list(_prose_documents(tuple(versions)))
        _save_cache(path, documents)
    return documents, versions


@functools.cache
def documentation_prose(*, whole_documents: bool = False) -> Corpus:
    """Documentation written in English inside the environment: docstrings, language reference
    topics, package descriptions; cut into passages unless `whole_documents`.
    """
    documents, versions = prose_documents()
    origin = {"kind": "documentation", "python": platform.python_version(), "packages": versions}
    return build_corpus(
        "documentation_prose",
        documents,
        origin=origin,
        characters=DOCUMENT_CHARACTERS if whole_documents else PASSAGE_CHARACTERS,
    )

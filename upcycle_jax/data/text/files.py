"""A user's own files as documents: plain text, JSON lines, either of them gzipped, and Parquet. No
TensorFlow.

Every problem with a file is one error that names the file, the place in it and the remedy, raised
before anything is tokenised.
"""

import glob
import gzip
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from upcycle_jax.data.text.documents import (
    DOCUMENT_CHARACTERS,
    PASSAGE_CHARACTERS,
    VALIDATION_FRACTION,
    Corpus,
    Document,
    build_corpus,
)

MAX_CHARACTERS = 2 * 1024**3
"""Text files are held in memory; more than this (as read) is refused with the way out."""

PLAIN = frozenset(
    {"", ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".htm", ".log"}
    | {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts"}
    | {".sh", ".rb", ".php", ".scala", ".swift", ".kt", ".lua", ".jl", ".r", ".hs", ".ml", ".sql"}
)
"""Endings of files that are one document each: prose and source code. Data formats are not guessed
at: a table or an archive that is read as text trains a model on separators."""
JSON_LINES = frozenset({".json", ".jsonl", ".ndjson"})
"""One object a line. C4's own files are named `.json.gz` and hold that."""
PARQUET = ".parquet"

SINGLE_DOMAIN = ""
"""Name of the only domain where the user gave a plain list of files."""

_WAY_OUT_OF_MEMORY = (
    "register a SeqIO task over the files (seqio.TextLineDataSource, or a TFDS data set) in a"
    " module of your own and name it with MIXTURE_OR_TASK_MODULE"
)


def normalise(
    text_files: str | Sequence[str] | Mapping[str, str | Sequence[str]],
) -> dict[str, tuple[str, ...]]:
    """The user's setting as `{domain: (pattern, ...)}`; one pattern or a plain list is one domain
    without a name.

    Raises:
      ValueError: nothing is named, or a domain's name does not suit a task's name.
    """
    domains = text_files if isinstance(text_files, Mapping) else {SINGLE_DOMAIN: text_files}
    result = {}
    for domain, patterns in domains.items():
        patterns = (patterns,) if isinstance(patterns, (str, os.PathLike)) else tuple(patterns)
        if not patterns:
            raise ValueError(
                f"text_files names no file{f' for the domain {domain!r}' if domain else ''}: give"
                " at least one path or pattern"
            )
        if domain and not str(domain).replace("_", "").isalnum():
            raise ValueError(
                f"text_files has a domain named {domain!r}: use letters, digits and '_', because it"
                " becomes part of a task's name"
            )
        result[str(domain)] = tuple(os.fspath(pattern) for pattern in patterns)
    if not result:
        raise ValueError(
            "text_files is empty: give {'domain': ['pattern', ...]} or a list of patterns"
        )
    return result


def find_files(patterns: Sequence[str]) -> tuple[pathlib.Path, ...]:
    """Files that the patterns name (`*`, `**`, `~`), sorted, each once.

    Raises:
      FileNotFoundError: a pattern names nothing.
      ValueError: a pattern names a folder.
    """
    found: set[str] = set()
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        matches = [expanded] if os.path.exists(expanded) else glob.glob(expanded, recursive=True)
        if not matches:
            raise FileNotFoundError(
                f"text_files: nothing matches {pattern!r} (working directory {os.getcwd()}): check"
                " the path"
            )
        files = [match for match in matches if os.path.isfile(match)]
        if not files:
            raise ValueError(
                f"text_files: {pattern!r} is a folder: give its files, for example"
                f" {os.path.join(pattern, '**', '*.txt')!r}"
            )
        found.update(files)
    return tuple(pathlib.Path(path) for path in sorted(found))


def _read_bytes(path: pathlib.Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"text_files: cannot read {path}: {error.strerror or error}; check its permissions"
        ) from error
    if path.suffix.lower() == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"text_files: {path} is not a whole gzip file ({error}): compress or download it"
                " again"
            ) from error
    if not data.strip():
        raise ValueError(f"text_files: {path} is empty: remove it from text_files or give it text")
    return data


def _decode(path: pathlib.Path, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text_files: {path} is not UTF-8 text (byte {data[error.start]:#04x} at offset"
            f" {error.start}): convert it (iconv -t utf-8) or leave it out"
        ) from error
    if "\0" in text:
        raise ValueError(
            f"text_files: {path} is not text (it holds a NUL byte at character"
            f" {text.index(chr(0))}): leave it out"
        )
    return text


def _text_of(record: Any, *, field: str, where: str) -> str:
    if not isinstance(record, Mapping):
        raise ValueError(
            f"text_files: {where} is {type(record).__name__}, not an object with a field '{field}'"
        )
    if field not in record:
        raise ValueError(
            f"text_files: {where} has no field '{field}' (it has {sorted(record)}): set text_field"
            " to the one that holds the text"
        )
    value = record[field]
    if not isinstance(value, str):
        raise ValueError(
            f"text_files: {where}: the field '{field}' holds {type(value).__name__}, not a string:"
            " choose another text_field"
        )
    return value


def _read_json_lines(path: pathlib.Path, text: str, *, field: str) -> Iterator[str]:
    for number, line in enumerate(
        text.split("\n"), start=1
    ):  # not splitlines: JSON strings may hold other line ends
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"text_files: {where} is not JSON ({error.msg} at column {error.colno}): a .json"
                " or .jsonl file has one object a line (`jq -c '.[]'` makes lines of an array)"
            ) from error
        yield _text_of(record, field=field, where=where)


def _read_parquet(path: pathlib.Path, *, field: str) -> Iterator[str]:
    try:
        from pyarrow import lib, parquet
    except ImportError as error:
        raise ValueError(
            f"text_files: {path} is Parquet, which needs pyarrow: pip install"
            " 'upcycle_jax[parquet]'"
        ) from error
    try:
        file = parquet.ParquetFile(path)
    except (lib.ArrowException, OSError) as error:
        raise ValueError(
            f"text_files: {path} is not a Parquet file ({error}): check the download"
        ) from error
    with file:
        names = file.schema_arrow.names
        if field not in names:
            raise ValueError(
                f"text_files: {path} has no column '{field}' (it has {sorted(names)}): set"
                " text_field to the one that holds the text"
            )
        try:
            for batch in file.iter_batches(columns=[field]):
                for value in batch.column(0).to_pylist():
                    if value is not None:
                        yield _text_of({field: value}, field=field, where=f"{path}")
        except (lib.ArrowException, OSError) as error:
            raise ValueError(
                f"text_files: {path} is a damaged Parquet file ({' '.join(str(error).split())}):"
                " copy it again"
            ) from error


def _kind(path: pathlib.Path) -> str:
    """The ending that tells what a file holds, in small letters; a final `.gz` is left out.

    Raises:
      ValueError: the ending is unknown.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    kind = (suffixes[-2:-1] if zipped else suffixes[-1:]) or [""]
    if kind[0] in PLAIN or kind[0] in JSON_LINES or (kind[0] == PARQUET and not zipped):
        return kind[0]
    ending = "".join(path.suffixes[-2:] if zipped else path.suffixes[-1:])
    raise ValueError(
        f"text_files: {path} ends in {ending!r},"
        f" which is not known. JSON lines: {', '.join(sorted(JSON_LINES))}; Parquet: {PARQUET}; one"
        f" plain text a file: {', '.join(sorted(PLAIN - {''}))}, or no ending; all but Parquet also"
        " with .gz. Rename or convert the file"
    )


def read_file(path: pathlib.Path, *, field: str) -> Iterator[str]:
    """Texts of one file: the whole of a plain text file, or the field of each record.

    The kind follows the name's ending, in small or capital letters, a final `.gz` aside: see
    `PLAIN`, `JSON_LINES` and `PARQUET`.

    Raises:
      ValueError: the ending is unknown, or the file is empty, not what its name says, not UTF-8, or
        lacks the field.
    """
    kind = _kind(path)
    if kind == PARQUET:
        texts = _read_parquet(path, field=field)
    else:
        text = _decode(path, _read_bytes(path))
        texts = _read_json_lines(path, text, field=field) if kind in JSON_LINES else iter((text,))
    empty = True
    for text in texts:
        if text.strip():
            empty = False
            yield text
    if empty:
        raise ValueError(
            f"text_files: {path} is empty: no record has text in '{field}'; remove it from"
            " text_files"
        )


def load_corpus(
    name: str,
    patterns: Sequence[str],
    *,
    field: str = "text",
    validation_fraction: float = VALIDATION_FRACTION,
    max_characters: int = MAX_CHARACTERS,
    whole_documents: bool = False,
) -> Corpus:
    """Reads all files that `patterns` name into one domain.

    Args:
      name: of the domain.
      patterns: of its files.
      field: see `read_file`.
      validation_fraction: see `build_corpus`.
      max_characters: more than these are refused.
      whole_documents: keep documents whole, up to `DOCUMENT_CHARACTERS`. A domain that is one
        document is cut into passages in any case, so that there is something to validate on.

    Raises:
      FileNotFoundError: a pattern names nothing.
      ValueError: a file is unusable (see `read_file`), or all of them exceed `max_characters`.
    """
    paths = find_files(patterns)
    documents: list[Document] = []
    total = 0
    digest = hashlib.sha256()
    for path in paths:
        for text in read_file(path, field=field):
            total += len(text)
            if total > max_characters:
                raise ValueError(
                    f"text_files: the domain '{name}' has more than {max_characters:,} characters,"
                    f" too much to hold in memory: {_WAY_OUT_OF_MEMORY}"
                )
            digest.update(text.encode("utf-8", "replace"))
            documents.append(Document(text))
    origin = {
        "kind": "text_files",
        "files": [path.name for path in paths],
        "field": field,
        "sha256": digest.hexdigest(),
    }
    several = len({document.text for document in documents}) > 1
    return build_corpus(
        name,
        documents,
        origin=origin,
        validation_fraction=validation_fraction,
        characters=DOCUMENT_CHARACTERS if whole_documents and several else PASSAGE_CHARACTERS,
    )

"""Cached tasks on disk: their folders, their manifest, how an example is stored. Neither
TensorFlow nor SeqIO.

    <cache folder>/<task>/manifest.json                              what was cached, from what,
    with counts and sha256
                         /<split>-00000-of-00004.array_record        examples, one a record
                         /<split>.ends.npy                           int64 [records, features]:
                         tokens up to and with each record
    <cache folder>/<mixture>/mixture.json                            tasks and rates

The manifest is written last and the task's folder renamed into place after it, so a folder with its
name is whole.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np

from upcycle_jax.files import write_whole

FORMAT = 1
MANIFEST = "manifest.json"
MIXTURE = "mixture.json"
UNFINISHED = ".unfinished"
SEQIO_COMPLETED = "COMPLETED"
TEXT_SETTINGS = ("objective", "text_field", "validation_fraction")
"""Fields of `DatasetConfig` that decide what a task over the user's own text files gives."""

Example = dict[str, Any]


def folder_name(task_name: str) -> str:
    """A task's folder below the cache folder, as SeqIO names it."""
    return task_name.replace(":", os.sep)


def encode(example: Mapping[str, Any], *, token_dtypes: Mapping[str, str]) -> bytes:
    """One record.

    Args:
      example: arrays, scalars and byte strings by feature.
      token_dtypes: the dtype in which the tokens of each model feature are kept, 'uint16' or
        'int32'.

    Raises:
      ValueError: tokens that are no integers, or that the dtype cannot hold.
    """
    packed: dict[str, Any] = {}
    for name, value in example.items():
        if name in token_dtypes:
            packed[name] = _as_tokens(name, np.asarray(value), token_dtypes[name]).tobytes()
            continue
        array = np.asarray(value)
        if array.ndim == 0:
            packed[name] = array.item()
        elif array.dtype.kind in "OSU":
            packed[name] = array.tolist()
        else:
            packed[name] = {
                "shape": list(array.shape),
                "dtype": array.dtype.str,
                "data": array.tobytes(),
            }
    return msgpack.packb(packed)


def _as_tokens(name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    if not values.size:
        return values.astype(dtype)
    if values.dtype.kind not in "iu":
        raise ValueError(
            f"the feature '{name}' holds {values.dtype} values: only token ids can be cached as a"
            " model feature"
        )
    for extreme in (int(values.min()), int(values.max())):
        if not 0 <= extreme <= np.iinfo(dtype).max:
            raise ValueError(
                f"the feature '{name}' holds the token id {extreme}, which its vocabulary"
                f" does not have (it fits no {dtype}): the task tokenises with"
                " another vocabulary than its output_features name"
            )
    return values.astype(dtype)


def decode(record: bytes, *, token_dtypes: Mapping[str, str]) -> Example:
    """The example of `encode`; tokens are int32 `[length]`, text is bytes."""
    example = msgpack.unpackb(record)
    for name, value in example.items():
        if name in token_dtypes:
            example[name] = np.frombuffer(value, token_dtypes[name]).astype(np.int32)
        elif isinstance(value, dict):
            example[name] = np.frombuffer(value["data"], value["dtype"]).reshape(value["shape"])
    return example


def token_dtype(vocabulary_size: int) -> str:
    """The smallest dtype that holds every id."""
    return "uint16" if vocabulary_size <= 2**16 else "int32"


def sha256_of_file(path: pathlib.Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(described: Any) -> str:
    """A short sha256 of something JSON-able."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """A file of a cache: its name in the task's folder, its records (0 for an index), bytes and
    sha256.
    """

    name: str
    records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class SplitEntry:
    """One split.

    Attributes:
      records: examples.
      tokens: their tokens, by model feature.
      files: the ArrayRecord files in order.
      index: the file of cumulative token counts.
    """

    records: int
    tokens: Mapping[str, int]
    files: Sequence[FileEntry]
    index: FileEntry


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a cached task is.

    Attributes:
      task: its name.
      identity: what the examples were made from: source, steps, vocabularies, seed; two caches with
        equal identities hold equal examples.
      features: for each model feature its vocabulary's description, `eos_id`, `add_eos` and the
        dtype in which tokens are kept.
      steps: what is left to do when an example is read, as `steps` knows it.
      feature_lengths: lengths for which the examples were made, where steps that need them ran
        before they were written; else None.
      splits: by name.
      versions: of the libraries that wrote it.
      text_files: `TEXT_SETTINGS` of a task over the user's own text files, else None.
      format: of this file.
    """

    task: str
    identity: Mapping[str, Any]
    features: Mapping[str, Mapping[str, Any]]
    steps: Sequence[Mapping[str, Any]]
    feature_lengths: Mapping[str, int] | None
    splits: Mapping[str, SplitEntry]
    versions: Mapping[str, str]
    text_files: Mapping[str, Any] | None = None
    format: int = FORMAT

    @property
    def token_dtypes(self) -> dict[str, str]:
        """See `encode`."""
        return {name: feature["dtype"] for name, feature in self.features.items()}

    @property
    def vocabulary_size(self) -> int:
        """The number of token ids."""
        return max(int(feature["vocabulary"]["size"]) for feature in self.features.values())

    def digest(self) -> str:
        """A short hash of everything that decides which examples are read."""
        return digest(
            {
                key: value
                for key, value in self.to_json().items()
                if key not in ("versions", "features", "text_files")
            }
        )

    def to_json(self) -> dict[str, Any]:
        """The manifest as it is written."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Manifest":
        """The manifest of `to_json`."""
        splits = {
            name: SplitEntry(
                records=entry["records"],
                tokens=entry["tokens"],
                files=tuple(FileEntry(**file) for file in entry["files"]),
                index=FileEntry(**entry["index"]),
            )
            for name, entry in fields["splits"].items()
        }
        return cls(**{**fields, "splits": splits})


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file in one step: a reader sees the former file or the new one."""
    write_whole(path, json.dumps(content, indent=1, sort_keys=True), shared=True)


@dataclasses.dataclass(frozen=True)
class CachedTask:
    """A finished cache.

    Attributes:
      folder: its files and its manifest.
      manifest: what it holds.
      remedy: what to do about a damaged file, for the user.
    """

    folder: pathlib.Path
    manifest: Manifest
    remedy: str

    @classmethod
    def open(cls, folder: pathlib.Path, *, remedy: str) -> "CachedTask":
        """Reads the manifest and checks that every file is there and as long as it was written.

        Args:
          folder: the task's folder.
          remedy: what to do about a damaged file, for the user.

        Raises:
          ValueError: the manifest or a file is damaged, missing, or of another version.
        """
        path = folder / MANIFEST
        try:
            fields = json.loads(path.read_text())
            if fields.get("format") != FORMAT:
                raise ValueError(
                    f"it has format {fields.get('format')!r}, this version reads {FORMAT}"
                )
            manifest = Manifest.from_json(fields)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"the cached task's manifest {path} cannot be read ({error}): {remedy}"
            ) from error
        task = cls(folder, manifest, remedy)
        for entry in task._entries():
            if pathlib.PurePath(entry.name).name != entry.name:
                raise task.damaged(
                    f"{path} names the file {entry.name!r}, which is no file beside it"
                )
            file = folder / entry.name
            size = file.stat().st_size if file.exists() else None
            if size != entry.bytes:
                how = "is missing" if size is None else f"has {size:,} bytes, not {entry.bytes:,}"
                raise task.damaged(f"{file} {how}")
        return task

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.bytes for entry in self._entries())

    def _entries(self) -> Iterator[FileEntry]:
        for split in self.manifest.splits.values():
            yield from (*split.files, split.index)

    def verify(self) -> None:
        """Reads every file and compares its sha256.

        Raises:
          ValueError: a file is not what was written.
        """
        for entry in self._entries():
            if sha256_of_file(self.folder / entry.name) != entry.sha256:
                raise self.damaged(f"{self.folder / entry.name} has other content than was written")

    def damaged(self, what: str) -> ValueError:
        """The error for damage found in a file of the cache, with the remedy."""
        return ValueError(
            f"the cached task '{self.manifest.task}' is damaged: {what}. To make it again:"
            f" {self.remedy}"
        )


def find_folder(cache_dirs: Sequence[str], name: str, file: str) -> pathlib.Path | None:
    """The first `<cache folder>/<name>` that holds `file`."""
    for cache_dir in cache_dirs:
        folder = pathlib.Path(os.path.expanduser(cache_dir), folder_name(name))
        if (folder / file).exists():
            return folder
    return None

"""Whether the content of a checkpoint is what was saved: the record that a save leaves of it, and
the comparison while it is restored.

Beside this library's record `_CHECKPOINT_METADATA` holds, under `CHECKSUMS_KEY`, the checksum of
every leaf, a digest of the record, and whether a data position was saved. The record names the
algorithm in turn, so that neither of the two can be lost unnoticed. The files of a data position
lie beside `DIGESTS_FILE`: their digests, and that of both entries of the metadata. Checkpoints of
older versions and of T5X have none of this and are restored without comparison.
"""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from upcycle_jax.checkpoints.checksums import PREFIX, device_summaries
from upcycle_jax.checkpoints.orbax_metadata import STEP_METADATA
from upcycle_jax.checkpoints.reader import METADATA_KEY, CheckpointReader, files_below
from upcycle_jax.state_tree import TARGET
from upcycle_jax.text import size

_log = logging.getLogger(__name__)

CHECKSUMS_KEY = "upcycle_jax_checksums"
"""Where the checksums lie in the custom metadata of an Orbax checkpoint."""

MARK = "checksums"
"""Entry of this library's record in a checkpoint that has checksums."""

DIGESTS_FILE = "digests.json"
_ALGORITHM = PREFIX.rstrip(":")
_REMEDY = "Copy it again, or use another step"


class DamagedCheckpointError(ValueError):
    """A checkpoint cannot be read, or is not what was saved."""


class NonFiniteParameterError(ValueError):
    """A parameter holds NaN or infinite values."""


@dataclasses.dataclass(frozen=True)
class SavedContent:
    """What a checkpoint says of its content.

    Attributes:
      leaves: checksum of every leaf by full path (`checksums.checksum`).
      record: digest of this library's record.
      has_dataset: whether a data position was saved.
    """

    leaves: Mapping[str, str]
    record: str
    has_dataset: bool

    @classmethod
    def read(cls, reader: CheckpointReader) -> "SavedContent | None":
        """What the checkpoint of a reader says, or None where it has no checksums.

        Raises:
          DamagedCheckpointError: the metadata is damaged.
        """
        # A path may name the array tree in a checkpoint.
        is_item = getattr(reader, "item", None) == reader.path
        return cls.at(reader.path.parent if is_item else reader.path)

    @classmethod
    def at(cls, folder: epath.Path) -> "SavedContent | None":
        """As `read`, of the checkpoint in a folder."""
        path, custom = folder / STEP_METADATA, _custom_metadata(folder)
        record, table = custom.get(METADATA_KEY, {}), custom.get(CHECKSUMS_KEY)
        if not isinstance(record, dict):
            raise _damaged(path, f"its entry {METADATA_KEY} is no object")
        if table is None:
            if MARK in record:
                raise _damaged(path, f"its checksums ({CHECKSUMS_KEY}) are gone")
            return None
        try:
            leaves, digest, has_dataset = table["leaves"], table["record"], table["dataset"]
            whole = all(isinstance(text, str) for text in [digest, *leaves.values()])
        except (TypeError, KeyError, AttributeError):
            whole = False
        if not whole or not isinstance(has_dataset, bool):
            raise _damaged(path, f"its entry {CHECKSUMS_KEY} is not what this library writes")
        if digest != _digest(record):
            raise _damaged(path, "the record in it is not the one that was saved")
        return cls(leaves, digest, has_dataset)


def saved_metadata(
    record: Mapping[str, Any], leaves: Mapping[str, str] | None, *, has_dataset: bool
) -> dict[str, Any]:
    """The custom metadata of a checkpoint: the record and, where `leaves` has the checksums of all
    leaves, what `SavedContent.read` gives back.
    """
    record = {key: value for key, value in json.loads(json.dumps(record)).items() if key != MARK}
    if leaves is None:
        return {METADATA_KEY: record} if record else {}
    record[MARK] = _ALGORITHM
    table = {
        "leaves": dict(leaves),
        "record": _digest(record),
        "dataset": has_dataset,
    }
    return {METADATA_KEY: record, CHECKSUMS_KEY: table}


def write_digests(folder: epath.Path, metadata: Mapping[str, Any]) -> None:
    """Leaves `DIGESTS_FILE` in the folder of a data position: sha256 of every other file in it, and
    of the custom metadata that is saved with it.
    """
    digests = {"files": _digests_of_files(folder), "metadata": _digest_of_ours(metadata)}
    (folder / DIGESTS_FILE).write_text(json.dumps(digests, indent=1, sort_keys=True))


def check_digests(folder: epath.Path, checkpoint: epath.Path) -> None:
    """Compares the files of a data position, and the metadata of its checkpoint, with the
    `DIGESTS_FILE` beside them; does nothing where none was saved.

    Args:
      folder: one process's files.
      checkpoint: `checkpoint_<step>`.

    Raises:
      DamagedCheckpointError: a file, the metadata or the list is damaged or missing.
    """
    listed, saved = folder / DIGESTS_FILE, SavedContent.at(checkpoint)
    if not listed.exists():
        if saved is not None and saved.has_dataset:
            raise _damaged(listed, "it is missing")
        return
    digests = _json_object(listed)
    files, found = digests.get("files"), _digests_of_files(folder)
    if not isinstance(files, dict):
        raise _damaged(listed, "it lists no files")
    for name in sorted(files.keys() | found.keys()):
        if files.get(name) != found.get(name):
            raise _damaged(folder / name, f"it is not the file that {DIGESTS_FILE} lists")
    if digests.get("metadata") != _digest_of_ours(_custom_metadata(checkpoint)):
        raise _damaged(
            checkpoint / STEP_METADATA, f"its entries are not those that {listed} was saved with"
        )


class Verification:
    """Compares leaves on the devices with what their checkpoint says of them, and looks for values
    that are not finite: one pass over each leaf for both.

    Args:
      reader: of the checkpoint that is restored.
      checksums: compare with the checksums that were saved. Without, only values that are not
        finite are looked for.

    Raises:
      DamagedCheckpointError: the checkpoint's metadata is damaged.
    """

    def __init__(self, reader: CheckpointReader, *, checksums: bool = True):
        self._path = reader.path
        self._step = reader.step
        self._saved = SavedContent.read(reader) if checksums else None
        self._leaves = self._compared = self._bytes = 0
        self._seconds = 0.0
        self._not_finite: dict[str, str] = {}

    def check(self, leaves: Mapping[str, jax.Array]) -> None:
        """Looks at leaves, by full path, in the dtypes in which they are stored. Every process of a
        run must call it with the same ones.

        Raises:
          DamagedCheckpointError: one is not what was saved, or none of that name was saved.
        """
        started = time.monotonic()
        for path, summary in device_summaries(leaves).items():
            self._leaves += 1
            self._bytes += leaves[path].nbytes
            if self._saved is not None:
                self._compared += 1
                saved = self._saved.leaves.get(path)
                if saved != summary.checksum:
                    raise DamagedCheckpointError(
                        f"{self._path}: the leaf {path} of step {self._step} is not what was saved:"
                        f" its checksum is {summary.checksum}, {STEP_METADATA} says"
                        f" {saved or 'nothing of it'}. {_REMEDY}"
                    )
            if summary.nonfinite:
                self._not_finite[path] = not_finite(path, leaves[path], summary.nonfinite)
        self._seconds += time.monotonic() - started

    def finish(self, remedy: str) -> None:
        """Logs what was done, once all leaves were looked at.

        Args:
          remedy: what to do about a checkpoint with NaN, for the message.

        Raises:
          NonFiniteParameterError: parameters hold NaN or infinite values. Optimizer state that does
            is a warning.
        """
        parameters = [text for path, text in self._not_finite.items() if path.startswith(TARGET)]
        for path, text in self._not_finite.items():
            if not path.startswith(TARGET):
                _log.warning("%s: %s", self._path, text)
        if parameters:
            more = f" ({len(parameters) - 1} more have such)" if len(parameters) > 1 else ""
            raise NonFiniteParameterError(f"{self._path}: {parameters[0]}{more}. {remedy}")
        if self._compared:
            what = f"checksums of {self._compared} leaves ({size(self._bytes)}) are those saved"
        else:
            why = "no checksums were saved" if self._saved is None else "checksums not compared"
            what = f"{self._leaves} leaves ({size(self._bytes)}) are finite; {why}"
        _log.info("%s: %s; looked at in %.2f s", self._path, what, self._seconds)


class VerifiedReader:
    """A reader that checks every leaf which it reads whole onto the devices; parts that are read
    onto the host are not checked.
    """

    def __init__(self, reader: CheckpointReader, *, checksums: bool = True):
        self.reader = reader
        self.verification = Verification(reader, checksums=checksums)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reader, name)

    def read_sharded(self, name: str, sharding: jax.sharding.Sharding) -> jax.Array:
        """One leaf as a global array, checked."""
        leaf = self.reader.read_sharded(name, sharding)
        self.verification.check({name: leaf})
        return leaf


def check_finite(parameters: Mapping[str, jax.Array], *, where: str, remedy: str) -> None:
    """Raises a NonFiniteParameterError where parameters, by full path, hold NaN or infinite values:
    `where` says what they are of, `remedy` what to do.
    """
    for path, summary in device_summaries(parameters).items():
        if summary.nonfinite:
            text = not_finite(path, parameters[path], summary.nonfinite)
            raise NonFiniteParameterError(f"{where}: {text}. {remedy}")


def not_finite(path: str, leaf: jax.Array, count: int) -> str:
    """Says how many values of a leaf are not finite, and where the first is."""
    first = tuple(int(at) for at in jax.device_get(_first_not_finite(leaf)))
    what = "parameter" if path.startswith(TARGET) else "leaf"
    where = f", the first at {list(first)}" if first else ""
    return f"the {what} {path} has {count} NaN or infinite values of {leaf.size}{where}"


@jax.jit
def _first_not_finite(leaf: jax.Array) -> list[jax.Array]:
    """The index of the first such element in C order, one scalar per dimension."""
    mask, index = ~jnp.isfinite(leaf), []
    while mask.ndim:
        rows = jnp.any(mask, axis=tuple(range(1, mask.ndim)))
        index.append(jnp.argmax(rows))
        mask = jnp.take(mask, index[-1], axis=0)
    return index


def _json_object(path: epath.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(content, dict):
        raise _damaged(path, "it holds no JSON object")
    return content


def _damaged(path: epath.Path, why: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"{path} is damaged: {why}. {_REMEDY}")


def _custom_metadata(folder: epath.Path) -> dict[str, Any]:
    """The custom metadata of the checkpoint in a folder; empty where there is none."""
    path = folder / STEP_METADATA
    custom = (_json_object(path).get("custom_metadata") or {}) if path.exists() else {}
    if not isinstance(custom, dict):
        raise _damaged(path, "its custom_metadata is no object")
    return custom


def _digest_of_ours(metadata: Mapping[str, Any]) -> str:
    return _digest({key: metadata.get(key) for key in (METADATA_KEY, CHECKSUMS_KEY)})


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digests_of_files(folder: epath.Path) -> dict[str, str]:
    """sha256 of every file below a folder but `DIGESTS_FILE`, by name."""
    digests = {}
    for path in sorted(files_below(folder)):
        if path.name != DIGESTS_FILE:
            digest = hashlib.sha256()
            with path.open("rb") as stream:
                while part := stream.read(1 << 20):
                    digest.update(part)
            digests[str(path.relative_to(folder))] = digest.hexdigest()
    return digests

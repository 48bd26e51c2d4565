"""Where a new checkpoint may be written, and what may lie there already: checked before any work is
done.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from upcycle_jax import files
from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.formats import PARTIAL_SUFFIX
from upcycle_jax.checkpoints.ocdbt import DATA_FOLDERS, MANIFEST
from upcycle_jax.checkpoints.orbax_metadata import STATE_ITEM, STEP_METADATA, TREE_METADATA

IDENTITY, LOCK = "resume.json", ".lock"
COMMIT_MARK = "commit_success.txt"
REFERENCED = "referenced"
"""Folders of databases below the main one begin so; see `chunk_copy` and `repeated_rows`."""
PROBE_PREFIX = ".upcycle-probe-"
_TOP = frozenset(
    {IDENTITY, f".{IDENTITY}{files.SUFFIX}", LOCK, STATE_ITEM, STEP_METADATA, COMMIT_MARK}
)  # What the writer itself puts into a partial checkpoint.
_STATE = frozenset({TREE_METADATA, COMMIT_MARK})
_DATA_FILE = re.compile(r"[0-9a-f]{32}(\.__lock|\.tmp)?")


def checked_output(
    path: os.PathLike | str, sources: Iterable[os.PathLike | str] = (), *, setting: str = "output"
) -> Path:
    """The absolute path of a checkpoint that is to be written.

    Args:
      path: as the user gave it.
      sources: the checkpoints that are read for it, none of which may be changed.
      setting: what the user calls the path, for messages.

    Raises:
      ValueError: it is empty, no local path, holds characters that TensorStore's files cannot have,
        is a link that leads nowhere, or lies in a source (or a source in it).
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"{setting} is {path!r}: name a folder that does not exist yet, e.g."
            " '/data/sparse/checkpoint_1000000'"
        )
    if not storage.is_local(text):
        raise ValueError(
            f"{path}: a checkpoint is assembled on a local file system; write it there and copy it"
            " with gsutil or gcloud"
        )
    storage.check_characters(text)
    final = Path(storage.absolute(text))
    for place in (final, *final.parents):
        if place.is_symlink() and not place.exists():
            raise ValueError(
                f"{setting} {place} is a link to {os.readlink(place)}, which does not exist: remove"
                " the link or choose another path; nothing was changed"
            )
    real = Path(os.path.realpath(final))
    partial = real.with_name(real.name + PARTIAL_SUFFIX)
    for source in sources:
        if not storage.is_local(source):
            continue
        origin = Path(os.path.realpath(storage.absolute(source)))
        if origin in real.parents:
            raise ValueError(
                f"{setting} {final} lies inside the source {source}, which must not be changed:"
                " choose a path outside of it"
            )
        if real in origin.parents or partial in (origin, *origin.parents):
            raise ValueError(
                f"the source {source} lies inside the {setting} {final}: choose another path"
            )
    return final


def check_partial(partial: Path) -> None:
    """Refuses a partial checkpoint that holds what its writer never put there: it would become part
    of the result.

    Raises:
      ValueError: links or foreign files, which are named.
    """
    _refuse_no_folder(partial)
    _refuse_foreign(partial, _foreign(partial))


def check_unfinished(partial: Path, own: str) -> None:
    """Refuses to replace a folder of an interrupted call that holds other files than such a call
    writes.

    Args:
      partial: the folder; it may be missing.
      own: pattern of the names of those files.

    Raises:
      ValueError: links, folders or foreign files, which are named.
    """
    _refuse_no_folder(partial)
    names = re.compile(own)
    _refuse_foreign(
        partial,
        (
            path
            for path in _children(partial)
            if not names.fullmatch(path.name) or not _is_plain(path, folder=False)
        ),
    )


def _refuse_no_folder(partial: Path) -> None:
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise ValueError(
            f"{partial} is {'a link' if partial.is_symlink() else 'a file'}, no folder of an"
            " interrupted call: remove it and run again; nothing was changed"
        )


def _refuse_foreign(partial: Path, paths: Iterable[Path]) -> None:
    foreign = sorted(str(path.relative_to(partial)) for path in paths)
    if foreign:
        raise ValueError(
            f"{partial} holds {', '.join(foreign[:5])}{', ...' if len(foreign) > 5 else ''}, which"
            " no interrupted call left there: move it away and run again; nothing was changed"
        )


def _foreign(partial: Path) -> Iterator[Path]:
    for path in _children(partial):
        folder = path.name == STATE_ITEM
        if path.name not in _TOP or not _is_plain(path, folder=folder):
            yield path
        elif folder:
            yield from _foreign_in_database(path, referenced=True)


def _foreign_in_database(database: Path, *, referenced: bool) -> Iterator[Path]:
    """Whatever in a folder is neither the database's nor (where `referenced`) the tree's own."""
    for path in _children(database):
        if path.name in DATA_FOLDERS and _is_plain(path, folder=True):
            yield from (
                child
                for child in _children(path)
                # The names in a linked database are the source's.
                if (referenced and not _DATA_FILE.fullmatch(child.name))
                or not _is_plain(child, folder=False)
            )
        elif path.name.startswith(("ocdbt.process_", *([f"{REFERENCED}."] * referenced))):
            if not _is_plain(path, folder=True):
                yield path
            else:
                yield from _foreign_in_database(path, referenced=False)
        elif not (
            (path.name.startswith(MANIFEST) or (referenced and path.name in _STATE))
            and _is_plain(path, folder=False)
        ):
            yield path


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_plain(path: Path, *, folder: bool) -> bool:
    """A real folder or file: neither a link nor a device."""
    mode = path.lstat().st_mode
    return stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)


def read_identity(partial: Path) -> dict[str, Any] | None:
    """What an interrupted call wrote about itself; None where it did not come so far.

    Raises:
      ValueError: the file cannot be read.
    """
    path = partial / IDENTITY
    if not path.exists():
        return None
    try:
        begun = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(_damaged(path, error)) from None
    if not isinstance(begun, dict):
        raise ValueError(_damaged(path, f"it holds a {type(begun).__name__}"))
    return begun


def _damaged(path: Path, why: Any) -> str:
    return (
        f"{path} is damaged ({why}), so what was written so far cannot be continued: remove"
        f" {path.parent} and run again"
    )


def tidy_finished(path: Path) -> bool:
    """Removes what a kill right after the last rename leaves in a finished checkpoint; says whether
    there was anything.

    Nothing is touched while another process still finishes it.
    """
    leftovers = [path / name for name in (IDENTITY, LOCK) if (path / name).is_file()]
    if not leftovers or not (path / STATE_ITEM / TREE_METADATA).is_file():
        return False
    try:
        lock = try_lock(path / LOCK)
        if lock is None:
            return False
        with lock:
            for leftover in (path / IDENTITY, path / LOCK):
                leftover.unlink(missing_ok=True)
    except OSError:
        return False  # A folder that may only be read: they do no harm.
    return True


def try_lock(path: Path) -> Any:
    """The file, opened and locked until it is closed (or the process dies); None where another
    process holds it.

    Raises:
      OSError: it cannot be opened.
    """
    stream = open(path, "w")  # noqa: SIM115  (held until closed)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        return None
    except OSError:
        stream.close()
        raise
    return stream


@contextlib.contextmanager
def probe_folder(parent: Path) -> Iterator[Path]:
    """An empty folder in `parent` for trying what its file system can do, gone afterwards. Those of
    killed calls go first.

    A file beside the folder, locked while this call lives, is made before it and removed after it:
    at no moment is a folder of a living call without a lock, or would one of a dead call stay.

    Raises:
      OSError: `parent` cannot be written to.
    """
    _remove_dead_probes(parent)
    lock, name = _probe_lock(parent)
    folder = Path(name.removesuffix(LOCK))
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.unlink(name)
        os.close(lock)


def _probe_lock(parent: Path) -> tuple[int, str]:
    """A new file in `parent`, open and locked, and its name."""
    while True:
        lock, name = tempfile.mkstemp(prefix=PROBE_PREFIX, suffix=LOCK, dir=parent)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            os.unlink(name)
            os.close(lock)
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(name)):
                return lock, name
        os.close(lock)  # Another call removed it, as a dead one's, before it was locked.


def _remove_dead_probes(parent: Path) -> None:
    """Removes what killed calls left; what belongs to living ones is locked."""
    for path in parent.glob(f"{PROBE_PREFIX}*"):
        with contextlib.suppress(OSError):  # Another call may be removing it, too.
            if path.is_symlink() or path.is_dir() or not path.name.endswith(LOCK):
                continue
            if (lock := try_lock(path)) is not None:
                with lock:
                    shutil.rmtree(path.with_name(path.name.removesuffix(LOCK)), ignore_errors=True)
                    path.unlink()
    for path in parent.glob(f"{PROBE_PREFIX}*"):
        alone = not path.with_name(path.name + LOCK).exists()
        if alone and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)  # of an earlier version, locked otherwise

"""Where a lease is kept: a file on a local or shared file system, or an object in a bucket."""

import dataclasses
import errno
import fcntl
import os
import pathlib
import time
from typing import Protocol

from etils import epath

from upcycle_jax.files import write_whole

LOCAL_TYPES = frozenset(
    [
        *("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs"),
        *("reiserfs", "rootfs", "tmpfs", "xfs", "zfs"),
    ]
)
"""File systems that one kernel has to itself, so that its `flock` is every process's."""

SHARED_SETTLE_SECONDS = 2.0
BUCKET_SETTLE_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Stored:
    """A lease as it was read.

    Attributes:
      text: its content.
      stamp: changes with every renewal.
      renewed: seconds since the epoch of the last renewal, by the clock that wrote it.
    """

    text: str
    stamp: str
    renewed: float


class Place(Protocol):
    """What a lease asks of the storage.

    Attributes:
      name: for messages.
      exclusive: of several that create the lease at once, one succeeds.
      lock_decides: a lock that was got shows that no other process has it, on whatever machine.
      settle: seconds after which what several have written at once is what all of them read.
    """

    name: str
    exclusive: bool
    lock_decides: bool
    settle: float

    def lock(self) -> bool | None:
        """Takes the lock that ends with the process: True; False where another process has it, None
        where there are no locks.
        """

    def break_lock(self) -> None:
        """Puts a new lock in the place of one whose owner is known to be dead."""

    def unlock(self) -> None:
        """Lets go of the lock, if it is held, and leaves no trace of it, nor empty folders that
        were made for it.
        """

    def read(self) -> Stored | None:
        """The lease that is there."""

    def create(self, text: str) -> bool:
        """Writes the lease where there is none; False where there is one."""

    def replace(self, text: str) -> None:
        """Writes the lease over whatever is there."""

    def renew(self, text: str) -> None:
        """Gives the lease that is there, which must be the caller's, another stamp."""

    def remove(self) -> None:
        """Removes the lease."""


def place_of(file: os.PathLike | str) -> Place:
    """The place of a lease file; nothing is made or read."""
    return Bucket(file) if "://" in os.fspath(file) else FileSystem(file)


class FileSystem:
    """A file, renewed by its modification time: that needs no room on a full disk, and cannot
    overwrite what another process has written. Beside it lies a file to be locked.
    """

    exclusive = True

    def __init__(self, file: os.PathLike | str):
        self._file = pathlib.Path(os.path.abspath(file))
        self._lock_file = self._file.with_name(self._file.name + ".lock")
        self._descriptor: int | None = None
        self._made: list[pathlib.Path] = []
        self.name = str(self._file)
        self.lock_decides = file_system_type(self._file.parent) in LOCAL_TYPES
        self.settle = SHARED_SETTLE_SECONDS

    def lock(self) -> bool | None:
        self._make_folder()
        while True:
            descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Who let go of the lock has removed the file, perhaps after it was opened here.
                if os.fstat(descriptor).st_ino == os.stat(self._lock_file).st_ino:
                    self._descriptor = descriptor
                    return True
            except FileNotFoundError:
                pass
            except OSError as error:
                os.close(descriptor)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    return False
                return None
            os.close(descriptor)

    def break_lock(self) -> None:
        self._lock_file.unlink(missing_ok=True)
        self.lock()

    def unlock(self) -> None:
        if self._descriptor is not None:
            self._lock_file.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None
        self._remove_made()

    def read(self) -> Stored | None:
        try:
            with self._file.open("rb") as stream:
                stat, content = os.fstat(stream.fileno()), stream.read(1 << 16)
        except FileNotFoundError:
            return None
        return Stored(
            content.decode(errors="replace"), f"{stat.st_ino} {stat.st_mtime_ns}", stat.st_mtime
        )

    def create(self, text: str) -> bool:
        self._make_folder()
        try:
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w") as stream:
                stream.write(text)
        except OSError:
            self._file.unlink(missing_ok=True)
            raise
        return True

    def replace(self, text: str) -> None:
        write_whole(self._file, text, shared=True)

    def renew(self, text: str) -> None:
        os.utime(self._file)

    def remove(self) -> None:
        self._file.unlink(missing_ok=True)

    def _make_folder(self) -> None:
        missing = [
            folder
            for folder in (self._file.parent, *self._file.parent.parents)
            if not folder.exists()
        ]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._made = self._made or missing

    def _remove_made(self) -> None:
        """A start that failed before it wrote anything leaves no empty folder."""
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                return


class Bucket:
    """An object. Buckets as `epath` offers them have neither locks nor exclusive creation: who
    writes last holds the lease, and the others find out when they read it back.
    """

    exclusive = False
    lock_decides = False

    def __init__(self, file: os.PathLike | str):
        self._file = epath.Path(file)
        self.name = str(file)
        self.settle = BUCKET_SETTLE_SECONDS

    def lock(self) -> bool | None:
        return None

    def break_lock(self) -> None:
        pass

    def unlock(self) -> None:
        pass

    def read(self) -> Stored | None:
        try:
            text = self._file.read_text()
        except FileNotFoundError:
            return None
        text, _, renewed = text.partition("\n")
        try:
            return Stored(text, renewed, float(renewed))
        except ValueError:
            return Stored(text, renewed, 0.0)

    def create(self, text: str) -> bool:
        if self.read() is not None:
            return False
        self.replace(text)
        return True

    def replace(self, text: str) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(f"{text}\n{time.time():.6f}")

    def renew(self, text: str) -> None:
        self.replace(text)

    def remove(self) -> None:
        self._file.unlink(missing_ok=True)


def file_system_type(folder: pathlib.Path) -> str | None:
    """The type of the file system that a folder is on, or will be made on; None where this machine
    does not say.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists()).resolve()
    try:
        mounts = pathlib.Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return None
    found, longest = None, -1
    for line in mounts:
        fields, _, rest = line.partition(" - ")
        point = fields.split(" ")[4].encode().decode("unicode_escape", "replace")
        inside = point == "/" or existing.is_relative_to(point)
        if inside and len(point) >= longest:  # of two on one point the later one counts
            found, longest = rest.split(" ")[0], len(point)
    return found

"""Where prepared data lie on this machine: set once by a command, applied when data are opened."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class DataFolders:
    """Folders of prepared data.

    Attributes:
      tfds_data_dir: of prepared TFDS data sets (flag `--tfds_data_dir`), or None for TFDS's own.
      cache_dirs: of offline caches (flag `--seqio_additional_cache_dirs`).
    """

    tfds_data_dir: str | None = None
    cache_dirs: tuple[str, ...] = ()


_current = DataFolders()


def configure(*, tfds_data_dir: str | None = None, cache_dirs: Sequence[str] = ()) -> None:
    """Sets both for the tasks that this process builds from now on."""
    global _current
    _current = DataFolders(tfds_data_dir=tfds_data_dir or None, cache_dirs=tuple(cache_dirs))


def current() -> DataFolders:
    """What `configure` set last."""
    return _current

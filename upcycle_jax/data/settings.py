"""Where prepared data lie on this machine: set once by a command, applied when SeqIO is first used.
No TensorFlow.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Attributes: tfds_data_dir: folder of prepared TFDS data sets (flag `--tfds_data_dir`), or
    None for TFDS's own. cache_dirs: folders of SeqIO's offline caches (flag
    `--seqio_additional_cache_dirs`).
    """

    tfds_data_dir: str | None = None
    cache_dirs: tuple[str, ...] = ()


_current = [DataSettings()]


def configure(*, tfds_data_dir: str | None = None, cache_dirs: Sequence[str] = ()) -> None:
    """Sets both for the tasks that this process builds from now on."""
    _current.append(DataSettings(tfds_data_dir=tfds_data_dir or None, cache_dirs=tuple(cache_dirs)))


def current() -> DataSettings:
    """What `configure` set last."""
    return _current[-1]

"""What training streams have in common, wherever their batches come from: seed, position,
description, rows of a process. No TensorFlow.
"""

import abc
import importlib.metadata
import platform
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from upcycle_jax.data.config import DatasetConfig
from upcycle_jax.data.dataset import Dataset
from upcycle_jax.data.position import Position
from upcycle_jax.features import HostBatch


class Stream(abc.ABC):
    """A `BatchIterator`, but for its batches.

    Args:
      dataset: what is read.
      process_index: number of this process.
      process_count: processes that share each batch.

    Raises:
      ValueError: the batch does not divide by the processes, or they would draw a seed each.
    """

    def __init__(self, dataset: Dataset, *, process_index: int, process_count: int):
        config = dataset.config
        config.local_batch_size(process_count)
        if not 0 <= process_index < process_count:
            raise ValueError(
                f"process_index {process_index} is not below process_count {process_count}"
            )
        if config.seed is None and process_count > 1:
            raise ValueError(
                f"seed is None with {process_count} processes, which would each draw their own: set"
                " DatasetConfig.seed (RANDOM_SEED)"
            )
        self._dataset, self._config = dataset, config
        self._process_index, self._process_count = process_index, process_count
        self._seed = secrets.randbelow(2**31) if config.seed is None else config.seed
        self._batches = 0

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    @abc.abstractmethod
    def __next__(self) -> HostBatch:
        """The next batch."""

    @property
    def position(self) -> int:
        """Batches taken so far."""
        return self._batches

    @property
    def seed(self) -> int:
        """The seed in use: the configuration's, or the one drawn or restored where that is None."""
        return self._seed

    def fingerprint(self) -> dict[str, Any]:
        """See `Dataset.fingerprint`."""
        return self._dataset.fingerprint()

    def prepare(  # noqa: B027  Most streams have nothing to prepare.
        self, first_batch: int, num_batches: int
    ) -> None:
        """See `BatchIterator`: nothing, where batches are made faster than steps take them."""

    @abc.abstractmethod
    def _open(self) -> None:
        """Makes the stream of `self._seed`, at its beginning."""

    @abc.abstractmethod
    def _move(self, num_batches: int) -> None:
        """See `seek`."""

    def seek(self, num_batches: int) -> None:
        """Moves to just before batch `num_batches`: at once on cached data, by passing over batches
        on data read on the fly. Packed cached streams first plan the rows up to there, from lengths
        alone.

        Raises:
          ValueError: a negative position.
        """
        if num_batches < 0:
            raise ValueError(f"cannot seek to batch {num_batches}: give 0 or more")
        self._move(num_batches)

    def _write_position(
        self, directory: epath.PathLike, *, packing: Mapping[str, int] | None = None
    ) -> None:
        epath.Path(directory).mkdir(parents=True, exist_ok=True)
        Position(
            self._batches, self._seed, self.fingerprint(), self._process_count, packing=packing
        ).write(directory)

    def _read_position(self, directory: epath.PathLike) -> Position:
        """The position in `directory`, which is one of this stream; a seed that was drawn is taken
        over from there.

        Raises:
          FileNotFoundError: no position was saved there.
          ValueError: the position belongs to other data, another seed or another batch.
        """
        position = Position.read(directory)
        position.check(self.fingerprint(), directory)
        if position.seed != self._seed:
            self._seed = position.seed
            self._open()
        return position


def describe(
    config: DatasetConfig,
    *,
    tasks: Mapping[str, Any],
    vocabularies: Mapping[str, Any],
    packages: Sequence[str],
) -> dict[str, Any]:
    """What `Dataset.fingerprint` gives.

    Args:
      config: what is read.
      tasks: rate, source and steps of each task.
      vocabularies: what identifies each feature's vocabulary.
      packages: libraries whose versions are recorded.
    """
    return {
        "mixture_or_task": config.mixture_or_task_name,
        "tasks": dict(tasks),
        "split": config.split,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "shuffle": config.shuffle,
        "pack": config.pack,
        "use_cached": config.use_cached,
        "task_feature_lengths": dict(config.task_feature_lengths),
        "vocabularies": dict(vocabularies),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }


def eval_rows(
    config: DatasetConfig, *, num_batches: int | None, process_index: int, process_count: int
) -> slice:
    """This process's rows of each evaluation batch.

    Raises:
      ValueError: less than one batch is asked for, or the batch does not divide by the processes.
    """
    if num_batches is not None and num_batches < 1:
        raise ValueError(
            f"num_batches is {num_batches}: give at least 1, or None for the whole split"
        )
    local = config.local_batch_size(process_count)
    return slice(process_index * local, (process_index + 1) * local)

"""What reading data gives: batches to train on and to evaluate on. `opening.open_dataset` makes it
of a `DatasetConfig`; no TensorFlow.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

from etils import epath

from upcycle_jax.data.config import DatasetConfig
from upcycle_jax.features import HostBatch


@runtime_checkable
class BatchIterator(Protocol):
    """An infinite stream of batches whose n-th batch depends on the configuration, the seed and the
    process only.
    """

    def __iter__(self) -> Iterator[HostBatch]: ...

    def __next__(self) -> HostBatch: ...

    @property
    def position(self) -> int:
        """Batches taken so far."""
        ...

    def prepare(self, first_batch: int, num_batches: int) -> None:
        """Does beforehand what batches would wait for: images that are kept are decoded, with
        progress in the log. The batches are the same without it.

        Args:
          first_batch: that will be taken, as far as is known before the stream is placed there.
          num_batches: that will be taken.

        Raises:
          ValueError: data cannot be read.
        """
        ...

    def save(self, directory: epath.PathLike) -> None:
        """Writes the position: `position.json`, and on data read on the fly this process's tf.data
        iterator.
        """
        ...

    def restore(self, directory: epath.PathLike) -> None:
        """Continues where `save` was called."""
        ...

    def seek(self, num_batches: int) -> None:
        """Moves to just before batch number `num_batches` (counted from 0) of the stream."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What the stream is made of."""
        ...


class Dataset(Protocol):
    """The data of a `DatasetConfig` as batches of one model's features, wherever they are read
    from.
    """

    @property
    def config(self) -> DatasetConfig:
        """What is read."""
        ...

    def train_iterator(self, process_index: int = 0, process_count: int = 1) -> BatchIterator:
        """An infinite stream of this process's rows of each batch. Processes read disjoint
        documents.

        Raises:
          ValueError: the batch does not divide by the processes, the task or its split is unknown,
            or its data are unusable.
        """
        ...

    def eval_batches(
        self, num_batches: int | None = None, process_index: int = 0, process_count: int = 1
    ) -> dict[str, Callable[[], Iterator[HostBatch]]]:
        """For each task of the mixture that has the split: a function that starts a pass over its
        first `num_batches` batches.

        Each pass is the same. A split that is shorter than asked gives fewer batches; the last one
        is filled with zeros, which carry no loss weight. Every process gets the same number of
        batches, and its own rows of each. None: the whole split.

        Raises:
          ValueError: as `train_iterator`, or less than one batch is asked for.
        """
        ...

    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks of the mixture, sorted; the name itself for a single task."""
        ...

    def vocabulary_size(self) -> int:
        """The number of token ids, sentinels included: the least `vocab_size` of a model."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Tasks with the sha256 of their text, seed, lengths, vocabulary and versions; small and
        JSON-able.

        Two datasets with equal fingerprints (their 'versions' aside) give the same stream of
        batches.
        """
        ...

    def verify(self) -> int:
        """Reads the whole cache, where there is one, and compares checksums; returns bytes read.

        Raises:
          ValueError: a file is not what was written.
        """
        ...

"""Training streams of images, of one set or of a mixture: a batch depends on seed and number alone,
and some are made ahead.
"""

import os
import sys
from typing import Any, Protocol

import grain
import numpy as np
from etils import epath

from upcycle_jax.data.dataset import Dataset
from upcycle_jax.data.position import OtherStreamError
from upcycle_jax.data.stream import Stream
from upcycle_jax.features import HostBatch

_READ = grain.ReadOptions(num_threads=min(4, os.cpu_count() or 1), prefetch_buffer_size=4)
"""Threads that make batches, and batches made ahead."""
_SCALED_OTHERWISE = (
    "shorter_side is IMAGE_SHORTER_SIDE: a run goes on with the number that it began with, or with"
    " --gin.IMAGE_SHORTER_SIDE=None where that was None, as it was before there was 'auto'"
)


class Numbered(Dataset, Protocol):
    """A `Dataset` whose stream's examples are known by their numbers."""

    def numbered(self, numbers: np.ndarray, seed: int) -> HostBatch:
        """Examples of these numbers, int `[n]`, of the stream of a seed."""
        ...

    def hold_images(self, first: int, last: int, seed: int) -> None:
        """Decodes images that are kept; see `BatchIterator.prepare`.

        Args:
          first: number of the training stream from which on images are shown.
          last: one more than the last.
          seed: of the stream.
        """
        ...


class _Batches:
    """This process's rows of each batch: what grain's threads call."""

    def __init__(self, dataset: Numbered, *, seed: int, process_index: int, process_count: int):
        self._dataset, self._seed = dataset, seed
        self._local = dataset.config.local_batch_size(process_count)
        self._first_row = process_index * self._local

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: Any) -> HostBatch:
        first = int(number) * self._dataset.config.batch_size + self._first_row
        return self._dataset.numbered(np.arange(first, first + self._local), self._seed)


class ImageStream(Stream):
    """An endless stream of views.

    Args:
      dataset: what is read.
      process_index: number of this process.
      process_count: processes that share each batch.
    """

    def __init__(self, dataset: Numbered, *, process_index: int, process_count: int):
        super().__init__(dataset, process_index=process_index, process_count=process_count)
        self._images = dataset
        self._open()

    def __next__(self) -> HostBatch:
        batch: HostBatch = next(self._iterator)
        self._batches += 1
        return batch

    def _open(self) -> None:
        source: Any = _Batches(
            self._images,
            seed=self._seed,
            process_index=self._process_index,
            process_count=self._process_count,
        )
        self._iterator: Any = iter(grain.MapDataset.source(source).to_iter_dataset(_READ))
        self._move(0)

    def _move(self, num_batches: int) -> None:
        self._batches = num_batches
        self._iterator.set_state({"next_index": num_batches})

    def prepare(self, first_batch: int, num_batches: int) -> None:
        """See `BatchIterator`."""
        size = self._config.batch_size
        last = first_batch + num_batches
        self._images.hold_images(first_batch * size, last * size, self._seed)

    def save(self, directory: epath.PathLike) -> None:
        """See `BatchIterator`."""
        self._write_position(directory)

    def restore(self, directory: epath.PathLike) -> None:
        """See `BatchIterator`.

        Raises:
          FileNotFoundError: no position was saved there.
          ValueError: it belongs to other data, another seed or another batch.
        """
        try:
            position = self._read_position(directory)
        except OtherStreamError as error:
            if any("/shorter_side: " in difference for difference in error.differences):
                error.add_note(_SCALED_OTHERWISE)
            raise
        self._move(position.batches)

"""Batches from cached tasks through grain: the training stream, evaluation passes, the fingerprint.
Neither TensorFlow nor SeqIO.

The n-th global batch is a function of configuration and seed: examples are numbered through
mixture, epochs and shuffling by arithmetic, and a process reads its rows of it. So any position is
found at once, by any number of processes.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from etils import epath

from upcycle_jax.data import draws, packing, stream
from upcycle_jax.data.cache.format import CachedTask
from upcycle_jax.data.cache.lookup import CachedMixture
from upcycle_jax.data.cache.views import Draw, ExampleView, Tokens, View, open_view
from upcycle_jax.data.config import DatasetConfig
from upcycle_jax.features import FeatureConverter, HostBatch, token_features

_READ = grain.ReadOptions(num_threads=min(4, os.cpu_count() or 1), prefetch_buffer_size=8)
"""Threads that make batches, and batches made ahead."""
_NOISE_DRAW = 0x2071  # keeps the draws of noise apart from others


@dataclasses.dataclass(frozen=True)
class _Pointer:
    """An example of a mixture: the task's number, and which of its examples."""

    task: int
    draw: Draw


def _numbered(order: grain.MapDataset, task: int, count: int) -> grain.MapDataset:
    """An endless stream of places as pointers."""

    class Number(grain.transforms.MapWithIndex):
        def map_with_index(self, index: int, element: int) -> _Pointer:
            return _Pointer(task, Draw(place=int(element), epoch=index // count, number=index))

    return order.map_with_index(Number())


class _Examples:
    """The endless numbered examples of a mixture."""

    def __init__(self, dataset: "CachedDataset", seed: int):
        config = dataset.config
        self._names = token_features(dataset.features, config.task_feature_lengths)
        self._keys: list[int] = []
        self._views: list[View] = []
        orders: list[grain.MapDataset] = []
        rates: list[float] = []
        for task, rate in dataset.mixture.tasks_with(config.split):
            if rate <= 0:
                continue
            key = draws.bits(seed, draws.name_number(task.manifest.task))
            view = dataset.view(task, seed=int(key))
            order = grain.MapDataset.range(len(view))
            if config.shuffle:
                order = order.shuffle(seed=int(key % np.uint64(2**32)))
            orders.append(_numbered(order.repeat(), len(orders), len(view)))
            rates.append(rate)
            self._views.append(view)
            self._keys.append(int(draws.bits(key, _NOISE_DRAW)))
        self._pointers = (
            orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, weights=rates)
        )

    def take(self, numbers: Sequence[int]) -> list[Tokens]:
        """The examples of these numbers."""
        pointers = [self._pointers[number] for number in numbers]
        out: list[Tokens] = [{}] * len(pointers)
        for task, (view, key) in enumerate(zip(self._views, self._keys, strict=True)):
            rows = [row for row, pointer in enumerate(pointers) if pointer.task == task]
            if rows:
                examples = view.examples([pointers[row].draw for row in rows], key=key)
                for row, example in zip(rows, examples, strict=True):
                    out[row] = example
        return out

    def sizes(self, first: int, count: int) -> np.ndarray:
        """Tokens of each task feature of examples `first` and following, int64 `[count, F]`."""
        pointers = [self._pointers[number] for number in range(first, first + count)]
        tasks = np.array([pointer.task for pointer in pointers])
        places = np.array([pointer.draw.place for pointer in pointers])
        out = np.zeros((count, len(self._names)), np.int64)
        for task, view in enumerate(self._views):
            rows = np.flatnonzero(tasks == task)
            if len(rows):
                out[rows] = view.lengths(places[rows])
        return out


class _Batches:
    """This process's rows of each batch: what grain's threads call."""

    def __init__(
        self, dataset: "CachedDataset", *, seed: int, process_index: int, process_count: int
    ):
        config, features = dataset.config, dataset.features
        self._examples, self._features = _Examples(dataset, seed), features
        self._lengths = config.task_feature_lengths
        self._batch_size = config.batch_size
        self._local = config.local_batch_size(process_count)
        self._first_row = process_index * self._local
        self.plan: packing.PackingPlan | None = None
        if config.pack:
            self.plan = packing.PackingPlan(
                lambda first, count: features.row_usage(self._examples.sizes(first, count)),
                features.row_capacity(self._lengths),
            )

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: Any) -> HostBatch:
        first = int(number) * self._batch_size + self._first_row
        rows = range(first, first + self._local)
        if self.plan is None:
            return self._features.pad(self._examples.take(rows), self._lengths, self._local)
        held = [self.plan.row(row) for row in rows]
        # All at once, because a view makes the noise of many examples together.
        examples = iter(self._examples.take([number for row in held for number in row]))
        return self._features.pack([[next(examples) for _ in row] for row in held], self._lengths)


class CachedBatchIterator(stream.Stream):
    """A `BatchIterator` over cached tasks. `restore` and `seek` are one step, on any number of
    processes.
    """

    def __init__(self, dataset: "CachedDataset", *, process_index: int, process_count: int):
        super().__init__(dataset, process_index=process_index, process_count=process_count)
        self._cached = dataset
        self._open()

    def _open(self) -> None:
        self._source = _Batches(
            self._cached,
            seed=self._seed,
            process_index=self._process_index,
            process_count=self._process_count,
        )
        self._iterator: Any = iter(grain.MapDataset.source(self._source).to_iter_dataset(_READ))
        self._move(0)

    def _move(self, num_batches: int) -> None:
        self._batches = num_batches
        self._iterator.set_state({"next_index": num_batches})

    def __next__(self) -> HostBatch:
        batch = next(self._iterator)
        self._batches += 1
        return batch

    def save(self, directory: epath.PathLike) -> None:
        """Writes `position.json`; each process its own, in a folder of its own or the same content
        in one.
        """
        plan = self._source.plan
        anchor = None if plan is None else plan.anchor(self._batches * self._config.batch_size)
        self._write_position(directory, packing=anchor)

    def restore(self, directory: epath.PathLike) -> None:
        """Continues where `save` was called, on any number of processes. Raises as
        `Stream._read_position`.
        """
        position = self._read_position(directory)
        if self._source.plan is not None and position.packing is not None:
            # No thread reads ahead while the plan moves.
            self._iterator.set_state({"next_index": 0})
            self._source.plan.start_from(dict(position.packing))
        self._move(position.batches)


class _EvalPass:
    """Starts passes over one task's evaluation batches."""

    def __init__(
        self, dataset: "CachedDataset", task: CachedTask, num_batches: int | None, rows: slice
    ):
        self._config, self._features = dataset.config, dataset.features
        self._view, self._key = dataset.view(task), dataset.eval_key(task)
        self._rows = rows
        whole = -(-len(self._view) // self._config.batch_size)
        self._num_batches = whole if num_batches is None else min(whole, num_batches)

    def __call__(self) -> Iterator[HostBatch]:
        for batch in range(self._num_batches):
            yield self._batch(batch)

    def _batch(self, batch: int) -> HostBatch:
        size, lengths = self._config.batch_size, self._config.task_feature_lengths
        places = range(len(self._view))[batch * size : (batch + 1) * size][self._rows]
        drawn = [Draw(place, 0, place) for place in places]
        examples = self._view.examples(drawn, key=self._key) if drawn else []
        rows = self._rows.stop - self._rows.start
        if not self._config.pack:
            return self._features.pad(examples, lengths, rows)
        # One example a row, in the features of a packed batch; the missing rows hold none.
        missing: list[list[Tokens]] = [[]] * (rows - len(examples))
        return self._features.pack([[example] for example in examples] + missing, lengths)


@dataclasses.dataclass(frozen=True)
class CachedDataset:
    """A `Dataset` that is read from caches.

    Attributes:
      config: what is read.
      features: the model's converter.
      mixture: the caches.
    """

    config: DatasetConfig
    features: FeatureConverter
    mixture: CachedMixture

    def view(self, task: CachedTask, *, seed: int | None = None) -> View:
        """The examples of the split: of a training stream by its seed, else of one pass."""
        config, features = self.config, self.features
        return open_view(
            task,
            config.split,
            config.task_feature_lengths,
            (*token_features(features, config.task_feature_lengths), *features.annotations),
            one_pass=seed is None,
            seed=seed or 0,
        )

    def eval_key(self, task: CachedTask) -> int:
        """Seed of the noise of a pass."""
        name = draws.name_number(task.manifest.task)
        return int(draws.bits(self.config.seed or 0, name, _NOISE_DRAW))

    def train_iterator(self, process_index: int = 0, process_count: int = 1) -> CachedBatchIterator:
        """See `Dataset`."""
        return CachedBatchIterator(self, process_index=process_index, process_count=process_count)

    def eval_batches(
        self, num_batches: int | None = None, process_index: int = 0, process_count: int = 1
    ) -> dict[str, Callable[[], Iterator[HostBatch]]]:
        """See `Dataset`."""
        rows = stream.eval_rows(
            self.config,
            num_batches=num_batches,
            process_index=process_index,
            process_count=process_count,
        )
        return {
            task.manifest.task: _EvalPass(self, task, num_batches, rows)
            for task, _ in self.mixture.tasks_with(self.config.split)
        }

    def whole_examples(self, task: CachedTask) -> Iterator[dict[str, Any]]:
        """One pass over a task's split in the order of evaluation, each example with everything
        that the task keeps.
        """
        view, key = self.view(task), self.eval_key(task)
        for place in range(len(view)):
            if isinstance(view, ExampleView):
                yield view.whole(place)
            else:
                yield dict(view.examples([Draw(place, 0, place)], key=key)[0])

    def task_names(self) -> tuple[str, ...]:
        """See `Dataset`."""
        return tuple(task.manifest.task for task, _ in self.mixture.tasks)

    def vocabulary_size(self) -> int:
        """See `Dataset`."""
        return self.mixture.vocabulary_size

    def fingerprint(self) -> dict[str, Any]:
        """See `Dataset`: as for data read on the fly, with the digest of each cache as its
        source.
        """
        tasks: dict[str, Any] = {}
        vocabularies: dict[str, Any] = {}
        for task, rate in self.mixture.tasks:
            manifest = task.manifest
            tasks[manifest.task] = {
                "rate": rate,
                "source": {"cache": manifest.digest()},
                "steps": [dict(step) for step in manifest.steps],
            }
            vocabularies |= manifest.identity["vocabularies"]
        return stream.describe(
            self.config,
            tasks=tasks,
            vocabularies=vocabularies,
            packages=("grain", "array_record"),
        )

    def verify(self) -> int:
        """See `Dataset`."""
        return self.mixture.verify()

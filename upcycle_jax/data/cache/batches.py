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
from upcycle_jax.data.cache.views import INPUTS, TARGETS, Draw, ExampleView, Tokens, open_view
from upcycle_jax.data.dataset import DatasetConfig, HostBatch

_READ = grain.ReadOptions(
    num_threads=min(4, os.cpu_count() or 1), prefetch_buffer_size=8
)  # in batches
_NOISE_DRAW = 0x2071


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


class _Stream:
    """The endless numbered examples of a mixture."""

    def __init__(self, config: DatasetConfig, mixture: CachedMixture, seed: int):
        self._tasks = [(task, rate) for task, rate in mixture.tasks_with(config.split) if rate > 0]
        self._keys, self._views, orders = [], [], []
        for number, (task, _) in enumerate(self._tasks):
            key = draws.bits(seed, draws.name_number(task.manifest.task))
            view = open_view(task, config.split, config.task_feature_lengths, seed=int(key))
            order = grain.MapDataset.range(len(view))
            if config.shuffle:
                order = order.shuffle(seed=int(key % np.uint64(2**32)))
            orders.append(_numbered(order.repeat(), number, len(view)))
            self._views.append(view)
            self._keys.append(int(draws.bits(key, _NOISE_DRAW)))
        weights = [rate for _, rate in self._tasks]
        self._pointers = (
            orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, weights=weights)
        )

    def examples(self, numbers: Sequence[int]) -> list[Tokens]:
        """Examples of the stream."""
        pointers = [self._pointers[number] for number in numbers]
        out: list[Tokens] = [{}] * len(pointers)
        for task, (view, key) in enumerate(zip(self._views, self._keys, strict=True)):
            rows = [row for row, pointer in enumerate(pointers) if pointer.task == task]
            for row, example in zip(
                rows,
                view.examples([pointers[row].draw for row in rows], key=key) if rows else (),
                strict=True,
            ):
                out[row] = example
        return out

    def lengths(self, first: int, count: int) -> np.ndarray:
        """Tokens of inputs and targets of examples `first` and following, int64 `[count, 2]`."""
        pointers = [self._pointers[number] for number in range(first, first + count)]
        tasks, places = (
            np.array(column)
            for column in zip(
                *((pointer.task, pointer.draw.place) for pointer in pointers), strict=True
            )
        )
        out = np.zeros((count, 2), np.int64)
        for task, view in enumerate(self._views):
            rows = np.flatnonzero(tasks == task)
            if len(rows):
                out[rows] = view.lengths(places[rows])
        return out


class _Batches:
    """This process's rows of each batch: what grain's threads call."""

    def __init__(
        self,
        config: DatasetConfig,
        mixture: CachedMixture,
        *,
        seed: int,
        process_index: int,
        process_count: int,
    ):
        self._stream = _Stream(config, mixture, seed)
        self._lengths = (config.task_feature_lengths[INPUTS], config.task_feature_lengths[TARGETS])
        self._batch_size = config.batch_size
        self._local = config.local_batch_size(process_count)
        self._first_row = process_index * self._local
        self.plan = (
            packing.PackingPlan(self._stream.lengths, self._lengths) if config.pack else None
        )

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: Any) -> HostBatch:
        first = int(number) * self._batch_size + self._first_row
        rows = range(first, first + self._local)
        if self.plan is None:
            examples = self._stream.examples(rows)
            return packing.padded_rows(*_sides(examples), self._lengths, self._local)
        held = [self.plan.row(row) for row in rows]
        examples = self._stream.examples([number for row in held for number in row])
        split = iter(examples)
        sides = [_sides([next(split) for _ in row]) for row in held]
        return packing.packed_rows(
            [inputs for inputs, _ in sides], [targets for _, targets in sides], self._lengths
        )


def _sides(examples: Sequence[Tokens]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return [example[INPUTS] for example in examples], [example[TARGETS] for example in examples]


class CachedBatchIterator(stream.Stream):
    """A `BatchIterator` over cached tasks, in T5's features. `restore` and `seek` are one step, on
    any number of processes.
    """

    def __init__(
        self,
        config: DatasetConfig,
        mixture: CachedMixture,
        *,
        process_index: int,
        process_count: int,
    ):
        super().__init__(config, process_index=process_index, process_count=process_count)
        self._mixture = mixture
        self._open()

    def _open(self) -> None:
        self._source = _Batches(
            self._config,
            self._mixture,
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

    def fingerprint(self) -> dict[str, Any]:
        """See `DatasetConfig.fingerprint`."""
        return fingerprint(self._config, self._mixture)

    def save(self, directory: epath.PathLike) -> None:
        """Writes `position.json`; each process its own, in a folder of its own or the same content
        in one.
        """
        plan = self._source.plan
        self._write_position(
            directory,
            packing=(
                plan.anchor(self._batches * self._config.batch_size) if plan is not None else None
            ),
        )

    def restore(self, directory: epath.PathLike) -> None:
        """Continues where `save` was called, on any number of processes. Raises as
        `Stream._read_position`.
        """
        position = self._read_position(directory)
        if self._source.plan is not None and position.packing is not None:
            self._iterator.set_state(
                {"next_index": 0}
            )  # no thread reads ahead while the plan moves
            self._source.plan.start_from(dict(position.packing))
        self._move(position.batches)


def train_iterator(
    config: DatasetConfig, mixture: CachedMixture, *, process_index: int, process_count: int
) -> CachedBatchIterator:
    """See `DatasetConfig.train_iterator`."""
    return CachedBatchIterator(
        config, mixture, process_index=process_index, process_count=process_count
    )


class _EvalPass:
    """Starts passes over one task's evaluation batches."""

    def __init__(
        self, view: Any, key: int, config: DatasetConfig, num_batches: int | None, rows: slice
    ):
        self._view, self._key, self._config, self._rows = view, key, config, rows
        whole = -(-len(view) // config.batch_size)
        self._num_batches = whole if num_batches is None else min(whole, num_batches)

    def __call__(self) -> Iterator[HostBatch]:
        for batch in range(self._num_batches):
            yield self._batch(batch)

    def _batch(self, batch: int) -> HostBatch:
        size, lengths = self._config.batch_size, self._config.task_feature_lengths
        places = range(len(self._view))[batch * size : (batch + 1) * size][self._rows]
        examples = (
            self._view.examples([Draw(place, 0, place) for place in places], key=self._key)
            if len(places)
            else []
        )
        rows = self._rows.stop - self._rows.start
        if not self._config.pack:
            return packing.padded_rows(*_sides(examples), (lengths[INPUTS], lengths[TARGETS]), rows)
        inputs, targets = _sides(examples)
        missing: list[list[np.ndarray]] = [[]] * (rows - len(examples))
        return packing.packed_rows(
            [[tokens] for tokens in inputs] + missing,
            [[tokens] for tokens in targets] + missing,
            (lengths[INPUTS], lengths[TARGETS]),
        )


def eval_batches(
    config: DatasetConfig,
    mixture: CachedMixture,
    *,
    num_batches: int | None,
    process_index: int,
    process_count: int,
) -> dict[str, Callable[[], Iterator[HostBatch]]]:
    """See `DatasetConfig.eval_batches`. A packed configuration gets one example a row here, in the
    features of a packed batch.
    """
    rows = stream.eval_rows(
        config, num_batches=num_batches, process_index=process_index, process_count=process_count
    )
    passes: dict[str, Callable[[], Iterator[HostBatch]]] = {}
    for task, _ in mixture.tasks_with(config.split):
        view = open_view(task, config.split, config.task_feature_lengths, one_pass=True)
        passes[task.manifest.task] = _EvalPass(
            view, _eval_key(config, task), config, num_batches, rows
        )
    return passes


def whole_examples(config: DatasetConfig, task: CachedTask) -> Iterator[dict[str, Any]]:
    """One pass over a task's split in the order of evaluation, each example with everything that
    the task keeps.
    """
    view = open_view(task, config.split, config.task_feature_lengths, one_pass=True)
    key = _eval_key(config, task)
    for place in range(len(view)):
        yield (
            view.whole(place)
            if isinstance(view, ExampleView)
            else dict(view.examples([Draw(place, 0, place)], key=key)[0])
        )


def _eval_key(config: DatasetConfig, task: CachedTask) -> int:
    return int(draws.bits(config.seed or 0, draws.name_number(task.manifest.task), _NOISE_DRAW))


def fingerprint(config: DatasetConfig, mixture: CachedMixture) -> dict[str, Any]:
    """See `DatasetConfig.fingerprint`: as for data read on the fly, with the digest of each cache
    as its source.
    """
    tasks: dict[str, Any] = {}
    vocabularies: dict[str, Any] = {}
    for task, rate in mixture.tasks:
        manifest = task.manifest
        tasks[manifest.task] = {
            "rate": rate,
            "source": {"cache": manifest.digest()},
            "steps": [dict(step) for step in manifest.steps],
        }
        vocabularies |= manifest.identity["vocabularies"]
    return stream.describe(
        config, tasks=tasks, vocabularies=vocabularies, packages=("grain", "array_record")
    )

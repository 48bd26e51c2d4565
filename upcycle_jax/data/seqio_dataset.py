"""Batches from SeqIO: the training stream that can be saved and found again, and repeatable
evaluation passes.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from absl import logging
from etils import epath

from upcycle_jax.data import fingerprints, resolve, stream
from upcycle_jax.data.config import DatasetConfig
from upcycle_jax.data.plain_graphs import without_autograph
from upcycle_jax.data.tokenizer_vocabulary import TokenizerVocabulary
from upcycle_jax.features import DecoderOnlyFeatures, FeatureConverter, HostBatch, check_task
from upcycle_jax.features.names import TARGETS

_KEPT_EVAL_BYTES = 256 * 1024**2
"""Evaluation batches below this are kept in memory between passes."""
_SEEK_REPORT_SECONDS = 10.0
_PREFETCHED_BATCHES = 4


def _model_features(
    dataset: tf.data.Dataset, config: DatasetConfig, features: FeatureConverter
) -> tf.data.Dataset:
    converter = features.seqio_converter(pack=config.pack)
    return converter(dataset, task_feature_lengths=dict(config.task_feature_lengths))


def _with_options(dataset: tf.data.Dataset) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = True
    return dataset.with_options(options)


def _train_dataset(
    config: DatasetConfig,
    features: FeatureConverter,
    *,
    seed: int,
    process_index: int,
    process_count: int,
) -> tf.data.Dataset:
    provider = resolve.task_or_mixture(config)
    examples = provider.get_dataset(
        sequence_length=dict(config.task_feature_lengths),
        split=config.split,
        use_cached=config.use_cached,
        shuffle=config.shuffle,
        seed=seed,
        shard_info=seqio.ShardInfo(index=process_index, num_shards=process_count),
        num_epochs=None,
        # tf.data's memory cache would be written whole into each checkpoint
        try_in_mem_cache=False,
    )
    dataset = _model_features(examples, config, features)
    dataset = dataset.batch(config.local_batch_size(process_count), drop_remainder=True)
    return _with_options(dataset.prefetch(_PREFETCHED_BATCHES))


class SeqioBatchIterator(stream.Stream):
    """A `BatchIterator` over tf.data.

    Its checkpoint is tf.data's own, which continues exactly and at once. Where that cannot serve
    (another number of processes, an unreadable file, a task whose steps run Python and so have no
    state that TensorFlow can write), the stream starts again and passes over the batches already
    taken; with the same number of processes that gives the same continuation, only slower.
    """

    def __init__(self, dataset: "SeqioDataset", *, process_index: int, process_count: int):
        super().__init__(dataset, process_index=process_index, process_count=process_count)
        self._features = dataset.features
        self._position_alone = False
        self._open()

    def _open(self) -> None:
        dataset = without_autograph(
            functools.partial(
                _train_dataset,
                self._config,
                self._features,
                seed=self._seed,
                process_index=self._process_index,
                process_count=self._process_count,
            )
        )
        self._iterator = iter(dataset)
        self._batches = 0

    def __next__(self) -> HostBatch:
        return {name: tensor.numpy() for name, tensor in self._take().items()}

    def _take(self) -> dict[str, tf.Tensor]:
        try:
            batch = next(self._iterator)
        except StopIteration:
            raise ValueError(self._why_empty()) from None
        self._batches += 1
        return batch

    def _why_empty(self) -> str:
        """Says which part of a mixture gives no example: one empty part ends the whole mixture."""
        config, parts = self._config, resolve.tasks(self._config)
        lengths = dict(config.task_feature_lengths)
        empty = [task.name for task in parts if not _has_examples(task, config, self._seed)]
        if len(parts) > 1 and empty:
            return (
                f"{', '.join(map(repr, empty))} in '{config.mixture_or_task_name}' has no example"
                f" in the split '{config.split}' (lengths {lengths}): take it out of the mixture,"
                " or give it text"
            )
        return (
            f"'{config.mixture_or_task_name}' split '{config.split}' gives no example of the asked"
            f" lengths {lengths} to process {self._process_index}: give it more text or use fewer"
            " processes"
        )

    def _tf_path(self, directory: epath.PathLike) -> str:
        return str(
            epath.Path(directory) / f"train_ds-{self._process_index:03}-of-{self._process_count:03}"
        )

    def save(self, directory: epath.PathLike) -> None:
        """Writes this process's iterator and `position.json`, the same for all; checkpoints give
        each process a folder.
        """
        epath.Path(directory).mkdir(parents=True, exist_ok=True)
        if not self._position_alone:
            try:
                tf.train.Checkpoint(iterator=self._iterator).write(self._tf_path(directory))
            except tf.errors.FailedPreconditionError as error:
                self._position_alone = True
                logging.warning(
                    "TensorFlow cannot save the position in '%s', whose data come from Python"
                    " (%s). Checkpoints hold the number of batches alone: a resumed run reads"
                    " again what it has taken, which takes time and gives the same batches if the"
                    " Python code gives the same examples each time. Cache the task (`python -m"
                    " upcycle_jax.cache_tasks`) to resume at once.",
                    self._config.mixture_or_task_name,
                    str(error).partition("[Op:")[0].rpartition("}}")[2].strip(),
                )
        self._write_position(directory)

    def restore(self, directory: epath.PathLike) -> None:
        """Continues where `save` was called. Raises as `Stream._read_position`."""
        position = self._read_position(directory)
        if position.process_count == self._process_count and self._restore_tf(directory):
            self._batches = position.batches
            return
        if position.process_count != self._process_count:
            logging.warning(
                "The data position at %s was saved by %d processes and is continued by %d:"
                " documents are divided differently, so some may be seen again before the epoch"
                " ends.",
                directory,
                position.process_count,
                self._process_count,
            )
        self._open()
        self._move(position.batches)

    def _restore_tf(self, directory: epath.PathLike) -> bool:
        path = self._tf_path(directory)
        try:
            tf.train.Checkpoint(iterator=self._iterator).read(path).assert_consumed()
            return True
        except Exception as error:  # tf.data raises many types here, and each has the same remedy
            logging.warning(
                "The tf.data iterator at %s cannot be restored (%s). Passing over the batches taken"
                " instead.",
                path,
                error,
            )
            return False

    def _move(self, num_batches: int) -> None:
        if num_batches < self._batches:
            self._open()
        reported = time.monotonic()
        while self._batches < num_batches:
            self._take()
            if time.monotonic() - reported > _SEEK_REPORT_SECONDS:
                reported = time.monotonic()
                logging.info("Passing over batches of data: %d of %d", self._batches, num_batches)


def _has_examples(task: seqio.Task, config: DatasetConfig, seed: int) -> bool:
    """Whether one pass over the split gives any example of the asked lengths."""
    if config.split not in resolve.splits(task):
        return True
    examples = task.get_dataset(
        sequence_length=dict(config.task_feature_lengths),
        split=config.split,
        use_cached=config.use_cached,
        shuffle=False,
        seed=seed,
        num_epochs=1,
        try_in_mem_cache=False,
    )
    return next(iter(examples.take(1)), None) is not None


def _check_start(features: FeatureConverter, task: seqio.Task) -> None:
    """Warns where rows would begin with a token that no text of the tokenizer begins with."""
    if not isinstance(features, DecoderOnlyFeatures):
        return
    vocabulary = task.output_features[TARGETS].vocabulary
    if not isinstance(vocabulary, TokenizerVocabulary):
        return
    if not vocabulary.tokenizer.begins_texts(features.bos_id):
        logging.log_first_n(
            logging.WARNING,
            "DecoderOnlyFeatures.bos_id is %d, which is read before the first token of every text,"
            " but texts of the tokenizer %s begin with %s: set BOS_ID",
            1,
            features.bos_id,
            vocabulary.path,
            vocabulary.bos_id if vocabulary.bos_id is not None else "a special token",
        )


def _check_mixture(
    config: DatasetConfig, features: FeatureConverter, tasks: tuple[seqio.Task, ...]
) -> None:
    """Raises a ValueError where a task's features are not the model's, or rates are no rates.

    SeqIO takes a negative rate, and a rate that is computed may be None: both end far from here.
    """
    for task in tasks:
        lengths = config.task_feature_lengths
        check_task(features, lengths, task.output_features, what=f"the task '{task.name}'")
        _check_start(features, task)
    provider = resolve.task_or_mixture(config)
    if not isinstance(provider, seqio.Mixture):
        return
    rates = {}
    for task in tasks:
        try:
            rates[task.name] = float(provider.get_rate(task))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the mixing rate of '{task.name}' in '{config.mixture_or_task_name}' cannot be"
                f" computed ({error}): give a number"
            ) from error
    wrong = {name: rate for name, rate in rates.items() if not 0 <= rate < float("inf")}
    if wrong or not any(rates.values()):
        raise ValueError(
            f"the mixing rates of '{config.mixture_or_task_name}' are {wrong or rates}: give"
            " numbers of at least 0, one of them above 0"
        )


def _eval_dataset(
    task: seqio.Task, config: DatasetConfig, features: FeatureConverter
) -> tf.data.Dataset:
    """Whole batches of one pass over a task, the last one possibly shorter."""
    examples = task.get_dataset(
        sequence_length=dict(config.task_feature_lengths),
        split=config.split,
        use_cached=config.use_cached,
        shuffle=False,
        seed=config.seed or 0,
        num_epochs=1,
        try_in_mem_cache=False,
    )
    keys = [*config.task_feature_lengths]
    keys += [name for name in features.annotations if name in examples.element_spec]
    examples = examples.map(lambda example: {key: example[key] for key in keys})
    return _with_options(_model_features(examples, config, features).batch(config.batch_size))


def _fill(batch: Mapping[str, np.ndarray], rows: int) -> HostBatch:
    """Adds rows of zeros: padding tokens without loss weight."""
    return {
        name: np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1))
        for name, array in batch.items()
    }


class _EvalPass:
    """Starts passes over one task's evaluation batches; small ones are kept after the first."""

    def __init__(
        self, dataset: "SeqioDataset", task: seqio.Task, num_batches: int | None, rows: slice
    ):
        self._dataset, self._task = dataset, task
        self._num_batches, self._rows = num_batches, rows
        self._kept: list[HostBatch] | None = None

    def __call__(self) -> Iterator[HostBatch]:
        return iter(self._kept) if self._kept is not None else self._first_pass()

    def _first_pass(self) -> Iterator[HostBatch]:
        config = self._dataset.config
        build = functools.partial(_eval_dataset, self._task, config, self._dataset.features)
        batches = without_autograph(build)
        kept: list[HostBatch] | None = []
        held = 0
        for batch in batches.take(-1 if self._num_batches is None else self._num_batches):
            whole = _fill(
                {name: tensor.numpy() for name, tensor in batch.items()}, config.batch_size
            )
            mine = {name: array[self._rows] for name, array in whole.items()}
            held += sum(array.nbytes for array in mine.values())
            if kept is not None:
                kept = [*kept, mine] if held <= _KEPT_EVAL_BYTES else None
            yield mine
        self._kept = kept


@dataclasses.dataclass(frozen=True)
class SeqioDataset:
    """A `Dataset` that SeqIO reads, on the fly or from its own offline cache.

    Attributes:
      config: what is read.
      features: the model's converter.
    """

    config: DatasetConfig
    features: FeatureConverter

    def train_iterator(self, process_index: int = 0, process_count: int = 1) -> SeqioBatchIterator:
        """See `Dataset`."""
        resolve.tasks_with_split(self.config)
        _check_mixture(self.config, self.features, resolve.tasks(self.config))
        return SeqioBatchIterator(self, process_index=process_index, process_count=process_count)

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
        tasks = resolve.tasks_with_split(self.config)
        _check_mixture(self.config, self.features, tasks)
        return {task.name: _EvalPass(self, task, num_batches, rows) for task in tasks}

    def task_names(self) -> tuple[str, ...]:
        """See `Dataset`."""
        return tuple(task.name for task in resolve.tasks(self.config))

    def vocabulary_size(self) -> int:
        """See `Dataset`."""
        features = resolve.task_or_mixture(
            dataclasses.replace(self.config, use_cached=False)
        ).output_features
        return max(int(feature.vocabulary.vocab_size) for feature in features.values())

    def fingerprint(self) -> dict[str, Any]:
        """See `Dataset`."""
        provider = resolve.task_or_mixture(self.config)
        tasks = {}
        for task in resolve.tasks(self.config):
            rate = provider.get_rate(task) if isinstance(provider, seqio.Mixture) else 1.0
            tasks[task.name] = {
                "rate": rate,
                "source": fingerprints.source(task.source),
                "steps": fingerprints.preprocessors(task),
            }
        vocabularies = {
            name: fingerprints.vocabulary(feature.vocabulary)
            for name, feature in provider.output_features.items()
        }
        return stream.describe(
            self.config,
            tasks=tasks,
            vocabularies=vocabularies,
            packages=("tensorflow", "seqio"),
        )

    def verify(self) -> int:
        """See `Dataset`: there is no cache of this library's to read."""
        return 0

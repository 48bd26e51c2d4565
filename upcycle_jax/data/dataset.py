"""What a run reads, as configuration; and the iterator of batches that it becomes. TensorFlow is
imported by the methods only.
"""

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

import numpy as np
from etils import epath

from upcycle_jax import checks
from upcycle_jax.data import fingerprints
from upcycle_jax.data.text import documents
from upcycle_jax.data.text import files as text_files

if TYPE_CHECKING:
    from upcycle_jax.data.cache.lookup import CachedMixture

POSITION_FILE = "position.json"

OBJECTIVE_NAMES = ("span_corruption", "prefix_lm", "ul2")

HostBatch = dict[str, np.ndarray]
"""Model features by SeqIO name, int32 `[rows of this process, length]`."""

TextFiles = str | Sequence[str] | Mapping[str, str | Sequence[str]]


class DamagedPositionError(ValueError):
    """A saved data position cannot be read."""


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a stream of batches stands, and which stream it is.

    Attributes:
      batches: batches taken so far.
      seed: seed of the stream.
      fingerprint: what the stream is made of (`DatasetConfig.fingerprint`).
      process_count: processes that share each batch; on data read on the fly, the division of
        documents among them depends on it.
      packing: of a packed stream from a cache, where the plan of rows stands
        (`packing.PackingPlan.anchor`).
    """

    batches: int
    seed: int
    fingerprint: Mapping[str, Any]
    process_count: int
    packing: Mapping[str, int] | None = None

    def write(self, directory: epath.PathLike) -> None:
        """Writes `position.json`."""
        (epath.Path(directory) / POSITION_FILE).write_text(
            json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)
        )

    @classmethod
    def read(cls, directory: epath.PathLike) -> "Position":
        """Reads `position.json`.

        Raises:
          FileNotFoundError: the checkpoint holds no data position.
          DamagedPositionError: the file is damaged.
        """
        path = epath.Path(directory) / POSITION_FILE
        if not path.exists():
            raise FileNotFoundError(
                f"no data position at {path}: the checkpoint was saved without its data set; seek"
                " to its step instead"
            )
        try:
            position = cls(**json.loads(path.read_text()))
            position._check_types()
        except (TypeError, ValueError, RecursionError) as error:
            raise DamagedPositionError(
                f"the data position {path} is damaged ({error}): remove the file and seek to the"
                " checkpoint's step"
            ) from error
        return position

    def _check_types(self) -> None:
        """Raises a ValueError where a file holds something else than `write` has written."""
        for name, least in (("batches", 0), ("seed", None), ("process_count", 1)):
            value = getattr(self, name)
            if type(value) is not int or (least is not None and value < least):
                raise ValueError(f"{name} is {value!r}")
        if not isinstance(self.fingerprint, Mapping):
            raise ValueError(f"fingerprint is {self.fingerprint!r}")
        packing = self.packing
        whole = isinstance(packing, Mapping) and {"window", "first_row"} <= packing.keys()
        if packing is not None and not (
            whole and all(type(value) is int and value >= 0 for value in packing.values())
        ):
            raise ValueError(f"packing is {packing!r}")

    def check(self, current: Mapping[str, Any], directory: epath.PathLike) -> None:
        """Raises a ValueError that lists the differences where the position is not of the stream
        whose fingerprint is `current`.
        """
        differences = fingerprints.differences(self.fingerprint, current)
        if differences:
            listed = "\n".join(f"  {difference}" for difference in differences)
            raise ValueError(
                f"the data position at {directory} belongs to another stream of"
                f" batches:\n{listed}\nRestore the former data and settings, or start from the"
                " checkpoint in a new MODEL_DIR"
            )


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


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """A SeqIO task or mixture, and how it becomes batches. Field names are T5X's where T5X has
    them.

    Attributes:
      mixture_or_task_name: registered name; with `text_files`, the name under which those are
        registered.
      task_feature_lengths: tokens of 'inputs' and 'targets'. Span corruption of n input tokens
        needs about 0.22 n target tokens; a value that is too small is refused with the one that
        fits.
      split: 'train', 'validation' or any split of the task.
      batch_size: examples of a whole batch, over all processes.
      shuffle: in a pseudo-random order, new in each epoch. Off: the task's order.
      seed: fixes order, mixing and noise. None: drawn anew by each training stream, and recorded in
        its checkpoints; for one process only.
      use_cached: read the tokenised examples that `python -m upcycle_jax.cache_tasks` wrote
        (without TensorFlow), or else SeqIO's offline cache of the task; both are looked for in the
        folders of `--seqio_additional_cache_dirs`.
      pack: several examples in one row, with segment ids and positions. Denoising tasks fill their
        rows already; packing serves tasks of short examples.
      module: Python module or modules to import first, which register the task. Shipped tasks are
        found without it.
      text_files: your own text instead of a registered task: {'domain': ['pattern', ...]} or a list
        of patterns. `.txt` (and any other text), `.jsonl`, `.parquet`, and the first two with
        `.gz`. One task per domain named '<name>_<domain>', mixed at equal rates.
      objective: what is learnt from text files: 'span_corruption', 'prefix_lm' or 'ul2'.
      text_field: field of `.jsonl` records and column of `.parquet` files that holds the text.
      validation_fraction: part of the user's own text that is held out as the split 'validation'.
      vocabulary: 'bytes', or the path of a SentencePiece model. None: the task's own, which for
        text files is 'bytes'.
      extra_ids: sentinels that `vocabulary` gets; T5 uses 100.
    """

    mixture_or_task_name: str
    task_feature_lengths: Annotated[
        Mapping[str, checks.Size], checks.Hint("{'inputs': 512, 'targets': 114}")
    ]
    split: str = documents.TRAIN
    batch_size: checks.Size = 32
    shuffle: bool = True
    seed: checks.Seed | None = None
    use_cached: bool = False
    pack: bool = False
    module: str | Sequence[str] | None = None
    text_files: TextFiles | None = None
    objective: str = "span_corruption"
    text_field: str = "text"
    validation_fraction: float = documents.VALIDATION_FRACTION
    vocabulary: str | None = None
    extra_ids: checks.CountOrZero = 100

    def __post_init__(self):
        checks.check_fields(self)
        if not self.mixture_or_task_name or not isinstance(self.mixture_or_task_name, str):
            raise ValueError(
                f"mixture_or_task_name is {self.mixture_or_task_name!r}: give the name of a SeqIO"
                " task or mixture"
            )
        for feature in ("inputs", "targets"):
            length = self.task_feature_lengths.get(feature)
            if not isinstance(length, int) or length < 1:
                raise ValueError(
                    f"task_feature_lengths is {dict(self.task_feature_lengths)}: it needs a length"
                    f" of at least 1 for '{feature}', for example {{'inputs': 512, 'targets': 114}}"
                )
        if not 0.0 < self.validation_fraction < 1.0:
            raise ValueError(
                f"validation_fraction is {self.validation_fraction}: give a value above 0 and"
                " below 1"
            )
        if self.objective not in OBJECTIVE_NAMES:
            raise ValueError(f"objective is {self.objective!r}: choose one of {OBJECTIVE_NAMES}")
        if self.text_files is not None:
            text_files.normalise(self.text_files)

    def cache(self) -> "CachedMixture | None":
        """The caches of `python -m upcycle_jax.cache_tasks` to read; None where the data come
        through SeqIO.

        Raises:
          FileNotFoundError, ValueError: `use_cached` is set and there is no cache, or none that
            fits; with the command that makes it.
        """
        if not self.use_cached:
            return None
        from upcycle_jax.data.cache import lookup

        return lookup.find(self)

    def verify(self) -> int:
        """Reads the whole cache, where there is one, and compares checksums; returns bytes read.

        Raises:
          ValueError, FileNotFoundError: as `cache`; or a file is not what was written.
        """
        cache = self.cache()
        return 0 if cache is None else cache.verify()

    def _through_seqio(self, module: str) -> Any:
        """A module of this room that imports TensorFlow and SeqIO."""
        try:
            return importlib.import_module(f"upcycle_jax.data.{module}")
        except ModuleNotFoundError as error:
            if error.name not in ("tensorflow", "seqio", "tensorflow_datasets"):
                raise
            from upcycle_jax.data.cache import lookup

            raise ValueError(
                f"'{self.mixture_or_task_name}' is read through SeqIO, which is not installed"
                f" ({error}): pip install seqio, or cache the task where it is installed"
                f" (`{lookup.command(self)}`) and set USE_CACHED_TASKS"
            ) from error

    def train_iterator(self, process_index: int = 0, process_count: int = 1) -> BatchIterator:
        """An infinite stream of this process's rows of each batch. Processes read disjoint
        documents.

        Raises:
          ValueError: the batch does not divide by the processes, the task or its split is unknown,
            or its data are unusable.
          FileNotFoundError: `use_cached` is set and there is no cache; with the command that makes
            it.
        """
        cache = self.cache()
        if cache is not None:
            from upcycle_jax.data.cache import batches

            return batches.train_iterator(
                self, cache, process_index=process_index, process_count=process_count
            )
        return self._through_seqio("seqio_source").train_iterator(
            self, process_index=process_index, process_count=process_count
        )

    def eval_batches(
        self, num_batches: int | None = None, process_index: int = 0, process_count: int = 1
    ) -> dict[str, Callable[[], Iterator[HostBatch]]]:
        """For each task of the mixture that has the split: a function that starts a pass over its
        first `num_batches` batches.

        Each pass is the same. A split that is shorter than asked gives fewer batches; the last one
        is filled with zeros, which carry no loss weight. Every process gets the same number of
        batches, and its own rows of each. None: the whole split.

        Raises:
          ValueError, FileNotFoundError: as `train_iterator`.
        """
        cache = self.cache()
        if cache is not None:
            from upcycle_jax.data.cache import batches

            return batches.eval_batches(
                self, cache, num_batches=num_batches, process_index=process_index, process_count=process_count
            )  # fmt: skip
        return self._through_seqio("seqio_source").eval_batches(
            self, num_batches=num_batches, process_index=process_index, process_count=process_count
        )

    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks of the mixture, sorted; the name itself for a single task."""
        cache = self.cache()
        if cache is not None:
            return tuple(task.manifest.task for task, _ in cache.tasks)
        return self._through_seqio("resolve").task_names(self)

    def vocabularies(self) -> dict[str, Any]:
        """The seqio.Vocabulary of 'inputs' and 'targets'."""
        return self._through_seqio("resolve").vocabularies(
            dataclasses.replace(self, use_cached=False)
        )

    def vocabulary_size(self) -> int:
        """The number of token ids, sentinels included: the least `vocab_size` of a model."""
        cache = self.cache()
        if cache is not None:
            return cache.vocabulary_size
        return max(int(vocabulary.vocab_size) for vocabulary in self.vocabularies().values())

    def fingerprint(self) -> dict[str, Any]:
        """Tasks with the sha256 of their text, seed, lengths, vocabulary and versions; small and
        JSON-able.

        Two configurations with equal fingerprints (their 'versions' aside) give the same stream of
        batches.
        """
        cache = self.cache()
        if cache is not None:
            from upcycle_jax.data.cache import batches

            return batches.fingerprint(self, cache)
        return self._through_seqio("seqio_source").fingerprint(self)

    def local_batch_size(self, process_count: int) -> int:
        """Rows of each process.

        Raises:
          ValueError: the batch does not divide by the processes.
        """
        if process_count < 1 or self.batch_size % process_count:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide by {process_count} processes: choose"
                f" a multiple of {process_count}"
            )
        return self.batch_size // process_count

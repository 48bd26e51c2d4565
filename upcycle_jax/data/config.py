"""What a run reads, as configuration; `opening.open_dataset` makes batches of it. No TensorFlow."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from upcycle_jax import checks
from upcycle_jax.data.text import documents
from upcycle_jax.data.text import files as text_files

LANGUAGE_MODELING = "language_modeling"
OBJECTIVE_NAMES = ("span_corruption", "prefix_lm", "ul2", LANGUAGE_MODELING)

TextFiles = str | Sequence[str] | Mapping[str, str | Sequence[str]]


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """A SeqIO task or mixture, and how it becomes batches. Field names are T5X's where T5X has
    them.

    Attributes:
      mixture_or_task_name: registered name; with `text_files`, the name under which those are
        registered.
      task_feature_lengths: tokens of each task feature that the model takes, of an
        encoder-decoder 'inputs' and 'targets', of a decoder-only model 'targets', with 'inputs'
        where the task has them. Span corruption of n input tokens needs about 0.22 n
        target tokens; a value that is too small is refused with the one that fits.
      split: 'train', 'validation' or any split of the task.
      batch_size: examples of a whole batch, over all processes.
      shuffle: in a pseudo-random order, new in each epoch. Off: the task's order.
      seed: fixes order, mixing and noise. None: each training stream draws one, and recorded in
        its checkpoints; for one process only.
      use_cached: read the tokenised examples that `python -m upcycle_jax.cache_tasks` wrote
        (without TensorFlow), or else SeqIO's offline cache of the task; both are looked for in the
        folders of `--seqio_additional_cache_dirs`.
      pack: several examples in one row, with segment ids and positions. Denoising tasks fill their
        rows already, and so does language modelling; packing serves tasks of short examples.
      module: Python module or modules to import first, which register the task. Shipped tasks are
        found without it.
      text_files: your own text instead of a registered task: {'domain': ['pattern', ...]} or a list
        of patterns. `.txt` (and any other text), `.jsonl`, `.parquet`, and the first two with
        `.gz`. One task per domain named '<name>_<domain>', mixed at equal rates.
      objective: what is learnt from text files: 'span_corruption', 'prefix_lm' or 'ul2' by an
        encoder-decoder, 'language_modeling' by a decoder-only model.
      text_field: field of `.jsonl` records and column of `.parquet` files that holds the text.
      validation_fraction: part of the user's own text that is held out as the split 'validation'.
      vocabulary: 'bytes', the folder of a Hugging Face tokenizer (or its tokenizer.json), or the
        path of a SentencePiece model. None: the task's own, which for text files is 'bytes'.
      extra_ids: sentinels that `vocabulary` gets; T5 uses 100, a Hugging Face tokenizer has none.
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

    has_task_metrics: ClassVar[bool] = True
    """Whether tasks may have metrics of their own, of what a model predicts or scores. Where they
    cannot, they are evaluated by their targets alone.
    """

    def __post_init__(self) -> None:
        checks.check_fields(self)
        if not self.mixture_or_task_name or not isinstance(self.mixture_or_task_name, str):
            raise ValueError(
                f"mixture_or_task_name is {self.mixture_or_task_name!r}: give the name of a SeqIO"
                " task or mixture"
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

    @property
    def modules(self) -> tuple[str, ...]:
        """The Python modules to import first."""
        return (self.module,) if isinstance(self.module, str) else tuple(self.module or ())

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

"""What is put to a model besides an example as it stands: answers to choose from, and solved
examples in front.

Where the answers that a task allows come from (`options`), first that applies:
  1. what the caller gives, for all tasks or by task name;
  2. the example's own feature `options`: a vector of strings that the task keeps beside `inputs`
     and `targets`, for tasks whose choices differ from example to example;
  3. the task's label classes: `label_classes` of its post-processor,
     `functools.partial(post_processor, label_classes=[...])`, as T5's classification tasks have it
     (`t5.data.postprocessors.string_label_to_class_id`).
"""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from upcycle_jax import checks

if TYPE_CHECKING:
    import seqio

    from upcycle_jax.data.config import DatasetConfig

Options = Sequence[str] | Mapping[str, Sequence[str]]
"""Answers to choose from: for all tasks, or by task name."""

OPTIONS, LABEL_CLASSES = "options", "label_classes"
INPUTS, TARGETS = "inputs", "targets"
"""Features of a task that solved examples are made of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShot:
    """Solved examples in front of each input.

    The same ones, in the same order, stand before every input of a task: they are drawn once from
    the first `pool` examples of `split`, by seed and task name. An input that has no room for all
    of them loses whole ones, the first ones first.

    Attributes:
      num_shots: k.
      split: where they are taken from.
      seed: of the draw.
      pool: examples of the split to draw from, its first ones.
      template: one solved example; `{inputs}` and `{targets}` are its texts.
      separator: between solved examples, and before the input.
      query: the input itself; `{inputs}` is its text.

    Raises:
      ValueError: a number out of range, or a template without its texts.
    """

    num_shots: checks.Size = 4
    split: str = "train"
    seed: checks.Seed = 0
    pool: checks.Count = 1000
    template: str = "{inputs} {targets}"
    separator: str = "\n\n"
    query: str = "{inputs}"

    def __post_init__(self) -> None:
        checks.check_fields(self)
        if self.pool < self.num_shots:
            raise ValueError(
                f"FewShot.pool is {self.pool}, below num_shots {self.num_shots}: raise it"
            )
        if (
            "{inputs}" not in self.template
            or "{targets}" not in self.template
            or "{inputs}" not in self.query
        ):
            raise ValueError(
                f"FewShot.template is {self.template!r} and .query {self.query!r}: the template"
                " needs {inputs} and {targets}, the query {inputs}"
            )


def find_options(
    task: "seqio.Task", example: Mapping[str, Any], given: Options | None = None
) -> Any:
    """The answers as they were given, or None where they are not known."""
    found: Any = given.get(task.name) if isinstance(given, Mapping) else given
    if found is None:
        found = example.get(OPTIONS)
    if found is None and isinstance(task.postprocessor, functools.partial):
        found = task.postprocessor.keywords.get(LABEL_CLASSES)
    return found


def options(
    task: "seqio.Task", example: Mapping[str, Any], given: Options | None = None
) -> tuple[str, ...]:
    """The answers that an example allows, in order.

    Raises:
      ValueError: they are not known, or there are fewer than two, or two are equal.
    """
    found = find_options(task, example, given)
    if found is None:
        raise ValueError(
            f"the task '{task.name}' does not say which answers it allows: give them (RANK_OPTIONS"
            f" = {{'{task.name}': ('yes', 'no')}}), keep a feature '{OPTIONS}' in its examples, or"
            f" bind {LABEL_CLASSES} in its post-processor"
        )
    texts = tuple(
        text.decode("utf-8") if isinstance(text, bytes) else str(text)
        for text in np.asarray(found, dtype=object).ravel()
    )
    if len(texts) < 2 or len(set(texts)) < len(texts):
        raise ValueError(
            f"the answers that the task '{task.name}' allows are {texts}: there must be at least"
            " two different ones"
        )
    return texts


def end_id(vocabulary: "seqio.Vocabulary") -> int:
    """The id that ends a target: EOS, which is 1 where a vocabulary does not say.

    Raises:
      ValueError: a Hugging Face tokenizer states no EOS; 1 is a token of its own there.
    """
    from upcycle_jax.data.tokenizer_vocabulary import TokenizerVocabulary

    if vocabulary.eos_id is None and isinstance(vocabulary, TokenizerVocabulary):
        raise ValueError(
            f"the vocabulary {vocabulary} states no EOS, which ends predictions: add 'eos_token' to"
            " its tokenizer_config.json"
        )
    return 1 if vocabulary.eos_id is None else int(vocabulary.eos_id)


def end_ids(vocabulary: "seqio.Vocabulary") -> tuple[int, ...]:
    """All ids that end a prediction: first that of `end_id`, then those at which a Hugging Face
    tokenizer's folder tells generation to stop.

    Raises:
      ValueError: see `end_id`.
    """
    from upcycle_jax.data.tokenizer_vocabulary import TokenizerVocabulary

    more = vocabulary.tokenizer.stop_ids if isinstance(vocabulary, TokenizerVocabulary) else ()
    return tuple(dict.fromkeys((end_id(vocabulary), *more)))


def without_padding(vocabulary: "seqio.Vocabulary", ids: np.ndarray) -> np.ndarray:
    """Ids without the zeros at their end, where 0 is padding and no token."""
    return np.trim_zeros(ids, "b") if vocabulary.pad_id == 0 else ids


def tokens(feature: "seqio.Feature", text: str, *, ends: bool) -> np.ndarray:
    """Int32 ids of a text, with EOS where `ends`."""
    end = [end_id(feature.vocabulary)] if ends else []
    return np.asarray([*feature.vocabulary.encode(text), *end], np.int32)


class Shots:
    """The solved examples of one task, and inputs with them in front.

    Args:
      settings: how many, from where, and how they look.
      task: the SeqIO task.
      config: lengths, and the seed that the task's own steps draw with.

    Raises:
      ValueError: the task has no inputs or targets, the split is not there, or it has too few
        examples.
    """

    def __init__(self, settings: FewShot, task: "seqio.Task", config: "DatasetConfig"):
        self._settings = settings
        self._feature, _ = (
            feature_of(task, name, needed_by="FewShot") for name in (INPUTS, TARGETS)
        )
        if INPUTS not in config.task_feature_lengths:
            raise ValueError(
                f"task_feature_lengths is {dict(config.task_feature_lengths)}: FewShot needs a"
                f" length for '{INPUTS}', in front of which solved examples stand"
            )
        self._length = config.task_feature_lengths[INPUTS]
        pool = list(itertools.islice(_texts(task, settings.split), settings.pool))
        if len(pool) < settings.num_shots:
            raise ValueError(
                f"FewShot.num_shots is {settings.num_shots}, but the split '{settings.split}' of"
                f" the task '{task.name}' has {len(pool)} examples"
            )
        # The task's name takes part, so that the tasks of a mixture draw independently, whatever
        # their order.
        draw = np.random.default_rng((settings.seed, zlib.crc32(task.name.encode())))
        chosen = draw.choice(len(pool), settings.num_shots, replace=False)
        self.texts = tuple(
            settings.template.format(inputs=pool[i][0], targets=pool[i][1]) for i in chosen
        )

    def before(self, text: str, *, ends: bool) -> tuple[np.ndarray, str, int]:
        """Tokens and text of an input with solved examples in front, and how many there are.

        Without room for even one, the input stands alone, and batches cut it where it is too long,
        as they do without `FewShot`.
        """
        query = self._settings.query.format(inputs=text)
        for dropped in range(len(self.texts) + 1):
            prompt = self._settings.separator.join((*self.texts[dropped:], query))
            ids = tokens(self._feature, prompt, ends=ends)
            if len(ids) <= self._length:
                break
        return ids, prompt, len(self.texts) - dropped


def _texts(task: "seqio.Task", split: str) -> Iterator[tuple[str, str]]:
    """Input and target text of every example of a split, in the task's order."""
    import tensorflow_datasets as tfds

    splits = [str(name) for name in task.splits]
    if split not in splits:
        raise ValueError(
            f"FewShot.split is {split!r}, but the task '{task.name}' has the splits {splits}"
        )
    dataset = task.get_dataset(
        sequence_length=None,
        split=split,
        use_cached=False,
        shuffle=False,
        num_epochs=1,
        try_in_mem_cache=False,
    )
    for example in tfds.as_numpy(dataset):
        yield text_of(task, example, INPUTS), text_of(task, example, TARGETS)


def feature_of(task: "seqio.Task", name: str, *, needed_by: str) -> "seqio.Feature":
    """A feature of a task.

    Raises:
      ValueError: the task has none of that name.
    """
    if name not in task.output_features:
        raise ValueError(
            f"the task '{task.name}' has no feature '{name}', which {needed_by} needs: it has"
            f" {sorted(task.output_features)}"
        )
    return task.output_features[name]


def text_of(task: "seqio.Task", example: Mapping[str, Any], feature: str) -> str:
    """The text of a feature as it was before tokenizing, or decoded where the task keeps none."""
    before = example.get(f"{feature}_pretokenized")
    if isinstance(before, bytes | str):
        return before.decode("utf-8") if isinstance(before, bytes) else before
    vocabulary = task.output_features[feature].vocabulary
    return vocabulary.decode(
        [
            int(token)
            for token in without_padding(vocabulary, np.asarray(example[feature]))
            if int(token) != vocabulary.eos_id
        ]
    )

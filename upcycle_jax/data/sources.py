"""SeqIO sources over text that is held in memory, and the language-model tasks built on them."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from upcycle_jax.data.config import LANGUAGE_MODELING
from upcycle_jax.data.objectives import preprocessors
from upcycle_jax.data.text import tokenizer
from upcycle_jax.data.text.documents import SPLITS, TRAIN, Corpus
from upcycle_jax.data.tokenizer_vocabulary import TokenizerVocabulary
from upcycle_jax.features.names import DOCUMENTS, INPUTS, TARGETS

SHUFFLE_BUFFER = 1000  # segments; documents are shuffled over the whole split before

BYTES = "bytes"


class CorpusSource(seqio.DataSource):
    """Passages of a corpus as examples `{'targets': text}`.

    Unlike SeqIO's function source it shuffles over the whole split, in each epoch differently, and
    gives each process its own passages before shuffling. The corpus is loaded on first use, so that
    registering a task costs nothing.
    """

    def __init__(self, load: Callable[[], Corpus]):
        super().__init__(splits=SPLITS, caching_permitted=True, performs_internal_shuffling=True)
        self._load = load

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The text itself."""
        return self._load()

    def fingerprint(self) -> dict[str, Any]:
        """See `Corpus.fingerprint`."""
        return self.corpus.fingerprint()

    def list_shards(self, split: str) -> Sequence[str]:
        return [split]

    def num_input_examples(self, split: str) -> int:
        return len(self.corpus.splits[split])

    def get_dataset(
        self,
        split: str = TRAIN,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused_kwargs: Any,
    ) -> tf.data.Dataset:
        """See seqio.DataSource.

        Raises:
          ValueError: more shards than passages.
        """
        passages = self.corpus.splits[split]
        if shard_info is not None and shard_info.num_shards > len(passages):
            raise ValueError(
                f"the domain '{self.corpus.name}' has {len(passages)} passages in the split"
                f" '{split}', too few for {shard_info.num_shards} processes: give it more text or"
                " use fewer processes"
            )
        if shard_info is not None:
            passages = passages[shard_info.index :: shard_info.num_shards]
        texts = tf.constant(passages)
        order = tf.data.Dataset.range(len(passages))
        if shuffle:
            order = order.shuffle(len(passages), seed=seed, reshuffle_each_iteration=True)
        return order.map(
            lambda i: {"targets": tf.gather(texts, i)}, num_parallel_calls=tf.data.AUTOTUNE
        )


class LabelledSource(seqio.DataSource):
    """Examples `{'inputs': text, 'targets': text}` of any splits, held in memory and shuffled as a
    whole; loaded on first use.
    """

    def __init__(
        self,
        load: Callable[[], Mapping[str, Sequence[tuple[str, str]]]],
        *,
        splits: Sequence[str] = SPLITS,
    ):
        super().__init__(
            splits=tuple(splits), caching_permitted=True, performs_internal_shuffling=True
        )
        self._load = load

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    @functools.cached_property
    def pairs(self) -> Mapping[str, Sequence[tuple[str, str]]]:
        """(input, target) by split."""
        return self._load()

    def fingerprint(self) -> dict[str, Any]:
        """Number of examples and sha256 of each split."""
        return {
            split: {
                "examples": len(pairs),
                "sha256": hashlib.sha256(json.dumps(list(map(list, pairs))).encode()).hexdigest(),
            }
            for split, pairs in self.pairs.items()
        }

    def list_shards(self, split: str) -> Sequence[str]:
        return [split]

    def num_input_examples(self, split: str) -> int:
        return len(self.pairs[split])

    def get_dataset(
        self,
        split: str = TRAIN,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused_kwargs: Any,
    ) -> tf.data.Dataset:
        """See seqio.DataSource."""
        pairs = self.pairs[split]
        if shard_info is not None:
            pairs = pairs[shard_info.index :: shard_info.num_shards]
        texts = tf.reshape(
            tf.constant([text for pair in pairs for text in pair], tf.string), [-1, 2]
        )
        order = tf.data.Dataset.range(len(pairs))
        if shuffle:
            order = order.shuffle(max(1, len(pairs)), seed=seed, reshuffle_each_iteration=True)
        return order.map(lambda i: {"inputs": texts[i, 0], "targets": texts[i, 1]})


def vocabulary_from(name: str, *, extra_ids: int = 100) -> seqio.Vocabulary:
    """The byte vocabulary for 'bytes', the Hugging Face tokenizer of a folder or a `.json` file,
    else the SentencePiece model at a path.

    Raises:
      FileNotFoundError: no file at the path.
      ValueError: the file is no vocabulary.
    """
    if name == BYTES:
        return seqio.ByteVocabulary(extra_ids=extra_ids)
    if tokenizer.is_named(name):
        return TokenizerVocabulary(tokenizer.load(name))
    if not tf.io.gfile.exists(name):
        raise FileNotFoundError(
            f"vocabulary {name!r}: no such file; give 'bytes', the folder of a Hugging Face"
            " tokenizer, or the path of a SentencePiece model (spiece.model)"
        )
    vocabulary = seqio.SentencePieceVocabulary(name, extra_ids=extra_ids)
    try:
        int(vocabulary.vocab_size)
    except Exception as error:  # SentencePiece raises several types for a file that is no model
        raise ValueError(
            f"vocabulary {name!r} is not a SentencePiece model ({error}): give 'bytes', the"
            " folder of a Hugging Face tokenizer, or the path of a spiece.model"
        ) from error
    return vocabulary


def output_features(vocabulary: seqio.Vocabulary) -> dict[str, seqio.Feature]:
    """'inputs' and 'targets' over one vocabulary, closed by EOS where `ends` says so."""
    return {
        name: seqio.Feature(vocabulary=vocabulary, add_eos=ends(vocabulary, name))
        for name in (INPUTS, TARGETS)
    }


def ends(vocabulary: seqio.Vocabulary, feature: str) -> bool:
    """Whether EOS closes a feature: all of them, but for the inputs of models that come with a
    Hugging Face tokenizer. Those go on with the targets, as after a prompt.
    """
    return feature != INPUTS or not isinstance(vocabulary, TokenizerVocabulary)


def row_features(vocabulary: seqio.Vocabulary) -> dict[str, seqio.Feature]:
    """What `preprocessors.language_modeling` gives: 'targets', and their documents."""
    return {
        TARGETS: seqio.Feature(vocabulary=vocabulary, add_eos=True),
        DOCUMENTS: seqio.Feature(seqio.PassThroughVocabulary(0), add_eos=False),
    }


def tokenize(dataset: tf.data.Dataset, output_features: preprocessors.Features) -> tf.data.Dataset:
    """Tokens of `targets`, without EOS and without a copy of the text."""
    return seqio.preprocessors.tokenize(
        dataset, output_features, copy_pretokenized=False, with_eos=False
    )


def in_rows(objective: str) -> bool:
    """Whether an objective learns whole documents in rows, and not corrupted segments."""
    return objective == LANGUAGE_MODELING


def objective_steps(objective: str) -> list[Callable[..., tf.data.Dataset]]:
    """What a task does with tokenised documents to train by an objective."""
    steps = [seqio.CacheDatasetPlaceholder(), preprocessors.OBJECTIVES[objective]]
    if in_rows(objective):
        return [seqio.preprocessors.append_eos, *steps]
    return [*steps, seqio.preprocessors.append_eos_after_trim]


def language_model_task(
    name: str,
    source: seqio.DataSource,
    vocabulary: seqio.Vocabulary,
    *,
    objective: str = "span_corruption",
) -> seqio.Task:
    """A task, not registered, that trains by an objective of `preprocessors.OBJECTIVES` on the
    texts of `source`.

    Raises:
      ValueError: language modelling with a vocabulary that has no EOS.
    """
    features = row_features(vocabulary) if in_rows(objective) else output_features(vocabulary)
    if in_rows(objective):
        preprocessors.end_of_documents(features)
    return seqio.Task(
        name,
        source=source,
        preprocessors=[tokenize, *objective_steps(objective)],
        output_features=features,
        metric_fns=[],
        shuffle_buffer_size=SHUFFLE_BUFFER,
    )

"""Pre-training objectives as SeqIO preprocessors: span corruption, prefix language modelling, UL2's
mixture of both, and language modelling.

The first three take tokenised documents in `targets` and give `inputs` and `targets` without EOS.
Documents are joined in groups and cut into segments of exactly the length that fills a model's
inputs; only the last segment of a group is shorter, as in T5. `language_modeling` takes documents
that end with EOS, and gives rows of `targets`.

Axis legend: N segments, L tokens of a segment, I input tokens, T target tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import seqio
import tensorflow as tf

from upcycle_jax.data.objectives import arithmetic, tf_spans
from upcycle_jax.features.names import DOCUMENTS

DOCUMENTS_PER_GROUP = 128
_MIXED_DOCUMENTS_PER_GROUP = 8  # a group has one objective, so small groups mix objectives well

Features = Mapping[str, seqio.Feature]
Lengths = Mapping[str, int]
Rows = dict[str, tf.Tensor]

_NO_TOKEN = -1  # 0 is a token of some vocabularies


class Denoiser(Protocol):
    """One way to make a text-to-text task of a segment of text."""

    @property
    def weight(self) -> float:
        """Relative number of examples in a mixture."""
        ...

    @property
    def pads(self) -> bool:
        """Whether `corrupt` gives rows of several lengths, filled with `_NO_TOKEN`."""
        ...

    def raw_length(self, sequence_length: Lengths, vocabulary: seqio.Vocabulary) -> int:
        """Tokens of text in a full segment.

        Raises:
          ValueError: the lengths or the vocabulary do not suit the objective.
        """
        ...

    def corrupt(
        self,
        tokens: tf.Tensor,
        seed: tf.Tensor,
        *,
        sequence_length: Lengths,
        vocabulary: seqio.Vocabulary,
    ) -> Rows:
        """`inputs` int32 `[N, I]` and `targets` int32 `[N, T]` of `tokens` int32 `[N, L]`."""
        ...


def _prepend(tokens: tf.Tensor, text: str, vocabulary: seqio.Vocabulary) -> tf.Tensor:
    """Puts the tokens of `text` before each row."""
    if not text:
        return tokens
    ids = tf.constant([vocabulary.encode(text)], tf.int32)
    return tf.concat([tf.repeat(ids, tf.shape(tokens)[0], axis=0), tokens], axis=1)


@dataclasses.dataclass(frozen=True)
class SpanDenoiser:
    """Random spans leave the inputs, and are the targets (Raffel et al. 2020, section 3.1.4).

    Attributes:
      noise_density: fraction of tokens that leave.
      mean_noise_span_length: tokens of a span. Longer spans, or more noise, come closer to writing
        a continuation.
      prefix: text before the inputs that names the mode (UL2's "[NLU] ").
      weight: relative number of examples in a mixture.
    """

    noise_density: float = arithmetic.NOISE_DENSITY
    mean_noise_span_length: float = arithmetic.MEAN_NOISE_SPAN_LENGTH
    prefix: str = ""
    weight: float = 1.0
    pads = False

    def raw_length(self, sequence_length: Lengths, vocabulary: seqio.Vocabulary) -> int:
        lengths = arithmetic.fitting_span_lengths(
            sequence_length,
            prefix_tokens=len(vocabulary.encode(self.prefix)),
            extra_ids=vocabulary.extra_ids,
            noise_density=self.noise_density,
            mean_noise_span_length=self.mean_noise_span_length,
        )
        return lengths.raw

    def corrupt(
        self,
        tokens: tf.Tensor,
        seed: tf.Tensor,
        *,
        sequence_length: Lengths,
        vocabulary: seqio.Vocabulary,
    ) -> Rows:
        shape = tf.shape(tokens)
        mask = tf_spans.noise_mask(
            shape[0],
            shape[1],
            noise_density=self.noise_density,
            mean_noise_span_length=self.mean_noise_span_length,
            seed=seed,
        )
        first_sentinel = vocabulary.vocab_size - 1
        inputs = tf_spans.replace_spans(tokens, mask, first_sentinel=first_sentinel)
        targets = tf_spans.replace_spans(tokens, ~mask, first_sentinel=first_sentinel)
        return {"inputs": _prepend(inputs, self.prefix, vocabulary), "targets": targets}


@dataclasses.dataclass(frozen=True)
class PrefixDenoiser:
    """The end of a segment, of random length, is the target; what comes before it the input (prefix
    language modelling).

    Segments have as many tokens as the inputs may have; the end has 1 token to as many as the
    targets may have, each equally likely.

    Attributes:
      prefix: text before the inputs that names the mode (UL2's "[S2S] ").
      weight: relative number of examples in a mixture.
    """

    prefix: str = ""
    weight: float = 1.0
    pads = True

    def raw_length(self, sequence_length: Lengths, vocabulary: seqio.Vocabulary) -> int:
        return arithmetic.fitting_prefix_length(
            sequence_length, prefix_tokens=len(vocabulary.encode(self.prefix))
        )

    def corrupt(
        self,
        tokens: tf.Tensor,
        seed: tf.Tensor,
        *,
        sequence_length: Lengths,
        vocabulary: seqio.Vocabulary,
    ) -> Rows:
        rows, length = tf.unstack(tf.shape(tokens))
        longest = tf.clip_by_value(
            length - 1, 1, sequence_length["targets"] - 1
        )  # each side keeps a place for its EOS
        ends = tf.random.stateless_uniform(
            [rows, 1], seed=seed, minval=1, maxval=longest + 1, dtype=tf.int32
        )
        is_input = tf.range(length)[tf.newaxis] < length - ends
        inputs = tf.where(is_input, tokens, _NO_TOKEN)
        return {
            "inputs": _prepend(inputs, self.prefix, vocabulary),
            "targets": tf.where(is_input, _NO_TOKEN, tokens),
        }


def concatenate(dataset: tf.data.Dataset, *, documents: int) -> tf.data.Dataset:
    """Joins every `documents` token sequences into one, so that segments of equal length can be cut
    without padding.
    """
    tokens = dataset.map(lambda example: tf.cast(example["targets"], tf.int32))
    return tokens.ragged_batch(documents).map(
        lambda ragged: ragged.flat_values, num_parallel_calls=tf.data.AUTOTUNE
    )


def _cut(
    tokens: tf.Tensor,
    seed: tf.Tensor,
    *,
    length: int,
    corrupt: Callable[[tf.Tensor, tf.Tensor], Rows],
) -> dict[str, Rows]:
    """Corrupts all segments of `length` tokens, and the shorter rest."""
    full = tf.size(tokens) // length
    rest = tokens[full * length :]
    # An empty rest has nothing to corrupt: take a stand-in, and give none of its rows.
    rest_rows = tf.cond(tf.size(rest) > 0, lambda: rest, lambda: tf.ones([2], tf.int32))[tf.newaxis]
    seeds = tf.random.split(seed, 2)
    corrupted_rest = corrupt(rest_rows, seeds[1])
    kept = tf.cast(tf.size(rest) > 0, tf.int32)
    return {
        "full": corrupt(tf.reshape(tokens[: full * length], [full, length]), seeds[0]),
        "rest": {name: rows[:kept] for name, rows in corrupted_rest.items()},
    }


def denoise(
    dataset: tf.data.Dataset,
    sequence_length: Lengths,
    output_features: Features,
    *,
    denoisers: Sequence[Denoiser],
    documents_per_group: int = DOCUMENTS_PER_GROUP,
) -> tf.data.Dataset:
    """Corrupts each group of documents by one of the denoisers, drawn so that examples (not tokens)
    follow the weights.

    Unlike T5, a document of more than 65,536 tokens is used whole, not one random chunk of it per
    epoch.

    Raises:
      ValueError: the lengths or the vocabulary do not suit a denoiser.
    """
    vocabulary = output_features["targets"].vocabulary
    raw = [denoiser.raw_length(sequence_length, vocabulary) for denoiser in denoisers]
    shares = [
        math.log(denoiser.weight * length) for denoiser, length in zip(denoisers, raw, strict=True)
    ]

    def cutter(denoiser, length):
        # Traced once for the full rows and the rest; nothing here needs AutoGraph, whose conversion
        # takes most of the start-up time.
        corrupt = tf.function(
            lambda tokens, seed: denoiser.corrupt(
                tokens, seed, sequence_length=sequence_length, vocabulary=vocabulary
            ),
            autograph=False,
            input_signature=[tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([2], tf.int64)],
        )
        return functools.partial(_cut, length=length, corrupt=corrupt)

    cutters = [cutter(denoiser, length) for denoiser, length in zip(denoisers, raw, strict=True)]

    @seqio.map_over_dataset(num_seeds=1)
    @tf.autograph.experimental.do_not_convert
    def cut(tokens, seed):
        seed = tf.stack(seed)
        if len(cutters) == 1:
            return cutters[0](tokens, seed)
        seeds = tf.random.split(seed, 2)
        drawn = tf.random.stateless_categorical([shares], 1, seed=seeds[0], dtype=tf.int32)[0, 0]
        return tf.switch_case(
            drawn, [functools.partial(cutter, tokens, seeds[1]) for cutter in cutters]
        )

    @tf.autograph.experimental.do_not_convert
    def emit(group):
        return tf.data.Dataset.from_tensor_slices(group["full"]).concatenate(
            tf.data.Dataset.from_tensor_slices(group["rest"])
        )

    @tf.autograph.experimental.do_not_convert
    def strip(example):
        return {name: tf.boolean_mask(tokens, tokens >= 0) for name, tokens in example.items()}

    segments = cut(concatenate(dataset, documents=documents_per_group)).flat_map(emit)
    return (
        segments.map(strip, num_parallel_calls=tf.data.AUTOTUNE)
        if any(denoiser.pads for denoiser in denoisers)
        else segments
    )


def span_corruption(
    dataset: tf.data.Dataset,
    sequence_length: Lengths,
    output_features: Features,
    *,
    noise_density: float = arithmetic.NOISE_DENSITY,
    mean_noise_span_length: float = arithmetic.MEAN_NOISE_SPAN_LENGTH,
    documents_per_group: int = DOCUMENTS_PER_GROUP,
) -> tf.data.Dataset:
    """T5's pre-training objective.

    Raises:
      ValueError: the targets do not fit `sequence_length`, or the vocabulary has too few sentinels.
    """
    denoisers = (SpanDenoiser(noise_density, mean_noise_span_length),)
    return denoise(
        dataset,
        sequence_length,
        output_features,
        denoisers=denoisers,
        documents_per_group=documents_per_group,
    )


def prefix_lm(
    dataset: tf.data.Dataset, sequence_length: Lengths, output_features: Features
) -> tf.data.Dataset:
    """Prefix language modelling: continue a text.

    Raises:
      ValueError: lengths below 2.
    """
    return denoise(dataset, sequence_length, output_features, denoisers=(PrefixDenoiser(),))


UL2_DENOISERS: tuple[Denoiser, ...] = (
    SpanDenoiser(0.15, 3.0, "[NLU] "),
    SpanDenoiser(0.15, 8.0, "[NLU] "),
    SpanDenoiser(0.5, 3.0, "[NLG] "),
    SpanDenoiser(0.5, 8.0, "[NLG] "),
    SpanDenoiser(0.15, 64.0, "[NLG] "),
    SpanDenoiser(0.5, 64.0, "[NLG] "),
    PrefixDenoiser("[S2S] "),
)
"""Regular, extreme and sequential denoising in equal shares, each told by its mode's name (Tay et
al. 2022, table 1).
"""


def ul2(
    dataset: tf.data.Dataset, sequence_length: Lengths, output_features: Features
) -> tf.data.Dataset:
    """UL2's mixture of denoisers. At density 0.5 the targets are as long as the inputs, and 512
    inputs need 127 sentinels.

    Raises:
      ValueError: the lengths or the vocabulary do not suit one of the denoisers.
    """
    return denoise(
        dataset,
        sequence_length,
        output_features,
        denoisers=UL2_DENOISERS,
        documents_per_group=_MIXED_DOCUMENTS_PER_GROUP,
    )


def language_modeling(
    dataset: tf.data.Dataset, sequence_length: Lengths, output_features: Features
) -> tf.data.Dataset:
    """Predict each token from those before it: rows of exactly as many `targets` as asked, cut out
    of the stream of all documents one after another, so that nothing is left out and only the last
    row of a pass is shorter. `targets_segment_ids` counts the documents of a row from 1: one ends
    with EOS.

    Raises:
      ValueError: no length, or a vocabulary without EOS.
    """
    length = arithmetic.fitting_row_length(sequence_length)
    eos_id = end_of_documents(output_features)
    tokens = dataset.map(
        lambda example: tf.ensure_shape(tf.cast(example["targets"], tf.int32), [None])
    )

    @tf.autograph.experimental.do_not_convert
    def row(targets):
        ends = tf.cast(targets[:-1] == eos_id, tf.int32)
        return {"targets": targets, DOCUMENTS: tf.concat([[1], 1 + tf.cumsum(ends)], axis=0)}

    return tokens.rebatch(length, drop_remainder=False).map(
        row, num_parallel_calls=tf.data.AUTOTUNE
    )


def end_of_documents(output_features: Features) -> int:
    """The EOS that divides documents.

    Raises:
      ValueError: the vocabulary has none.
    """
    vocabulary = output_features["targets"].vocabulary
    if vocabulary.eos_id is None:
        raise ValueError(
            f"the vocabulary {vocabulary} states no EOS, which language modelling puts between"
            " documents: take one that does (Hugging Face: 'eos_token' in tokenizer_config.json)"
        )
    return int(vocabulary.eos_id)


OBJECTIVES: dict[str, Callable[..., tf.data.Dataset]] = {
    "span_corruption": span_corruption,
    "prefix_lm": prefix_lm,
    "ul2": ul2,
    "language_modeling": language_modeling,
}
"""Preprocessors by the name that `DatasetConfig.objective` and the tasks use."""

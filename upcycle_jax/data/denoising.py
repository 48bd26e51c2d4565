"""SeqIO preprocessors for text-to-text denoising: span corruption and prefix language modelling over concatenated documents.

Written for whole groups of segments at a time: all full segments of a group have the same number of noise spans, so one batched
operation corrupts them together. Per segment the result is T5's (Raffel et al. 2020, section 3.1.4): the same counts of noise tokens
and spans, every division into spans equally likely, sentinels counted down from the end of the vocabulary.

Axis legend: N segments, L tokens of a segment, P spans, I input tokens, T target tokens.
"""

from collections.abc import Callable, Mapping

import seqio
import tensorflow as tf

from upcycle_jax.data import noise

DOCUMENTS_PER_GROUP = 128

Features = Mapping[str, seqio.Feature]
Rows = dict[str, tf.Tensor]


def sentinel_count(vocabulary: seqio.Vocabulary) -> int:
    """How many tokens at the end of the vocabulary are free to serve as sentinels."""
    return int(getattr(vocabulary, "_extra_ids", 0) or 0)


def _check_fit(lengths: noise.SpanLengths, sequence_length: Mapping[str, int], vocabulary: seqio.Vocabulary, prefix: int) -> None:
    need = lengths.targets
    if sequence_length["targets"] < need:
        raise ValueError(
            f"span corruption of inputs of {sequence_length['inputs']} tokens gives targets of {need} tokens, but task_feature_lengths "
            f"['targets'] is {sequence_length['targets']}: set it to {need} or more, or shorten the inputs"
        )
    sentinels = sentinel_count(vocabulary)
    if lengths.spans + prefix > sentinels:
        raise ValueError(
            f"inputs of {sequence_length['inputs']} tokens hold {lengths.spans} noise spans, but the vocabulary has {sentinels} extra ids "
            f"for sentinels: make the vocabulary with extra_ids={lengths.spans + prefix} or more, or shorten the inputs"
        )


def concatenate(dataset: tf.data.Dataset, *, feature_key: str, documents: int = DOCUMENTS_PER_GROUP) -> tf.data.Dataset:
    """Joins every `documents` token sequences into one, so that segments of equal length can be cut without padding."""

    def join(ragged):
        return {feature_key: ragged.flat_values}

    kept = dataset.map(lambda example: example[feature_key])
    return kept.ragged_batch(documents).map(join, num_parallel_calls=tf.data.AUTOTUNE)


def random_partition(rows: tf.Tensor | int, total: tf.Tensor, parts: tf.Tensor, *, seed: tf.Tensor) -> tf.Tensor:
    """Divides `total` items into `parts` non-empty parts, every division equally likely.

    Returns:
      int32 `[rows, parts]`, each row summing to `total`.
    """
    # Which of the total-1 gaps are cut: the first parts-1 of a random permutation.
    order = tf.argsort(tf.random.stateless_uniform([rows, total - 1], seed=seed), axis=-1)
    cuts = tf.sort(order[:, : parts - 1] + 1, axis=-1)
    ones = tf.ones([rows, 1], tf.int32)
    edges = tf.concat([0 * ones, cuts, total * ones], axis=-1)
    return edges[:, 1:] - edges[:, :-1]


def noise_mask(
    rows: tf.Tensor | int, length: tf.Tensor, *, noise_density: float, mean_noise_span_length: float, seed: tf.Tensor
) -> tf.Tensor:
    """Which tokens are noise: bool `[rows, length]`. Every row starts with text and ends with noise."""
    counted = tf.maximum(length, 2)  # as noise.span_counts, on tensors
    noise_tokens = tf.cast(tf.round(tf.cast(counted, tf.float32) * noise_density), tf.int32)
    noise_tokens = tf.clip_by_value(noise_tokens, 1, counted - 1)
    spans = tf.cast(tf.round(tf.cast(noise_tokens, tf.float32) / mean_noise_span_length), tf.int32)
    spans = tf.minimum(tf.maximum(spans, 1), tf.minimum(noise_tokens, counted - noise_tokens))
    seeds = tf.random.split(seed, 2)
    kept_lengths = random_partition(rows, counted - noise_tokens, spans, seed=seeds[0])
    noise_lengths = random_partition(rows, noise_tokens, spans, seed=seeds[1])
    lengths = tf.reshape(tf.stack([kept_lengths, noise_lengths], axis=-1), [-1])  # [N * P * 2]: text, noise, text, noise, ...
    is_noise = tf.tile(tf.constant([False, True]), [rows * spans])
    return tf.reshape(tf.repeat(is_noise, lengths), [rows, counted])[:, :length]


def replace_spans(tokens: tf.Tensor, hidden: tf.Tensor, *, first_sentinel: int) -> tf.Tensor:
    """Replaces every run of hidden tokens by one sentinel: `first_sentinel` for the first run of a row, then counting down.

    Args:
      tokens: int32 `[N, L]`.
      hidden: bool `[N, L]`, with the same number of runs and of hidden tokens in every row.
      first_sentinel: id of the first sentinel.

    Returns:
      int32 `[N, L - hidden tokens + runs]`.
    """
    before = tf.pad(hidden[:, :-1], [[0, 0], [1, 0]])
    opens = hidden & ~before
    sentinels = first_sentinel + 1 - tf.cumsum(tf.cast(opens, tf.int32), axis=-1)
    replaced = tf.where(opens, sentinels, tokens)
    visible = tf.boolean_mask(replaced, opens | ~hidden)
    rows = tf.shape(tokens)[0]
    return tf.reshape(visible, [rows, tf.size(visible) // tf.maximum(rows, 1)])  # not -1: there may be no rows


def _segments(
    dataset: tf.data.Dataset, *, feature_key: str, length: int, corrupt: Callable[[tf.Tensor, tf.Tensor], Rows]
) -> tf.data.Dataset:
    """Cuts each sequence into segments of `length` tokens and one shorter rest, and corrupts them: `corrupt([N, L] tokens, seed)`."""

    # Traced once for the full rows and the rest; nothing here needs AutoGraph, whose conversion takes most of the start-up time.
    corrupt_rows = tf.function(
        corrupt, autograph=False, input_signature=[tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([2], tf.int64)]
    )

    @seqio.map_over_dataset(num_seeds=1)
    @tf.autograph.experimental.do_not_convert
    def cut(example, seed):
        tokens = tf.cast(example[feature_key], tf.int32)
        full = tf.size(tokens) // length
        seeds = tf.random.split(tf.stack(seed), 2)
        rows = tf.reshape(tokens[: full * length], [full, length])
        rest = tokens[full * length :]
        # An empty rest has no noise to place: corrupt a stand-in, and drop it below.
        rest_rows = tf.cond(tf.size(rest) > 0, lambda: rest, lambda: tf.zeros([2], tf.int32))[tf.newaxis]
        return {"full": corrupt_rows(rows, seeds[0]), "rest": corrupt_rows(rest_rows, seeds[1]), "rest_size": tf.size(rest)}

    @tf.autograph.experimental.do_not_convert
    def emit(group):
        full = tf.data.Dataset.from_tensor_slices(group["full"])
        rest = tf.data.Dataset.from_tensor_slices(group["rest"]).take(tf.cast(group["rest_size"] > 0, tf.int64))
        return full.concatenate(rest)

    return cut(dataset).flat_map(emit)


def span_corruption(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    output_features: Features,
    *,
    noise_density: float = noise.NOISE_DENSITY,
    mean_noise_span_length: float = noise.MEAN_NOISE_SPAN_LENGTH,
    documents_per_group: int = DOCUMENTS_PER_GROUP,
) -> tf.data.Dataset:
    """T5's pre-training objective: `targets` token sequences of documents in, `inputs` and `targets` without EOS out.

    Documents are joined in groups and cut into segments of exactly the length whose corrupted form fills the inputs; only the last
    segment of a group is shorter. Unlike T5, a document of more than 65,536 tokens is used whole, not one random chunk of it per epoch.

    Raises:
      ValueError: the targets do not fit `sequence_length`, or the vocabulary has too few sentinels.
    """
    lengths = noise.span_lengths(sequence_length["inputs"], noise_density=noise_density, mean_noise_span_length=mean_noise_span_length)
    vocabulary = output_features["targets"].vocabulary
    _check_fit(lengths, sequence_length, vocabulary, prefix=0)
    first_sentinel = vocabulary.vocab_size - 1

    def corrupt(tokens, seed):
        shape = tf.shape(tokens)
        mask = noise_mask(shape[0], shape[1], noise_density=noise_density, mean_noise_span_length=mean_noise_span_length, seed=seed)
        return {
            "inputs": replace_spans(tokens, mask, first_sentinel=first_sentinel),
            "targets": replace_spans(tokens, ~mask, first_sentinel=first_sentinel),
        }

    joined = concatenate(dataset, feature_key="targets", documents=documents_per_group)
    return _segments(joined, feature_key="targets", length=lengths.raw, corrupt=corrupt)

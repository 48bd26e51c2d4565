"""Tensor operations of span corruption, on many segments of one length at a time.

All full segments of a group have the same number of noise spans, so one batched operation corrupts
them together. Per segment the result is T5's (Raffel et al. 2020, section 3.1.4): the same counts
of noise tokens and spans, every division into spans equally likely, sentinels counted down from the
end of the vocabulary.

Axis legend: N segments, L tokens of a segment, P spans.
"""

import tensorflow as tf


def random_partition(
    rows: tf.Tensor | int, total: tf.Tensor, parts: tf.Tensor, *, seed: tf.Tensor
) -> tf.Tensor:
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
    rows: tf.Tensor | int,
    length: tf.Tensor,
    *,
    noise_density: float,
    mean_noise_span_length: float,
    seed: tf.Tensor,
) -> tf.Tensor:
    """Which tokens are noise: bool `[rows, length]`. Every row starts with text and ends with
    noise.
    """
    counted = tf.maximum(length, 2)  # as arithmetic.span_counts, on tensors
    noise_tokens = tf.cast(tf.round(tf.cast(counted, tf.float32) * noise_density), tf.int32)
    noise_tokens = tf.clip_by_value(noise_tokens, 1, counted - 1)
    spans = tf.cast(tf.round(tf.cast(noise_tokens, tf.float32) / mean_noise_span_length), tf.int32)
    spans = tf.minimum(tf.maximum(spans, 1), tf.minimum(noise_tokens, counted - noise_tokens))
    seeds = tf.random.split(seed, 2)
    kept_lengths = random_partition(rows, counted - noise_tokens, spans, seed=seeds[0])
    noise_lengths = random_partition(rows, noise_tokens, spans, seed=seeds[1])
    lengths = tf.reshape(
        tf.stack([kept_lengths, noise_lengths], axis=-1), [-1]
    )  # [N * P * 2]: text, noise, text, noise, ...
    is_noise = tf.tile(tf.constant([False, True]), [rows * spans])
    return tf.reshape(tf.repeat(is_noise, lengths), [rows, counted])[:, :length]


def replace_spans(tokens: tf.Tensor, hidden: tf.Tensor, *, first_sentinel: int) -> tf.Tensor:
    """Replaces every run of hidden tokens by one sentinel: `first_sentinel` for the first run of a
    row, then counting down.

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
    return tf.reshape(
        visible, [rows, tf.size(visible) // tf.maximum(rows, 1)]
    )  # not -1: there may be no rows

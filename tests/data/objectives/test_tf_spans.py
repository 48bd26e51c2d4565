"""Span corruption keeps every token, counts as T5 does, and equals T5's own preprocessors where
those are installed.
"""

import numpy as np
import pytest

from upcycle_jax.data.objectives import arithmetic

tf = pytest.importorskip("tensorflow", reason="SeqIO tasks need TensorFlow")
seqio = pytest.importorskip("seqio", reason="SeqIO tasks need seqio")
tf_spans = pytest.importorskip("upcycle_jax.data.objectives.tf_spans")
preprocessors = pytest.importorskip("upcycle_jax.data.objectives.preprocessors")

VOCABULARY = seqio.ByteVocabulary(extra_ids=100)
TOP = VOCABULARY.vocab_size - 1  # the first sentinel
FEATURES = {name: seqio.Feature(VOCABULARY) for name in ("inputs", "targets")}


def _mask(rows, length, seed=(1, 2), density=0.15, mean=3.0):
    mask = tf_spans.noise_mask(
        tf.constant(rows),
        tf.constant(length),
        noise_density=density,
        mean_noise_span_length=mean,
        seed=tf.constant(seed),
    )
    return mask.numpy()


def _runs(row):
    """How many runs of True."""
    return int(row[0]) + int(np.sum(row[1:] & ~row[:-1]))


def reassemble(inputs, targets, *, sentinels=100, top=TOP):
    """Text tokens from a corrupted pair without EOS: each sentinel of the inputs stands for the run
    after the same sentinel's *successor* position in the targets. T5 numbers noise spans and text
    spans separately, both from the top, text first: the k-th sentinel of the inputs hides what
    follows the k-th sentinel of the targets.
    """
    hidden = {}
    for token in targets:
        if token > top - sentinels:
            hidden[token] = current = []
        else:
            current.append(token)
    text = []
    for token in inputs:
        text.extend(hidden.pop(token) if token > top - sentinels else [token])
    assert not hidden, f"sentinels {sorted(hidden)} have no place in the inputs"
    return text


def test_hand_worked_replacement():
    # a b c d e f with c, d and f hidden: inputs a b <0> e <1>; targets <0> c d <1> f. Sentinels
    # count down from 358.
    tokens = tf.constant([[10, 11, 12, 13, 14, 15]])
    hidden = tf.constant([[False, False, True, True, False, True]])
    assert tf_spans.replace_spans(tokens, hidden, first_sentinel=358).numpy().tolist() == [
        [10, 11, 358, 14, 357]
    ]
    assert tf_spans.replace_spans(tokens, ~hidden, first_sentinel=358).numpy().tolist() == [
        [358, 12, 13, 357, 15]
    ]
    assert reassemble([10, 11, 358, 14, 357], [358, 12, 13, 357, 15]) == [10, 11, 12, 13, 14, 15]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 20, 141, 568])
def test_masks_have_the_counted_noise_and_spans(length):
    counts = arithmetic.span_counts(length)
    for row in _mask(16, length):
        assert not row[0]  # text first
        if length > 1:
            assert row[-1] and row.sum() == counts.noise_tokens and _runs(row) == counts.spans


def test_no_rows_give_no_rows():
    assert (
        tf_spans.replace_spans(
            tf.zeros([0, 20], tf.int32), tf.zeros([0, 20], tf.bool), first_sentinel=TOP
        ).shape[0]
        == 0
    )


def test_every_partition_is_equally_likely():
    # 5 items in 3 parts: 4 choose 2 = 6 partitions. 6,000 draws: 1,000 each, standard deviation 29;
    #   5 deviations allowed.
    drawn = tf_spans.random_partition(
        tf.constant(6000), tf.constant(5), tf.constant(3), seed=tf.constant([3, 4])
    ).numpy()
    partitions, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(partitions) == 6 and (partitions.sum(axis=1) == 5).all() and (partitions >= 1).all()
    assert np.abs(counts - 1000).max() < 145


@pytest.fixture(scope="module")
def corrupted():
    """40 documents of distinct tokens 3..258 with a seed; the segments they give."""
    documents = [
        np.random.default_rng(n).integers(3, 259, size=5 + 37 * n).astype(np.int32)
        for n in range(40)
    ]
    dataset = tf.data.Dataset.from_generator(
        lambda: ({"targets": d} for d in documents),
        output_signature={"targets": tf.TensorSpec([None], tf.int32)},
    )
    with seqio.utils.map_seed_manager(5):
        segments = preprocessors.span_corruption(
            dataset, {"inputs": 64, "targets": 16}, FEATURES, documents_per_group=16
        )
    return documents, list(segments.as_numpy_iterator())


def test_inputs_and_targets_together_hold_the_whole_text(corrupted):
    documents, segments = corrupted
    text = [
        token
        for segment in segments
        for token in reassemble(segment["inputs"].tolist(), segment["targets"].tolist())
    ]
    assert text == np.concatenate(documents).tolist()


def test_segments_fill_the_inputs_but_for_the_rest_of_each_group(corrupted):
    documents, segments = corrupted
    lengths = arithmetic.span_lengths(64)
    short = [segment for segment in segments if len(segment["inputs"]) + 1 != lengths.inputs]
    groups = [np.concatenate(documents[start : start + 16]) for start in (0, 16, 32)]
    assert len(short) == sum(len(group) % lengths.raw > 0 for group in groups)
    assert all(len(segment["targets"]) + 1 <= lengths.targets for segment in segments)


def test_masks_differ_between_segments(corrupted):
    _, segments = corrupted
    places = {tuple(np.flatnonzero(segment["inputs"] > TOP - 100)) for segment in segments}
    assert len(places) > len(segments) // 2


def test_too_short_targets_and_too_few_sentinels_are_refused():
    dataset = tf.data.Dataset.from_tensors({"targets": tf.zeros([10], tf.int32)})
    with pytest.raises(
        ValueError, match=r"gives targets of 114 tokens, but .* is 100: set it to 114 or more"
    ):
        preprocessors.span_corruption(dataset, {"inputs": 512, "targets": 100}, FEATURES)
    few = {name: seqio.Feature(seqio.ByteVocabulary(extra_ids=10)) for name in FEATURES}
    with pytest.raises(
        ValueError,
        match=r"needs 28 sentinels, but the vocabulary has 10 extra ids.*extra_ids=28 or more",
    ):
        preprocessors.span_corruption(dataset, {"inputs": 512, "targets": 114}, few)


@pytest.fixture(scope="module")
def t5_preprocessors():
    return pytest.importorskip("t5.data.preprocessors", reason="t5 is an extra")


def test_lengths_equal_t5s(t5_preprocessors):
    # Not for inputs so short that no noise span fits: there T5 plans for none, but places one all
    # the same.
    for inputs_length in (64, 100, 256, 512, 1024):
        for density, mean in ((0.15, 3.0), (0.5, 3.0), (0.15, 8.0), (0.5, 32.0)):
            ours = arithmetic.span_lengths(
                inputs_length, noise_density=density, mean_noise_span_length=mean
            )
            theirs = t5_preprocessors.random_spans_helper(
                inputs_length=inputs_length,
                noise_density=density,
                mean_noise_span_length=mean,
                extra_tokens_per_span_inputs=1,
                extra_tokens_per_span_targets=1,
            )
            assert ours.raw == theirs[0], (inputs_length, density, mean)
            # At density 0.5 T5 takes one token off both and reports the targets that this leaves at
            # most.
            assert theirs[1] - ours.targets in ((0, 1) if density == 0.5 else (0,)), (
                inputs_length,
                density,
                mean,
            )


def test_mask_counts_equal_t5s(t5_preprocessors):
    seeds = tf.constant([[1, 2], [3, 4]])
    for length in (1, 2, 3, 5, 10, 23, 100, 141, 568):
        theirs = t5_preprocessors.random_spans_noise_mask(
            tf.constant(length), 0.15, seeds, 3.0
        ).numpy()
        ours = _mask(1, length)[0]
        assert (ours.sum(), _runs(ours)) == (theirs.sum(), _runs(theirs)), length


def test_replacement_equals_t5s(t5_preprocessors):
    tokens = tf.random.stateless_uniform([141], seed=[1, 1], minval=3, maxval=259, dtype=tf.int32)
    mask = tf.constant(_mask(1, 141))
    for ours_hidden, theirs in (
        (mask, t5_preprocessors.noise_span_to_unique_sentinel),
        (~mask, t5_preprocessors.nonnoise_span_to_unique_sentinel),
    ):
        ours = tf_spans.replace_spans(tokens[tf.newaxis], ours_hidden, first_sentinel=TOP)[0]
        np.testing.assert_array_equal(ours, theirs(tokens, mask[0], VOCABULARY, None))

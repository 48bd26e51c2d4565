"""The numpy objectives equal the TensorFlow ones: in hand-worked cases, in counts, and in
distribution.
"""

import numpy as np
import pytest

from upcycle_jax.data import draws
from upcycle_jax.data.objectives import arithmetic
from upcycle_jax.data.objectives import numpy as numpy_objectives
from upcycle_jax.data.objectives.numpy import PrefixSplit, SpanNoise

TOP = 358
LENGTHS = {"inputs": 64, "targets": 64}


def keys(count, seed=0):
    return draws.bits(seed, np.arange(count))


def runs(row):
    return int(row[0]) + int(np.sum(row[1:] & ~row[:-1]))


def test_draws_do_not_depend_on_company_and_never_change():
    # SplitMix64's own first output for state 0 is mix(golden ratio): a published value.
    assert int(draws.bits(0)) == 0xE220A8397B1DCDAF
    together = draws.bits(7, np.arange(4)[:, None], np.arange(3))
    assert together.shape == (4, 3) and len(np.unique(together)) == 12
    assert together[2, 1] == draws.bits(7, 2, 1)
    assert draws.bits(7, 1, 2) != draws.bits(7, 2, 1)


def test_draws_are_uniform():
    # 64,000 draws in 16 classes: 4,000 each, standard deviation 61; 5 deviations allowed, in the
    #   high and in the low bits.
    drawn = draws.bits(3, np.arange(64_000))
    for shift in (60, 0):
        counts = np.bincount(
            ((drawn >> np.uint64(shift)) & np.uint64(15)).astype(int), minlength=16
        )
        assert np.abs(counts - 4000).max() < 306


def test_hand_worked_replacement():
    # a b c d e f with c, d and f hidden: inputs a b <0> e <1>; targets <0> c d <1> f. Sentinels
    # count down from 358.
    tokens = np.array([[10, 11, 12, 13, 14, 15]], np.int32)
    hidden = np.array([[False, False, True, True, False, True]])
    assert numpy_objectives.replace_spans(tokens, hidden, first_sentinel=TOP).tolist() == [
        [10, 11, 358, 14, 357]
    ]
    assert numpy_objectives.replace_spans(tokens, ~hidden, first_sentinel=TOP).tolist() == [
        [358, 12, 13, 357, 15]
    ]


def test_every_partition_is_equally_likely():
    # 5 items in 3 parts: 4 choose 2 = 6 partitions. 6,000 draws: 1,000 each, standard deviation 29;
    #   5 deviations allowed.
    drawn = numpy_objectives.random_partition(keys(6000), 5, 3)
    partitions, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(partitions) == 6 and (partitions.sum(axis=1) == 5).all() and (partitions >= 1).all()
    assert np.abs(counts - 1000).max() < 145
    assert numpy_objectives.random_partition(keys(2), 5, 1).tolist() == [[5], [5]]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 20, 141, 568])
def test_masks_have_the_counted_noise_and_spans(length):
    counts = arithmetic.span_counts(length)
    for row in numpy_objectives.noise_mask(
        keys(16), length, noise_density=0.15, mean_noise_span_length=3.0
    ):
        assert not row[0]  # text first
        if length > 1:
            assert row[-1] and row.sum() == counts.noise_tokens and runs(row) == counts.spans


@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.5, 3.0), (0.15, 8.0)])
def test_masks_are_distributed_as_tensorflows(density, mean):
    tf = pytest.importorskip("tensorflow", reason="SeqIO tasks need TensorFlow")
    tf_spans = pytest.importorskip("upcycle_jax.data.objectives.tf_spans")
    rows, length = 4000, 60
    ours = numpy_objectives.noise_mask(
        keys(rows), length, noise_density=density, mean_noise_span_length=mean
    )
    theirs = tf_spans.noise_mask(
        tf.constant(rows),
        tf.constant(length),
        noise_density=density,
        mean_noise_span_length=mean,
        seed=tf.constant([1, 2]),
    ).numpy()
    # How often each place is noise, and how often two neighbours both are. Each frequency has a
    # standard deviation of at most sqrt(0.25 / 4000) = 0.0079 on either side, 0.0112 for the
    # difference; 5 deviations allowed over the 60 places.
    for statistic in (
        lambda mask: mask.mean(axis=0),
        lambda mask: (mask[:, 1:] & mask[:, :-1]).mean(axis=0),
    ):
        assert np.abs(statistic(ours) - statistic(theirs)).max() < 0.056
    first = [
        np.bincount(mask.argmax(axis=1), minlength=length) / rows for mask in (ours, theirs)
    ]  # where the first span begins
    assert np.abs(first[0] - first[1]).max() < 0.056


@pytest.mark.parametrize("length", [1, 2, 5, 37, 141])
def test_equal_masks_give_tensorflows_examples(length):
    tf = pytest.importorskip("tensorflow", reason="SeqIO tasks need TensorFlow")
    tf_spans = pytest.importorskip("upcycle_jax.data.objectives.tf_spans")
    tokens = np.random.default_rng(length).integers(3, 259, size=(4, length)).astype(np.int32)
    mask = numpy_objectives.noise_mask(
        keys(4), length, noise_density=0.15, mean_noise_span_length=3.0
    )
    inputs, targets = SpanNoise(prefix="x", prefix_ids=(9, 8)).corrupt(
        tokens, keys(4), sequence_length=LENGTHS, first_sentinel=TOP
    )
    for ours, hidden, prefix in ((inputs, mask, [9, 8]), (targets, ~mask, [])):
        theirs = tf_spans.replace_spans(
            tf.constant(tokens), tf.constant(hidden), first_sentinel=TOP
        ).numpy()
        assert [row.tolist() for row in ours] == [prefix + row.tolist() for row in theirs]


def test_prefix_splits_divide_the_text_evenly():
    tokens = np.tile(np.arange(3, 13, dtype=np.int32), (3000, 1))
    split = PrefixSplit(prefix="x", prefix_ids=(99,))
    inputs, targets = split.corrupt(
        tokens, keys(3000), sequence_length={"inputs": 12, "targets": 6}, first_sentinel=TOP
    )
    for row, (source, target) in enumerate(zip(inputs, targets, strict=True)):
        assert (
            source[0] == 99
            and np.concatenate([source[1:], target]).tolist() == tokens[row].tolist()
        )
    # 1 to 5 of 10 tokens are the target, each equally likely: 600 of 3,000, standard deviation 22;
    # 5 deviations allowed.
    ends, counts = np.unique([len(target) for target in targets], return_counts=True)
    assert ends.tolist() == [1, 2, 3, 4, 5] and np.abs(counts - 600).max() < 110


def test_lengths_are_refused_as_on_the_fly():
    with pytest.raises(
        ValueError, match=r"gives targets of 114 tokens, but .* is 100: set it to 114 or more"
    ):
        SpanNoise().raw_length({"inputs": 512, "targets": 100}, 100)
    with pytest.raises(
        ValueError, match=r"needs 28 sentinels, but the vocabulary has 10 extra ids"
    ):
        SpanNoise().raw_length({"inputs": 512, "targets": 114}, 10)
    with pytest.raises(ValueError, match="leave a prefix language model no text"):
        PrefixSplit(prefix_ids=(1, 2)).raw_length({"inputs": 3, "targets": 8}, 100)


def test_patterns_follow_the_weights():
    assert numpy_objectives.pattern([SpanNoise(), SpanNoise(), PrefixSplit()]) == (0, 1, 2)
    assert numpy_objectives.pattern([SpanNoise(weight=1.5), SpanNoise(weight=1.0)]) == (
        0,
        0,
        0,
        1,
        1,
    )
    with pytest.raises(ValueError, match="unknown kind of noise 'blank'"):
        numpy_objectives.from_json({"kind": "blank"})
    span = SpanNoise(0.5, 8.0, "[NLG] ", (5, 6), 2.0)
    assert numpy_objectives.from_json(numpy_objectives.to_json(span)) == span


def test_rows_of_language_modelling_by_hand():
    rows = numpy_objectives.CausalRows(eos_id=1)
    tokens = np.array([[5, 6, 1, 1, 8], [1, 9, 9, 9, 1]], np.int32)
    inputs, targets = rows.corrupt(
        tokens, keys(2), sequence_length={"targets": 5}, first_sentinel=0
    )
    assert [row.tolist() for row in targets] == tokens.tolist() and not any(map(len, inputs))
    assert rows.documents(targets[0]).tolist() == [1, 1, 1, 2, 3]
    assert rows.documents(targets[1]).tolist() == [1, 2, 2, 2, 2]
    assert rows.raw_length({"targets": 5}, 0) == 5
    assert rows.result_lengths(5, {"targets": 5}) == (0, 5)
    assert numpy_objectives.from_json(numpy_objectives.to_json(rows)) == rows

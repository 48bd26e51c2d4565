"""Batches of encoder-decoder models: SeqIO's features, in the shapes that are promised."""

import numpy as np
import pytest

from upcycle_jax.features import EncoderDecoderFeatures, FeatureConverter, check_lengths, num_rows

LENGTHS = {"inputs": 16, "targets": 12}
FEATURES: FeatureConverter = EncoderDecoderFeatures()


def make_examples(count):
    generator = np.random.default_rng(0)
    return [
        {
            name: generator.integers(3, 50, size=generator.integers(1, 9)).astype(np.int32)
            for name in LENGTHS
        }
        for _ in range(count)
    ]


def test_features_equal_seqios():
    pytest.importorskip("seqio", reason="SeqIO tasks need seqio")
    tf = pytest.importorskip("tensorflow")
    examples = make_examples(40)
    dataset = tf.data.Dataset.from_generator(
        lambda: iter(examples),
        output_signature={name: tf.TensorSpec([None], tf.int32) for name in LENGTHS},
    )

    def seqios(*, pack):
        converted = FEATURES.seqio_converter(pack=pack)(dataset, task_feature_lengths=LENGTHS)
        return list(converted.as_numpy_iterator())

    theirs = seqios(pack=False)
    ours = FEATURES.pad(examples, LENGTHS, 41)
    for name in theirs[0]:
        np.testing.assert_array_equal(ours[name][:40], [row[name] for row in theirs], err_msg=name)
        assert ours[name].dtype == np.int32 and not ours[name][40].any()
    # SeqIO keeps several rows open and fills the first that has room: each of its rows, given as
    # examples, makes the same features here.
    for row in seqios(pack=True):
        count = row["encoder_segment_ids"].max()
        parts = [
            {
                "inputs": row["encoder_input_tokens"][row["encoder_segment_ids"] == number],
                "targets": row["decoder_target_tokens"][row["decoder_segment_ids"] == number],
            }
            for number in range(1, count + 1)
        ]
        again = FEATURES.pack([parts], LENGTHS)
        assert again.keys() == row.keys()
        for name in row:
            np.testing.assert_array_equal(again[name][0], row[name], err_msg=name)


def test_batches_have_the_promised_shapes():
    examples = make_examples(3)
    for packed, batch in (
        (False, FEATURES.pad(examples, LENGTHS, 4)),
        (True, FEATURES.pack([examples[:1], examples[1:2], examples[2:], []], LENGTHS)),
    ):
        specs = FEATURES.specs(4, LENGTHS, packed=packed)
        assert {name: (spec.shape, spec.dtype) for name, spec in specs.items()} == {
            name: (array.shape, array.dtype) for name, array in batch.items()
        }
        assert num_rows(batch) == 4 and FEATURES.targets in batch
    long = FEATURES.pad([{"inputs": range(20)}], LENGTHS, 1)
    assert long["encoder_input_tokens"][0].tolist() == list(range(16))
    assert not long["decoder_target_tokens"].any()


def test_random_batches_are_the_seeds():
    batch = FEATURES.random(50)
    assert {array.shape for array in batch.values()} == {(2, 32)}
    targets = batch["decoder_target_tokens"]
    assert (targets[0] > 0).all() and (targets[1, :24] > 0).all() and not targets[1, 24:].any()
    np.testing.assert_array_equal(batch["decoder_input_tokens"][:, 1:], targets[:, :-1])
    first = np.random.default_rng(0).integers(1, 50, (2, 32), np.int32)
    np.testing.assert_array_equal(batch["encoder_input_tokens"][0], first[0])
    assert FEATURES.describe(batch) == "2 x 32 inputs, 2 x 32 targets"
    with pytest.raises(ValueError, match="vocab_size"):
        FEATURES.random(None)


@pytest.mark.parametrize("lengths", [{"inputs": 8}, {"inputs": 8, "targets": 0}])
def test_a_missing_length_is_refused(lengths):
    with pytest.raises(ValueError, match="needs a length of at least 1 for 'targets'"):
        check_lengths(FEATURES, lengths)
    with pytest.raises(ValueError, match="needs a length of at least 1 for 'targets'"):
        FEATURES.specs(2, lengths)

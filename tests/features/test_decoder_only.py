"""Batches of decoder-only models: hand-worked rows, and SeqIO's converter."""

import numpy as np
import pytest

from upcycle_jax.features import DecoderOnlyFeatures, FeatureConverter, check_lengths, num_rows
from upcycle_jax.features.names import DECODER_ONLY

FEATURES: FeatureConverter = DecoderOnlyFeatures(bos_id=7)
LENGTHS = {"targets": 8}
EXAMPLES = [
    {"targets": [3, 0, 4], "targets_segment_ids": [5, 5, 6]},  # two documents; 0 is a token
    {"targets": [0, 0]},
    {"targets": []},
    {"targets": [9, 8], "targets_segment_ids": [5, 5]},
]


def rows_of(batch):
    return {name: array.tolist() for name, array in batch.items()}


def seqio_rows(features, examples, lengths, *, pack):
    pytest.importorskip("seqio", reason="SeqIO tasks need seqio")
    tf = pytest.importorskip("tensorflow")
    plain_graphs = pytest.importorskip("upcycle_jax.data.plain_graphs")
    names = {name for example in examples for name in example}
    whole = [{name: example.get(name, []) for name in names} for example in examples]
    dataset = tf.data.Dataset.from_generator(
        lambda: iter(whole),
        output_signature={name: tf.TensorSpec([None], tf.int32) for name in names},
    )
    converter = features.seqio_converter(pack=pack)
    # As pipelines are built: without AutoGraph, which takes longer than all the rest.
    converted = plain_graphs.without_autograph(
        lambda: converter(dataset, task_feature_lengths=lengths)
    )
    return list(converted.as_numpy_iterator())


def stacked(rows):
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def assert_equal(ours, theirs):
    assert tuple(ours) == DECODER_ONLY and set(theirs) == set(ours)
    for name in ours:
        assert ours[name].dtype == np.int32 == theirs[name].dtype
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_a_packed_row_by_hand():
    # The first example holds two documents, 3 0 and 4; then 0 0, nothing, and 9 8: four segments,
    # each of which begins with BOS (7), and one position of padding.
    batch = FEATURES.pack([EXAMPLES, []], LENGTHS)
    nothing = [0] * 8
    assert rows_of(batch) == {
        "decoder_input_tokens": [[7, 3, 7, 7, 0, 7, 9, 0], nothing],
        "decoder_target_tokens": [[3, 0, 4, 0, 0, 9, 8, 0], nothing],
        "decoder_loss_weights": [[1, 1, 1, 1, 1, 1, 1, 0], nothing],
        "decoder_segment_ids": [[1, 1, 2, 3, 3, 4, 4, 0], nothing],
        "decoder_positions": [[0, 1, 0, 0, 1, 0, 1, 0], nothing],
    }
    assert FEATURES.real_targets(batch).tolist() == [[True] * 7 + [False], [False] * 8]


def test_documents_see_each_other_where_they_are_not_masked():
    batch = DecoderOnlyFeatures(bos_id=7, mask_documents=False).pack([EXAMPLES], LENGTHS)
    assert rows_of(batch) == {
        "decoder_input_tokens": [[7, 3, 0, 4, 0, 0, 9, 0]],
        "decoder_target_tokens": [[3, 0, 4, 0, 0, 9, 8, 0]],
        "decoder_loss_weights": [[1, 1, 1, 1, 1, 1, 1, 0]],
        "decoder_segment_ids": [[1, 1, 1, 1, 1, 1, 1, 0]],
        "decoder_positions": [[0, 1, 2, 3, 4, 5, 6, 0]],
    }


def test_inputs_are_read_and_not_learnt():
    lengths = {"inputs": 2, "targets": 3}
    examples = [
        {"inputs": [4, 5, 6], "targets": [1, 2]},  # three inputs are cut to two
        {"targets": [0, 3, 1, 9], "inputs": []},
    ]
    assert rows_of(FEATURES.pad(examples, lengths, 2)) == {
        "decoder_input_tokens": [[7, 4, 5, 1, 0], [7, 0, 3, 0, 0]],
        "decoder_target_tokens": [[4, 5, 1, 2, 0], [0, 3, 1, 0, 0]],
        "decoder_loss_weights": [[0, 0, 1, 1, 0], [1, 1, 1, 0, 0]],
        "decoder_segment_ids": [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]],
        "decoder_positions": [[0, 1, 2, 3, 0], [0, 1, 2, 0, 0]],
    }
    assert FEATURES.row_capacity(lengths) == (5,)
    assert FEATURES.row_usage(np.array([[2, 2], [0, 3]])).tolist() == [[4], [3]]
    # Inputs stand in the first document of their targets.
    marked = [{"inputs": [4], "targets": [1, 2, 3], "targets_segment_ids": [1, 2, 2]}]
    segments = FEATURES.pad(marked, lengths, 1)["decoder_segment_ids"]
    assert segments.tolist() == [[1, 1, 2, 2, 0]]


@pytest.mark.parametrize(
    ("mask_documents", "with_inputs"),
    [
        (True, False),
        (False, True),
        pytest.param(True, True, marks=pytest.mark.slow),
        pytest.param(False, False, marks=pytest.mark.slow),
    ],
)
def test_seqio_makes_the_same(mask_documents, with_inputs):
    features = DecoderOnlyFeatures(bos_id=2, mask_documents=mask_documents)
    generator = np.random.default_rng(0)
    lengths = {"inputs": 6, "targets": 10} if with_inputs else {"targets": 16}
    examples = []
    for _ in range(40):
        sizes = {name: int(generator.integers(1, length)) for name, length in lengths.items()}
        example = {name: generator.integers(0, 4, size) for name, size in sizes.items()}
        examples.append(example)
    # SeqIO fills rows in order within a window of as many examples as a row has tokens.
    packed = stacked(seqio_rows(features, examples, lengths, pack=True))
    rows, room = [], 0
    for number, example in enumerate(examples):
        size = sum(len(example[name]) for name in lengths)
        if number % 16 == 0 or size > room:
            rows.append([])
            room = 16
        rows[-1].append(example)
        room -= size
    assert_equal(features.pack(rows, lengths), packed)
    for example in examples:
        documents = generator.integers(1, 4, len(example["targets"]))
        example["targets_segment_ids"] = np.sort(documents)
    for pack in (False, True):  # examples that hold documents are rows already
        padded = stacked(seqio_rows(features, examples, lengths, pack=pack))
        assert_equal(features.pad(examples, lengths, 40), padded)
    assert features.real_targets(packed).sum() == features.real_targets(padded).sum()


def test_features_equal_seqios_own_where_0_is_no_token():
    seqio = pytest.importorskip("seqio", reason="SeqIO tasks need seqio")
    tf = pytest.importorskip("tensorflow")
    examples = [{"targets": np.arange(1, size, dtype=np.int32)} for size in (4, 9, 3, 6)]
    dataset = tf.data.Dataset.from_generator(
        lambda: iter(examples), output_signature={"targets": tf.TensorSpec([None], tf.int32)}
    )
    theirs = seqio.LMFeatureConverter(pack=True)(dataset, task_feature_lengths=LENGTHS)
    ours = seqio_rows(DecoderOnlyFeatures(), examples, LENGTHS, pack=True)
    theirs = stacked(list(theirs.as_numpy_iterator()))
    assert_equal({name: theirs[name] for name in DECODER_ONLY}, stacked(ours))


def test_batches_have_the_promised_shapes():
    for lengths in (LENGTHS, {"inputs": 3, "targets": 5}):
        for packed in (False, True):
            specs = FEATURES.specs(4, lengths, packed=packed)
            batch = FEATURES.pack([EXAMPLES[:1], [], [], []], lengths)
            assert {name: (spec.shape, spec.dtype) for name, spec in specs.items()} == {
                name: (array.shape, array.dtype) for name, array in batch.items()
            }
            assert num_rows(batch) == 4 and FEATURES.targets in batch
    with pytest.raises(ValueError, match="needs a length of at least 1 for 'targets'"):
        check_lengths(FEATURES, {"inputs": 4})
    with pytest.raises(ValueError, match="needs a length of at least 1 for 'inputs'"):
        check_lengths(FEATURES, {"inputs": 0, "targets": 4})
    with pytest.raises(ValueError, match="bos_id"):
        DecoderOnlyFeatures(bos_id=-1)


def test_random_batches_are_the_seeds():
    batch = FEATURES.random(50)
    assert {array.shape for array in batch.values()} == {(2, 32)}
    real = FEATURES.real_targets(batch)
    assert real[0].all() and real[1, :24].all() and not real[1, 24:].any()
    drawn = np.random.default_rng(0).integers(0, 50, (2, 32), np.int32)
    np.testing.assert_array_equal(batch["decoder_target_tokens"], np.where(real, drawn, 0))
    assert FEATURES.describe(batch) == "2 x 32 tokens"
    with pytest.raises(ValueError, match="vocab_size"):
        FEATURES.random(None)

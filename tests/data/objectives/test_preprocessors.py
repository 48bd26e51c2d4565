"""Prefix language modelling and UL2's mixture: every token once, lengths within bounds, modes told,
shares kept.
"""

import collections
import functools

import numpy as np
import pytest

from upcycle_jax.data.objectives import arithmetic
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.features import EncoderDecoderFeatures

tf = pytest.importorskip("tensorflow", reason="SeqIO tasks need TensorFlow")
seqio = pytest.importorskip("seqio", reason="SeqIO tasks need seqio")
preprocessors = pytest.importorskip("upcycle_jax.data.objectives.preprocessors")
plain_graphs = pytest.importorskip("upcycle_jax.data.plain_graphs")

pytestmark = pytest.mark.usefixtures("short_shuffle")
VOCABULARY = seqio.ByteVocabulary(extra_ids=100)
FEATURES = {name: seqio.Feature(VOCABULARY) for name in ("inputs", "targets")}


def _segments(objective, lengths, *, documents=60, size=700, **settings):
    texts = [
        np.random.default_rng(n).integers(100, 259, size=size + n % 60).astype(np.int32)
        for n in range(documents)
    ]
    ragged = tf.RaggedTensor.from_row_lengths(np.concatenate(texts), [len(text) for text in texts])
    dataset = tf.data.Dataset.from_tensor_slices(ragged).map(lambda tokens: {"targets": tokens})
    # As pipelines are built: without AutoGraph, which takes longer than all the rest.
    build = functools.partial(objective, dataset, lengths, FEATURES, **settings)
    with seqio.utils.map_seed_manager(3):
        return texts, list(plain_graphs.without_autograph(build).as_numpy_iterator())


def test_prefix_lm_splits_each_segment_in_two():
    texts, segments = _segments(preprocessors.prefix_lm, {"inputs": 64, "targets": 64})
    joined = np.concatenate(
        [np.concatenate([segment["inputs"], segment["targets"]]) for segment in segments]
    )
    np.testing.assert_array_equal(joined, np.concatenate(texts))
    ends = np.array([len(segment["targets"]) for segment in segments[:-1]])
    assert ends.min() < 5 and ends.max() > 58 and abs(ends.mean() - 32) < 3  # uniform over 1..63
    assert max(len(segment["inputs"]) for segment in segments) < 64


def test_prefix_lm_with_short_targets():
    _, segments = _segments(preprocessors.prefix_lm, {"inputs": 64, "targets": 8})
    assert {len(segment["targets"]) for segment in segments} == set(range(1, 8))
    with pytest.raises(
        ValueError, match="leave a prefix language model no text: give 2 tokens or more"
    ):
        preprocessors.prefix_lm(
            tf.data.Dataset.from_tensors({"targets": [5]}), {"inputs": 64, "targets": 1}, FEATURES
        )


def test_ul2_tells_the_mode_and_keeps_the_shares():
    lengths = {"inputs": 128, "targets": 128}
    _, segments = _segments(preprocessors.ul2, lengths, documents=1600, size=300)
    modes = collections.Counter(
        VOCABULARY.decode(segment["inputs"][:6].tolist()) for segment in segments
    )
    assert set(modes) == {"[NLU] ", "[NLG] ", "[S2S] "}
    shares = {mode: count / len(segments) for mode, count in modes.items()}
    # 200 groups of 8 documents, one mode each: a share p has a standard deviation of about (p /
    #   200) ** 0.5 < 0.054.
    assert (
        abs(shares["[NLU] "] - 2 / 7) < 0.12
        and abs(shares["[NLG] "] - 4 / 7) < 0.16
        and abs(shares["[S2S] "] - 1 / 7) < 0.09
    )
    assert all(
        len(segment[name]) < lengths[name] for segment in segments for name in lengths
    )  # room for EOS


def test_ul2_at_t5_lengths_says_how_many_sentinels_it_needs():
    dataset = tf.data.Dataset.from_tensors({"targets": tf.zeros([10], tf.int32)})
    with pytest.raises(
        ValueError,
        match=(
            r"needs 12\d sentinels, but the vocabulary has 100 extra ids: make it with"
            r" extra_ids=12\d or more"
        ),
    ):
        preprocessors.ul2(dataset, {"inputs": 512, "targets": 512}, FEATURES)
    with pytest.raises(ValueError, match=r"density 0\.5.*set it to \d+ or more"):
        preprocessors.ul2(dataset, {"inputs": 128, "targets": 32}, FEATURES)


@pytest.mark.parametrize("size", [1, 5, arithmetic.span_lengths(64).raw])
def test_tiny_and_exact_groups(size):
    texts, segments = _segments(
        preprocessors.span_corruption, {"inputs": 64, "targets": 16}, documents=1, size=size
    )
    tokens = np.concatenate(
        [np.concatenate([segment["inputs"], segment["targets"]]) for segment in segments]
    )
    assert len(segments) == 1
    np.testing.assert_array_equal(np.sort(tokens[tokens < 259]), np.sort(texts[0]))


def test_objective_names_agree():
    from upcycle_jax.data import config

    assert tuple(preprocessors.OBJECTIVES) == config.OBJECTIVE_NAMES


def test_text_files_with_another_objective(make_config):
    config = make_config(
        mixture_or_task_name="small_text_prefix",
        objective="prefix_lm",
        task_feature_lengths={"inputs": 64, "targets": 64},
    )
    batch = next(open_dataset(config, EncoderDecoderFeatures()).train_iterator())
    assert (batch["encoder_input_tokens"] < 259).all() and (
        batch["decoder_target_tokens"] < 259
    ).all()
    with pytest.raises(ValueError, match="objective is 'gpt': choose one of"):
        make_config(objective="gpt")


def test_rows_of_language_modelling_hold_all_documents():
    features = {"targets": seqio.Feature(VOCABULARY)}
    documents = [[5, 6, 7, 1], [8, 1], [9, 9, 9, 9, 9, 1]]
    dataset = tf.data.Dataset.from_tensor_slices(tf.ragged.constant(documents)).map(
        lambda tokens: {"targets": tokens}
    )
    rows = list(
        preprocessors.language_modeling(dataset, {"targets": 5}, features).as_numpy_iterator()
    )
    # 5 6 7 1 | 8 1 | 9 9 9 9 9 1, cut at every fifth token.
    assert [(row["targets"].tolist(), row["targets_segment_ids"].tolist()) for row in rows] == [
        ([5, 6, 7, 1, 8], [1, 1, 1, 1, 2]),
        ([1, 9, 9, 9, 9], [1, 2, 2, 2, 2]),
        ([9, 1], [1, 1]),
    ]
    with pytest.raises(ValueError, match="language modelling needs a length for 'targets'"):
        preprocessors.language_modeling(dataset, {}, features)
    without_eos = {"targets": seqio.Feature(seqio.PassThroughVocabulary(9))}
    with pytest.raises(ValueError, match="states no EOS, which language modelling puts between"):
        preprocessors.language_modeling(dataset, {"targets": 5}, without_eos)


def test_corruption_without_inputs_names_the_objective_that_needs_none():
    for objective in (preprocessors.span_corruption, preprocessors.prefix_lm):
        with pytest.raises(ValueError, match="length for 'inputs'.* 'language_modeling'"):
            objective(tf.data.Dataset.from_tensors({"targets": [5]}), {"targets": 8}, FEATURES)

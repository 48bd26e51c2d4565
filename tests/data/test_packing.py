"""Packing: rows are as full as their order allows, and the features are those that SeqIO makes."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from upcycle_jax.data import packing


def test_hand_worked_rows():
    # Rows of 10 inputs and 4 targets: (4,1)(6,3) fill one; (5,1) stands alone because (6,1) makes
    # 11; (20,1) is cut and fills one.
    lengths = np.array([[4, 1], [6, 3], [5, 1], [6, 1], [20, 1], [1, 1], [1, 4]])
    assert packing.row_starts(lengths, (10, 4)).tolist() == [0, 2, 3, 4, 5, 6, 7]


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), min_size=1, max_size=60))
def test_rows_fit_and_no_row_could_take_one_more(lengths):
    table = np.minimum(np.array(lengths), (10, 4))
    starts = packing.row_starts(np.array(lengths), (10, 4))
    assert starts[0] == 0 and starts[-1] == len(lengths)
    for start, stop in itertools.pairwise(starts):
        assert (table[start:stop].sum(axis=0) <= (10, 4)).all()
        if stop < len(lengths):
            assert (table[start : stop + 1].sum(axis=0) > (10, 4)).any()


@pytest.fixture
def plan():
    """A plan over an endless stream of random lengths, and the numbers of its calls."""
    asked = []

    def lengths(first, count):
        asked.append(first)
        return np.random.default_rng(first).integers(1, 5, size=(count, 2))

    return packing.PackingPlan(lengths, (8, 8)), asked


def test_a_plan_covers_the_stream_once_and_is_found_again(plan):
    plan, asked = plan
    rows = [plan.row(number) for number in range(6000)]
    assert [example for row in rows for example in row] == list(range(rows[-1].stop))
    assert rows[-1].stop > 2 * packing.WINDOW
    assert plan.row(3) == rows[3]
    anchor = plan.anchor(5999)
    del asked[:]
    plan.start_from(anchor)
    plan._known.clear()
    assert plan.row(5999) == rows[5999] and asked == [anchor["window"] * packing.WINDOW]
    assert plan.row(0) == rows[0]


def test_features_equal_seqios():
    seqio = pytest.importorskip("seqio", reason="SeqIO tasks need seqio")
    tf = pytest.importorskip("tensorflow")
    generator = np.random.default_rng(0)
    examples = [
        {
            name: generator.integers(3, 50, size=generator.integers(1, 9)).astype(np.int32)
            for name in ("inputs", "targets")
        }
        for _ in range(40)
    ]
    lengths = {"inputs": 16, "targets": 12}
    dataset = tf.data.Dataset.from_generator(
        lambda: iter(examples),
        output_signature={name: tf.TensorSpec([None], tf.int32) for name in lengths},
    )
    theirs = list(
        seqio.EncDecFeatureConverter(pack=False)(
            dataset, task_feature_lengths=lengths
        ).as_numpy_iterator()
    )
    ours = packing.padded_rows(
        [e["inputs"] for e in examples], [e["targets"] for e in examples], (16, 12), 41
    )
    for name in theirs[0]:
        np.testing.assert_array_equal(ours[name][:40], [row[name] for row in theirs], err_msg=name)
        assert ours[name].dtype == np.int32 and not ours[name][40].any()
    # SeqIO keeps several rows open and fills the first that has room: each of its rows, given as
    # examples, makes the same features here.
    packed = list(
        seqio.EncDecFeatureConverter(pack=True)(
            dataset, task_feature_lengths=lengths
        ).as_numpy_iterator()
    )
    for row in packed:
        parts = {
            side: [
                row[tokens][row[f"{side}_segment_ids"] == number]
                for number in range(1, row[f"{side}_segment_ids"].max() + 1)
            ]
            for side, tokens in (
                ("encoder", "encoder_input_tokens"),
                ("decoder", "decoder_target_tokens"),
            )
        }
        again = packing.packed_rows([parts["encoder"]], [parts["decoder"]], (16, 12))
        assert again.keys() == row.keys()
        for name in row:
            np.testing.assert_array_equal(again[name][0], row[name], err_msg=name)

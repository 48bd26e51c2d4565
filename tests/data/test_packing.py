"""Packing: rows are as full as their order allows, and any row is found again."""

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

"""Where a run and its optimizer state started, out of what checkpoints record."""

import pytest

from upcycle_jax.training.run_start import (
    STATE_START,
    Starts,
    counted_from,
    recorded,
    state_start,
)


def test_offsets():
    assert counted_from(7, 3) == counted_from(7, None) == 7
    assert (counted_from("start", 3), counted_from("start", None)) == (3, 0)


def test_what_is_recorded_is_read_again():
    record = Starts(run=5, state=2).record()
    assert recorded(record, "run_start", at_most=9) == 5
    assert state_start(record, at_most=9) == 2
    for damaged in ("5", -1, 10, None):
        assert recorded({"run_start": damaged}, "run_start", at_most=9) is None


def conversion(**recipe):
    return {"surgery": {"recipe": {"type": "Recipe", **recipe}, "source_step": 40}}


@pytest.mark.parametrize(
    ("record", "want"),
    [
        ({}, 0),
        (conversion(optimizer_state="reset", step="keep"), 40),
        (conversion(optimizer_state="reset", step="keep_or_zero"), 40),
        (conversion(optimizer_state="reset", step="reset"), 0),
        (conversion(optimizer_state="reset", step=30), 30),
        (conversion(optimizer_state="tiled", step="keep"), 0),
        # A run that went on from it with its state, and one that started the state again.
        (conversion(optimizer_state="reset", step="keep") | {STATE_START: 45}, 45),
        ({"surgery": None}, 0),
        ({"surgery": {"recipe": {"optimizer_state": "reset"}}}, 0),
    ],
)
def test_the_state_of_a_conversion_started_with_it(record, want):
    assert state_start(record, at_most=50) == want

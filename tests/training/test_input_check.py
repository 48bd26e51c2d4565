"""The input check, with a clock of its own: silent where devices are busy, once where they wait."""

import logging

import pytest

from upcycle_jax.training.input_check import InputCheck


class Clock:
    """Seconds that only batches and steps take."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def batches(clock, seconds):
    """Batches that take so many seconds each."""
    while True:
        clock.now += seconds
        yield {}


def asked(advice=lambda: "Cache it"):
    clock = Clock()
    return InputCheck(advice, clock=clock), clock


def period(check, clock, *, wait, busy, steps=10, done=True):
    """Steps of `busy` seconds after batches of `wait` seconds, and what is said of them."""
    stream, began = batches(clock, wait), clock.now
    for _ in range(steps):
        assert check.take(stream, lambda: done) == {}
        clock.now += busy
    return check.look(clock.now - began)


@pytest.mark.parametrize(
    ("wait", "busy", "done", "is_said"),
    [
        (0.0, 0.5, True, False),
        (1.0, 9.0, True, False),  # 10 of 100 s: a tenth, no more.
        (0.0625, 0.4375, True, True),  # 0.625 of 5 s: an eighth.
        (0.4, 0.1, True, True),
        (0.4, 0.1, False, False),  # The devices were not done with what they had.
        (0.04, 0.01, True, False),  # Half a second in all: too short to tell.
    ],
)
def test_more_than_a_tenth_of_a_period_deserves_a_warning(wait, busy, done, is_said):
    check, clock = asked()
    assert (period(check, clock, wait=wait, busy=busy, done=done) is not None) == is_said


def test_once_with_numbers_and_what_helps(caplog):
    check, clock = asked(lambda: "A cache helps")
    with caplog.at_level(logging.WARNING):
        assert period(check, clock, wait=0.0, busy=0.5) is None
        # 10 x 0.3 of 10 x 0.4 s.
        said = period(check, clock, wait=0.3, busy=0.1)
        assert period(check, clock, wait=0.3, busy=0.1) is None
    assert said == caplog.messages[0] and len(caplog.messages) == 1
    assert "of the 4.0 s since the last report 3.0 s (75%) were waited for" in said
    assert said.endswith("came. A cache helps.")


def test_periods_are_judged_by_themselves():
    check, clock = asked()
    assert period(check, clock, wait=0.5, busy=7.5) is None  # 5 of 80 s
    assert period(check, clock, wait=0.5, busy=7.5) is None  # 5 of 80 s, not 10


def test_advice_is_asked_for_only_where_it_is_given():
    def advice():
        raise AssertionError

    check, clock = asked(advice)
    assert period(check, clock, wait=0.0, busy=1.0) is None
    with pytest.raises(AssertionError):
        period(check, clock, wait=1.0, busy=1.0)

"""The limit above which a loss is a spike, and the window that it is made of."""

import math

import numpy as np
import pytest

from upcycle_jax.training.spikes import LossHistory, LossSpikes, spike_limit


def history(losses, *, window=8, factor=10.0, first=1):
    made = LossHistory(LossSpikes(window=window, factor=factor))
    for step, loss in enumerate(losses, first):
        made.add(step, loss)
    return made


def test_the_limit_by_hand():
    # Median 3, deviations 2 1 0 1 2: MAD 1. 3 + 5 * 1.4826 = 10.413.
    assert spike_limit([1.0, 2.0, 3.0, 4.0, 5.0], factor=5) == pytest.approx(10.413)
    # Equal losses: a spread of 1 % of the median is assumed. 2 + 10 * 0.02 = 2.2.
    assert spike_limit([2.0] * 6, factor=10) == pytest.approx(2.2)
    # Below zero, as summed log-probabilities may be: -2 + 10 * 0.02.
    assert spike_limit([-2.0] * 6, factor=10) == pytest.approx(-1.8)


def test_spikes_in_the_window_hardly_move_the_limit():
    quiet = list(np.random.default_rng(0).normal(3.0, 0.1, 128))
    calm = spike_limit(quiet, factor=10)
    assert 3.9 < calm < 4.2  # ten standard deviations of 0.1 above 3
    assert spike_limit([*quiet[:98], *([50.0] * 30)], factor=10) < 4.6


def test_nothing_is_a_spike_before_half_a_window_is_known():
    # The limit of step s is made of losses up to step s - 3: four are known at step 7.
    assert [math.isfinite(history([2.0] * (step - 1)).limit(step)) for step in (5, 6, 7, 8)] == [
        False,
        False,
        True,
        True,
    ]


def test_the_limit_of_a_step_does_not_depend_on_how_far_the_host_has_looked():
    losses = list(np.random.default_rng(1).normal(3.0, 0.5, 40))
    assert len({history(losses[:known]).limit(31) for known in (28, 29, 30)}) == 1
    assert history(losses[:28]).limit(31) == np.float32(spike_limit(losses[20:28], factor=10))


def test_a_record_gives_back_the_same_history():
    losses = list(np.random.default_rng(2).normal(3.0, 0.5, 40))
    before = history(losses[:25])
    after = LossHistory(LossSpikes(window=8), before.record())
    for step, loss in enumerate(losses[25:], 26):
        assert before.limit(step) == after.limit(step)
        before.add(step, loss)
        after.add(step, loss)


def test_a_loss_that_is_no_number_is_left_out():
    assert history([2.0, math.nan, 2.0, math.inf, 2.0, 2.0]).limit(20) == pytest.approx(2.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"policy": "ignore"},
            r"policy is 'ignore': choose 'stop' or 'skip', or set Trainer.loss_spikes to None",
        ),
        ({"window": 3}, r"window must be at least 4, got 3"),
        ({"factor": 0}, r"factor must be above 0, got 0"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        LossSpikes(**arguments)

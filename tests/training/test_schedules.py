"""Learning-rate factors against their formulas."""

import math

import numpy as np
import pytest

from upcycle_jax.training.schedules import create_learning_rate_scheduler


@pytest.mark.parametrize(
    ("factors", "step", "want"),
    [
        ("constant * linear_warmup * rsqrt_decay", 0, 1e-8),  # T5X's floor
        ("constant * linear_warmup * rsqrt_decay", 500, 0.5 * 0.5 / math.sqrt(1000)),
        ("constant * linear_warmup * rsqrt_decay", 1000, 0.5 / math.sqrt(1000)),
        (
            "constant * rsqrt_decay",
            1_000_000,
            0.5 / 1000,
        ),  # where the paper's dense checkpoints stop
        ("rsqrt_normalized_decay", 1000, 1.0),
        ("rsqrt_normalized_decay", 4000, 0.5),
        ("constant", 7, 0.5),
        ("constant * decay_every", 250, 0.5 * 0.25),
        ("constant * cosine_decay", 1000 + 500, 0.5 * 0.5 * (1 + math.cos(math.pi * 0.5))),
        ("constant*cosine_decay", 1000, 0.5),
        ("linear_decay", 500, 0.25),
        ("linear_decay", 1002, 0.5 * (1 + 0.5 * -2)),
    ],
)
def test_values(factors, step, want):
    schedule = create_learning_rate_scheduler(
        factors,
        base_learning_rate=0.5,
        warmup_steps=1000,
        decay_factor=0.5,
        steps_per_decay=100,
        steps_per_cycle=1000,
    )
    np.testing.assert_allclose(schedule(step), max(want, 1e-8), rtol=1e-6)
    assert schedule(step).dtype == np.float32


def test_step_offset_restarts_the_schedule():
    plain, shifted = (
        create_learning_rate_scheduler(warmup_steps=10, step_offset=offset)
        for offset in (0, 1_000_000)
    )
    for step in (0, 3, 10, 400):
        assert plain(step) == shifted(1_000_000 + step)


def test_unknown_factor_names_the_known_ones():
    with pytest.raises(
        ValueError,
        match=r"unknown learning-rate factor 'warmup'.*constant.*linear_warmup.*rsqrt_decay",
    ):
        create_learning_rate_scheduler("constant * warmup")


def test_no_warmup():
    assert create_learning_rate_scheduler("constant * cosine_decay", warmup_steps=0)(0) == 0.5
    with pytest.raises(ValueError, match="by which linear_warmup and rsqrt_decay would divide"):
        create_learning_rate_scheduler("linear_warmup * rsqrt_decay", warmup_steps=0)

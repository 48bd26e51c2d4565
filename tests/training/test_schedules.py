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
        ("rsqrt_timescale", 999, 1.0),
        ("constant * rsqrt_timescale", 31_000, 0.5 / math.sqrt(1 + 3)),  # timescale 10,000
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


def ending(factors, **settings):
    return create_learning_rate_scheduler(
        factors, **{"base_learning_rate": 1.0, "warmup_steps": 10, "total_steps": 110} | settings
    )


@pytest.mark.parametrize(
    ("factors", "step", "want"),
    [
        # Ten steps of warm-up, then half a cosine over 100 to a tenth.
        ("constant * linear_warmup * cosine_anneal", 5, 0.5),
        ("constant * linear_warmup * cosine_anneal", 10, 1.0),
        ("constant * linear_warmup * cosine_anneal", 60, 0.1 + 0.9 * 0.5),
        ("constant * linear_warmup * cosine_anneal", 35, 0.1 + 0.9 * (2 + math.sqrt(2)) / 4),
        ("constant * linear_warmup * cosine_anneal", 110, 0.1),
        ("constant * linear_warmup * cosine_anneal", 500, 0.1),
        # The last 40 steps begin at 70; at 80 a quarter of them is done.
        ("constant * linear_warmup * linear_cooldown", 5, 0.5),
        ("constant * linear_warmup * linear_cooldown", 70, 1.0),
        ("constant * linear_warmup * linear_cooldown", 80, 1 - 0.9 * 0.25),
        ("constant * linear_warmup * sqrt_cooldown", 70, 1.0),
        ("constant * linear_warmup * sqrt_cooldown", 80, 1 - 0.9 * 0.5),
        ("constant * linear_warmup * sqrt_cooldown", 110, 0.1),
        ("constant * linear_warmup * sqrt_cooldown", 111, 0.1),
    ],
)
@pytest.mark.parametrize("offset", [0, 1000])
def test_schedules_with_an_end(factors, step, want, offset):
    schedule = ending(
        factors,
        cooldown_steps=40,
        final_factor=0.1,
        step_offset=offset,
        total_steps=110 + offset,
    )
    np.testing.assert_allclose(schedule(offset + step), want, rtol=1e-6)


VISION = {"base_learning_rate": 4e-4, "warmup_steps": 10_000, "timescale": 100_000}
TRUNK = "constant * linear_warmup * rsqrt_timescale"


def vision_rate(step, *, total=None, straight=False):
    """The schedule of the paper's vision models in float64: V-MoE's tail or big_vision's."""
    first = step if total is None else min(step, total - 50_000)
    held = first if straight else step
    rate = 4e-4 * min(1.0, step / 10_000) / math.sqrt(1 + max(0, held - 10_000) / 100_000)
    return rate if total is None else rate * min(1.0, (total - step) / 50_000)


@pytest.mark.parametrize("step", [1, 5_000, 10_000, 110_000, 519_999, 520_000, 540_000, 570_000])
def test_the_schedule_of_vision_transformers(step):
    """A warm-up of 10k steps to 4e-4, a timescale of 100k, a cool-down of 50k from 520k on."""
    trunk = create_learning_rate_scheduler(TRUNK, **VISION, min_learning_rate=0.0)
    np.testing.assert_allclose(trunk(step), vision_rate(step), rtol=1e-6)
    for factor in ("linear_cooldown", "straight_cooldown"):
        schedule = create_learning_rate_scheduler(
            f"{TRUNK} * {factor}",
            **VISION,
            min_learning_rate=0.0,
            total_steps=570_000,
            cooldown_steps=50_000,
        )
        want = vision_rate(step, total=570_000, straight=factor == "straight_cooldown")
        np.testing.assert_allclose(schedule(step), want, rtol=1e-5)
        assert schedule(step) == 0 if step == 570_000 else schedule(step) > 0
    # By hand: 4e-4 / sqrt(1 + 510/100) = 1.6195e-4 at 520k; 60 % of that at 540k in a straight
    # line, and 60 % of 4e-4 / sqrt(1 + 530/100) = 1.5937e-4 by the product.
    if step == 540_000:
        assert want == pytest.approx(0.6 * 1.6195e-4, rel=1e-4)
        assert vision_rate(step, total=570_000) == pytest.approx(0.6 * 1.5937e-4, rel=1e-4)


@pytest.mark.parametrize("factor", ["linear_cooldown", "straight_cooldown", "sqrt_cooldown"])
def test_a_branch_leaves_the_trunk_where_its_cool_down_begins(factor):
    """Nothing before the cool-down depends on where a run ends."""
    settings = {"base_learning_rate": 1.0, "warmup_steps": 10, "timescale": 20}
    trunk = create_learning_rate_scheduler(TRUNK, **settings)
    for end in (60, 90):
        branch = create_learning_rate_scheduler(
            f"{TRUNK} * {factor}", **settings, total_steps=end, cooldown_steps=15
        )
        for step in range(end - 15 + 1):
            assert branch(step) == trunk(step)
        assert branch(end - 14) < trunk(end - 14)


def test_a_schedule_that_starts_with_the_run():
    schedule = ending("constant * linear_warmup * cosine_anneal", step_offset="start")
    assert schedule.started_at(0) == ending("constant * linear_warmup * cosine_anneal")
    late = schedule.started_at(50)
    # 60 steps remain, 10 of warm-up and half a cosine over 50.
    np.testing.assert_allclose([late(55), late(60), late(85)], [0.5, 1.0, 0.5], rtol=1e-6)
    with pytest.raises(ValueError, match=r"has 10 steps \(from step 100 to total_steps 110\)"):
        schedule.started_at(100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": None}, "cosine_anneal ends at total_steps, which is not set"),
        ({"total_steps": 10}, "its warm-up takes 10: raise TRAIN_STEPS"),
        ({"factors": "constant * sqrt_cooldown"}, "sqrt_cooldown lasts cooldown_steps, which is 0"),
        ({"factors": "constant * straight_cooldown"}, "straight_cooldown lasts cooldown_steps"),
        ({"timescale": 0}, "timescale"),
        (
            {"factors": "linear_warmup * linear_cooldown", "cooldown_steps": 101},
            "takes 10 and its cool-down 101",
        ),
        ({"final_factor": 1.5}, "final_factor"),
        ({"step_offset": "now"}, "step_offset"),
    ],
)
def test_schedules_that_cannot_end(settings, message):
    with pytest.raises(ValueError, match=message):
        ending(**{"factors": "constant * cosine_anneal"} | settings)

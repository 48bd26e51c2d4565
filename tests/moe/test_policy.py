"""Routing policies: which one settings ask for, and what it decides."""

import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.grouping import Grouping
from upcycle_jax.moe.policy import (
    Grouped,
    PerSequence,
    PerToken,
    T5x,
    expert_capacity,
    layer_sizes,
    routing_policy,
)
from upcycle_jax.moe.routing import DroplessTopK, ExpertsChoose, SoftMoe, TokensChoose


@pytest.mark.parametrize(
    ("settings", "router", "policy"),
    [
        ({}, TokensChoose(), Grouped),
        ({}, DroplessTopK(), Grouped),
        ({"t5x_mode": True}, ExpertsChoose(), T5x),
        ({}, SoftMoe(), PerSequence),
        ({"independent": True}, ExpertsChoose(), PerSequence),
        ({"independent": True}, TokensChoose(), PerToken),
    ],
)
def test_settings_and_router_decide_the_policy(settings, router, policy):
    assert type(routing_policy(MoeSettings(**settings), router)) is policy


@pytest.mark.parametrize(
    ("group_size", "num_experts", "factor", "expected"),
    [
        (4096, 32, 2.0, 256),  # 2 * 4096 / 32
        (4096, 32, 1.25, 160),
        (100, 8, 1.0, 12),  # 12.5 rounds half to even, as Python and therefore Flaxformer do
        (108, 8, 1.0, 14),  # 13.5 -> 14
        (16, 32, 1.0, 4),  # 0.5 -> 0, and never below 4
    ],
)
def test_capacity(group_size, num_experts, factor, expected):
    assert expert_capacity(group_size, num_experts=num_experts, capacity_factor=factor) == expected


def test_minimum_capacity_is_a_setting():
    assert expert_capacity(16, num_experts=32, capacity_factor=1.0, min_expert_capacity=1) == 1


@pytest.mark.parametrize(
    ("group_size", "rounding", "multiple", "expected", "effective"),
    [
        # ViT-B/32 has 49 tokens: 2 * 49 / 32 = 3.0625 slots.
        (49, "round", 1, 3, 1.96),  # 3 * 32 / 49
        (49, "ceil", 1, 4, 2.61),  # 4 * 32 / 49
        (49, "ceil", 4, 4, 2.61),
        # ViT-B/16 has 196: 12.25 slots.
        (196, "round", 1, 12, 1.96),  # 12 * 32 / 196
        (196, "ceil", 1, 13, 2.12),  # 13 * 32 / 196
        (196, "ceil", 4, 16, 2.61),  # V-MoE's default: 16 * 32 / 196
        (196, "floor", 1, 12, 1.96),
        (1568, "ceil", 4, 100, 2.04),  # 8 images: 98 slots, filled up to 100
    ],
)
def test_capacity_is_rounded_as_asked_for(group_size, rounding, multiple, expected, effective):
    settings = MoeSettings(
        group_size=group_size,
        min_expert_capacity=1,
        capacity_rounding=rounding,
        capacity_multiple=multiple,
    )
    sizes = layer_sizes(settings, ExpertsChoose(), 1, group_size, train=True)
    assert sizes.capacity == expected
    assert round(sizes.effective_factor, 2) == effective


def test_sizes_by_hand():
    # 4 rows of 8 tokens, groups of 16, 8 experts at capacity factor 2: 2 groups, 4 slots each.
    config = MoeSettings(num_experts=8, group_size=16, min_expert_capacity=1)
    sizes = layer_sizes(config, TokensChoose(), 4, 8, train=True)
    assert sizes.grouping == Grouping(2, 16)
    assert (sizes.capacity, sizes.slots, sizes.rows) == (4, 4, 2 * 8 * 4)
    # Eight devices: six spare groups, whose slots are nobody's.
    spread = layer_sizes(config, TokensChoose(), 4, 8, train=True, batch_shards=8)
    assert spread.grouping == Grouping(2, 16, spare_groups=6) and spread.rows == sizes.rows


def test_a_sequence_has_the_capacity_of_its_own_length():
    config = MoeSettings(num_experts=4, independent=True)
    policy = routing_policy(config, ExpertsChoose())
    real = jnp.arange(8) < jnp.array([8, 3, 0])[:, None]
    # 2 * 8 / 4, round(2 * 3 / 4 = 1.5), and the least there is.
    np.testing.assert_array_equal(policy.limits(real, train=False), [4, 2, 1])


def test_padding_is_routed_and_counts_in_t5x_mode_alone():
    real = jnp.array([True, True, False, False])
    off = {"ignore_padding_tokens": False}
    kinds = ({}, off, {"t5x_mode": True}, {"t5x_mode": True, "ignore_padding_tokens": True})
    ours, asked, theirs, ignoring = (
        routing_policy(MoeSettings(**settings), TokensChoose()) for settings in kinds
    )
    assert asked.routable(real).tolist() == theirs.routable(real).tolist() == [True] * 4
    assert ours.routable(real).tolist() == ignoring.routable(real).tolist() == real.tolist()
    for policy, counted, count in ((ours, 2, 2), (asked, 2, 2), (theirs, 4, 4), (ignoring, 2, 4)):
        found = policy.counted(real)
        assert (float(jnp.sum(found[0])), float(found[1])) == (counted, count)


def test_slots_that_are_computed_first():
    # 64 tokens with two choices each over 8 experts: an even share of 16, four times that.
    assert routing_policy(MoeSettings(num_experts=8), DroplessTopK()).first_slots(64) == 64
    independent = MoeSettings(num_experts=32, independent=True)
    assert routing_policy(independent, TokensChoose()).first_slots(64) == 16
    assert routing_policy(independent, TokensChoose()).first_slots(8) == 8
    assert routing_policy(MoeSettings(num_experts=8), TokensChoose()).first_slots(64) is None

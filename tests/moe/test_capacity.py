"""Groups and capacities, by hand."""

import pytest

from upcycle_jax.moe import capacity


def test_a_batch_that_fits_is_one_group():
    assert capacity.default_grouping(1000, max_group_size=4096) == capacity.Grouping(
        num_groups=1, group_size=1000
    )


def test_larger_batches_are_cut_into_full_groups():
    assert capacity.default_grouping(3 * 4096, max_group_size=4096) == capacity.Grouping(
        num_groups=3, group_size=4096
    )


def test_tokens_that_do_not_divide_are_refused_with_the_nearest_group_size():
    # 5000 = 2^3 * 5^4; its largest divisor up to 4096 is 2500.
    with pytest.raises(ValueError, match=r"5000 tokens .*GROUP_SIZE=4096.* 2500"):
        capacity.default_grouping(5000, max_group_size=4096)
    # A prime has no other divisor than 1.
    with pytest.raises(ValueError, match=r"4099 tokens .* is 1:"):
        capacity.default_grouping(4099, max_group_size=4096)


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
    assert (
        capacity.expert_capacity(group_size, num_experts=num_experts, capacity_factor=factor)
        == expected
    )


def test_minimum_capacity_is_a_setting():
    assert (
        capacity.expert_capacity(16, num_experts=32, capacity_factor=1.0, min_expert_capacity=1)
        == 1
    )


@pytest.mark.parametrize(
    ("batch", "length", "max_group", "experts", "replicas", "expected"),
    [
        # 64 tokens, at least 4 groups (a multiple of 4 experts) although one group of 64 would fit.
        (8, 8, 4096, 4, 1, capacity.Grouping(4, 16)),
        # Two replicas of 4 experts: 8 groups.
        (8, 8, 4096, 4, 2, capacity.Grouping(8, 8)),
        # 1024 tokens in groups of at most 100: 1024 // 100 = 10; 12 is a multiple of 4 but does not
        #   divide 1024; 16 does both.
        (32, 32, 100, 4, 1, capacity.Grouping(16, 64)),
        # 3 * 5 = 15 tokens, 4 experts: one more row gives 20, which is a multiple of 4 (5 tokens);
        # one more column gives 18, which is not, three give 24 (9 tokens): the row is cheaper.
        (3, 5, 4096, 4, 1, capacity.Grouping(4, 5, batch_padding=1)),
        # The transpose: the column is cheaper.
        (5, 3, 4096, 4, 1, capacity.Grouping(4, 5, length_padding=1)),
        # 3 * 3 = 9 tokens: one row or one column each give 12. A tie goes to the sequence.
        (3, 3, 4096, 4, 1, capacity.Grouping(4, 3, length_padding=1)),
    ],
)
def test_t5x_grouping(batch, length, max_group, experts, replicas, expected):
    grouping = capacity.t5x_grouping(
        batch, length, max_group_size=max_group, num_experts=experts, num_expert_replicas=replicas
    )
    assert grouping == expected
    assert grouping.num_groups * grouping.group_size == (batch + grouping.batch_padding) * (
        length + grouping.length_padding
    )

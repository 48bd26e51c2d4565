"""Groups, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax.moe.grouping import Grouping, ample_grouping, even_grouping, t5x_grouping


def test_a_batch_that_fits_is_one_group():
    assert even_grouping(1000, max_group_size=4096) == Grouping(num_groups=1, group_size=1000)


def test_larger_batches_are_cut_into_full_groups():
    assert even_grouping(3 * 4096, max_group_size=4096) == Grouping(num_groups=3, group_size=4096)


def test_tokens_that_do_not_divide_are_refused_with_the_nearest_group_size():
    # 5000 = 2^3 * 5^4; its largest divisor up to 4096 is 2500.
    with pytest.raises(ValueError, match=r"5000 tokens .*GROUP_SIZE=4096.* 2500"):
        even_grouping(5000, max_group_size=4096)
    # A prime has no other divisor than 1.
    with pytest.raises(ValueError, match=r"4099 tokens .* is 1:"):
        even_grouping(4099, max_group_size=4096)


@pytest.mark.parametrize(
    ("batch", "length", "max_group", "experts", "replicas", "expected"),
    [
        # 64 tokens, at least 4 groups (a multiple of 4 experts) although one group of 64 would fit.
        (8, 8, 4096, 4, 1, Grouping(4, 16)),
        # Two replicas of 4 experts: 8 groups.
        (8, 8, 4096, 4, 2, Grouping(8, 8)),
        # 1024 tokens in groups of at most 100: 1024 // 100 = 10; 12 is a multiple of 4 but does not
        #   divide 1024; 16 does both.
        (32, 32, 100, 4, 1, Grouping(16, 64)),
        # 3 * 5 = 15 tokens, 4 experts: one more row gives 20, which is a multiple of 4 (5 tokens);
        # one more column gives 18, which is not, three give 24 (9 tokens): the row is cheaper.
        (3, 5, 4096, 4, 1, Grouping(4, 5, batch_padding=1)),
        # The transpose: the column is cheaper.
        (5, 3, 4096, 4, 1, Grouping(4, 5, length_padding=1)),
        # 3 * 3 = 9 tokens: one row or one column each give 12. A tie goes to the sequence.
        (3, 3, 4096, 4, 1, Grouping(4, 3, length_padding=1)),
    ],
)
def test_t5x_grouping(batch, length, max_group, experts, replicas, expected):
    grouping = t5x_grouping(
        batch, length, max_group_size=max_group, num_experts=experts, num_expert_replicas=replicas
    )
    assert grouping == expected
    assert grouping.num_groups * grouping.group_size == (batch + grouping.batch_padding) * (
        length + grouping.length_padding
    )


def test_the_fewest_groups_that_divide_over_the_shards():
    # 96 tokens in groups of at most 40: 3 groups of 32; over 4 shards, 4 groups of 24.
    assert ample_grouping(96, max_group_size=40, multiple_of=1) == Grouping(3, 32)
    assert ample_grouping(96, max_group_size=40, multiple_of=4) == Grouping(4, 24)
    # 15 tokens do not divide over 4 shards: the fewest groups whatever the mesh.
    assert ample_grouping(15, max_group_size=8, multiple_of=4) == Grouping(3, 5)


def test_split_and_join_by_hand():
    # Two rows of three, a column of padding, groups of four, and a spare one for three devices.
    grouping = Grouping(2, 4, length_padding=1).divided_over(3)
    x = jnp.arange(1, 7).reshape(2, 3)
    groups = grouping.split(x)
    np.testing.assert_array_equal(groups, [[1, 2, 3, 0], [4, 5, 6, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(grouping.join(groups, 2, 3), x)
    vectors = jnp.arange(12.0).reshape(2, 3, 2)
    np.testing.assert_array_equal(grouping.join(grouping.split(vectors), 2, 3), vectors)

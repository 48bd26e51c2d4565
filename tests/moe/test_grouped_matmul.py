"""Rows sorted by expert, and products with each one's matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax.moe import grouped_matmul


def test_rows_by_hand():
    # Tokens 0, 1, 2 choose experts (1, 0), (1, none), (0, 1); runs are padded to multiples of 4.
    rows = grouped_matmul.sort_rows(jnp.array([[1, 0], [1, 2], [0, 1]]), num_experts=2, alignment=4)
    # Choices are numbered 0 to 5; expert 0 has 1 (of token 0) and 4 (of token 2), expert 1 has 0, 2
    # and 5.
    assert rows.sizes.tolist() == [4, 4]
    assert rows.choice.tolist() == [1, 4, 6, 6, 0, 2, 5, 6, 6, 6, 6, 6]
    assert rows.row.tolist() == [[4, 0], [5, 12], [1, 6]]
    assert grouped_matmul.expert_of_row(rows).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    values = jnp.arange(3.0)[:, None] + 1
    assert grouped_matmul.to_rows(values, rows)[:, 0].tolist() == [
        1,
        3,
        0,
        0,
        1,
        2,
        3,
        0,
        0,
        0,
        0,
        0,
    ]
    assert grouped_matmul.to_choices(jnp.arange(12.0)[:, None], rows)[..., 0].tolist() == [
        [4, 0],
        [5, 0],
        [1, 6],
    ]


def test_pairs_too_many_for_one_number_are_sorted_all_the_same():
    # 5 choices of 2^29 experts: (2^29 + 1) * 5 is beyond 2^31.
    expert = jnp.array([3, 1, 2**29, 1, 0], jnp.int32)
    for num_experts in (4, 2**29):
        experts, choice = grouped_matmul._by_expert(jnp.minimum(expert, num_experts), num_experts)
        assert experts.tolist() == [0, 1, 1, 3, num_experts]
        assert choice.tolist() == [4, 1, 3, 0, 2]


@pytest.mark.parametrize("load", [[0, 0, 0], [1, 0, 767], [700, 64, 4], [256, 256, 256]])
def test_every_load_fits(load):
    expert = (
        jnp.repeat(jnp.arange(3), jnp.array(load), total_repeat_length=sum(load))[:, None]
        if sum(load)
        else jnp.full((768, 1), 3)
    )
    rows = grouped_matmul.sort_rows(expert, num_experts=3, alignment=grouped_matmul.ALIGNMENT)
    assert int(rows.sizes.sum()) <= rows.choice.size
    held = np.asarray(rows.choice)[np.asarray(rows.choice) < expert.size]
    assert sorted(held) == np.flatnonzero(np.asarray(expert)[:, 0] < 3).tolist()


def test_bfloat16_accumulates_in_float32():
    # A row of 4096 times 2^-4 against ones: 256 exactly; in bfloat16 the sum would stop growing at
    # 16.
    x = jnp.full((grouped_matmul.ALIGNMENT, 4096), 2.0**-4, jnp.bfloat16)
    sizes = jnp.array([grouped_matmul.ALIGNMENT])
    assert (
        grouped_matmul.block_dot(x, jnp.ones((1, 4096, 8), jnp.bfloat16), sizes)
        .astype(jnp.float32)
        .tolist()[0]
        == [256.0] * 8
    )
    gradient = jax.grad(
        lambda k: jnp.sum(grouped_matmul.block_dot(x, k, sizes).astype(jnp.float32))
    )(jnp.ones((1, 4096, 8), jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16


def test_work_follows_the_load():
    # FLOPs that XLA counts are those of one pass through each loop body, whatever E is: no product
    # over all rows per expert.
    def flops(num_experts):
        shapes = [(256, 64), (num_experts, 64, 64)]
        args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes] + [
            jax.ShapeDtypeStruct((num_experts,), jnp.int32)
        ]
        return jax.jit(grouped_matmul.block_dot).lower(*args).compile().cost_analysis()["flops"]

    assert flops(32) < 1.2 * flops(4)


def test_ragged_dot_is_masked_on_cpus_and_not_on_tpus():
    assert grouped_matmul.ragged_dot_is_masked("cpu")
    assert not grouped_matmul.ragged_dot_is_masked("tpu")

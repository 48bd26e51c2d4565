"""Products of sorted rows, all blocks at once, against the loop over blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax.moe import batched_blocks, grouped_matmul


def test_size_of_blocks_by_hand():
    # sqrt(8 * 10752 / 8) = 103.7, whose nearest power of two is 128.
    assert batched_blocks.rows_per_block(10752, 8) == 128
    # sqrt(8 * 48 / 4) = 9.8: 8, the least.
    assert batched_blocks.rows_per_block(48, 4) == 8
    assert batched_blocks.rows_per_block(0, 8) == 8


def test_large_matrices_are_not_copied():
    assert batched_blocks.is_faster(32 * 64)
    assert not batched_blocks.is_faster(64 * 128)
    assert not batched_blocks.is_faster(256 * 768)


@pytest.mark.parametrize("d, f", [(6, 6), (4, 10), (10, 4)])
@pytest.mark.parametrize("load", [[0, 0, 0], [96, 0, 32], [0, 32, 64]])
def test_it_is_the_loop_over_blocks(load, d, f):
    # 128 rows for runs of multiples of 32; what no run needs is zero and stays so.
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = jnp.array(load, jnp.int32)
    used = jnp.arange(128)[:, None] < sum(load)
    x, target = (
        jnp.where(used, jax.random.normal(key, (128, size)), 0)
        for key, size in zip(keys[:2], (d, f), strict=True)
    )
    kernels = jax.random.normal(keys[2], (3, d, f))

    def both(product, x, kernels):
        out = product(x, kernels, sizes)
        return out, jax.grad(lambda *args: jnp.sum(product(*args, sizes) * target), (0, 1))(
            x, kernels
        )

    want = jax.jit(lambda *args: both(grouped_matmul.block_dot, *args))(x, kernels)
    for rows in (8, 32):
        got = jax.jit(
            lambda *args, rows=rows: both(lambda *a: batched_blocks.batched_dot(rows, *a), *args)
        )(x, kernels)
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, want)


def test_bfloat16_accumulates_in_float32():
    # As of the loop: 4096 times 2^-4 against ones is 256; in bfloat16 the sum would stop at 16.
    x, sizes = jnp.full((8, 4096), 2.0**-4, jnp.bfloat16), jnp.array([8])
    out = batched_blocks.batched_dot(8, x, jnp.ones((1, 4096, 8), jnp.bfloat16), sizes)
    assert out.dtype == jnp.bfloat16 and (out == 256).all()
    # 512 rows in 64 blocks: a kernel's gradient is the sum of 512 ones.
    ones, sizes = jnp.ones((512, 4), jnp.bfloat16), jnp.array([512])
    gradient = jax.grad(lambda k: jnp.sum(batched_blocks.batched_dot(8, ones, k, sizes)))(
        jnp.ones((1, 4, 4), jnp.bfloat16)
    )
    assert gradient.dtype == jnp.bfloat16 and (gradient == 512).all()

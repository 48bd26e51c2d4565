"""What dropless routers send between devices: slots by hand, rounds that follow the load, and sums
that come back to their tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from upcycle_jax.moe import all_to_all
from upcycle_jax.partitioning import DATA, EXPERT, Partitioner

ROWS = PartitionSpec((DATA, EXPERT))


def on_mesh(function, partitioner, *, out=ROWS):
    """`function` on every device's rows, over all three axes, jitted."""
    mapped = functools.partial(
        jax.shard_map, mesh=partitioner.mesh, in_specs=ROWS, out_specs=out, check_vma=False
    )
    return jax.jit(mapped(function))


def test_slots_by_hand():
    # Four tokens, two choices, three devices (3: none). Token 0 goes to 2 and 0; 1 to 2, once for
    # both choices; 2 nowhere; 3 to 0.
    token, slot, used = all_to_all.fill_slots(
        jnp.array([[2, 0], [2, 2], [3, 3], [3, 0]]), num_devices=3
    )
    # Row 0 holds tokens 0 and 3, row 1 none (4), row 2 tokens 0 and 1.
    assert token.tolist() == [[0, 3, 4, 4], [4, 4, 4, 4], [0, 1, 4, 4]]
    assert used.tolist() == [2, 0, 2]
    # Slot p * 4 + j: token 0 in 2 * 4 + 0 and 0 * 4 + 0, token 1 in 2 * 4 + 1, token 3 in 0 * 4 +
    # 1; 12 is none.
    assert slot.tolist() == [[8, 0], [9, 12], [12, 12], [12, 1]]


def test_slots_with_more_choices_than_devices():
    # As many columns as devices, in their order: token 0 goes to both, token 1 to device 1 alone.
    token, slot, used = all_to_all.fill_slots(jnp.array([[1, 0, 1], [1, 1, 2]]), num_devices=2)
    assert token.tolist() == [[0, 2], [0, 1]] and used.tolist() == [1, 2]
    assert slot.tolist() == [[0, 2], [4, 3]]


def test_blocks_by_hand():
    # 64 tokens, 2 of 4 devices each: 32 for every device if even, in two blocks of 16. Over all
    #   four: 4 * 2 * 16 slots.
    assert all_to_all.block_size(64, num_choices=2, num_devices=4) == 16
    assert all_to_all.slots_at_even_load(64, num_choices=2, num_devices=4) == 128
    # Three choices, two devices: everybody goes everywhere; 51 tokens in blocks of 26, the second
    # of which reaches one slot too far.
    assert all_to_all.block_size(51, num_choices=3, num_devices=2) == 26
    assert all_to_all.slots_at_even_load(51, num_choices=3, num_devices=2) == 2 * 52
    # Short messages are not divided, and no block is longer than all tokens.
    assert all_to_all.block_size(64, num_choices=1, num_devices=64) == all_to_all.MIN_BLOCK
    assert all_to_all.block_size(3, num_choices=2, num_devices=4) == 3


def rounds_of(destination, num_devices=4):
    """The number of rounds, which every device of a mesh of 2 x 4 must have alike."""
    partitioner = Partitioner(num_expert_partitions=num_devices)
    rounds = on_mesh(
        lambda d: all_to_all.assign(d, num_devices=num_devices).rounds[None], partitioner
    )(jnp.asarray(destination, jnp.int32))
    assert len(set(rounds.tolist())) == 1
    return rounds.tolist()[0]


def test_rounds_follow_the_fullest_destination():
    # 64 tokens on each of eight devices, two choices: blocks of 16.
    n = 8 * 64
    tokens = np.arange(n)
    even = np.stack([tokens % 4, (tokens + 1) % 4], axis=1)  # 32 for every device
    assert rounds_of(even) == 2
    assert rounds_of(np.zeros((n, 2))) == 4  # 64 tokens to device 0: the worst case, 4 * 16
    assert rounds_of(np.full((n, 2), 4)) == 0  # nobody goes anywhere
    none_but_one = np.full((n, 2), 4)
    none_but_one[-1, 0] = 2
    assert rounds_of(none_but_one) == 1
    # One device of eight sends 33 of its tokens to one: a block more for all, those that have no
    # part in it included.
    even[:64] = even[0]
    even[:31, 0] = 2
    assert rounds_of(even) == 4  # its 64 second choices are device 1
    even[:64, 1] = np.where(np.arange(64) < 33, 1, 4)
    assert rounds_of(even) == 3


DEVICES = 4


def there_and_back(x, destination, weight):
    """Each device multiplies what it gets by its number, from 1 on, and by the weights of the
    choices that are its own.
    """
    slots = all_to_all.assign(destination, num_devices=DEVICES)
    got = all_to_all.send(all_to_all.Routed(x, destination, weight), slots)
    me = jax.lax.axis_index(EXPERT)
    own = jnp.sum(
        jnp.where(got.expert == me, got.weight, 0.0), axis=1, keepdims=True
    )  # of no choice where there is no token
    return all_to_all.sum_back((1.0 + me) * got.tokens * own, slots)


@jax.jit
def on_devices(x, weight, destination, target):
    mesh = Partitioner(num_expert_partitions=DEVICES).mesh
    mapped = jax.shard_map(
        there_and_back, mesh=mesh, in_specs=ROWS, out_specs=ROWS, check_vma=False
    )
    return jax.value_and_grad(
        lambda x, weight: jnp.sum(mapped(x, destination, weight) * target), argnums=(0, 1)
    )(x, weight)


@jax.jit
def without_devices(x, weight, destination, target):
    made = jnp.where(destination < DEVICES, 1.0 + destination, 0.0)
    return jax.value_and_grad(
        lambda x, weight: jnp.sum(x * jnp.sum(weight * made, axis=1)[:, None] * target),
        argnums=(0, 1),
    )(x, weight)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(5, 1), (40, 2), (40, 6)]),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.sampled_from([1.0, 8.0]),
)
def test_every_token_meets_its_devices_once(seed, sizes, skip, skew):
    """Sums of what devices make of the tokens that they got, and their gradients: a token that came
    twice would count twice.
    """
    (n, k), rng = sizes, np.random.default_rng(seed)
    destination = np.floor(DEVICES * rng.random((8 * n, k)) ** skew).astype(np.int32)
    destination = np.where(rng.random(destination.shape) < skip, DEVICES, destination)
    x, weight, target = (np.float32(rng.normal(size=(8 * n, size))) for size in (3, k, 3))
    got, want = (f(x, weight, destination, target) for f in (on_devices, without_devices))
    # The first result is a sum of up to a thousand numbers, the others are single ones.
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-3)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got[1], want[1]
    )


def test_slots_that_are_not_sent_arrive_as_no_choice():
    partitioner = Partitioner(num_expert_partitions=8)
    # Each of eight devices has 24 tokens, two of which go to device 5 by their first choice: one
    # round, of a block of 8.
    destination = jnp.full((8 * 24, 2), 8, jnp.int32).at[jnp.arange(0, 8 * 24, 12), 0].set(5)
    tokens = jnp.arange(1.0, 8 * 24 + 1)[:, None]

    def arrived(tokens, destination):
        slots = all_to_all.assign(destination, num_devices=8)
        got = all_to_all.send(
            all_to_all.Routed(tokens, destination, jnp.ones(destination.shape)), slots
        )
        return got.tokens[None], got.expert[None], got.weight[None]

    vectors, expert, weight = on_mesh(arrived, partitioner)(tokens, destination)
    assert vectors.shape == (8, 8 * 24, 1) and expert.dtype == jnp.int32
    # At device 5, tokens 0 and 12 of every device, in the first two slots of its 24; nothing
    # anywhere else.
    want = np.zeros((8, 8, 24))
    want[5, :, 0], want[5, :, 1] = 1 + 24 * np.arange(8), 13 + 24 * np.arange(8)
    np.testing.assert_array_equal(vectors[..., 0].reshape(8, 8, 24), want)
    is_token = want.reshape(8, -1) > 0
    np.testing.assert_array_equal(expert[..., 0], np.where(is_token, 5, -1))
    np.testing.assert_array_equal(expert[..., 1], np.where(is_token, 8, -1))
    np.testing.assert_array_equal(weight, np.where(is_token, 1.0, 0.0)[..., None] * np.ones(2))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_of_tokens_and_gradients(dtype):
    partitioner = Partitioner(num_expert_partitions=2, num_model_partitions=2)
    destination = jnp.tile(jnp.array([[0, 1], [1, 1]], jnp.int32), (4 * 4, 1))
    tokens = jnp.arange(32.0).astype(dtype)[:, None]

    def there_and_back(tokens):
        slots = all_to_all.assign(destination[:8], num_devices=2)
        got = all_to_all.send(all_to_all.Routed(tokens, destination[:8], jnp.ones((8, 2))), slots)
        return all_to_all.sum_back(got.tokens.astype(jnp.float32), slots)

    mapped = jax.shard_map(
        there_and_back, mesh=partitioner.mesh, in_specs=ROWS, out_specs=ROWS, check_vma=False
    )
    out, gradient = jax.jit(jax.value_and_grad(lambda t: jnp.sum(mapped(t))))(tokens)
    # Even tokens go to both devices, odd ones to one: 2 * (0 + 2 + ... + 30) + (1 + 3 + ... + 31).
    assert out.dtype == jnp.float32 and float(out) == 2 * 240 + 256
    assert gradient.dtype == dtype and gradient[:, 0].tolist() == [2.0, 1.0] * 16

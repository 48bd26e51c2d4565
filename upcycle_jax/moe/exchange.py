"""The all-to-alls of dropless routers: each token to the devices that it needs, once, and sums of
vectors back; traffic follows the load.

Axis legend: P devices of the mesh's `expert` axis, n tokens of each, K experts per token, d size of
a vector.

Nothing is dropped and shapes are static, so that buffers have room for every token of every device,
`[P, n, ...]`. What is sent of them are blocks of slots, one all-to-all of each, as many as the
fullest destination on any device fills: a number that is known only when running, and the same on
all devices, because everybody takes part in every all-to-all. `jax.lax.ragged_all_to_all` would
send exact counts without a loop, but XLA has none for CPUs, where all of this is tested.
"""

import math
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp

from upcycle_jax.moe import grouped
from upcycle_jax.partitioning import EXPERT, MESH_AXES

BLOCKS_PER_SHARE = 2
"""Blocks that a destination's even share is sent in. More of them follow the load more closely, and
each costs the latency of a message.
"""
MIN_BLOCK = 8


@flax.struct.dataclass
class Slots:
    """Where this device's tokens sit in its buffer of `[P, n]` slots, whose row p is sent to device
    p.

    Attributes:
      token: int32 `[P, n]`, the token in each slot; n marks an empty one. Rows are filled from the
        front, in the order of tokens.
      slot: int32 `[n, min(K, P)]`, the slots p * n + j that hold each token, one for every device
        that it goes to; P * n for none.
      rounds: int32, how many blocks are sent: as many as the fullest row of all devices needs.
      block: slots per row that one block sends.
    """

    token: jax.Array
    slot: jax.Array
    rounds: jax.Array
    block: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Routed:
    """Tokens with their choices, `[N, ...]`.

    Attributes:
      tokens: `[N, d]`.
      expert: int32 `[N, K]`; as it arrives, -1 in slots that hold no token.
      weight: float32 `[N, K]`.
    """

    tokens: jax.Array
    expert: jax.Array
    weight: jax.Array


def block_size(num_tokens: int, *, num_choices: int, num_devices: int) -> int:
    """Slots per destination of one block, for n tokens with K choices on each of P devices."""
    share = num_tokens * min(num_choices, num_devices) / num_devices
    return min(num_tokens, max(MIN_BLOCK, math.ceil(share / BLOCKS_PER_SHARE)))


def slots_at_even_load(num_tokens: int, *, num_choices: int, num_devices: int) -> int:
    """Slots that a device sends in one direction, over all destinations, where each of them gets
    the same number of tokens.

    No token chooses two experts of one device here, as the fewest do where devices are many; where
    some do, less may be sent.
    """
    block = block_size(num_tokens, num_choices=num_choices, num_devices=num_devices)
    share = math.ceil(num_tokens * min(num_choices, num_devices) / num_devices)
    return num_devices * block * math.ceil(share / block)


def assign(destination: jax.Array, *, num_devices: int) -> Slots:
    """Gives every token a slot at each device that it goes to. Runs inside `jax.shard_map`.

    Args:
      destination: int32 `[n, K]`, the device of each choice, in `[0, P]`; P marks a choice that is
        not made. Devices may repeat.
      num_devices: P.
    """
    token, slot, used = place(destination, num_devices=num_devices)
    num_tokens, num_choices = destination.shape
    block = block_size(num_tokens, num_choices=num_choices, num_devices=num_devices)
    return Slots(token, slot, jax.lax.pmax((jnp.max(used) + block - 1) // block, MESH_AXES), block)


def place(destination: jax.Array, *, num_devices: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`Slots.token`, `Slots.slot` and int32 `[P]`, the slots that are used of each row; arguments
    as of `assign`.
    """
    num_tokens, num_choices = destination.shape
    empty = num_devices * num_tokens
    goes = jnp.any(destination[..., None] == jnp.arange(num_devices), axis=1)
    counts = jnp.cumsum(goes, axis=0, dtype=jnp.int32)
    slot = jnp.where(
        goes, jnp.arange(num_devices, dtype=jnp.int32) * num_tokens + counts - 1, empty
    )
    if num_choices < num_devices:
        earlier = jnp.tril(jnp.ones((num_choices, num_choices), bool), k=-1)
        repeated = jnp.any((destination[:, :, None] == destination[:, None, :]) & earlier, axis=2)
        made = (destination < num_devices) & ~repeated
        slot = jnp.where(
            made,
            jnp.take_along_axis(slot, jnp.minimum(destination, num_devices - 1), axis=1),
            empty,
        )
    tokens = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32)[:, None], slot.shape)
    token = jnp.full(empty, num_tokens, jnp.int32).at[slot].set(tokens, mode="drop")
    return token.reshape(num_devices, num_tokens), slot, counts[-1]


@jax.custom_vjp
def send(routed: Routed, slots: Slots) -> Routed:
    """Sends this device's n tokens to where they go: P * n rows of what has arrived, those of
    device p from row p * n on.

    Slots that no device filled are tokens of zeros without a choice. Gradients of tokens and
    weights come back as `sum_back` does it.
    """
    # A message each for vectors and for the rest, which integers carry bit by bit. Zeros, as in
    # slots that are not sent, are no expert.
    rest = jnp.concatenate(
        [routed.expert + 1, jax.lax.bitcast_convert_type(routed.weight, jnp.int32)], axis=1
    )
    tokens, rest = _spread((routed.tokens, rest), slots)
    expert, weight = jnp.split(rest, 2, axis=1)
    return Routed(tokens, expert - 1, jax.lax.bitcast_convert_type(weight, jnp.float32))


def _send_backward(slots: Slots, grad: Routed) -> tuple[Routed, None]:
    tokens, weight = _collect((grad.tokens, grad.weight), slots)
    return Routed(tokens, None, weight), None  # type: ignore[arg-type]


send.defvjp(lambda routed, slots: (send(routed, slots), slots), _send_backward)


@jax.custom_vjp
def sum_back(values: jax.Array, slots: Slots) -> jax.Array:
    """Sends rows `[P * n, d]`, in the order of `send`, back to the tokens that they belong to: sums
    over each one's devices, `[n, d]`.
    """
    return _collect((values,), slots)[0]


sum_back.defvjp(
    lambda values, slots: (sum_back(values, slots), slots),
    lambda slots, grad: (_spread((grad,), slots)[0], None),
)


def _spread(values: Sequence[jax.Array], slots: Slots) -> list[jax.Array]:
    """`[n, ...]` of tokens to `[P * n, ...]` of slots on the devices that the tokens go to."""

    def block(start: jax.Array) -> list[jax.Array]:
        token = jax.lax.dynamic_slice_in_dim(slots.token, start, slots.block, axis=1)
        return [grouped.take(value, token) for value in values]

    return [a.reshape(-1, *a.shape[2:]) for a in _in_blocks(block, values, slots)]


def _collect(values: Sequence[jax.Array], slots: Slots) -> list[jax.Array]:
    """The transpose of `_spread`: `[P * n, ...]` of slots, as they arrived, to sums `[n, ...]` over
    the slots of each token.
    """
    by_device = [value.reshape(*slots.token.shape, *value.shape[1:]) for value in values]

    def block(start: jax.Array) -> list[jax.Array]:
        return [
            jax.lax.dynamic_slice_in_dim(value, start, slots.block, axis=1) for value in by_device
        ]

    back = [a.reshape(-1, *a.shape[2:]) for a in _in_blocks(block, values, slots)]
    return [
        jnp.sum(grouped.take(a, slots.slot), axis=1, dtype=jnp.float32).astype(a.dtype)
        for a in back
    ]


def _in_blocks(
    block: Callable[[jax.Array], list[jax.Array]], like: Sequence[jax.Array], slots: Slots
) -> list[jax.Array]:
    """Exchanges what `block` gives for slots from some first one on, `[P, block, ...]`, round by
    round; the rest stays zero.

    Arrived blocks lie at the same slots in `[P, n, ...]` as they were read from, row p from device
    p.
    """
    num_devices, num_tokens = slots.token.shape

    def one_round(i: jax.Array, arrived: list[jax.Array]) -> list[jax.Array]:
        # The last block is moved to the front where it would not fit: some slots are then sent
        # twice, which changes nothing.
        start = jnp.minimum(i * slots.block, num_tokens - slots.block)
        blocks = [
            jax.lax.all_to_all(a, EXPERT, split_axis=0, concat_axis=0, tiled=True)
            for a in block(start)
        ]
        return [
            jax.lax.dynamic_update_slice_in_dim(a, b, start, axis=1)
            for a, b in zip(arrived, blocks, strict=True)
        ]

    return jax.lax.fori_loop(
        0,
        slots.rounds,
        one_round,
        [jnp.zeros((num_devices, num_tokens, *a.shape[1:]), a.dtype) for a in like],
    )

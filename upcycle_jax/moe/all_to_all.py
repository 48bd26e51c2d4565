"""The all-to-alls of dropless experts: each token goes to the devices that it needs, once, and sums
of output vectors come back. Traffic follows the load.

Nothing is dropped and shapes are static, so a device's send buffer has a slot for each of its
tokens at every destination: `[P, n]`. Almost all of it is empty. What is sent are blocks of slots
`[P, block]`, one all-to-all for each block, and as many blocks as the fullest destination of any
device fills. That number is known only at run time. It must be the same on all devices, because
all of them take part in every all-to-all.

    device 0, n = 4, P = 2, block = 2          device 1 (its row 1 is the fullest: 2 rounds)
    to device 0   [ a  c | .  . ]              to device 0   [ w  . | .  . ]
    to device 1   [ a  . | .  . ]              to device 1   [ w  x | y  z ]
                   round 0  round 1                           round 0  round 1

`jax.lax.ragged_all_to_all` would send exact counts without a loop, but XLA has none for CPUs, where
all of this is tested.

Axis legend: P devices of the mesh's `expert` axis, n tokens of each, K experts per token, d size of
a vector.
"""

import math
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp

from upcycle_jax.moe.grouped_matmul import take
from upcycle_jax.partitioning import EXPERT, MESH_AXES

BLOCKS_PER_SHARE = 2
"""Blocks in which a destination's even share is sent. More blocks follow the load more closely, and
each costs the latency of a message.
"""
MIN_BLOCK = 8
"""Slots of a block, at least."""


@flax.struct.dataclass
class Slots:
    """Where this device's tokens sit in its send buffer, `[P, n]` slots. Row p goes to device p.

    Attributes:
      token: int32 `[P, n]`, the token in each slot; n marks an empty one. Rows are filled from the
        front, in the order of tokens.
      slot: int32 `[n, min(K, P)]`, the slots p * n + j that hold each token, one for each device
        that it goes to; P * n for none.
      rounds: int32 scalar, the number of blocks to send: what the fullest row of all devices needs.
      block: slots per row in one block.
    """

    token: jax.Array
    slot: jax.Array
    rounds: jax.Array
    block: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Routed:
    """Tokens with their choices: N = n before they are sent, N = P * n as they arrive.

    Attributes:
      tokens: `[N, d]`.
      expert: int32 `[N, K]`; in slots that arrive without a token, -1.
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
    """Slots that a device sends in one direction, to all destinations together, if each of them
    gets the same number of tokens.

    It is assumed that no token chooses two experts of one device. With many devices few tokens do;
    with few devices less may be sent than this.
    """
    block = block_size(num_tokens, num_choices=num_choices, num_devices=num_devices)
    share = math.ceil(num_tokens * min(num_choices, num_devices) / num_devices)
    return num_devices * block * math.ceil(share / block)


def assign(destination: jax.Array, *, num_devices: int) -> Slots:
    """Gives every token a slot at each device that it goes to. Runs inside `jax.shard_map`.

    Args:
      destination: int32 `[n, K]`, the device of each choice, in `[0, P]`; P marks a choice that is
        not made. Devices may repeat in a row.
      num_devices: P.
    """
    token, slot, used = fill_slots(destination, num_devices=num_devices)
    num_tokens, num_choices = destination.shape
    block = block_size(num_tokens, num_choices=num_choices, num_devices=num_devices)
    rounds_here = (jnp.max(used) + block - 1) // block
    return Slots(token, slot, jax.lax.pmax(rounds_here, MESH_AXES), block)


def fill_slots(
    destination: jax.Array, *, num_devices: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`Slots.token`, `Slots.slot`, and int32 `[P]`, the number of filled slots of each row;
    arguments as of `assign`.
    """
    num_tokens, num_choices = destination.shape
    empty = num_devices * num_tokens
    # [n, P]: whether a token goes to a device, by any of its choices.
    goes = jnp.any(destination[..., None] == jnp.arange(num_devices), axis=1)
    # [n, P]: how many tokens up to this one go there. Rows are filled from the front, so that a
    # token's slot in row p follows from the count: p * n + count - 1.
    counts = jnp.cumsum(goes, axis=0, dtype=jnp.int32)
    row_starts = jnp.arange(num_devices, dtype=jnp.int32) * num_tokens
    slot = jnp.where(goes, row_starts + counts - 1, empty)  # [n, P]
    if num_choices < num_devices:
        # A token has at most K destinations: [n, K] says the same in less. A device that an
        # earlier choice of the same token has named keeps the earlier one's slot alone.
        earlier = jnp.tril(jnp.ones((num_choices, num_choices), bool), k=-1)
        same_device = destination[:, :, None] == destination[:, None, :]  # [n, K, K]
        repeated = jnp.any(same_device & earlier, axis=2)
        made = (destination < num_devices) & ~repeated
        at_device = jnp.minimum(destination, num_devices - 1)
        slot = jnp.where(made, jnp.take_along_axis(slot, at_device, axis=1), empty)
    # The inverse map: which token each slot holds.
    tokens = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32)[:, None], slot.shape)
    token = jnp.full(empty, num_tokens, jnp.int32).at[slot].set(tokens, mode="drop")
    return token.reshape(num_devices, num_tokens), slot, counts[-1]


@jax.custom_vjp
def send(routed: Routed, slots: Slots) -> Routed:
    """Sends this device's n tokens to the devices that they go to.

    Returns:
      What has arrived, P * n rows: what device p sent starts at row p * n. Empty slots are tokens
      of zeros without a choice. Gradients of tokens and weights take the way of `sum_back`.
    """
    # Two messages: the vectors; and experts and weights together, the weights' bits as integers.
    # Slots that are not sent arrive as zeros, hence expert + 1: zero is then no expert.
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
    """Sends rows `[P * n, d]`, in the order in which `send` returns them, back to their tokens and
    adds up what each token gets from its devices: `[n, d]`.
    """
    return _collect((values,), slots)[0]


sum_back.defvjp(
    lambda values, slots: (sum_back(values, slots), slots),
    lambda slots, grad: (_spread((grad,), slots)[0], None),
)


def _spread(values: Sequence[jax.Array], slots: Slots) -> list[jax.Array]:
    """Arrays `[n, ...]` of tokens to arrays `[P * n, ...]` of the slots that arrive here."""

    def block(start: jax.Array) -> list[jax.Array]:
        # token [P, block], values [P, block, ...]
        token = jax.lax.dynamic_slice_in_dim(slots.token, start, slots.block, axis=1)
        return [take(value, token) for value in values]

    return [a.reshape(-1, *a.shape[2:]) for a in _in_blocks(block, values, slots)]


def _collect(values: Sequence[jax.Array], slots: Slots) -> list[jax.Array]:
    """The transpose of `_spread`: arrays `[P * n, ...]` of slots, as they arrived, to sums
    `[n, ...]` over the slots of each token.
    """
    by_device = [value.reshape(*slots.token.shape, *value.shape[1:]) for value in values]

    def block(start: jax.Array) -> list[jax.Array]:
        return [
            jax.lax.dynamic_slice_in_dim(value, start, slots.block, axis=1) for value in by_device
        ]

    back = [a.reshape(-1, *a.shape[2:]) for a in _in_blocks(block, values, slots)]  # [P * n, ...]
    # take: [n, min(K, P), ...]. The sum over devices is in float32 whatever the dtype.
    return [jnp.sum(take(a, slots.slot), axis=1, dtype=jnp.float32).astype(a.dtype) for a in back]


def _in_blocks(
    block: Callable[[jax.Array], list[jax.Array]], like: Sequence[jax.Array], slots: Slots
) -> list[jax.Array]:
    """Exchanges the buffers `[P, n, ...]` in rounds, a block of slots in each.

    Args:
      block: what is sent of each buffer from slot `start` of its rows on, `[P, block, ...]`.
      like: arrays with the dtypes and trailing axes of the buffers.
      slots: the number of rounds, and the size of a block.

    Returns:
      `[P, n, ...]` of each buffer: row p is what device p sent, at the same slots in which it was
      there. Slots that are not sent are zero.
    """
    num_devices, num_tokens = slots.token.shape

    def one_round(i: jax.Array, arrived: list[jax.Array]) -> list[jax.Array]:
        # A last block that would reach beyond the row starts earlier. Some slots are then sent
        # twice, which does no harm.
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

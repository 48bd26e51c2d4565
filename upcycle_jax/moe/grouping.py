"""How the tokens of a batch are divided into groups that are routed apart, and put together again.

The numbers are known before anything is traced.

Axis legend: G groups, S tokens per group, E experts.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Grouping:
    """How the tokens of a `[batch, length]` array are divided for routing.

    Attributes:
      num_groups: G.
      group_size: S; `G * S` equals the number of tokens, padding included.
      batch_padding: rows of zeros to append along the batch before grouping (T5X mode only).
      length_padding: columns of zeros to append along the sequence before grouping (T5X mode only).
      spare_groups: groups of zeros to append, so that groups divide over the devices of a mesh.
    """

    num_groups: int
    group_size: int
    batch_padding: int = 0
    length_padding: int = 0
    spare_groups: int = 0

    def divided_over(self, batch_shards: int) -> "Grouping":
        """The same groups, and as many spare ones as they need to divide over `batch_shards`.

        Left uneven (XLA would pad them as well, on every device), the exchange of slots is no
        all-to-all: slots of all groups go to all devices.
        """
        return dataclasses.replace(self, spare_groups=-self.num_groups % batch_shards)

    def split(self, x: jax.Array) -> jax.Array:
        """`[batch, length, ...]` to `[G + spare, S, ...]`."""
        rest = [(0, 0)] * (x.ndim - 2)
        if self.batch_padding or self.length_padding:
            x = jnp.pad(x, [(0, self.batch_padding), (0, self.length_padding), *rest])
        x = x.reshape(self.num_groups, self.group_size, *x.shape[2:])
        return jnp.pad(x, [(0, self.spare_groups), (0, 0), *rest]) if self.spare_groups else x

    def join(self, groups: jax.Array, batch: int, length: int) -> jax.Array:
        """The reverse of `split`: `[G + spare, S, ...]` to `[batch, length, ...]`."""
        padded = (batch + self.batch_padding, length + self.length_padding)
        x = groups[: self.num_groups].reshape(*padded, *groups.shape[2:])
        return x[:batch, :length]


def largest_divisor(number: int, *, at_most: int) -> int:
    """The largest divisor of `number` that is not above `at_most`."""
    return next(n for n in range(min(number, at_most), 0, -1) if number % n == 0)


def even_grouping(num_tokens: int, *, max_group_size: int) -> Grouping:
    """Groups of `min(max_group_size, num_tokens)` tokens; the mesh has no part in it.

    Args:
      num_tokens: batch size times length.
      max_group_size: GROUP_SIZE.

    Raises:
      ValueError: more tokens than one group holds, and not a whole number of groups.
    """
    group_size = min(max_group_size, num_tokens)
    if num_tokens % group_size:
        raise ValueError(
            f"{num_tokens} tokens do not divide into groups of GROUP_SIZE={max_group_size}. The"
            f" nearest group size that does is {largest_divisor(num_tokens, at_most=group_size)}:"
            " set GROUP_SIZE to it, or change the batch size or the sequence length."
        )
    return Grouping(num_groups=num_tokens // group_size, group_size=group_size)


def t5x_grouping(
    batch_size: int, length: int, *, max_group_size: int, num_experts: int, num_expert_replicas: int
) -> Grouping:
    """Flaxformer's grouping (its `_maybe_pad` and `_num_groups`), which depends on the mesh through
    the replica count.

    The token count is first padded, along the batch or the sequence, whichever needs fewer zero
    tokens (the sequence on a tie), to a multiple of E x replicas. G is then the smallest count that
    divides the tokens, is a multiple of E x replicas and is at least tokens // max_group_size.

    Args:
      batch_size: rows of the layer's input.
      length: columns of the layer's input.
      max_group_size: GROUP_SIZE.
      num_experts: E.
      num_expert_replicas: devices / (expert partitions x model partitions).
    """
    multiple = num_experts * num_expert_replicas
    batch_padding = length_padding = 0
    if (batch_size * length) % multiple:
        rows = next(n for n in range(1, multiple + 1) if (batch_size + n) * length % multiple == 0)
        columns = next(
            n for n in range(1, multiple + 1) if (length + n) * batch_size % multiple == 0
        )
        if columns * batch_size > rows * length:
            batch_padding = rows
        else:
            length_padding = columns
    num_tokens = (batch_size + batch_padding) * (length + length_padding)
    at_least = max(num_tokens // max_group_size, multiple)
    num_groups = next(
        n for n in range(at_least, num_tokens + 1) if num_tokens % n == 0 and n % multiple == 0
    )
    return Grouping(num_groups, num_tokens // num_groups, batch_padding, length_padding)


def ample_grouping(num_tokens: int, *, max_group_size: int, multiple_of: int) -> Grouping:
    """The fewest groups of at most `max_group_size` tokens, for routing that does not depend on
    groups. Any number of tokens divides.

    Args:
      num_tokens: batch size times length.
      max_group_size: GROUP_SIZE.
      multiple_of: what the number of groups is to divide by, if the tokens allow it: the shards of
        the batch.
    """
    step = multiple_of if num_tokens % multiple_of == 0 else 1
    at_least = -(-num_tokens // max_group_size)
    num_groups = next(
        n for n in range(step, num_tokens + 1, step) if num_tokens % n == 0 and n >= at_least
    )
    return Grouping(num_groups, num_tokens // num_groups)

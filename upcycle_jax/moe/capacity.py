"""Groups and capacities: integers only, known before anything is traced.

Axis legend: G groups, S tokens per group, E experts, C capacity (slots per expert and group), K
experts per token.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Grouping:
    """How the tokens of a `[batch, length]` array are divided for routing.

    Attributes:
      num_groups: G.
      group_size: S; `G * S` equals the number of tokens, padding included.
      batch_padding: rows of zeros to append along the batch before grouping (T5X mode only).
      length_padding: columns of zeros to append along the sequence before grouping (T5X mode only).
    """

    num_groups: int
    group_size: int
    batch_padding: int = 0
    length_padding: int = 0


def largest_divisor(number: int, *, at_most: int) -> int:
    """The largest divisor of `number` that is not above `at_most`."""
    return next(n for n in range(min(number, at_most), 0, -1) if number % n == 0)


def default_grouping(num_tokens: int, *, max_group_size: int) -> Grouping:
    """Groups of `min(max_group_size, num_tokens)` tokens, whatever the mesh.

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


def grouping(
    batch_size: int,
    length: int,
    *,
    max_group_size: int,
    num_experts: int,
    num_expert_replicas: int | None,
) -> Grouping:
    """`t5x_grouping` where a number of expert replicas is given, `default_grouping` where it is
    None.
    """
    if num_expert_replicas is None:
        return default_grouping(batch_size * length, max_group_size=max_group_size)
    return t5x_grouping(
        batch_size,
        length,
        max_group_size=max_group_size,
        num_experts=num_experts,
        num_expert_replicas=num_expert_replicas,
    )


def ample_grouping(num_tokens: int, *, max_group_size: int, multiple_of: int) -> Grouping:
    """The fewest groups of at most `max_group_size` tokens, for routing in which groups do not
    matter; any number of tokens divides.

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


def expert_capacity(
    group_size: int, *, num_experts: int, capacity_factor: float, min_expert_capacity: int = 4
) -> int:
    """C = max(round(capacity_factor * S / E), min_expert_capacity), with Python's rounding (half to
    even) as in Flaxformer.

    Args:
      group_size: S.
      num_experts: E.
      capacity_factor: 1.0 gives every expert room for its even share of the tokens.
      min_expert_capacity: lower bound for C.
    """
    return max(round(capacity_factor * group_size / num_experts), min_expert_capacity)

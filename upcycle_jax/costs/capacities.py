"""What the capacity factor of MoE layers comes to: slots are whole numbers, so that small groups
have more or fewer than were asked for.
"""

from collections.abc import Mapping

from upcycle_jax.models.base import Model, Stack, stack_lengths


def capacity_texts(model: Model, *, batch_size: int, lengths: Mapping[str, int]) -> list[str]:
    """One text for each stack whose experts have a capacity, of training.

    Args:
      model: the model.
      batch_size: rows that are routed together (with microbatches: of one).
      lengths: by task feature.

    Raises:
      ValueError: the tokens do not divide into routing groups.
    """
    positions = stack_lengths(model, lengths)
    return [
        _text(stack, batch_size, positions[name])
        for name, stack in model.stacks.items()
        if stack.sparse_layers and _has_capacity(stack)
    ]


def _has_capacity(stack: Stack) -> bool:
    """Whether the capacity decides how many slots an expert has."""
    assert stack.router is not None
    few, many = (stack.router.slots(capacity, group_size=64) for capacity in (1, 64))
    return few != many


def _text(stack: Stack, batch_size: int, length: int) -> str:
    assert stack.moe is not None
    sizes = stack.layer_sizes(batch_size, length, train=True)
    asked = stack.moe.train_expert_capacity_factor
    return (
        f"{stack.name}: groups of {sizes.grouping.group_size} tokens, {sizes.slots} slots of each"
        f" of {stack.moe.num_experts} experts: capacity factor {sizes.effective_factor:.4g}"
        f" ({asked:g} asked for)"
    )

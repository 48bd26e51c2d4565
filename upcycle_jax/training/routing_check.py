"""Looks at what routers did since the last report, and says once and by name what is wrong."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from upcycle_jax.models.base import Stack

_log = logging.getLogger(__name__)

STARVED_BELOW = 0.2
"""An expert with less than this part of its even share of the processed tokens is starved."""
DROPPED_ABOVE = 0.1
"""More than this part of the placements that were asked for may not be dropped."""


class RoutingCheck:
    """Warns of experts that get almost nothing and of layers that drop much: once for each layer
    and kind.

    Args:
      stacks: of the model.
    """

    def __init__(self, stacks: Iterable[Stack]):
        self._owners = {layer: stack for stack in stacks for layer in stack.moe_layers}
        self._said: set[tuple[str, str]] = set()

    def look(self, values: Mapping[str, Any]) -> list[str]:
        """What is new about the metrics of a report period (`models.expert_metrics`), one warning
        each; they are logged too.
        """
        found = []
        for layer, stack in self._owners.items():
            load = values.get(f"experts/{layer}/load")
            starved = "" if load is None else _starved(layer, stack, np.asarray(load))
            dropped = _dropped(layer, stack, float(values.get(f"experts/{layer}/dropped", 0.0)))
            for kind, text in (("starved", starved), ("dropped", dropped)):
                if text and (layer, kind) not in self._said:
                    self._said.add((layer, kind))
                    found.append(text)
        for text in found:
            _log.warning("%s", text)
        return found


def _starved(layer: str, stack: Stack, load: np.ndarray) -> str:
    """A warning where an expert starves; `load` is `[E]`, shares of the processed tokens."""
    total = float(np.sum(load))
    if not total > 0:  # Nothing was processed, or it is no number: others say so.
        return ""
    share, even = load / total, 1 / load.size
    few = np.flatnonzero(share < STARVED_BELOW * even)
    if not few.size:
        return ""
    which = ", ".join(f"{expert} ({share[expert]:.1%})" for expert in few)
    return (
        f"ROUTING of {layer}: of the tokens that experts processed since the last report, expert"
        f" {which} got less than a fifth of an even share of {even:.1%}. {_remedies(stack)}"
    )


def _dropped(layer: str, stack: Stack, dropped: float) -> str:
    if not dropped > DROPPED_ABOVE:
        return ""
    assert stack.moe is not None and stack.router is not None
    by_token = stack.router.selected_per_token is not None
    what = "of the choices of tokens were dropped" if by_token else "of the tokens met no expert"
    factor, group = stack.moe.train_expert_capacity_factor, stack.moe.group_size
    return (
        f"ROUTING of {layer}: since the last report {dropped:.1%} {what}. Raise"
        f" TRAIN_EXPERT_CAPACITY_FACTOR (train_expert_capacity_factor, {factor:g}), or GROUP_SIZE"
        f" (group_size, {group}), because load evens out over more tokens. {_remedies(stack)}"
    )


def _remedies(stack: Stack) -> str:
    """What evens load out, for these settings."""
    assert stack.moe is not None and stack.router is not None
    router, settings = stack.router, stack.moe
    texts = []
    if not stack.policy.skips_padding:
        texts.append(
            "Padding is routed, and fills the first experts where its logits tie: set"
            " ignore_padding_tokens to True."
        )
    if router.has_balance_loss:
        texts.append(
            "Raise AUX_LOSS_FACTOR (aux_loss_factor,"
            f" {settings.aux_loss_factor:g}), the load-balancing loss."
        )
    elif router.balance_rate is not None:
        texts.append(
            f"Raise {type(router).__name__}.update_rate ({router.balance_rate:g}), by which the"
            " bias that balances experts moves."
        )
    elif router.selected_per_token is not None:
        texts.append(
            f"{type(router).__name__} balances nothing: a router with a load-balancing loss does."
        )
    return " ".join([*texts, "docs/routers.md says how routers balance."])

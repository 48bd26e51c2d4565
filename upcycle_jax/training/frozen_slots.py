"""Optimizer slots where a run begins from a state in which other parameters are frozen for good:
such parameters have none (`ParameterGroup.frozen`).
"""

from collections.abc import Collection, Mapping

from upcycle_jax.state_tree import PARAM_STATES, without_slots
from upcycle_jax.trees import LeafSpec


def of_one_side(specs: Mapping[str, LeafSpec], found: Mapping[str, LeafSpec]) -> frozenset[str]:
    """Full paths of the slots of parameters of which just one of two states has any. They start
    afresh, or are left out.

    Args:
      specs: of the state that a run needs, by full path.
      found: of the state that is there.
    """
    names = {f"{PARAM_STATES}{path}" for path in without_slots(specs) ^ without_slots(found)}
    return frozenset(path for path in specs if path.rpartition("/")[0] in names and path in found)


def told(slots: Collection[str]) -> str:
    """What becomes of such slots, as the end of a sentence; nothing without any."""
    parameters = {path.rpartition("/")[0].removeprefix(PARAM_STATES) for path in slots}
    if not parameters:
        return ""
    return (
        f"; without the optimizer slots of {len(parameters)} parameters, which are frozen for good"
        f" here or were there ({min(parameters)}, ...)"
    )

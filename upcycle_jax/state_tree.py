"""The words of the tree that a checkpoint holds: parameters, the step, and optimizer slots.

`target/<parameter>`, `state/step`, `state/param_states/<parameter>/<slot>`: T5X's layout.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from upcycle_jax.trees import LeafSpec

TARGET = "target/"
"""Before the path of a parameter."""

STATE = "state/"
"""Before everything that is no parameter."""

STEP = "state/step"
"""The number of updates done, an int32 scalar."""

PARAM_STATES = "state/param_states/"
"""Before the path of a parameter and the name of one of its optimizer slots."""

UNUSED_SHAPE = (1,)
"""Shape of a slot that a parameter does not use, as in T5X."""


def parameter_specs(parameters: Mapping[str, LeafSpec]) -> dict[str, LeafSpec]:
    """Specs of parameters by full path, their twins too, of specs by path."""
    return {
        f"{TARGET}{path}": dataclasses.replace(spec, twin=spec.twin and f"{TARGET}{spec.twin}")
        for path, spec in parameters.items()
    }


def specs(parameters: Mapping[str, LeafSpec], slots: Mapping[str, LeafSpec]) -> dict[str, LeafSpec]:
    """Specs of a whole state, by full path.

    Args:
      parameters: by path.
      slots: of the optimizer, as '<parameter>/<slot>'; each gets the role of its parameter. Empty:
        a state without optimizer.

    Returns:
      Specs whose twins are full paths, too.
    """
    found = {STEP: LeafSpec((), np.dtype(np.int32)), **parameter_specs(parameters)}
    for path, spec in slots.items():
        parameter, _, slot = path.rpartition("/")
        of = parameters[parameter]
        twin = of.twin and f"{PARAM_STATES}{of.twin}/{slot}"
        found[f"{PARAM_STATES}{path}"] = dataclasses.replace(spec, role=of.role, twin=twin)
    return dict(sorted(found.items()))


def without_slots(specs: Mapping[str, LeafSpec]) -> frozenset[str]:
    """Parameters, by path without `TARGET`, that use none of their optimizer slots: those that are
    never trained.

    Args:
      specs: of a whole state, by full path.
    """
    unused: dict[str, bool] = {}
    for path, spec in specs.items():
        if path.startswith(PARAM_STATES):
            parameter = path.removeprefix(PARAM_STATES).rpartition("/")[0]
            unused[parameter] = unused.get(parameter, True) and spec.shape == UNUSED_SHAPE
    # A parameter of one element uses slots of that shape.
    return frozenset(
        parameter
        for parameter, all_unused in unused.items()
        if all_unused
        and ((own := specs.get(f"{TARGET}{parameter}")) is None or own.shape != UNUSED_SHAPE)
    )

"""The words of the tree that a checkpoint holds: parameters, the step, and optimizer slots.

`target/<parameter>`, `state/step`, `state/param_states/<parameter>/<slot>`: T5X's layout.
"""

TARGET = "target/"
"""Before the path of a parameter."""

STATE = "state/"
"""Before everything that is no parameter."""

STEP = "state/step"
"""The number of updates done, an int32 scalar."""

PARAM_STATES = "state/param_states/"
"""Before the path of a parameter and the name of one of its optimizer slots."""

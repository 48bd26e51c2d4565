"""The tree of a whole state: full paths, and what slots take over from their parameters."""

import numpy as np

from upcycle_jax import state_tree
from upcycle_jax.trees import LeafSpec, Role

F32 = np.dtype(np.float32)
PARAMETERS = {
    "encoder/layers_1/mlp/expert/wo/kernel": LeafSpec(
        (2, 3, 4), F32, role=Role.EXPERT, twin="encoder/layers_1/mlp/wo/kernel"
    ),
    "encoder/layers_1/mlp/router/bias": LeafSpec((2,), F32, role=Role.ROUTER_BIAS),
    "encoder/norm/scale": LeafSpec((3,), F32, twin="encoder/norm/scale"),
}


def test_parameters_and_slots_have_full_paths_and_twins_too():
    slots = {
        "encoder/layers_1/mlp/expert/wo/kernel/v_row": LeafSpec((2, 3), F32),
        "encoder/layers_1/mlp/router/bias/v": LeafSpec((2,), F32),
        "encoder/norm/scale/v": LeafSpec((3,), F32),
    }
    found = state_tree.specs(PARAMETERS, slots)
    assert list(found) == sorted(found)
    assert found.pop("state/step") == LeafSpec((), np.dtype(np.int32))
    assert {path: (spec.role, spec.twin) for path, spec in found.items()} == {
        "target/encoder/layers_1/mlp/expert/wo/kernel": (
            Role.EXPERT,
            "target/encoder/layers_1/mlp/wo/kernel",
        ),
        "target/encoder/layers_1/mlp/router/bias": (Role.ROUTER_BIAS, ""),
        "target/encoder/norm/scale": (Role.DENSE, "target/encoder/norm/scale"),
        "state/param_states/encoder/layers_1/mlp/expert/wo/kernel/v_row": (
            Role.EXPERT,
            "state/param_states/encoder/layers_1/mlp/wo/kernel/v_row",
        ),
        "state/param_states/encoder/layers_1/mlp/router/bias/v": (Role.ROUTER_BIAS, ""),
        "state/param_states/encoder/norm/scale/v": (
            Role.DENSE,
            "state/param_states/encoder/norm/scale/v",
        ),
    }


def test_a_state_without_an_optimizer_holds_parameters_and_the_step():
    found = state_tree.specs(PARAMETERS, {})
    assert set(found) == {"state/step", *state_tree.parameter_specs(PARAMETERS)}

"""Roles and twins of the leaves of MoE layers."""

import numpy as np
import pytest

from upcycle_jax.moe import roles
from upcycle_jax.trees import LeafSpec, Role

F32 = np.dtype(np.float32)
MLP = "encoder/layers_1/mlp"
EXPECTED = {
    f"{MLP}/expert/wi_0/kernel": (Role.EXPERT, f"{MLP}/wi_0/kernel"),
    f"{MLP}/shared_expert/wo/kernel": (Role.SHARED_EXPERT, f"{MLP}/wo/kernel"),
    f"{MLP}/router/router_weights/w/kernel": (Role.ROUTER, ""),
    f"{MLP}/router/bias": (Role.ROUTER_BIAS, ""),
    f"{MLP}/shared_expert_gate/kernel": (Role.SHARED_GATE, ""),
    f"{MLP}/expert/wo/bias": (Role.EXPERT, f"{MLP}/wo/bias"),
    "encoder/layers_1/extra_mlp/wo/kernel": (Role.DENSE, "encoder/layers_1/extra_mlp/wo/kernel"),
    "encoder/layers_0/mlp/wo/kernel": (Role.DENSE, "encoder/layers_0/mlp/wo/kernel"),
    "encoder/layers_10/mlp/wo/kernel": (Role.DENSE, "encoder/layers_10/mlp/wo/kernel"),
}


@pytest.mark.parametrize("prefix", ["", "target/"])
@pytest.mark.parametrize("by", ["layers", "paths"])
def test_every_leaf_of_an_moe_layer_has_its_role_and_twin(prefix, by):
    specs = {prefix + path: LeafSpec((2, 3), F32) for path in EXPECTED}
    found = roles.marked(specs, [prefix + MLP]) if by == "layers" else roles.inferred(specs)
    assert {path: (spec.role, spec.twin) for path, spec in found.items()} == {
        prefix + path: (role, twin and prefix + twin) for path, (role, twin) in EXPECTED.items()
    }
    assert found == specs, "role and twin are no part of a spec's equality"


def test_slots_are_what_their_parameter_is():
    slots = {
        f"state/param_states/{MLP}/expert/wo/kernel/v_row": LeafSpec((2, 3), F32),
        f"state/param_states/{MLP}/router/bias/v": LeafSpec((2,), F32),
    }
    expert, bias = roles.inferred(slots).values()
    assert (expert.role, expert.twin) == (
        Role.EXPERT,
        f"state/param_states/{MLP}/wo/kernel/v_row",
    )
    assert (bias.role, bias.twin) == (Role.ROUTER_BIAS, "")

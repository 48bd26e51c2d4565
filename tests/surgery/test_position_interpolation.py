"""Plans of conversions to images of another size: which leaves change, and what is refused."""

import numpy as np
import pytest

from tests.models.vit.kinds import SHAPE, in_big_vision, random_params
from upcycle_jax import state_tree
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.layers.position_grids import interpolate
from upcycle_jax.models.vit.config import VitConfig, VitMoeConfig
from upcycle_jax.models.vit.model import VitModel
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.surgery import MoreExperts, Recipe, make_plan
from upcycle_jax.surgery.keys import key_source
from upcycle_jax.surgery.online import apply_online
from upcycle_jax.surgery.operations import Copy, InterpolatePositions, Zeros
from upcycle_jax.training.optimizers import Adafactor

MOE = VitMoeConfig(num_experts=4, group_size=450)


def specs(size, **more):
    params = VitModel(VitConfig(**SHAPE | {"image_size": size} | more)).param_specs()
    return state_tree.specs(params, Adafactor().state_specs(params))


def test_positions_alone_are_interpolated_and_their_slots_start_afresh():
    recipe = Recipe(position_interpolation="bilinear", optimizer_state="tiled")
    plan = make_plan(specs(12), specs(20, moe=MOE), recipe)
    positions = plan.row("target/pos_embedding")
    assert positions.operation == InterpolatePositions("bilinear", 3, 5)
    assert plan.interpolated == (positions,)
    slots = {
        row.target: row
        for row in plan.rows
        if row.target.startswith("state/param_states/pos_embedding/")
    }
    assert slots and all(
        isinstance(row.operation, Zeros) or row.spec.shape == (1,) for row in slots.values()
    )
    reasons = {d.reason for d in plan.dropped if "pos_embedding" in d.source}
    assert reasons == {"slots of interpolated positions start afresh"}
    assert isinstance(plan.row("target/head/kernel").operation, Copy)


def test_the_token_of_a_class_stays():
    recipe = Recipe(position_interpolation="bicubic")
    source, target = (specs(size, pool="class_token") for size in (12, 20))
    plan = make_plan(source, target, recipe)
    assert isinstance(plan.row("target/cls").operation, Copy)
    assert plan.row("target/pos_embedding").operation.name == "bicubic 3 x 3 -> 5 x 5"


def test_equal_sizes_are_copied():
    plan = make_plan(specs(12), specs(12, moe=MOE), Recipe(position_interpolation="bilinear"))
    assert isinstance(plan.row("target/pos_embedding").operation, Copy) and not plan.interpolated


def test_a_proof_expects_what_scipy_gives():
    operation = InterpolatePositions("bilinear", 3, 5)
    given = np.random.default_rng(0).normal(size=(1, 9, 4)).astype(np.float32)
    keys = key_source(0, "target/pos_embedding", "")
    made = operation.make([given], {}, keys, 0, (1, 25, 4))
    expected = operation.expectation([given], {}, 0, (1, 25, 4))
    np.testing.assert_allclose(made, expected.values, atol=1e-6)


def test_experts_without_the_setting_are_refused_and_those_with_it_need_a_sparse_model():
    with pytest.raises(ValueError, match="a Mixture-of-Experts already"):
        make_plan(specs(12, moe=MOE), specs(20, moe=MOE), Recipe())
    with pytest.raises(ValueError, match="the model has none"):
        make_plan(specs(12, moe=MOE), specs(20), Recipe(position_interpolation="bilinear"))


def test_experts_go_on_with_larger_images_and_other_classes():
    """Fine-tuning of an upcycled model: positions, head and their slots change, nothing else."""
    recipe = Recipe(position_interpolation="bilinear", zeroed="head/.*", optimizer_state="tiled")
    plan = make_plan(specs(12, moe=MOE), specs(20, moe=MOE, num_classes=3), recipe)
    changed = {
        row.target.removeprefix("target/"): row.operation.name
        for row in plan.rows
        if row.is_parameter and not isinstance(row.operation, Copy)
    }
    assert changed == {
        "pos_embedding": "bilinear 3 x 3 -> 5 x 5",
        "head/kernel": "zeros",
        "head/bias": "zeros",
    }


def test_devices_get_their_part_of_interpolated_positions(tmp_path):
    """Eight devices hold two of sixteen columns each, as the whole table has them."""
    params = random_params(VitModel(VitConfig(**SHAPE)))
    np.savez(tmp_path / "model.npz", **in_big_vision(params, SHAPE["num_heads"]))
    reader = open_checkpoint(tmp_path / "model.npz")
    target = VitModel(VitConfig(**SHAPE | {"image_size": 20})).param_specs()
    recipe = Recipe(position_interpolation="bicubic", step="reset")
    plan = make_plan(reader.specs(), state_tree.specs(target, {}), recipe)
    shardings = Partitioner(fsdp=True).shardings(plan.specs())
    found = apply_online(plan, reader, shardings)["target/pos_embedding"]
    assert found.addressable_shards[0].data.shape == (1, 25, 2)
    expected = interpolate(params["pos_embedding"], 5, "bicubic")
    np.testing.assert_array_equal(found, expected)


def test_bad_settings():
    with pytest.raises(ValueError, match="position_interpolation must be"):
        Recipe(position_interpolation="nearest")
    with pytest.raises(ValueError, match="without MoreExperts"):
        Recipe(position_interpolation="bilinear", expert_init=MoreExperts(copies=2))

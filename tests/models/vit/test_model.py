"""The model as training and surgery see it: sizes, loss, what a checkpoint implies."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.models.vit.kinds import KINDS, SHAPE, model, random_params
from upcycle_jax import trees
from upcycle_jax.models import layout
from upcycle_jax.models.base import Model
from upcycle_jax.models.layerwise import LayerwiseModel
from upcycle_jax.models.losses import sigmoid_losses
from upcycle_jax.models.vit.config import VitConfig, VitMoeConfig
from upcycle_jax.models.vit.from_specs import from_specs
from upcycle_jax.models.vit.model import VitModel
from upcycle_jax.state_tree import TARGET
from upcycle_jax.trees import Role

# d, depth, f, heads, patch; then the dense and the 32-expert count of table 1 of arXiv 2212.05055.
TABLE_1 = {
    "B/32": ((768, 12, 3072, 12, 32), 101_519_475, 980_039_283),
    "B/16": ((768, 12, 3072, 12, 16), 99_862_899, 978_382_707),
    "L/32": ((1024, 24, 4096, 16, 32), 324_256_627, 3_447_116_659),
    "L/16": ((1024, 24, 4096, 16, 16), 322_047_859, 3_444_907_891),
}


@pytest.mark.parametrize("name", TABLE_1)
def test_sizes_are_those_of_table_1(name):
    (d, depth, f, heads, patch), dense, sparse = TABLE_1[name]
    for moe, count in ((None, dense), (VitMoeConfig(), sparse)):
        one = VitModel(VitConfig(18_291, 224, patch, d, depth, heads, f, moe=moe))
        assert sum(spec.size for spec in one.param_specs().values()) == count


def test_the_paper_takes_the_last_half_and_v_moe_the_last_odd_ones():
    assert model("renormalised").config.sparse_layers == (2, 3)
    assert layout.sparse_layers(12, 2, "LAST_ODD", stack="encoder") == (9, 11)
    with pytest.raises(ValueError, match="LAST_ODD layout has 2 odd layers of 4"):
        layout.sparse_layers(4, 3, "LAST_ODD", stack="encoder")


@pytest.mark.parametrize("kind", KINDS)
def test_the_shape_is_read_off_specs_and_settings(kind):
    dense = model(kind).config.dense
    specs = {f"{TARGET}{path}": s for path, s in VitModel(dense).param_specs().items()}
    assert from_specs(specs, dense.forward_settings) == dense


def test_it_is_a_model_that_can_be_run_by_layers():
    one = model("renormalised")
    assert isinstance(one, LayerwiseModel)
    checked: Model = one
    stack = checked.stacks["encoder"]
    assert (stack.moe_layers, stack.causal) == (("encoder/layers_2", "encoder/layers_3"), False)
    assert stack.length(one.features.specs(1, {"image": 12})) == 9
    specs = one.param_specs()
    bias = specs["encoder/layers_3/mlp/expert/wi/bias"]
    assert (bias.role, bias.shape, bias.twin) == (
        Role.EXPERT,
        (4, 24),
        "encoder/layers_3/mlp/wi/bias",
    )


def test_a_fresh_model_gives_every_class_alike():
    """The head starts at zero: cross entropy is log 7, whatever the image."""
    one = VitModel(dataclasses.replace(model("renormalised").config, num_layers=2))
    params = jax.jit(one.init_params)(jax.random.key(0))
    assert not trees.diff(one.param_specs(), trees.flatten(params), compare_dtype=True)
    metrics = jax.jit(one.eval_fn)(params, one.features.random(None, batch_size=2))
    loss = metrics["cross_ent_loss"]
    assert float(loss.total / loss.weight) == pytest.approx(np.log(7), abs=1e-5)


def test_groups_need_not_divide_one_image():
    """9 tokens of an image, groups of 6: two images are three groups."""
    moe = VitMoeConfig(num_experts=2, group_size=6)
    one = VitModel(VitConfig(**SHAPE | {"moe": moe}))
    params = trees.unflatten(random_params(one))
    logits = jax.jit(one.logits)(params, one.features.random(None, batch_size=2))
    assert logits.shape == (2, 7)


def test_sigmoid_loss_by_hand():
    # Classes 0 and 1 with logits 0 and log 3; the image is of class 1:
    # -log(1 - 1/2) - log(3/4) = log 2 + log 4/3 = log 8/3.
    found = sigmoid_losses(np.array([[0.0, np.log(3)]], np.float32), np.array([1]))
    np.testing.assert_allclose(found.cross_entropy, [np.log(8 / 3)], rtol=1e-6)
    np.testing.assert_array_equal(found.correct, [1])


def test_images_that_fill_a_batch_up_do_not_count():
    one = model("mean")
    params = trees.unflatten(random_params(one))
    batch = one.features.random(None, batch_size=4)
    batch["weights"] = np.array([1, 1, 0, 0], np.float32)
    first = {name: values[:2] for name, values in batch.items()}

    def loss(batch):
        denominator = one.loss_denominator(batch)
        found = jax.jit(lambda p: one.loss_fn(p, batch, None, denominator=denominator)[0])(params)
        return float(found)

    assert loss(batch) == pytest.approx(loss(first), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "patch_size=5 does not divide image_size=12"),
        ({"num_heads": 3}, "num_heads=3 does not divide emb_dim=16"),
        ({"pool": "max"}, "pool must be"),
        ({"mlp_activations": ("swish",)}, "unknown MLP activations"),
    ],
)
def test_settings_that_fit_no_model_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        VitConfig(**SHAPE | changes)


def test_images_of_another_size_are_refused():
    one = model("mean")
    with pytest.raises(ValueError, match="16 pixels wide, the model takes 12.*IMAGE_SIZE"):
        one.input_specs(2, {"image": 16})
    with pytest.raises(ValueError, match=r"an image has the shape \[12, 12, 1\]"):
        one.features.pad([{"image": np.zeros((12, 12, 1)), "label": 0}], {"image": 12}, 1)
    with pytest.raises(ValueError, match="an image is of dtype int64"):
        one.features.pad([{"image": np.zeros((12, 12, 3), np.int64), "label": 0}], {"image": 12}, 1)


def test_8_bit_images_are_put_into_range():
    one = model("mean")
    image = np.full((12, 12, 3), 255, np.uint8)
    image[0] = 0
    batch = one.features.pad([{"image": image, "label": 3}], {"image": 12}, 2)
    assert (batch["images"][0, 0] == -1).all() and (batch["images"][0, 1:] == 1).all()
    assert batch["labels"].tolist() == [3, 0] and batch["weights"].tolist() == [1, 0]

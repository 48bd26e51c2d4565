"""Gradients of the loss, and images of another size, as transformers' models in torch have them."""

import copy
import dataclasses

import jax
import numpy as np
import pytest
import torch

import upcycle_jax as uj
from tests.checkpoints.huggingface.vit.oracle import CASES, image_size, images, random_model
from upcycle_jax import trees
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.layers.position_grids import interpolate
from upcycle_jax.models.vit.model import VitModel
from upcycle_jax.state_tree import TARGET

LABELS = np.array([1, 2], np.int32)
NAMES = ["vit", "siglip", "dinov2"]
SLOW = ["clip", "gated dinov2", "siglip classifier"]


def in_torch(pixels):
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def write_gradients(name, pixels, folder):
    """Writes a folder whose tensors are the gradients of the loss, so that they are read as leaves
    are; returns the loss: cross entropy of the logits, or of features as if they were logits.
    """
    model = copy.deepcopy(random_model(name))
    logits = CASES[name][3](model(pixel_values=in_torch(pixels)))
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(LABELS).long())
    loss.backward()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.zeros_like(value) if value.grad is None else value.grad)
    model.save_pretrained(folder)
    return loss.item()


def parameters(folder):
    reader = open_checkpoint(folder)
    return {
        path.removeprefix(TARGET): reader.read(path)
        for path in reader.specs()
        if path.startswith(TARGET)
    }


@pytest.mark.parametrize(
    "name", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_gradients_are_those_of_torch(name, written, tmp_path):
    pixels = images(image_size(name))
    expected_loss = write_gradients(name, pixels, tmp_path)
    model = uj.build_model(str(written(name)))
    batch = model.features.batch(pixels, LABELS, len(pixels))
    denominator = model.loss_denominator(batch)

    def loss(params):
        return model.loss_fn(params, batch, None, denominator=denominator)[0]

    value, ours = jax.jit(jax.value_and_grad(loss))(trees.unflatten(parameters(written(name))))
    np.testing.assert_allclose(value, expected_loss, rtol=1e-5)
    found = trees.flatten(ours)
    for path, theirs in parameters(tmp_path).items():
        if path == "cls":
            theirs = theirs / 2  # The sum of the token's gradient and its position's: they equal.
        if path == "head/bias" and name.startswith("clip"):
            continue  # A projection has none.
        np.testing.assert_allclose(found[path], theirs, rtol=1e-4, atol=1e-5, err_msg=path)
        assert np.abs(theirs).max() > 1e-6 or path.endswith("key/bias"), path


def test_images_of_another_size_are_transformers(written):
    pixels = images(20)
    with torch.no_grad():
        network = random_model("vit")
        expected = network(pixel_values=in_torch(pixels), interpolate_pos_encoding=True).logits
    config = uj.build_model(str(written("vit"))).config
    model = VitModel(dataclasses.replace(config, image_size=20))
    params = parameters(written("vit"))
    params["pos_embedding"] = interpolate(params["pos_embedding"], 5, "bicubic")
    batch = model.features.batch(pixels, LABELS, len(pixels))
    found = jax.jit(model.logits)(trees.unflatten(params), batch)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)

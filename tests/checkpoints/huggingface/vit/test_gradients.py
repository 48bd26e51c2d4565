"""Gradients of a whole vision transformer, and images of another size, as transformers has them."""

import dataclasses

import jax
import numpy as np
import torch
from etils import epath

import upcycle_jax as uj
from tests.checkpoints.huggingface.vit.oracle import edited, image_size, images, random_model
from upcycle_jax import trees
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.layers.position_grids import interpolate
from upcycle_jax.models.vit.model import VitModel
from upcycle_jax.state_tree import TARGET

LABELS = np.array([3, 1], np.int32)


def leaves(folder):
    reader = open_checkpoint(epath.Path(folder))
    return {path.removeprefix(TARGET): reader.read(path) for path in reader.specs()}


def in_torch(pixels):
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def test_gradients_are_torchs(written, tmp_path):
    """What a reader does with parameters is linear, so it does the same with their gradients, which
    are written as if they were parameters.
    """
    pixels, network = images(image_size("vit")), random_model("vit")
    network.zero_grad()
    loss = network(pixel_values=in_torch(pixels), labels=torch.from_numpy(LABELS).long()).loss
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in network.named_parameters()}
    network.zero_grad()

    def replaced(found):
        # transformers writes other names than it has in memory: values tell which is which.
        values = {name: p.detach().numpy() for name, p in network.named_parameters()}
        return {
            name: next(gradients[n] for n, v in values.items() if np.array_equal(v, value))
            for name, value in found.items()
        }

    expected = leaves(edited(written("vit"), tmp_path / "gradients", replaced))
    # The reader adds the position of the class token to it; both have one gradient.
    expected["cls"] = expected["cls"] / 2

    model = uj.build_model(str(written("vit")))
    batch = model.features.batch(pixels, LABELS, len(pixels))

    @jax.jit
    def gradient(params):
        denominator = model.loss_denominator(batch)
        return jax.value_and_grad(
            lambda params: model.loss_fn(params, batch, None, denominator=denominator)[0]
        )(params)

    found_loss, found = gradient(trees.unflatten(leaves(written("vit"))))
    np.testing.assert_allclose(found_loss, loss.item(), rtol=1e-5)
    found = trees.flatten(found)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        scale = max(np.abs(value).max(), 1e-3)
        np.testing.assert_allclose(found[path], value, atol=1e-4 * scale, err_msg=path)


def test_images_of_another_size_are_transformers(written):
    pixels = images(20)
    with torch.no_grad():
        network = random_model("vit")
        expected = network(pixel_values=in_torch(pixels), interpolate_pos_encoding=True).logits
    config = uj.build_model(str(written("vit"))).config
    model = VitModel(dataclasses.replace(config, image_size=20))
    params = leaves(written("vit"))
    params["pos_embedding"] = interpolate(params["pos_embedding"], 5, "bicubic")
    batch = model.features.batch(pixels, LABELS, len(pixels))
    found = jax.jit(model.logits)(trees.unflatten(params), batch)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)

"""Folders of vision transformers, written by transformers and computed here."""

import jax
import numpy as np
import pytest
from etils import epath

import upcycle_jax as uj
from tests.checkpoints.huggingface.vit.oracle import CASES, images, random_model, theirs
from upcycle_jax import trees
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.state_tree import TARGET


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a case."""
    made = {}

    def one(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("vit") / name.replace(" ", "_")
            random_model(name).save_pretrained(made[name])
        return made[name]

    return one


def ours(folder, pixels):
    """Features or logits of the model that a folder holds."""
    reader, model = open_checkpoint(epath.Path(folder)), uj.build_model(str(folder))
    params = {path.removeprefix(TARGET): reader.read(path) for path in reader.specs()}
    specs = model.param_specs()
    assert {path: value.shape for path, value in params.items()} == {
        path: spec.shape for path, spec in specs.items()
    }
    labels = np.zeros(len(pixels), np.int32)
    batch = model.features.batch(pixels, labels, len(pixels))
    return jax.jit(model.logits)(trees.unflatten(params), batch)


@pytest.mark.parametrize("name", CASES)
def test_features_and_logits_are_those_of_transformers(name, written):
    pixels = images(random_model(name).config.image_size)
    # What is beyond the last whole patch is seen by neither.
    found = ours(written(name), pixels[:, :12, :12])
    np.testing.assert_allclose(found, theirs(name, pixels), rtol=1e-5, atol=1e-5)

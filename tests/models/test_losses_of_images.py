"""Sigmoid losses of images with several labels: by hand, and as the case of one."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.vit.kinds import SHAPE
from upcycle_jax.features.images import ImageFeatures
from upcycle_jax.models.losses import sigmoid_losses
from upcycle_jax.models.vit.config import VitConfig
from upcycle_jax.models.vit.model import VitModel


def test_one_label_of_several_places_is_one_label():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)
    labels = np.array([4, 0, 2])
    several = np.stack([labels, np.full(3, -1)], axis=1)
    one, other = sigmoid_losses(logits, labels), sigmoid_losses(logits, several)
    np.testing.assert_allclose(other.cross_entropy, one.cross_entropy, atol=1e-6)
    np.testing.assert_array_equal(other.correct, one.correct)


def test_precision_at_one_is_the_most_probable_class_among_the_labels():
    """Logits 0 and one of 2: sum of softplus is 3 log 2 + log(1 + e^2) = 4.20636; the labels' own
    logits are 2 + 0, and 0.
    """
    logits = jnp.asarray([[0.0, 2, 0, 0]] * 3, jnp.float32)
    found = sigmoid_losses(logits, jnp.asarray([[3, 1], [3, 0], [2, -1]]))
    assert found.correct.tolist() == [1, 0, 0]
    np.testing.assert_allclose(found.cross_entropy, [2.20636, 4.20636, 4.20636], atol=1e-4)


def test_batches_hold_as_many_labels_as_the_model_takes():
    features = ImageFeatures(4, 1, 9, max_labels=3)
    image = np.zeros((4, 4, 1), np.uint8)
    examples = [{"image": image, "label": [7, 2]}, {"image": image, "label": 5}]
    batch = features.pad(examples, {"image": 4}, 3)
    assert batch["labels"].tolist() == [[7, 2, -1], [5, -1, -1], [0, 0, 0]]
    assert batch["weights"].tolist() == [1, 1, 0]
    specs = features.specs(3, {"image": 4})
    assert {name: spec.shape for name, spec in specs.items()} == {
        name: value.shape for name, value in batch.items()
    }
    with pytest.raises(ValueError, match="up to 2 labels, the model takes 1: set LABELS_PER_IMAGE"):
        ImageFeatures(4, 1, 9).pad(examples, {"image": 4}, 2)
    with pytest.raises(ValueError, match="the label 9, the model 9 classes"):
        features.pad([{"image": image, "label": [1, 9]}], {"image": 4}, 1)


def test_several_labels_need_the_sigmoid_loss():
    with pytest.raises(ValueError, match="a softmax has one class of an image"):
        VitModel(VitConfig(**SHAPE), labels_per_image=2)
    model = VitModel(VitConfig(**SHAPE), loss="sigmoid", labels_per_image=2)
    batch = model.features.random(None, batch_size=2)
    assert batch["labels"].shape == (2, 2)

"""Image tasks of SeqIO, of examples that the test supplies: read into memory, and cached."""

import io

import numpy as np
import pytest
import seqio
import tensorflow as tf
from PIL import Image

from upcycle_jax import data_folders
from upcycle_jax.data.images import ImageDatasetConfig, named, records_writing
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.features.images import ImageFeatures
from upcycle_jax.tasks import images as tasks

FEATURES = ImageFeatures(4, 1, 3)


def png(grey):
    out = io.BytesIO()
    Image.new("L", (4, 4), grey).save(out, "PNG")
    return out.getvalue()


def source(split, shuffle_files, seed=None):
    """Seven images to train on, two for validation, with a feature that is left out."""
    count = {"train": 7, "validation": 2}[split]
    return tf.data.Dataset.from_tensor_slices(
        {
            "image": [png(30 * number) for number in range(count)],
            "label": np.arange(count) % 3,
            "id": np.arange(count),
        }
    )


@pytest.fixture(scope="module", autouse=True)
def task():
    name = "test_of_images"
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            source, splits=("train", "validation"), num_input_examples={"train": 7, "validation": 2}
        ),
        preprocessors=[tasks.image_and_label],
        output_features=tasks.features(3),
        metric_fns=[],
    )
    yield name
    seqio.TaskRegistry.remove(name)


def opened(name, **changes):
    settings = {"task_feature_lengths": {"image": 4}, "batch_size": 4, "seed": 0, "shuffle": False}
    return open_dataset(ImageDatasetConfig(name, **settings | changes), FEATURES)


def test_a_task_is_read_and_cached_alike(task, tmp_path):
    data = opened(task)
    batch = next(data.train_iterator())
    greys = np.rint((batch["images"][:, 0, 0, 0] + 1) * 127.5)
    assert greys.tolist() == [0, 30, 60, 90] and batch["labels"].tolist() == [0, 1, 2, 0]
    assert data.vocabulary_size() == 3 and data.fingerprint()["tasks"][task]["images"] == 7
    records_writing.write(ImageDatasetConfig(task), tmp_path, num_shards=2, report=str)
    data_folders.configure(cache_dirs=[str(tmp_path)])
    try:
        cached = opened(task, use_cached=True).train_iterator()
        again = data.train_iterator()
        for _ in range(3):
            one, other = next(again), next(cached)
            np.testing.assert_array_equal(one["images"], other["images"])
            np.testing.assert_array_equal(one["labels"], other["labels"])
        assert len(opened(task, use_cached=True, split="validation").images.labels) == 2
    finally:
        data_folders.configure()


@pytest.fixture
def mixture(task):
    """The task and one of other images, three to one."""
    seqio.TaskRegistry.add(
        "test_of_other_images",
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
                {"image": [png(240), png(250)], "label": [0, 1]}
            ),
            splits=("train",),
            num_input_examples={"train": 2},
        ),
        preprocessors=[tasks.image_and_label],
        output_features=tasks.features(3),
        metric_fns=[],
    )
    name = "test_mixture_of_images"
    seqio.MixtureRegistry.add(name, [(task, 3), ("test_of_other_images", 1)])
    yield name
    seqio.MixtureRegistry.remove(name)
    seqio.TaskRegistry.remove("test_of_other_images")


def test_a_registered_mixture_is_read_and_cached_alike(mixture, task, tmp_path):
    data = opened(mixture)
    batch = next(data.train_iterator())
    greys = np.rint((batch["images"][:, 0, 0, 0] + 1) * 127.5)
    assert sorted(greys) == [0, 30, 60, 240]
    assert data.fingerprint()["tasks"]["test_of_other_images"]["rate"] == 1
    assert list(opened(mixture, split="validation").eval_batches()) == [task]
    records_writing.write_sets(ImageDatasetConfig(mixture), tmp_path, report=str)
    data_folders.configure(cache_dirs=[str(tmp_path)])
    try:
        cached = opened(mixture, use_cached=True).train_iterator()
        again = data.train_iterator()
        for _ in range(3):
            one, other = next(again), next(cached)
            np.testing.assert_array_equal(one["images"], other["images"])
        (tmp_path / mixture / "mixture.json").write_text("[")
        with pytest.raises(ValueError, match="cache the mixture again"):
            opened(mixture, use_cached=True)
    finally:
        data_folders.configure()


def test_what_cannot_be_read(task, monkeypatch):
    with pytest.raises(ValueError, match="has no split 'test': it has"):
        opened(task, split="test")
    with pytest.raises(ValueError, match="one of images has 'image' and 'label'"):
        opened("python_source_span_corruption")
    monkeypatch.setattr(named, "MOST_IN_MEMORY", 6)
    with pytest.raises(ValueError, match=r"has 7 images .*too many for memory: cache them"):
        opened(task)


def test_shipped_tasks_are_found_by_name():
    for name, classes in (("imagenet2012", 1000), ("cifar10", 10), ("cifar100", 100)):
        found = seqio.TaskRegistry.get(name)
        assert found.output_features["label"].vocabulary.vocab_size == classes
        assert set(found.splits) == {"train", "validation", "test"}

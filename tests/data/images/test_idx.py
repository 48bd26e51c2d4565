"""Fashion-MNIST's files: their format, what is refused, and the real ones where installed."""

import gzip
import struct

import numpy as np
import pytest

from upcycle_jax.data.images import ImageDatasetConfig, idx
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.features.images import ImageFeatures


def idx_bytes(values, *, kind=8, shape=None):
    shape = values.shape if shape is None else shape
    header = bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    return header + values.tobytes()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Six images to train on and three for validation, of 4 x 4 pixels; one file is compressed."""
    monkeypatch.setenv(idx.VARIABLE, str(tmp_path))
    rng = np.random.default_rng(0)
    for stem, count in (("train", 6), ("t10k", 3)):
        images = rng.integers(0, 256, (count, 4, 4), np.uint8)
        labels = np.arange(count, dtype=np.uint8)
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return tmp_path


def opened(split="train", side=4):
    config = ImageDatasetConfig(
        "fashion_mnist", {"image": side}, split=split, batch_size=3, seed=0, warp=0.0
    )
    return open_dataset(config, ImageFeatures(side, 1, 10))


def test_files_are_read_and_batched(files):
    data = opened()
    assert data.images.images.shape == (6, 4, 4, 1) and data.vocabulary_size() == 10
    first = idx.read(files / "train-images-idx3-ubyte.gz", 3)
    batch = next(data.train_iterator())
    for image, label in zip(batch["images"], batch["labels"], strict=True):
        np.testing.assert_allclose(image[..., 0], first[label] / 127.5 - 1, atol=1e-6)
    assert len(opened("validation").images.labels) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00", "it is no idx file"),
        (idx_bytes(np.zeros((2, 2), np.uint8)), "it holds 2 dimensions of type 0x08"),
        (idx_bytes(np.zeros((1, 1, 1), np.float32), kind=13), "of type 0x0d"),
        (idx_bytes(np.zeros(3, np.uint8), shape=(6, 4, 4)), "claims 96 values, it has only 3"),
        (idx_bytes(np.zeros(17, np.uint8), shape=(1, 4, 4)), "claims 16 values, it has more"),
        (idx_bytes(np.zeros(3, np.uint8), shape=(2**31, 2**31, 9)), "it claims 41,"),
    ],
)
def test_damaged_files_are_refused_before_memory_is_taken(files, content, message):
    path = files / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=message):
        opened()


def test_what_is_missing_is_told(files, tmp_path_factory, monkeypatch):
    with pytest.raises(ValueError, match="fashion_mnist has train, validation"):
        opened("held_out")
    (files / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(5, np.uint8)))
    with pytest.raises(ValueError, match="6 images and 5 labels"):
        opened()
    monkeypatch.setenv(idx.VARIABLE, str(tmp_path_factory.mktemp("empty")))
    with pytest.raises(FileNotFoundError, match="apt install dataset-fashion-mnist"):
        opened()


def test_the_real_files():
    if idx.folder() is None:
        pytest.skip("dataset-fashion-mnist is not installed")
    data = opened(side=28)
    assert data.images.images.shape == (60000, 28, 28, 1)
    assert np.bincount(data.images.labels).tolist() == [6000] * 10
    assert len(opened("validation", side=28).images.labels) == 10000

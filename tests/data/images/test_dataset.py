"""Labelled images as a stream: the same for a seed, resumed anywhere, divided among processes."""

import itertools

import numpy as np
import pytest

from upcycle_jax.data.images import ImageDatasetConfig, glyphs
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.features import DecoderOnlyFeatures
from upcycle_jax.features.images import ImageFeatures

FEATURES = ImageFeatures(8, 1, 3)


@pytest.fixture
def arrays(tmp_path):
    """Ten images that tell their number by their grey, in three classes."""
    grey = np.arange(10, dtype=np.uint8)[:, None, None] * 25
    images = np.broadcast_to(grey, (10, 8, 8))
    labels = np.arange(10) % 3
    path = tmp_path / "images.npz"
    np.savez(
        path,
        train_images=images,
        train_labels=labels,
        validation_images=images[:5],
        validation_labels=labels[:5],
    )
    return str(path)


def dataset(arrays, features=FEATURES, **changes):
    settings = {
        "mixture_or_task_name": "mine",
        "task_feature_lengths": {"image": 8},
        "batch_size": 4,
        "seed": 7,
        "arrays": arrays,
        "warp": 0.0,
    }
    return open_dataset(ImageDatasetConfig(**settings | changes), features)


def numbers(batch):
    """Which images a batch holds, told by their grey."""
    return np.rint((batch["images"].mean((1, 2, 3)) + 1) * 127.5 / 25).astype(int)


def test_an_epoch_has_every_image_once_and_the_next_another_order(arrays):
    stream = itertools.islice(dataset(arrays).train_iterator(), 5)
    batches = list(stream)
    seen = np.concatenate([numbers(batch) for batch in batches])
    assert sorted(seen[:10]) == list(range(10)) == sorted(seen[10:])
    assert list(seen[:10]) != list(seen[10:])
    labels = np.concatenate([batch["labels"] for batch in batches])
    np.testing.assert_array_equal(labels, seen % 3)


def test_in_order_without_shuffling(arrays):
    stream = dataset(arrays, shuffle=False).train_iterator()
    assert [list(numbers(next(stream))) for _ in range(3)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 0, 1],
    ]


def test_a_resumed_stream_goes_on_with_the_same_views(arrays, tmp_path):
    stream = dataset(arrays, warp=1.0).train_iterator()
    for _ in range(3):
        next(stream)
    stream.save(tmp_path / "position")
    expected = [next(stream) for _ in range(3)]
    again = dataset(arrays, warp=1.0).train_iterator()
    again.restore(tmp_path / "position")
    sought = dataset(arrays, warp=1.0).train_iterator()
    sought.seek(3)
    for batch in expected:
        for found in (next(again), next(sought)):
            np.testing.assert_array_equal(found["images"], batch["images"])
            np.testing.assert_array_equal(found["labels"], batch["labels"])
    with pytest.raises(ValueError, match="position"):
        dataset(arrays, warp=0.5).train_iterator().restore(tmp_path / "position")


def test_processes_share_a_batch(arrays):
    whole = next(dataset(arrays, warp=1.0).train_iterator())
    parts = [next(dataset(arrays, warp=1.0).train_iterator(number, 2)) for number in range(2)]
    together = np.concatenate([part["images"] for part in parts])
    np.testing.assert_array_equal(together, whole["images"])


def test_evaluation_sees_each_image_once_and_the_same_every_time(arrays):
    one = dataset(arrays, split="validation", warp=1.0)
    run = one.eval_batches()["mine"]
    first, second = list(run()), list(run())
    assert len(first) == 2 and first[1]["weights"].tolist() == [1, 0, 0, 0]
    assert sorted(np.concatenate([b["labels"][b["weights"] > 0] for b in first])) == [0, 0, 1, 1, 2]
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a["images"], b["images"])


@pytest.mark.parametrize(
    ("features", "changes", "message"),
    [
        (FEATURES, {"task_feature_lengths": {"image": 9}}, "9 pixels wide, the model takes 8"),
        (ImageFeatures(8, 1, 2), {}, "mine has 3 classes, the model 2: set NUM_CLASSES"),
        (DecoderOnlyFeatures(), {}, "mine are images, the model takes none"),
        (FEATURES, {"split": "held_out"}, "has no array held_out_images"),
    ],
)
def test_data_that_do_not_fit_the_model_are_refused(features, changes, message, arrays):
    with pytest.raises(ValueError, match=message):
        dataset(arrays, features, **changes)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"train_images": np.zeros((2, 8, 8), np.float32)}, r"images are float32 \[2, 8, 8, 1\]"),
        ({"train_images": np.zeros((2, 8, 4), np.uint8)}, "uint8"),
        ({"train_labels": np.zeros(3, int)}, r"labels are int64 \[3\], of 2 images"),
        ({"train_labels": np.array([0, -1])}, "a label is -1: classes are counted from 0"),
        ({"train_labels": np.array([{}, {}], object)}, "pickle"),
    ],
)
def test_damaged_arrays_are_refused(found, message, tmp_path):
    whole = {"train_images": np.zeros((2, 8, 8), np.uint8), "train_labels": np.zeros(2, int)}
    np.savez(tmp_path / "images.npz", **whole | found)
    with pytest.raises(ValueError, match=message):
        dataset(str(tmp_path / "images.npz"))


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "images.npz").write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(ValueError, match="images.npz"):
        dataset(str(tmp_path / "images.npz"))
    with pytest.raises(FileNotFoundError):
        dataset(str(tmp_path / "nothing.npz"))


def test_settings_of_text_are_refused():
    with pytest.raises(ValueError, match="pack and text_files are for text"):
        ImageDatasetConfig(pack=True)
    with pytest.raises(ValueError, match="images have train, validation, held_out"):
        ImageDatasetConfig(split="test")
    with pytest.raises(ValueError, match="no SeqIO task or mixture is named 'cifar': did you mean"):
        open_dataset(ImageDatasetConfig(mixture_or_task_name="cifar"), ImageFeatures(32))


def test_glyphs_are_thousands_of_distinct_classes():
    found = glyphs.load()
    count = len(found.code_points)
    assert count > 3000 and found.images.shape[1:] == (48, 48)
    per_class = np.bincount(found.classes, minlength=count)
    assert per_class.min() >= glyphs.MIN_FACES and per_class.max() == len(glyphs.FACES)
    letters = [chr(code_point) for code_point in found.code_points]
    # Greek Alpha and Cyrillic A look like the Latin letter, and are one class with it.
    assert "A" in letters and "\N{GREEK CAPITAL LETTER ALPHA}" not in letters
    assert "\N{CYRILLIC CAPITAL LETTER ZHE}" in letters
    features = ImageFeatures(32, 1)
    trained = open_dataset(ImageDatasetConfig(seed=0), features).images
    held_out = open_dataset(ImageDatasetConfig(seed=0, split="held_out"), features).images
    assert trained.num_classes + held_out.num_classes == count
    designs = [
        open_dataset(ImageDatasetConfig(f"glyphs_{name}", num_classes=7), features).images
        for name in ("sans", "serif", "mono")
    ]
    few = open_dataset(ImageDatasetConfig(seed=0, num_classes=7), features).images
    # The faces are three domains of the same classes.
    assert [one.num_classes for one in designs] == [7] * 3
    together = np.concatenate([one.labels for one in designs])
    np.testing.assert_array_equal(np.sort(together), np.sort(few.labels))
    assert all(set(one.labels) == set(range(7)) for one in designs)
    assert few.num_classes == 7 and few.labels.max() == 6

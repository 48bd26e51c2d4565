"""Several sets of images in one stream: shares, order, resumption, caches, and what is refused."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from tests.data.images.test_folders import write_image
from upcycle_jax import cache_tasks, data_folders
from upcycle_jax.data.images import ImageDatasetConfig, records_writing
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.features.images import ImageFeatures

FEATURES = ImageFeatures(8, 1, 3)


def write_set(path, greys, *, classes=3, splits=("train", "validation")):
    """An archive of images that are told by their grey."""
    values = np.asarray(greys, np.uint8)[:, None, None]
    labels = np.arange(len(greys)) % classes
    arrays = {}
    for split in splits:
        arrays[f"{split}_images"] = np.broadcast_to(values, (len(greys), 8, 8))
        arrays[f"{split}_labels"] = labels
    np.savez(path, **arrays)
    return str(path)


LOW, HIGH = (0, 10, 20, 30, 40, 50), (200, 210, 220, 230)


@pytest.fixture
def shares(tmp_path):
    """Three times as many images of six low greys as of four high ones."""
    return {
        "low": (write_set(tmp_path / "low.npz", LOW), 3),
        "high": (write_set(tmp_path / "high.npz", HIGH), 1),
    }


def dataset(mixture, features=FEATURES, **changes):
    settings = {
        "mixture_or_task_name": "both",
        "task_feature_lengths": {"image": features.size},
        "batch_size": 4,
        "seed": 7,
        "mixture": mixture,
        "warp": 0.0,
    }
    return open_dataset(ImageDatasetConfig(**settings | changes), features)


def greys(batch):
    return np.rint((batch["images"].mean((1, 2, 3)) + 1) * 127.5).astype(int)


def test_sets_are_shown_as_often_as_their_shares_say(shares):
    batches = list(itertools.islice(dataset(shares).train_iterator(), 8))
    seen = np.stack([greys(batch) for batch in batches])  # [8, 4]
    # Three of four rows are low: 24 images are four epochs of six, 8 two epochs of four.
    assert ((seen < 100).sum(axis=1) == 3).all()
    low, high = seen[seen < 100], seen[seen > 100]
    for epoch in range(4):
        assert sorted(low[6 * epoch : 6 * epoch + 6]) == list(LOW)
    for epoch in range(2):
        assert sorted(high[4 * epoch : 4 * epoch + 4]) == list(HIGH)
    assert list(low[:6]) != list(low[6:12])
    labels = np.stack([batch["labels"] for batch in batches])
    expected = [[(LOW + HIGH).index(one) % 6 % 3 for one in row] for row in seen]
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("rates", [(1, 1), (0.7, 0.3)])
def test_long_streams_keep_the_shares(rates, tmp_path):
    shares = {
        name: (write_set(tmp_path / f"{name}.npz", values), rate)
        for name, values, rate in zip(("low", "high"), (LOW, HIGH), rates, strict=True)
    }
    data = dataset(shares, batch_size=500)
    seen = np.concatenate([greys(b) for b in itertools.islice(data.train_iterator(), 2)])
    assert np.mean(seen < 100) == pytest.approx(rates[0] / sum(rates), abs=0.01)


def test_a_resumed_stream_goes_on_with_the_same_views(shares, tmp_path):
    stream = dataset(shares, warp=1.0).train_iterator()
    for _ in range(3):
        next(stream)
    stream.save(tmp_path / "position")
    expected = [next(stream) for _ in range(3)]
    again, sought = (dataset(shares, warp=1.0).train_iterator() for _ in range(2))
    again.restore(tmp_path / "position")
    sought.seek(3)
    for batch in expected:
        for found in (next(again), next(sought)):
            for name in batch:
                np.testing.assert_array_equal(found[name], batch[name])
    low, high = shares["low"][0], shares["high"][0]
    for other in ({"low": (low, 2), "high": (high, 1)}, {"low": (low, 3)}):
        with pytest.raises(ValueError, match="position"):
            dataset(other, warp=1.0).train_iterator().restore(tmp_path / "position")


def test_processes_share_a_batch(shares):
    whole = next(dataset(shares, warp=1.0).train_iterator())
    parts = [next(dataset(shares, warp=1.0).train_iterator(number, 2)) for number in range(2)]
    for name in whole:
        together = np.concatenate([part[name] for part in parts])
        np.testing.assert_array_equal(together, whole[name])


def test_every_set_is_evaluated_by_itself(shares, tmp_path, caplog):
    shares["new"] = (write_set(tmp_path / "new.npz", (90, 91, 92), splits=("train",)), 1)
    data = dataset(shares, split="validation")
    assert data.task_names() == ("high", "low", "new") and data.vocabulary_size() == 3
    runs = data.eval_batches()
    assert list(runs) == ["high", "low"]
    assert "new is not evaluated" in caplog.text and "validation_images" in caplog.text
    seen = np.concatenate([greys(b)[b["weights"] > 0] for b in runs["low"]()])
    assert sorted(seen) == list(LOW)
    with pytest.raises(ValueError, match=r"new\.npz: has no array validation_images"):
        data.train_iterator()
    with pytest.raises(ValueError, match="split is 'test': images have train"):
        dataset(shares, split="test")


def test_glyphs_and_images_of_ones_own_are_one_stream(tmp_path):
    mine = write_set(tmp_path / "mine.npz", (0, 100, 255))
    shares = {"glyphs": 1.0, "mine": (mine, 1.0)}
    settings = {"num_classes": 3, "warp": 1.0, "batch_size": 8}
    one, other = (
        next(dataset(shares, use_cached=cached, **settings).train_iterator())
        for cached in (False, True)
    )
    assert len({image.tobytes() for image in one["images"]}) == 8
    for name in one:  # Nothing of them is cached.
        np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture
def folders(tmp_path):
    """Two folders of two classes."""
    for place, name, values in (("a", "cat", (0, 10, 20)), ("a", "dog", (30, 40))):
        for grey in values:
            write_image(tmp_path / place / "train" / name / f"{grey}.png", grey)
    for name, values in (("cat", (200,)), ("dog", (210, 220))):
        for grey in values:
            write_image(tmp_path / "b" / "train" / name / f"{grey}.png", grey)
    return {"a": (str(tmp_path / "a"), 1), "b": (str(tmp_path / "b"), 1)}


@pytest.mark.parametrize("shorter_side", [None, 8])
def test_a_cached_mixture_is_that_of_the_files(folders, tmp_path, capsys, shorter_side):
    assert (
        cache_tasks.main(
            [
                "--gin_file=runs/cache_images.gin",
                "--gin.MIXTURE_OR_TASK_NAME='both'",
                f"--gin.IMAGE_MIXTURE={folders}",
                f"--gin.IMAGE_SHORTER_SIDE={shorter_side}",
                f"--output_cache_dir={tmp_path / 'cache'}",
            ]
        )
        == 0
    )
    assert "a, train: 5 images" in capsys.readouterr().out
    features = ImageFeatures(8, 3, 2)
    data_folders.configure(cache_dirs=[str(tmp_path / "cache")])
    try:
        named = {name: rate for name, (_, rate) in folders.items()}
        streams = [
            dataset(
                mixture, features, use_cached=cached, shorter_side=shorter_side
            ).train_iterator()
            for mixture, cached in ((folders, False), (folders, True), (named, True))
        ]
        for _ in range(4):
            files, *cached = map(next, streams)
            for found in cached:
                for name in files:
                    np.testing.assert_array_equal(found[name], files[name])
        opened = dataset(named, features, use_cached=True, shorter_side=shorter_side)
        assert opened.verify() > 0
        with pytest.raises(FileNotFoundError, match="images of 'c' are not cached"):
            dataset({**named, "c": 1}, features, use_cached=True, shorter_side=shorter_side)
    finally:
        data_folders.configure()


def test_other_classes_are_refused(shares, folders, tmp_path):
    shares["few"] = (write_set(tmp_path / "few.npz", (1, 2, 3, 4), classes=2), 1)
    with pytest.raises(ValueError, match=r"different numbers of classes \(few 2, high 3, low 3\)"):
        dataset(shares)
    (tmp_path / "b" / "train" / "dog").rename(tmp_path / "b" / "train" / "owl")
    with pytest.raises(ValueError, match="1 is 'dog' in a and 'owl' in b"):
        dataset(folders, ImageFeatures(8, 3, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixture": {}}, "is empty"),
        ({"mixture": {"a": 0}}, "must be above 0"),
        ({"mixture": {"a": -1.0}}, "must be above 0"),
        ({"mixture": {"a": ("", 1)}}, "is empty: name a file"),
        ({"mixture": {"a": ("/data", 1, 2)}}, "mixture"),
        ({"mixture": ["a"]}, "must be a dictionary"),
        ({"mixture": {"both": 1}}, "give the mixture a name of its own"),
        ({"mixture": {"a": 1}, "folder": "/data"}, "places of their own"),
    ],
)
def test_mixtures_that_are_none(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageDatasetConfig(**{"mixture_or_task_name": "both"} | settings)


WITHOUT_TENSORFLOW = """
import sys
for name in ("tensorflow", "seqio", "tensorflow_datasets"):
    sys.modules[name] = None
from upcycle_jax import data_folders
from upcycle_jax.data.images import ImageDatasetConfig, open_images
from upcycle_jax.features.images import ImageFeatures
data_folders.configure(cache_dirs=[sys.argv[1]])
config = ImageDatasetConfig(
    "both", {"image": 8}, batch_size=4, seed=7, warp=0.0, use_cached=True, mixture={"a": 1, "b": 1}
)
batch = next(open_images(config, ImageFeatures(8, 3, 2)).train_iterator())
print(batch["labels"].tolist())
"""


def test_caches_are_read_without_tensorflow(folders, tmp_path):
    for name, (place, _) in folders.items():
        config = ImageDatasetConfig(name, folder=place)
        records_writing.write(config, tmp_path / "cache", report=str)
    command = [sys.executable, "-c", WITHOUT_TENSORFLOW, str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    batch = next(dataset(folders, ImageFeatures(8, 3, 2)).train_iterator())
    assert done.stdout.strip() == str(batch["labels"].tolist()), done.stderr

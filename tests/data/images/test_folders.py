"""Images as files: folders, crops, and what is refused."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from upcycle_jax import data_folders
from upcycle_jax.data.images import ImageDatasetConfig, crops, records, records_writing
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.features.images import ImageFeatures

FEATURES = ImageFeatures(8, 3, 2)


def write_image(path, grey, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes; images tell their number by their grey: cats 0, 20, 40, dogs 100, 120."""
    root = tmp_path / "pets"
    for number in range(3):
        write_image(root / "train" / "cat" / f"{number}.png", 20 * number)
    for number in range(2):
        write_image(root / "train" / "dog" / f"{number}.PNG", 100 + 20 * number)
    write_image(root / "val" / "dog" / "x.png", 200)
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    return root


def dataset(root, features=FEATURES, **changes):
    settings = {
        "mixture_or_task_name": "pets",
        "task_feature_lengths": {"image": features.size},
        "batch_size": 4,
        "seed": 7,
        "folder": str(root),
    }
    return open_dataset(ImageDatasetConfig(**settings | changes), features)


def greys(batch):
    return np.rint((batch["images"].mean((1, 2, 3)) + 1) * 127.5).astype(int).tolist()


def test_an_epoch_has_every_file_once_with_its_class(folder):
    batches = list(itertools.islice(dataset(folder).train_iterator(), 5))
    seen = list(itertools.chain.from_iterable(map(greys, batches)))
    assert sorted(seen[:5]) == [0, 20, 40, 100, 120] == sorted(seen[5:10])
    labels = np.concatenate([batch["labels"] for batch in batches])
    assert labels.tolist() == [int(grey >= 100) for grey in seen]
    # The classes are those of the training split, under whichever name the split lies there.
    (run,) = dataset(folder, split="validation").eval_batches().values()
    (batch,) = run()
    assert batch["labels"].tolist() == [1, 0, 0, 0] and batch["weights"].tolist() == [1, 0, 0, 0]
    assert greys(batch)[0] == 200


def test_a_resumed_stream_goes_on_with_the_same_crops(folder, tmp_path):
    rng = np.random.default_rng(0)
    for path in (folder / "train").rglob("*.[pP]*"):
        Image.fromarray(rng.integers(0, 256, (12, 15, 3), dtype=np.uint8)).save(path)
    augmented = {"crop": "inception", "flip": True}
    stream = dataset(folder, **augmented).train_iterator()
    first = [next(stream) for _ in range(3)]
    stream.save(tmp_path / "position")
    expected = [next(stream) for _ in range(3)]
    again = dataset(folder, **augmented).train_iterator()
    again.restore(tmp_path / "position")
    for batch in expected:
        np.testing.assert_array_equal(next(again)["images"], batch["images"])
    parts = [next(dataset(folder, **augmented).train_iterator(i, 2)) for i in range(2)]
    together = np.concatenate([part["images"] for part in parts])
    np.testing.assert_array_equal(together, first[0]["images"])
    with pytest.raises(ValueError, match="position"):
        dataset(folder, crop="inception").train_iterator().restore(tmp_path / "position")


def test_crops_by_hand():
    # 16 x 8: 7/8 of the shorter side, 7, in the middle.
    assert crops.central_box(16, 8) == (4.5, 0.5, 11.5, 7.5)
    # Area 0.05 + 0.95 * 0.2 = 0.24 of 200 = 48, as wide as 3/4 + 7/12 * 3/7 = 1 of its height: the
    # square root of 48 both ways; a quarter of the room to its left, half above.
    draws = np.zeros(40)
    draws[:4] = 0.2, 3 / 7, 0.25, 0.5
    side = 48**0.5
    wanted = ((20 - side) / 4, (10 - side) / 2, (20 - side) / 4 + side, (10 - side) / 2 + side)
    assert crops.inception_box(20, 10, draws) == pytest.approx(wanted)
    # A first draw that does not fit (all of the area, and wider than high) gives way to the second.
    draws[4:8] = draws[:4]
    draws[:4] = 1.0, 1.0, 0.0, 0.0
    assert crops.inception_box(10, 20, draws) == pytest.approx(
        ((10 - side) / 4, (20 - side) / 2, (10 - side) / 4 + side, (20 - side) / 2 + side)
    )
    # None fits: all of it.
    assert crops.inception_box(10, 20, np.ones(40)) == (0, 0, 10, 20)


def test_random_parts_are_as_large_as_promised_and_half_are_mirrored():
    draws = crops.drawn(3, np.arange(2000))
    boxes = np.array([crops.inception_box(300, 200, row[:-1]) for row in draws])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = width * height / 60000
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 300).all() and (boxes[:, 3] <= 200).all()
    part = area < 0.999
    assert area.min() >= 0.05 and area.mean() > 0.3 and part.mean() > 0.95
    ratio = (width / height)[part]
    assert ratio.min() >= 0.7499 and ratio.max() <= 1.3334
    assert abs((draws[:, -1] < 0.5).mean() - 0.5) < 0.05


def test_a_view_is_the_part_scaled_and_mirrored():
    # Columns 0..15 of grey 10 * column, cropped to columns 4.5..11.5: 7 to 7 pixels would be as it
    # is; here to 1 pixel, their mean 80 - 5 (pixel centres) = 75.
    row = np.arange(16, dtype=np.uint8)[None, :] * 10
    image = Image.fromarray(np.repeat(row, 8, axis=0))
    one = crops.view(image, 1, "central", False, np.ones(41))
    assert abs(int(one[0, 0, 0]) - 75) <= 1
    plain, mirrored = (crops.view(image, 8, "none", flip, np.zeros(41)) for flip in (False, True))
    np.testing.assert_array_equal(plain[:, ::-1], mirrored)
    kept = crops.view(image, 8, "none", True, np.ones(41))
    np.testing.assert_array_equal(plain, kept)


@pytest.mark.parametrize(
    ("spoil", "changes", "message"),
    [
        (lambda root: None, {"folder": "/nowhere"}, "/nowhere is not a folder"),
        (lambda root: None, {"split": "test"}, r"has no split 'test', only train, validation"),
        (lambda root: (root / "train" / "eel").mkdir(), {}, "eel holds no image"),
        (lambda root: (root / "test").mkdir(), {"split": "test"}, "test is empty: it holds a"),
        (
            lambda root: write_image(root / "val" / "emu" / "1.png", 3),
            {"split": "validation"},
            "has the class 'emu', which .*train has not",
        ),
        (lambda root: None, {"use_cached": True}, "from one place, not from folder"),
    ],
)
def test_folders_that_do_not_fit_are_refused(folder, spoil, changes, message):
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dataset(folder, **changes)


def bytes_of(mode, size, form="PNG"):
    out = io.BytesIO()
    Image.new(mode, size).save(out, form)
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image at all", r"cat/0\.png cannot be read .* mend it or take it out"),
        (bytes_of("RGB", (8, 8))[:-30], r"cat/0\.png cannot be read"),
        (bytes_of("RGB", (8, 8), "GIF"), r"cat/0\.png cannot be read"),
        (bytes_of("I;16", (8, 8)), "of mode I;16: images of 8 bits are read"),
        (bytes_of("RGB", (9, 7)), "is 9 x 7 pixels, the model takes 8 x 8: set IMAGE_CROP"),
    ],
)
def test_files_that_cannot_be_used_are_named(folder, content, message):
    (folder / "train" / "cat" / "0.png").write_bytes(content)
    stream = dataset(folder, shuffle=False).train_iterator()
    with pytest.raises(ValueError, match=message):
        next(stream)


def test_an_image_of_too_many_pixels_is_not_decoded(folder, monkeypatch):
    monkeypatch.setattr("upcycle_jax.data.images.decoding._MOST_PIXELS", 63)
    with pytest.raises(ValueError, match="it has 8 x 8 pixels, too many"):
        next(dataset(folder).train_iterator())


@pytest.fixture
def cached(folder, tmp_path):
    """The folder's images, cached in files of two images."""
    said = []
    config = ImageDatasetConfig(mixture_or_task_name="pets", folder=str(folder), split="train")
    records_writing.write(config, tmp_path / "cache", num_shards=3, report=said.append)
    data_folders.configure(cache_dirs=[str(tmp_path / "cache")])
    yield tmp_path / "cache" / "pets", config, said
    data_folders.configure()


def test_cached_images_are_the_folders(folder, cached):
    place, config, said = cached
    assert any("pets, train: 5 images" in line for line in said)
    from_files, from_cache = (
        dataset(folder, folder=where, use_cached=where is None, crop="central").train_iterator()
        for where in (str(folder), None)
    )
    for _ in range(4):
        one, other = next(from_files), next(from_cache)
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    opened = dataset(folder, folder=None, use_cached=True)
    assert opened.vocabulary_size() == 2 and opened.verify() > 0
    said.clear()
    records_writing.write(config, place.parent, num_shards=3, verify=True, report=said.append)
    assert said == [f"pets: cached already at {place}"]


def test_a_killed_cache_goes_on_after_the_last_whole_file(folder, tmp_path, monkeypatch):
    config = ImageDatasetConfig(mixture_or_task_name="pets", folder=str(folder), split="train")
    read, cache = [], tmp_path / "cache"
    whole = records_writing.folders.FolderImages.encoded

    def encoded(self, place):
        if len(read) == 3:
            raise KeyboardInterrupt
        read.append(place)
        return whole(self, place)

    monkeypatch.setattr(records_writing.folders.FolderImages, "encoded", encoded)
    with pytest.raises(KeyboardInterrupt):
        records_writing.write(
            config, tmp_path / "cache", splits=["train"], num_shards=5, report=str
        )
    assert read == [0, 1, 2] and not (tmp_path / "cache" / "pets").exists()
    monkeypatch.setattr(
        records_writing.folders.FolderImages,
        "encoded",
        lambda self, place: read.append(place) or whole(self, place),
    )
    records_writing.write(config, cache, splits=["train"], num_shards=5, report=str)
    assert read == [0, 1, 2, 3, 4]
    manifest = records.ImageManifest.read(tmp_path / "cache" / "pets", remedy="")
    assert manifest.splits["train"].count == 5 and list(manifest.classes) == ["cat", "dog"]
    held = records.RecordImages(tmp_path / "cache" / "pets", manifest, "train", remedy="")
    assert [np.asarray(held.image(i, channels=1, at_least=1))[0, 0] for i in range(5)] == [
        *(0, 20, 40, 100, 120)
    ]


def test_damaged_and_missing_caches_are_told(folder, cached):
    place, config, _ = cached
    with pytest.raises(FileNotFoundError, match=r"'birds' are not cached .*cache_images\.gin"):
        dataset(folder, folder=None, use_cached=True, mixture_or_task_name="birds")
    with pytest.raises(ValueError, match="has no split 'test': it has"):
        dataset(folder, folder=None, use_cached=True, split="test")
    write_image(folder / "train" / "cat" / "new.png", 7)
    with pytest.raises(ValueError, match="holds a cache of other images"):
        records_writing.write(config, place.parent, num_shards=3, report=str)
    first = next(place.glob("train-00000*.array_record"))
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    with pytest.raises(ValueError, match="other content than was written: cache them again"):
        dataset(folder, folder=None, use_cached=True).verify()
    first.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="were written: cache them again"):
        dataset(folder, folder=None, use_cached=True)


def test_a_corrupt_image_is_not_cached(folder, tmp_path):
    (folder / "train" / "dog" / "0.PNG").write_bytes(b"nothing")
    config = ImageDatasetConfig(mixture_or_task_name="pets", folder=str(folder), split="train")
    with pytest.raises(ValueError, match=r"dog/0\.PNG cannot be read"):
        records_writing.write(config, tmp_path / "cache", report=str)
    assert not (tmp_path / "cache" / "pets").exists()

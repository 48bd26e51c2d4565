"""Images that are scaled before they are cropped, and cached as pixels."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from upcycle_jax import data_folders
from upcycle_jax.data.cache.format import digest
from upcycle_jax.data.images import ImageDatasetConfig, decoding, records, records_writing
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.features.images import ImageFeatures

FEATURES = ImageFeatures(8, 3, 2)


def dataset(root, features=FEATURES, **changes):
    settings = {
        "mixture_or_task_name": "pets",
        "task_feature_lengths": {"image": features.size},
        "batch_size": 4,
        "seed": 7,
        "folder": str(root),
    }
    return open_dataset(ImageDatasetConfig(**settings | changes), features)


def photograph(path, size, *, mode="RGB"):
    """A smooth image in colours, or grey, under the suffix's form."""
    rng = np.random.default_rng([*path.name.encode()])
    shape = (5, 5) if mode == "L" else (5, 5, 3)
    coarse = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse.resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def photographs(tmp_path):
    """JPEG and PNG files, wide and high, in colours and grey, larger and smaller than 12 pixels."""
    root = tmp_path / "pets"
    photograph(root / "train" / "cat" / "0.jpg", (40, 30))
    photograph(root / "train" / "cat" / "1.png", (20, 50))
    photograph(root / "train" / "dog" / "0.png", (25, 17), mode="L")
    photograph(root / "train" / "dog" / "1.jpg", (64, 64), mode="L")
    photograph(root / "train" / "dog" / "2.jpg", (11, 14))
    return root


def cached_pixels(root, cache, shorter_side=12, **options):
    """Caches the folder's images and makes the cache known."""
    config = ImageDatasetConfig("pets", folder=str(root), shorter_side=shorter_side)
    records_writing.write(config, cache, report=str, **options)
    data_folders.configure(cache_dirs=[str(cache)])
    return cache / "pets"


@pytest.fixture(autouse=True)
def _forget_caches():
    yield
    data_folders.configure()


def test_a_shorter_side_is_scaled_to_once():
    # Columns 0, 40, 80, 120 of a 4 x 2 image; to a shorter side of 1: 2 x 1. A new pixel's middle
    # is 0.5, 0.5 and 1.5 old ones away from the middles of three, so a triangle that ends 2 away
    # weighs them 3/4, 3/4 and 1/4: (0.75 * 0 + 0.75 * 40 + 0.25 * 80) / 1.75 = 28.57; 91.43 of the
    # others likewise.
    columns = np.array([[0, 40, 80, 120]] * 2, np.uint8)
    small = decoding.shrunk(Image.fromarray(columns), 1)
    assert small.size == (2, 1)
    assert np.asarray(small).tolist() == [[29, 91]]
    assert decoding.shrunk(small, 1) is small
    assert decoding.shrunk(Image.new("RGB", (301, 200)), 100).size == (150, 100)
    assert decoding.shrunk(Image.new("RGB", (9, 90)), 10).size == (9, 90)


@pytest.mark.parametrize("crop", ["central", "inception"])
def test_cached_pixels_give_the_views_of_the_files(photographs, tmp_path, crop):
    place = cached_pixels(photographs, tmp_path / "cache", num_shards=2)
    assert records.ImageManifest.read(place, remedy="").format == records.PIXELS
    settings = {"crop": crop, "flip": True, "shorter_side": 12}
    files, pixels = (
        dataset(photographs, folder=where, use_cached=where is None, **settings)
        for where in (str(photographs), None)
    )
    (one_pass,), (other_pass,) = files.eval_batches().values(), pixels.eval_batches().values()
    streams = files.train_iterator(), pixels.train_iterator()
    for one, other in [
        *zip(one_pass(), other_pass(), strict=True),
        *itertools.islice(zip(*streams, strict=True), 6),
    ]:
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    streams[1].save(tmp_path / "position")
    again = dataset(photographs, folder=None, use_cached=True, **settings).train_iterator()
    again.restore(tmp_path / "position")
    for _ in range(3):
        np.testing.assert_array_equal(next(again)["images"], next(streams[0])["images"])
    assert pixels.verify() > 0


def test_pixels_that_need_no_scaling_are_those_of_the_run_without(photographs, tmp_path):
    # 64 pixels is the largest shorter side, and no view of 8 pixels lets a JPEG be halved below it.
    cached_pixels(photographs, tmp_path / "cache", shorter_side=64)
    plain = dataset(photographs, crop="inception").train_iterator()
    pixels = dataset(
        photographs, folder=None, use_cached=True, crop="inception", shorter_side=64
    ).train_iterator()
    for _ in range(3):
        np.testing.assert_array_equal(next(plain)["images"], next(pixels)["images"])


def test_caches_of_files_are_scaled_as_they_are_read(photographs, tmp_path):
    place = cached_pixels(photographs, tmp_path / "cache", shorter_side=None)
    manifest = json.loads((place / "images.json").read_text())
    assert manifest["format"] == 1 and "shorter_side" not in manifest
    split = manifest["splits"]["train"]
    assert list(split) == ["files", "labels"]
    # What positions in the stream were saved with before there were caches of pixels.
    plain = dataset(photographs, folder=None, use_cached=True, crop="inception")
    assert plain.fingerprint()["tasks"]["pets"] == {
        "images": 5,
        "classes": 2,
        "cache": digest([split, 2]),
        "warp": 1.0,
        "crop": "inception",
        "flip": False,
    }
    settings = {"crop": "inception", "shorter_side": 12}
    files = dataset(photographs, **settings).train_iterator()
    cache = dataset(photographs, folder=None, use_cached=True, **settings).train_iterator()
    plain = dataset(photographs, crop="inception").train_iterator()
    for _ in range(2):
        one, other = next(files)["images"], next(cache)["images"]
        np.testing.assert_array_equal(one, other)
        assert (one != next(plain)["images"]).any()


def test_grey_pixels_serve_models_of_one_channel_and_colours_do_not(photographs, tmp_path):
    features = ImageFeatures(8, 1, 2)
    cached_pixels(photographs, tmp_path / "cache")
    settings = {"crop": "central", "shorter_side": 12, "features": features, "shuffle": False}
    with pytest.raises(ValueError, match="has colours, the model takes 1 channel"):
        next(dataset(photographs, folder=None, use_cached=True, **settings).train_iterator())
    for path in [*photographs.rglob("cat/*"), photographs / "train" / "dog" / "2.jpg"]:
        path.unlink()
        photograph(path, (20, 30), mode="L")
    cached_pixels(photographs, tmp_path / "grey")
    one, other = (
        next(
            dataset(
                photographs, folder=where, use_cached=where is None, **settings
            ).train_iterator()
        )
        for where in (str(photographs), None)
    )
    np.testing.assert_array_equal(one["images"], other["images"])


def test_shorter_sides_that_do_not_fit_are_refused(photographs, tmp_path):
    place = cached_pixels(photographs, tmp_path / "cache")
    cached = {"folder": None, "use_cached": True, "crop": "central"}
    for side in (None, 16):
        with pytest.raises(ValueError, match=f"was made 12 pixels, .* is {side}: set it to 12, or"):
            dataset(photographs, shorter_side=side, **cached)
    with pytest.raises(ValueError, match="IMAGE_SHORTER_SIDE.* is 7, .* give at least 8"):
        dataset(photographs, shorter_side=7)
    with pytest.raises(ValueError, match="or of another IMAGE_SHORTER_SIDE"):
        cached_pixels(photographs, tmp_path / "cache", shorter_side=16)
    with pytest.raises(FileNotFoundError, match="IMAGE_SHORTER_SIDE=12"):
        dataset(photographs, mixture_or_task_name="birds", shorter_side=12, **cached)
    manifest = json.loads((place / "images.json").read_text())
    for changes in ({"shorter_side": None}, {"shorter_side": "12"}, {"format": 1}):
        (place / "images.json").write_text(json.dumps(manifest | changes))
        with pytest.raises(ValueError, match="its shorter_side is .* cache them again"):
            dataset(photographs, shorter_side=12, **cached)


@pytest.mark.parametrize(
    ("place", "value"), [((0, 0), 0), ((0, 1), 13), ((3, 2), 3), ((1, 2), 2), ((2, 0), -12)]
)
def test_shapes_that_do_not_fit_are_told(photographs, tmp_path, place, value):
    path = cached_pixels(photographs, tmp_path / "cache", num_shards=2) / "train.shapes.npy"
    shapes = np.load(path)
    assert shapes.tolist() == [[12, 16, 3], [30, 12, 3], [12, 18, 1], [12, 12, 1], [14, 11, 3]]
    shapes[place] = value
    np.save(path, shapes)
    opened = {"folder": None, "use_cached": True, "crop": "central", "shorter_side": 12}
    with pytest.raises(ValueError, match=r"shapes\.npy does not fit .* cache them again"):
        dataset(photographs, **opened)
    np.save(path, shapes.astype(np.int64)[:3])
    with pytest.raises(ValueError, match="has .* bytes, .* were written"):
        dataset(photographs, **opened)


def test_other_pixels_than_were_written_are_told(photographs, tmp_path):
    place = cached_pixels(photographs, tmp_path / "cache", num_shards=2)
    opened = dataset(photographs, folder=None, use_cached=True, crop="central", shorter_side=12)
    assert opened.verify() == 3 * (12 * 16 + 30 * 12 + 14 * 11) + 12 * 18 + 12 * 12
    content = bytearray((place / "train-00001-of-00002.pixels").read_bytes())
    content[7] ^= 1
    (place / "train-00001-of-00002.pixels").write_bytes(content)
    with pytest.raises(ValueError, match="pixels has other content than was written"):
        opened.verify()


def test_a_killed_cache_of_pixels_goes_on_after_the_last_whole_file(
    photographs, tmp_path, monkeypatch
):
    whole = cached_pixels(photographs, tmp_path / "whole", num_shards=5)
    read, decode = [], decoding.decode

    def killed(encoded, **options):
        read.append(options["what"])
        if len(read) == 4:
            raise KeyboardInterrupt
        return decode(encoded, **options)

    monkeypatch.setattr(decoding, "decode", killed)
    with pytest.raises(KeyboardInterrupt):
        cached_pixels(photographs, tmp_path / "cache", num_shards=5)
    place = cached_pixels(photographs, tmp_path / "cache", num_shards=5)
    assert read[3] == read[4] and len(read) == 6
    assert sorted(path.name for path in place.iterdir()) == sorted(
        path.name for path in whole.iterdir()
    )
    for path in whole.iterdir():
        assert (place / path.name).read_bytes() == path.read_bytes()

"""What 'auto' makes of the side of a model's images, and that runs and caches agree on it."""

import numpy as np
import pytest

from tests.data.images.test_folders import write_image
from tests.data.images.test_records import cached_pixels, dataset, photograph
from upcycle_jax import cache_tasks, config, data_folders
from upcycle_jax.data.images import ImageDatasetConfig, crops, records, records_writing, scaling
from upcycle_jax.features.images import ImageFeatures

AUTO = {"shorter_side": "auto", "crop": "inception", "flip": True}


@pytest.fixture(autouse=True)
def _forget_caches():
    yield
    data_folders.configure()


@pytest.fixture
def photographs(tmp_path):
    """Larger and smaller than 41 pixels, which 'auto' is for views of 8."""
    root = tmp_path / "pets"
    photograph(root / "train" / "cat" / "0.jpg", (90, 64))
    photograph(root / "train" / "cat" / "1.png", (50, 80))
    photograph(root / "train" / "dog" / "0.jpg", (20, 30))
    return root


@pytest.mark.parametrize(
    ("size", "side"),
    # 5 % of the area, 3/4 as wide as high, is sqrt(0.05 * 0.75) = 0.19365 of a square's side wide,
    # and has as many pixels across as the view from a side of size / 0.19365 on: 8 / 0.19365 =
    # 41.31; 32: 165.25; 48: 247.87; 49: 253.03; 50: 258.2, 64: 330.49 and 224: 1156.7 are above
    # 256.
    [(8, 41), (32, 165), (48, 248), (49, 253), (50, None), (64, None), (224, None)],
)
def test_the_smallest_part_has_a_pixel_for_each_of_the_view(size, side):
    assert scaling.automatic_side(size) == side
    given = {"task_feature_lengths": {"image": size}, "shorter_side": "auto"}
    for crop in ("none", "central", "inception"):  # training and evaluation read one cache
        assert scaling.shorter_side(ImageDatasetConfig("pets", crop=crop, **given)) == side


@pytest.mark.parametrize(
    ("crop", "side"),
    # Of a whole image 64 of 64; of its middle 64 / (7/8) = 73.14; of the smallest part 330.49.
    [("none", 64), ("central", 73), ("inception", 330)],
)
def test_the_side_that_a_crop_needs(crop, side):
    assert crops.least_side(64, crop) == side


def test_numbers_and_none_are_taken_as_they_are():
    for given in (None, 12, 512):
        assert scaling.shorter_side(ImageDatasetConfig("pets", shorter_side=given)) == given
    unknown = ImageDatasetConfig("pets", shorter_side="auto", task_feature_lengths={})
    assert scaling.shorter_side(unknown) is None
    with pytest.raises(ValueError, match="shorter_side"):
        ImageDatasetConfig("pets", shorter_side="small")


def cached(root, cache, *words):
    """The task's folder of a cache that the command made."""
    flags = [
        "--gin_file=runs/cache_images.gin",
        "--gin.MIXTURE_OR_TASK_NAME='pets'",
        f"--gin.IMAGE_FOLDER={str(root)!r}",
        f"--output_cache_dir={cache}",
    ]
    assert cache_tasks.main([*flags, *words]) == 0
    data_folders.configure(cache_dirs=[str(cache)])
    return cache / "pets"


def assert_equal_streams(one, other):
    first, second = one.train_iterator(), other.train_iterator()
    for _ in range(3):
        batch, found = next(first), next(second)
        for name in batch:
            np.testing.assert_array_equal(found[name], batch[name])
    (one_pass,), (other_pass,) = one.eval_batches().values(), other.eval_batches().values()
    for batch, found in zip(one_pass(), other_pass(), strict=True):
        np.testing.assert_array_equal(found["images"], batch["images"])


def test_small_models_read_pixels_and_find_what_is_in_the_files(photographs, tmp_path, capsys):
    place = cached(photographs, tmp_path / "pixels", "--gin.IMAGE_SIZE=8")
    assert "scaled to a shorter side of 41" in capsys.readouterr().out
    manifest = records.ImageManifest.read(place, remedy="")
    assert (manifest.format, manifest.shorter_side) == (records.PIXELS, 41)
    assert_equal_streams(
        dataset(photographs, **AUTO), dataset(photographs, folder=None, use_cached=True, **AUTO)
    )
    # A model of another size wants another side; one of more than 49 pixels files.
    for size, side in ((9, 46), (64, None)):
        with pytest.raises(ValueError, match=rf"was made 41 pixels, .* is {side} by 'auto': set"):
            dataset(photographs, ImageFeatures(size), folder=None, use_cached=True, **AUTO)
    # 'auto' is the number that it stands for.
    again = cached_pixels(photographs, tmp_path / "forty_one", shorter_side=41)
    for path in place.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_caches_of_files_serve_all_models(photographs, tmp_path, capsys):
    """Those made before there was 'auto', or for no model in particular."""
    place = cached(photographs, tmp_path / "cache")
    assert "For a model of small images set --gin.IMAGE_SIZE" in capsys.readouterr().out
    off = cached(photographs, tmp_path / "off", "--gin.IMAGE_SHORTER_SIDE=None")
    large = cached(photographs, tmp_path / "large", "--gin_file=models/vit_s16.gin")
    for path in place.iterdir():
        assert (off / path.name).read_bytes() == path.read_bytes()
        assert (large / path.name).read_bytes() == path.read_bytes()
    assert records.ImageManifest.read(place, remedy="").format == records.FILES
    for settings in (AUTO, AUTO | {"shorter_side": None}):
        assert_equal_streams(
            dataset(photographs, **settings),
            dataset(photographs, folder=None, use_cached=True, **settings),
        )


def test_large_models_and_none_see_what_they_always_saw(photographs):
    for features, side in ((ImageFeatures(64), "auto"), (ImageFeatures(8), None)):
        opened, plain = (
            dataset(photographs, features, crop="inception", **given)
            for given in ({"shorter_side": side}, {})
        )
        assert opened.fingerprint() == plain.fingerprint()
        assert "shorter_side" not in opened.fingerprint()["tasks"]["pets"]
        assert_equal_streams(opened, plain)
    scaled = next(dataset(photographs, **AUTO).train_iterator())
    plain = next(dataset(photographs, **AUTO | {"shorter_side": None}).train_iterator())
    assert (scaled["images"] != plain["images"]).any()


def test_a_run_that_began_without_goes_on_without(photographs, tmp_path):
    before = AUTO | {"shorter_side": None}
    stream = dataset(photographs, **before).train_iterator()
    next(stream)
    stream.save(tmp_path / "position")
    expected = next(stream)
    with pytest.raises(ValueError, match="shorter_side: was None, is 41") as told:
        dataset(photographs, **AUTO).train_iterator().restore(tmp_path / "position")
    assert "--gin.IMAGE_SHORTER_SIDE=None" in told.value.__notes__[0]
    again = dataset(photographs, **before).train_iterator()
    again.restore(tmp_path / "position")
    np.testing.assert_array_equal(next(again)["images"], expected["images"])
    # Other differences have nothing to do with it.
    with pytest.raises(ValueError, match="crop: was") as told:
        dataset(photographs, crop="central").train_iterator().restore(tmp_path / "position")
    assert not hasattr(told.value, "__notes__")


def test_the_command_of_an_error_makes_the_cache_that_is_missing(photographs):
    with pytest.raises(FileNotFoundError, match="--gin.IMAGE_SHORTER_SIDE=41 "):
        dataset(photographs, folder=None, use_cached=True, **AUTO)
    with pytest.raises(FileNotFoundError) as told:
        dataset(photographs, ImageFeatures(64), folder=None, use_cached=True, **AUTO)
    assert "IMAGE_SHORTER_SIDE" not in str(told.value)


def test_images_in_memory_are_never_scaled(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (4, 60, 60), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", train_images=values, train_labels=[0, 1, 0, 1])
    given = {"folder": None, "arrays": str(tmp_path / "x.npz"), "warp": 0.0}
    one, other = (
        dataset(None, ImageFeatures(8, 1, 2), **given | {"shorter_side": side})
        for side in ("auto", None)
    )
    assert one.fingerprint() == other.fingerprint()
    assert_equal_streams(one, other)


@pytest.mark.parametrize(
    "run",
    ["pretrain_images", "continue_pretrain_images", "eval_images", "few_shot", "initial_drop"],
)
def test_run_files_ask_for_it_and_older_configurations_do_not(run):
    for given, side in (([], 165), (["IMAGE_SHORTER_SIDE=None"], None)):
        loaded = config.load(["models/vit_tiny.gin", f"runs/{run}.gin"], given)
        assert scaling.shorter_side(loaded.build("ImageDatasetConfig")()) == side
    assert ImageDatasetConfig().shorter_side is None  # of files that say nothing of it


def test_small_images_are_cached_as_they_are(tmp_path):
    # 32 pixels are fewer than the 165 of 'auto': nothing is scaled.
    write_image(tmp_path / "pets" / "train" / "cat" / "0.png", 7, size=(32, 40))
    given = ImageDatasetConfig(
        "pets",
        folder=str(tmp_path / "pets"),
        shorter_side="auto",
        task_feature_lengths={"image": 32},
    )
    records_writing.write(given, tmp_path / "cache", report=str)
    assert np.load(tmp_path / "cache" / "pets" / "train.shapes.npy").tolist() == [[40, 32, 3]]

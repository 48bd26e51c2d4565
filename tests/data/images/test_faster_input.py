"""What a run that waits for its images is advised to do."""

import shlex

import numpy as np
import pytest

from tests.data.images.test_folders import write_image
from tests.data.images.test_records import dataset
from upcycle_jax import cache_tasks, data_folders
from upcycle_jax.data.faster_input import MADE_BY_HOST, READ_FROM_CACHE, faster_input
from upcycle_jax.features.images import ImageFeatures

AUTO = {"shorter_side": "auto", "crop": "inception"}


@pytest.fixture(autouse=True)
def _forget_caches():
    yield
    data_folders.configure()


@pytest.fixture
def folder(tmp_path):
    write_image(tmp_path / "pets" / "train" / "cat" / "0.png", 7, size=(50, 60))
    return tmp_path / "pets"


def test_the_advice_for_files_of_small_models_is_a_command_that_works(folder, tmp_path):
    data_folders.configure(cache_dirs=[str(tmp_path / "cache")])
    told = faster_input(dataset(folder, **AUTO))
    assert told.startswith("Images that find no room are decoded for every view. A new")
    words = shlex.split(told.split("`")[1])
    assert words[:3] == ["python", "-m", "upcycle_jax.cache_tasks"]
    assert cache_tasks.main(words[3:]) == 0
    cached = dataset(folder, folder=None, use_cached=True, **AUTO)
    assert cached.images.manifest.shorter_side == 41
    assert faster_input(cached) == READ_FROM_CACHE


def test_images_that_are_all_in_memory_need_no_cache(folder):
    opened = dataset(folder, **AUTO)
    opened.train_iterator().prepare(0, 1)
    assert faster_input(opened) == MADE_BY_HOST


def test_a_cache_of_files_is_to_be_replaced(folder, tmp_path):
    given = ["--gin_file=runs/cache_images.gin", "--gin.MIXTURE_OR_TASK_NAME='pets'"]
    given += [f"--gin.IMAGE_FOLDER={str(folder)!r}", f"--output_cache_dir={tmp_path / 'cache'}"]
    assert cache_tasks.main(given) == 0
    data_folders.configure(cache_dirs=[str(tmp_path / "cache")])
    told = faster_input(dataset(folder, folder=None, use_cached=True, **AUTO))
    assert "--gin.IMAGE_SHORTER_SIDE=41" in told and "--overwrite`" in told


def test_other_images(folder, tmp_path):
    for size, named in ((64, "IMAGE_SHORTER_SIDE,"), (8, "IMAGE_SHORTER_SIDE = 'auto',")):
        told = faster_input(dataset(folder, ImageFeatures(size)))
        assert f"A new run with {named} set for cache_tasks too, reads pixels" in told
    grey = np.zeros((4, 8, 8), np.uint8)
    np.savez(tmp_path / "x.npz", train_images=grey, train_labels=[0, 0, 0, 0])
    arrays = dataset(None, ImageFeatures(8, 1, 2), folder=None, arrays=str(tmp_path / "x.npz"))
    assert "more processors" in faster_input(arrays)
    sets = {"pets": (str(folder), 1), "grey": (str(tmp_path / "x.npz"), 1)}
    mixed = dataset(None, mixture_or_task_name="both", mixture=sets, folder=None, **AUTO)
    assert "IMAGE_FOLDER=" in faster_input(mixed) and "more processors" in faster_input(mixed)

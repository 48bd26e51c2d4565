"""What a run that waits for its data is advised to do."""

import types

import pytest

from upcycle_jax import data_folders
from upcycle_jax.data import DatasetConfig
from upcycle_jax.data.faster_input import MADE_BY_HOST, READ_FROM_CACHE, faster_input

LENGTHS = {"inputs": 8, "targets": 8}


def of(config):
    return faster_input(types.SimpleNamespace(config=config))


@pytest.fixture(autouse=True)
def _forget_caches():
    yield
    data_folders.configure()


def test_data_that_are_tokenised_on_the_fly_are_to_be_cached():
    data_folders.configure(cache_dirs=["/data/cache"])
    told = of(DatasetConfig("my_text", LENGTHS, text_files=["/data/*.txt"]))
    assert (
        "python -m upcycle_jax.cache_tasks --tasks=my_text --output_cache_dir=/data/cache" in told
    )
    assert "text_files=" in told and "USE_CACHED_TASKS = True" in told


def test_what_is_cached_and_what_is_not_known_here():
    assert of(DatasetConfig("my_text", LENGTHS, use_cached=True)) == READ_FROM_CACHE
    assert of(types.SimpleNamespace()) == MADE_BY_HOST

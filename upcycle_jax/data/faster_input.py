"""What would make data be read faster, as advice for a run that waits for them."""

import functools

from upcycle_jax.data.cache import lookup
from upcycle_jax.data.config import DatasetConfig
from upcycle_jax.data.dataset import Dataset

_PROCESSORS = "give the host more processors, or run nothing beside it"
READ_FROM_CACHE = f"Its data are read from a cache already: {_PROCESSORS}"
MADE_BY_HOST = f"Its batches are made by the host: {_PROCESSORS}"


@functools.singledispatch
def faster_input(dataset: Dataset) -> str:
    """Advice about the data of a run, a sentence or two. Another kind of data registers the class
    of its datasets.
    """
    config = dataset.config
    if type(config) is not DatasetConfig:
        return MADE_BY_HOST
    return READ_FROM_CACHE if config.use_cached else to_cache(lookup.command(config))


def to_cache(command: str) -> str:
    """Advice to cache what is read on the fly.

    Args:
      command: that does it.
    """
    return (
        f"A new run is fed faster from a cache: `{command}`, then USE_CACHED_TASKS = True with"
        " --seqio_additional_cache_dirs of the same folder"
    )

"""From a `DatasetConfig` to the data it names: a cache, or SeqIO. TensorFlow is imported for SeqIO
alone.
"""

import functools

from upcycle_jax.data import tensorflow_import
from upcycle_jax.data.cache import lookup
from upcycle_jax.data.config import DatasetConfig
from upcycle_jax.data.dataset import Dataset
from upcycle_jax.features import FeatureConverter, check_lengths


@functools.singledispatch
def open_dataset(config: DatasetConfig, features: FeatureConverter) -> Dataset:
    """Opens data as batches of a model's features. Another kind of data registers the class of its
    configuration.

    Args:
      config: what to read.
      features: the model's converter.

    Raises:
      FileNotFoundError: `use_cached` is set and there is no cache; with the command that makes it.
      ValueError: a length is missing, the cache is damaged or does not fit, or SeqIO is not
        installed and there is no cache.
    """
    check_lengths(features, config.task_feature_lengths)
    mixture = lookup.find(config, features)
    if mixture is not None:
        from upcycle_jax.data.cache.batches import CachedDataset

        return CachedDataset(config, features, mixture)
    try:
        tensorflow_import.quietly()
        from upcycle_jax.data.seqio_dataset import SeqioDataset
    except ModuleNotFoundError as error:
        if error.name not in ("tensorflow", "seqio", "tensorflow_datasets"):
            raise
        raise ValueError(
            f"'{config.mixture_or_task_name}' is read through SeqIO, which is not installed"
            f" ({error}): pip install seqio, or cache the task where it is installed"
            f" (`{lookup.command(config)}`) and set USE_CACHED_TASKS"
        ) from error
    return SeqioDataset(config, features)

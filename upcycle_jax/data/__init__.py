"""Task name -> batches: `opening.open_dataset` makes a `DatasetConfig` into a `Dataset`. Importing
this package does not import TensorFlow; opening data that SeqIO reads does.
"""

import os

from upcycle_jax.data.config import DatasetConfig
from upcycle_jax.data.dataset import BatchIterator, Dataset
from upcycle_jax.data.position import Position
from upcycle_jax.data_folders import configure

# TensorFlow reports every device library that it does not find, unless told before its import.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

__all__ = ["BatchIterator", "Dataset", "DatasetConfig", "Position", "configure"]

"""Task name -> batches. Importing this package does not import TensorFlow; building an iterator
does.
"""

import os

from upcycle_jax.data.dataset import BatchIterator, DatasetConfig, Position
from upcycle_jax.data.settings import configure

# TensorFlow reports every device library that it does not find, unless told before its import.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

__all__ = ["BatchIterator", "DatasetConfig", "Position", "configure"]

"""Type aliases that the whole library shares."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array | np.ndarray
"""A device or host array."""

PyTree: TypeAlias = Any
"""A nested structure of arrays, here always nested dicts with string keys."""

Batch: TypeAlias = Mapping[str, Array]
"""Model features by SeqIO name, e.g. `encoder_input_tokens` int32 `[batch, length]`."""

"""Labelled images as batches: glyphs of the fonts that matplotlib brings, arrays or files of your
own, one set or several.
"""

from upcycle_jax.data.images import faster_input
from upcycle_jax.data.images.config import ImageDatasetConfig
from upcycle_jax.data.images.dataset import ImageDataset
from upcycle_jax.data.images.mixtures import open_images

__all__ = ["ImageDataset", "ImageDatasetConfig", "faster_input", "open_images"]

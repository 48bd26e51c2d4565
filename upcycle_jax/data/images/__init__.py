"""Labelled images as batches: glyphs of the fonts that matplotlib brings, or arrays of your own."""

from upcycle_jax.data.images.config import ImageDatasetConfig
from upcycle_jax.data.images.dataset import ImageDataset, open_images

__all__ = ["ImageDataset", "ImageDatasetConfig", "open_images"]

"""`data.faster_input` of images."""

from upcycle_jax.data.faster_input import (
    MADE_BY_HOST,
    READ_FROM_CACHE,
    faster_input,
    to_cache,
)
from upcycle_jax.data.images import scaling
from upcycle_jax.data.images.config import AUTOMATIC
from upcycle_jax.data.images.dataset import ImageDataset
from upcycle_jax.data.images.mixtures import MixedImages
from upcycle_jax.data.images.named import cache_command
from upcycle_jax.data.images.records import PixelImages, RecordImages
from upcycle_jax.data.images.sources import Images

_AUTOMATIC = f" = {AUTOMATIC!r}"


@faster_input.register
def _of_one_set(dataset: ImageDataset) -> str:
    config, images = dataset.config, dataset.images
    if isinstance(images, PixelImages):
        return READ_FROM_CACHE
    if isinstance(images, Images):
        return MADE_BY_HOST
    if scaling.shorter_side(config) is None:
        is_small = scaling.automatic_side(dataset.features.size) is not None
        return (
            "Its files are decoded for every view. A new run with"
            f" IMAGE_SHORTER_SIDE{_AUTOMATIC if is_small else ''}, set for cache_tasks too, reads"
            " pixels instead (docs/vision.md)"
        )
    if dataset.holds_all_images:
        return MADE_BY_HOST
    command = cache_command(config)
    command = f"{command} --overwrite" if isinstance(images, RecordImages) else command
    return f"Images that find no room are decoded for every view. {to_cache(command)}"


@faster_input.register
def _of_mixture(dataset: MixedImages) -> str:
    """What would help any of the sets."""
    advice = dict.fromkeys(map(faster_input, dataset.sets))
    return ". ".join(text for text in advice if text != READ_FROM_CACHE) or READ_FROM_CACHE

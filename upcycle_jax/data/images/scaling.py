"""How many pixels the shorter side of a photograph keeps before views are made of it."""

from upcycle_jax.data.images import crops
from upcycle_jax.data.images.config import AUTOMATIC, ImageDatasetConfig
from upcycle_jax.features.images import IMAGE

MOST_PIXELS = 256
"""Above it 'auto' scales nothing: pixels of a photograph then take several times the room of its
JPEG, and a step on views of that size takes longer than decoding their files.
"""


def automatic_side(side: int) -> int | None:
    """What 'auto' is for views of `side` pixels; None: nothing is scaled.

    The smallest part that `ImageDatasetConfig.crop` may show still has a pixel for each of the
    view. It is the same for all crops, so that training and evaluation read one cache.

    >>> automatic_side(32), automatic_side(224)
    (165, None)
    """
    needed = crops.least_side(side, "inception")
    return needed if needed <= MOST_PIXELS else None


def shorter_side(config: ImageDatasetConfig) -> int | None:
    """The shorter side that files of a configuration are scaled down to; None: they are not, or
    'auto' is asked for and the side of views is not known.
    """
    if config.shorter_side != AUTOMATIC:
        return config.shorter_side
    side = config.task_feature_lengths.get(IMAGE)
    return None if side is None else automatic_side(side)

"""Which part of an image a view shows, and whether it is mirrored: the augmentations of big_vision
and V-MoE. Each is a function of the seed and the view's number alone.
"""

from typing import Any

import numpy as np

from upcycle_jax.data.images import views
from upcycle_jax.data.images.config import Crop

_AREA = (0.05, 1.0)
_ASPECT = (3 / 4, 4 / 3)
_TRIES = 10
_DRAWS = 4 * _TRIES + 1
_SALT = 0xC409

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels of the whole image."""


def least_side(side: int, crop: Crop) -> int:
    """The shorter side below which an image would lose detail that a view of `side` pixels shows:
    of random parts that of the smallest.
    """
    share = {"none": 1.0, "central": 7 / 8, "inception": (_AREA[0] * _ASPECT[0]) ** 0.5}[crop]
    return round(side / share)


def central_box(width: int, height: int) -> Box:
    """The square in the middle of 7/8 of the shorter side.

    >>> central_box(256, 256)
    (16.0, 16.0, 240.0, 240.0)
    """
    side = min(width, height) * 7 / 8
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def inception_box(width: int, height: int, draws: np.ndarray) -> Box:
    """A part of 5 to 100 % of the area whose width is 3/4 to 4/3 of its height: the first of ten
    draws that lies within the image, else all of it.

    Args:
      width: of the image.
      height: likewise.
      draws: float64 `[4 * 10]` in [0, 1): area, aspect, left and top of each try.
    """
    for area, aspect, x, y in draws.reshape(_TRIES, 4):
        pixels = (_AREA[0] + (_AREA[1] - _AREA[0]) * area) * width * height
        ratio = _ASPECT[0] + (_ASPECT[1] - _ASPECT[0]) * aspect
        across, down = (pixels * ratio) ** 0.5, (pixels / ratio) ** 0.5
        if across <= width and down <= height:
            left, top = x * (width - across), y * (height - down)
            return left, top, left + across, top + down
    return 0.0, 0.0, float(width), float(height)


def drawn(seed: int, numbers: np.ndarray) -> np.ndarray:
    """Float64 `[B, draws]` in [0, 1) for int `numbers` `[B]` of views."""
    return views.uniform(seed ^ _SALT, numbers, _DRAWS)


def view(image: Any, side: int, crop: Crop, flip: bool, draws: np.ndarray) -> np.ndarray:
    """Uint8 `[side, side, c]`.

    Args:
      image: Pillow's, of mode 'L' or 'RGB'.
      side: of the view.
      crop: see `ImageDatasetConfig`; 'none' takes images of the size of the view.
      flip: whether to mirror views by chance.
      draws: those of this view, of `drawn`.
    """
    from PIL import Image

    width, height = image.size
    if crop != "none":
        box = (
            central_box(width, height)
            if crop == "central"
            else inception_box(width, height, draws[:-1])
        )
        image = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
    values = np.asarray(image, np.uint8)
    values = values[..., None] if values.ndim == 2 else values
    return values[:, ::-1] if flip and draws[-1] < 0.5 else values

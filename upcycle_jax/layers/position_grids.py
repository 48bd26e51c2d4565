"""Learned positions of the patches of an image, on the grid of another image size.

Axis legend: P patches along a side, N = P * P patches, d width.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

Interpolation = Literal["bilinear", "bicubic", "bicubic_antialiased"]
"""How positions between positions are found:

bilinear: corners stay corners, as `scipy.ndimage.zoom(order=1)`: big_vision, vit_jax, V-MoE.
bicubic: grids cover the same area, as `torch.nn.functional.interpolate`: Hugging Face, DINOv2.
bicubic_antialiased: the same with `antialias=True`: timm. For smaller grids it weighs all positions
  in the area of one, and its kernel is another one (-0.5 instead of -0.75).
"""


def side(count: int) -> int:
    """P of N positions.

    Raises:
      ValueError: they are no square.
    """
    found = math.isqrt(count)
    if found**2 != count:
        raise ValueError(f"{count} positions are no square of patches")
    return found


def interpolate(positions: np.ndarray, side_after: int, method: Interpolation) -> np.ndarray:
    """Positions `[1, P * P, d]` on the grid of another side: float32 `[1, side_after^2, d]`.

    Raises:
      ValueError: the positions are no square.
    """
    before, width = side(positions.shape[1]), positions.shape[2]
    weights = _WEIGHTS[method](before, side_after)  # [after, before]
    grid = positions.reshape(before, before, width).astype(np.float64)
    grid = np.einsum("yi,xj,ijd->yxd", weights, weights, grid, optimize=True)
    return grid.reshape(1, side_after**2, width).astype(np.float32)


def _bilinear(before: int, after: int) -> np.ndarray:
    places = np.arange(after) * ((before - 1) / max(after - 1, 1))
    distance = np.abs(places[:, None] - np.arange(before))
    return np.maximum(1 - distance, 0)


def _bicubic(before: int, after: int) -> np.ndarray:
    places = (np.arange(after) + 0.5) * (before / after) - 0.5
    weights = np.zeros((after, before))
    for offset in (-1, 0, 1, 2):
        neighbour = np.floor(places).astype(int) + offset
        # Beyond the border the outermost position goes on.
        inside = np.clip(neighbour, 0, before - 1)
        np.add.at(weights, (np.arange(after), inside), _cubic(places - neighbour, -0.75))
    return weights


def _bicubic_antialiased(before: int, after: int) -> np.ndarray:
    centres = (np.arange(after) + 0.5) * (before / after) - 0.5
    stretch = max(before / after, 1.0)
    weights = _cubic((np.arange(before) - centres[:, None]) / stretch, -0.5)
    # Beyond the border there is nothing.
    return weights / weights.sum(axis=1, keepdims=True)


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981) with the slope `a` at 1."""
    x = np.abs(distance)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


_WEIGHTS: Mapping[Interpolation, Callable[[int, int], np.ndarray]] = {
    "bilinear": _bilinear,
    "bicubic": _bicubic,
    "bicubic_antialiased": _bicubic_antialiased,
}

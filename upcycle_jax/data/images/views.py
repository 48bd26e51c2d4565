"""Endless views of an image: warped, shifted, with other contrast and noise. Each is a function of
the seed and its number alone.

Axis legend: B images, S side of a source image, T side of a view, c channels.
"""

import math

import numpy as np

from upcycle_jax.data import draws

_MAX_ANGLE = math.radians(12)
_SCALE = (0.75, 1.15)
_MAX_SHEAR = 0.15
_MAX_SHIFT = 0.1
_NOISE = 0.1
_PARAMETERS = 9


def uniform(seed: int, numbers: np.ndarray, count: int) -> np.ndarray:
    """Float64 `[B, count]` in [0, 1) for int `numbers` `[B]`."""
    values = draws.bits(seed, numbers[:, None], np.arange(count)[None])
    return (values >> np.uint64(11)).astype(np.float64) * 2.0**-53


def views(
    images: np.ndarray, side: int, *, seed: int, numbers: np.ndarray, warp: float
) -> np.ndarray:
    """Float32 `[B, T, T, c]` in [-1, 1].

    Args:
      images: uint8 `[B, S, S, c]`, one for each view.
      side: T.
      seed: of all draws.
      numbers: int `[B]`, the number of each view.
      warp: strength, see `ImageDatasetConfig.warp`.
    """
    drawn = uniform(seed, numbers, _PARAMETERS) * 2 - 1  # [B, 9] in [-1, 1)
    angle, shear = warp * _MAX_ANGLE * drawn[:, 0], warp * _MAX_SHEAR * drawn[:, 1]
    middle, spread = sum(_SCALE) / 2, (_SCALE[1] - _SCALE[0]) / 2
    scale = 1 + warp * (middle - 1 + spread * drawn[:, 2:4])  # [B, 2]
    shift = warp * _MAX_SHIFT * 2 * drawn[:, 4:6]  # half the side is 1
    at = _sources(angle, shear, scale, shift, side)
    out = _bilinear(images, at)  # [B, T, T, c] in [0, 1]
    contrast = 1 - warp * 0.25 * (drawn[:, 6] + 1)  # down to a half
    out = out * contrast[:, None, None, None].astype(np.float32)
    out += (warp * 0.25 * (drawn[:, 7] + 1))[:, None, None, None].astype(np.float32) * 0.5
    if warp:
        # Noise of a strength of its own, from a generator that each view seeds.
        strength = warp * _NOISE * (drawn[:, 8] + 1) / 2
        for row, number in enumerate(numbers):
            noise = np.random.Generator(np.random.Philox(key=[seed, int(number)]))
            out[row] += np.float32(strength[row]) * noise.standard_normal(out.shape[1:], np.float32)
    return np.clip(out, 0, 1) * 2 - 1


def _sources(
    angle: np.ndarray, shear: np.ndarray, scale: np.ndarray, shift: np.ndarray, side: int
) -> np.ndarray:
    """Float32 `[B, T * T, 2]`: where each pixel of a view comes from, row and column in [-1, 1]."""
    cos, sin = np.cos(angle), np.sin(angle)
    # A view's pixel is rotated, sheared and divided by the scale: [B, 2, 2].
    rotated = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
    sheared = np.tile(np.eye(2), (len(angle), 1, 1))
    sheared[:, 0, 1] = shear
    matrix = sheared @ rotated / scale[:, None, :]
    line = (np.arange(side) + 0.5) / side * 2 - 1
    grid = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)  # [T * T, 2]
    return (grid[None] @ matrix.transpose(0, 2, 1) + shift[:, None]).astype(np.float32)


def _bilinear(images: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Float32 `[B, T, T, c]` in [0, 1]: images at points in [-1, 1], black outside."""
    rows, size, _, channels = images.shape
    # One pixel of black around the image: what lies outside is read from there.
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    place = np.clip((at + 1) * size / 2 + 0.5, 0, size + 0.999)  # of pixel centres, in `padded`
    low = np.floor(place).astype(np.int64)
    part = place - low
    flat = padded.reshape(rows, -1, channels)
    row = np.arange(rows)[:, None]
    out = np.zeros((*at.shape[:2], channels), np.float32)
    for down in (0, 1):
        for right in (0, 1):
            y = np.minimum(low[..., 0] + down, size + 1)
            x = np.minimum(low[..., 1] + right, size + 1)
            weight = (part[..., 0] if down else 1 - part[..., 0]) * (
                part[..., 1] if right else 1 - part[..., 1]
            )
            out += weight[..., None] * flat[row, y * (size + 2) + x]
    side = math.isqrt(at.shape[1])
    return out.reshape(rows, side, side, channels) / 255

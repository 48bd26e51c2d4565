"""Positions on other grids: by hand, and as the libraries compute them that checkpoints are of."""

import numpy as np
import pytest
import scipy.ndimage
import torch

from upcycle_jax.layers.position_grids import interpolate, side

GRIDS = [(7, 12), (14, 24), (12, 7), (4, 4), (3, 1), (1, 3), (16, 5)]


def positions(before):
    return np.random.default_rng(0).normal(size=(1, before**2, 6)).astype(np.float32)


def in_torch(values, after, **more):
    before = side(values.shape[1])
    grid = torch.tensor(values).reshape(1, before, before, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(
        grid, size=(after, after), mode="bicubic", align_corners=False, **more
    )
    return grid.permute(0, 2, 3, 1).reshape(1, after**2, -1).numpy()


@pytest.mark.parametrize(("before", "after"), GRIDS)
def test_bilinear_is_scipys_zoom(before, after):
    given = positions(before)
    grid = given.reshape(before, before, -1)
    expected = scipy.ndimage.zoom(grid, (after / before, after / before, 1), order=1)
    found = interpolate(given, after, "bilinear")
    assert (found.shape, found.dtype) == ((1, after**2, 6), np.float32)
    np.testing.assert_allclose(found[0], expected.reshape(after**2, -1), atol=1e-6)


@pytest.mark.parametrize(("before", "after"), GRIDS)
@pytest.mark.parametrize("antialias", [False, True])
def test_bicubic_is_torchs(before, after, antialias):
    given = positions(before)
    method = "bicubic_antialiased" if antialias else "bicubic"
    found = interpolate(given, after, method)
    np.testing.assert_allclose(found, in_torch(given, after, antialias=antialias), atol=1e-5)


def test_bilinear_by_hand():
    # 0 1   0 is a corner, 1.5 the middle of all four: places 0, 1/2, 1 of each axis.
    # 2 3
    given = np.arange(4, dtype=np.float32).reshape(1, 4, 1)
    found = interpolate(given, 3, "bilinear")
    assert found[0, :, 0].tolist() == [0, 0.5, 1, 1, 1.5, 2, 2, 2.5, 3]


def test_positions_that_are_no_square_are_refused():
    with pytest.raises(ValueError, match="197 positions are no square"):
        interpolate(np.zeros((1, 197, 2), np.float32), 3, "bilinear")

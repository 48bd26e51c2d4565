"""Views of images: what no warp gives, and that a view depends on its seed and number alone."""

import numpy as np

from upcycle_jax.data.images.views import views


def image():
    """A white square in one quarter of a black image, uint8 [1, 8, 8, 1]."""
    out = np.zeros((1, 8, 8, 1), np.uint8)
    out[:, :4, 4:] = 255
    return out


def test_without_a_warp_a_view_is_the_image():
    found = views(image(), 8, seed=0, numbers=np.array([5]), warp=0.0)
    np.testing.assert_allclose(found, image() / 127.5 - 1, atol=1e-6)


def test_without_a_warp_a_smaller_view_takes_points_between():
    # Pixels 0.5 and 1.5 of 8 are one of 4: between equal pixels their value, so the square stays.
    found = views(image(), 4, seed=0, numbers=np.array([0]), warp=0.0)
    expected = np.zeros((4, 4))
    expected[:2, 2:] = 1
    np.testing.assert_allclose((found[0, ..., 0] + 1) / 2, expected, atol=1e-6)


def test_a_view_depends_on_its_seed_and_number_alone():
    many = np.repeat(image(), 6, axis=0)
    together = views(many, 16, seed=3, numbers=np.arange(6), warp=1.0)
    alone = views(image(), 16, seed=3, numbers=np.array([4]), warp=1.0)
    np.testing.assert_array_equal(together[4], alone[0])
    other = views(image(), 16, seed=4, numbers=np.array([4]), warp=1.0)
    assert np.abs(other - alone).max() > 0.1 and np.abs(together[3] - together[4]).max() > 0.1


def test_views_stay_in_range_and_keep_most_of_the_ink():
    found = views(np.repeat(image(), 64, axis=0), 16, seed=0, numbers=np.arange(64), warp=1.0)
    assert found.dtype == np.float32 and found.min() >= -1 and found.max() <= 1
    # The square lies up on the right in every view: it is never turned or moved far.
    bright = found[..., 0]
    assert (bright[:, :8, 8:].mean((1, 2)) > bright[:, 8:, :8].mean((1, 2)) + 0.2).all()

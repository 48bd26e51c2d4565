"""Scaled images are kept, as many as fit, and are what would be decoded again."""

import numpy as np
import pytest
from PIL import Image

from tests.data.images.test_records import dataset, photograph
from upcycle_jax.data.images import decoding, held


def test_images_are_held_while_there_is_room():
    # Pillow takes 4 bytes for a pixel in colours, 1 for a grey one: 400 of 450, then 50 of 50.
    kept, made = held.HeldImages(450), []

    def get(place, mode, size):
        def make():
            made.append(place)
            return Image.new(mode, size)

        return kept.get(("pets", place), make)

    for _ in range(2):
        assert get(0, "RGB", (10, 10)).mode == "RGB"
        get(1, "RGB", (10, 10))
        get(2, "L", (5, 10))
        get(3, "L", (1, 1))
    assert made == [0, 1, 2, 3, 1, 3]
    assert ("pets", 2) in kept and ("pets", 1) not in kept and ("birds", 2) not in kept


@pytest.fixture
def photographs(tmp_path):
    for number in range(4):
        photograph(tmp_path / "pets" / "train" / "cat" / f"{number}.jpg", (60 + number, 50))
    return tmp_path / "pets"


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that were decoded."""
    found, decode = [], decoding.decode

    def counted(encoded, **options):
        found.append(options["what"])
        return decode(encoded, **options)

    monkeypatch.setattr(decoding, "decode", counted)
    return found


@pytest.mark.parametrize(("side", "most_bytes"), [(12, 1 << 20), (12, 0), (None, 1 << 20)])
def test_later_epochs_see_what_they_would_without(
    photographs, decoded, monkeypatch, side, most_bytes
):
    """Three epochs, and the last two once more; each image is in one batch of an epoch."""
    monkeypatch.setattr(held.HeldImages.__init__, "__defaults__", (most_bytes,))
    settings = {"crop": "inception", "flip": True, "shorter_side": side}
    opened = dataset(photographs, **settings)
    epochs = np.arange(12).reshape(3, 4)
    first = [opened.numbered(epoch, 7)["images"] for epoch in epochs]
    holds = side is not None and most_bytes > 0
    assert len(decoded) == (4 if holds else 12)
    decoded.clear()
    again = [opened.numbered(epoch, 7)["images"] for epoch in epochs[1:]]
    assert len(decoded) == (0 if holds else 8)
    np.testing.assert_array_equal(again, first[1:])
    fresh = [dataset(photographs, **settings).numbered(epoch, 7)["images"] for epoch in epochs]
    np.testing.assert_array_equal(fresh, first)


def test_the_sets_of_a_mixture_share_the_room(photographs, tmp_path, decoded):
    for number in range(4):
        photograph(tmp_path / "more" / "train" / "cat" / f"{number}.png", (30, 40))
    sets = {"pets": (str(photographs), 1), "more": (str(tmp_path / "more"), 1)}
    settings = {"mixture": sets, "folder": None, "mixture_or_task_name": "both"}
    settings |= {"crop": "central", "shorter_side": 12}
    opened = dataset(None, **settings)
    for epoch in np.arange(24).reshape(3, 8):
        opened.numbered(epoch, 7)
    assert len(decoded) == len(set(decoded)) == 8
    one, other = opened.sets
    assert one._held is other._held is not None

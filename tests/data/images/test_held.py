"""Scaled images are kept, as many as fit, and are what would be decoded again."""

import re

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
def decoded(monkeypatch, tmp_path):
    """Names of this test's files that were decoded: streams of others may still read ahead."""
    found, decode = [], decoding.decode

    def counted(encoded, **options):
        if str(tmp_path) in options["what"]:
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


@pytest.mark.parametrize("fit", [4, 1])
def test_images_are_held_before_the_first_batch(photographs, decoded, monkeypatch, caplog, fit):
    # Scaled to a shorter side of 12, photographs of 60 to 63 by 50 pixels are 14 or 15 wide:
    # 4 * 14 * 12 = 672 or 4 * 15 * 12 = 720 bytes each. One finds room in 800 bytes, but not two.
    monkeypatch.setattr(held.HeldImages.__init__, "__defaults__", (1 << 20 if fit == 4 else 800,))
    settings = {"crop": "inception", "flip": True, "shorter_side": 12}
    opened = dataset(photographs, **settings)
    stream = opened.train_iterator()
    with caplog.at_level("INFO"):
        stream.prepare()
    assert len(decoded) == 4 and sum(("pets", place) in opened._held for place in range(4)) == fit
    said = {4: "scaled 4 images in .*: all of 'pets' are in memory", 1: "no more of 'pets' fit"}
    assert re.search(said[fit], caplog.text)
    decoded.clear()
    stream.prepare()
    assert not decoded
    batches = [next(stream)["images"] for _ in range(3)]
    assert (not decoded) == (fit == 4)
    unprepared = dataset(photographs, **settings).train_iterator()
    np.testing.assert_array_equal(batches, [next(unprepared)["images"] for _ in range(3)])


def test_where_no_image_stays_nothing_is_decoded_before_the_first_batch(photographs, decoded):
    dataset(photographs, crop="inception").train_iterator().prepare()
    assert not decoded


def test_a_damaged_image_is_found_before_the_first_batch(photographs):
    damaged = photographs / "train" / "cat" / "2.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])
    stream = dataset(photographs, crop="central", shorter_side=12).train_iterator()
    with pytest.raises(ValueError, match=r"2\.jpg cannot be read .*mend it or take it out"):
        stream.prepare()


def test_the_sets_of_a_mixture_share_the_room(photographs, tmp_path, decoded):
    for number in range(4):
        photograph(tmp_path / "more" / "train" / "cat" / f"{number}.png", (30, 40))
    sets = {"pets": (str(photographs), 1), "more": (str(tmp_path / "more"), 1)}
    settings = {"mixture": sets, "folder": None, "mixture_or_task_name": "both"}
    settings |= {"crop": "central", "shorter_side": 12}
    opened = dataset(None, **settings)
    opened.train_iterator().prepare()
    assert len(decoded) == len(set(decoded)) == 8
    for epoch in np.arange(24).reshape(3, 8):
        opened.numbered(epoch, 7)
    assert len(decoded) == 8
    one, other = opened.sets
    assert one._held is other._held is not None

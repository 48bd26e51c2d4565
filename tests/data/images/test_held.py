"""Scaled images are kept, as many as fit, and are what would be decoded again."""

import os
import re
import tempfile

import numpy as np
import pytest
from PIL import Image

from tests.data.images.test_records import dataset, photograph
from upcycle_jax.data.images import decoding, held, temporary


def test_images_are_held_while_there_is_room():
    # Pillow takes 4 bytes for a pixel in colours, 1 for a grey one: 400 of 450, then 50 of 50. A
    # file takes 3 and 1: 300 of 301, then 1 of 1.
    kept, made = held.HeldImages(450, 301), []

    def get(place, mode, size):
        def make():
            made.append(place)
            return Image.new(mode, size)

        return kept.get(("pets", place), make)

    for _ in range(2):
        assert get(0, "RGB", (10, 10)).mode == "RGB"
        assert get(1, "RGB", (20, 5)).size == (20, 5)
        get(2, "L", (5, 10))
        get(3, "L", (1, 1))
        get(4, "L", (2, 1))
    assert made == [0, 1, 2, 3, 4, 4] and kept.is_full
    assert ("pets", 3) in kept and ("pets", 4) not in kept and ("birds", 2) not in kept


def test_a_file_gives_back_the_pixels_that_were_put_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (7, 5, 3), dtype=np.uint8))
    grey = Image.fromarray(rng.integers(0, 256, (3, 9), dtype=np.uint8))
    kept = held.HeldImages(0)
    for _ in range(2):
        for place, image in enumerate((colours, grey)):
            found = kept.get(("pets", place), lambda image=image: image)
            assert found.mode == image.mode
            np.testing.assert_array_equal(np.asarray(found), np.asarray(image))
    assert str(kept) == f"0 Bytes in memory, 132 Bytes in a temporary file in {tmp_path}"
    assert not list(tmp_path.iterdir())  # it has no name that could be left behind


def test_large_files_go_where_systems_expect_them(monkeypatch, tmp_path):
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(temporary, "_LARGE_FILES", tmp_path)
    assert temporary.folder() == str(tmp_path)
    monkeypatch.setattr(temporary, "_LARGE_FILES", tmp_path / "missing")
    assert temporary.folder() == tempfile.gettempdir()


@pytest.mark.parametrize("when", ["opened", "written"])
def test_a_full_disk_is_said_and_images_are_made_again(monkeypatch, caplog, when):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    owner, name = {"opened": (tempfile, "TemporaryFile"), "written": (os, "pwrite")}[when]
    monkeypatch.setattr(owner, name, full)
    kept, made = held.HeldImages(0), []
    for _ in range(2):
        kept.get(("pets", 0), lambda: made.append(0) or Image.new("L", (2, 2)))
    assert len(made) == 2 and kept.is_full and ("pets", 0) not in kept
    said = [record for record in caplog.records if "No space left" in record.getMessage()]
    assert len(said) == 1 and "images cannot be kept in" in said[0].getMessage()


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


def room(monkeypatch, memory, disk):
    monkeypatch.setattr(held.HeldImages.__init__, "__defaults__", (memory, disk))


@pytest.mark.parametrize(
    ("side", "memory", "disk"),
    [(12, 1 << 20, 0), (12, 800, None), (12, 0, 1 << 20), (12, 0, 0), (None, 1 << 20, None)],
)
def test_later_epochs_see_what_they_would_without(
    photographs, decoded, monkeypatch, side, memory, disk
):
    """Three epochs, and the last two once more; each image is in one batch of an epoch."""
    room(monkeypatch, memory, disk)
    settings = {"crop": "inception", "flip": True, "shorter_side": side}
    opened = dataset(photographs, **settings)
    epochs = np.arange(12).reshape(3, 4)
    first = [opened.numbered(epoch, 7)["images"] for epoch in epochs]
    holds = side is not None and (memory, disk) != (0, 0)
    assert len(decoded) == (4 if holds else 12)
    decoded.clear()
    again = [opened.numbered(epoch, 7)["images"] for epoch in epochs[1:]]
    assert len(decoded) == (0 if holds else 8)
    np.testing.assert_array_equal(again, first[1:])
    fresh = [dataset(photographs, **settings).numbered(epoch, 7)["images"] for epoch in epochs]
    np.testing.assert_array_equal(fresh, first)


@pytest.mark.parametrize(
    ("memory", "disk", "fit"), [(1 << 20, 0, 4), (800, 0, 1), (800, 700, 2), (800, None, 4)]
)
def test_images_are_held_before_the_first_batch(
    photographs, decoded, monkeypatch, caplog, memory, disk, fit
):
    # Scaled to a shorter side of 12, photographs of 60 to 63 by 50 pixels are 14 or 15 wide:
    # 4 * 14 * 12 = 672 or 4 * 15 * 12 = 720 bytes each. One finds room in 800 bytes of memory, but
    # not two. In a file they are 504 or 540 bytes: one of 700.
    room(monkeypatch, memory, disk)
    settings = {"crop": "inception", "flip": True, "shorter_side": 12}
    opened = dataset(photographs, **settings)
    stream = opened.train_iterator()
    with caplog.at_level("INFO"):
        stream.prepare(0, 3)
    assert len(decoded) == 4 and sum(("pets", place) in opened._held for place in range(4)) == fit
    said = "all of 'pets' are kept" if fit == 4 else "no more of 'pets' find room, and the others"
    assert re.search(rf"scaled 4 images in .*: {said}.* \(\d.* in memory", caplog.text)
    assert ("in a temporary file in" in caplog.text) == (disk != 0)
    decoded.clear()
    stream.prepare(0, 3)
    assert not decoded
    batches = [next(stream)["images"] for _ in range(3)]
    assert (not decoded) == (fit == 4)
    unprepared = dataset(photographs, **settings).train_iterator()
    np.testing.assert_array_equal(batches, [next(unprepared)["images"] for _ in range(3)])


@pytest.mark.parametrize("first", [0, 3])
def test_a_short_run_waits_only_for_what_it_shows(photographs, decoded, caplog, first):
    """Batches of 1 of 4 images: an epoch is 4 of them."""
    settings = {"crop": "inception", "shorter_side": 12, "batch_size": 1}
    stream = dataset(photographs, **settings).train_iterator()
    with caplog.at_level("INFO"):
        stream.prepare(first, 2)
    assert "scaled 2 images" in caplog.text and "those of 'pets' that are shown" in caplog.text
    ahead = list(decoded)
    assert len(ahead) == 2
    opened = dataset(photographs, **settings)
    decoded.clear()
    for number in (first, first + 1):
        opened.numbered(np.array([number]), 7)
    assert sorted(decoded) == sorted(ahead)


def test_where_no_image_stays_nothing_is_decoded_before_the_first_batch(photographs, decoded):
    dataset(photographs, crop="inception").train_iterator().prepare(0, 9)
    assert not decoded


def test_a_damaged_image_is_found_before_the_first_batch(photographs):
    damaged = photographs / "train" / "cat" / "2.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])
    stream = dataset(photographs, crop="central", shorter_side=12).train_iterator()
    with pytest.raises(ValueError, match=r"2\.jpg cannot be read .*mend it or take it out"):
        stream.prepare(0, 9)


def test_the_sets_of_a_mixture_share_the_room(photographs, tmp_path, decoded):
    for number in range(4):
        photograph(tmp_path / "more" / "train" / "cat" / f"{number}.png", (30, 40))
    sets = {"pets": (str(photographs), 1), "more": (str(tmp_path / "more"), 1)}
    settings = {"mixture": sets, "folder": None, "mixture_or_task_name": "both"}
    settings |= {"crop": "central", "shorter_side": 12}
    opened = dataset(None, **settings)
    opened.train_iterator().prepare(0, 9)
    assert len(decoded) == len(set(decoded)) == 8
    for epoch in np.arange(24).reshape(3, 8):
        opened.numbered(epoch, 7)
    assert len(decoded) == 8
    one, other = opened.sets
    assert one._held is other._held is not None


def test_a_short_run_of_a_mixture_waits_only_for_what_it_shows(photographs, tmp_path, decoded):
    """Of 60 batches of 1, one set has 4 of 5 turns: all of its 4 images, and 12 of the other's 40,
    give or take the turns by which a set may be off.
    """
    for number in range(40):
        photograph(tmp_path / "more" / "train" / "cat" / f"{number}.png", (30, 40))
    sets = {"pets": (str(photographs), 4), "more": (str(tmp_path / "more"), 1)}
    settings = {"mixture": sets, "folder": None, "mixture_or_task_name": "both"}
    settings |= {"crop": "central", "shorter_side": 12, "batch_size": 1}
    opened = dataset(None, **settings)
    opened.train_iterator().prepare(30, 60)
    assert sum("/pets/" in name for name in decoded) == 4
    assert 12 <= sum("/more/" in name for name in decoded) <= 12 + 5
    decoded.clear()
    for number in range(30, 90):
        opened.numbered(np.array([number]), 7)
    assert not decoded

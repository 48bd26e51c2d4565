"""Experts that are copies of files: each has bytes of its own, and an interrupted copy goes on."""

import errno
import os
import shutil

import numpy as np
import pytest

from upcycle_jax.checkpoints import create_checkpoint, open_checkpoint, repeated_rows
from upcycle_jax.checkpoints.repeated_rows import repeat_rows
from upcycle_jax.checkpoints.stored_chunks import StoredChunks
from upcycle_jax.trees import LeafSpec, Role

EXPERTS = 4
WI, WO, BIAS = (f"target/mlp/expert/{name}" for name in ("wi/kernel", "wo/kernel", "wi/bias"))
SPECS = {
    WI: LeafSpec((EXPERTS, 64, 96), np.dtype(np.float32), role=Role.EXPERT),
    WO: LeafSpec((EXPERTS, 96, 64), np.dtype(np.float32), role=Role.EXPERT),
    # Below 1 KiB: the index itself has it.
    BIAS: LeafSpec((EXPERTS, 24), np.dtype(np.float32), role=Role.EXPERT),
    "target/scale": LeafSpec((EXPERTS,), np.dtype(np.float32), role=Role.EXPERT),
}
ROWS = {name: range(EXPERTS) for name in (WI, WO, BIAS)}
VALUES = {
    name: np.random.default_rng(seed).random(spec.shape[1:], np.float32)
    for seed, (name, spec) in enumerate(SPECS.items())
}


def begun(path, chunk_bytes=1 << 14):
    """A writer that has expert 0 of every leaf that is to be repeated, in two chunks each."""
    writer = create_checkpoint(path, SPECS, step=3, metadata={}, chunk_bytes=chunk_bytes)
    for name in ROWS:
        if not writer.is_written(name, (slice(0, 1),)):
            writer.write(name, (slice(0, 1),), VALUES[name][None])
    return writer


def finished(writer):
    with writer:
        writer.write("target/scale", None, np.arange(EXPERTS, dtype=np.float32))
        return open_checkpoint(writer.finalize())


def assert_whole(reader):
    for name in ROWS:
        found = reader.read(name)
        np.testing.assert_array_equal(found, np.stack([VALUES[name]] * EXPERTS), err_msg=name)


def test_every_row_has_bytes_of_its_own(tmp_path):
    lines = []
    writer = begun(tmp_path / "out")
    repeat_rows(writer, ROWS, lines.append)
    reader = finished(writer)
    assert_whole(reader)
    chunks = StoredChunks(reader)
    places = {
        (value.file, value.offset)
        for name in (WI, WO)
        for expert in range(EXPERTS)
        for value in chunks.values(name, expert).values
    }
    files = {file for file, _ in places}
    assert len(places) == 2 * 2 * EXPERTS and len(files) >= EXPERTS
    state = tmp_path / "out" / "state"
    assert all((state / file).stat().st_nlink == 1 for file in files)
    # Damage in one copy leaves the others as they are.
    victim = next(value for value in chunks.values(WI, 2).values)
    with open(state / victim.file, "r+b") as stream:
        stream.seek(victim.offset)
        stream.write(bytes(victim.length))
    again = open_checkpoint(tmp_path / "out")
    with pytest.raises(ValueError, match="wi/kernel"):
        again.read(WI, (slice(2, 3),))
    np.testing.assert_array_equal(again.read(WI, (slice(3, 4),))[0], VALUES[WI])
    # Nothing is left that nothing refers to, such as manifests of the copies.
    assert not list(state.rglob("referenced.*/manifest.ocdbt"))


def test_some_rows_and_another_first_one(tmp_path):
    """Rows 0 and 3 get what row 2 has; row 1 is written by itself."""
    writer = create_checkpoint(tmp_path / "out", {WI: SPECS[WI]}, step=3, metadata={})
    with writer:
        writer.write(WI, (slice(2, 3),), VALUES[WI][None])
        repeat_rows(writer, {WI: (2, 0, 3)})
        assert not writer.is_written(WI, (slice(1, 2),))
        writer.write(WI, (slice(1, 2),), np.ones((1, 64, 96), np.float32))
        reader = open_checkpoint(writer.finalize())
    found = reader.read(WI)
    assert (found[1] == 1).all()
    np.testing.assert_array_equal(found[[0, 2, 3]], np.stack([VALUES[WI]] * 3))


class Killed(BaseException):
    pass


def test_a_copy_that_was_killed_goes_on_and_gives_the_same_bits(tmp_path, monkeypatch):
    """Killed before every file in turn, and before the commit that refers to them."""
    copy, refer = repeated_rows.bring_copy, repeated_rows.refer
    calls, kills = [], 0

    def interrupted_copy(file, place):
        calls.append(place)
        if len(calls) > allowed:
            raise Killed
        copy(file, place)

    def interrupted_refer(writer, links):
        calls.append(None)
        if len(calls) > allowed:
            raise Killed
        refer(writer, links)

    monkeypatch.setattr(repeated_rows, "bring_copy", interrupted_copy)
    monkeypatch.setattr(repeated_rows, "refer", interrupted_refer)
    monkeypatch.setattr(repeated_rows, "threads", lambda: 1)
    for count in range(40):
        allowed = count
        calls.clear()
        writer = begun(tmp_path / "out")
        try:
            repeat_rows(writer, ROWS)
        except Killed:
            kills += 1
            writer.close()
            continue
        break
    assert kills > EXPERTS
    writer.close()
    monkeypatch.undo()
    # A call that finds everything there copies nothing.
    monkeypatch.setattr(repeated_rows, "bring_copy", None)
    writer = begun(tmp_path / "out")
    repeat_rows(writer, ROWS)
    assert_whole(finished(writer))


def test_a_copy_of_an_older_index_is_replaced(tmp_path):
    """An interrupted call may have copied an index that lacks what was written since."""
    writer = begun(tmp_path / "out")
    writer.flush()
    folder = writer.state / "referenced.row_1"
    shutil.copytree(writer.state / "d", folder / "d")
    values = VALUES[WI] + 1
    writer.write(WI, (slice(0, 1),), values[None])
    writer.flush()
    # Of the size of the new one, so that it is not the size that gives it away.
    size = (writer.state / "manifest.ocdbt").stat().st_size
    (folder / "manifest.ocdbt").write_bytes(bytes(size))
    repeat_rows(writer, ROWS)
    np.testing.assert_array_equal(finished(writer).read(WI), np.stack([values] * EXPERTS))


def test_a_full_disk_keeps_what_was_copied(tmp_path, monkeypatch):
    real = shutil.copyfile

    def copyfile(source, target):
        if "row_3" in os.fspath(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(source, target)

    monkeypatch.setattr("upcycle_jax.checkpoints.repeated_rows.shutil.copyfile", copyfile)
    writer = begun(tmp_path / "out")
    with writer, pytest.raises(OSError, match="cannot write .*No space left.*is kept"):
        repeat_rows(writer, ROWS)
    assert list((tmp_path / "out.partial" / "state" / "referenced.row_1").rglob("d/*"))
    monkeypatch.undo()
    writer = begun(tmp_path / "out")
    assert writer.resumed
    repeat_rows(writer, ROWS)
    assert_whole(finished(writer))


def test_what_cannot_be_repeated_is_refused(tmp_path):
    with begun(tmp_path / "out") as writer:
        with pytest.raises(ValueError, match="target/scale: of chunks of .1,. none holds"):
            repeat_rows(writer, {"target/scale": range(EXPERTS)})
        with pytest.raises(ValueError, match="position 1 is not there yet"):
            repeat_rows(writer, {WI: (1, 2)})

"""Checksums of stored bytes: read once, told apart by every bit, by length, layout and order."""

import dataclasses
import itertools
import os
import pathlib

import numpy as np
import pytest

from upcycle_jax.checkpoints import chunk_copy, create_checkpoint, open_checkpoint, stored_sums
from upcycle_jax.checkpoints.checksums import checksum
from upcycle_jax.checkpoints.ocdbt import stored_values
from upcycle_jax.checkpoints.stored_chunks import StoredChunks
from upcycle_jax.moe import roles
from upcycle_jax.trees import LeafSpec

DENSE = {
    "target/w": LeafSpec((37, 64), np.dtype(np.float32)),
    "target/v": LeafSpec((37, 64), np.dtype(np.float32)),
    "target/b": LeafSpec((5,), np.dtype(np.float16)),
    "state/step": LeafSpec((), np.dtype(np.int32)),
}
SPARSE = roles.inferred(
    {
        "target/mlp/expert/w": LeafSpec((3, 37, 64), np.dtype(np.float32)),
        "target/v": DENSE["target/v"],
        "target/mlp/expert/b": LeafSpec((3, 5), np.dtype(np.float16)),
    }
)
REFERENCES = {
    "target/mlp/expert/w": chunk_copy.Reference("target/w", (0, 1, 2)),
    "target/v": chunk_copy.Reference("target/v"),
    "target/mlp/expert/b": chunk_copy.Reference("target/b", (0, 1, 2)),
}
LEAVES = [(name, None) for name in DENSE]


def dense(path, seed=0, chunk_bytes=4096):
    rng = np.random.default_rng(seed)
    with create_checkpoint(path, DENSE, step=7, metadata={}, chunk_bytes=chunk_bytes) as writer:
        for name, spec in DENSE.items():
            if spec.shape:
                writer.write(name, None, rng.normal(size=spec.shape).astype(spec.dtype))
        writer.finalize()
    return open_checkpoint(path)


def sparse(source, path, mode):
    layouts = chunk_copy.copied_layouts(source, REFERENCES, SPARSE)
    with create_checkpoint(path, SPARSE, step=7, metadata={}, layouts=layouts) as writer:
        chunk_copy.copy_leaves(writer, source, REFERENCES, mode)
        writer.finalize()
    return open_checkpoint(path)


def sums(reader, leaves=LEAVES, **options):
    return stored_sums.stored_sums(StoredChunks(reader), leaves, **options)


class Reads:
    """Counts which bytes of which files are read."""

    def __init__(self, monkeypatch):
        self.ranges, self._read = [], stored_sums.read_into
        monkeypatch.setattr(stored_sums, "read_into", self)

    def __call__(self, file, value, start, room):
        if value.inline is None:
            first, number = value.offset + start, os.fstat(file.open(value.file).fileno()).st_ino
            self.ranges.append((number, first, first + room.size))
        return self._read(file, value, start, room)

    def once(self):
        """Whether no byte was read twice; the bytes that were."""
        ordered = sorted(self.ranges)
        for (file, _, stop), (other, start, _) in itertools.pairwise(ordered):
            assert file != other or stop <= start
        return sum(stop - start for _, start, stop in ordered)


def test_every_leaf_has_a_text_whatever_the_size_of_the_blocks(tmp_path):
    reader = dense(tmp_path / "dense")
    found = sums(reader)
    assert set(found) == set(LEAVES) and len(set(found.values())) == len(LEAVES)
    assert all(text.startswith("stored64:") and len(text) == 41 for text in found.values())
    for size in (1, 4, 7, 1000, 4096):
        assert sums(reader, block_bytes=size) == found
    # Other chunks of the same values are other bytes.
    other = sums(dense(tmp_path / "other", chunk_bytes=2048))
    assert other["target/w", None] != found["target/w", None]
    assert other["target/b", None] == found["target/b", None]


def test_a_chunk_has_the_checksum_of_its_bytes_as_words(tmp_path):
    reader = dense(tmp_path / "dense")
    chunks = StoredChunks(reader)
    values = stored_values(pathlib.Path(reader.item), reader.context)
    for value in chunks.values("target/w").values:
        assert value in values.values()
        content = (chunks.folder / value.file).read_bytes()
        content = content[value.offset : value.offset + value.length]
        words = np.frombuffer(content + bytes(-len(content) % 4), "<u4")
        (found,) = stored_sums._sums(chunks, {0: value}, 256, None).values()
        assert found == checksum(words.astype(np.uint32))


def test_what_refers_to_the_same_bytes_is_read_once(tmp_path, monkeypatch):
    source = dense(tmp_path / "dense")
    plain = sums(source)
    for mode in chunk_copy.CopyMode:
        result = sparse(source, tmp_path / mode.name, mode)
        slabs = [(name, e) for name in SPARSE if "expert" in name for e in range(3)]
        reads = Reads(monkeypatch)
        found = sums(result, [*slabs, ("target/v", None)], block_bytes=512)
        for (name, _), text in found.items():
            assert text == plain[REFERENCES[name].source, None]
        chunks = StoredChunks(source)
        once = [chunks.values(f"target/{name}").nbytes for name in "wv"]
        shared = mode is chunk_copy.CopyMode.REFERENCE
        assert reads.once() == (sum(once) if shared else 3 * once[0] + once[1])
        monkeypatch.undo()


def test_every_bit_counts_and_only_the_leaf_that_has_it_differs(tmp_path):
    reader = dense(tmp_path / "dense")
    before, chunks = sums(reader), StoredChunks(reader)
    rng = np.random.default_rng(0)
    for name in ("target/w", "target/v"):
        for value in chunks.values(name).values:
            path = chunks.folder / value.file
            whole = path.read_bytes()
            places = [0, value.length - 1, *rng.integers(0, value.length, 5)]
            for at in places:
                damaged = bytearray(whole)
                damaged[value.offset + at] ^= 1 << int(rng.integers(8))
                path.write_bytes(damaged)
                after = sums(reader)
                assert [leaf for leaf in LEAVES if after[leaf] != before[leaf]] == [(name, None)]
            path.write_bytes(whole)
    assert sums(reader) == before


def test_what_is_gone_cut_off_or_unknown_has_no_text(tmp_path):
    reader = dense(tmp_path / "dense")
    chunks = StoredChunks(reader)
    assert sums(reader, [("target/w", None), ("target/x", None), ("target/w", 40)]).keys() == {
        ("target/w", None)
    }
    assert sums(object()) == {}
    last = max(chunks.values("target/w").values, key=lambda value: (value.file, value.offset))
    path = chunks.folder / last.file
    os.truncate(path, last.offset + last.length - 1)
    assert ("target/w", None) not in sums(reader)
    path.unlink()
    assert ("target/w", None) not in sums(reader)


@pytest.mark.parametrize("change", ["shape", "dtype", "codec", "order"])
def test_the_layout_and_the_order_of_chunks_are_part_of_the_text(tmp_path, change):
    values = StoredChunks(dense(tmp_path / "dense")).values("target/w")
    layout = values.layout
    other = {
        "shape": dataclasses.replace(layout, shape=layout.shape[::-1]),
        "dtype": dataclasses.replace(layout, dtype="<i4"),
        "codec": dataclasses.replace(layout, codec={**layout.codec, "compressor": None}),
        "order": layout,
    }[change]
    texts = [str(n) for n in range(len(values.values))]
    moved = texts[::-1] if change == "order" else texts
    changed = dataclasses.replace(values, layout=other)
    assert len(texts) > 1
    assert stored_sums._text(changed, moved) != stored_sums._text(values, texts)

"""Which parts of leaves are the same stored bytes, as the index says; checked by reading them."""

import os
import shutil

import numpy as np
import pytest
import tensorstore as ts

from upcycle_jax.checkpoints import chunk_copy, create_checkpoint, open_checkpoint, storage
from upcycle_jax.checkpoints.ocdbt import stored_values
from upcycle_jax.checkpoints.stored_chunks import StoredChunks
from upcycle_jax.moe import roles
from upcycle_jax.trees import LeafSpec

DENSE = {
    "target/w": LeafSpec((40, 64), np.dtype(np.float32)),
    "target/v": LeafSpec((40, 64), np.dtype(np.float32)),
    "target/b": LeafSpec((4,), np.dtype(np.float32)),
}
SPARSE = roles.inferred(
    {
        "target/mlp/expert/w": LeafSpec((3, 40, 64), np.dtype(np.float32)),
        "target/v": DENSE["target/v"],
        "target/mlp/expert/b": LeafSpec((3, 4), np.dtype(np.float32)),
    }
)
REFERENCES = {
    "target/mlp/expert/w": chunk_copy.Reference("target/w", (0, 1, 2)),
    "target/v": chunk_copy.Reference("target/v"),
    "target/mlp/expert/b": chunk_copy.Reference("target/b", (0, 1, 2)),
}


@pytest.fixture
def pair(tmp_path):
    rng = np.random.default_rng(0)
    with create_checkpoint(
        tmp_path / "dense", DENSE, step=1, metadata={}, chunk_bytes=4096
    ) as writer:
        for name, spec in DENSE.items():
            writer.write(name, None, rng.normal(size=spec.shape).astype(np.float32))
        writer.finalize()
    source = open_checkpoint(tmp_path / "dense")

    def made(name, mode):
        layouts = chunk_copy.copied_layouts(source, REFERENCES, SPARSE)
        with create_checkpoint(
            tmp_path / name, SPARSE, step=1, metadata={}, layouts=layouts
        ) as writer:
            chunk_copy.copy_leaves(writer, source, REFERENCES, mode)
            writer.finalize()
        return open_checkpoint(tmp_path / name)

    return source, made


def test_every_slab_that_refers_to_the_source_says_so(pair):
    source, made = pair
    target = made("sparse", chunk_copy.CopyMode.REFERENCE)
    ours, theirs = StoredChunks(source), StoredChunks(target)
    for leaf, reference in REFERENCES.items():
        whole = ours.slab(reference.source)
        assert whole is not None
        for expert in reference.experts or [None]:
            assert theirs.slab(leaf, expert) == whole
    assert ours.slab("target/w") != ours.slab("target/v")
    assert theirs.slab("target/mlp/expert/w") is not None  # A whole leaf, too.
    assert theirs.slab("target/missing") is None and theirs.files("target/missing") == []
    for file in theirs.files("target/mlp/expert/w"):
        assert os.stat(file).st_nlink == 2  # The file that holds the values, shared.
    # A copy of the source is other files, however equal.
    shutil.copytree(source.path, f"{source.path}.copy")
    copy = StoredChunks(open_checkpoint(f"{source.path}.copy"))
    assert copy.slab("target/w") not in (None, ours.slab("target/w"))
    # Small values lie in the index, and are compared themselves.
    assert copy.slab("target/b") == ours.slab("target/b")


def test_encoded_copies_share_nothing(pair):
    source, made = pair
    theirs = StoredChunks(made("sparse", chunk_copy.CopyMode.ENCODED))
    slabs = [theirs.slab("target/mlp/expert/w", expert) for expert in range(3)]
    assert None not in slabs and len(set(slabs)) == 3
    assert StoredChunks(source).slab("target/w") not in slabs


def test_a_missing_chunk_a_damaged_index_and_other_formats_share_nothing(pair):
    source, _ = pair
    assert source.specs()
    source.store.delete_range(ts.KvStore.KeyRange("target.w/1", "target.w/2")).result()
    chunks = StoredChunks(source)
    assert chunks.slab("target/w") is None and chunks.slab("target/v") is not None
    (source.item / "manifest.ocdbt").write_bytes(b"?")
    assert StoredChunks(source).slab("target/v") is None
    assert StoredChunks(object()).slab("target/v") is None


def test_an_index_of_many_levels_has_every_key(tmp_path):
    """Against the list of keys that TensorStore gives, and every value against what it reads."""
    context = storage.new_context()
    spec = storage.ocdbt_spec(tmp_path, create=True)
    config = {**storage.OCDBT_CONFIG, "max_decoded_node_bytes": 700, "version_tree_arity_log2": 1}
    store = ts.KvStore.open({**spec, "config": config}, context=context).result()
    for layer in range(6):
        transaction = ts.Transaction(atomic=True)
        for expert in range(40):
            value = bytes([expert, layer]) * (600 if expert % 3 else 20)
            store.with_transaction(transaction).write(f"layers_{layer}.wi/{expert}.0", value)
        transaction.commit_async().result()
    found = stored_values(tmp_path, context)
    assert sorted(found) == sorted(key.decode() for key in store.list().result())
    for key, value in found.items():
        stored = value.inline
        if stored is None:
            content = (tmp_path / value.file).read_bytes()
            stored = content[value.offset : value.offset + value.length]
        assert stored == store.read(key).result().value

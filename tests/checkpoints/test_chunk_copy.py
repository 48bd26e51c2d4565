"""Copying dense chunks once per expert: equal values, no new bytes by reference, and a source that
is never touched.
"""

import hashlib
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from upcycle_jax import trees
from upcycle_jax.checkpoints import (
    CheckpointManager,
    chunk_copy,
    create_checkpoint,
    open_checkpoint,
    repeated_rows,
)
from upcycle_jax.checkpoints.chunk_copy import CopyMode, Reference
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.trees import LeafSpec, Role

EXPERTS = 8
DENSE, SPARSE = "target/layer/mlp/wi/kernel", "target/layer/mlp/expert/wi/kernel"


def dense_state():
    rng = np.random.default_rng(0)
    return trees.unflatten(
        {
            DENSE: rng.random((64, 96), np.float32),
            "target/layer/mlp/bf16": rng.random((40, 50)).astype(ml_dtypes.bfloat16),
            "target/layer/small": np.arange(
                3, dtype=np.float32
            ),  # Below 1 KiB: stored in the index itself.
            "target/dropped": rng.random((64, 96), np.float32),
            "state/step": np.int32(11),
        }
    )


@pytest.fixture(params=["one chunk", "chunk per shard"])
def source(tmp_path, request):
    """A dense checkpoint saved from one device, or from eight (then a leaf has eight chunks)."""
    state = dense_state()
    if request.param == "chunk per shard":
        sharding = NamedSharding(Partitioner().mesh, PartitionSpec("data"))
        state["target"]["layer"]["mlp"]["wi"]["kernel"] = jax.device_put(
            state["target"]["layer"]["mlp"]["wi"]["kernel"], sharding
        )
    with CheckpointManager(tmp_path / "dense") as manager:
        manager.save(11, state)
    return open_checkpoint(tmp_path / "dense")


def job(source):
    """Specs of the sparse checkpoint and where its leaves come from; the router comes from
    nowhere.
    """
    specs = {
        name: spec
        for name, spec in source.specs().items()
        if name not in (DENSE, "target/dropped", "target/layer/mlp/bf16")
    }
    references = {name: Reference(name) for name in specs}
    for name, target in (
        (DENSE, SPARSE),
        ("target/layer/mlp/bf16", "target/layer/mlp/expert/bf16"),
    ):
        spec = source.specs()[name]
        specs[target] = LeafSpec((EXPERTS, *spec.shape), spec.dtype, role=Role.EXPERT)
        references[target] = Reference(name, tuple(range(EXPERTS)))
    specs["target/layer/mlp/router/kernel"] = LeafSpec((64, EXPERTS), np.dtype(np.float32))
    return specs, references


def begin(source, path, specs, references):
    return create_checkpoint(
        path,
        specs,
        step=11,
        metadata={},
        layouts=chunk_copy.copied_layouts(source, references, specs),
    )


def make(source, path, mode):
    specs, references = job(source)
    with begin(source, path, specs, references) as writer:
        chunk_copy.copy_leaves(writer, source, references, mode)
        writer.write(
            "target/layer/mlp/router/kernel", None, np.full((64, EXPERTS), 0.5, np.float32)
        )
        writer.finalize()
    return open_checkpoint(path)


def digest(folder):
    """A hash of every file's name and content below a folder."""
    result = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            result.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return result.hexdigest()


def new_bytes(folder):
    """Bytes of the files that no other folder shares."""
    return sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and path.stat().st_nlink == 1
    )


@pytest.mark.parametrize("mode", list(CopyMode))
def test_every_expert_is_the_dense_array(tmp_path, source, mode):
    before = digest(tmp_path / "dense")
    reader = make(source, tmp_path / "sparse" / "checkpoint_11", mode)
    for name, reference in job(source)[1].items():
        dense = source.read(reference.source)
        expected = (
            dense if reference.experts is None else np.broadcast_to(dense, (EXPERTS, *dense.shape))
        )
        value = reader.read(name)
        assert value.dtype == dense.dtype
        np.testing.assert_array_equal(value, expected, err_msg=name)
    assert digest(tmp_path / "dense") == before
    # The output stands alone: Orbax restores it when the source is gone.
    shutil.rmtree(tmp_path / "dense")
    restored = trees.flatten(
        ocp.PyTreeCheckpointer().restore(tmp_path / "sparse" / "checkpoint_11" / "state")
    )
    np.testing.assert_array_equal(restored[SPARSE], reader.read(SPARSE))
    assert restored["target/layer/mlp/router/kernel"].shape == (64, EXPERTS)


def test_references_cost_no_bytes_and_drop_what_is_not_needed(tmp_path, source):
    make(source, tmp_path / "sparse" / "checkpoint_11", CopyMode.REFERENCE)
    make(source, tmp_path / "written" / "checkpoint_11", CopyMode.ENCODED)
    dense_bytes = source.spec(DENSE).nbytes + source.spec("target/layer/mlp/bf16").nbytes
    assert new_bytes(tmp_path / "sparse") < 0.5 * dense_bytes
    # Random floats below 1 compress by some 10 to 15 per cent, and there are eight copies of them.
    assert new_bytes(tmp_path / "written") > 6 * dense_bytes
    kept = {
        path.name
        for path in (tmp_path / "sparse").rglob("*")
        if path.stat().st_nlink > 1 and path.is_file()
    }
    dense = {path.name for path in (tmp_path / "dense").rglob("ocdbt.process_0/d/*")}
    assert kept < dense | {path.name for path in (tmp_path / "dense").rglob("d/*")}
    folders = [
        path
        for path in (tmp_path / "sparse" / "checkpoint_11" / "state").rglob("*")
        if path.is_dir()
    ]
    assert all(any(path.iterdir()) for path in folders)


def test_both_modes_give_the_same_arrays_and_chunks(tmp_path, source):
    one = make(source, tmp_path / "a" / "checkpoint_11", CopyMode.REFERENCE)
    two = make(source, tmp_path / "b" / "checkpoint_11", CopyMode.ENCODED)
    assert one.specs() == two.specs()
    for name in one.specs():
        assert one.zarr_layout(name) == two.zarr_layout(name)
        np.testing.assert_array_equal(one.read(name), two.read(name))
    assert one.zarr_layout(SPARSE).chunks[0] == 1


def test_some_experts_copied_and_some_written(tmp_path, source):
    specs = {SPARSE: LeafSpec((EXPERTS, 64, 96), np.dtype(np.float32), role=Role.EXPERT)}
    references = {SPARSE: Reference(DENSE, (1, 4, 5))}
    fresh = np.random.default_rng(3).random((EXPERTS, 64, 96), np.float32)
    with begin(source, tmp_path / "checkpoint_11", specs, references) as writer:
        chunk_copy.copy_leaves(writer, source, references, CopyMode.REFERENCE)
        assert [writer.is_written(SPARSE, (slice(e, e + 1),)) for e in range(EXPERTS)] == [
            e in (1, 4, 5) for e in range(EXPERTS)
        ]
        for expert in (0, 2, 3, 6, 7):
            writer.write(SPARSE, (slice(expert, expert + 1),), fresh[expert : expert + 1])
        writer.finalize()
    value = open_checkpoint(tmp_path / "checkpoint_11").read(SPARSE)
    for expert in range(EXPERTS):
        np.testing.assert_array_equal(
            value[expert], source.read(DENSE) if expert in (1, 4, 5) else fresh[expert]
        )


def test_several_parents(tmp_path, source):
    """Two dense checkpoints can be experts of one output."""
    other_state = dense_state()
    other_state["target"]["layer"]["mlp"]["wi"]["kernel"] += 1
    with CheckpointManager(tmp_path / "other") as manager:
        manager.save(11, other_state)
    other = open_checkpoint(tmp_path / "other")
    specs = {SPARSE: LeafSpec((2, 64, 96), np.dtype(np.float32), role=Role.EXPERT)}
    first, second = {SPARSE: Reference(DENSE, (0,))}, {SPARSE: Reference(DENSE, (1,))}
    if source.zarr_layout(DENSE) != other.zarr_layout(
        DENSE
    ):  # Their chunks differ: only one of them can be shared.
        with (
            begin(source, tmp_path / "checkpoint_11", specs, first) as writer,
            pytest.raises(ValueError, match="chunks or a codec other"),
        ):
            chunk_copy.copy_leaves(writer, other, second, CopyMode.REFERENCE)
        return
    with begin(source, tmp_path / "checkpoint_11", specs, first) as writer:
        chunk_copy.copy_leaves(writer, source, first, CopyMode.REFERENCE)
        chunk_copy.copy_leaves(writer, other, second, CopyMode.REFERENCE)
        writer.finalize()
    value = open_checkpoint(tmp_path / "checkpoint_11").read(SPARSE)
    np.testing.assert_array_equal(value, np.stack([source.read(DENSE), other.read(DENSE)]))


def test_an_interrupted_copy_is_resumed(tmp_path, source):
    specs, references = job(source)
    path = tmp_path / "sparse" / "checkpoint_11"
    with begin(source, path, specs, references) as writer:
        chunk_copy.copy_leaves(writer, source, {SPARSE: references[SPARSE]}, CopyMode.REFERENCE)
    with begin(source, path, specs, references) as writer:
        assert writer.resumed
        assert writer.is_written(SPARSE)
        chunk_copy.copy_leaves(writer, source, references, CopyMode.REFERENCE)
        chunk_copy.copy_leaves(
            writer, source, references, CopyMode.ENCODED
        )  # Everything is there: nothing is written again.
        writer.write("target/layer/mlp/router/kernel", None, np.zeros((64, EXPERTS), np.float32))
        writer.finalize()
    np.testing.assert_array_equal(open_checkpoint(path).read(SPARSE)[-1], source.read(DENSE))


def test_an_interrupted_copy_of_encoded_chunks_writes_none_of_them_again(
    tmp_path, source, monkeypatch
):
    """What was written would be superseded, and copies of it would pile up with every try."""
    specs, references = job(source)
    path = tmp_path / "sparse" / "checkpoint_11"

    def interrupted(writer, links):
        raise OSError("interrupted")

    monkeypatch.setattr(repeated_rows, "refer", interrupted)
    sizes = []
    for _ in range(4):
        with begin(source, path, specs, references) as writer:
            with pytest.raises(OSError, match="interrupted"):
                chunk_copy.copy_leaves(writer, source, references, CopyMode.ENCODED)
            copied = list((writer.state / "referenced.row_3" / "d").iterdir())
            sizes.append(sum(file.stat().st_size for file in copied))
    # Each try leaves a new index, of less than a kilobyte, and no chunk (of 3 KiB or more).
    assert sizes[0] > 0.5 * source.spec(DENSE).nbytes > 5 * (sizes[-1] - sizes[0])
    monkeypatch.undo()
    reader = make(source, path, CopyMode.ENCODED)
    np.testing.assert_array_equal(reader.read(SPARSE)[-1], source.read(DENSE))


def test_a_tiled_checkpoint_can_be_a_source_again(tmp_path, source):
    first = make(source, tmp_path / "sparse" / "checkpoint_11", CopyMode.REFERENCE)
    specs = {SPARSE: first.specs()[SPARSE]}
    with begin(
        first, tmp_path / "again" / "checkpoint_11", specs, {SPARSE: Reference(SPARSE)}
    ) as writer:
        chunk_copy.copy_leaves(writer, first, {SPARSE: Reference(SPARSE)}, CopyMode.REFERENCE)
        writer.finalize()
    shutil.rmtree(tmp_path / "sparse")
    np.testing.assert_array_equal(
        open_checkpoint(tmp_path / "again").read(SPARSE)[3], source.read(DENSE)
    )


def test_training_on_a_tiled_checkpoint_leaves_the_source_alone(tmp_path, source):
    """The run that goes on from the output saves new files; the linked ones are shared with the
    source and must not change.
    """
    reader = make(source, tmp_path / "sparse" / "checkpoint_11", CopyMode.REFERENCE)
    before = digest(tmp_path / "dense")
    with CheckpointManager(tmp_path / "sparse", keep=1) as manager:
        shardings = dict.fromkeys(
            reader.specs(), NamedSharding(Partitioner().mesh, PartitionSpec())
        )
        state = manager.restore(11, reader.specs(), shardings)
        manager.save(12, jax.tree.map(lambda x: x + 1, state))
        manager.wait()
        assert manager.all_steps() == [12]
    assert digest(tmp_path / "dense") == before


def test_probe_says_what_is_possible(tmp_path, source):
    specs, references = job(source)
    output = tmp_path / "new" / "deeper" / "checkpoint_11"
    found = chunk_copy.probe(source, output, references, specs)
    assert (found.possible, found.linked) == (True, True)
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".upcycle-probe*"))
    assert (
        "bucket" in chunk_copy.probe(source, "gs://bucket/checkpoint_1", references, specs).reason
    )
    wrong = {**specs, SPARSE: LeafSpec((EXPERTS, 64, 96), np.dtype(ml_dtypes.bfloat16))}
    found = chunk_copy.probe(source, output, references, wrong)
    assert not found.possible
    assert f"{SPARSE}: bfloat16[8,64,96] cannot be copied from float32[64,96]" in found.reason


def test_probe_on_formats_without_shareable_chunks(tmp_path):
    state = {"target": {"w": np.ones((8, 8), np.float32)}}
    ocp.v1.save(tmp_path / "zarr3", state)
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(tmp_path / "folders", state)
    specs = {"target/w": LeafSpec((2, 8, 8), np.dtype(np.float32))}
    for name in ("zarr3", "folders"):
        found = chunk_copy.probe(
            open_checkpoint(tmp_path / name),
            tmp_path / "out",
            {"target/w": Reference("target/w", (0, 1))},
            specs,
        )
        assert not found.possible
        assert "only Orbax checkpoints in OCDBT with zarr 2" in found.reason


def test_without_links_the_files_are_copied_once(tmp_path, source, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    specs, references = job(source)
    found = chunk_copy.probe(source, tmp_path / "sparse" / "checkpoint_11", references, specs)
    assert (found.possible, found.linked) == (True, False)
    assert "copied once" in found.reason
    reader = make(source, tmp_path / "sparse" / "checkpoint_11", CopyMode.REFERENCE)
    np.testing.assert_array_equal(reader.read(SPARSE)[5], source.read(DENSE))


def test_references_that_do_not_fit(tmp_path, source):
    specs = {SPARSE: LeafSpec((4, 64, 96), np.dtype(np.float32), role=Role.EXPERT)}
    with pytest.raises(
        ValueError, match=r"experts \(0, 4\) do not exist in a leaf of shape \(4, 64, 96\)"
    ):
        chunk_copy.copied_layouts(source, {SPARSE: Reference(DENSE, (0, 4))}, specs)
    with pytest.raises(ValueError, match="the scalar state/step has no stored chunk"):
        chunk_copy.copied_layouts(
            source,
            {"target/x": Reference("state/step", (0,))},
            {"target/x": LeafSpec((1,), np.dtype(np.int32))},
        )
    writer = create_checkpoint(
        tmp_path / "checkpoint_1", specs, step=1, metadata={}, chunk_bytes=64
    )
    with (
        writer,
        pytest.raises(
            ValueError,
            match="begun with chunks or a codec other than the source's; pass `copied_layouts`",
        ),
    ):
        chunk_copy.copy_leaves(writer, source, {SPARSE: Reference(DENSE, (0,))}, CopyMode.REFERENCE)


def test_of_a_linked_file_the_file_itself_is_shared(tmp_path, source):
    """A source may hold links within its folder; a result that held them would point out of its
    own.
    """
    state = tmp_path / "dense" / "checkpoint_11" / "state"
    (state / "elsewhere").mkdir()
    for file in [f for f in state.rglob("*") if f.is_file() and f.parent.name == "d"]:
        moved = file.rename(state / "elsewhere" / file.name)
        file.symlink_to(moved)
    source = open_checkpoint(tmp_path / "dense")
    result = make(source, tmp_path / "sparse", CopyMode.REFERENCE)
    assert not [path for path in (tmp_path / "sparse").rglob("*") if path.is_symlink()]
    wanted = source.read(DENSE)
    shutil.rmtree(tmp_path / "dense")
    np.testing.assert_array_equal(result.read(SPARSE)[EXPERTS - 1], wanted)

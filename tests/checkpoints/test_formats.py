"""Finding out what a path holds, reading Orbax trees in parts and in shards, and the messages for
what cannot be read.
"""

import os
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from upcycle_jax import trees
from upcycle_jax.checkpoints import (
    CheckpointManager,
    CheckpointReader,
    latest_checkpoint,
    open_checkpoint,
    storage,
)
from upcycle_jax.checkpoints.reader import checked_index
from upcycle_jax.partitioning import Partitioner

VALUE = np.arange(4 * 6 * 10, dtype=np.float32).reshape(4, 6, 10)
TREE = {
    "target": {"mlp": {"wi": {"kernel": VALUE}}, "empty": {}, "none": None},
    "state": {"step": np.int32(12)},
}
NAME = "target/mlp/wi/kernel"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A MODEL_DIR with steps 2 and 12."""
    folder = tmp_path_factory.mktemp("run")
    with CheckpointManager(folder) as manager:
        manager.save(2, {"target": {"a": np.zeros(3, np.float32)}, "state": {"step": np.int32(2)}})
        manager.save(12, TREE)
    return folder


def test_a_model_dir_gives_its_latest_step(run):
    assert latest_checkpoint(run).name == "checkpoint_12"
    reader = open_checkpoint(run)
    assert isinstance(reader, CheckpointReader)
    assert (reader.format, reader.step, str(reader.path)) == (
        "orbax",
        12,
        str(run / "checkpoint_12"),
    )
    assert open_checkpoint(run / "checkpoint_2").step == 2
    assert open_checkpoint(f"{run}/checkpoint_12/state").specs() == reader.specs()


def test_specs_without_empty_nodes(run):
    specs = open_checkpoint(run).specs()
    assert {name: str(spec) for name, spec in specs.items()} == {
        "state/step": "int32[]",
        NAME: "float32[4,6,10]",
    }


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_partial_reads(run, data):
    reader = open_checkpoint(run)
    index = []
    for size in VALUE.shape[: data.draw(st.integers(0, 3))]:
        start = data.draw(st.integers(0, size))
        index.append(slice(start, data.draw(st.integers(start, size))))
    np.testing.assert_array_equal(reader.read(NAME, tuple(index)), VALUE[tuple(index)])


@pytest.mark.parametrize(
    "index", [(slice(0, 5),), (slice(0, 4, 2),), (slice(-1, None),), (slice(None),) * 4]
)
def test_indices_that_do_not_fit_are_refused(run, index):
    with pytest.raises(ValueError, match=rf"{NAME}: "):
        open_checkpoint(run).read(NAME, index)


def test_checked_index_fills_in_what_is_left_out():
    assert checked_index("x", (4, 6), (slice(1, None),)) == (slice(1, 4), slice(0, 6))


def test_a_wrong_name_gets_the_nearest(run):
    with pytest.raises(
        KeyError, match=f"no leaf 'target/mlp/wi/kernal' among its 2; nearest: {NAME}"
    ):
        open_checkpoint(run).read("target/mlp/wi/kernal")


@pytest.mark.parametrize(
    "spec",
    [
        PartitionSpec(),
        PartitionSpec("data"),
        PartitionSpec(None, "model"),
        PartitionSpec("data", "model"),
    ],
)
def test_sharded_reads_take_each_part_once(run, spec, monkeypatch):
    reader = open_checkpoint(run)
    mesh = Partitioner(num_model_partitions=2).mesh  # data 4 x expert 1 x model 2
    reads = []
    read_parts = reader.read_parts
    monkeypatch.setattr(
        reader,
        "read_parts",
        lambda name, indices: reads.extend(indices) or read_parts(name, indices),
    )
    array = reader.read_sharded(NAME, NamedSharding(mesh, spec))
    np.testing.assert_array_equal(np.asarray(array), VALUE)
    assert array.sharding.spec == spec
    assert sum(np.prod([part.stop - part.start for part in index]) for index in reads) == VALUE.size


def test_fingerprint_follows_the_content(run, tmp_path):
    assert (
        open_checkpoint(run).fingerprint() == open_checkpoint(run / "checkpoint_12").fingerprint()
    )
    assert open_checkpoint(run).fingerprint() != open_checkpoint(run / "checkpoint_2").fingerprint()
    copy = tmp_path / "copy"
    os.system(f"cp -r {run}/checkpoint_12 {copy}")
    assert open_checkpoint(copy).fingerprint() == open_checkpoint(run).fingerprint()
    data = max((copy / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert open_checkpoint(copy).fingerprint() != open_checkpoint(run).fingerprint()


def test_a_proof_written_again_is_no_other_checkpoint(run, tmp_path):
    """What was converted from a checkpoint must go on counting as its own after that one was
    verified once more.
    """
    copy = epath.Path(tmp_path / "checkpoint_12")
    shutil.copytree(run / "checkpoint_12", copy)
    before = open_checkpoint(copy).fingerprint()
    (copy / "proof.json").write_text("{}")
    (copy / "plan.json").write_text("{}")
    assert open_checkpoint(copy).fingerprint() == before


def test_lost_data_is_an_error_and_never_zeros(tmp_path):
    value = np.random.default_rng(0).random(
        (64, 64)
    )  # Above the 1 KiB that are stored in the index itself.
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"target": {"w": value}, "state": {"step": np.int32(1)}})
    reader = open_checkpoint(tmp_path)
    for path in (tmp_path / "checkpoint_1" / "state" / "ocdbt.process_0" / "d").iterdir():
        path.unlink()
    with pytest.raises(
        ValueError, match=r"leaf target/w cannot be read, its data is missing or damaged"
    ):
        reader.read("target/w")


def test_other_orbax_layouts(tmp_path):
    """Plain v0 trees with and without OCDBT, and v1's zarr 3, are read the same way."""
    tree = {"params": {"w": VALUE}, "step": np.int32(3)}
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(tmp_path / "folders", tree)
    with ocp.PyTreeCheckpointer(use_ocdbt=True) as checkpointer:
        checkpointer.save(tmp_path / "database", tree)
    ocp.v1.save(tmp_path / "zarr3", tree | {"step": np.asarray(3, np.int32)})
    for name in ("folders", "database", "zarr3"):
        reader = open_checkpoint(tmp_path / name)
        assert reader.specs()["params/w"].shape == VALUE.shape, name
        np.testing.assert_array_equal(reader.read("params/w"), VALUE, err_msg=name)
        np.testing.assert_array_equal(
            reader.read("params/w", (slice(1, 3), slice(0, 2))), VALUE[1:3, :2], err_msg=name
        )


def test_chunks_of_a_sharded_save(tmp_path):
    """A save from eight devices stores a chunk per shard; reads do not care."""
    mesh = Partitioner().mesh
    value = jax.device_put(
        np.arange(64.0, dtype=np.float32).reshape(16, 4), NamedSharding(mesh, PartitionSpec("data"))
    )
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"target": {"w": value}, "state": {"step": np.int32(1)}})
    reader = open_checkpoint(tmp_path)
    assert reader.zarr_layout("target/w").chunks == (2, 4)
    np.testing.assert_array_equal(reader.read("target/w", (slice(3, 9),)), np.asarray(value)[3:9])


def test_messages_for_what_cannot_be_opened(run, tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"checkpoint_3 does not exist\. The folder around it has the steps 2, 12\.",
    ):
        open_checkpoint(run / "checkpoint_3")
    with pytest.raises(FileNotFoundError, match="does not exist, nor does the folder around it"):
        open_checkpoint(tmp_path / "a" / "b")
    with pytest.raises(ValueError, match="the folder is empty.*Supported: an Orbax checkpoint"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"found notes\.txt"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="is no T5X checkpoint: a msgpack file begins with a map"):
        open_checkpoint(tmp_path / "notes.txt")


def test_messages_for_half_written_checkpoints(run, tmp_path):
    temporary = tmp_path / "checkpoint_5.orbax-checkpoint-tmp"
    os.system(f"cp -r {run}/checkpoint_12 {temporary}")
    with pytest.raises(ValueError, match="is a half-written checkpoint"):
        open_checkpoint(temporary)
    with pytest.raises(
        FileNotFoundError,
        match=r"beside it lies checkpoint_5\.orbax-checkpoint-tmp, a save that did not finish",
    ):
        open_checkpoint(tmp_path / "checkpoint_5")
    with pytest.raises(
        ValueError, match=r"holds no finished checkpoint, only checkpoint_5\.orbax-checkpoint-tmp"
    ):
        open_checkpoint(tmp_path)
    copied = tmp_path / "copied"
    os.system(f"cp -r {run}/checkpoint_12 {copied}")
    (copied / "state" / "_METADATA").unlink()
    with pytest.raises(
        ValueError, match=r"half-written or half-copied Orbax checkpoint \(no _METADATA\)"
    ):
        open_checkpoint(copied)
    os.system(f"cp {run}/checkpoint_12/state/_METADATA {copied}/state")
    (copied / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(ValueError, match=r"no manifest\.ocdbt"):
        open_checkpoint(copied)


def test_trees_round_trip_through_names(run):
    reader = open_checkpoint(run)
    nested = trees.unflatten({name: reader.read(name) for name in reader.specs()})
    assert nested["state"]["step"] == 12


def test_places():
    assert storage.file_spec("gs://bucket/a/b/") == {
        "driver": "gcs",
        "bucket": "bucket",
        "path": "a/b/",
    }
    assert storage.file_spec("/tmp/x")["path"] == "/tmp/x/"
    assert str(storage.absolute("gs://bucket/a/")) == "gs://bucket/a"
    assert storage.absolute("relative") == epath.Path(os.path.abspath("relative"))
    with pytest.raises(ValueError, match="only local paths and gs:// addresses"):
        storage.file_spec("s3://bucket/a")

"""A run's checkpoints: layout on disk, sharded restore, what is kept, what is refused, and
unfinished saves.
"""

import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec

from upcycle_jax import trees
from upcycle_jax.checkpoints import CheckpointManager, latest_checkpoint, open_checkpoint
from upcycle_jax.partitioning import EXPERT, Partitioner
from upcycle_jax.trees import LeafSpec

KERNEL = "target/encoder/layers_1/mlp/expert/wi_0/kernel"


def state(step=1, experts=8):
    """A nested state dict in T5X's shape, with every dtype that occurs."""
    rng = np.random.default_rng(step)
    flat = {
        KERNEL: jnp.asarray(rng.normal(size=(experts, 6, 10)), jnp.float32),
        "target/token_embedder/embedding": jnp.asarray(rng.normal(size=(16, 6)), jnp.bfloat16),
        "state/step": jnp.asarray(step, jnp.int32),
        "state/param_states/encoder/layers_1/mlp/expert/wi_0/kernel/v_row": jnp.zeros(
            (experts, 6), jnp.float32
        ),
        "state/param_states/encoder/layers_1/mlp/expert/wi_0/kernel/m": jnp.zeros(
            (1,), jnp.float32
        ),
    }
    return trees.unflatten(flat)


def specs_of(tree):
    return {name: LeafSpec(leaf.shape, leaf.dtype) for name, leaf in trees.flatten(tree).items()}


class Counter:
    """A data iterator whose position is a number."""

    def __init__(self, position=0):
        self.position = position

    def save(self, directory):
        (directory / "position.txt").write_text(str(self.position))

    def restore(self, directory):
        self.position = int((directory / "position.txt").read_text())


def test_layout_is_the_one_that_t5x_reads(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(7, state(7), dataset=Counter(3), metadata={"seed": 5})
    folder = tmp_path / "checkpoint_7"
    for path in (
        "_CHECKPOINT_METADATA",
        "commit_success.txt",
        "state/_METADATA",
        "state/manifest.ocdbt",
        "dataset/process_0-of-1/position.txt",
    ):
        assert (folder / path).is_file(), path
    # T5X restores with Orbax's PyTree handler: it must give back the very tree, unused slots of
    # shape (1,) included.
    restored = trees.flatten(ocp.PyTreeCheckpointer().restore(folder / "state"))
    for name, leaf in trees.flatten(state(7)).items():
        np.testing.assert_array_equal(np.asarray(restored[name]), np.asarray(leaf), err_msg=name)
        assert restored[name].dtype == leaf.dtype
    reader = open_checkpoint(tmp_path)
    assert (reader.step, reader.metadata()) == (7, {"seed": 5})
    assert reader.zarr_layout(KERNEL).separator == "."


@pytest.mark.parametrize("num_expert_partitions", [1, 2, 8])
def test_sharded_restore(tmp_path, num_expert_partitions):
    tree = state(3)
    with CheckpointManager(tmp_path) as manager:
        manager.save(3, tree)
        manager.wait()
        partitioner = Partitioner(num_expert_partitions=num_expert_partitions)
        shardings = dict.fromkeys(specs_of(tree), partitioner.replicated)
        shardings[KERNEL] = jax.sharding.NamedSharding(partitioner.mesh, PartitionSpec(EXPERT))
        restored = trees.flatten(manager.restore(3, specs_of(tree), shardings))
    for name, leaf in trees.flatten(tree).items():
        assert restored[name].sharding == shardings[name]
        np.testing.assert_array_equal(np.asarray(restored[name]), np.asarray(leaf), err_msg=name)
    assert restored[KERNEL].addressable_shards[0].data.shape == (8 // num_expert_partitions, 6, 10)


def test_restore_names_both_sides_of_a_mismatch(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state(1, experts=8))
        manager.wait()
        wanted = specs_of(state(1, experts=4)) | {
            "target/new": LeafSpec((2,), np.dtype(np.float32))
        }
        del wanted["target/token_embedder/embedding"]
        with pytest.raises(
            ValueError,
            match=(
                r"(?s)- target/new.*\+ target/token_embedder/embedding.*expected \[4,6,10\], found"
                r" \[8,6,10\]"
            ),
        ):
            manager.restore(1, wanted, {})
        with pytest.raises(
            FileNotFoundError, match=r"no finished checkpoint of step 2; it has \[1\]"
        ):
            manager.restore(2, wanted, {})


def test_arrays_may_change_after_save_returns(tmp_path):
    tree = state(1)
    host = np.asarray(
        tree["target"]["encoder"]["layers_1"]["mlp"]["expert"]["wi_0"]["kernel"]
    ).copy()
    mutable = {"target": {"a": host.copy()}, "state": {"step": np.int32(1)}}
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, mutable)
        mutable["target"]["a"][:] = -1
    np.testing.assert_array_equal(open_checkpoint(tmp_path).read("target/a"), host)


def test_keep_and_keep_period(tmp_path):
    with CheckpointManager(tmp_path, keep=2, keep_period=4) as manager:
        for step in range(1, 8):
            manager.save(step, state(step))
        manager.wait()
        assert manager.all_steps() == [4, 6, 7]
        assert manager.latest_step() == 7
    with pytest.raises(ValueError, match="keep=0: at least the latest"):
        CheckpointManager(tmp_path, keep=0)


def test_a_step_is_never_silently_skipped(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(5, state(5))
        with pytest.raises(ValueError, match="cannot save step 5 .* it holds step 5 already"):
            manager.save(5, state(5))
        with pytest.raises(ValueError, match="cannot save step 4 .* it holds step 5 already"):
            manager.save(4, state(4))
    with (
        CheckpointManager(tmp_path) as manager,
        pytest.raises(ValueError, match="holds step 5 already"),
    ):
        manager.save(5, state(5))


def test_dataset_position_belongs_to_its_step(tmp_path):
    data = Counter(10)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state(1), dataset=data)
        data.position = 11  # The run goes on while the arrays are being written.
        manager.save(2, state(2))
        manager.wait()
        restored = Counter()
        manager.restore_dataset(1, restored)
        assert restored.position == 10
        with pytest.raises(FileNotFoundError, match="step 2 was saved without its data iterator"):
            manager.restore_dataset(2, restored)
        # Saved by the first of two processes and read by one: a position counts global batches, so
        # it serves.
        dataset = tmp_path / "checkpoint_1" / "dataset"
        (dataset / "process_0-of-1").rename(dataset / "process_0-of-2")
        again = Counter()
        manager.restore_dataset(1, again)
        assert again.position == 10


def test_stale_temporary_folders_are_removed_and_never_seen(tmp_path):
    stale = tmp_path / "checkpoint_9.orbax-checkpoint-tmp"
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state(1))
    (stale / "state").mkdir(parents=True)
    assert latest_checkpoint(tmp_path).name == "checkpoint_1"
    partial = (
        tmp_path / "checkpoint_12.partial"
    )  # A conversion under way is not this manager's to remove.
    partial.mkdir()
    with CheckpointManager(tmp_path, read_only=True) as manager:
        assert manager.latest_step() == 1
    assert stale.exists()
    with CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() == 1
        assert manager.all_steps() == [1]
    assert not stale.exists()
    assert partial.exists()


def test_a_save_under_way_is_not_the_latest_step(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() is None
        manager.save(1, state(1))
        for step in manager.all_steps():
            assert (manager.path(step) / "commit_success.txt").exists()
        manager.wait()
        assert manager.latest_step() == 1


def test_kill_during_a_save_leaves_the_previous_step(tmp_path):
    """kill -9 while a save of 200 MB is under way: the step before it restores, and the next
    manager cleans up.
    """
    script = textwrap.dedent(f"""
        import numpy as np
        from upcycle_jax.checkpoints import CheckpointManager
        rng = np.random.default_rng(0)
        manager = CheckpointManager({str(tmp_path)!r})
        manager.save(1, {{"target": {{"a": np.arange(10.0)}}}})
        manager.wait()
        manager.save(2, {{"target": {{str(i): rng.random((5, 1024, 1024)) for i in range(5)}}}})
        print("saving", flush=True)
        manager.wait()
    """)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline().strip() == "saving"
    time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    finished = (
        tmp_path / "checkpoint_2"
    ).exists()  # Possible on a very fast disk; then there is nothing to check but that it opens.
    assert latest_checkpoint(tmp_path).name == ("checkpoint_2" if finished else "checkpoint_1")
    with CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() == (2 if finished else 1)
        np.testing.assert_array_equal(
            open_checkpoint(manager.path(1)).read("target/a"), np.arange(10.0)
        )
    assert not list(tmp_path.glob("*tmp*"))

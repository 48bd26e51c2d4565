"""Two processes on one machine save and restore the same checkpoint, each only its own shards."""

import os
import pathlib
import socket
import subprocess
import sys
import textwrap

import pytest

CHILD = textwrap.dedent("""
    import os, sys
    import jax, numpy as np
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    port, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    from jax.sharding import NamedSharding, PartitionSpec
    from upcycle_jax.checkpoints import CheckpointManager, open_checkpoint
    from upcycle_jax.partitioning import Partitioner

    class Data:
        def save(self, directory):
            (directory / "index").write_text(str(index))
        def restore(self, directory):
            assert (directory / "index").read_text() == str(index)

    partitioner = Partitioner(num_expert_partitions=8)
    sharding = NamedSharding(partitioner.mesh, PartitionSpec("expert"))
    value = np.random.default_rng(0).random((8, 64, 64)).astype(np.float32)
    array = jax.make_array_from_callback(value.shape, sharding, lambda part: value[part])
    counter = jax.device_put(np.int32(3), partitioner.replicated)
    state = {"target": {"expert": {"w": array}}, "state": {"step": counter}}
    manager = CheckpointManager(folder)
    manager.save(3, state, dataset=Data(), metadata={"seed": 1})
    manager.wait()
    assert manager.all_steps() == [3]
    manager.restore_dataset(3, Data())
    reader = open_checkpoint(folder)
    reads, read_parts = [], reader.read_parts
    reader.read_parts = lambda name, parts: reads.extend(parts) or read_parts(name, parts)
    one = reader.read_sharded("target/expert/w", sharding)
    assert len(reads) == 4, reads  # Four of the eight experts live on this process's devices.
    shardings = {"target/expert/w": sharding, "state/step": partitioner.replicated}
    two = manager.restore(3, reader.specs(), shardings)["target"]["expert"]["w"]
    for restored in (one, two):
        for shard in restored.addressable_shards:
            np.testing.assert_array_equal(shard.data, value[shard.index])
    manager.close()
    print("fine")
    """)


@pytest.mark.slow
def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
    }
    environment["PYTHONPATH"] = str(pathlib.Path(__file__).parents[2])
    commands = [
        [sys.executable, "-c", CHILD, str(port), str(index), str(tmp_path)] for index in range(2)
    ]
    processes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for command in commands
    ]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert output.strip().endswith("fine"), errors[-3000:]
    assert {path.name for path in (tmp_path / "checkpoint_3" / "dataset").glob("process*")} == {
        "process_0-of-2",
        "process_1-of-2",
    }

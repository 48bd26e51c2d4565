"""Processes that find each other, wait with a time limit and agree. Real processes where processes
are what is tested.
"""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from upcycle_jax import distributed
from upcycle_jax.config import command, flags
from upcycle_jax.distributed import Cluster

ROOT = pathlib.Path(__file__).resolve().parent.parent

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
    ("environ", "cluster"),
    [
        ({}, Cluster.ALONE),
        (SLURM, Cluster.SLURM),
        # One task (an interactive shell with four GPUs, say): jax would take a single GPU of it.
        (SLURM | {"SLURM_NTASKS": "1"}, Cluster.ALONE),
        # The batch script itself, outside of srun.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}, Cluster.ALONE),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}, Cluster.OPEN_MPI),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, Cluster.ALONE),
        # A pod that is not part of an indexed job has nobody to find.
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, Cluster.ALONE),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}, Cluster.KUBERNETES),
        ({"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "a,b"}, Cluster.TPU),
        ({"TPU_ML_PLATFORM": "JAX", "JAX_PLATFORMS": "tpu,cpu"}, Cluster.TPU),
        ({"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "a"}, Cluster.ALONE),
        (
            {"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},
            Cluster.TPU,
        ),
        (
            {"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"},
            Cluster.ALONE,
        ),
    ],
)
def test_the_environment_says_which_cluster_this_is(environ, cluster):
    assert distributed.detect(environ) == cluster


@pytest.mark.parametrize(
    ("given", "environ", "message"),
    [
        ({"process_count": 2}, {}, "missing: --coordinator_address, --process_index"),
        (
            {"coordinator_address": "h:1", "process_count": 2, "process_index": 2},
            {},
            "--process_index is 2 and --process_count 2",
        ),
        (
            {"coordinator_address": "h", "process_count": 2, "process_index": 1},
            {},
            "'h': give host:port",
        ),
        # Open MPI says count and index, and the index is out of no range: only the address is
        # missing.
        (
            {"process_count": 4},
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"},
            "missing: --coordinator_address$",
        ),
    ],
)
def test_flags_that_cannot_be_are_refused(given, environ, message):
    with pytest.raises(ValueError, match=message):
        distributed.join(**given, environ=environ)


def test_clusters_that_jax_cannot_read_ask_for_flags():
    with pytest.raises(ValueError, match="Open MPI 5.*give --coordinator_address"):
        distributed.join(
            look_for_cluster=True,
            environ={"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"},
        )
    with pytest.raises(ValueError, match=r"pip install 'jax\[k8s\]'"):
        distributed.join(
            look_for_cluster=True,
            environ={"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"},
        )


def test_alone_nothing_is_started_and_nothing_waits():
    assert distributed.join(look_for_cluster=True, environ={}) == distributed.Membership(
        Cluster.ALONE, 0, 1
    )
    one = distributed.join(coordinator_address="h:1", process_count=1, process_index=0, environ={})
    assert one == distributed.Membership(Cluster.FLAGS, 0, 1)
    distributed.barrier("x", timeout_seconds=0.001)
    distributed.require_equal("x", "text")
    assert (
        distributed.is_first()
        and distributed.process_count() == 1
        and distributed.process_index() == 0
    )


def test_only_commands_that_use_all_devices_look_for_a_cluster(monkeypatch):
    looked = []
    monkeypatch.setattr(
        distributed, "join", lambda **given: looked.append(given["look_for_cluster"])
    )
    command.join_processes("train", flags.Flags())
    command.join_processes("train", flags.Flags(dry_run=True))
    command.join_processes("model_info", flags.Flags())
    command.join_processes("model_info", flags.Flags(multiprocess_gpu=True))
    command.join_processes(
        "upcycle", flags.Flags(coordinator_address="h:1", process_count=2, process_index=0)
    )
    assert looked == [True, True, False]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_processes(
    code: str, arguments: list[list[str]], *, devices: int = 2, timeout: float = 100
) -> list[tuple[int, str]]:
    """Exit code and output of processes that run `code` at the same time."""
    environ = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": (
            f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        ),
        "PYTHONPATH": str(ROOT),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *words],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for words in arguments
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


TOGETHER = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from upcycle_jax import distributed as d
from upcycle_jax.checkpoints.checksums import checksum, device_summaries
port, index = sys.argv[1], int(sys.argv[2])
address = f"127.0.0.1:{port}"
place = {"coordinator_address": address, "process_count": 2, "process_index": index}
print(d.join(**place, initialization_timeout=60, environ={}))
d.require_equal("configuration", "the same")
d.barrier("a/b")
d.barrier("a/b")
mesh = Mesh(np.array(jax.devices()), ("x",))
sharding = NamedSharding(mesh, PartitionSpec("x"))
ones = jax.make_array_from_callback((8,), sharding, lambda i: np.arange(8.0)[i])
print("sum", float(jax.jit(jnp.sum)(ones)), "devices", len(jax.devices()), end=" ")
print(d.process_index(), d.process_count(), d.is_first())
try:
    d.require_equal("configuration", f"differs {index}")
except ValueError as error:
    print(error)
print("decided", d.first_decides("lease", lambda: f"by {index}"))
def refuse():
    raise ValueError(f"process {index} says no")
try:
    d.first_decides("lease", refuse)
except ValueError as error:
    print(error)
if index == 0:
    try:
        d.barrier("a/b", timeout_seconds=1)
    except TimeoutError as error:
        print(error)
    d.barrier("end")
else:
    d.barrier("end")

# One program for each leaf: unless each waits for the one before it, this never ends.
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "expert"))
splits = [PartitionSpec("data"), PartitionSpec("expert", "data"), PartitionSpec(None, "data")]
leaves = {f"{i}": np.full((8, 16), i, np.float32) for i in range(66)}
arrays = {
    name: jax.make_array_from_callback(
        leaf.shape, NamedSharding(mesh, splits[i % 3]), lambda at, leaf=leaf: leaf[at]
    )
    for i, (name, leaf) in enumerate(leaves.items())
}
for _ in range(4):
    found = {name: summary.checksum for name, summary in device_summaries(arrays).items()}
print("checksums", found == {name: checksum(leaf) for name, leaf in leaves.items()})
d.barrier("programs")
"""


@pytest.fixture(scope="module")
def together():
    """Exit codes and outputs of two processes of four devices each."""
    port = str(free_port())
    return run_processes(TOGETHER, [[port, "0"], [port, "1"]], devices=4)


def test_two_processes_compute_together_agree_and_name_who_is_missing(together):
    for index, (code, output) in enumerate(together):
        assert code == 0, output
        # 0 + 1 + ... + 7, over the four devices of each process.
        assert f"sum 28.0 devices 8 {index} 2 {index == 0}" in output
        assert (
            "configuration is not the same in all 2 processes; not as in process 0: process 1"
            in output
        )
        assert f"decided {'by 0' if index == 0 else None}" in output
        assert "process 0 says no" in output
    assert "barrier 'a/b': process 1 did not come within 1 s (1 of 2 there)" in together[0][1]


def test_many_programs_of_two_processes_do_not_wait_for_each_other_for_ever(together):
    for code, output in together:
        assert code == 0 and output.endswith("checksums True\n"), output


JOIN = """
import sys
from upcycle_jax import distributed as d
port, index, count, seconds = sys.argv[1], *map(int, sys.argv[2:])
place = {"coordinator_address": f"127.0.0.1:{port}", "process_count": count, "process_index": index}
d.join(**place, initialization_timeout=seconds, environ={})
"""


@pytest.fixture(scope="module")
def joins():
    """What processes say that wait in vain, all at the same time: processes 0 and 2 of 4; process
    1 of 2 without a coordinator; processes 0 of 3 and 1 of 2 of one coordinator.
    """
    port, nobody, other = (str(free_port()) for _ in range(3))
    waiting = [[port, "0", "4", "10"], [port, "2", "4", "6"], [nobody, "1", "2", "2"]]
    disagreeing = [[other, "0", "3", "8"], [other, "1", "2", "8"]]
    results = run_processes(JOIN, waiting + disagreeing)
    assert all(code == 1 for code, _ in results), results
    return [output for _, output in results]


def test_a_run_that_does_not_assemble_names_who_is_missing(joins):
    first, third, *_ = joins
    assert "TimeoutError: processes 1, 3 of 4 did not report to process 0 at 127.0.0.1" in first
    assert (
        "process 2 of 4 did not get together with process 0" in third
        and "it still waits for others" in third
    )


def test_a_process_without_a_coordinator_says_so_and_another_count_is_refused(joins):
    _, _, alone, _, refused = joins
    assert "process 1 of 2 did not get together with process 0" in alone and "refused" in alone
    assert (
        "was started with --process_count=2, but process 0 was started with --process_count=3"
        in refused
    )

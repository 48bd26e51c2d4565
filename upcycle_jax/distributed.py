"""Several processes as one run: finding each other, waiting for each other with a time limit, and
agreeing.

Where the values come from, first match wins:

  flags: `--coordinator_address --process_count --process_index`, as in T5X. What is missing is
    taken from SLURM (SLURM_NTASKS, SLURM_PROCID), Open MPI (OMPI_COMM_WORLD_SIZE,
    OMPI_COMM_WORLD_RANK), an indexed Kubernetes job (JOB_COMPLETION_INDEX) and
    JAX_COORDINATOR_ADDRESS.
  TPU pods, SLURM, Open MPI 4, Kubernetes: this module decides whether the process is part of such a
    cluster, `jax.distributed.initialize()` finds address, count and index itself.

Only commands that compute on all devices look for a cluster; the others join one only when flags
say so. An allocation of a single process is left alone, because jax would hand it a single GPU.
"""

import collections
import contextlib
import dataclasses
import enum
import hashlib
import importlib.util
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

import jax

_log = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_JOIN_SECONDS = 300
DEFAULT_BARRIER_SECONDS = 600.0
# A process that fails waits this long for the others before it ends; jax's 300 s would hold up
# every restart.
SHUTDOWN_SECONDS = 60

FLAGS = ("coordinator_address", "process_count", "process_index")


class Cluster(enum.StrEnum):
    """What tells a process about the others."""

    ALONE = "alone"
    FLAGS = "flags"
    TPU = "TPU pod"
    SLURM = "SLURM"
    OPEN_MPI = "Open MPI"
    KUBERNETES = "Kubernetes"


@dataclasses.dataclass(frozen=True)
class Membership:
    """This process's place among all.

    Attributes:
      cluster: what told it.
      process_index: its index.
      process_count: how many there are.
    """

    cluster: Cluster
    process_index: int = 0
    process_count: int = 1


def process_index() -> int:
    """Index of this process, 0 when alone."""
    return jax.process_index()


def process_count() -> int:
    """Number of processes, 1 when alone."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this is process 0, the one that writes what is written once."""
    return process_index() == 0


def host_device() -> jax.Device | None:
    """The CPU of this process as a device of jax; None where there is none (JAX_PLATFORMS)."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def in_turn(values: T) -> T:
    """The results of a program that all processes run, when they may start the next one: at once,
    but for CPU devices of several processes, where the values are waited for.

    XLA for CPUs runs each device's part of a program on a thread of a pool that is as large as the
    number of devices or cores. A part that waits in a collective keeps its thread. With several
    programs under way the threads of one process may all wait in a later program than those of
    another, for ever.

    Args:
      values: arrays, in any tree.
    """
    if process_count() > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(values)
    return values


def detect(environ: Mapping[str, str] = os.environ) -> Cluster:
    """The cluster that the environment describes, if it has more than one process; reads variables
    only.

    On TPU machines it looks for what jax sets when it is imported there; the number of hosts is
    then jax's to find out.
    """
    tpu_hosts = [
        host
        for host in environ.get(
            "TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", "")
        ).split(",")
        if host
    ]
    one_tpu_host = len(tpu_hosts) == 1 and int(environ.get("MEGASCALE_NUM_SLICES") or 1) == 1
    if (
        environ.get("TPU_ML_PLATFORM") == "JAX"
        and environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")
        and not one_tpu_host
    ):
        return Cluster.TPU
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environ for name in slurm) and int(environ["SLURM_NTASKS"]) > 1:
        return Cluster.SLURM
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return Cluster.OPEN_MPI
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return Cluster.KUBERNETES
    return Cluster.ALONE


def join(
    *,
    coordinator_address: str | None = None,
    process_count: int | None = None,
    process_index: int | None = None,
    initialization_timeout: int | None = None,
    look_for_cluster: bool = False,
    environ: Mapping[str, str] = os.environ,
) -> Membership:
    """Joins the other processes of a run. Must come before any use of a device.

    Collectives on CPU devices go through gloo. With flags, process 0 first counts the others in on
    the coordinator's port, so that a run that does not assemble ends with the indices that are
    missing; jax itself would abort without naming any.

    Args:
      coordinator_address: `host:port` of process 0.
      process_count: number of processes.
      process_index: index of this one.
      initialization_timeout: seconds to wait for the others, None for 300.
      look_for_cluster: without flags, join the cluster that `detect` finds.
      environ: environment variables.

    Raises:
      ValueError: flags are missing or out of range, or a cluster was found that needs flags.
      TimeoutError: the others did not come in time; the message names them.
    """
    seconds = DEFAULT_JOIN_SECONDS if initialization_timeout is None else initialization_timeout
    given = {
        "coordinator_address": coordinator_address,
        "process_count": process_count,
        "process_index": process_index,
    }
    cluster = detect(environ)
    if any(value is not None for value in given.values()):
        return _join_by_flags(_completed(given, cluster, environ), seconds, environ)
    if not look_for_cluster or cluster == Cluster.ALONE:
        return Membership(Cluster.ALONE)
    _check_detectable(cluster, environ)
    return _join_detected(cluster, seconds)


def _completed(
    given: Mapping[str, Any], cluster: Cluster, environ: Mapping[str, str]
) -> dict[str, Any]:
    """The three values, what flags leave open filled in from the environment."""
    count_and_index = {
        Cluster.SLURM: ("SLURM_NTASKS", "SLURM_PROCID"),
        Cluster.OPEN_MPI: ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        Cluster.KUBERNETES: ("", "JOB_COMPLETION_INDEX"),
    }.get(cluster, ("", ""))
    found: dict[str, Any] = {"coordinator_address": environ.get("JAX_COORDINATOR_ADDRESS")}
    found |= {
        flag: int(environ[name]) if name in environ else None
        for flag, name in zip(FLAGS[1:], count_and_index, strict=True)
    }
    values = {flag: found[flag] if given[flag] is None else given[flag] for flag in FLAGS}
    absent = ", ".join(f"--{flag}" for flag in FLAGS if values[flag] is None)
    if absent:
        raise ValueError(
            f"a run of several processes needs all of --{', --'.join(FLAGS)}; missing: {absent}"
        )
    count, index = values["process_count"], values["process_index"]
    if count < 1 or not 0 <= index < count:
        raise ValueError(
            f"--process_index is {index} and --process_count {count}: indices go from 0 to"
            " process_count - 1"
        )
    host, _, port = values["coordinator_address"].rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"--coordinator_address is {values['coordinator_address']!r}: give host:port of process"
            " 0, e.g. 10.0.0.1:12321"
        )
    return values


def _check_detectable(cluster: Cluster, environ: Mapping[str, str]) -> None:
    """Raises where jax's own detection is known not to work."""
    if cluster == Cluster.OPEN_MPI and "OMPI_MCA_orte_hnp_uri" not in environ:
        raise ValueError(
            "this looks like Open MPI 5, which does not tell its processes where process 0 is: give"
            " --coordinator_address=HOST:PORT (count and index are taken from OMPI_COMM_WORLD_SIZE"
            " and OMPI_COMM_WORLD_RANK)"
        )
    if cluster == Cluster.KUBERNETES and importlib.util.find_spec("kubernetes") is None:
        raise ValueError(
            "this is an indexed Kubernetes job, and jax needs the package `kubernetes` to find the"
            " other pods: pip install 'jax[k8s]', or give --coordinator_address=HOST:PORT and"
            " --process_count (the index is taken from JOB_COMPLETION_INDEX)"
        )


def _join_by_flags(
    values: Mapping[str, Any], seconds: float, environ: Mapping[str, str]
) -> Membership:
    address, count, index = (values[flag] for flag in FLAGS)
    if count == 1:
        return Membership(Cluster.FLAGS)
    # Several tasks of one SLURM or MPI host must not all take all of its GPUs.
    local = environ.get("SLURM_LOCALID", environ.get("OMPI_COMM_WORLD_LOCAL_RANK"))
    own_gpu = detect(environ) in (Cluster.SLURM, Cluster.OPEN_MPI) and local is not None
    if index == 0:
        _count_in(address, count, seconds)
    else:
        _report_to(address, index, count, seconds)
    _initialize(
        coordinator_address=address,
        num_processes=count,
        process_id=index,
        local_device_ids=[int(local)] if own_gpu and local is not None else None,
        initialization_timeout=int(seconds),
        cluster_detection_method="deactivate",
    )
    return Membership(Cluster.FLAGS, index, count)


def _join_detected(cluster: Cluster, seconds: float) -> Membership:
    try:
        _initialize(initialization_timeout=int(seconds))
    except ValueError as error:
        if cluster != Cluster.TPU:
            raise
        # A TPU machine outside a pod (a notebook, say) has no metadata that lists workers.
        _log.info("this TPU machine does not describe a pod (%s): going on alone", error)
        return Membership(Cluster.ALONE)
    state = _state()
    _log.info("process %d of %d, found through %s", state.process_id, state.num_processes, cluster)
    return Membership(cluster, state.process_id, state.num_processes)


def _initialize(**options: Any) -> None:
    # Without gloo, a computation over the CPU devices of several processes is refused.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(shutdown_timeout_seconds=SHUTDOWN_SECONDS, **options)


def _state() -> Any:
    """jax's own record of the processes. Private there, but the only way to its key-value store and
    to a barrier with a time limit; Orbax uses the same object.
    """
    from jax._src import distributed

    return distributed.global_state


# Counting in: one line of JSON from each process, one word back.


def _count_in(address: str, count: int, seconds: float) -> None:
    """Process 0: waits until every other process has said its index."""
    port = int(address.rpartition(":")[2])
    deadline = time.monotonic() + seconds
    waiting: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        try:
            listener = stack.enter_context(_listener(port))
        except OSError as error:
            raise ValueError(
                f"process 0 cannot listen on port {port} of --coordinator_address {address}:"
                f" {error}"
            ) from error
        while len(waiting) < count - 1:
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = set(range(1, count)) - waiting.keys()
                raise TimeoutError(
                    f"{_names(missing)} of {count} did not report to process 0 at {address} within"
                    f" {seconds:.0f} s: see their logs, and that they can reach that address;"
                    " --initialization_timeout waits longer"
                ) from None
            stack.enter_context(connection)
            index = _read_hello(connection, count)
            if index is not None:
                waiting[index] = connection
                with contextlib.suppress(OSError):
                    connection.sendall(b"counted\n")
        for connection in waiting.values():
            with contextlib.suppress(OSError):
                connection.sendall(b"go\n")


def _listener(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _read_hello(connection: socket.socket, count: int) -> int | None:
    """The index that a process says, or None for anything that is not a process of this run."""
    connection.settimeout(5)
    try:
        hello = json.loads(connection.makefile("rb").readline(1000))
        index, its_count = int(hello["process_index"]), int(hello["process_count"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if its_count != count or not 0 < index < count:
        with contextlib.suppress(OSError):
            connection.sendall(f"process 0 was started with --process_count={count}\n".encode())
        return None
    return index


def _report_to(address: str, index: int, count: int, seconds: float) -> None:
    """Every process but 0: says its index and waits for the word that all are there."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    problem = "nothing answers there"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as connection:
                connection.sendall(
                    json.dumps({"process_index": index, "process_count": count}).encode() + b"\n"
                )
                connection.settimeout(max(deadline - time.monotonic(), 0.01))
                problem = (
                    "it answers, but does not count processes in: an earlier run may still hold the"
                    " port"
                )
                answers = connection.makefile("r", encoding="utf-8", errors="replace")
                answer = answers.readline(1000).strip()
                if answer == "counted":
                    problem = "it still waits for others"
                    answer = answers.readline(1000).strip()
        except OSError as error:
            problem = (
                problem
                if isinstance(error, TimeoutError | ConnectionResetError)
                else f"{type(error).__name__}: {error}"
            )
        else:
            if answer == "go":
                return
            if answer.startswith("process 0"):
                raise ValueError(
                    f"process {index} was started with --process_count={count}, but {answer}: start"
                    " all with the same number"
                )
        time.sleep(0.2)
    raise TimeoutError(
        f"process {index} of {count} did not get together with process 0 at {address} within"
        f" {seconds:.0f} s ({problem}): see the log of process 0, which names the processes that it"
        " waits for"
    )


def _names(indices: Collection[int], limit: int = 8) -> str:
    listed = sorted(indices)
    shown = ", ".join(map(str, listed[:limit])) + (
        f" and {len(listed) - limit} more" if len(listed) > limit else ""
    )
    return f"process{'es' if len(listed) != 1 else ''} {shown}"


# Waiting for each other and agreeing, once joined.

_uses: collections.Counter[str] = collections.Counter()


def barrier(name: str, *, timeout_seconds: float = DEFAULT_BARRIER_SECONDS) -> None:
    """Returns when every process has called it with this name. Alone it returns at once.

    Runs on the host, through jax's coordination service: no device is used and nothing is compiled.

    Raises:
      TimeoutError: not all came within `timeout_seconds`; the message names the missing processes.
    """
    client, count = _state().client, _state().num_processes
    if client is None or count == 1:
        return
    key = _next_key("barrier", name)
    client.key_value_set(f"{key}/{_state().process_id}", "here")
    try:
        client.wait_at_barrier(key.replace("/", "_"), int(timeout_seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        with _explained(name, error):
            here = {int(path.rpartition("/")[2]) for path, _ in client.key_value_dir_get(key)}
        missing = set(range(count)) - here
        who = (
            _names(missing) + " did not come"
            if missing
            else "all processes came, but not all were let through"
        )
        raise TimeoutError(
            f"barrier {name!r}: {who} within {timeout_seconds:g} s ({len(here)} of {count} there)"
        ) from error


def require_equal(
    name: str, value: str, *, timeout_seconds: float = DEFAULT_BARRIER_SECONDS
) -> None:
    """Checks that every process has the same text, e.g. the same configuration.

    Raises:
      ValueError: it differs; the message names the processes that differ from process 0.
      TimeoutError: not all processes came.
    """
    client, count = _state().client, _state().num_processes
    if client is None or count == 1:
        return
    key = _next_key("equal", name)
    client.key_value_set(f"{key}/{_state().process_id}", hashlib.sha256(value.encode()).hexdigest())
    barrier(f"equal {name}", timeout_seconds=timeout_seconds)
    digests = {
        int(path.rpartition("/")[2]): digest for path, digest in client.key_value_dir_get(key)
    }
    different = {index for index, digest in digests.items() if digest != digests[0]}
    if different:
        raise ValueError(
            f"{name} is not the same in all {count} processes; not as in process 0:"
            f" {_names(different)}. Start all with the same files, flags and code"
        )


def first_decides(
    name: str, action: Callable[[], T], *, timeout_seconds: float = DEFAULT_BARRIER_SECONDS
) -> T | None:
    """Runs `action` in process 0 and returns its value there, None in the others, when it is done.

    Raises:
      ValueError: what it raised in process 0, in all of them.
      TimeoutError: process 0 did not get that far in time.
    """
    client, count = _state().client, _state().num_processes
    if client is None or count == 1:
        return action()
    key = f"{_next_key('decision', name)}/outcome"
    if _state().process_id == 0:
        try:
            value = action()
        except ValueError as error:
            client.key_value_set(key, f"no {error}")
            raise
        client.key_value_set(key, "yes")
        return value
    try:
        outcome = client.blocking_key_value_get(key, int(timeout_seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(
            f"{name}: process 0 said nothing within {timeout_seconds:g} s; see its log"
        ) from error
    if outcome != "yes":
        raise ValueError(outcome.removeprefix("no "))
    return None


def _next_key(kind: str, name: str) -> str:
    """A key for this use of a name: every process counts its uses, so that a name can be used
    again.
    """
    use = _uses[f"{kind}/{name}"]
    _uses[f"{kind}/{name}"] += 1
    return f"upcycle_jax/{kind}/{name.replace('/', '_')}/{use}"


@contextlib.contextmanager
def _explained(name: str, cause: Exception) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError:
        raise TimeoutError(
            f"barrier {name!r} failed, and process 0, which could say who is missing, does not"
            f" answer: {cause}"
        ) from cause

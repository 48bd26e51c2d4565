"""Which process writes something, so that a reader can tell one that goes on from one that was
killed. No jax.
"""

import os
import pathlib
import socket
from collections.abc import Mapping
from typing import Any

_WHERE = ("host", "boot", "pid_namespace")
"""What must agree for a process id to mean the same process: containers of one machine may share
the name and not the ids, machines may share the name and nothing else.
"""


def this_process() -> dict[str, Any]:
    """Host, process id, and when the process started; and the boot of the machine and the namespace
    that the id belongs to.
    """
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "start_ticks": _start_ticks(pid),
        "boot": _boot(),
        "pid_namespace": _pid_namespace(),
    }


def is_alive(record: Mapping[str, Any]) -> bool | None:
    """Whether the recorded process still runs; None where this machine cannot tell (another host or
    container, another boot, no /proc, or a record of other content).
    """
    here = this_process()
    pid = record.get("pid")
    if (
        not isinstance(pid, int)
        or record.get("start_ticks") is None
        or here["start_ticks"] is None
        or any(name in record and record[name] != here[name] for name in _WHERE)
        or "host" not in record
    ):
        return None
    return _start_ticks(pid) == record["start_ticks"]


def _start_ticks(pid: int) -> int | None:
    """The start in clock ticks since the machine's, which tells a process from a later one of the
    same id; None if it cannot be seen.

    Read as the kernel counts it: a start by the clock (`psutil.Process.create_time`) moves when the
    clock is set, and a living process would be taken for a dead one.

    A process that has ended and that its parent has not looked at yet (a zombie) counts as gone.
    """
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def _boot() -> str | None:
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _pid_namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None

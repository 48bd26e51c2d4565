"""Which process writes a run, so that a reader can tell a run that goes on from one that was
killed. No jax.
"""

import os
import pathlib
import socket
from collections.abc import Mapping
from typing import Any


def this_process() -> dict[str, Any]:
    """Host, process id, and when the process started, for the manifest."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "start_ticks": _start_ticks(pid)}


def is_alive(record: Mapping[str, Any]) -> bool | None:
    """Whether the recorded process still runs; None where this machine cannot tell (another host,
    or no /proc).
    """
    if (
        record.get("host") != socket.gethostname()
        or record.get("start_ticks") is None
        or _start_ticks(os.getpid()) is None
    ):
        return None
    return _start_ticks(int(record["pid"])) == record["start_ticks"]


def _start_ticks(pid: int) -> int | None:
    """The start in clock ticks since the machine's, which tells a process from a later one of the
    same id; None if it cannot be seen.

    A process that has ended and that its parent has not looked at yet (a zombie) counts as gone.
    """
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None

"""Memory of a long run: starts a command, samples the resident memory of its processes, and says
whether it grows.

    taskset -c 1 nice -n 19 python scripts/measure_memory.py --log=memory.jsonl --period=60 \\
        --limit_minutes=60 -- python -m upcycle_jax.train --gin_file=models/t5_1_1_tiny.gin \\
        --gin_file=runs/pretrain.gin ...

Each sample is one JSON line: minutes since the start, MiB of the command and its children, the load
average. What a program holds is its anonymous memory; resident memory also counts pages of
libraries and files, which the kernel drops and reads again as it likes. At the end the
least-squares slope of the anonymous memory after `--warmup_minutes` is printed. At the time limit
the command gets SIGTERM, on which a training run saves and ends. Linux only: it reads /proc. The
exit status is that of the command.
"""

import argparse
import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Memory:
    """Of a process and its descendants, MiB; pages that they share count once per process."""

    resident: float
    anonymous: float


def memory(root: int) -> Memory:
    """Looks at /proc."""
    parents, resident, anonymous = {}, {}, {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            # Fields after the command's name, which may contain spaces: state, parent, ...
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rpartition(")")[2].split()[1]
            )
            status = dict(
                line.split(":", 1)
                for line in (folder / "status").read_text().splitlines()
                if ":" in line
            )
            resident[int(folder.name)] = int(status["VmRSS"].split()[0]) / 1024
            anonymous[int(folder.name)] = int(status["RssAnon"].split()[0]) / 1024
        except (OSError, IndexError, KeyError):  # it ended while it was looked at
            continue
    family, added = {root}, {root}
    while added:
        added = {child for child, parent in parents.items() if parent in family} - family
        family |= added
    return Memory(
        *(sum(found.get(process, 0.0) for process in family) for found in (resident, anonymous))
    )


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of (minutes, MiB), MiB per hour; 0 for fewer than two samples.

    >>> slope([(0, 100.0), (30, 101.0), (60, 102.0)])
    2.0
    """
    if len(samples) < 2:
        return 0.0
    times, values = zip(*samples, strict=True)
    middle, mean = sum(times) / len(times), sum(values) / len(values)
    spread = sum((t - middle) ** 2 for t in times)
    return 60.0 * sum((t - middle) * (v - mean) for t, v in samples) / spread if spread else 0.0


def summary(samples: Sequence[tuple[float, float]], *, warmup_minutes: float) -> str:
    """One line on (minutes, MiB) samples."""
    steady = [sample for sample in samples if sample[0] >= warmup_minutes]
    if not steady:
        return f"{len(samples)} samples, none after the first {warmup_minutes:g} minutes"
    low, high = min(mib for _, mib in steady), max(mib for _, mib in steady)
    return (
        f"{len(steady)} samples from minute {steady[0][0]:.1f} to {steady[-1][0]:.1f}: {low:.0f} to"
        f" {high:.0f} MiB anonymous, first {steady[0][1]:.0f}, last {steady[-1][1]:.0f}, slope"
        f" {slope(steady):+.1f} MiB per hour"
    )


def main() -> int:
    """Runs the command, samples it and returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--log", required=True, type=pathlib.Path, help="JSON lines to append to")
    parser.add_argument(
        "--period", type=float, default=60.0, help="seconds between samples (default 60)"
    )
    parser.add_argument("--limit_minutes", type=float, help="when to end the command with SIGTERM")
    parser.add_argument(
        "--warmup_minutes",
        type=float,
        default=5.0,
        help="left out of the slope: compilation (default 5)",
    )
    parser.add_argument("command", nargs="+", help="what to run, after --")
    given = parser.parse_args()

    samples: list[tuple[float, float]] = []
    started, asked_to_end = time.monotonic(), False
    with subprocess.Popen(given.command) as process:
        while process.poll() is None:
            minutes = (time.monotonic() - started) / 60
            found = memory(process.pid)
            samples.append((minutes, found.anonymous))
            load = pathlib.Path("/proc/loadavg").read_text().split()[0]
            with given.log.open("a") as log:
                row = {
                    "minutes": round(minutes, 2),
                    "anonymous_mib": round(found.anonymous, 1),
                    "resident_mib": round(found.resident, 1),
                }
                log.write(json.dumps(row | {"load": float(load)}) + "\n")
            if (
                given.limit_minutes is not None
                and minutes >= given.limit_minutes
                and not asked_to_end
            ):
                process.send_signal(signal.SIGTERM)
                asked_to_end = True
            try:
                process.wait(given.period)
            except subprocess.TimeoutExpired:
                continue
    print(summary(samples, warmup_minutes=given.warmup_minutes))
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())

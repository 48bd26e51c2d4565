"""How long the proof of a conversion by reference takes, beside a plain read of the dense bytes."""

import functools
import os
import pathlib
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

import folder_speed

if TYPE_CHECKING:
    from upcycle_jax.trees import LeafSpec


def plain_read(folder: pathlib.Path) -> None:
    """Reads every file of a folder once, into one buffer."""
    room = bytearray(1 << 24)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb", buffering=0) as stream:
            while stream.readinto(room):
                pass


def decoded_read(folder: pathlib.Path) -> None:
    """Reads every leaf of a checkpoint once, as arrays."""
    from upcycle_jax.checkpoints import open_checkpoint

    reader = open_checkpoint(folder)
    for name in reader.specs():
        reader.read(name)


def main(folder: pathlib.Path, specs: "dict[str, LeafSpec]", rounds: int) -> None:
    """Measures by turns, in this process, and prints a table.

    Args:
      folder: holds the dense checkpoint, as `dense`.
      specs: of the sparse target.
      rounds: of which medians are shown; one before them is not counted.
    """
    from upcycle_jax import surgery
    from upcycle_jax.checkpoints import open_checkpoint

    dense, sparse = folder / "dense", folder / "proved"
    source = open_checkpoint(dense)
    plan = surgery.make_plan(source.specs(), specs, surgery.Recipe())
    surgery.apply_offline(plan, source, sparse)

    def proof() -> None:
        found = surgery.prove(plan, open_checkpoint(dense), open_checkpoint(sparse))
        if not found.ok:
            raise SystemExit(found.text())

    ways: dict[str, Callable[[], object]] = {
        "plain read": functools.partial(plain_read, dense),
        "decoded read": functools.partial(decoded_read, dense),
        "proof": proof,
    }
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, call in ways.items():
            measured = folder_speed.measured(call)
            found[way] += [measured] if number else []
    stored = sum(path.stat().st_size for path in dense.rglob("*") if path.is_file())
    print(
        f"dense {stored / 2**20:.0f} MiB stored, proof of its conversion by reference, {rounds}"
        f" rounds by turns; load average {os.getloadavg()[0]:.2f}"
    )
    print(f"{'way':<13} {'seconds':>8} {'CPU s':>7} {'/ plain':>8} {'CPU':>6} {'MiB':>6}")
    for way, rows in found.items():
        seconds, cpu, peak = (statistics.median(column) for column in zip(*rows, strict=True))
        ratio, cpu_ratio = (
            statistics.median(
                row[at] / plain[at] for plain, row in zip(found["plain read"], rows, strict=True)
            )
            for at in (0, 1)
        )
        print(
            f"{way:<13} {seconds:>8.3f} {cpu:>7.3f} {ratio:>8.2f} {cpu_ratio:>6.2f} {peak:>6.0f}",
            flush=True,
        )

"""Checks a run before it starts: names, missing and unused settings, divisibility, data, memory,
and T5X lines with their new form.

Example, on a laptop, for a run on 64 devices of 32 GiB:

    python -m upcycle_jax.check --gin_file=models/t5_1_1_base_upcycled.gin \\
        --gin_file=runs/upcycle.gin --devices=64 --device_memory=32

Nothing is computed and nothing is written. The exit code is 0 where the run can start and 1 where
it cannot.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from upcycle_jax.config import command
from upcycle_jax.config.flags import Flags
from upcycle_jax.printing import printable_lines

if TYPE_CHECKING:
    from upcycle_jax.config import Config


MAX_DEVICES = 1 << 16
"""Each is a virtual CPU device here."""


def _add_flags(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("check")
    own.add_argument(
        "--function",
        default="train",
        metavar="NAME",
        help="what the run calls: train (default), evaluate, infer, upcycle",
    )
    own.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="check for N devices instead of those of this machine",
    )
    own.add_argument(
        "--device_memory",
        type=float,
        metavar="GIB",
        help="memory of one device (default: what it says)",
    )
    own.add_argument("--skip_data", action="store_true", help="do not read a batch of the data")


def _check_flags(flags: Flags) -> None:
    devices, memory = flags.extra.devices, flags.extra.device_memory
    if devices is not None and not 1 <= devices <= MAX_DEVICES:
        raise ValueError(
            f"--devices is {devices}: give a number of devices from 1 to {MAX_DEVICES}"
        )
    if memory is not None and not 0 < memory < math.inf:
        raise ValueError(f"--device_memory is {memory}: give the GiB of one device, e.g. 32")


def _run(flags: Flags, loaded: "Config") -> int:
    _check_flags(flags)
    if flags.extra.devices:
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update(
            "jax_num_cpu_devices", flags.extra.devices
        )  # virtual ones: only shapes are looked at
    from upcycle_jax.training import preflight

    found = preflight.check_run(
        loaded,
        function=flags.extra.function,
        device_memory=flags.extra.device_memory,
        read_data=not flags.extra.skip_data,
        elsewhere=bool(flags.extra.devices),
    )
    sys.stdout.write(printable_lines(found.text()))
    return 1 if found.problems else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return command.run(
        "check",
        argv,
        description=__doc__ or "",
        body=_run,
        extra=_add_flags,
        function=lambda flags: flags.extra.function,
    )


if __name__ == "__main__":
    sys.exit(main())

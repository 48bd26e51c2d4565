"""Compiles a run's programs for a TPU topology on a machine without TPUs, and says whether they
fit.

Example:

    python -m upcycle_jax.precompile --gin_file=models/t5_1_1_base_upcycled.gin \\
        --gin_file=runs/pretrain.gin --topology=v5e:4x8 \\
        --gin.BATCH_SIZE=256 --gin.NUM_EXPERT_PARTITIONS=32

The gin files are those of upcycle_jax.train; what only a run needs (MODEL_DIR, data, a checkpoint)
may stay open. It compiles the train step and, where RestoreCheckpointConfig has a recipe, the
programs that make the experts during the restore, and prints memory per device against the chip's,
FLOPs, what each kind of collective sends, and compile times. The exit code is 1 where something
does not fit, with what to change. Needs libtpu: pip install 'upcycle_jax[precompile]'.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from upcycle_jax.config import command, registry
from upcycle_jax.config.flags import Flags

if TYPE_CHECKING:
    from upcycle_jax.config import Config


def _extra(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--topology",
        metavar="v5e:4x8",
        help="generation and shape of the slice (default: the macro TOPOLOGY)",
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print a Markdown table of one row instead"
    )


def _run(flags: Flags, loaded: "Config") -> int:
    from upcycle_jax.config.stand_ins import load_with_stand_ins
    from upcycle_jax.planning import pod_report, topologies
    from upcycle_jax.planning.compilation import Workload

    loaded = load_with_stand_ins(flags, loaded)
    name = flags.extra.topology or (loaded.has_macro("TOPOLOGY") and loaded.macro("TOPOLOGY"))
    if not name:
        raise ValueError("which slice? Give --topology=v5e:4x8, or define TOPOLOGY in a gin file")
    topology = topologies.topology(name)
    run = Workload.of_run(loaded.build("train", train_eval_dataset_cfg=None)())
    command.say_unused(loaded, name="precompile", other_functions=registry.FUNCTIONS)
    work = dataclasses.replace(
        run, partitioner=dataclasses.replace(run.partitioner, devices=topology.devices)
    )
    report = pod_report.build(
        pathlib.PurePath((flags.gin_file or ("flags",))[-1]).stem, topology, work
    )
    sys.stdout.write(pod_report.markdown([report]) if flags.extra.markdown else report.text())
    if flags.extra.markdown and not report.fits:
        sys.stderr.write(report.text())
    return 0 if report.fits else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    from upcycle_jax.planning import topologies

    topologies.prepare_environment()
    return command.run("precompile", argv, description=__doc__ or "", body=_run, extra=_extra)


if __name__ == "__main__":
    sys.exit(main())

"""Runs a study: every combination of settings that a gin file lists, as ordinary `train` and
`upcycle` command lines.

Examples:

    python -m upcycle_jax.sweep --gin_file=sweeps/capacity_factor.gin \\
        --gin.SWEEP_DIR="'runs/capacity_factor'" --num_parallel=2
    python -m upcycle_jax.sweep --gin_file=sweeps/capacity_factor.gin \\
        --gin.SWEEP_DIR="'/shared/study'" --write_jobs=slurm

What several cells start from runs once. Started again, the command skips finished cells and resumes
the others from their checkpoints; two of them in one folder share the work. A cell that fails does
not stop the rest: it is reported at the end with its log's last lines and its command. --dry_run
prints the cells and their commands. Exit code: 0 when every cell is finished, 1 when one failed, 2
for a study that cannot run, 75 when a signal ended it.
"""

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle_jax.config import command
from upcycle_jax.config.flags import Flags
from upcycle_jax.files import write_whole
from upcycle_jax.printing import PrintableFormatter, printable_lines

if TYPE_CHECKING:
    from upcycle_jax.config import Config
    from upcycle_jax.studies.sweep import Cell, Sweep


def _add_flags(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("sweep")
    own.add_argument(
        "--num_parallel",
        type=int,
        default=1,
        metavar="N",
        help="cells to run at a time on this machine (default 1)",
    )
    own.add_argument(
        "--retries",
        type=int,
        default=1,
        metavar="N",
        help="how often a cell that dies is started again (default 1)",
    )
    own.add_argument(
        "--cells",
        action="append",
        default=[],
        metavar="NAME",
        help="run only these cells and what they need; repeat for more",
    )
    own.add_argument(
        "--reuse",
        action="append",
        default=[],
        metavar="DIR",
        help="folder of another sweep whose finished cells are taken over where their command is"
        " the same; repeat for more",
    )
    own.add_argument(
        "--write_jobs",
        choices=("slurm", "xpk"),
        help="write job scripts to SWEEP_DIR/jobs instead of running",
    )
    own.add_argument(
        "--launcher_options",
        default="",
        metavar="OPTIONS",
        help="with --write_jobs: options of scripts/launch/slurm_gpu.sh or gke_xpk.sh",
    )
    own.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="devices that a cell will have, to check its mesh here (default 1)",
    )
    own.add_argument(
        "--skip_check", action="store_true", help="do not build every cell's configuration first"
    )


def _run(flags: Flags, loaded: "Config") -> int:
    environment = dict(
        os.environ
    )  # that of the cells: this process must not take hold of an accelerator that they need
    os.environ["JAX_PLATFORMS"] = "cpu"
    log = logging.getLogger("upcycle_jax")
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)

    sweep: Sweep = loaded.build("Sweep")()
    command.say_unused(loaded, name="sweep")
    cells = _chosen(sweep.cells(), flags.extra.cells)
    if not flags.extra.skip_check:
        _check(cells, flags)
    if flags.dry_run:
        return _show(cells)
    if flags.extra.write_jobs:
        from upcycle_jax.studies import jobs

        paths = jobs.write(
            sweep,
            cells,
            kind=flags.extra.write_jobs,
            options=flags.extra.launcher_options,
            further_flags=_further_flags(flags),
        )
        print(
            "\n".join(
                ["run these in order, each after the jobs of the one before:", *map(str, paths)]
            )
        )
        return 0
    return _run_here(sweep, cells, flags, environment, loaded.operative_text())


def _chosen(cells: "Sequence[Cell]", names: Sequence[str]) -> "list[Cell]":
    """The cells of those names and what they need; all without names."""
    by_name = {cell.name: cell for cell in cells}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(f"--cells names {unknown[0]!r}; the cells are {', '.join(by_name)}")
    wanted = set(names or by_name)
    for cell in reversed(cells):
        if cell.name in wanted:
            wanted.update(cell.needs)
    return [cell for cell in cells if cell.name in wanted]


def _check(cells: "Sequence[Cell]", flags: Flags) -> None:
    """Builds every cell's configuration, so that a misspelt setting stops the study before it
    starts.

    Raises:
      ConfigError: everything that is wrong, with the cell's name.
    """
    import jax

    from upcycle_jax import config
    from upcycle_jax.config.parse import ConfigError
    from upcycle_jax.studies import branching
    from upcycle_jax.studies.sweep import COMMANDS

    if flags.extra.devices:
        jax.config.update("jax_num_cpu_devices", flags.extra.devices)
    problems, saves = [], {}
    for cell in cells:
        if cell.command not in COMMANDS:
            continue
        files, bindings = cell.gin
        try:
            built = config.load(files, bindings, flags.gin_search_paths).build(cell.command)
            if cell.command == "train":
                saves[cell.name] = built.keywords["checkpoint_cfg"].save
        except ConfigError as error:
            problems += [f"cell {cell.name}: {problem}" for problem in error.problems]
        except (ValueError, FileNotFoundError) as error:
            problems.append(f"cell {cell.name}: {error}")
    problems += branching.lost_starts(cells, saves)
    if problems:
        raise ConfigError(problems)


def _show(cells: "Sequence[Cell]") -> int:
    from upcycle_jax.studies import state

    for cell in cells:
        reached = (
            "finished"
            if state.is_finished(cell)
            else f"at step {state.step_reached(cell)} of {cell.end_step}"
        )
        print(
            f"{cell.name}  ({reached}{', needs ' + ', '.join(cell.needs) if cell.needs else ''})\n"
            f"    {cell.command_line()}"
        )
    print(f"{len(cells)} cells, {sum(cell.end_step - cell.start_step for cell in cells)} steps")
    return 0


def _further_flags(flags: Flags) -> list[str]:
    """Flags of this command that every cell needs too."""
    further = [f"--gin_search_paths={path}" for path in flags.gin_search_paths]
    further += [
        f"--seqio_additional_cache_dirs={path}" for path in flags.seqio_additional_cache_dirs
    ]
    return further + ([f"--tfds_data_dir={flags.tfds_data_dir}"] if flags.tfds_data_dir else [])


def _run_here(
    sweep: "Sweep", cells: "Sequence[Cell]", flags: Flags, environment: Mapping[str, str], text: str
) -> int:
    from upcycle_jax.studies import choice, reuse, state
    from upcycle_jax.studies.runner import Runner

    if "://" in sweep.root:
        raise ValueError(
            f"SWEEP_DIR is {sweep.root}: cells run on this machine in a local folder only;"
            " --write_jobs serves buckets"
        )
    runner = Runner(
        sweep,
        cells,
        num_parallel=flags.extra.num_parallel,
        retries=flags.extra.retries,
        environment=environment,
        further_flags=_further_flags(flags),
    )
    state.save_plan(sweep, sweep.cells())
    write_whole(Path(sweep.root) / "config.gin", state.portable(text, sweep.root), shared=True)
    for folder in flags.extra.reuse:
        for name in reuse.take_over(cells, sweep.root, folder):
            print(f"{name}: taken over from {folder}")
    outcome = runner.run()
    print(state.save_table(sweep, sweep.cells()))
    if chosen := choice.save_choices(sweep, sweep.cells(), state.table(sweep.cells())):
        print(f"\n{chosen}")
    for failure in outcome.failures:
        print(f"\n{printable_lines(failure.text())}", file=sys.stderr)
    return outcome.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return command.run("sweep", argv, description=__doc__ or "", body=_run, extra=_add_flags)


if __name__ == "__main__":
    sys.exit(main())

"""A sweep of fake cells in its own process, to be killed: `python fake_sweep.py SWEEP_DIR
NUM_PARALLEL SEED ...`. Not a test module.
"""

import pathlib
import sys

from upcycle_jax.studies import state
from upcycle_jax.studies.runner import Runner
from upcycle_jax.studies.sweep import Stage, Sweep

CELL = pathlib.Path(__file__).with_name("fake_cell.py")


def study(folder, seeds=(0, 1)) -> Sweep:
    """One dense stage, and 2 factors x seeds that start from it."""
    dense = Stage(name="dense", gin_files=["dense.gin"], steps=4)
    varied = Stage(
        name="varied",
        gin_files=["sparse.gin"],
        steps=6,
        start_from="dense",
        axes=["FACTOR", "seed"],
    )
    return Sweep(
        name="study",
        sweep_dir=str(folder),
        stages=[dense, varied],
        axes={"FACTOR": [1.0, 2.5]},
        seeds=list(seeds),
    )


def runner(sweep: Sweep, num_parallel: int = 2, **kwargs) -> Runner:
    """A runner of fake cells."""
    program = (sys.executable, str(CELL))
    return Runner(
        sweep,
        sweep.cells(),
        num_parallel=num_parallel,
        program=program,
        progress_period=0.5,
        **kwargs,
    )


def main() -> int:
    sweep = study(sys.argv[1], [int(seed) for seed in sys.argv[3:]])
    state.save_plan(sweep, sweep.cells())
    outcome = runner(sweep, int(sys.argv[2])).run()
    state.save_table(sweep, sweep.cells())
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())

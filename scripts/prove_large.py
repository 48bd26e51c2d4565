"""Makes a dense T5 1.1 checkpoint of random values, upcycles it, proves it leaf by leaf, and checks
its function; says how long each took and how much memory.

    python scripts/prove_large.py --size xl --folder /data/prove_large

The values are random throughout (a dense XL takes 11 GB of disk); the result refers to the dense
checkpoint's chunks, so that it adds next to nothing where files can be linked. Every stage runs in
a process of its own, whose peak resident memory is the kernel's (VmHWM). A stage that is finished
is not done again: remove the folder to start afresh. Exit status: 0 where everything holds and no
stage takes more than --limit GiB.
"""

import argparse
import pathlib
import re
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np

from upcycle_jax import byte_sizes

if TYPE_CHECKING:
    from upcycle_jax.checkpoints.reader import CheckpointReader
    from upcycle_jax.models.base import Model
    from upcycle_jax.surgery.plan import Plan
    from upcycle_jax.trees import LeafSpec

SIZES = ("tiny", "small", "base", "large", "xl", "xxl")
STAGES = ("make", "upcycle", "prove", "function")


def models(size: str, experts: int) -> "tuple[Model, Model]":
    """The sparse model of a size, and the dense one that it is made of."""
    from upcycle_jax import config

    bindings = [f"NUM_EXPERTS={experts}"]
    sparse = config.load([f"models/t5_1_1_{size}_upcycled.gin"], bindings).macro("MODEL")
    return sparse, sparse.dense


def target_specs(model: "Model") -> "dict[str, LeafSpec]":
    """Leaves of a checkpoint without optimizer state."""
    from upcycle_jax import state_tree

    return state_tree.specs(model.param_specs(), {})


def source_path(folder: pathlib.Path) -> pathlib.Path:
    return folder / "dense" / "checkpoint_1000"


def result_path(folder: pathlib.Path) -> pathlib.Path:
    return folder / "sparse" / "checkpoint_1000"


def make(options: argparse.Namespace) -> bool:
    """Writes the dense checkpoint, chunk by chunk."""
    from upcycle_jax.checkpoints import create_checkpoint

    path = source_path(options.folder)
    if path.exists():
        print(f"{path} is there already")
        return True
    _, dense = models(options.size, options.experts)
    specs = target_specs(dense)
    rng = np.random.default_rng(0)
    with create_checkpoint(path, specs, step=1000, metadata={}, compress=False) as writer:
        for name, spec in specs.items():
            if not spec.shape:
                continue  # The step, which the writer stores itself.
            scale = 1.0 if name.endswith("embedding") else spec.shape[0] ** -0.5
            for index in writer.pieces(name):
                shape = tuple(part.stop - part.start for part in index)
                if name.endswith("/scale"):
                    values = np.ones(shape, np.float32)
                else:
                    values = rng.standard_normal(shape, np.float32) * np.float32(scale)
                writer.write(name, index, values)
        writer.finalize()
    return True


def planned(options: argparse.Namespace) -> "tuple[Plan, CheckpointReader, Model]":
    """The plan with source and sparse model."""
    from upcycle_jax import surgery
    from upcycle_jax.checkpoints import open_checkpoint

    source = open_checkpoint(source_path(options.folder))
    sparse, _ = models(options.size, options.experts)
    plan = surgery.make_plan(source.specs(), target_specs(sparse), surgery.Recipe())
    return plan, source, sparse


def upcycle(options: argparse.Namespace) -> bool:
    """Converts by reference."""
    from upcycle_jax import surgery

    path = result_path(options.folder)
    if path.exists():
        print(f"{path} is there already")
        return True
    plan, source, _ = planned(options)
    surgery.apply_offline(plan, source, path, max_memory=options.max_memory, progress=print)
    return True


def prove(options: argparse.Namespace) -> bool:
    """The leaf proof."""
    from upcycle_jax import surgery
    from upcycle_jax.checkpoints import open_checkpoint

    plan, source, _ = planned(options)
    result = open_checkpoint(result_path(options.folder))
    proof = surgery.prove(plan, source, result, progress=print)
    print(proof.text())
    return proof.ok


def function(options: argparse.Namespace) -> bool:
    """The function check."""
    from upcycle_jax.checkpoints import open_checkpoint
    from upcycle_jax.models.layerwise import LayerwiseModel
    from upcycle_jax.surgery.function_check import check_function
    from upcycle_jax.surgery.probe_batch import ProbeBatch

    plan, source, sparse = planned(options)
    assert isinstance(sparse, LayerwiseModel)
    outcome = check_function(
        plan,
        sparse,
        source,
        open_checkpoint(result_path(options.folder)),
        ProbeBatch.random(sparse),
        max_memory=options.max_memory,
        progress=print,
    )
    print(outcome.text())
    return outcome.ok


def peak_gib() -> float:
    """Peak resident memory of this process."""
    status = pathlib.Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found.group(1)) / 2**20 if found else float("nan")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="xl")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--max_memory", type=byte_sizes.flag, default=2 << 30, help="of arrays")
    parser.add_argument(
        "--limit", type=float, default=8.0, help="GiB of memory that a stage may use"
    )
    parser.add_argument("--stage", choices=STAGES, help="one stage alone, in this process")
    options = parser.parse_args()
    if options.stage is not None:
        begun = time.monotonic()
        ok = globals()[options.stage](options)
        seconds, peak = time.monotonic() - begun, peak_gib()
        held = ok and peak <= options.limit
        print(
            f"{'ok  ' if held else 'FAIL'} {options.size} x {options.experts} experts,"
            f" {options.stage}: {seconds:.1f} s, peak resident memory {peak:.2f} GiB",
            flush=True,
        )
        return 0 if held else 1
    for stage in STAGES:
        if subprocess.run([sys.executable, __file__, *sys.argv[1:], "--stage", stage]).returncode:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

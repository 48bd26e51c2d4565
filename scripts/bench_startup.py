"""Start-up: seconds until `train --help` has answered, and from the start of the process to the
first step of the tiny model.

    python scripts/bench_startup.py                    # with an empty compilation cache python
    scripts/bench_startup.py --compiled         # and again with the programs of the first run

Both are processes of their own; the load average says what else ran. The first step is the first
line of `train/metrics.jsonl`: it includes imports, data, compilation and the step.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

HELP = [sys.executable, "-m", "upcycle_jax.train", "--help"]


def seconds_of_help() -> float:
    """Wall-clock seconds of `train --help`."""
    started = time.monotonic()
    subprocess.run(HELP, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def cpu_seconds() -> float:
    """CPU seconds of all child processes so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds_to_first_step(model_dir: pathlib.Path, compiled: pathlib.Path) -> float:
    """Seconds from the start of a training process to its first reported step."""
    bindings = [
        f"MODEL_DIR='{model_dir}'",
        "TRAIN_STEPS=1",
        "STATS_PERIOD=1",
        "train.train_eval_dataset_cfg=None",
        "EVAL_PERIOD=None",
    ]
    files = ["models/t5_1_1_tiny.gin", "runs/pretrain.gin", "runs/tiny_t5.gin"]
    command = [
        sys.executable,
        "-m",
        "upcycle_jax.train",
        *(f"--gin_file={name}" for name in files),
        *(f"--gin.{b}" for b in bindings),
    ]
    environ = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    started = time.time()
    subprocess.run(command, check=True, env=environ, stderr=subprocess.DEVNULL)
    (row,) = map(json.loads, (model_dir / "train" / "metrics.jsonl").read_text().splitlines())
    return row["wall_time"] - started


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--compiled", action="store_true", help="also with compiled programs at hand"
    )
    repeat = parser.parse_args().compiled
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    print(
        f"train --help               {min(seconds_of_help() for _ in range(3)):6.2f} s (best of"
        " three)"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in ("empty cache", "compiled")[: 1 + repeat]:
            before = cpu_seconds()
            seconds = seconds_to_first_step(
                pathlib.Path(folder, name.replace(" ", "_")), pathlib.Path(folder, "programs")
            )
            used = cpu_seconds() - before
            print(
                f"first step, {name:<14} {seconds:6.2f} s; whole process {used:.1f} CPU s; load"
                f" average {os.getloadavg()[0]:.1f}"
            )


if __name__ == "__main__":
    main()

"""Injects faults into the commands, and says what they did about them.

    python scripts/fault_injection --folder=/tmp/faults              # everything, about an hour
    python scripts/fault_injection --folder=/tmp/faults --only=kills_upcycle --trials=100

Every trial is drawn from --seed. The exit status is 1 where anything was lost, passed in silence,
or ended in a traceback. docs/guarantees.md says what is promised and which of these holds it.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# One compilation serves all trials of a program.
CACHE = "JAX_COMPILATION_CACHE_DIR"

KINDS = {
    "kills_upcycle": ("kills", "upcycle", 100),
    "kills_train": ("kills", "train", 40),
    "damaged_results": ("mutations", "results", 200),
    "damaged_runs": ("mutations", "training", 60),
    "two_writers": ("others", "two_writers", 12),
    "full_disk": ("others", "full_disk", 24),
    "bad_inputs": ("others", "bad_inputs", 10_000),
}
"""Name -> module, function, trials."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", help="where to work (default: a temporary folder)")
    parser.add_argument("--only", choices=sorted(KINDS), action="append", help="default: all")
    parser.add_argument("--trials", type=int, help="default: by kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write every outcome to this file")
    arguments = parser.parse_args()
    folder = pathlib.Path(arguments.folder or tempfile.mkdtemp(prefix="upcycle_faults_"))
    os.environ.setdefault(CACHE, str(folder / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

    import importlib

    import subjects
    from lab import Lab, judged

    lab = Lab(folder.resolve(), arguments.seed)
    made = subjects.make(lab)
    table, outcomes = [], {}
    for kind in arguments.only or KINDS:
        module, function, default = KINDS[kind]
        trials = arguments.trials or default
        print(f"{kind}: at most {trials} trials", flush=True)
        started = time.monotonic()
        run = getattr(importlib.import_module(module), function)
        done = judged(run(lab, made, trials), lambda line: print(line, flush=True))
        outcomes[kind] = [vars(outcome) for outcome in done]
        wrong = sum(bool(outcome.problem) for outcome in done)
        table.append((kind, len(done), wrong, time.monotonic() - started))
    print(f"\n{'fault':<18} {'trials':>7} {'problems':>9} {'seconds':>8}")
    for kind, count, wrong, seconds in table:
        print(f"{kind:<18} {count:>7} {wrong:>9} {seconds:>8.0f}")
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(outcomes, indent=1))
    return 1 if any(wrong for _, _, wrong, _ in table) else 0


if __name__ == "__main__":
    sys.exit(main())

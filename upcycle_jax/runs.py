"""Lists the runs below a folder: state, step, last loss and metrics, age, checkpoints.

Example:

    python -m upcycle_jax.runs quickstart

running: its process is there (on this machine), or it has written something lately (elsewhere).
finished: it reached TRAIN_STEPS. stopped: a signal ended it, its process is gone, or it has been
silent for ten reporting periods and at least ten minutes; the same command goes on. failed: it
ended with an error, which is shown. `loss` is that of the last report, `evaluation` the last cross
entropy.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence

from upcycle_jax.printing import printable, printable_lines


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the list and returns the exit status: 0, or 2 where there is no such folder."""
    parser = argparse.ArgumentParser(
        prog="python -m upcycle_jax.runs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder",
        nargs="?",
        default=".",
        metavar="DIR",
        help="where to look (default: here); a MODEL_DIR is fine too",
    )
    parser.add_argument(
        "--json", action="store_true", help="a JSON list with every field instead of a table"
    )
    arguments = parser.parse_args(argv)

    from upcycle_jax.studies import run_list

    now = time.time()
    try:
        runs = run_list.list_runs(arguments.folder, now=now)
    except FileNotFoundError as error:
        print(f"upcycle_jax.runs: error: {printable_lines(error)}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps([run.as_json(now=now) for run in runs], indent=1))
    elif runs:
        sys.stdout.write(run_list.table(runs, now=now))
    else:
        print(f"no runs below {printable(arguments.folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

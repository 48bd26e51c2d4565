"""What scripts/life.sh asserts, one line each: prints what holds, or says on standard error what
does not and exits with 1.

    python scripts/life_check.py same_losses RUN REFERENCE   every step's loss is equal, bit for bit
    python scripts/life_check.py state RUN STATE             `upcycle_jax.runs` says so
    python scripts/life_check.py restarted RUN PERIOD        the run was started again at a multiple
                                                             of the save period, and finished
    python scripts/life_check.py falls RUN                   the training loss fell
    python scripts/life_check.py proof CHECKPOINT            the conversion's proof holds
    python scripts/life_check.py continued RUN CHECKPOINT    the run begins with its step
    python scripts/life_check.py evaluated FOLDER METRIC     evaluation wrote the metric of every
                                                             task and step
    python scripts/life_check.py interleaved WHOLE PART...   the parts of an inference are the
                                                             whole, each example once
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Callable


class Failed(Exception):
    """Something that should hold does not."""


def rows(path: pathlib.Path) -> list[dict]:
    """JSON lines; one that a kill has torn is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(run: str) -> dict[int, float]:
    """Training loss by step, of a step that was done twice the later one."""
    found = {row["step"]: row["loss"] for row in rows(pathlib.Path(run, "train", "metrics.jsonl"))}
    if not found:
        raise Failed(f"{run} has no training metrics")
    return found


def cached(folder: str) -> str:
    found = {
        path.parent.name: path.parent
        for path in sorted(pathlib.Path(folder).glob("*/manifest.json"))
    }
    sizes = {
        name: sum(file.stat().st_size for file in task.rglob("*") if file.is_file())
        for name, task in found.items()
    }
    if not sizes or not all(size > 2**16 for size in sizes.values()):
        raise Failed(f"{folder} has no whole cache: {sizes}")
    return "cached " + ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for name, size in sizes.items())


def same_losses(run: str, reference: str) -> str:
    mine, wanted = losses(run), losses(reference)
    different = sorted(
        step for step in mine.keys() | wanted.keys() if mine.get(step) != wanted.get(step)
    )
    if different:
        step = different[0]
        raise Failed(
            f"{len(different)} of {len(wanted)} steps differ, first {step}: {mine.get(step)} here,"
            f" {wanted.get(step)} there"
        )
    return (
        f"losses of all {len(wanted)} steps equal those of the run that was never stopped, bit"
        " for bit"
    )


def state(run: str, wanted: str) -> str:
    listed = subprocess.run(
        [sys.executable, "-m", "upcycle_jax.runs", run, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    (found,) = json.loads(listed.stdout)
    if found["state"] != wanted:
        raise Failed(f"{run} is {found['state']} ({found['why']}), not {wanted}")
    return f"listed as {wanted} at step {found['step']}: {found['why']}"


def restarted(run: str, period: str) -> str:
    manifest = json.loads(pathlib.Path(run, "manifest.json").read_text())
    steps = [start["step"] for start in manifest["starts"]]
    if (
        len(steps) < 2
        or steps[-1] == 0
        or steps[-1] % int(period)
        or manifest["status"] != "finished"
    ):
        raise Failed(
            f"started at steps {steps}, status {manifest['status']}: expected a second start at a"
            f" multiple of {period}"
        )
    return f"resumed at step {steps[-1]}, finished at {manifest['step']}"


def falls(run: str) -> str:
    found = losses(run)
    values = [found[step] for step in sorted(found)]
    part = max(len(values) // 10, 1)
    first, last = sum(values[:part]) / part, sum(values[-part:]) / part
    if not last < first:
        raise Failed(f"the training loss went from {first:.3f} to {last:.3f}")
    return f"training loss {first:.3f} -> {last:.3f} over {len(values)} reports"


def proof(checkpoint: str) -> str:
    found = json.loads(pathlib.Path(checkpoint, "proof.json").read_text())
    if not found["ok"] or not found["leaves"]:
        raise Failed(f"{checkpoint}/proof.json does not hold: {str(found)[:300]}")
    return f"all {len(found['leaves'])} leaves of the conversion re-read from disk and proved"


def continued(run: str, checkpoint: str) -> str:
    manifest = json.loads(pathlib.Path(run, "manifest.json").read_text())
    step = int(checkpoint.rpartition("_")[2])
    if manifest["start_step"] != step or not str(manifest["restored_from"]["path"]).endswith(
        f"checkpoint_{step}"
    ):
        raise Failed(f"{run} started at {manifest['start_step']} from {manifest['restored_from']}")
    return f"began at step {step}, at step {manifest['step']} now"


def evaluated(folder: str, metric: str) -> str:
    found = {
        path.parent.name: rows(path)
        for path in sorted(pathlib.Path(folder, "inference_eval").glob("*/metrics.jsonl"))
    }
    values = {
        f"{task} step {row['step']}": row[metric]
        for task, lines in found.items()
        for row in lines
        if metric in row
    }
    if not values:
        raise Failed(f"{folder}/inference_eval has no {metric}: {sorted(found)}")
    return f"{metric} " + ", ".join(f"{value:.2f} ({name})" for name, value in values.items())


def interleaved(whole: str, *parts: str) -> str:
    wanted = pathlib.Path(whole).read_text().splitlines()
    shards = [pathlib.Path(part).read_text().splitlines() for part in parts]
    got = [shards[i % len(shards)][i // len(shards)] for i in range(sum(map(len, shards)))]
    if got != wanted or not wanted:
        raise Failed(
            f"{len(got)} examples in {len(parts)} parts are not the {len(wanted)} of {whole}"
        )
    return f"{len(wanted)} examples in {len(parts)} parts, each once, equal to those of one job"


CHECKS: dict[str, Callable[..., str]] = {
    f.__name__: f
    for f in (
        cached,
        same_losses,
        state,
        restarted,
        falls,
        proof,
        continued,
        evaluated,
        interleaved,
    )
}


def main() -> int:
    """Runs one check."""
    name, *words = sys.argv[1:] or ["--help"]
    if name not in CHECKS:
        print(__doc__)
        return 2
    try:
        print(CHECKS[name](*words))
    except (Failed, OSError, KeyError) as error:
        print(f"FAILED {name}: {error!r}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

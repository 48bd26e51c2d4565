"""A sweep as jobs for a cluster: SLURM arrays, or xpk workloads on GKE. The launchers in `scripts/launch/` do the work."""

import hashlib
import itertools
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from upcycle_jax.experiments import sweeps_state
from upcycle_jax.experiments.sweeps import Cell, Sweep

KINDS = ("slurm", "xpk")
LONGEST_WORKLOAD = 39
GEOMETRY = {"nodes": "1", "gpus_per_node": "8", "time": "24:00:00", "sbatch": ""}

_ARRAY_BODY = """\
#!/usr/bin/env bash
# One element of a job array: runs line number SLURM_ARRAY_TASK_ID (from 0) of the file that is the first argument.
set -euo pipefail
line="$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$1")"
eval "exec bash \\"$UPCYCLE_JAX_LAUNCHERS/slurm_gpu.sh\\" $UPCYCLE_JAX_LAUNCHER_OPTIONS $line"
"""

_SUBMIT_HEAD = """\
#!/usr/bin/env bash
# Submits the sweep {name}: one job array per stage, each after those that it starts from. Run it again after a failure: finished cells
# end at once, the others resume. LAUNCHERS: scripts/launch of the checkout that all nodes see.
set -euo pipefail
here="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
export UPCYCLE_JAX_LAUNCHERS="${{LAUNCHERS:-{launchers}}}" UPCYCLE_JAX_INTERRUPTED_CODE=75
export UPCYCLE_JAX_LAUNCHER_OPTIONS={options}
mkdir -p "$here/../logs"
"""


def write(sweep: Sweep, cells: Sequence[Cell], *, kind: str, options: str = "", folder: Path | None = None) -> list[Path]:
    """Writes the jobs of all cells that are not finished.

    Args:
      sweep: the study.
      cells: its cells.
      kind: 'slurm' or 'xpk'.
      options: words for the launcher (`scripts/launch/slurm_gpu.sh` or `gke_xpk.sh`), before the command's name.
      folder: where to; None for `<sweep_dir>/jobs`, or `./<name>_jobs` where the sweep's folder is a bucket.

    Returns:
      The scripts to run, in order.

    Raises:
      ValueError: an unknown kind, or xpk without the options that it needs.
    """
    if kind not in KINDS:
        raise ValueError(f"there are no jobs of kind {kind!r}: choose one of {', '.join(map(repr, KINDS))}")
    remote = "://" in sweep.root
    todo = [cell for cell in cells if remote or not sweeps_state.is_finished(cell)]
    out = folder if folder is not None else Path(f"{sweep.name}_jobs" if remote else f"{sweep.root}/jobs")
    launchers = Path(__file__).resolve().parents[2] / "scripts" / "launch"
    stages = [(stage, list(group)) for stage, group in itertools.groupby(todo, key=lambda cell: cell.stage)]
    if not remote:
        sweeps_state.save_plan(sweep, cells)
    out.mkdir(parents=True, exist_ok=True)
    writer = _write_slurm if kind == "slurm" else _write_xpk
    return writer(sweep, stages, options, out, launchers)


def _words(cell: Cell) -> str:
    return shlex.join([cell.command, *cell.words])


def _executable(path: Path, text: str) -> Path:
    sweeps_state.write_whole(path, text)
    path.chmod(0o755)
    return path


def _write_slurm(sweep: Sweep, stages: Sequence[tuple[str, list[Cell]]], options: str, out: Path, launchers: Path) -> list[Path]:
    words = shlex.split(options)
    shape = dict(GEOMETRY)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if equals and name in shape:
            shape[name] = value
    rest = shlex.join(word for word in words if word.removeprefix("--").partition("=")[0] not in GEOMETRY)
    _executable(out / "array.sh", _ARRAY_BODY)
    text = _SUBMIT_HEAD.format(name=sweep.name, launchers=launchers, options=shlex.quote(rest))
    submitted: list[str] = []
    for stage, group in stages:
        (out / f"{stage}.txt").write_text("".join(_words(cell) + "\n" for cell in group))
        needs = {name for cell in group for name in cell.needs}
        before = [other for other, members in stages if needs & {cell.name for cell in members} and other in submitted]
        after = f" --dependency=afterok:{':'.join(f'${{{_variable(other)}}}' for other in before)}" if before else ""
        text += (
            f"{_variable(stage)}=$(sbatch --parsable --job-name={sweep.name}.{stage} --array=0-{len(group) - 1} --nodes={shape['nodes']}"
            f" --ntasks-per-node={shape['gpus_per_node']} --gpus-per-node={shape['gpus_per_node']} --time={shape['time']} --requeue"
            f' --open-mode=append --signal=TERM@180 --export=ALL --output="$here/../logs/{stage}_%a.log"{after} {shape["sbatch"]}'.rstrip()
            + f' "$here/array.sh" "$here/{stage}.txt")\necho "{stage}: ${{{_variable(stage)}}}, {len(group)} cells"\n'
        )
        submitted.append(stage)
    return [_executable(out / "submit.sh", text)]


def _variable(stage: str) -> str:
    return "job_" + re.sub(r"\W", "_", stage)


def _write_xpk(sweep: Sweep, stages: Sequence[tuple[str, list[Cell]]], options: str, out: Path, launchers: Path) -> list[Path]:
    if not all(f"--{name}=" in options for name in ("cluster", "type")):
        raise ValueError(f"jobs for xpk need --launcher_options='--cluster=NAME --type=TYPE ...', got {options!r}")
    paths = []
    for number, (stage, group) in enumerate(stages, 1):
        text = (
            f"#!/usr/bin/env bash\n# Sweep {sweep.name}, stage {stage}: one workload per cell. xpk knows no dependencies: run the next file"
            f' when these have finished.\nset -euo pipefail\nlaunchers="${{LAUNCHERS:-{launchers}}}"\n'
        )
        for cell in group:
            text += f'bash "$launchers/gke_xpk.sh" --workload={workload(f"{sweep.name}-{cell.name}")} {options} {_words(cell)}\n'
        paths.append(_executable(out / f"{number}_{stage}.sh", text))
    return paths


def workload(name: str) -> str:
    """A name as Kubernetes takes it: lower case, digits and dashes, at most 39 characters; a cut name ends in its hash.

    >>> workload("study-upcycled-capacity_factor=1.25")
    'study-upcycled-capacity-factor-1-25'
    """
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if len(plain) <= LONGEST_WORKLOAD:
        return plain
    return f"{plain[: LONGEST_WORKLOAD - 7].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"

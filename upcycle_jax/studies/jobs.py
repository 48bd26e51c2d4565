"""A sweep as jobs for a cluster: SLURM arrays, or xpk workloads on GKE. The launchers in
`scripts/launch/` do the work.
"""

import dataclasses
import hashlib
import itertools
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from upcycle_jax.files import write_whole
from upcycle_jax.studies import state
from upcycle_jax.studies.sweep import CACHE, Cell, Sweep

KINDS = ("slurm", "xpk")
LONGEST_WORKLOAD = 39
GEOMETRY = {"nodes": "1", "gpus_per_node": "8", "time": "24:00:00", "sbatch": "", "max_running": ""}
LARGEST_ARRAY = 1000
"""Elements of a job array: what SLURM allows where nobody has set MaxArraySize."""
ONE_PROCESS = (CACHE, "upcycle")
"""Commands that are one process's work."""

_ARRAY_BODY = """\
#!/usr/bin/env bash
# One element of a job array: runs line number SLURM_ARRAY_TASK_ID (from 0) of the file that is the
# first argument.
set -euo pipefail
line="$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$1")"
eval "exec bash \\"$UPCYCLE_JAX_LAUNCHERS/slurm_gpu.sh\\" $UPCYCLE_JAX_LAUNCHER_OPTIONS $line"
"""

_SUBMIT_HEAD = """\
#!/usr/bin/env bash
# Submits the sweep {name}: a job array for the cells that start from the same ones, after those;
# where one of them fails, only the cells that need it are cancelled. Run it again after a failure:
# finished cells end at once, the others resume. LAUNCHERS: scripts/launch of the checkout that all
# nodes see.
set -euo pipefail
here="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
export UPCYCLE_JAX_LAUNCHERS="${{LAUNCHERS:-{launchers}}}" UPCYCLE_JAX_INTERRUPTED_CODE=75
export UPCYCLE_JAX_LAUNCHER_OPTIONS={options}
mkdir -p "$here/../logs"
"""


@dataclasses.dataclass(frozen=True)
class _Array:
    """Cells that wait for the same ones, and so can be one job array.

    Attributes:
      name: of its files and of its job.
      cells: in the order of the lines of `<name>.txt`.
    """

    name: str
    cells: Sequence[Cell]

    @property
    def variable(self) -> str:
        """The shell's variable that holds the number of the submitted array."""
        return "job_" + re.sub(r"\W", "_", self.name)


def write(
    sweep: Sweep,
    cells: Sequence[Cell],
    *,
    kind: str,
    options: str = "",
    further_flags: Sequence[str] = (),
    folder: Path | None = None,
) -> list[Path]:
    """Writes the jobs of all cells that are not finished.

    Args:
      sweep: the study.
      cells: its cells, or some of them with what they need.
      kind: 'slurm' or 'xpk'.
      options: words for the launcher (`scripts/launch/slurm_gpu.sh` or `gke_xpk.sh`), before the
        command's name. For SLURM also `--max_running=N`: elements of an array that run at a time.
      further_flags: of every command, e.g. search paths of gin files.
      folder: where to; None for `<sweep_dir>/jobs`, or `./<name>_jobs` where the sweep's folder is
        a bucket.

    Returns:
      The scripts to run, in order.

    Raises:
      ValueError: an unknown kind, xpk without the options that it needs, or with cells that are one
        machine's work.
    """
    if kind not in KINDS:
        raise ValueError(
            f"there are no jobs of kind {kind!r}: choose one of {', '.join(map(repr, KINDS))}"
        )
    remote = "://" in sweep.root
    todo = [cell for cell in cells if remote or not state.is_finished(cell)]
    out = (
        folder
        if folder is not None
        else Path(f"{sweep.name}_jobs" if remote else f"{sweep.root}/jobs")
    )
    launchers = Path(__file__).resolve().parents[2] / "scripts" / "launch"
    if kind == "xpk":
        _check_xpk(sweep, todo, options)
    if not remote:
        state.save_plan(sweep, sweep.cells())
    out.mkdir(parents=True, exist_ok=True)
    todo = [dataclasses.replace(cell, words=(*cell.words, *further_flags)) for cell in todo]
    writer = _write_slurm if kind == "slurm" else _write_xpk
    return writer(sweep, todo, options, out, launchers)


def _words(cell: Cell) -> str:
    return shlex.join([cell.command, *cell.words])


def _executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    path.chmod(0o755)
    return path


def _arrays(cells: Sequence[Cell]) -> Iterator[_Array]:
    """Cells by stage and by what they need, in pieces that are no larger than an array may be."""
    for stage, members in itertools.groupby(cells, key=lambda cell: cell.stage):
        by_needs: dict[tuple[str, ...], list[Cell]] = {}
        for cell in members:
            by_needs.setdefault(cell.needs, []).append(cell)
        pieces = [
            group[i : i + LARGEST_ARRAY]
            for group in by_needs.values()
            for i in range(0, len(group), LARGEST_ARRAY)
        ]
        for number, piece in enumerate(pieces, 1):
            yield _Array(stage if len(pieces) == 1 else f"{stage}_{number}", piece)


def _write_slurm(
    sweep: Sweep, cells: Sequence[Cell], options: str, out: Path, launchers: Path
) -> list[Path]:
    words = shlex.split(options)
    shape = dict(GEOMETRY)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if equals and name in shape:
            shape[name] = value
    rest = shlex.join(
        word for word in words if word.removeprefix("--").partition("=")[0] not in GEOMETRY
    )
    _executable(out / "array.sh", _ARRAY_BODY)
    text = _SUBMIT_HEAD.format(name=sweep.name, launchers=launchers, options=shlex.quote(rest))
    elements: dict[str, str] = {}
    for array in _arrays(cells):
        (out / f"{array.name}.txt").write_text("".join(_words(cell) + "\n" for cell in array.cells))
        waits = [elements[name] for name in array.cells[0].needs if name in elements]
        after = (
            f" --dependency=afterok:{':'.join(waits)} --kill-on-invalid-dep=yes" if waits else ""
        )
        alone = array.cells[0].command in ONE_PROCESS
        nodes, gpus = ("1", "1") if alone else (shape["nodes"], shape["gpus_per_node"])
        at_a_time = f"%{shape['max_running']}" if shape["max_running"] else ""
        options = (
            f"--job-name={sweep.name}.{array.name} --array=0-{len(array.cells) - 1}{at_a_time}"
            f" --nodes={nodes} --ntasks-per-node={gpus}"
            f" --gpus-per-node={gpus} --time={shape['time']} --requeue --open-mode=append"
            " --signal=TERM@180 --export=ALL"
            f' --output="$here/../logs/{array.name}_%a.log"{after} {shape["sbatch"]}'
        )
        text += (
            f'{array.variable}=$(sbatch --parsable {options.rstrip()} "$here/array.sh"'
            f' "$here/{array.name}.txt")\necho "{array.name}: ${{{array.variable}}},'
            f' {len(array.cells)} cells"\n'
        )
        elements |= {
            cell.name: f"${{{array.variable}}}_{index}" for index, cell in enumerate(array.cells)
        }
    return [_executable(out / "submit.sh", text)]


def _check_xpk(sweep: Sweep, cells: Sequence[Cell], options: str) -> None:
    if not all(f"--{name}=" in options for name in ("cluster", "type")):
        raise ValueError(
            "jobs for xpk need --launcher_options='--cluster=NAME --type=TYPE ...', got"
            f" {options!r}"
        )
    if any(cell.command == CACHE for cell in cells):
        raise ValueError(
            f"Sweep.cached_tasks is {list(sweep.cached_tasks)}, and the hosts of a TPU slice cannot"
            " write one cache together: run upcycle_jax.cache_tasks once, to a folder that all"
            " hosts mount, leave cached_tasks empty, bind USE_CACHED_TASKS = True for every cell"
            " (Sweep.bindings) and give --seqio_additional_cache_dirs=FOLDER"
        )
    converts = next((cell.name for cell in cells if cell.command == "upcycle"), None)
    if converts is not None:
        raise ValueError(
            f"cell {converts!r} converts a checkpoint, which the hosts of a TPU slice cannot do"
            " together: bind RECIPE = '@Recipe()' in the stage that trains, so that it converts"
            " while it restores"
        )


def _write_xpk(
    sweep: Sweep, cells: Sequence[Cell], options: str, out: Path, launchers: Path
) -> list[Path]:
    paths = []
    for number, (stage, group) in enumerate(
        itertools.groupby(cells, key=lambda cell: cell.stage), 1
    ):
        text = (
            f"#!/usr/bin/env bash\n# Sweep {sweep.name}, stage {stage}: one workload per cell. xpk"
            " knows no dependencies: run the next file"
            f' when these have finished.\nset -uo pipefail\nlaunchers="${{LAUNCHERS:-{launchers}}}"'
            " code=0\n"
        )
        for cell in group:
            name = workload(f"{sweep.name}-{cell.name}")
            text += (
                f'bash "$launchers/gke_xpk.sh" --workload={name} {options} {_words(cell)} ||\n'
                f'    {{ code=1; echo "NOT SUBMITTED: {name} ({cell.name})" >&2; }}\n'
            )
        paths.append(_executable(out / f"{number}_{stage}.sh", f"{text}exit $code\n"))
    return paths


def workload(name: str) -> str:
    """A name as Kubernetes takes it: lower case, digits and dashes, at most 39 characters; a cut
    name ends in its hash.

    >>> workload("study-upcycled-capacity_factor=1.25")
    'study-upcycled-capacity-factor-1-25'
    """
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if len(plain) <= LONGEST_WORKLOAD:
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{plain[: LONGEST_WORKLOAD - 7].rstrip('-')}-{digest}"

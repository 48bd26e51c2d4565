"""Sweeps: what cells they consist of, and that running them, killed or not, runs each cell once."""

import importlib.util
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from upcycle_jax import leases
from upcycle_jax.config import load, search
from upcycle_jax.studies import jobs, runner, state
from upcycle_jax.studies.sweep import Stage, Sweep, gin_text

ROOT = pathlib.Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location(
    "fake_sweep", pathlib.Path(__file__).with_name("fake_sweep.py")
)
fake_sweep = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_sweep)

SHIPPED = [
    name for name in search.shipped_files() if name.startswith("sweeps/") and "/parts/" not in name
]
STAGE = {"name": "dense", "gin_files": ["a.gin"], "steps": 3}


# What cells there are.


def test_a_stage_is_multiplied_by_its_axes_and_by_those_of_what_it_starts_from():
    dense = Stage(name="dense", gin_files=["d.gin"], axes=["length"])
    wide = Stage(
        name="wide",
        gin_files=["w.gin"],
        steps=5,
        start_from="dense",
        axes=["NUM_EXPERTS", "seed"],
        bindings={"RECIPE": "@R()"},
    )
    fresh = Stage(name="fresh", gin_files=["w.gin"], steps=5, batches_after="dense")
    axes = {"length": {"short": {"steps": 10}, "long": {"steps": 20}}, "NUM_EXPERTS": [2, 4, 8]}
    sweep = Sweep(name="s", sweep_dir="/x/y/", stages=[dense, wide, fresh], axes=axes, seeds=[0, 7])
    cells = {cell.name: cell for cell in sweep.cells()}
    # dense: 2 lengths; wide: 2 x 3 experts x 2 seeds; fresh: 2 lengths, because its data goes on
    # after them.
    assert len(cells) == 2 + 12 + 2
    cell = cells["wide-length=long-NUM_EXPERTS=4-seed=7"]
    assert (cell.start_step, cell.end_step, cell.needs) == (20, 25, ("dense-length=long",))
    files, bindings = cell.gin
    assert files == ["w.gin"]
    assert bindings == [
        "RECIPE=@R()",
        "NUM_EXPERTS=4",
        "RANDOM_SEED=7",
        "INITIAL_CHECKPOINT_PATH='/x/y/cells/dense-length=long/checkpoint_20'",
        "MODEL_DIR='/x/y/cells/wide-length=long-NUM_EXPERTS=4-seed=7'",
        "TRAIN_STEPS=25",
    ]
    assert (
        "FIRST_BATCH=10" in cells["fresh-length=short"].gin[1]
        and cells["fresh-length=short"].needs == ()
    )
    assert sweep.compared == ["wide", "fresh"]


def test_a_list_of_points_keeps_the_cells_that_agree_with_one():
    stage = Stage(name="a", gin_files=["a.gin"], steps=1, axes=["X", "Y", "seed"])
    points = [{"X": 1, "Y": 10}, {"X": 2}]
    sweep = Sweep(
        name="s",
        sweep_dir="d",
        stages=[stage],
        axes={"X": [1, 2, 3], "Y": [10, 20]},
        seeds=[0, 1],
        points=points,
    )
    names = {cell.name.removeprefix("a-").rpartition("-")[0] for cell in sweep.cells()}
    assert names == {"X=1-Y=10", "X=2-Y=10", "X=2-Y=20"} and len(sweep.cells()) == 6


def test_conversions_are_cells_too():
    dense = Stage(**STAGE)
    convert = Stage(name="convert", gin_files=["c.gin"], command="upcycle", start_from="dense")
    train = Stage(name="train", gin_files=["t.gin"], steps=2, start_from="convert")
    cells = Sweep(name="s", sweep_dir="/r", stages=[dense, convert, train]).cells()
    assert "OUTPUT_CHECKPOINT_PATH='/r/cells/convert/checkpoint_3'" in cells[1].gin[1]
    assert (
        "INITIAL_CHECKPOINT_PATH='/r/cells/convert/checkpoint_3'" in cells[2].gin[1]
        and cells[2].end_step == 5
    )


def test_data_are_cached_once_for_all(tmp_path):
    sweep = Sweep(
        name="s", sweep_dir=str(tmp_path), stages=[Stage(**STAGE)], cached_tasks=["a", "b"]
    )
    cache, dense = sweep.cells()
    words = f"--gin_file=a.gin --tasks=a,b --output_cache_dir={tmp_path}/cache_tasks"
    assert cache.command_line() == f"python -m upcycle_jax.cache_tasks {words}"
    assert dense.needs == ("cache_tasks",)
    assert dense.words[-2:] == (
        "--gin.USE_CACHED_TASKS=True",
        f"--seqio_additional_cache_dirs={tmp_path}/cache_tasks",
    )
    assert not state.is_finished(cache)
    state.mark_finished(cache)
    assert state.is_finished(cache)
    # What the data are is said by bindings of the sweep and of the first stage that trains; the
    # axes do not matter to a cache.
    stage = Stage(**STAGE | {"bindings": {"VOCABULARY": "bytes"}, "axes": ["seed"]})
    own = Sweep(
        name="s",
        sweep_dir="/d",
        stages=[stage],
        cached_tasks=["mine"],
        bindings={"TEXT_FILES": {"own": ["*.txt"]}},
    )
    assert own.cells()[0].words[:4] == (
        "--gin_file=a.gin",
        "--gin.TEXT_FILES={'own': ['*.txt']}",
        "--gin.VOCABULARY='bytes'",
        "--tasks=mine",
    )
    with pytest.raises(ValueError, match="cached_tasks must be a list"):
        Sweep(name="s", sweep_dir="d", stages=[Stage(**STAGE)], cached_tasks="a")


def test_values_become_gin_text():
    assert gin_text({"a": ("@b/C()", "%D"), "e": "f"}) == "{'a': (@b/C(), %D), 'e': 'f'}"
    assert gin_text(("x",)) == "('x',)" and gin_text(None) == "None"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Stage(**STAGE | {"name": "a/b"}), "Stage.name is 'a/b': use letters"),
        (lambda: Stage(**STAGE | {"gin_files": "a.gin"}), "gin_files must be a list"),
        (lambda: Stage(**STAGE | {"command": "eval"}), "'eval': choose one of 'train', 'upcycle'"),
        (lambda: Stage(name="c", gin_files=["a"], command="upcycle"), "it needs start_from"),
        (lambda: Sweep(name="s", sweep_dir="", stages=[Stage(**STAGE)]), "sweep_dir is empty"),
        (lambda: Sweep(name="s", sweep_dir="d", stages=[]), "stages with different names"),
        (
            lambda: Sweep(name="s", sweep_dir="d", stages=[Stage(**STAGE)], seeds=[1, 1]),
            "seeds is \\[1, 1\\]",
        ),
        (
            lambda: Sweep(name="s", sweep_dir="d", stages=[Stage(**STAGE | {"axes": ["E"]})]),
            "names the axis 'E'",
        ),
        (
            lambda: Sweep(name="s", sweep_dir="d", stages=[Stage(**STAGE | {"start_from": "z"})]),
            "start_from of 'dense' is 'z'",
        ),
        (
            lambda: Sweep(name="s", sweep_dir="d", stages=[Stage(**STAGE)], axes={"X": [1, 1]}),
            "give at least one, each once",
        ),
        (
            lambda: Sweep(name="s", sweep_dir="d", stages=[Stage(**STAGE)], axes={"X": {"a": 3}}),
            "has an entry 'a' that must be a dictionary, got 3",
        ),
        (
            lambda: Sweep(
                name="s", sweep_dir="d", stages=[Stage(**STAGE)], axes={"X": [1]}, points=[{"X": 2}]
            ),
            "points names X=2",
        ),
        (
            lambda: Sweep(name="s", sweep_dir="d", stages=[Stage(**STAGE)], baseline="b"),
            "baseline is 'b'",
        ),
        (
            lambda: Sweep(
                name="s", sweep_dir="d", stages=[Stage(**STAGE | {"steps": None})]
            ).cells(),
            "steps = None: set Stage.steps",
        ),
    ],
)
def test_bad_studies_are_one_clear_error(change, message):
    with pytest.raises(ValueError, match=message):
        change()


# Running them.


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "0.02")
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)


def history(cell) -> list[str]:
    path = pathlib.Path(cell.folder) / "history.txt"
    return path.read_text().splitlines() if path.exists() else []


def events(folder, kind):
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


def test_every_cell_runs_once_and_a_second_sweep_runs_none(tmp_path):
    sweep = fake_sweep.study(tmp_path)
    outcome = fake_sweep.runner(sweep).run()
    assert (outcome.exit_code, len(outcome.finished), outcome.failures) == (0, 5, [])
    assert (
        next(event["cell"] for event in events(tmp_path, "start")) == "dense"
        and len(events(tmp_path, "start")) == 5
    )
    assert fake_sweep.runner(sweep).run().exit_code == 0
    assert len(events(tmp_path, "start")) == 5
    for cell in sweep.cells():
        assert history(cell) == [
            f"start at {cell.start_step}",
            *(f"step {n}" for n in range(cell.start_step + 1, cell.end_step + 1)),
        ]


def test_a_failed_cell_is_reported_with_log_and_command_and_the_rest_runs(tmp_path):
    sweep = fake_sweep.study(tmp_path, seeds=(0, 13))
    outcome = fake_sweep.runner(sweep, retries=1).run()
    assert outcome.exit_code == 1 and len(outcome.finished) == 3
    failure = next(
        failure for failure in outcome.failures if failure.cell.labels["FACTOR"] == "2.5"
    )
    text = failure.text()
    assert (
        "FAILED varied-FACTOR=2.5-seed=13: ended with code 1" in text
        and "the loss of step 3 is nan" in text
    )
    assert failure.cell.command_line(sys.executable) in text
    assert (
        sum(event["cell"] == failure.cell.name for event in events(tmp_path, "start")) == 2
    )  # one retry


def test_what_needs_a_failed_cell_is_not_run(tmp_path):
    dense = Stage(name="dense", gin_files=["d.gin"], steps=1, bindings={"RANDOM_SEED": 13})
    after = Stage(name="after", gin_files=["d.gin"], steps=1, start_from="dense")
    outcome = fake_sweep.runner(
        Sweep(name="s", sweep_dir=str(tmp_path), stages=[dense, after]), retries=0
    ).run()
    assert [failure.reason for failure in outcome.failures] == [
        "ended with code 1",
        "not run, because it needs dense, which failed",
    ]
    assert len(events(tmp_path, "start")) == 1


def start_sweep(folder, *seeds, parallel=2, seconds="0.05"):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FAKE_SECONDS": seconds}
    words = [sys.executable, fake_sweep.__file__, str(folder), str(parallel), *map(str, seeds)]
    return subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_killed_half_way_and_restarted_no_cell_runs_twice(tmp_path):
    """SIGKILL of the sweep leaves its cells alive: the next sweep waits for them."""
    sweep = fake_sweep.study(tmp_path)
    cells = sweep.cells()
    first = start_sweep(tmp_path, 0, 1, seconds="0.3")
    wait_for(lambda: len(history(cells[1])) > 2)
    first.kill()
    first.wait()
    left_alive = [cell for cell in cells[1:] if history(cell) and not state.is_finished(cell)]
    assert left_alive, "the sweep was killed too late for this test"
    assert start_sweep(tmp_path, 0, 1).wait(60) == 0
    for cell in cells:  # each step of each cell once, by one process
        assert history(cell) == [
            f"start at {cell.start_step}",
            *(f"step {n}" for n in range(cell.start_step + 1, cell.end_step + 1)),
        ]
    rows = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert [row["cell"] for row in rows] == [cell.name for cell in cells]
    for row, cell in zip(rows, cells, strict=True):  # the table is what the cells' own lines say
        lines = (
            (pathlib.Path(cell.folder) / "training_eval/task/metrics.jsonl")
            .read_text()
            .splitlines()
        )
        last = json.loads(lines[-1])
        assert row["tasks"] == {
            "task": {"cross_ent_loss": last["cross_ent_loss"], "accuracy": last["accuracy"]}
        }
        assert row["step"] == last["step"] == cell.end_step
    # By hand: FACTOR + 1 / (step + seed) at step 4 + 6.
    by_name = {row["cell"]: row["tasks"]["task"]["cross_ent_loss"] for row in rows}
    assert by_name["varied-FACTOR=2.5-seed=1"] == pytest.approx(2.5 + 1 / 11)


def test_two_sweeps_in_one_folder_share_the_work(tmp_path):
    cells = fake_sweep.study(tmp_path).cells()
    both = [start_sweep(tmp_path, 0, 1, parallel=1), start_sweep(tmp_path, 0, 1, parallel=1)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert all(sum(line.startswith("start") for line in history(cell)) == 1 for cell in cells)


def test_sigterm_lets_cells_save_and_the_next_sweep_resumes_them(tmp_path):
    cells = fake_sweep.study(tmp_path).cells()
    process = start_sweep(tmp_path, 0, 1, seconds="0.2")
    wait_for(lambda: len(history(cells[1])) > 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == runner.INTERRUPTED
    assert start_sweep(tmp_path, 0, 1).wait(60) == 0
    lines = history(cells[1])
    assert sum(line.startswith("start") for line in lines) == 2
    steps = [line for line in lines if line.startswith("step")]
    assert steps == [f"step {n}" for n in range(5, 11)]  # nothing was trained twice


def test_a_cell_begun_with_other_settings_is_refused(tmp_path):
    sweep = fake_sweep.study(tmp_path)
    state.save_plan(sweep, sweep.cells())
    pathlib.Path(sweep.cells()[0].folder).mkdir(parents=True)
    other = Sweep(
        name="study",
        sweep_dir=str(tmp_path),
        stages=[Stage(name="dense", gin_files=["dense.gin"], steps=5)],
    )
    with pytest.raises(ValueError, match="was begun with another command line"):
        state.save_plan(other, other.cells())


# Jobs.


def test_slurm_jobs_are_arrays_that_wait_for_what_they_need(tmp_path):
    sweep = fake_sweep.study(tmp_path)
    options = "--nodes=2 --gpus_per_node=4 --retries=3 --sbatch='--partition=gpu --account=me'"
    (script,) = jobs.write(sweep, sweep.cells(), kind="slurm", options=options)
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@" >> "$CALLS"\nwc -l < "$CALLS"\n')
    fake.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{fake.parent}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
    }
    subprocess.run([script], env=environment, check=True, capture_output=True)
    dense, varied = (tmp_path / "calls").read_text().splitlines()
    assert (
        "--array=0-0" in dense
        and "--dependency" not in dense
        and "--nodes=2" in dense
        and "--gpus-per-node=4" in dense
    )
    assert (
        "--array=0-3 " in varied and "--dependency=afterok:1_0 --kill-on-invalid-dep=yes" in varied
    )
    assert "--partition=gpu --account=me" in varied
    lines = (tmp_path / "jobs" / "varied.txt").read_text().splitlines()
    assert len(lines) == 4 and lines[0].startswith("train --gin_file=sparse.gin")
    # An element of the array hands exactly the cell's words to the launcher.
    launcher = tmp_path / "launchers" / "slurm_gpu.sh"
    launcher.parent.mkdir()
    launcher.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    environment = os.environ | {
        "SLURM_ARRAY_TASK_ID": "2",
        "UPCYCLE_JAX_LAUNCHERS": str(launcher.parent),
    }
    body = [tmp_path / "jobs" / "array.sh", tmp_path / "jobs" / "varied.txt"]
    done = subprocess.run(
        body,
        env=environment | {"UPCYCLE_JAX_LAUNCHER_OPTIONS": "--retries=3"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["--retries=3", "train", *sweep.cells()[3].words]


def submitted(tmp_path, sweep, options="", **given):
    """Words of each call of sbatch, which prints 100, 101, ... as job numbers."""
    (script,) = jobs.write(sweep, sweep.cells(), kind="slurm", options=options, **given)
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\nprintf "%s\\t" "$@" >> "$CALLS"\necho >> "$CALLS"\necho $((99 + $(wc -l <'
        ' "$CALLS")))\n'
    )
    fake.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{fake.parent}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
    }
    subprocess.run([script], env=environment, check=True, capture_output=True)
    return [line.split("\t")[:-1] for line in (tmp_path / "calls").read_text().splitlines()]


def test_a_cell_waits_for_its_own_checkpoint_and_not_for_its_neighbours(tmp_path):
    """Two lengths of dense pre-training: should one fail, what starts from the other runs."""
    dense = Stage(name="dense", gin_files=["d.gin"], axes=["length"])
    wide = Stage(name="wide", gin_files=["w.gin"], steps=5, start_from="dense", axes=["seed"])
    axes = {"length": {"short": {"steps": 10}, "long": {"steps": 20}}}
    sweep = Sweep(
        name="s",
        sweep_dir=str(tmp_path / "it's a study"),
        stages=[dense, wide],
        axes=axes,
        seeds=[0, 1],
        cached_tasks=["a"],
    )
    calls = submitted(
        tmp_path,
        sweep,
        "--nodes=2 --max_running=8",
        further_flags=["--gin_search_paths=/my configs"],
    )
    names = [
        next(word.split(".")[1] for word in call if word.startswith("--job-name")) for call in calls
    ]
    assert names == ["cache_tasks", "dense", "wide_1", "wide_2"]
    waits = [
        next(
            (word.removeprefix("--dependency=afterok:") for word in call if "dependency" in word),
            None,
        )
        for call in calls
    ]
    assert waits == [None, "100_0", "101_0:100_0", "101_1:100_0"]
    # One process writes the cache; the others have the geometry that was asked for.
    assert [
        (word in calls[0]) for word in ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1")
    ] == [True] * 3
    assert {"--nodes=2", "--ntasks-per-node=8", "--array=0-1%8"} <= set(calls[1])
    lines = pathlib.Path(calls[2][-1]).read_text().splitlines()
    assert [shlex.split(line) for line in lines] == [
        ["train", *cell.words, "--gin_search_paths=/my configs"] for cell in sweep.cells()[3:5]
    ]


def test_arrays_are_no_longer_than_slurm_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "LARGEST_ARRAY", 2)
    stages = [
        Stage(**STAGE | {"axes": ["seed"]}),
        Stage(name="next", gin_files=["a.gin"], steps=1, start_from="dense"),
    ]
    calls = submitted(
        tmp_path, Sweep(name="s", sweep_dir=str(tmp_path), stages=stages, seeds=[0, 1, 2])
    )
    assert [word for call in calls[:2] for word in call if word.startswith("--array")] == [
        "--array=0-1",
        "--array=0-0",
    ]
    assert [word for call in calls[2:] for word in call if "dependency" in word] == [
        f"--dependency=afterok:{n}" for n in ("100_0", "100_1", "101_0")
    ]


def test_jobs_of_some_cells_leave_the_plan_of_all(tmp_path):
    sweep = fake_sweep.study(tmp_path)
    jobs.write(sweep, sweep.cells()[:2], kind="slurm")
    assert len(json.loads((tmp_path / "sweep.json").read_text())["cells"]) == 5


def test_one_machines_work_is_no_job_of_a_tpu_slice(tmp_path):
    options = "--cluster=c --type=v5litepod-16"
    cached = Sweep(name="s", sweep_dir="gs://b/s", stages=[Stage(**STAGE)], cached_tasks=["a"])
    with pytest.raises(
        ValueError, match=r"cached_tasks is \['a'\].*run upcycle_jax.cache_tasks once"
    ):
        jobs.write(cached, cached.cells(), kind="xpk", options=options, folder=tmp_path / "jobs")
    convert = Stage(name="convert", gin_files=["c.gin"], command="upcycle", start_from="dense")
    offline = Sweep(name="s", sweep_dir="gs://b/s", stages=[Stage(**STAGE), convert])
    with pytest.raises(ValueError, match="cell 'convert' converts a checkpoint.*bind RECIPE"):
        jobs.write(offline, offline.cells(), kind="xpk", options=options, folder=tmp_path / "jobs")
    assert not (tmp_path / "jobs").exists()


def test_xpk_jobs_are_one_script_per_stage(tmp_path):
    sweep = fake_sweep.study("gs://bucket/study")
    paths = jobs.write(
        sweep, sweep.cells(), kind="xpk", options="--cluster=c --type=v5litepod-16", folder=tmp_path
    )
    assert [path.name for path in paths] == ["1_dense.sh", "2_varied.sh"]
    environment = os.environ | {"LAUNCHERS": str(tmp_path)}
    (tmp_path / "gke_xpk.sh").write_text('#!/bin/bash\necho "$1 $2 $3 $4"\n')
    done = subprocess.run([paths[1]], env=environment, check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert (
        lines[0] == "--workload=study-varied-factor-1-seed-0 --cluster=c --type=v5litepod-16 train"
        and len(lines) == 4
    )
    # One that cannot be submitted does not stop the rest, and the script says so at its end.
    (tmp_path / "gke_xpk.sh").write_text('#!/bin/bash\n[[ "$1" != *2-5-seed-0 ]] && echo "$1"\n')
    done = subprocess.run([paths[1]], env=environment, check=False, capture_output=True, text=True)
    assert (done.returncode, len(done.stdout.splitlines())) == (1, 3)
    assert (
        done.stderr == "NOT SUBMITTED: study-varied-factor-2-5-seed-0 (varied-FACTOR=2.5-seed=0)\n"
    )
    with pytest.raises(ValueError, match="need --launcher_options"):
        jobs.write(sweep, sweep.cells(), kind="xpk", folder=tmp_path)


def test_workload_names_are_short_and_different():
    names = {
        jobs.workload(f"capacity_factor-upcycled-capacity_factor=1.25-seed={seed}")
        for seed in range(3)
    }
    assert len(names) == 3 and all(len(name) <= jobs.LONGEST_WORKLOAD for name in names)


# Shipped studies.


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sweeps_name_cells_that_can_be_built(name):
    sweep = load([name], ["SWEEP_DIR='/x'"]).build("Sweep")()
    cells = sweep.cells()
    assert (
        sweep.name == pathlib.PurePosixPath(name).stem
        and sweep.title
        and sweep.baseline in sweep.compared
    )
    assert f"| `{sweep.name}.gin` |" in (ROOT / "docs" / "experiments.md").read_text()
    for cell in cells:
        files, bindings = cell.gin
        loaded = load(files, bindings)
        loaded.build(cell.command)
        idle = [
            line for line in loaded.unused() if line.startswith("--gin.") and "EXPERT" not in line
        ]
        assert not idle, f"{cell.name}: nothing uses {idle}"


def test_the_study_in_the_documentation_can_be_built(tmp_path):
    text = (ROOT / "docs" / "experiments.md").read_text()
    block = text.split("## Your own")[1].split("* An axis")[0]
    (tmp_path / "mine.gin").write_text(textwrap.dedent(block.strip("\n")))
    sweep = load([str(tmp_path / "mine.gin")], ["SWEEP_DIR='/x'"]).build("Sweep")()
    cells = sweep.cells()
    assert (
        len(cells) == 1 + 2 + 2 * 2 * 2 * 2
    )  # dense, its continuation per seed, experts x rates x budgets x seeds
    for cell in cells:
        files, bindings = cell.gin
        load(files, bindings).build(cell.command)
    assert {cell.end_step - cell.start_step for cell in cells if cell.stage == "upcycled"} == {
        100,
        400,
    }


def test_a_cell_that_trains_elsewhere_is_waited_for(tmp_path):
    """On another machine, whose lock is not seen here; a lease that ended long ago is none."""
    dense, *_ = fake_sweep.study(tmp_path).cells()
    lease = pathlib.Path(dense.folder) / leases.TRAINING_LEASE
    assert not runner._trains_elsewhere(dense)
    lease.parent.mkdir(parents=True)
    lease.write_text(json.dumps({"host": "elsewhere", "pid": 1, "start_ticks": 1}))
    assert runner._trains_elsewhere(dense)
    os.utime(lease, (time.time() - 90, time.time() - 90))
    assert not runner._trains_elsewhere(dense)

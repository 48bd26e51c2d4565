"""Job scripts of a study, for SLURM and xpk."""

import importlib.util
import json
import os
import pathlib
import shlex
import subprocess

import pytest

from upcycle_jax.studies import jobs
from upcycle_jax.studies.sweep import Stage, Sweep

_spec = importlib.util.spec_from_file_location(
    "fake_sweep", pathlib.Path(__file__).with_name("fake_sweep.py")
)


fake_sweep = importlib.util.module_from_spec(_spec)


_spec.loader.exec_module(fake_sweep)


STAGE = {"name": "dense", "gin_files": ["a.gin"], "steps": 3}


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

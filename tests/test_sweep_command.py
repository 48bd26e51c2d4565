"""The sweep command, on shipped files; slow tests train, are killed, and train on."""

import collections
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from upcycle_jax.config import load
from upcycle_jax.studies.run_results import read_rows
from upcycle_jax.sweep import main

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILE = "--gin_file=sweeps/capacity_factor.gin"
FEW = ["--gin.SEEDS=[0]", "--gin.DENSE_STEPS=4", "--gin.EXTRA_STEPS=4", "--gin.SCRATCH_STEPS=4"]


def test_dry_run_prints_cells_with_their_commands_and_writes_nothing(tmp_path, capsys):
    assert main([FILE, f"--gin.SWEEP_DIR='{tmp_path}/s'", *FEW, "--skip_check", "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "dense  (at step 0 of 4)"
    assert lines[1].startswith(
        "    python -m upcycle_jax.train --gin_file=models/t5_1_1_tiny.gin"
    ) and lines[1].endswith("--gin.TRAIN_STEPS=4")
    assert "upcycled-capacity_factor=1.25-seed=0  (at step 4 of 8, needs dense)" in lines
    assert lines[-1] == "7 cells, 28 steps" and not (tmp_path / "s").exists()


def test_only_the_named_cells_and_what_they_need(tmp_path, capsys):
    words = [FILE, f"--gin.SWEEP_DIR='{tmp_path}'", *FEW, "--skip_check", "--dry_run"]
    assert main([*words, "--cells=upcycled-capacity_factor=4-seed=0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 cells, 8 steps"
    assert main([*words, "--cells=upcycled"]) == 2
    assert "--cells names 'upcycled'; the cells are dense, " in capsys.readouterr().err


def test_a_misspelt_setting_of_a_cell_stops_the_study_before_it_starts(tmp_path, capsys):
    bindings = "--gin.CELL_BINDINGS={'BATCHSIZE': 8}"
    assert main([FILE, f"--gin.SWEEP_DIR='{tmp_path}/s'", *FEW, bindings, "--cells=dense"]) == 2
    assert "cell dense:" in (message := capsys.readouterr().err) and "BATCH_SIZE" in message
    assert not (tmp_path / "s").exists()


def test_a_bucket_is_for_jobs_only(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [FILE, "--gin.SWEEP_DIR='gs://bucket/study'", *FEW, "--skip_check"]
    assert main(words) == 2
    assert "--write_jobs serves buckets" in capsys.readouterr().err
    assert (
        main([*words, "--write_jobs=xpk", "--launcher_options=--cluster=c --type=v5litepod-16"])
        == 0
    )
    assert sorted(path.name for path in tmp_path.glob("capacity_factor_jobs/*")) == [
        "1_dense.sh",
        "2_dense_continued.sh",
        "3_upcycled.sh",
        "4_moe_from_scratch.sh",
    ]


@pytest.mark.slow
def test_a_real_study_killed_half_way_runs_no_cell_twice(tmp_path):
    """Real runs: SIGKILL while the continuations train, then the same command. No step is done
    twice, the table is what the cells say.
    """
    folder = tmp_path / "study"
    small = (
        "{'T5Config.emb_dim': 16, 'T5Config.mlp_dim': 16, 'BATCH_SIZE': 8, 'EVAL_STEPS': 1,"
        " 'EVAL_PERIOD': 5, 'STATS_PERIOD': 1}"
    )
    words = [
        sys.executable,
        "-m",
        "upcycle_jax.sweep",
        FILE,
        f"--gin.SWEEP_DIR='{folder}'",
        "--num_parallel=2",
        "--skip_check",
    ]
    words += [
        "--gin.SEEDS=[0]",
        "--gin.DENSE_STEPS=5",
        "--gin.EXTRA_STEPS=40",
        f"--gin.CELL_BINDINGS={small}",
    ]
    words += ["--cells=dense_continued-seed=0", "--cells=upcycled-capacity_factor=1-seed=0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    first = subprocess.Popen(
        words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics = folder / "cells" / "dense_continued-seed=0" / "train" / "metrics.jsonl"
    end = time.monotonic() + 500
    while not metrics.exists() or not metrics.read_text():
        assert time.monotonic() < end and first.poll() is None, (folder / "logs").exists()
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert (
        subprocess.run(words, env=environment, check=False, stdout=subprocess.DEVNULL).returncode
        == 0
    )
    rows = [json.loads(line) for line in (folder / "table.jsonl").read_text().splitlines()]
    assert [row["cell"] for row in rows] == [
        "dense",
        "dense_continued-seed=0",
        "upcycled-capacity_factor=1-seed=0",
    ]
    for row in rows:
        cell = folder / "cells" / row["cell"]
        steps = [
            json.loads(line)["step"]
            for line in (cell / "train" / "metrics.jsonl").read_text().splitlines()
        ]
        assert len(steps) == len(set(steps)) and steps[-1] == row["step"]
        assert len(json.loads((cell / "manifest.json").read_text())["starts"]) == 1
        for task, values in row["tasks"].items():
            last = json.loads(
                (cell / "training_eval" / task / "metrics.jsonl").read_text().splitlines()[-1]
            )
            assert values == {name: last[name] for name in values} and last["step"] == row["step"]


def wait_for(condition, sweep):
    end = time.monotonic() + 500
    while not condition():
        assert time.monotonic() < end and sweep.poll() is None, "it did not happen"
        time.sleep(0.02)


def kill_with_cells(sweep):
    """SIGKILL of the sweep and of the processes of its cells."""
    cells = [
        int(pid)
        for pid in pathlib.Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children").read_text().split()
    ]
    for pid in (sweep.pid, *cells):
        os.kill(pid, signal.SIGKILL)
    sweep.wait()


@pytest.mark.slow
def test_a_study_over_cached_data_goes_on_after_sigkill_of_everything(tmp_path):
    """From nothing: killed while the data are cached, killed again while the continuations train,
    then finished.
    """
    folder = tmp_path / "study"
    (tmp_path / "text").mkdir()
    for number in range(300):
        (tmp_path / "text" / f"{number}.txt").write_text(
            " ".join(f"word{number * i % 97} and some more of it." for i in range(60))
        )
    study = """
        include 'sweeps/parts/study.gin'
        Sweep.name = 'cached'
        Sweep.cached_tasks = ['mine']
        Sweep.stages = [@dense/Stage(), @dense_continued/Stage(), @upcycled/Stage()]
    """
    (tmp_path / "cached.gin").write_text(textwrap.dedent(study))
    small = {
        "T5Config.emb_dim": 16,
        "T5Config.mlp_dim": 16,
        "BATCH_SIZE": 8,
        "EVAL_STEPS": 1,
        "EVAL_PERIOD": 10,
        "STATS_PERIOD": 1,
    }
    small |= {
        "SAVING_PERIOD": 5,
        "MIXTURE_OR_TASK_NAME": "mine",
        "VOCABULARY": "bytes",
        "TEXT_FILES": {"own": [f"{tmp_path}/text/*.txt"]},
    }
    words = [
        sys.executable,
        "-m",
        "upcycle_jax.sweep",
        f"--gin_file={tmp_path}/cached.gin",
        f"--gin.SWEEP_DIR='{folder}'",
    ]
    words += [
        "--gin.SEEDS=[0]",
        "--gin.DENSE_STEPS=5",
        "--gin.EXTRA_STEPS=60",
        f"--gin.CELL_BINDINGS={small}",
    ]
    words += ["--num_parallel=2", "--skip_check"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}

    def start():
        return subprocess.Popen(
            words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def starts():
        path = folder / "events.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if row["event"] == "start"]

    first = start()
    wait_for(lambda: list(folder.glob("cache_tasks/*")), first)
    kill_with_cells(first)
    assert [row["cell"] for row in starts()] == ["cache_tasks"] and not (folder / "cells").exists()
    second = start()
    saved = folder / "cells" / "dense_continued-seed=0" / "checkpoint_10"
    wait_for(saved.exists, second)
    kill_with_cells(second)
    assert (
        subprocess.run(words, env=environment, check=False, stdout=subprocess.DEVNULL).returncode
        == 0
    )

    counts = collections.Counter(row["cell"] for row in starts())
    assert counts["cache_tasks"] == 2 and counts["dense"] == 1
    resumed = [row for row in starts() if row["cell"] == "dense_continued-seed=0"]
    assert len(resumed) == 2 and resumed[0]["from_step"] == 5 and resumed[1]["from_step"] >= 10
    assert (
        json.loads((saved.parent / "manifest.json").read_text())["starts"][1]["step"] >= 10
    )  # not from its beginning
    rows = {
        row["cell"]: row
        for row in map(json.loads, (folder / "table.jsonl").read_text().splitlines())
    }
    assert list(rows) == ["dense", "dense_continued-seed=0", "upcycled-seed=0"]
    for name, row in rows.items():
        last = {
            task: read_rows(folder / "cells" / name / "training_eval" / task / "metrics.jsonl")[-1]
            for task in row["tasks"]
        }
        assert list(last) == ["mine_own"] and last["mine_own"]["step"] == row["step"] == (
            5 if name == "dense" else 65
        )
        assert row["tasks"] == {
            "mine_own": {
                metric: last["mine_own"][metric] for metric in ("cross_ent_loss", "accuracy")
            }
        }
        assert f"{folder}/cache_tasks" in (folder / "logs" / f"{name}.log").read_text()
    done = len(starts())
    assert (
        subprocess.run(words, env=environment, check=False, stdout=subprocess.DEVNULL).returncode
        == 0
        and len(starts()) == done
    )


def test_the_quickstart_with_seeds_trains_what_the_quickstart_does():
    text = (ROOT / "scripts" / "quickstart.sh").read_text().split("if [")[0]
    steps = {name: int(n) for name, n in re.findall(r"(dense|extra|scratch)_steps=(\d+)", text)}
    cells = load(["sweeps/quickstart.gin"], ["SWEEP_DIR='/x'"]).build("Sweep")().cells()
    done = {cell.stage: cell.end_step - cell.start_step for cell in cells}
    assert done == {
        "cache_tasks": 0,
        "dense": steps["dense"],
        "dense_continued": steps["extra"],
        "upcycled": steps["extra"],
        "moe_from_scratch": steps["scratch"],
    }

"""The sweep command, on shipped files; one test trains, is killed, and trains on."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from upcycle_jax.sweep import main

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILE = "--gin_file=sweeps/capacity_factor.gin"
FEW = ["--gin.SEEDS=[0]", "--gin.DENSE_STEPS=4", "--gin.EXTRA_STEPS=4", "--gin.SCRATCH_STEPS=4"]


def test_dry_run_prints_cells_with_their_commands_and_writes_nothing(tmp_path, capsys):
    assert main([FILE, f"--gin.SWEEP_DIR='{tmp_path}/s'", *FEW, "--skip_check", "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "dense  (at step 0 of 4)"
    assert lines[1].startswith("    python -m upcycle_jax.train --gin_file=models/t5_1_1_tiny.gin") and lines[1].endswith(
        "--gin.TRAIN_STEPS=4"
    )
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
    assert main([*words, "--write_jobs=xpk", "--launcher_options=--cluster=c --type=v5litepod-16"]) == 0
    assert sorted(path.name for path in tmp_path.glob("capacity_factor_jobs/*")) == [
        "1_dense.sh",
        "2_dense_continued.sh",
        "3_upcycled.sh",
        "4_moe_from_scratch.sh",
    ]


@pytest.mark.slow
def test_a_real_study_killed_half_way_runs_no_cell_twice(tmp_path):
    """Real runs: SIGKILL while the continuations train, then the same command. No step is done twice, the table is what the cells say."""
    folder = tmp_path / "study"
    small = "{'T5Config.emb_dim': 16, 'T5Config.mlp_dim': 16, 'BATCH_SIZE': 8, 'EVAL_STEPS': 1, 'EVAL_PERIOD': 5, 'STATS_PERIOD': 1}"
    words = [sys.executable, "-m", "upcycle_jax.sweep", FILE, f"--gin.SWEEP_DIR='{folder}'", "--num_parallel=2", "--skip_check"]
    words += ["--gin.SEEDS=[0]", "--gin.DENSE_STEPS=5", "--gin.EXTRA_STEPS=40", f"--gin.CELL_BINDINGS={small}"]
    words += ["--cells=dense_continued-seed=0", "--cells=upcycled-capacity_factor=1-seed=0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    first = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = folder / "cells" / "dense_continued-seed=0" / "train" / "metrics.jsonl"
    end = time.monotonic() + 500
    while not metrics.exists() or not metrics.read_text():
        assert time.monotonic() < end and first.poll() is None, (folder / "logs").exists()
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert subprocess.run(words, env=environment, check=False, stdout=subprocess.DEVNULL).returncode == 0
    rows = [json.loads(line) for line in (folder / "table.jsonl").read_text().splitlines()]
    assert [row["cell"] for row in rows] == ["dense", "dense_continued-seed=0", "upcycled-capacity_factor=1-seed=0"]
    for row in rows:
        cell = folder / "cells" / row["cell"]
        steps = [json.loads(line)["step"] for line in (cell / "train" / "metrics.jsonl").read_text().splitlines()]
        assert len(steps) == len(set(steps)) and steps[-1] == row["step"]
        assert len(json.loads((cell / "manifest.json").read_text())["starts"]) == 1
        for task, values in row["tasks"].items():
            last = json.loads((cell / "training_eval" / task / "metrics.jsonl").read_text().splitlines()[-1])
            assert values == {name: last[name] for name in values} and last["step"] == row["step"]

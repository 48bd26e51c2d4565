"""A run of two processes gives the losses of one, saves once, and resumes."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

RUN = pathlib.Path(__file__).with_name("two_processes_run.py")


def run(model_dir, *, processes, devices, steps):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(RUN.parents[2]), os.environ.get("PYTHONPATH", "")])
    }
    commands = [
        [
            sys.executable,
            str(RUN),
            str(port),
            str(processes),
            str(i),
            str(devices),
            str(model_dir),
            str(steps),
        ]
        for i in range(processes)
    ]
    started = [
        subprocess.Popen(
            c, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for c in commands
    ]
    outputs = [process.communicate(timeout=600)[0] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(outputs)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_equal_one_and_resume(tmp_path):
    run(tmp_path / "one", processes=1, devices=4, steps=6)
    run(tmp_path / "two", processes=2, devices=2, steps=3)
    run(tmp_path / "two", processes=2, devices=2, steps=6)
    for name in ("train", "training_eval/bags_a", "training_eval/bags_b"):
        one, two = rows(tmp_path / "one" / name), rows(tmp_path / "two" / name)
        steps = sorted({row["step"] for row in one})
        by_step = {row["step"]: row["loss"] for row in two}
        np.testing.assert_allclose(
            [row["loss"] for row in one], [by_step[step] for step in steps], rtol=1e-5
        )
    assert len(rows(tmp_path / "two" / "train")) == 6  # one process writes
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert manifest["starts"][1]["step"] == 3 and manifest["starts"][1]["devices"]["processes"] == 2

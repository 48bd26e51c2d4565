"""kill -9 in the middle of a run: the next start loses at most one save period and ends with the
same bits.
"""

import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from upcycle_jax.checkpoints import open_checkpoint

RUN = pathlib.Path(__file__).with_name("killed_run.py")
STEPS, PERIOD = 14, 3


@pytest.fixture(scope="module")
def killed_run():
    spec = importlib.util.spec_from_file_location("killed_run", RUN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(model_dir, tmp_path):
    """A process that is slow enough to be killed where it should be."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(RUN.parents[2]), os.environ.get("PYTHONPATH", "")]),
        "JAX_COMPILATION_CACHE_DIR": str(
            jax.config.jax_compilation_cache_dir or tmp_path / "compiled"
        ),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, str(RUN), str(model_dir), str(STEPS), "0.2"]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def losses(model_dir):
    """The loss of every step as last written; a line torn by the kill is left out."""
    out = {}
    for line in (model_dir / "train" / "metrics.jsonl").read_text().splitlines():
        if line.endswith("}"):
            row = json.loads(line)
            out[row["step"]] = row["loss"]
    return out


def wait_for_step(process, model_dir, step):
    deadline = time.monotonic() + 300
    while (
        not (model_dir / "train" / "metrics.jsonl").exists()
        or max(losses(model_dir), default=0) < step
    ):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("kills", [(5,), pytest.param((5, 9), marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_the_uninterrupted_run(killed_run, tmp_path, kills):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed_run.main(whole, STEPS)
    for step in kills:
        process = run(killed, tmp_path)
        wait_for_step(process, killed, step)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    killed_run.main(killed, STEPS)
    assert losses(killed) == losses(whole) and len(losses(whole)) == STEPS
    readers = [open_checkpoint(folder / f"checkpoint_{STEPS}") for folder in (whole, killed)]
    for name in readers[0].specs():
        np.testing.assert_array_equal(readers[0].read(name), readers[1].read(name), err_msg=name)
    manifest = json.loads((killed / "manifest.json").read_text())
    started = [entry["step"] for entry in manifest["starts"]]
    assert len(started) == 1 + len(kills) and started[0] == 0
    for begun, step in zip(started[1:], kills, strict=True):
        assert begun >= step - PERIOD - 1
    assert all(step % PERIOD == 0 for step in started)
    assert re.fullmatch("finished", manifest["status"])

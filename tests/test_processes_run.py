"""Real runs of two processes with four devices each, through the launcher: train, save, kill one
process, restart both, resume.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS = 24
FAMILIES = {
    "t5": [
        "--gin_file=models/t5_1_1_tiny_upcycled.gin",
        "--gin_file=runs/pretrain.gin",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16}",
    ],
    "language_model": [
        "--gin_file=models/tiny_lm_upcycled.gin",
        "--gin_file=runs/pretrain_lm.gin",
        "--gin.TASK_FEATURE_LENGTHS={'targets': 32}",
        "--gin.WARMUP_STEPS=4",
        "--gin.FSDP=True",
    ],
}


def command(family: str, model_dir: pathlib.Path, text: pathlib.Path, *, retries: int) -> list[str]:
    """A tiny model with eight experts over four expert partitions, on a 2 x 4 mesh over both
    processes.
    """
    return [
        str(ROOT / "scripts" / "launch" / "local.sh"),
        "--processes=2",
        "--devices=4",
        f"--retries={retries}",
        "--grace=3",
        "train",
        *FAMILIES[family],
        "--gin.NUM_EXPERTS=8",
        "--gin.NUM_EXPERT_PARTITIONS=4",
        "--gin.GROUP_SIZE=32",
        "--gin.MIXTURE_OR_TASK_NAME='lines'",
        f"--gin.TEXT_FILES={[str(text)]!r}",
        f"--gin.MODEL_DIR={str(model_dir)!r}",
        "--gin.BATCH_SIZE=16",
        f"--gin.TRAIN_STEPS={STEPS}",
        "--gin.SAVING_PERIOD=4",
        "--gin.STATS_PERIOD=1",
        "--gin.EVAL_PERIOD=None",
        "--gin.EVAL_STEPS=1",
    ]


def losses(model_dir: pathlib.Path) -> dict[int, float]:
    """Loss by step; of a step that was done twice, the later one."""
    lines = (model_dir / "train" / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def process_ids(model_dir: pathlib.Path, index: int) -> list[int]:
    """Ids of the Python processes of this run with that index."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        ours = (
            f"--gin.MODEL_DIR={str(model_dir)!r}" in words and f"--process_index={index}" in words
        )
        if ours and "python" in pathlib.PurePath(words[0]).name:
            found.append(int(folder.name))
    return found


@pytest.mark.slow
@pytest.mark.timeout(2400)  # four starts of two processes; each has a limit of its own
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.skipif(
    not pathlib.Path("/proc/self/cmdline").exists(),
    reason="finds the process to kill through /proc, which this system lacks",
)
def test_killing_one_of_two_processes_loses_nothing(family, tmp_path):
    text = tmp_path / "lines.txt"
    text.write_text(
        "\n".join(
            f"line {i} says that {i * i} is the square of {i}, and {i + 1} follows it"
            for i in range(400)
        )
    )
    environ = {
        **os.environ,
        "PYTHON": sys.executable,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
    }

    whole = subprocess.run(
        command(family, tmp_path / "whole", text, retries=0),
        env=environ,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert whole.returncode == 0, whole.stdout[-4000:] + whole.stderr[-2000:]
    expected = losses(tmp_path / "whole")
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert expected[STEPS] < expected[1]

    with subprocess.Popen(
        command(family, tmp_path / "cut", text, retries=2),
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as cut:
        try:
            deadline = time.monotonic() + 600
            while not (tmp_path / "cut" / "checkpoint_8").exists():
                assert cut.poll() is None and time.monotonic() < deadline, (
                    "no checkpoint_8 to kill a process after"
                )
                time.sleep(0.05)
            (victim,) = process_ids(tmp_path / "cut", 1)
            os.kill(victim, signal.SIGKILL)
            output = cut.communicate(timeout=900)[0]
        finally:
            cut.terminate()
    assert cut.returncode == 0, output[-4000:]
    assert "starting all again (1 of 2)" in output
    manifest = json.loads((tmp_path / "cut" / "manifest.json").read_text())
    assert (
        len(manifest["starts"]) == 2
        and manifest["starts"][1]["step"] >= 8
        and manifest["status"] == "finished"
    )
    assert losses(tmp_path / "cut") == expected  # bit for bit: JSON keeps every digit

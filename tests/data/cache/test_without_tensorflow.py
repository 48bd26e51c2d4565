"""A machine without TensorFlow and SeqIO trains from a cache, and resumes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("seqio", reason="caches are written by SeqIO")

RUN = pathlib.Path(__file__).with_name("cached_run.py")
STEPS, PERIOD = 12, 3
SMALL = [
    "--gin_file=models/t5_1_1_tiny.gin",
    "--gin_file=runs/pretrain.gin",
    "--gin.MIXTURE_OR_TASK_NAME='without_tensorflow'",
    "--gin.USE_CACHED_TASKS=True",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16}",
    "--gin.BATCH_SIZE=8",
    "--gin.EVAL_STEPS=1",
    "--gin.STATS_PERIOD=1",
    f"--gin.SAVING_PERIOD={PERIOD}",
    f"--gin.TRAIN_STEPS={STEPS}",
    "--gin.T5Config.num_encoder_layers=1",
    "--gin.T5Config.num_decoder_layers=1",
    "--gin.T5Config.emb_dim=16",
    "--gin.T5Config.num_heads=2",
    "--gin.T5Config.mlp_dim=32",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_folder):
    """A cache of two domains, written by the command."""
    from upcycle_jax import cache_tasks

    folder = tmp_path_factory.mktemp("cache")
    domains = {"code": [str(text_folder / "code.txt")], "words": [str(text_folder / "words.txt")]}
    flags = [
        "--gin_file=runs/pretrain.gin",
        "--gin.MIXTURE_OR_TASK_NAME='without_tensorflow'",
        f"--gin.TEXT_FILES={domains!r}",
    ]
    assert cache_tasks.main([*flags, f"--output_cache_dir={folder}"]) == 0
    return folder


def start(model_dir, folder, seconds=0.0, devices=1):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(RUN.parents[3]), os.environ.get("PYTHONPATH", "")]),
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        # The three runs are one program, of many small parts.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [
        sys.executable,
        str(RUN),
        str(seconds),
        *SMALL,
        f"--gin.MODEL_DIR='{model_dir}'",
        f"--seqio_additional_cache_dirs={folder}",
    ]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def losses(model_dir):
    """The loss of every step as last written; a line torn by the kill is left out."""
    path = model_dir / "train" / "metrics.jsonl"
    rows = (
        [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        if path.exists()
        else []
    )
    return {row["step"]: row["loss"] for row in rows}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """MODEL_DIR of an uninterrupted run, and what it printed."""
    model_dir = tmp_path_factory.mktemp("runs") / "whole"
    process = start(model_dir, folder)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return model_dir, output


def test_training_imports_neither(whole):
    model_dir, output = whole
    assert "imported: []" in output
    evaluated = {path.name for path in (model_dir / "training_eval").iterdir()}
    assert evaluated == {"without_tensorflow_code", "without_tensorflow_words"}


def test_a_killed_run_ends_with_the_same_losses(folder, whole, tmp_path):
    whole, killed = whole[0], tmp_path / "killed"
    process = start(killed, folder, seconds=0.3)
    deadline = time.monotonic() + 300
    saved = (
        killed / f"checkpoint_{PERIOD}" / "commit_success.txt"
    )  # written in the background, which may take longer than two steps
    while max(losses(killed), default=0) < 5 or not saved.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    process = start(killed, folder)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "imported: []" in output, output
    assert losses(killed) == losses(whole) and len(losses(whole)) == STEPS
    starts = [
        entry["step"] for entry in json.loads((killed / "manifest.json").read_text())["starts"]
    ]
    assert len(starts) == 2 and starts[0] == 0 and starts[1] >= PERIOD and starts[1] % PERIOD == 0


@pytest.mark.parametrize(
    ("cached", "message"),
    [
        # test_writer.py has the same message, where both are installed.
        pytest.param(
            "True",
            (
                "Prepare it with `python -m upcycle_jax.cache_tasks --tasks=not_there"
                " --output_cache_dir={folder}`"
            ),
            marks=pytest.mark.slow,
        ),
        ("False", "is read through SeqIO, which is not installed ("),
    ],
)
def test_what_is_missing_is_told(folder, tmp_path, cached, message):
    flags = [
        flag.replace("without_tensorflow", "not_there").replace("TASKS=True", f"TASKS={cached}")
        for flag in SMALL
    ]
    command = [
        sys.executable,
        str(RUN),
        "0",
        *flags,
        f"--gin.MODEL_DIR='{tmp_path}/run'",
        f"--seqio_additional_cache_dirs={folder}",
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(RUN.parents[3]), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 2 and message.format(folder=folder) in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_language_models_need_neither_nor_the_tokenizer(tmp_path, text_folder, tokenizer_folder):
    from upcycle_jax import cache_tasks

    flags = [
        "--gin_file=models/tiny_lm.gin",
        "--gin_file=runs/pretrain_lm.gin",
        "--gin.MIXTURE_OR_TASK_NAME='rows'",
        f"--gin.TEXT_FILES={[str(text_folder / '*.txt')]!r}",
        f"--gin.VOCABULARY={str(tokenizer_folder)!r}",
        "--gin.TASK_FEATURE_LENGTHS={'targets': 32}",
        "--gin.BATCH_SIZE=8",
        "--gin.EVAL_STEPS=1",
        "--gin.TRAIN_STEPS=4",
        "--gin.WARMUP_STEPS=1",
        f"--gin.MODEL_DIR='{tmp_path / 'run'}'",
    ]
    assert cache_tasks.main([*flags, f"--output_cache_dir={tmp_path}"]) == 0
    command = [sys.executable, str(RUN), "0", *flags, "--gin.USE_CACHED_TASKS=True"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(RUN.parents[3]), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run(
        [*command, f"--seqio_additional_cache_dirs={tmp_path}"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0 and "imported: []" in done.stdout, done.stderr

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


def flags_of(model_dir, folder, *, task="without_tensorflow", cached=True):
    return [
        *(
            flag.replace("without_tensorflow", task).replace("TASKS=True", f"TASKS={cached}")
            for flag in SMALL
        ),
        f"--gin.MODEL_DIR='{model_dir}'",
        f"--seqio_additional_cache_dirs={folder}",
    ]


def start(*runs, seconds=0.0):
    """A process that has the runs with these flags, one after the other."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(RUN.parents[3]), os.environ.get("PYTHONPATH", "")]),
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
        # All runs are one program, of many small parts.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    first, *others = runs
    words = [*first, *(word for flags in others for word in ("--", *flags))]
    return subprocess.Popen(
        [sys.executable, str(RUN), str(seconds), *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
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
def runs(folder, tmp_path_factory):
    """A folder with MODEL_DIRs, and what was printed: `killed` began in a process that was killed;
    a second process was refused two runs, had one from beginning to end, `whole`, and finished the
    killed one. One process, since importing the library takes as long as a run.
    """
    place = tmp_path_factory.mktemp("runs")
    killed = place / "killed"
    process = start(flags_of(killed, folder), seconds=0.3)
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
    assert max(losses(killed)) < STEPS
    process = start(
        flags_of(place / "refused", folder, task="not_there"),
        flags_of(place / "refused", folder, task="not_there", cached=False),
        flags_of(place / "whole", folder),
        flags_of(killed, folder),
    )
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return place, output


def test_training_imports_neither(runs):
    place, output = runs
    assert "imported: []" in output
    evaluated = {path.name for path in (place / "whole" / "training_eval").iterdir()}
    assert evaluated == {"without_tensorflow_code", "without_tensorflow_words"}


def test_a_killed_run_ends_with_the_same_losses(runs):
    whole, killed = (runs[0] / name for name in ("whole", "killed"))
    assert losses(killed) == losses(whole) and len(losses(whole)) == STEPS
    starts = [
        entry["step"] for entry in json.loads((killed / "manifest.json").read_text())["starts"]
    ]
    assert len(starts) == 2 and starts[0] == 0 and starts[1] >= PERIOD and starts[1] % PERIOD == 0


def test_what_is_missing_is_told(runs, folder):
    place, output = runs
    assert "exit codes: [2, 2, 0, 0]" in output
    for message in (
        f"Prepare it with `python -m upcycle_jax.cache_tasks --tasks=not_there"
        f" --output_cache_dir={folder}`",
        "is read through SeqIO, which is not installed (",
    ):
        assert output.count(message) == 1, output
    assert not (place / "refused").exists()


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
